"""Decoding on a GPU: recorded steps, first checked against plain reading, then timed against the backbone alone.

    python benchmarks/decode_gpu.py [--out FILE.csv] [--no-compile] [--check-only] [--rows 1 32] [--largest TOKENS]
        [--both] [--no-check] [--profile]

The backbone has SmolLM2-135M's shape and random weights, banks hold random keys and values: neither changes what has
to be computed. Of every step p20, p50 and p80. `share` is the speed against the backbone alone (`memory=0`) in the same
runtime with the same batch. `--profile` prints the kernels of a step with their times, and how long the host is busy
with banks before the step is launched; `--both` runs the SideNet behind the backbone as well as beside it, in turn over
the same banks. The file is written anew after every figure, so that a time limit loses none. On a CPU a small model
stands in, to see that the script runs.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_speed import ALL, LOOK_UP, build

from longmem.approximate import BankIndex
from longmem.bank import MemoryBank
from longmem.lists import KeyLists
from longmem.model import LongMem
from longmem.sketch import Basis, Sketch
from longmem.steps import BatchDecoder
from longmem.windows import Branch

CAPACITY = 1536


def model_for(device: str, heads: tuple, dtype: torch.dtype) -> LongMem:
    model = build(device, heads, dtype)
    # As the SideNet that ships.
    model = LongMem(model.backbone, dataclasses.replace(model.config, newest_wins=True, passage_evidence=True))
    random = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.sidenet.named_parameters():
            if name.endswith(("alpha_D", "bias_KG", "newest_KG", "evidence_KG")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=random, device=device).to(parameter.dtype)
    model.sidenet.to(model.backbone.dtype)
    return model.eval().requires_grad_(False)


def bank_of(model: LongMem, tokens: int, seed: int = 0) -> MemoryBank:
    """Random keys and values, without texts."""
    bank = model.new_bank()
    shape = (len(model.config.memory_heads), tokens, model.backbone.head_dim)
    random = torch.Generator(model.device).manual_seed(seed)
    for name in ("_keys_HCE", "_values_HCE"):
        rows_HCE = torch.empty(shape, dtype=torch.bfloat16, device=model.device)
        for rows_CE in rows_HCE:
            rows_CE.normal_(generator=random)
        setattr(bank, name, rows_HCE)
    bank._length = tokens
    return bank


def grown(bank: MemoryBank, capacity: int) -> None:
    """A bank moves to a larger place and holds as much as fits there."""
    for name in ("_keys_HCE", "_values_HCE"):
        old_HCE = getattr(bank, name)
        new_HCE = torch.randn(old_HCE.shape[0], capacity, old_HCE.shape[2], device=old_HCE.device).to(old_HCE.dtype)
        new_HCE[:, : len(bank)] = old_HCE[:, : len(bank)]
        setattr(bank, name, new_HCE)
    bank._length = capacity


def index_of(bank: MemoryBank, size: int) -> BankIndex:
    """An index as `BankIndex.choose` makes it, of so many coordinates. What it finds of random keys says nothing."""
    asked = torch.randn(len(bank.keys_HNE), 512, bank.spec.head_dim, device=bank.device)
    heads = [
        Sketch.build(keys_1NE, Basis.fit(keys_1NE, query_1QE), size)
        for keys_1NE, query_1QE in zip(bank.keys_HNE.split(1), asked.split(1), strict=True)
    ]
    return BankIndex(tuple(heads), 64, 0.99, "")


def lists_of(bank: MemoryBank, size: int, share: float = 0.05) -> BankIndex:
    """An index of lists, of which a query reads a share."""
    asked = torch.randn(len(bank.keys_HNE), 512, bank.spec.head_dim, device=bank.device)
    heads = []
    for keys_1NE, query_1QE in zip(bank.keys_HNE.split(1), asked.split(1), strict=True):
        head = KeyLists.build(keys_1NE, Basis.fit(keys_1NE, query_1QE), size, 1)
        heads.append(dataclasses.replace(head, reads=max(1, int(share * head.tiles))))
    return BankIndex(tuple(heads), 64, 0.99, "")


def with_index(bank: MemoryBank) -> MemoryBank:
    bank._index = index_of(bank, 48)
    return bank


def begin(
    model: LongMem, rows: int, banks: Sequence[MemoryBank | None], *, two_streams: bool = True, **settings: Any
) -> BatchDecoder:
    decoder = BatchDecoder(model, rows, CAPACITY, **settings)
    if not two_streams:
        decoder._cache.backbone.branch = decoder._cache.sidenet.branch = Branch()
    for row, bank in enumerate(banks):
        decoder.begin(row, text_of(model, row), bank)
    return decoder


def error(found_BV: Tensor, expected_BV: Tensor) -> float:
    return float(((found_BV - expected_BV).float().norm(dim=-1) / expected_BV.float().norm(dim=-1)).max())


def text_of(model: LongMem, row: int) -> Tensor:
    """Rows of different lengths, as texts of different users are."""
    length = (512 if model.device.type == "cuda" else 100) - 3 * row
    return torch.arange(row, row + length) * 7919 % model.backbone.config.vocab_size


@torch.no_grad()
def check(model: LongMem, compile: bool, two_streams: bool) -> None:
    """Every row's logits, step after step, against reading the whole text at once."""
    vocabulary, errors, shares = model.backbone.config.vocab_size, [], []
    for sizes, shared in (([0], False), ([5000], False), ([5000] * 3, True), ([5000, 0, 300], False)):
        banks = [bank_of(model, size, seed=i) if size else None for i, size in enumerate(sizes)]
        banks = banks[:1] * len(banks) if shared else banks
        decoder = begin(model, len(banks), banks, compile=compile, two_streams=two_streams)
        for order in (banks, banks[::-1]):
            # The second time rows begin anew, with each other's banks: a recorded step is replayed over others.
            texts = [text_of(model, row) for row in range(len(banks))]
            for row, bank in enumerate(order):
                decoder.begin(row, texts[row], bank)
            for step in range(4):
                now = [(31 * step + row) % vocabulary for row in range(len(banks))]
                logits_BV, reads = decoder.step(now, order)
                texts = [torch.cat((text, torch.tensor([token]))) for text, token in zip(texts, now, strict=True)]
                for row, (text, bank) in enumerate(zip(texts, order, strict=True)):
                    expected = model(text.to(model.device)[None], [bank], last_only=True)
                    errors.append(error(logits_BV[row][None], expected.logits_BTV[0, -1:]))
                    for read, alone in zip(reads, expected.reads, strict=False):
                        difference_KGR = read.weight_BKGTR[row, :, :, -1] - alone.weight_BKGTR[0, :, :, -1]
                        shares.append(float(difference_KGR.abs().max()))
        # Banks that move and grow between steps, with an index in the end: the same step, replayed and not.
        recordings = {decoder._recorded}
        for extra, by_index in ((1000, False), (3000, False), (40_000, False), (0, True), (1000, True)):
            for bank in {id(bank): bank for bank in banks if bank is not None}.values():
                if by_index and bank.index is None and model.device.type == "cuda" and (shared or len(banks) == 1):
                    bank._index = index_of(bank, 48)
                grown(bank, len(bank) + extra)
            decoder._token_B1.fill_(7)
            decoder._cache.look_at(decoder.capacity)
            sums = {layer: kept_BP.clone() for layer, kept_BP in decoder.passage_sums.kept.items()}
            expected_BV = decoder.run(model.reader(banks, len(banks)))[0].clone()
            for layer, kept_BP in sums.items():  # the step counts its token itself
                decoder.passage_sums.kept[layer].copy_(kept_BP)
            errors.append(error(decoder.step([7] * len(banks), banks)[0], expected_BV))
            recordings.add(decoder._recorded)
        print(f"  {len(banks)} rows, {sum(map(bool, banks))} with banks: recorded {len(recordings)} times", flush=True)
        # For more room, and for an index; not for what fits.
        assert len(recordings) <= 3
    # Where sums in another order make another key the 64th, logits differ by some thousandths; by a seventh, where
    # another bank is read.
    most, worst = float(torch.tensor(errors).quantile(0.9)), max(errors)
    print(
        f"check in float32, compile={compile}: relative error {most:.1e} (nine of ten), {worst:.1e} (all)", flush=True
    )
    assert most < 1e-3 and worst < 0.03
    most, worst = float(torch.tensor(shares).quantile(0.9)), max(shares)
    print(f"what was read: shares differ by {most:.1e} (nine of ten), {worst:.1e} (all)", flush=True)
    assert most < 1e-3


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


def profile(decoder: BatchDecoder, banks: Sequence[MemoryBank | None], steps: int = 10) -> None:
    """Prints what a step is made of."""
    tokens = [5] * decoder.rows
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            decoder.step(tokens, banks)[0].argmax(-1).tolist()
        torch.cuda.synchronize()
    found = [event for event in profiler.key_averages() if event.device_time_total]
    kernels, busy = sum(event.count for event in found), sum(event.device_time_total for event in found)
    print(f"    {kernels / steps:.0f} kernels and copies a step, {busy / steps:.0f} µs in all (of both branches)")
    for event in sorted(found, key=lambda event: -event.device_time_total)[:40]:
        print(f"    {event.device_time_total / steps:8.1f} µs {event.count / steps:6.1f} × {event.key[:100]}")
    before = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        decoder._check(tokens, banks)
        if decoder._recorded is not None and decoder._recorded.fits(banks) and decoder._recorded._reader is not None:
            decoder._recorded._reader.read(banks)
        before.append(1e6 * (time.perf_counter() - began))
    print(f"    {sorted(before)[steps // 2]:.0f} µs of the host's for banks before a step is launched", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-compile", action="store_true", help="layers as they are, for comparison")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument(
        "--look-up-only", action="store_true", help="the three look-up heads, without those of layer 23"
    )
    parser.add_argument("--largest", type=int, default=1 << 24, help="tokens of the largest bank")
    parser.add_argument("--both", action="store_true", help="the SideNet behind the backbone as well as beside it")
    parser.add_argument("--no-check", action="store_true", help="where the same commit has been checked")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step (on a GPU)")
    parser.add_argument("--rows", type=int, nargs="*", help="texts side by side, 1 and 32 by default")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compile = device == "cuda" and not args.no_compile
    # In bfloat16 the same sums in another order differ by some per cent, which would hide a fault.
    heads = LOOK_UP if args.look_up_only else ALL
    began = time.perf_counter()
    beside = (False, True) if args.both else (True,)
    if not args.no_check:
        checked = model_for(device, heads, torch.float32)
        for two_streams in beside:
            check(checked, compile, two_streams)
            print(f"checked, two_streams={two_streams}, after {time.perf_counter() - began:.0f} s", flush=True)
        del checked
    if args.check_only:
        return
    model = model_for(device, heads, torch.bfloat16 if device == "cuda" else torch.float32)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    about = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "compile": compile,
        "heads": len(heads),
    }
    alone: dict[int, float] = {}
    results = []
    sizes = [1 << 16, 1 << 20, 1 << 24] if device == "cuda" else [1 << 12]
    for rows in args.rows or ((1, 32) if device == "cuda" else (1, 2)):
        plan: list[tuple[str, Callable[[], list[MemoryBank | None]], float]] = [
            ("backbone alone", lambda rows=rows: [None] * rows, 0.0),
            ("empty bank", lambda rows=rows: [None] * rows, 1.0),
        ]
        for size in sizes:
            if size <= args.largest:
                plan.append((f"one bank, {size:,}", lambda rows=rows, size=size: [bank_of(model, size)] * rows, 1.0))
                if device == "cuda" and size > sizes[0]:
                    plan.append(
                        (
                            f"one bank, {size:,}, index of 48",
                            lambda rows=rows, size=size: [with_index(bank_of(model, size))] * rows,
                            1.0,
                        )
                    )
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
            # The backbone alone has nothing that could run beside it.
            for two_streams in beside if memory else (True,):
                row = timed(model, rows, banks, memory, compile, two_streams, args.profile)
                alone.setdefault(rows, row["p50_ms"])
                share = alone[rows] / row["p50_ms"]
                results.append({"rows": rows, "bank": what, "two_streams": two_streams, **row, "share": share, **about})
                print(f"{described(results[-1])}  ({time.perf_counter() - began:.0f} s)", flush=True)
                if args.out is not None:
                    with args.out.open("w", newline="") as file:
                        writer = csv.DictWriter(file, list(results[0]))
                        writer.writeheader()
                        writer.writerows(results)
            del banks
            if device == "cuda":
                torch.cuda.empty_cache()
    print()
    for row in results:
        print(described(row))


def timed(
    model: LongMem,
    rows: int,
    banks: Sequence[MemoryBank | None],
    memory: float,
    compile: bool,
    two_streams: bool,
    profiled: bool,
) -> dict[str, float]:
    device = model.device.type
    decoder = begin(model, rows, banks, memory=memory, compile=compile, two_streams=two_streams)
    tokens = [5] * rows
    for _ in range(3):
        decoder.step(tokens, banks)
    # As generation does: the next token has to be known before the next step.
    p20, p50, p80 = quantiles(lambda: decoder.step(tokens, banks)[0].argmax(-1).tolist(), device, 60)
    if profiled and device == "cuda":
        profile(decoder, banks)
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "tokens_per_second": 1000 * rows / p50}


def described(row: dict[str, Any]) -> str:
    what = row["bank"] + ("" if row["two_streams"] else ", one stream")
    return (
        f"{row['rows']:3} rows, {what:45} {row['p50_ms']:8.3f} ms ({row['p20_ms']:.3f} – {row['p80_ms']:.3f}), "
        f"{row['tokens_per_second']:8.0f} tokens/s, {row['share']:.2f} of the backbone alone"
    )


if __name__ == "__main__":
    main()
