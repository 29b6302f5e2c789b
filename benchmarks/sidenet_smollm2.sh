#!/usr/bin/env bash
# Trains the SideNet that ships for SmolLM2-135M, its memory-free twin and the paper's recipe with one budget, measures all of them
# on held-out books, and packs the winner. Each result is kept as soon as it exists.
#
#   benchmarks/sidenet_smollm2.sh TRAIN HELDOUT OUT [STEPS]
#
# TRAIN and HELDOUT: folders of texts, or of `longmem tokenize`. 2,100 steps are 34M tokens: at the
# rates in docs/log.md about 11 minutes of training on one H200, evaluations not counted. Not yet run as a whole.
set -euo pipefail
train=$1 heldout=$2 out=$3 steps=${4:-2100}
heads='17.1 18.2 20.2 23.0 23.1 23.2'
common=(--backbone smollm2-135m --steps "$steps" --rows 16 --segment 1024 --bank-tokens 16384 --learning-rate 0.002
    --warmup 100 --empty-fraction 0.2 --wrong-fraction 0.1 --log-every 50 --save-every 500)
mkdir -p "$out/evals"

evaluate() { # NAME CONDITIONS
    for protocol in blocks sliding; do
        for prefill in 16384 65536; do
            longmem eval perplexity "$heldout" --model "$out/$1" --protocol "$protocol" --prefill "$prefill" --segments 16 \
                --only "$2" --json "$out/evals/$1-$protocol-$prefill.json"
        done
    done
}

longmem train "$train" --out "$out/main" --heads "$heads" "${common[@]}"
for precision in int8 int4; do longmem pack "$out/main" --out "$out/$precision" --precision "$precision"; done
evaluate main backbone_local,backbone_window,bank_off,bank_on,bank_wrong
evaluate int4 bank_off,bank_on,bank_wrong
longmem train "$train" --out "$out/twin" --heads "$heads" --no-memory "${common[@]}"
evaluate twin bank_off
longmem train "$train" --out "$out/paper" --recipe paper --below 3 "${common[@]}"
evaluate paper bank_off,bank_on,bank_wrong
