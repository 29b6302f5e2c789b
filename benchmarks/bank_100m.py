"""The largest bank that one card searches exactly: 100 million tokens at three look-up heads.

    python benchmarks/bank_100m.py [--tokens 100_000_000] [--out FILE.csv]
    TRITON_INTERPRET=1 python benchmarks/bank_100m.py --tokens 3000     # on a CPU, to see that the script runs

128 bytes a key and 128 a value are 76.8 GB, which a card of 80 GB does not hold beside anything else. A search reads
all keys, but only 64 values a query: so keys stay on the card, in bfloat16, and values in pinned memory of the host,
where the kernel that attends to them reads the rows found, in place. Nothing is rounded: search and attention are
exact. The same with a copy of the keys in int8 (64 bytes a key more, on the card): what it finds is counted (`recall`).

Keys, values and queries are random; every step has queries of its own. What a step finds is first checked against a
plain product over all keys, and its attention against values fetched by hand. Times are of a whole step (search and
attention of all heads), as it is called and as a recorded step, the wait for the result included.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from longmem.ops import Pools
from longmem.ops import triton as kernels
from longmem.sketch import Basis, Sketch, recall

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
HEADS, QUERIES, HEAD_DIM, TOP_K = 3, 3, 64, 64
BLOCK = 1 << 21

Step = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def fill(rows_NE: Tensor, seed: int) -> Tensor:
    """Random rows, made on the card."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    for part in rows_NE.split(BLOCK):
        part.copy_(torch.randn(part.shape, device=DEVICE, generator=random))
    return rows_NE


def on_card(tokens: int) -> Tensor:
    """Keys (H, N, E)."""
    rows_HNE = torch.empty(HEADS, tokens, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    for head, rows_NE in enumerate(rows_HNE):
        fill(rows_NE, seed=head)
    return rows_HNE


def on_host(tokens: int) -> list[Tensor]:
    """Values (N, E) of each head, each in memory of its own: pinned memory is taken in powers of two."""
    pinned = DEVICE == "cuda"
    heads = [torch.empty(tokens, HEAD_DIM, dtype=DTYPE, pin_memory=pinned) for _ in range(HEADS)]
    return [fill(rows_NE, seed=100 + head) for head, rows_NE in enumerate(heads)]


def plain_search(query_HQE: Tensor, keys_HNE: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of all keys in float32, a block at a time."""
    index = torch.zeros(HEADS, QUERIES, 0, dtype=torch.int64, device=DEVICE)
    score = torch.zeros(HEADS, QUERIES, 0, device=DEVICE)
    for first in range(0, keys_HNE.shape[1], BLOCK):
        part = query_HQE.float() @ keys_HNE[:, first : first + BLOCK].float().mT
        best, where = part.topk(min(TOP_K, part.shape[-1]), dim=-1)
        score, among = torch.cat((score, best), -1).topk(min(TOP_K, score.shape[-1] + best.shape[-1]), dim=-1)
        index = torch.cat((index, where + first), -1).gather(-1, among)
    return index, score


def check(step: Step, keys_HNE: Tensor, values: list[Tensor], least: float) -> float:
    """Recall; scores and attention have to be those of the keys and values."""
    found, wanted = [], []
    for seed in range(5):
        query_HQE = queries(seed)
        index, score, output = step(query_HQE)
        expected_index, expected_score = plain_search(query_HQE, keys_HNE)
        if least == 1.0:
            torch.testing.assert_close(score, expected_score, atol=1e-3, rtol=1e-4)
        found.append(index)
        wanted.append(expected_index)
        key, value = (
            torch.stack([heads[h][index[h].to(heads[h].device)].to(DEVICE).double() for h in range(HEADS)])
            for heads in (keys_HNE, values)
        )
        weight = torch.einsum("hqe,hqre->hqr", query_HQE.double(), key).mul(0.125).softmax(-1)
        torch.testing.assert_close(output.double(), torch.einsum("hqr,hqre->hqe", weight, value), atol=1e-3, rtol=1e-3)
    share = float(recall(torch.cat(found, 1), torch.cat(wanted, 1)).mean())
    assert share >= least - 1e-3, f"found {share:.4f} of the nearest keys, expected {least}"
    return share


def queries(seed: int) -> Tensor:
    random = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(HEADS, QUERIES, HEAD_DIM, generator=random).to(DEVICE, DTYPE)


def times(run: Callable[[], object], query_HQE: Tensor, repeats: int) -> Tensor:
    """p20, p50, p80, p95 in milliseconds, with queries of its own each time."""
    taken = []
    for seed in range(repeats + 3):
        query_HQE.copy_(queries(seed))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - began))
    return torch.tensor(taken[3:]).quantile(torch.tensor([0.2, 0.5, 0.8, 0.95]))


def recorded(step: Step, query_HQE: Tensor) -> Callable[[], object]:
    if DEVICE == "cpu":
        return lambda: step(query_HQE)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(query_HQE)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(query_HQE)
    return graph.replay


def copy_bandwidth() -> float:
    """Measured bytes a second of a copy, read and written."""
    source = torch.empty(1 << (30 if DEVICE == "cuda" else 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    best = times(lambda: target.copy_(source), queries(0), 20)[1]
    return 2 * source.numel() / (float(best) / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=200 if DEVICE == "cuda" else 3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("This benchmark needs a CUDA GPU. To see that it runs: TRITON_INTERPRET=1 … --tokens 3000.")
    half = HEADS * args.tokens * HEAD_DIM * DTYPE.itemsize
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pinned = HEADS * (1 << (half // HEADS - 1).bit_length())
    if pinned > 0.8 * host:
        sys.exit(f"Values take {pinned / 1e9:.1f} GB of the host, which has {host / 1e9:.1f}. Choose fewer --tokens.")
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s; {half / 1e9:.1f} GB of keys, as much of values", flush=True)

    began = time.perf_counter()
    keys_HNE, value_rows = on_card(args.tokens), on_host(args.tokens)
    print(f"filled in {time.perf_counter() - began:.0f} s", flush=True)
    # By address: values need not lie on the card.
    keys, values = Pools.of(list(keys_HNE)), Pools.of(value_rows, torch.device(DEVICE))
    own_H = torch.arange(HEADS, device=DEVICE)

    def attended(query_HQE: Tensor, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        index, score = found
        output, _ = kernels.attend_rows(query_HQE.float(), keys, values, own_H, index, score > -torch.inf, 0.125)
        return index, score, output

    def exactly(query_HQE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attended(query_HQE, kernels.topk_scan(query_HQE, keys_HNE, TOP_K))

    def by_codes(query_HQE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes_HQS = sketch.code_queries(query_HQE)
        return attended(query_HQE, kernels.topk_coded(query_HQE, keys_HNE, codes_HQS, sketch.codes_XNS, TOP_K))

    rows = []

    def measure(name: str, step: Step, read: int, least: float) -> None:
        share = check(step, keys_HNE, value_rows, least)
        query_HQE = queries(0)
        for way, run in (("called", lambda: step(query_HQE)), ("recorded", recorded(step, query_HQE))):
            p20, p50, p80, p95 = times(run, query_HQE, args.repeats).tolist()
            row = {
                "search": name, "way": way, "tokens": args.tokens, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
                "p95_ms": p95, "GB_read": read / 1e9, "share_of_copy": read / (p50 / 1000) / bandwidth,
                "recall": share, "GB_on_card": torch.cuda.memory_allocated() / 1e9 if DEVICE == "cuda" else None,
            }  # fmt: skip
            rows.append(row)
            print(described(row), flush=True)

    with torch.no_grad():
        measure("exact", exactly, half, 1.0)
        began = time.perf_counter()
        asked = torch.randn(HEADS, 512, HEAD_DIM, device=DEVICE)
        sketch = Sketch.build(keys_HNE, Basis.fit(keys_HNE, asked), HEAD_DIM)
        print(f"int8 copy made in {time.perf_counter() - began:.0f} s", flush=True)
        measure("int8, then exact", by_codes, sketch.codes_XNS.numel(), 0.95)
    if args.out is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        about = {
            "copy_TB_per_s": bandwidth / 1e12, "commit": commit, "date": datetime.date.today().isoformat(),
            "device": device, "torch": torch.__version__,
        }  # fmt: skip
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)
    print()
    for row in rows:
        print(described(row))


def described(row: dict) -> str:
    card = f", {row['GB_on_card']:.1f} GB on the card" if row["GB_on_card"] else ""
    return (
        f"{row['tokens']:,} tokens, {row['search']:16} {row['way']:8} p50 {row['p50_ms']:8.3f} ms, p95 "
        f"{row['p95_ms']:8.3f} ms, {row['share_of_copy']:4.0%} of copy, recall {row['recall']:.4f}{card}"
    )


if __name__ == "__main__":
    main()
