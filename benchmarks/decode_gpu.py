"""Decoding on a GPU: recorded steps, first checked against plain reading, then timed against the backbone alone.

    python benchmarks/decode_gpu.py [--out FILE.csv] [--no-compile] [--check-only]

The backbone has SmolLM2-135M's shape and random weights, banks hold random keys and values: neither changes what has
to be computed. Of every step p20, p50 and p80. `share` is the speed against the backbone alone (`memory=0`) in the same
runtime with the same batch. On a CPU a small model stands in, to see that the script runs.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_speed import ALL, build

from longmem.bank import MemoryBank
from longmem.model import LongMem
from longmem.steps import BatchDecoder

CAPACITY = 1536


def model_for(device: str, dtype: torch.dtype) -> LongMem:
    model = build(device, ALL, dtype)
    random = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.sidenet.named_parameters():
            if name.endswith(("alpha_D", "bias_KG")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=random, device=device).to(parameter.dtype)
    model.sidenet.to(model.backbone.dtype)
    return model.eval().requires_grad_(False)


def bank_of(model: LongMem, tokens: int, seed: int = 0) -> MemoryBank:
    """Random keys and values, without texts; half as much room again, as a bank that has grown."""
    bank = model.new_bank()
    heads, head_dim = len(model.config.memory_heads), model.backbone.head_dim
    shape = (heads, tokens, head_dim)
    random = torch.Generator(model.device).manual_seed(seed)
    for name in ("_keys_HCE", "_values_HCE"):
        rows_HCE = torch.empty(shape, dtype=torch.bfloat16, device=model.device)
        for head in range(heads):
            rows_HCE[head].normal_(generator=random)
        setattr(bank, name, rows_HCE)
    bank._length = tokens
    return bank


def begin(model: LongMem, rows: int, banks: Sequence[MemoryBank | None], **settings: Any) -> BatchDecoder:
    decoder = BatchDecoder(model, rows, CAPACITY, **settings)
    for row, bank in enumerate(banks):
        decoder.begin(row, text_of(model, row), bank)
    return decoder


def text_of(model: LongMem, row: int) -> Tensor:
    """Rows of different lengths, as texts of different users are."""
    length = (512 if model.device.type == "cuda" else 100) - 3 * row
    return torch.arange(row, row + length) * 7919 % model.backbone.config.vocab_size


@torch.no_grad()
def check(model: LongMem, compile: bool) -> None:
    """Every row's logits, step after step, against reading the whole text at once."""
    large = bank_of(model, 5000)
    cases = [[None], [large], [large] * 3, [large, None, bank_of(model, 300, seed=2)]]
    worst = 0.0
    for banks in cases:
        decoder = begin(model, len(banks), banks, compile=compile)
        vocabulary = model.backbone.config.vocab_size
        texts = [text_of(model, row) for row in range(len(banks))]
        for step in range(6):
            now = [(31 * step + row) % vocabulary for row in range(len(banks))]
            logits_BV, _ = decoder.step(now, banks)
            texts = [torch.cat((text, torch.tensor([token]))) for text, token in zip(texts, now, strict=True)]
            for row, (text, bank) in enumerate(zip(texts, banks, strict=True)):
                expected_V = model(text.to(model.device)[None], [bank], last_only=True).logits_BTV[0, -1].float()
                error = float((logits_BV[row].float() - expected_V).norm() / expected_V.norm())
                worst = max(worst, error)
    print(f"check in float32, compile={compile}: relative error {worst:.1e}", flush=True)
    assert worst < 1e-3


def quantiles(run: Callable[[], object], device: str, repeats: int) -> list[float]:
    """p20, p50, p80 in milliseconds, the wait for the result included."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-compile", action="store_true", help="layers as they are, for comparison")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--largest", type=int, default=1 << 24, help="tokens of the largest bank")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compile = device == "cuda" and not args.no_compile
    # In bfloat16 the same sums in another order differ by some per cent, which would hide a fault.
    check(model_for(device, torch.float32), compile)
    if args.check_only:
        return
    model = model_for(device, torch.bfloat16 if device == "cuda" else torch.float32)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    about = {"commit": commit, "device": name, "torch": torch.__version__, "compile": compile}
    alone: dict[int, float] = {}
    results = []
    sizes = [1 << 16, 1 << 20, 1 << 24] if device == "cuda" else [1 << 12]
    for rows in (1, 32) if device == "cuda" else (1, 2):
        plan: list[tuple[str, Callable[[], list[MemoryBank | None]], float]] = [
            ("backbone alone", lambda rows=rows: [None] * rows, 0.0),
            ("empty bank", lambda rows=rows: [None] * rows, 1.0),
        ]
        for size in sizes:
            if size <= args.largest:
                plan.append((f"one bank, {size:,}", lambda rows=rows, size=size: [bank_of(model, size)] * rows, 1.0))
        if rows > 1:
            plan.append(
                (
                    f"{rows} banks, {sizes[0]:,}",
                    lambda rows=rows: [bank_of(model, sizes[0], r) for r in range(rows)],
                    1.0,
                )
            )
        for what, make, memory in plan:
            banks = make()
            decoder = begin(model, rows, banks, memory=memory, compile=compile)
            tokens = [5] * rows
            for _ in range(3):
                decoder.step(tokens, banks)
            # As generation does: the next token has to be known before the next step.
            p20, p50, p80 = quantiles(
                lambda d=decoder, t=tokens, b=banks: d.step(t, b)[0].argmax(-1).tolist(), device, 60
            )
            alone.setdefault(rows, p50)
            row = {"rows": rows, "bank": what, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "share": alone[rows] / p50}
            results.append({**row, **about})
            print(
                f"{rows:3} rows, {what:24} {p50:8.3f} ms, {1000 * rows / p50:8.0f} tokens/s, {row['share']:.2f}",
                flush=True,
            )
            del decoder, banks
            if device == "cuda":
                torch.cuda.empty_cache()
    if args.out is not None:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(results[0]))
            writer.writeheader()
            writer.writerows(results)


if __name__ == "__main__":
    main()
