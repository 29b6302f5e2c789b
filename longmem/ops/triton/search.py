"""Exact top-k search that never keeps a score a key.

X searches, Q queries, P pools of N keys, E head size, R retrieved; S splits of a pool, M groups of a split.

The R best keys lie in the R groups of keys whose best is best. A first kernel streams the keys past a block of queries
and keeps the best score of each group; a second finds the R best groups of a query, scores their keys again and ranks
them. The result is exact however scores are distributed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Most keys that a search may ask for.
MOST = 64
TILE = tl.constexpr(128)
# A query's group maxima are held in registers.
MOST_GROUPS = 4096
# Groups of a query that are scored again, at most; and keys of those that are ranked.
WIDTH = 128
# Columns of a key that are read at a time: 16 bytes of bfloat16.
COLUMNS = tl.constexpr(8)


def topk_scan(
    query_XQE: Tensor,
    keys_PNE: Tensor,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `longmem.ops.reference.topk_scan`.

    Args:
        splits: least number of parts in which a pool is searched side by side; chosen so that the device is filled.

    Raises:
        ValueError: `top_k` is more than `MOST`.
    """
    searches, queries, head_dim = query_XQE.shape
    device, num_keys = query_XQE.device, keys_PNE.shape[1]
    if top_k > MOST:
        raise ValueError(f"top_k is {top_k}, expected at most {MOST}")
    if queries == 0 or num_keys == 0 or searches == 0:
        index_XQR = torch.zeros(searches, queries, top_k, dtype=torch.int64, device=device)
        return index_XQR, torch.full(index_XQR.shape, -torch.inf, device=device)
    query_XQE = query_XQE.to(keys_PNE.dtype).contiguous()
    if keys_PNE.stride(2) != 1:
        keys_PNE = keys_PNE.contiguous()
    if length_X is None:
        length_X = torch.full((searches,), num_keys, dtype=torch.int64, device=device)
    if pool_X is None:
        pool_X = torch.arange(searches, device=device)
    block = 16 if queries <= 16 else 128
    blocks = triton.cdiv(queries, block)
    if splits is None:
        splits = _splits(device, searches * blocks, num_keys)
    # Small groups leave less to score again, but there are more of them to choose from.
    group = 8 if triton.cdiv(num_keys, splits) <= 8 * MOST_GROUPS else 16
    tiles = min(triton.cdiv(triton.cdiv(num_keys, splits), TILE.value), MOST_GROUPS * group // TILE.value)
    split_keys = tiles * TILE.value
    splits = triton.cdiv(num_keys, split_keys)
    groups = split_keys // group

    index_XSQR = torch.empty(searches, splits, queries, top_k, dtype=torch.int64, device=device)
    score_XSQR = torch.empty(index_XSQR.shape, dtype=torch.float32, device=device)
    best_XSQM = torch.empty(searches, splits, queries, groups, dtype=torch.float32, device=device)
    shape = (queries, splits, split_keys, keys_PNE.stride(0), keys_PNE.stride(1), head_dim)
    blocking = {"E": max(16, triton.next_power_of_2(head_dim)), "GROUP": group}
    _group_maxima[(blocks, searches, splits)](
        query_XQE, keys_PNE, pool_X, length_X, best_XSQM, *shape, **blocking, BQ=block,
        PRECISION="ieee" if keys_PNE.dtype == torch.float32 else "tf32", num_warps=8 if block > 16 else 4, num_stages=3,
    )  # fmt: skip
    scratch = torch.empty(searches * splits * queries, 2 * WIDTH, dtype=torch.int32, device=device)
    _best_keys[(queries, searches, splits)](
        query_XQE, keys_PNE, pool_X, length_X, best_XSQM, scratch, score_XSQR, index_XSQR, *shape, **blocking,
        M=triton.next_power_of_2(groups), R=top_k, WIDTH=WIDTH, num_warps=4 if group == 8 else 8,
    )  # fmt: skip
    if splits == 1:
        return index_XSQR[:, 0], score_XSQR[:, 0]
    score_XQC = score_XSQR.transpose(1, 2).flatten(2)
    score_XQR, among_XQR = score_XQC.topk(top_k, dim=-1)
    return index_XSQR.transpose(1, 2).flatten(2).gather(-1, among_XQR), score_XQR


def _splits(device: torch.device, programs: int, num_keys: int) -> int:
    """Parts of a pool, so that two programs run on each multiprocessor; one part if the queries alone fill them."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if programs >= processors:
        return 1
    # Each part gives R candidates for the last choice, so a part should hold many more keys than that.
    return max(1, min(-(-2 * processors // programs), num_keys // 4096))


@triton.jit
def _group_maxima(
    query_ptr, keys_ptr, pool_ptr, length_ptr, best_ptr,
    queries, splits, split_keys, stride_p, stride_n, head_dim,
    E: tl.constexpr, GROUP: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Best score of each group. Group g of a tile holds its keys g, g + TILE / GROUP, g + 2 · TILE / GROUP, …"""
    x, split = tl.program_id(1), tl.program_id(2)
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    e, tile = tl.arange(0, E), tl.arange(0, TILE)
    g = tl.arange(0, TILE // GROUP)
    query = tl.load(
        query_ptr + (x * queries + q)[:, None].to(tl.int64) * head_dim + e[None, :],
        mask=(q < queries)[:, None] & (e < head_dim)[None, :],
        other=0.0,
    )
    first = split * split_keys
    there = tl.minimum(split_keys, tl.load(length_ptr + x).to(tl.int32) - first)
    keys = keys_ptr + tl.load(pool_ptr + x).to(tl.int64) * stride_p + first.to(tl.int64) * stride_n
    row = ((x * splits + split).to(tl.int64) * queries + q) * (split_keys // GROUP)
    at = best_ptr + row[:, None] + g[None, :]
    whole = tl.maximum(there, 0) // TILE * TILE
    for start in range(0, whole, TILE):
        n = (start + tile).to(tl.int64)
        key = tl.load(keys + n[None, :] * stride_n + e[:, None], mask=(e < head_dim)[:, None], other=0.0)
        score = tl.dot(query, key, input_precision=PRECISION)
        best = tl.max(tl.reshape(score, (BQ, GROUP, TILE // GROUP)), axis=1)
        tl.store(at + start // GROUP, best, mask=(q < queries)[:, None])
    if whole < there:
        n = whole + tile
        key = tl.load(
            keys + n[None, :].to(tl.int64) * stride_n + e[:, None],
            mask=(n < there)[None, :] & (e < head_dim)[:, None],
            other=0.0,
        )
        score = tl.where((n < there)[None, :], tl.dot(query, key, input_precision=PRECISION), float("-inf"))
        best = tl.max(tl.reshape(score, (BQ, GROUP, TILE // GROUP)), axis=1)
        tl.store(at + whole // GROUP, best, mask=(q < queries)[:, None])


@triton.jit
def _bracket(value, lowest, highest, count, most):
    """An interval [low, high): at least `count` values are `low` or more, fewer are `high` or more. If more than `most`
    are `low` or more, then all in the interval are equal."""
    low, high = lowest, highest
    reached, step = tl.sum((value >= low).to(tl.int32), axis=0), 0
    while (reached > most) & (step < 60):
        middle = 0.5 * low + 0.5 * high
        above = tl.sum((value >= middle).to(tl.int32), axis=0)
        if above >= count:
            low, reached = middle, above
        else:
            high = middle
        step += 1
    return low, high


@triton.jit
def _place(value, real, low, high):
    """Where to write each value that is `low` or more: those from `high` up first. Others get −1."""
    certain = real & (value >= high)
    possible = real & (value >= low) & (value < high)
    num_certain = tl.sum(certain.to(tl.int32), axis=0)
    place = tl.where(certain, tl.cumsum(certain.to(tl.int32), axis=0) - 1, -1)
    place = tl.where(possible, num_certain + tl.cumsum(possible.to(tl.int32), axis=0) - 1, place)
    return place, num_certain + tl.sum(possible.to(tl.int32), axis=0)


@triton.jit
def _best_keys(
    query_ptr, keys_ptr, pool_ptr, length_ptr, best_ptr, scratch_ptr, score_ptr, index_ptr,
    queries, splits, split_keys, stride_p, stride_n, head_dim,
    E: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The R best keys of one query in one split, best first."""
    q, x, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = split * split_keys
    there = tl.maximum(0, tl.minimum(split_keys, tl.load(length_ptr + x).to(tl.int32) - first))
    keys = keys_ptr + tl.load(pool_ptr + x).to(tl.int64) * stride_p + first.to(tl.int64) * stride_n
    row = (x * splits + split).to(tl.int64) * queries + q
    scratch = scratch_ptr + row * 2 * WIDTH
    w = tl.arange(0, WIDTH)
    tl.store(score_ptr + row * R + w, float("-inf"), mask=w < R)
    tl.store(index_ptr + row * R + w, tl.zeros((WIDTH,), tl.int64), mask=w < R)

    # Which groups: the R best and, where that is cheaper than telling them apart, up to half as many more.
    m = tl.arange(0, M)
    tiles = (there + TILE - 1) // TILE
    best = tl.load(best_ptr + row * (split_keys // GROUP) + m, mask=m < tiles * (TILE // GROUP), other=float("-inf"))
    real = best > float("-inf")
    wanted = tl.minimum(R, tl.sum(real.to(tl.int32), axis=0))
    top = tl.max(best, axis=0)
    lowest = tl.min(tl.where(real, best, float("inf")), axis=0)
    low, high = _bracket(best, lowest, top + tl.abs(top) * 1e-6 + 1e-30, wanted, wanted + wanted // 2)
    place, chosen = _place(best, real, low, high)
    tl.store(scratch + place, m, mask=(place >= 0) & (place < WIDTH))
    chosen = tl.minimum(WIDTH, chosen)
    tl.debug_barrier()

    # Score their keys again, a few columns at a time: all rows at once would not fit the registers.
    c = tl.arange(0, WIDTH * GROUP)
    group = tl.load(scratch + c // GROUP, mask=c // GROUP < chosen, other=0)
    per_tile: tl.constexpr = TILE // GROUP
    n = group // per_tile * TILE + (c % GROUP) * per_tile + group % per_tile
    real = (c // GROUP < chosen) & (n < there)
    at = keys + n.to(tl.int64) * stride_n
    score = tl.zeros((WIDTH * GROUP,), tl.float32)
    for start in tl.static_range(0, E, COLUMNS):
        e = start + tl.arange(0, COLUMNS)
        query = tl.load(query_ptr + (x * queries + q).to(tl.int64) * head_dim + e, mask=e < head_dim, other=0.0)
        key = tl.load(at[:, None] + e[None, :], mask=real[:, None] & (e < head_dim)[None, :], other=0.0)
        score += tl.sum(key.to(tl.float32) * query.to(tl.float32)[None, :], axis=1)
    score = tl.where(real, score, float("-inf"))
    tl.debug_barrier()

    # Keep at most WIDTH of them.
    wanted = tl.minimum(R, tl.sum(real.to(tl.int32), axis=0))
    top = tl.max(score, axis=0)
    lowest = tl.min(tl.where(real, score, float("inf")), axis=0)
    low, high = _bracket(score, lowest, top + tl.abs(top) * 1e-6 + 1e-30, wanted, WIDTH)
    place, held = _place(score, real, low, high)
    keep = (place >= 0) & (place < WIDTH)
    tl.store(scratch + place, n, mask=keep)
    tl.store(scratch + WIDTH + place, score.to(tl.int32, bitcast=True), mask=keep)
    held = tl.minimum(WIDTH, held)
    tl.debug_barrier()

    # Rank them: a key's place is the number of better ones.
    index = tl.load(scratch + w, mask=w < held, other=0)
    score = tl.load(scratch + WIDTH + w, mask=w < held, other=0).to(tl.float32, bitcast=True)
    place = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, held, 16):
        j = start + tl.arange(0, 16)
        other = tl.load(scratch + WIDTH + j, mask=j < held, other=0).to(tl.float32, bitcast=True)
        better = (other[None, :] > score[:, None]) | ((other[None, :] == score[:, None]) & (j[None, :] < w[:, None]))
        place += tl.sum((better & (j < held)[None, :]).to(tl.int32), axis=1)
    keep = (w < held) & (place < R)
    tl.store(score_ptr + row * R + place, score, mask=keep)
    tl.store(index_ptr + row * R + place, (first + index).to(tl.int64), mask=keep)
