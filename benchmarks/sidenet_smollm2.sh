#!/usr/bin/env bash
# The runs behind the SideNet that ships for SmolLM2-135M, one step a call: training, its memory-free twin, the paper's
# recipe with the same budget, and their figures on held-out texts.
#
#   benchmarks/sidenet_smollm2.sh STEP TRAIN HELDOUT OUT [OPTION of `longmem train` …]
#
# STEP, in this order:
#   main, twin, paper     train into OUT/STEP
#   pack-NAME             OUT/NAME → OUT/NAME-int8, OUT/NAME-int4
#   told, twin-told       go on from OUT/main-int4 and OUT/twin with a quarter of histories (HISTORIES, of `longmem histories`)
#   asked-SEED, twin-asked  go on from OUT/told and OUT/twin-told: windows starved, a wrong bank harmless, histories with
#                         ordinary talk (`longmem histories --replies`)
#   evident-SEED, twin-evident  go on from OUT/fitted-1 and OUT/twin-asked: passage evidence, crowds of 16
#   evaluate-NAME         OUT/NAME → OUT/evals
# TRAIN, HELDOUT, HISTORIES: folders of texts, or of `longmem tokenize`. The SideNet that ships is `evident-2-int4`, the
# median of seeds 0, 1, 2 by its gain in a sliding window, after `main --steps 2400` (78.6M tokens, eight minutes of one
# H100), `told` (104.9M tokens, nine minutes of one H200; its histories were those from before commit 63053ce), `asked-1`
# (98.3M tokens, nine minutes of one H200), `fit_evidence.py OUT/asked-1 TRAIN HISTORIES --out OUT/fitted-1` (four minutes
# of two CPU cores) and `evident-2` (32.8M tokens, five minutes of one H200). Its twin has not been trained that last step.
set -euo pipefail
step=$1 train=$2 heldout=$3 out=$4
shift 4
longmem=(python3 -m longmem)
memory=(--heads '17.1 18.2 20.2 23.0 23.1 23.2' --empty-weight 0.5 --wrong-fraction 0.1)
common=(--backbone smollm2-135m --steps 3100 --rows 16 --segment 2048 --bank-tokens 32768 --max-segments 32
    --learning-rate 0.002 --warmup 100 --compile --log-every 50)
asked=(--steps 3000 --learning-rate 0.001 --warmup 60 --mix '0.75 0.25' --answer-weight 10 --starved-fraction 0.2)
evident=(--steps 1000 --learning-rate 0.001 --warmup 60 --mix '0.75 0.25' --answer-weight 10 --starved-fraction 0.2)
told=(--steps 3200 --learning-rate 0.001 --mix '0.75 0.25' --answer-weight 10)
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
    told)
        "${longmem[@]}" train "$train" "${HISTORIES:?a folder of longmem histories}" --out "$out/told" \
            --warm-from "$out/main-int4" "${common[@]}" --empty-weight 0.5 "${told[@]}" --wrong-fraction 0.25 \
            --crowded-fraction 0.25 --newest-wins "$@"
        ;;
    twin-told)
        "${longmem[@]}" train "$train" "${HISTORIES:?a folder of longmem histories}" --out "$out/twin-told" \
            --warm-from "$out/twin" "${common[@]}" "${told[@]}" --no-memory "$@"
        ;;
    asked-*)
        "${longmem[@]}" train "$train" "${HISTORIES:?a folder of longmem histories}" --out "$out/$step" \
            --warm-from "$out/told" "${common[@]}" --empty-weight 0.5 "${asked[@]}" --wrong-fraction 0.25 \
            --crowded-fraction 0.25 --newest-wins --harmless-weight 0.3 --seed "${step#asked-}" "$@"
        ;;
    twin-asked)
        "${longmem[@]}" train "$train" "${HISTORIES:?a folder of longmem histories}" --out "$out/twin-asked" \
            --warm-from "$out/twin-told" "${common[@]}" "${asked[@]}" --no-memory "$@"
        ;;
    evident-*)
        "${longmem[@]}" train "$train" "${HISTORIES:?a folder of longmem histories}" --out "$out/$step" \
            --warm-from "$out/fitted-1" "${common[@]}" --empty-weight 0.5 "${evident[@]}" --wrong-fraction 0.25 \
            --crowded-fraction 0.125 --crowd 16 --starved-crowd 16 --newest-wins --passage-evidence --harmless-weight 0.6 \
            --windows 960+63 --seed "${step#evident-}" "$@"
        ;;
    twin-evident)
        "${longmem[@]}" train "$train" "${HISTORIES:?a folder of longmem histories}" --out "$out/twin-evident" \
            --warm-from "$out/twin-asked" "${common[@]}" "${evident[@]}" --no-memory "$@"
        ;;
    pack-*)
        for precision in int8 int4; do
            "${longmem[@]}" pack "$out/${step#pack-}" --out "$out/${step#pack-}-$precision" --precision "$precision"
        done
        ;;
    evaluate-twin*) evaluate "${step#evaluate-}" bank_off ;;
    evaluate-*-int4) evaluate "${step#evaluate-}" backbone_local,backbone_window,bank_off,bank_on,bank_wrong ;;
    evaluate-*) evaluate "${step#evaluate-}" bank_off,bank_on,bank_wrong ;;
    *)
        echo "unknown step $step: the head of $0 lists those there are" >&2
        exit 2
        ;;
esac
