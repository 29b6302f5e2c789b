#!/usr/bin/env bash
# Screening runs: one question each, everything else as in the base, 500 steps of 32,768 tokens (16.4M).
#
#   benchmarks/ablate_smollm2.sh NAME TRAIN HELDOUT OUT [OPTION of `longmem train` …]
set -euo pipefail
name=$1 train=$2 heldout=$3 out=$4
shift 4
heads='17.1 18.2 20.2 23.0 23.1 23.2'
options=()
case $name in
    base) ;;
    short-segments) options=(--rows 32 --segment 1024 --max-segments 64 --bank-tokens 16384) ;;
    three-heads) heads='17.1 18.2 20.2' ;;
    head-28) heads="$heads 28.0" ;;
    head-7) heads="7.2 $heads" ;;
    difference) options=(--update difference) ;;
    one-loss) options=(--empty-weight 0) ;;
    twin) options=(--no-memory) ;;
    often-wrong) options=(--wrong-fraction 0.25) ;;
    crowded) options=(--crowded-fraction 0.25 --crowd 4) ;;
    slow) options=(--learning-rate 0.001) ;;
    *)
        echo "unknown variant $name" >&2
        exit 2
        ;;
esac
mkdir -p "$out/evals"
python3 -m longmem train "$train" --out "$out/$name" --heads "$heads" --backbone smollm2-135m --steps 500 --rows 16 \
    --segment 2048 --bank-tokens 32768 --max-segments 32 --learning-rate 0.002 --warmup 60 --empty-weight 0.5 \
    --wrong-fraction 0.1 --compile --log-every 50 "${options[@]}" "$@"
for protocol in blocks sliding; do
    python3 -m longmem eval perplexity "$heldout" --model "$out/$name" --protocol "$protocol" --prefill 65536 \
        --segments 16 --only bank_off,bank_on,bank_wrong,bank_crowded --json "$out/evals/$name-$protocol-65536.json"
done
