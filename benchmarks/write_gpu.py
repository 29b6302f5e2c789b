"""Writing on a GPU against the backbone's own prefill of the same tokens.

    python benchmarks/write_gpu.py [--out FILE.csv] [--model smollm2-135m --text FILE] [--tokens 262144] [--compile]

"prefill" is the whole backbone with nothing remembered and without logits, in windows of `PREFILLS` tokens, as many
tokens a batch as writing takes; "encode" is `LongMem.encode` with the windows that are told, NEW tokens behind CONTEXT,
so many a batch; "encode and store" hands what it found to a bank on disk as well. Ways take turns; seconds are by the
wall, the device's work included. Checked first, in float32: a batch of windows against windows one by one, and against
the keys of the backbone's own hidden states. Without `--model` the backbone has SmolLM2-135M's shape and random
weights, and the text is random too: neither changes what has to be computed. `--compile` compiles the layers for all
ways alike. On a CPU a small model stands in, to see that the script runs.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_speed import ALL, build

from longmem import LongMem
from longmem.bank import BankEntry
from longmem.config import EncodeConfig
from longmem.store import MemoryStore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Windows of the backbone's whole prefill, the last one as long as it was trained for.
PREFILLS = (1024, 2048, 8192)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def prefill(model: LongMem, ids_N: Tensor, window: int, batch_tokens: int) -> None:
    # To the device at once, as `encode` does it.
    for ids in ids_N.to(DEVICE).split(window * max(1, batch_tokens // window)):
        rows_BT = ids[: len(ids) // window * window].view(-1, window)
        for part_BT in (rows_BT, ids[rows_BT.numel() :][None]):
            if part_BT.numel():
                model.backbone(part_BT, boundaries={model.backbone.num_layers})


def encode(model: LongMem, ids_N: Tensor, windows: EncodeConfig, batch_size: int) -> tuple[Tensor, Tensor]:
    """As a model with these windows writes them."""
    before = model.sidenet.config
    model.sidenet.config = dataclasses.replace(before, encode=windows)
    try:
        return model.encode(ids_N, batch_size=batch_size)
    finally:
        model.sidenet.config = before


def store(model: LongMem, ids_N: Tensor, windows: EncodeConfig, batch_size: int, text: str) -> None:
    keys_HNE, values_HNE = encode(model, ids_N, windows, batch_size)
    ends_N = torch.linspace(0, len(text), len(ids_N) + 1).long()
    offsets_N2 = torch.stack((ends_N[:-1], ends_N[1:]), 1)
    with tempfile.TemporaryDirectory() as folder, MemoryStore.open(folder) as memories:
        bank = memories.bank("notes", model.bank_spec)
        bank.append(BankEntry("text", text, 0, ids_N, offsets_N2, keys_HNE, values_HNE))
        assert len(bank) == len(ids_N)


@torch.no_grad()
def check(tokens: int) -> None:
    model = build(DEVICE, ALL, torch.float32).eval()
    ids_N = torch.arange(tokens) * 7919 % model.backbone.config.vocab_size
    for windows in (EncodeConfig(), EncodeConfig(960, 64)):
        found = encode(model, ids_N, windows, 16)
        alone = encode(model, ids_N, windows, 1)
        parts = []
        for first, kept, end in windows.windows(0, tokens):
            input_1T = model.with_prefix(ids_N[first:end])[None].to(DEVICE)
            seen = model.backbone(input_1T, boundaries={*model.config.memory_layers, model.backbone.num_layers})
            parts.append([rows_H1TE[:, 0, kept - first + 1 :] for rows_H1TE in model.keys_values(seen)])
        for mine, one, plain in zip(found, alone, (torch.cat(p, dim=1) for p in zip(*parts, strict=True)), strict=True):
            for name, other in (("windows one by one", one), ("hidden states", plain)):
                error = float((mine.float() - other.float()).norm() / other.float().norm())
                assert error < 3e-3, f"{windows}: {error:.1e} away from {name}"  # kept in bfloat16
    print("check: passed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", help="a SideNet; otherwise random weights")
    parser.add_argument("--text", type=Path, help="what --model writes; random tokens otherwise")
    parser.add_argument("--tokens", type=int, default=1 << 18 if DEVICE == "cuda" else 5000)
    parser.add_argument("--windows", nargs="+", default=["768+256", "960+63", "1984+63", "2016+31"])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64] if DEVICE == "cuda" else [2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    check(2500)
    if args.model:
        model = LongMem.from_pretrained(args.model, device=DEVICE, dtype="bfloat16")
    else:
        model = build(DEVICE, ALL, torch.bfloat16).eval()
    text = "a" * args.tokens
    ids_N = torch.arange(args.tokens) * 7919 % model.backbone.config.vocab_size
    if args.model and args.text:
        text = args.text.read_text(encoding="utf-8")
        began = time.perf_counter()
        ids = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["input_ids"]
        print(f"tokenised at {len(ids) / (time.perf_counter() - began):,.0f} tokens/s", flush=True)
        ids_N = torch.tensor(ids)[: args.tokens]
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64
        # Windows of other sizes are other shapes, not dynamic ones.
        torch._dynamo.config.automatic_dynamic_shapes = False
        model.backbone.compile_layers()
    ways: dict[str, Callable[[], Any]] = {}
    batch_of: dict[str, int] = {}
    for batch in args.batches:
        for window in PREFILLS:
            ways[f"prefill, windows of {window}, batches of {batch * 1024:,} tokens"] = (
                lambda w=window, b=batch: prefill(model, ids_N, w, b * 1024)
            )  # fmt: skip
        for name in args.windows:
            windows = EncodeConfig(*map(int, name.split("+")))
            # As many tokens as windows of 1,024 have.
            size = max(1, batch * 1024 // (windows.stride + windows.overlap))
            ways[f"encode, {name}, {size} a batch"] = lambda w=windows, s=size: encode(model, ids_N, w, s)
            if batch == args.batches[0] and name == args.windows[0]:
                ways[f"encode and store, {name}, {size} a batch"] = (
                    lambda w=windows, s=size: store(model, ids_N, w, s, text)
                )  # fmt: skip
        batch_of |= {way: batch for way in ways if way not in batch_of}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    rows: list[dict[str, Any]] = []
    about = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": torch.__version__,
        "model": args.model or "random",
        "compile": args.compile,
        "tokens": len(ids_N),
    }
    for number in range(args.rounds + 1):
        for way, run in ways.items():
            wait()
            began = time.perf_counter()
            with torch.no_grad():
                run()
            wait()
            if number:  # the first is to warm up
                seconds[way].append(time.perf_counter() - began)
        if number == 0:
            print("warm", flush=True)
            continue
        # All figures so far, in every round: a time limit loses none.
        rows = []
        for way, times in seconds.items():
            told = f"batches of {batch_of[way] * 1024:,} tokens"
            bases = {window: f"prefill, windows of {window}, {told}" for window in PREFILLS}
            p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            base = {window: float(torch.tensor(seconds[name]).median()) for window, name in bases.items()}
            rows.append({
                "way": way, "seconds_p20": p20, "seconds_p50": p50, "seconds_p80": p80,
                "tokens_per_s": len(ids_N) / p50,
                **{f"against_prefill_{window}": prefill_s / p50 for window, prefill_s in base.items()},
                "rounds": len(times), **about,
            })  # fmt: skip
        if args.out is not None:
            with args.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    for row in rows:
        print(
            f"{row['way']:<56}{row['tokens_per_s']:12,.0f} tokens/s  prefill of "
            + ", ".join(f"{window:,}: {row[f'against_prefill_{window}']:5.2f} ×" for window in PREFILLS)
        )


if __name__ == "__main__":
    main()
