"""Triton kernels on a GPU: first checked against the plain twins, then timed beside their peers and their floors.

    python benchmarks/kernels.py [--out FILE.csv] [--check-only] [--only WORD] [--profile]
    TRITON_INTERPRET=1 python benchmarks/kernels.py --tiny     # on a CPU, to see that the script runs

A floor is the larger of bytes over the measured copy bandwidth and operations over the measured matrix rate. A kernel
is timed as it is called, launches included, and (`recorded_ms`) as a recorded step replays it; where there is one, what
plain torch takes is timed in both ways beside it. `recall` of a search by int8 codes is the share of the keys of exact
search that it finds. Nothing is timed before all checks pass.
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
import triton
from torch import Tensor

from longmem.ops import Pools, reference
from longmem.ops import triton as kernels
from longmem.sketch import Basis, Sketch, recall

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's matrix product knows no bfloat16.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    if len(shape) < 3 or shape[1] < 1 << 20:
        return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)
    # Not all of a large bank in float32 at once.
    out = torch.empty(*shape, device=DEVICE, dtype=dtype)
    for part in out.split(1 << 20, dim=1):
        part.copy_(torch.randn(part.shape, device=DEVICE))
    return out


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


# ---- checks ------------------------------------------------------------------------------------------------


def check_search(tiny: bool) -> None:
    for searches, queries, keys, head_dim, top_k, parts in ((2, 3, 700, 64, 16, 2),) if tiny else (
        (3, 1, 5000, 64, 64, 1), (2, 3, 100_003, 64, 64, 1), (5, 700, 3001, 64, 64, 1), (2, 65, 20, 80, 64, 1),
        (2, 33, 12_345, 128, 5, 7), (1, 16, 300_000, 64, 1, 1), (6, 3072, 16_384, 64, 64, 1),
        (2, 17, 40_000, 64, 64, 1), (1, 300, 65_536, 64, 64, 1),
        (2, 130, 100_003, 64, 64, 1), (3, 9, 20_000, 20, 16, 5),
        (1, 3, 3_000_000, 64, 64, 1), (1, 96, 1_000_003, 64, 64, 1),
    ):  # fmt: skip
        query_XQE, keys_PNE = normal(searches, queries, head_dim), normal(searches + 1, keys, head_dim)
        pool_X = torch.randperm(searches + 1, device=DEVICE)[:searches]
        length_X = torch.randint(1, keys + 1, (searches,), device=DEVICE)
        length_X[0] = keys
        for x in range(searches):
            keys_PNE[pool_X[x], length_X[x] :] = torch.nan
        found = kernels.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X, parts=parts)
        # Products of bfloat16 numbers are exact in float32, and both sum 64 of them.
        clean_PNE = keys_PNE.nan_to_num().float()
        expected = reference.topk_scan(query_XQE.float(), clean_PNE, top_k, length_X, pool_X)
        torch.testing.assert_close(found[1], expected[1], atol=2e-4, rtol=2e-5)
        same = (found[0] == expected[0]).float().mean()
        assert same > 0.98, f"search: only {same:.4f} of the indices agree"
        for _ in range(3):
            again = kernels.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X, parts=parts)
            assert all(map(torch.equal, again, found)), "search: not deterministic"
    # Every key the same; every key many times; the best keys all in one group; and a bank that is empty.
    for pattern in ("equal", "repeated", "crowded", "empty"):
        for queries in (3,) if tiny else (3, 50, 200):
            most = 900 if tiny else 9000
            keys_PNE, query_XQE = normal(1, most, 64), normal(1, queries, 64)
            length_X = torch.full((1,), 0 if pattern == "empty" else most, device=DEVICE)
            if pattern == "equal":
                keys_PNE[:] = keys_PNE[:, :1]
            elif pattern == "repeated":
                keys_PNE[:] = keys_PNE[:, : most // 100].repeat(1, 100, 1)
            elif pattern == "crowded":
                keys_PNE[:, 3::128] *= 8
            else:
                keys_PNE[:] = torch.nan
            index_XQR, score_XQR = kernels.topk_scan(query_XQE, keys_PNE, 64, length_X)
            if pattern == "empty":
                assert (score_XQR == -torch.inf).all() and not index_XQR.any(), "search: found keys in an empty bank"
                continue
            expected = reference.topk_scan(query_XQE.float(), keys_PNE.float(), 64)
            torch.testing.assert_close(score_XQR, expected[1], atol=1e-3, rtol=2e-5)
            assert (index_XQR.sort(-1).values.diff(dim=-1) > 0).all(), "search: a key was found twice"
            key_QRE = keys_PNE[0].float()[index_XQR[0]]
            mine_XQR = (key_QRE @ query_XQE[0].float()[..., None])[None, ..., 0]
            torch.testing.assert_close(score_XQR, mine_XQR, atol=1e-3, rtol=2e-5)


def check_banks_that_lie_apart(tiny: bool) -> None:
    """Banks of different sizes, each in memory of its own, in one launch: as each by itself, bit for bit."""
    sizes = (0, 5, 300, 77) if tiny else (0, 5, 300, 65_536, 1_000_003, 4096)
    for queries in (3,) if tiny else (3, 40):
        rows = [[normal(1, size, 64)[0] for size in sizes] for _ in range(2)]
        keys, values = map(Pools.of, rows)
        query_XQE, length_X = normal(len(sizes), queries, 64), torch.tensor(sizes, device=DEVICE)
        index_XQR, score_XQR = kernels.topk_scan(query_XQE, keys, 64, length_X)
        valid_XQR, pool_X = score_XQR > -torch.inf, torch.arange(len(sizes), device=DEVICE)
        attended = kernels.attend_rows(query_XQE.float(), keys, values, pool_X, index_XQR, valid_XQR, 0.125)
        assert not valid_XQR[0].any() and not attended[0][0].any()
        for x in range(1, len(sizes)):
            one, zero = slice(x, x + 1), torch.zeros(1, dtype=torch.int64, device=DEVICE)
            alone = kernels.topk_scan(query_XQE[one], rows[0][x][None], 64)
            torch.testing.assert_close(score_XQR[one], alone[1], atol=1e-4, rtol=1e-5)
            assert (index_XQR[one] == alone[0]).float().mean() > 0.99
            places = zero, index_XQR[one], valid_XQR[one]
            pools = rows[0][x][None], rows[1][x][None]
            expected = reference.attend_rows(query_XQE[one].double(), *pools, *places, 0.125)
            for mine, plain in zip(attended, expected, strict=True):
                assert error(mine[one], plain) < 1e-5
            gathered = kernels.gather_rows(values, index_XQR, pool_X)[one]
            assert torch.equal(gathered, reference.gather_rows(pools[1], index_XQR[one], zero))


def check_coded_search(tiny: bool) -> None:
    for searches, queries, keys, size, top_k in ((2, 3, 700, 32, 16),) if tiny else (
        (3, 3, 5000, 64, 64), (2, 16, 100_003, 32, 64), (1, 3, 1_000_003, 48, 64), (2, 50, 300_000, 64, 16),
    ):  # fmt: skip
        query_XQE, keys_XNE = normal(searches, queries, 64), normal(searches, keys, 64)
        code_query_XQD, codes_XND = (
            torch.randint(-127, 128, (searches, n, size), device=DEVICE, dtype=torch.int8) for n in (queries, keys)
        )
        length_X = torch.randint(1, keys + 1, (searches,), device=DEVICE)
        length_X[0] = keys
        inputs = (query_XQE, keys_XNE, code_query_XQD, codes_XND, top_k, length_X)
        found = kernels.topk_coded(*inputs)
        expected = reference.topk_coded(*inputs, group=8 if keys <= 32_768 else 16)
        # A few groups more may be looked at: what is found is as good, or better. With no room for more, of groups that
        # tie with the last each takes its own.
        worse_XQ = (found[1] < expected[1] - 1e-3).any(-1).float()
        assert worse_XQ.mean() <= (0.25 if 3 * top_k > 128 else 0.0), "coded search: found less than its twin"
        for x in range(searches):
            real_QR = found[1][x] > -torch.inf
            assert (found[0][x][real_QR] < length_X[x]).all()
            score_QN = query_XQE[x].float() @ keys_XNE[x].float().T
            torch.testing.assert_close(
                score_QN.gather(-1, found[0][x])[real_QR], found[1][x][real_QR], atol=1e-3, rtol=2e-5
            )
            assert (found[0][x].sort(-1).values.diff(dim=-1) > 0)[real_QR[:, 1:]].all(), "coded search: found twice"


def check_attention(tiny: bool) -> None:
    for searches, queries, keys, found, head_dim in (
        ((4, 1, 9, 5, 64),) if tiny else ((3, 50, 1000, 64, 64), (2, 7, 100, 16, 80), (4, 1, 9, 5, 64))
    ):
        rows = normal(searches + 1, keys, head_dim), normal(searches + 1, keys, head_dim)
        pool_X = torch.randint(searches + 1, (searches,), device=DEVICE)
        slot_XQR = torch.randint(keys, (searches, queries, found), device=DEVICE)
        valid_XQR = torch.rand(slot_XQR.shape, device=DEVICE) < 0.7
        valid_XQR[0, 0] = False
        grads = normal(searches, queries, head_dim), normal(searches, queries, dtype=torch.float32)
        order_XQR = torch.randint(found, slot_XQR.shape, device=DEVICE)
        for newest in (False, True):
            results = []
            for attend, dtype in ((kernels.attend_rows, torch.float32), (reference.attend_rows, torch.float64)):
                torch.manual_seed(1)
                query_XQE, discount_XQ = (
                    normal(*shape, dtype=torch.float32).to(dtype).requires_grad_()
                    for shape in ((searches, queries, head_dim), (searches, queries))
                )
                pools = (rows_PNE.to(torch.float32) for rows_PNE in rows)
                discount = (order_XQR, discount_XQ) if newest else ()
                output, logsumexp = attend(query_XQE, *pools, pool_X, slot_XQR, valid_XQR, 0.3, *discount)
                finite = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
                ((output * grads[0]).sum() + (finite * grads[1]).sum()).backward()
                results.append((output, finite, query_XQE.grad, discount_XQ.grad))
            names = ("output", "logsumexp", "gradient of queries", "gradient of discounts")
            for name, mine, plain in zip(names, *results, strict=True):
                if plain is not None:
                    assert error(mine, plain) < (1e-4 if newest else 1e-5), f"attend_rows {name}: {error(mine, plain)}"


def check_logsumexp(tiny: bool) -> None:
    for shape, past, window in (((2, 3, 3, 1), 77, None),) if tiny else (
        ((2, 1, 3, 1000), 0, None), ((1, 2, 2, 65), 300, 100), ((2, 3, 3, 1), 77, None)
    ):  # fmt: skip
        grad_BKGT = normal(*shape, dtype=torch.float32)
        inputs = normal(*shape, 64), normal(*shape[:2], shape[3] + past, 64)
        results = []
        for logsumexp, dtype in (
            (kernels.causal_logsumexp, DTYPE),
            (reference.causal_logsumexp, torch.float32),
        ):
            query, key = (part.detach().clone().to(dtype).requires_grad_() for part in inputs)
            out = logsumexp(query, key, 0.125, window)
            (out * grad_BKGT).sum().backward()
            results.append((out, query.grad, key.grad))
        for name, limit, mine, plain in zip(("output", "d query", "d key"), (1e-5, 1e-2, 1e-2), *results, strict=True):
            assert error(mine, plain) < limit, f"causal_logsumexp {name}: {error(mine, plain)}"


def check_loss(tiny: bool) -> None:
    words, tokens = (500, 5) if tiny else (49152, 300)
    logits_XV, target_X = 4 * normal(tokens, words), torch.randint(words, (tokens,), device=DEVICE)
    weight_X = torch.rand(tokens, device=DEVICE)
    mine, plain = logits_XV.clone(), logits_XV.float()
    loss_X = kernels.cross_entropy_slope(mine, target_X, weight_X)
    assert error(loss_X, reference.cross_entropy_slope(plain, target_X, weight_X)) < 1e-5
    assert error(mine, plain) < 1e-2


# ---- times -------------------------------------------------------------------------------------------------


def quantiles(run: Callable[[], object]) -> list[float]:
    """p20, p50, p80 in milliseconds."""
    if DEVICE == "cuda":
        return [float(t) for t in triton.testing.do_bench(run, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])]  # type: ignore[union-attr]
    began = time.perf_counter()
    run()
    return [1000 * (time.perf_counter() - began)] * 3


def recorded(run: Callable[[], object]) -> float | None:
    """p50 in milliseconds of a recorded run; None on a CPU."""
    if DEVICE != "cuda":
        return None
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    p50 = quantiles(graph.replay)[1]
    del held, graph
    return p50


def ceilings(tiny: bool) -> tuple[float, float]:
    """Measured bytes a second of a copy (read and written), and operations a second of a matrix product."""
    size = 64 if tiny else 8192
    source, matrix = normal(16 * size**2), normal(size, size)
    target = torch.empty_like(source)
    copy = quantiles(lambda: target.copy_(source))[1]
    product = quantiles(lambda: matrix @ matrix)[1]
    return 2 * source.numel() * source.element_size() / (copy / 1000), 2 * size**3 / (product / 1000)


def torch_search(query_XQE: Tensor, keys_XNE: Tensor, top_k: int) -> object:
    """matmul + topk, as many queries at once as fit 16 GiB of scores."""
    rows = max(1, (1 << 33) // (keys_XNE.shape[0] * keys_XNE.shape[1]))
    return [(part @ keys_XNE.transpose(1, 2)).topk(top_k, dim=-1) for part in query_XQE.split(rows, dim=1)]


class Times:
    """Times kernels, tells each at once, keeps the rows."""

    def __init__(self, tiny: bool, only: str, profile: bool) -> None:
        self.only, self.profile = only, profile
        self.rows: list[dict[str, object]] = []
        self.bandwidth, self.rate = ceilings(tiny)
        print(f"copy {self.bandwidth / 1e12:.2f} TB/s, matrix product {self.rate / 1e12:.0f} TFLOP/s", flush=True)

    def wants(self, name: str) -> bool:
        return self.only in name

    def line(
        self,
        name: str,
        run: Callable[[], object],
        *,
        bytes_: float = 0,
        operations: float = 0,
        peer: Callable[[], object] | None = None,
        record: bool = True,
        found: float | None = None,
    ) -> None:
        """Time a kernel.

        Args:
            bytes_, operations: that cannot be spared.
            peer: the same in plain torch.
            record: also as a recorded step.
            found: recall.
        """
        p20, p50, p80 = quantiles(run)
        replayed = recorded(run) if record else None
        torch_ms = None if peer is None else quantiles(peer)[1]
        torch_recorded = recorded(peer) if record and peer is not None else None
        floor = 1000 * max(bytes_ / self.bandwidth, operations / self.rate)
        best, torch_best = replayed or p50, torch_recorded or torch_ms
        row = {
            "kernel": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "recorded_ms": replayed, "floor_ms": floor,
            "share_of_floor": floor / best, "torch_ms": torch_ms, "torch_recorded_ms": torch_recorded,
            "times_torch": torch_best / best if torch_best else None, "recall": found,
        }  # fmt: skip
        self.rows.append(row)
        print(described(row), flush=True)
        if self.profile and DEVICE == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
                run()
                torch.cuda.synchronize()
            for event in sorted(profiled.key_averages(), key=lambda e: -e.device_time_total)[:8]:
                print(f"    {event.device_time_total / 1000:8.3f} ms {event.count:4d} {event.key[:90]}", flush=True)


def described(row: dict[str, object]) -> str:
    def number(name: str, form: str) -> str:
        return "–".rjust(len(form.format(0.0))) if row[name] is None else form.format(row[name])

    return (
        f"{row['kernel']:62} {number('p50_ms', '{:8.3f}')} ms, recorded {number('recorded_ms', '{:8.3f}')} ms, "
        f"floor {number('share_of_floor', '{:5.0%}')}, torch {number('torch_ms', '{:8.3f}')} / "
        f"{number('torch_recorded_ms', '{:8.3f}')} ms {number('times_torch', '{:5.1f}')} ×, "
        f"recall {number('recall', '{:6.4f}')}"
    )


def time_searches(times: Times, tiny: bool) -> None:
    for keys in (700,) if tiny else (65_536, 1 << 20, 1 << 24):
        name = f"decode search, 3 heads × 3 queries, {keys:,} keys"
        if not any(map(times.wants, (name, f"{name}, int8", f"{name}, int8 32 of 64 coordinates"))):
            continue
        query, pool = normal(3, 3, 64), normal(3, keys, 64)
        times.line(
            name, lambda q=query, k=pool: kernels.topk_scan(q, k, 64), bytes_=pool.numel() * pool.element_size(),
            peer=lambda q=query, k=pool: torch_search(q, k, 64),
        )  # fmt: skip
        # As they are all alike; and as those of look-up heads, whose scores vary in few directions (32 of 64).
        for size, variance_E in ((64, torch.ones(64)), (32, torch.exp(-torch.arange(64) / 12))):
            scale_E = variance_E.sqrt().to(pool)
            pool *= scale_E
            asking = normal(3, 16, 64) * scale_E
            query = asking[:, :3].contiguous()
            sketch = Sketch.build(pool, Basis.fit(pool, normal(3, 512, 64) * scale_E), size)
            exact_XQR, _ = kernels.topk_scan(asking, pool, 64)
            coder = sketch.coder_XES  # made once, as for a recorded step
            found_XQR, _ = by_codes(sketch, coder, asking, pool)
            times.line(
                f"{name}, int8" + ("" if size == 64 else f" {size} of 64 coordinates"),
                lambda q=query, k=pool, s=sketch, c=coder: by_codes(s, c, q, k), bytes_=sketch.codes_XNS.numel(),
                peer=lambda q=query, k=pool: torch_search(q, k, 64), found=float(recall(found_XQR, exact_XQR).mean()),
            )  # fmt: skip
            del sketch
        del pool


def time_banks_that_lie_apart(times: Times, tiny: bool) -> None:
    rows, keys = (3, 200) if tiny else (32, 65_536)
    query = normal(3 * rows, 3, 64)
    banks = [normal(1, keys + 64 * i, 64)[0] for i in range(3 * rows)]
    pools, length = Pools.of(banks), torch.tensor([len(bank) for bank in banks], device=DEVICE)
    bytes_ = sum(bank.numel() * bank.element_size() for bank in banks)
    times.line(
        f"decode search, {rows} different banks, {keys:,} keys and more",
        lambda: kernels.topk_scan(query, pools, 64, length), bytes_=bytes_,
        peer=lambda: [torch_search(q[None], k[None], 64) for q, k in zip(query, banks, strict=True)],
    )  # fmt: skip
    times.line(
        f"decode search, {rows} different banks, one after another",
        lambda: [kernels.topk_scan(q[None], k[None], 64) for q, k in zip(query, banks, strict=True)], bytes_=bytes_,
    )  # fmt: skip


def time_many_texts(times: Times, tiny: bool) -> None:
    rows = 3 if tiny else 32
    keys = 300 if tiny else 1 << 20
    query, pool = normal(3, 3 * rows, 64), normal(3, keys, 64)
    times.line(
        f"decode search, {rows} texts and one bank, {keys:,} keys", lambda: kernels.topk_scan(query, pool, 64),
        bytes_=pool.numel() * pool.element_size(), peer=lambda: torch_search(query, pool, 64),
    )  # fmt: skip


def time_segments(times: Times, tiny: bool) -> None:
    for searches, queries, keys in (
        ((1, 20, 300),) if tiny else ((3, 3072, 65_536), (16, 3072, 16_384), (48, 6144, 16_384))
    ):
        query, pool = normal(searches, queries, 64), normal(searches, keys, 64)
        times.line(
            f"segment search, {searches} × {queries} queries, {keys:,} keys",
            lambda q=query, k=pool: kernels.topk_scan(q, k, 64), record=False,
            bytes_=(query.numel() + pool.numel()) * 2, operations=2 * searches * queries * keys * 64,
            peer=lambda q=query, k=pool: torch_search(q, k, 64),
        )  # fmt: skip


def by_codes(sketch: Sketch, coder_XES: Tensor, query_XQE: Tensor, keys_XNE: Tensor) -> tuple[Tensor, Tensor]:
    """As `GpuSketch.search` does it, the coding of the queries included."""
    coded_XQS, _ = kernels.code_queries(query_XQE, coder_XES)
    return kernels.topk_coded(query_XQE, keys_XNE, coded_XQS, sketch.codes_XNS, 64)


def time_others(times: Times, tiny: bool) -> None:
    heads, queries, keys = (1, 2, 100) if tiny else (16, 3072, 16_384)
    query, pool = normal(heads, queries, 64, dtype=torch.float32), normal(heads, keys, 64)
    slot = torch.randint(keys, (heads, queries, 64), device=DEVICE)
    places = torch.arange(heads, device=DEVICE), slot, torch.ones_like(slot, dtype=torch.bool)
    times.line(
        f"attention over 64 rows, {heads} × {queries} queries",
        lambda: kernels.attend_rows(query, pool, pool, *places, 0.125), record=False,
        bytes_=heads * queries * (64 * 64 * 4 + 64 * 8),
        peer=lambda: reference.attend_rows(query, pool, pool, *places, 0.125),
    )  # fmt: skip
    tokens = 9 if tiny else 1024
    query, key = normal(heads, 1, 3, tokens, 64), normal(heads, 1, tokens, 64)
    times.line(
        f"causal log-sum-exp, {heads} × 3 × {tokens}",
        lambda: kernels.causal_logsumexp(query, key, 0.125), record=False,
        operations=heads * 3 * tokens**2 * 64, peer=lambda: reference.causal_logsumexp(query, key, 0.125),
    )  # fmt: skip
    tokens, words = (3, 100) if tiny else (4096, 49152)
    logits, target = normal(tokens, words), torch.randint(words, (tokens,), device=DEVICE)
    weight = torch.ones(tokens, device=DEVICE)
    times.line(
        f"cross-entropy and its slope, {tokens} × {words}",
        lambda: kernels.cross_entropy_slope(logits, target, weight), record=False,
        bytes_=2 * logits.numel() * 2, peer=lambda: reference.cross_entropy_slope(logits, target, weight),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true", help="print the kernels behind each line")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--only", default="", help="of the decode searches time those whose names hold this")
    parser.add_argument("--tiny", action="store_true", help="to see that the script runs")
    args = parser.parse_args()
    if DEVICE == "cpu" and not (args.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        sys.exit("This benchmark needs a CUDA GPU. To see that it runs: TRITON_INTERPRET=1 … --tiny.")
    torch.manual_seed(0)
    for check in (
        check_search, check_banks_that_lie_apart, check_coded_search, check_attention, check_logsumexp, check_loss,
    ):  # fmt: skip
        check(args.tiny)
        print(f"{check.__name__}: passed", flush=True)
    if args.check_only:
        return
    times = Times(args.tiny, args.only, args.profile)
    time_searches(times, args.tiny)
    if not args.only:
        for time_some in (time_banks_that_lie_apart, time_many_texts, time_segments, time_others):
            time_some(times, args.tiny)
    if args.out is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = {
            "copy_TB_per_s": times.bandwidth / 1e12, "commit": commit, "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "torch": torch.__version__,
            "triton": triton.__version__,
        }  # fmt: skip
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*times.rows[0], *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in times.rows)
    print()
    for row in times.rows:
        print(described(row))


if __name__ == "__main__":
    main()
