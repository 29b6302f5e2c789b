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
# Keys that are scored again at a time.
ROWS = tl.constexpr(64)
# Programs a multiprocessor gets that choose keys, one query after another: they wait for memory most of the time, so as
# many as registers allow (four) should run, and some more to even out.
RESIDENT = 16


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
    rows = searches * splits * queries
    programs = min(rows, RESIDENT * _processors(device))
    scratch = torch.empty(programs, WIDTH * (group + 3), dtype=torch.int32, device=device)
    _best_keys[(programs,)](
        query_XQE, keys_PNE, pool_X, length_X, best_XSQM, scratch, score_XSQR, index_XSQR, *shape, rows, **blocking,
        M=triton.next_power_of_2(groups), R=top_k, WIDTH=WIDTH, num_warps=4, maxnreg=128 if groups <= 2048 else None,
    )  # fmt: skip
    if splits == 1:
        return index_XSQR[:, 0], score_XSQR[:, 0]
    score_XQC = score_XSQR.transpose(1, 2).flatten(2)
    score_XQR, among_XQR = score_XQC.topk(top_k, dim=-1)
    return index_XSQR.transpose(1, 2).flatten(2).gather(-1, among_XQR), score_XQR


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(device: torch.device, programs: int, num_keys: int) -> int:
    """Parts of a pool, so that two programs run on each multiprocessor; one part if the queries alone fill them."""
    processors = _processors(device)
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
    queries, splits, split_keys, stride_p, stride_n, head_dim, rows,
    E: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The R best keys of one query in one split after another, best first."""
    program = tl.program_id(0)
    # A program's own workspace: chosen groups, scores of their keys, and the keys that are ranked.
    groups_at = scratch_ptr + program.to(tl.int64) * WIDTH * (GROUP + 3)
    scores_at, index_at, kept_at = groups_at + WIDTH, groups_at + WIDTH * (GROUP + 1), groups_at + WIDTH * (GROUP + 2)
    w, m, c = tl.arange(0, WIDTH), tl.arange(0, M), tl.arange(0, WIDTH * GROUP)
    r, e = tl.arange(0, ROWS), tl.arange(0, E)
    per_tile: tl.constexpr = TILE // GROUP
    for number in range(program, rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + number
        x, split = number // queries // splits, number // queries % splits
        first = split * split_keys
        there = tl.maximum(0, tl.minimum(split_keys, tl.load(length_ptr + x).to(tl.int32) - first))
        keys = keys_ptr + tl.load(pool_ptr + x).to(tl.int64) * stride_p + first.to(tl.int64) * stride_n
        query_at = query_ptr + (x.to(tl.int64) * queries + number % queries) * head_dim
        query = tl.load(query_at + e, mask=e < head_dim, other=0.0).to(tl.float32)
        tl.store(score_ptr + row * R + w, float("-inf"), mask=w < R)
        tl.store(index_ptr + row * R + w, tl.zeros((WIDTH,), tl.int64), mask=w < R)

        # Which groups: the R best and, where that is cheaper than telling them apart, up to half as many more.
        tiles = (there + TILE - 1) // TILE
        best = tl.load(best_ptr + row * (split_keys // GROUP) + m, mask=m < tiles * per_tile, other=float("-inf"))
        real = best > float("-inf")
        wanted = tl.minimum(R, tl.sum(real.to(tl.int32), axis=0))
        top = tl.max(best, axis=0)
        lowest = tl.min(tl.where(real, best, float("inf")), axis=0)
        low, high = _bracket(best, lowest, top + tl.abs(top) * 1e-6 + 1e-30, wanted, wanted + wanted // 2)
        place, chosen = _place(best, real, low, high)
        tl.store(groups_at + place, m, mask=(place >= 0) & (place < WIDTH))
        chosen = tl.minimum(WIDTH, chosen)
        tl.debug_barrier()

        # Score their keys again, a few rows at a time: all at once would not fit the registers.
        for start in range(0, chosen * GROUP, ROWS):
            group = tl.load(groups_at + (start + r) // GROUP, mask=(start + r) // GROUP < chosen, other=0)
            n = group // per_tile * TILE + (start + r) % GROUP * per_tile + group % per_tile
            is_key = ((start + r) // GROUP < chosen) & (n < there)
            key = tl.load(
                keys + n.to(tl.int64)[:, None] * stride_n + e[None, :],
                mask=is_key[:, None] & (e < head_dim)[None, :],
                other=0.0,
            )
            score = tl.sum(key.to(tl.float32) * query[None, :], axis=1)
            tl.store(scores_at + start + r, tl.where(is_key, score, float("-inf")).to(tl.int32, bitcast=True))
        tl.debug_barrier()

        # Keep at most WIDTH of them.
        score = tl.load(scores_at + c, mask=c < chosen * GROUP, other=0).to(tl.float32, bitcast=True)
        real = (c < chosen * GROUP) & (score > float("-inf"))
        score = tl.where(real, score, float("-inf"))
        wanted = tl.minimum(R, tl.sum(real.to(tl.int32), axis=0))
        top = tl.max(score, axis=0)
        lowest = tl.min(tl.where(real, score, float("inf")), axis=0)
        low, high = _bracket(score, lowest, top + tl.abs(top) * 1e-6 + 1e-30, wanted, WIDTH)
        place, held = _place(score, real, low, high)
        keep = (place >= 0) & (place < WIDTH)
        group = tl.load(groups_at + c // GROUP, mask=keep, other=0)
        tl.store(index_at + place, group // per_tile * TILE + c % GROUP * per_tile + group % per_tile, mask=keep)
        tl.store(kept_at + place, score.to(tl.int32, bitcast=True), mask=keep)
        held = tl.minimum(WIDTH, held)
        tl.debug_barrier()

        # Rank them: a key's place is the number of better ones.
        index = tl.load(index_at + w, mask=w < held, other=0)
        score = tl.load(kept_at + w, mask=w < held, other=0).to(tl.float32, bitcast=True)
        place = tl.zeros((WIDTH,), tl.int32)
        for start in range(0, held, 16):
            j = start + tl.arange(0, 16)
            other = tl.load(kept_at + j, mask=j < held, other=0).to(tl.float32, bitcast=True)
            better = (other[None, :] > score[:, None]) | (
                (other[None, :] == score[:, None]) & (j[None, :] < w[:, None])
            )
            place += tl.sum((better & (j < held)[None, :]).to(tl.int32), axis=1)
        keep = (w < held) & (place < R)
        tl.store(score_ptr + row * R + place, score, mask=keep)
        tl.store(index_ptr + row * R + place, (first + index).to(tl.int64), mask=keep)
        # The workspace is written again for the next query.
        tl.debug_barrier()
