#!/usr/bin/env bash
# What sharpening (`SideNetConfig.sharpening`) does for recall from large banks and for memory among other books'.
#
#   benchmarks/sharpening.sh SIDENET HELDOUT OUT BETA [TOKENS …]
#
# SIDENET is a checkpoint folder; a copy that sharpens by BETA is made in OUT (0 for none, to compare with). TOKENS are
# bank sizes, 65536, 1048576 and 4194304 by default.
set -euo pipefail

sidenet=$1 heldout=$2 out=$3 beta=$4
shift 4
sizes=("$@")
((${#sizes[@]})) || sizes=(65536 1048576 4194304)
mkdir -p "$out/sidenet-$beta"
cp "$sidenet"/* "$out/sidenet-$beta/"
python3 - "$out/sidenet-$beta/config.json" "$beta" <<'END'
import json, pathlib, sys

path = pathlib.Path(sys.argv[1])
config = json.loads(path.read_text())
config["sidenet"]["sharpening"] = float(sys.argv[2])
path.write_text(json.dumps(config, indent=1))
END
python3 -m longmem eval recall --model "$out/sidenet-$beta" --filler "$heldout" --context 64 --cases 50 --task passkey \
    "${sizes[@]/#/--remembered=}" --json "$out/recall-$beta.json"
python3 -m longmem eval perplexity "$heldout" --model "$out/sidenet-$beta" --protocol sliding --prefill 65536 \
    --segments 2 --rows 18 --only bank_off,bank_on,bank_crowded --json "$out/crowded-$beta.json"
