"""Triton kernels on a GPU: first checked against the plain twins, then timed beside their peers and their floors.

    python benchmarks/kernels.py [--out FILE.csv]

A floor is the larger of bytes over the measured copy bandwidth and operations over the measured matrix rate; a kernel
is listed with its floor and, where there is one, with what plain torch takes. Nothing is timed before all checks pass.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from triton.testing import do_bench

from longmem.ops import reference
from longmem.ops import triton as kernels


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


# ---- checks ------------------------------------------------------------------------------------------------


def check_search() -> None:
    for searches, queries, keys, head_dim, top_k, parts in (
        (3, 1, 5000, 64, 64, 1), (2, 3, 100_003, 64, 64, 1), (5, 700, 3001, 64, 64, 1), (2, 65, 20, 80, 64, 1),
        (2, 33, 12_345, 128, 5, 7), (1, 16, 300_000, 64, 1, 1), (6, 3072, 16_384, 64, 64, 1),
        (2, 17, 40_000, 64, 64, 1), (1, 300, 65_536, 64, 64, 1),
        (2, 130, 100_003, 64, 64, 1), (3, 9, 20_000, 20, 16, 5),
    ):  # fmt: skip
        query_XQE, keys_PNE = normal(searches, queries, head_dim), normal(searches + 1, keys, head_dim)
        pool_X = torch.randperm(searches + 1, device="cuda")[:searches]
        length_X = torch.randint(1, keys + 1, (searches,), device="cuda")
        length_X[0] = keys
        for x in range(searches):
            keys_PNE[pool_X[x], length_X[x] :] = torch.nan
        found = kernels.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X, parts=parts)
        # Products of bfloat16 numbers are exact in float32, and both sum 64 of them.
        clean_PNE = keys_PNE.nan_to_num().float()
        expected = reference.topk_scan(query_XQE.float(), clean_PNE, top_k, length_X, pool_X)
        torch.testing.assert_close(found[1], expected[1], atol=2e-4, rtol=2e-5)
        same = (found[0] == expected[0]).float().mean()
        assert same > 0.999, f"search: only {same:.4f} of the indices agree"
        for _ in range(3):
            again = kernels.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X, parts=parts)
            assert all(map(torch.equal, again, found)), "search: not deterministic"
    # Every key the same; every key many times; the best keys all in one group; and a bank that is empty.
    for pattern in ("equal", "repeated", "crowded", "empty"):
        for queries in (3, 50, 200):
            keys_PNE, query_XQE = normal(1, 9000, 64), normal(1, queries, 64)
            length_X = torch.full((1,), 0 if pattern == "empty" else 9000, device="cuda")
            if pattern == "equal":
                keys_PNE[:] = keys_PNE[:, :1]
            elif pattern == "repeated":
                keys_PNE[:] = keys_PNE[:, :90].repeat(1, 100, 1)
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


def check_attention() -> None:
    for searches, queries, keys, found, head_dim in ((3, 50, 1000, 64, 64), (2, 7, 100, 16, 80), (4, 1, 9, 5, 64)):
        rows = normal(searches + 1, keys, head_dim), normal(searches + 1, keys, head_dim)
        pool_X = torch.randint(searches + 1, (searches,), device="cuda")
        slot_XQR = torch.randint(keys, (searches, queries, found), device="cuda")
        valid_XQR = torch.rand(slot_XQR.shape, device="cuda") < 0.7
        valid_XQR[0, 0] = False
        grads = normal(searches, queries, head_dim), normal(searches, queries, dtype=torch.float32)
        results = []
        for attend, dtype in ((kernels.attend_rows, torch.float32), (reference.attend_rows, torch.float64)):
            torch.manual_seed(1)
            query_XQE = normal(searches, queries, head_dim, dtype=torch.float32).to(dtype).requires_grad_()
            output, logsumexp = attend(
                query_XQE, *(r.to(torch.float32) for r in rows), pool_X, slot_XQR, valid_XQR, 0.3
            )
            finite = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
            ((output * grads[0]).sum() + (finite * grads[1]).sum()).backward()
            results.append((output, finite, query_XQE.grad))
        for name, mine, plain in zip(("output", "logsumexp", "gradient"), *results, strict=True):
            assert error(mine, plain) < 1e-5, f"attend_rows {name}: {error(mine, plain)}"


def check_logsumexp() -> None:
    for shape, past, window in (((2, 1, 3, 1000), 0, None), ((1, 2, 2, 65), 300, 100), ((2, 3, 3, 1), 77, None)):
        grad_BKGT = normal(*shape, dtype=torch.float32)
        inputs = normal(*shape, 64), normal(*shape[:2], shape[3] + past, 64)
        results = []
        for logsumexp, dtype in (
            (kernels.causal_logsumexp, torch.bfloat16),
            (reference.causal_logsumexp, torch.float32),
        ):
            query, key = (part.detach().clone().to(dtype).requires_grad_() for part in inputs)
            out = logsumexp(query, key, 0.125, window)
            (out * grad_BKGT).sum().backward()
            results.append((out, query.grad, key.grad))
        for name, limit, mine, plain in zip(("output", "d query", "d key"), (1e-5, 1e-2, 1e-2), *results, strict=True):
            assert error(mine, plain) < limit, f"causal_logsumexp {name}: {error(mine, plain)}"


def check_loss() -> None:
    logits_XV, target_X = 4 * normal(300, 49152), torch.randint(49152, (300,), device="cuda")
    weight_X = torch.rand(300, device="cuda")
    mine, plain = logits_XV.clone(), logits_XV.float()
    loss_X = kernels.cross_entropy_slope(mine, target_X, weight_X)
    assert error(loss_X, reference.cross_entropy_slope(plain, target_X, weight_X)) < 1e-5
    assert error(mine, plain) < 1e-2


# ---- times -------------------------------------------------------------------------------------------------


def quantiles(run: Callable[[], object]) -> list[float]:
    """p20, p50, p80 in milliseconds."""
    return [float(t) for t in do_bench(run, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])]  # type: ignore[union-attr]


def ceilings() -> tuple[float, float]:
    """Measured bytes a second of a copy (read and written), and operations a second of a matrix product."""
    source, matrix = normal(1 << 30), normal(8192, 8192)
    target = torch.empty_like(source)
    copy = quantiles(lambda: target.copy_(source))[1]
    product = quantiles(lambda: matrix @ matrix)[1]
    return 2 * source.numel() * 2 / (copy / 1000), 2 * 8192**3 / (product / 1000)


def torch_search(query_XQE: Tensor, keys_XNE: Tensor, top_k: int) -> object:
    """matmul + topk, as many queries at once as fit 16 GiB of scores."""
    rows = max(1, (1 << 33) // (keys_XNE.shape[0] * keys_XNE.shape[1]))
    return [(part @ keys_XNE.transpose(1, 2)).topk(top_k, dim=-1) for part in query_XQE.split(rows, dim=1)]


def time_all(profile: bool) -> list[dict[str, object]]:
    bandwidth, rate = ceilings()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, matrix product {rate / 1e12:.0f} TFLOP/s", flush=True)
    rows = []

    def line(
        name: str, run: Callable[[], object], bytes_: float, operations: float, peer: Callable | None = None
    ) -> None:
        p20, p50, p80 = quantiles(run)
        floor = 1000 * max(bytes_ / bandwidth, operations / rate)
        other = quantiles(peer)[1] if peer is not None else None
        row = {"kernel": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "floor_ms": floor, "torch_ms": other}
        rows.append(row)
        faster = f"{other / p50:6.1f} × torch" if other else ""
        print(f"{name:58} {p50:8.3f} ms, {100 * floor / p50:5.1f} % of floor {faster}", flush=True)
        if profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                run()
                torch.cuda.synchronize()
            for event in sorted(found.key_averages(), key=lambda e: -e.device_time_total)[:6]:
                print(f"    {event.device_time_total / 1000:8.3f} ms {event.count:4d} {event.key[:90]}", flush=True)

    for keys in (65_536, 1 << 20, 1 << 24):
        query, pool = normal(3, 3, 64), normal(3, keys, 64)
        line(
            f"decode search, 3 heads × 3 queries, {keys:,} keys", lambda q=query, k=pool: kernels.topk_scan(q, k, 64),
            pool.numel() * 2, 0, lambda q=query, k=pool: torch_search(q, k, 64),
        )  # fmt: skip
        del pool
    for searches, queries, keys in ((3, 3072, 65_536), (16, 3072, 16_384), (48, 6144, 16_384)):
        query, pool = normal(searches, queries, 64), normal(searches, keys, 64)
        line(
            f"segment search, {searches} × {queries} queries, {keys:,} keys",
            lambda q=query, k=pool: kernels.topk_scan(q, k, 64),
            (query.numel() + pool.numel()) * 2, 2 * searches * queries * keys * 64,
            lambda q=query, k=pool: torch_search(q, k, 64),
        )  # fmt: skip
    query, pool = normal(16, 3072, 64, dtype=torch.float32), normal(16, 16_384, 64)
    slot = torch.randint(16_384, (16, 3072, 64), device="cuda")
    inputs = (query, pool, pool, torch.arange(16, device="cuda"), slot, torch.ones_like(slot, dtype=torch.bool), 0.125)
    line(
        "attention over 64 rows, 16 × 3072 queries", lambda: kernels.attend_rows(*inputs),
        16 * 3072 * (64 * 64 * 4 + 64 * 8), 0, lambda: reference.attend_rows(*inputs),
    )  # fmt: skip
    query, key = normal(16, 1, 3, 1024, 64), normal(16, 1, 1024, 64)
    line(
        "causal log-sum-exp, 16 × 3 × 1024", lambda: kernels.causal_logsumexp(query, key, 0.125),
        0, 16 * 3 * 1024 * 1024 * 64, lambda: reference.causal_logsumexp(query, key, 0.125),
    )  # fmt: skip
    logits, target = normal(4096, 49152), torch.randint(49152, (4096,), device="cuda")
    weight = torch.ones(4096, device="cuda")
    line(
        "cross-entropy and its slope, 4096 × 49152", lambda: kernels.cross_entropy_slope(logits, target, weight),
        2 * logits.numel() * 2, 0, lambda: reference.cross_entropy_slope(logits, target, weight),
    )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true", help="print the kernels behind each line")
    parser.add_argument("--check-only", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU. On a CPU the kernels are tested by tests/test_triton.py.")
    torch.manual_seed(0)
    for check in (check_search, check_attention, check_logsumexp, check_loss):
        check()
        print(f"{check.__name__}: passed", flush=True)
    if args.check_only:
        return
    rows = time_all(args.profile)
    if args.out is not None:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)


if __name__ == "__main__":
    main()
