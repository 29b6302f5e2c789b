"""Writing on a CPU against the backbone's own prefill of the same tokens.

    python benchmarks/write_cpu.py TEXT [--tokens 3072] [--rounds 7]

Ways take turns, a round each, so that all suffer alike from what else the machine does; processor time counts, and
time by the wall stands beside it. "prefill" is the whole backbone with nothing remembered, in windows of 1,024 tokens
(as large as those of writing) or more; "write, by transformers" is its lower layers in the windows of writing, then
keys and values from the hidden states at the memory layers; "write" is `LongMem.encode`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from search_cpu import processor
from torch import Tensor

from longmem import LongMem

RESULTS = Path(__file__).parent / "results" / "write_cpu.csv"


def prefill(model: LongMem, ids_N: Tensor, window: int) -> None:
    for ids_T in ids_N.split(window):
        model.backbone(ids_T[None], boundaries={model.backbone.num_layers})


def by_transformers(model: LongMem, ids_N: Tensor) -> None:
    for first, _, end in model.config.encode.windows(0, len(ids_N)):
        model.keys_values(
            model.backbone(model.with_prefix(ids_N[first:end])[None], boundaries=model.config.memory_layers)
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Writing on a CPU against prefill.")
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 2048], help="of prefill")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways: dict[tuple[str, str], Callable[[], Any]] = {}
    for dtype in ("float32", "bfloat16"):
        model = LongMem.from_pretrained(args.model, device="cpu", dtype=dtype)
        ids = model.tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        ids_N = torch.tensor(ids[: args.tokens])
        for window in args.windows:
            ways[dtype, f"prefill, {window}"] = lambda m=model, i=ids_N, w=window: prefill(m, i, w)
        ways[dtype, "write, by transformers"] = lambda m=model, i=ids_N: by_transformers(m, i)
        ways[dtype, "write"] = lambda m=model, i=ids_N: m.encode(i)
    spent: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(args.rounds + 1):
        for way, run in ways.items():
            wall, processor_time = time.perf_counter(), time.process_time()
            run()
            if number:  # the first is to warm up
                spent[way].append((time.process_time() - processor_time, time.perf_counter() - wall))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    common = {"commit": commit, "device": processor(), "threads": args.threads, "versions": versions}
    rows = []
    for (dtype, way), times in spent.items():
        seconds, wall = (torch.tensor(column) for column in zip(*times, strict=True))
        base = torch.tensor([cpu for cpu, _ in spent[dtype, f"prefill, {args.windows[0]}"]]).median()
        per_second = args.tokens / seconds.quantile(torch.tensor([0.95, 0.8, 0.5, 0.2]))
        row = {**common, "dtype": dtype, "way": way, "tokens": args.tokens, "rounds": args.rounds}
        row |= {f"tokens_per_s_p{p}": f"{value:.1f}" for p, value in zip((5, 20, 50, 80), per_second, strict=True)}
        row |= {"tokens_per_s_wall_p50": f"{args.tokens / wall.median():.1f}"}
        rows.append(row | {"against_prefill": f"{base / seconds.median():.3f}", "load": f"{os.getloadavg()[0]:.1f}"})
        print(f"{dtype:<10}{way:<24}{per_second[2]:8.1f} tokens/s  {base / seconds.median():.2f} x prefill", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
