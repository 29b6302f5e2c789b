"""Tokens a second of texts decoded side by side, without a bank, with the SideNet.

OMP_NUM_THREADS=1 python benchmarks/decode_batch.py [--model smollm2-135m] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch

from longmem import LongMem
from longmem.steps import BatchDecoder

PROMPT, STEPS = 200, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = LongMem.from_pretrained(args.model)
    found = []
    for rows in args.rows:
        decoder = BatchDecoder(model, rows, 1536)
        for row in range(rows):
            tokens_N = torch.arange(row, row + PROMPT) * 7919 % model.backbone.config.vocab_size
            decoder.begin(row, model.with_prefix(tokens_N))
        times = []
        for _ in range(STEPS + 3):
            began = time.perf_counter()
            decoder.step([5] * rows, [None] * rows)[0].argmax(-1).tolist()
            times.append(1000 * (time.perf_counter() - began))
        p20, p50, p80 = torch.tensor(times[3:]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        found.append(
            {"rows": rows, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "tokens_per_second": 1000 * rows / p50}
        )
        print(f"{rows:3} rows: {p50:7.1f} ms a step, {1000 * rows / p50:7.1f} tokens/s", flush=True)
    if args.out is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
        about = {"commit": commit, "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.out.write_text(json.dumps({**about, "prompt": PROMPT, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
