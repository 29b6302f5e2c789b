#!/usr/bin/env bash
# How much of the training text should be histories, and should their answers weigh more? Screening runs as those of
# ablate_smollm2.sh, with what is remembered of single things beside the perplexity.
#
#   benchmarks/ablate_histories.sh histories TEXTS HISTORIES            (once: 20M tokens, five minutes of one core)
#   benchmarks/ablate_histories.sh NAME TEXTS HISTORIES HELDOUT OUT [OPTION of `longmem train` …]
#   benchmarks/ablate_histories.sh table OUT
#
# NAME: texts (no histories), share-10, share-25 (percent of the segments), share-10-weighted, share-25-weighted (a token
# of an answer weighs 10); newest (as share-25-weighted, and heads may prefer what was remembered later), doubtful (a
# quarter of the rows read a wrong bank, a quarter their own among others'), newest-doubtful, newest-doubtful-30 (a token
# of an answer weighs 30), starved (as newest-doubtful, and a fifth of the steps read in short windows),
# harmless (as starved, and what a wrong bank changes is learned away); or evaluate-NAME, which trains nothing.
# Environment: WARM, a checkpoint to begin with; CASES (500; recall asks a fifth as often), REMEMBERED (16384), PREFILL
# (65536), SEGMENTS (16); CPU=1 compiles nothing, for a trial without a GPU.
set -euo pipefail
here=$(dirname "$0") name=$1
longmem=(python3 -m longmem)
case $name in
    table) exec python3 "$here/table_histories.py" "$2/evals" ;;
    histories) exec "${longmem[@]}" histories "$2" --out "$3" --tokens 20000000 ;;
esac
texts=$2 histories=$3 heldout=$4 out=$5
shift 5
cases=${CASES:-500} remembered=${REMEMBERED:-16384} prefill=${PREFILL:-65536} segments=${SEGMENTS:-16}
documents=("$texts" "$histories")
asked=(--mix '0.75 0.25' --answer-weight 10) doubt=(--wrong-fraction 0.25 --crowded-fraction 0.25)
case ${name#evaluate-} in
    texts) documents=("$texts") options=() ;;
    share-10) options=(--mix '0.9 0.1') ;;
    share-25) options=(--mix '0.75 0.25') ;;
    share-10-weighted) options=(--mix '0.9 0.1' --answer-weight 10) ;;
    share-25-weighted) options=("${asked[@]}") ;;
    newest) options=("${asked[@]}" --newest-wins) ;;
    doubtful) options=("${asked[@]}" "${doubt[@]}") ;;
    newest-doubtful) options=("${asked[@]}" "${doubt[@]}" --newest-wins) ;;
    starved) options=("${asked[@]}" "${doubt[@]}" --newest-wins --starved-fraction 0.2) ;; # its files had all windows of 256
    harmless) options=("${asked[@]}" "${doubt[@]}" --newest-wins --starved-fraction 0.2 --harmless-weight 1) ;;
    newest-doubtful-30) options=("${asked[@]}" "${doubt[@]}" --newest-wins --answer-weight 30) ;;
    *)
        echo "unknown variant $name: the head of $0 lists those there are" >&2
        exit 2
        ;;
esac
[[ ${CPU:-} ]] || options+=(--compile)
if [[ ${WARM:-} ]]; then
    begin=(--warm-from "$WARM" --learning-rate 0.001 --warmup 40)
else
    begin=(--heads '17.1 18.2 20.2 23.0 23.1 23.2' --learning-rate 0.002 --warmup 60)
fi
mkdir -p "$out/evals"
if [[ $name != evaluate-* ]]; then
    "${longmem[@]}" train "${documents[@]}" --out "$out/$name" "${begin[@]}" \
        --backbone smollm2-135m --steps 500 --rows 16 --segment 2048 --bank-tokens 32768 --max-segments 32 \
        --empty-weight 0.5 --wrong-fraction 0.1 --log-every 50 "${options[@]}" "$@"
fi
name=${name#evaluate-}
"${longmem[@]}" eval facts --model "$out/$name" --cases "$cases" --remembered "$remembered" \
    --json "$out/evals/$name-facts.json"
"${longmem[@]}" eval recall --model "$out/$name" --cases "$((cases / 5))" --remembered "$remembered" \
    --json "$out/evals/$name-recall.json"
for protocol in blocks sliding; do
    "${longmem[@]}" eval perplexity "$heldout" --model "$out/$name" --protocol "$protocol" --prefill "$prefill" \
        --segments "$segments" --only bank_off,bank_on,bank_wrong --json "$out/evals/$name-$protocol.json"
done
python3 "$here/table_histories.py" "$out/evals"
