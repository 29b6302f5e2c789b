#!/usr/bin/env bash
# The runs behind the SideNet that ships for SmolLM2-135M, one step a call: training, its memory-free twin, the paper's
# recipe with the same budget, and their figures on held-out texts.
#
#   benchmarks/sidenet_smollm2.sh STEP TRAIN HELDOUT OUT [OPTION of `longmem train` …]
#
# STEP: main, twin, paper (train into OUT/STEP), pack (OUT/main → OUT/int8, OUT/int4) or evaluate-NAME (OUT/NAME → OUT/evals).
# TRAIN and HELDOUT: folders of texts, or of `longmem tokenize`. 3,100 steps are 101.6M tokens, on one H100 about 9 minutes
# (main), 4 (twin), 4 (paper) and 3 for the evaluations of each. The SideNet that ships was trained with `--steps 2400`, and
# so were its twin and the paper's recipe.
set -euo pipefail
step=$1 train=$2 heldout=$3 out=$4
shift 4
longmem=(python3 -m longmem)
memory=(--heads '17.1 18.2 20.2 23.0 23.1 23.2' --empty-weight 0.5 --wrong-fraction 0.1)
common=(--backbone smollm2-135m --steps 3100 --rows 16 --segment 2048 --bank-tokens 32768 --max-segments 32
    --learning-rate 0.002 --warmup 100 --compile --log-every 50)
mkdir -p "$out/evals"

evaluate() { # NAME CONDITIONS
    for protocol in blocks sliding; do
        for prefill in 16384 65536; do
            "${longmem[@]}" eval perplexity "$heldout" --model "$out/$1" --protocol "$protocol" --prefill "$prefill" \
                --segments 16 --only "$2" --json "$out/evals/$1-$protocol-$prefill.json"
        done
    done
}

case $step in
    main) "${longmem[@]}" train "$train" --out "$out/main" "${memory[@]}" "${common[@]}" "$@" ;;
    twin) "${longmem[@]}" train "$train" --out "$out/twin" --no-memory "${memory[@]}" "${common[@]}" "$@" ;;
    paper) "${longmem[@]}" train "$train" --out "$out/paper" --recipe paper --below 3 --empty-weight 0 "${common[@]}" "$@" ;;
    pack)
        for precision in int8 int4; do
            "${longmem[@]}" pack "$out/main" --out "$out/$precision" --precision "$precision"
        done
        ;;
    evaluate-twin*) evaluate "${step#evaluate-}" bank_off ;;
    evaluate-int4) evaluate int4 backbone_local,backbone_window,bank_off,bank_on,bank_wrong ;;
    evaluate-*) evaluate "${step#evaluate-}" bank_off,bank_on,bank_wrong ;;
    *)
        echo "unknown step $step: give main, twin, paper, pack or evaluate-NAME" >&2
        exit 2
        ;;
esac
