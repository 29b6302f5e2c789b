"""Exact top-k search that never keeps a score a key.

X searches, Q queries, P pools of N keys, E head size, R retrieved; M groups of keys, S parts of a pool, C slots for
chosen groups or for their keys.

The R best keys lie in the R groups of keys whose best is best. So a search takes four kernels: one streams the keys
past a block of queries and keeps the best score of each group; one chooses the R best groups of a query; one scores the
keys of those again; and one ranks them. For many queries all keys are streamed once more, which costs what the first
pass did and writes only what was chosen; few queries read the keys of their groups alone. A chosen group has its own
slot to write to, without atomics: the result is exact however scores are distributed, and the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Most keys that a search may ask for.
MOST = 64
TILE = tl.constexpr(128)
# A query's group maxima are held in registers: a larger pool is searched in parts.
MOST_GROUPS = 4096
# Groups of a query that are scored again, at most; and keys of those that are ranked. Slots fit eight bits.
WIDTH = tl.constexpr(128)
# Memory that a search may take beside its result: more queries are searched in blocks.
MOST_BYTES = 6 << 30
# Keys that are read again at a time.
ROWS = tl.constexpr(64)


def topk_scan(
    query_XQE: Tensor,
    keys_PNE: Tensor,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
    *,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """As `longmem.ops.reference.topk_scan`.

    Args:
        parts: least number of parts that a pool is searched in.

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
    # Maxima, slots and scores of groups take about a byte a key and query.
    most = max(16, MOST_BYTES // (searches * num_keys))
    if queries > most:
        blocks = [topk_scan(part, keys_PNE, top_k, length_X, pool_X, parts=parts) for part in query_XQE.split(most, 1)]
        index_XQR, score_XQR = (torch.cat(found, dim=1) for found in zip(*blocks, strict=True))
        return index_XQR, score_XQR
    query_XQE = query_XQE.to(keys_PNE.dtype).contiguous()
    if keys_PNE.stride(2) != 1:
        keys_PNE = keys_PNE.contiguous()
    if length_X is None:
        length_X = torch.full((searches,), num_keys, dtype=torch.int64, device=device)
    if pool_X is None:
        pool_X = torch.arange(searches, device=device)
    # Kernels step through both; an expanded tensor has one element for all.
    length_X, pool_X = length_X.contiguous(), pool_X.contiguous()
    few = queries <= 16
    # Small groups leave less to score again, but there are more of them to choose from.
    group = 8 if num_keys <= 8 * MOST_GROUPS else 16
    tiles = triton.cdiv(num_keys, TILE.value)
    part_tiles = min(triton.cdiv(tiles, parts), MOST_GROUPS * group // TILE.value)
    parts, part_groups = triton.cdiv(tiles, part_tiles), part_tiles * TILE.value // group
    groups, rows = tiles * TILE.value // group, searches * queries

    block = 16 if few else 128
    blocks = searches * triton.cdiv(queries, block)
    # Several times the programs that run at once (five on a multiprocessor where queries are few, two elsewhere), so
    # that the last ones leave little idle; each with enough tiles to be worth its start.
    programs = (32 if few else 16) * _processors(device)
    chunk_tiles = max(8, triton.cdiv(tiles, triton.cdiv(programs, blocks)))
    grid = (triton.cdiv(queries, block), searches, triton.cdiv(tiles, chunk_tiles))
    source = (query_XQE, keys_PNE, pool_X, length_X)
    shape = (queries, groups, keys_PNE.stride(0), keys_PNE.stride(1), head_dim)
    constants = {"E": max(16, triton.next_power_of_2(head_dim)), "GROUP": group}
    # As many tiles at once as let two programs share a multiprocessor's memory.
    key_bytes = constants["E"] * keys_PNE.element_size()
    stages = 4 if key_bytes <= 128 else 3 if key_bytes <= 256 else 2
    streaming = {
        "BQ": block, "PRECISION": "ieee" if keys_PNE.dtype == torch.float32 else "tf32",
        "num_warps": 4 if few else 8, "num_stages": stages,
    }  # fmt: skip

    best_XQM = torch.empty(searches, queries, groups, dtype=torch.float32, device=device)
    _group_maxima[grid](*source, best_XQM, *shape, chunk_tiles * TILE.value, **constants, **streaming)

    # Which slot of a query's candidates a group was given; −1 if it was not chosen.
    slot_XQM = torch.empty(0 if few else best_XQM.shape, dtype=torch.int8, device=device)
    group_XQSC = torch.empty(searches, queries, parts, WIDTH.value, dtype=torch.int32, device=device)
    chosen_XQS = torch.empty(searches, queries, parts, dtype=torch.int32, device=device)
    most = triton.next_power_of_2(part_groups)
    _choose_groups[(rows, parts)](
        best_XQM, length_X, slot_XQM, group_XQSC, chosen_XQS, queries, groups, part_groups,
        GROUP=group, M=most, R=top_k, SLOTS=not few, num_warps=max(1, min(4, most // 512)),
    )  # fmt: skip

    score_XQSC = torch.empty(searches, queries, parts, WIDTH.value * group, dtype=torch.float32, device=device)
    if few:
        _score_chosen[(rows, parts, WIDTH.value * group // ROWS.value)](
            *source, group_XQSC, chosen_XQS, score_XQSC, *shape, **constants, num_warps=4
        )
    else:
        _score_all[grid](
            *source, slot_XQM, score_XQSC, *shape, chunk_tiles * TILE.value, part_tiles * TILE.value, parts,
            **constants, **streaming, maxnreg=128,
        )  # fmt: skip

    index_XQSR = torch.empty(searches, queries, parts, top_k, dtype=torch.int64, device=device)
    score_XQSR = torch.empty(index_XQSR.shape, dtype=torch.float32, device=device)
    _rank_keys[(rows, parts)](
        score_XQSC, group_XQSC, chosen_XQS, length_X, score_XQSR, index_XQSR, queries,
        GROUP=group, R=top_k, num_warps=4,
    )  # fmt: skip
    if parts == 1:
        return index_XQSR[:, :, 0], score_XQSR[:, :, 0]
    score_XQR, among_XQR = score_XQSR.flatten(2).topk(top_k, dim=-1)
    return index_XQSR.flatten(2).gather(-1, among_XQR), score_XQR


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _block_of_queries(query_ptr, x, q, queries, head_dim, E: tl.constexpr):
    e = tl.arange(0, E)
    return tl.load(
        query_ptr + (x * queries + q)[:, None].to(tl.int64) * head_dim + e[None, :],
        mask=(q < queries)[:, None] & (e < head_dim)[None, :],
        other=0.0,
    )


@triton.jit
def _group_maxima(
    query_ptr, keys_ptr, pool_ptr, length_ptr, best_ptr,
    queries, num_groups, stride_p, stride_n, head_dim, chunk_keys,
    E: tl.constexpr, GROUP: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Best score of each group. Group g of a tile holds its keys g, g + TILE / GROUP, g + 2 · TILE / GROUP, …"""
    x, first = tl.program_id(1), tl.program_id(2) * chunk_keys
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    e, tile, g = tl.arange(0, E), tl.arange(0, TILE), tl.arange(0, TILE // GROUP)
    query = _block_of_queries(query_ptr, x, q, queries, head_dim, E)
    there = tl.minimum(first + chunk_keys, tl.load(length_ptr + x).to(tl.int32))
    keys = keys_ptr + tl.load(pool_ptr + x).to(tl.int64) * stride_p
    at = best_ptr + (x * queries + q)[:, None].to(tl.int64) * num_groups + g[None, :]
    whole = first + tl.maximum(there - first, 0) // TILE * TILE
    for start in range(first, whole, TILE):
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
def _bracket(value, real, count, most):
    """An interval [low, high): at least `count` real values are `low` or more, fewer are `high` or more. If more than
    `most` are `low` or more, then all in the interval are equal."""
    top = tl.max(tl.where(real, value, float("-inf")), axis=0)
    low, high = tl.min(tl.where(real, value, float("inf")), axis=0), top + tl.abs(top) * 1e-6 + 1e-30
    reached, middle = tl.sum(real.to(tl.int32), axis=0), 0.5 * low + 0.5 * high
    # Until there is no number in between.
    while (reached > most) & (low < middle) & (middle < high):
        above = tl.sum((real & (value >= middle)).to(tl.int32), axis=0)
        if above >= count:
            low, reached = middle, above
        else:
            high = middle
        middle = 0.5 * low + 0.5 * high
    return low, high


@triton.jit
def _place(value, real, low, high):
    """A place for each real value that is `low` or more, those from `high` up first; −1 for others. And how many."""
    certain = real & (value >= high)
    possible = real & (value >= low) & (value < high)
    # Two counts in one: there are fewer than 2¹⁵ values.
    both = certain.to(tl.int32) + possible.to(tl.int32) * 65536
    before, total = tl.cumsum(both, axis=0) - both, tl.sum(both, axis=0)
    place = tl.where(possible, total % 65536 + before // 65536, -1)
    return tl.where(certain, before % 65536, place), total % 65536 + total // 65536


@triton.jit
def _choose_groups(
    best_ptr, length_ptr, slot_ptr, group_ptr, chosen_ptr, queries, num_groups, part_groups,
    GROUP: tl.constexpr, M: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The R best groups of a query in a part and, where that is cheaper than telling them apart, up to half as many
    more. Groups that tie are taken from the front."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles = (tl.load(length_ptr + row // queries).to(tl.int32) + TILE - 1) // TILE
    m = part * part_groups + tl.arange(0, M)
    there = m < tl.minimum(tiles * (TILE // GROUP), (part + 1) * part_groups)
    best = tl.load(best_ptr + row * num_groups + m, mask=there, other=float("-inf"))
    real = best > float("-inf")
    wanted = tl.minimum(R, tl.sum(real.to(tl.int32), axis=0))
    low, high = _bracket(best, real, wanted, wanted + wanted // 2)
    place, chosen = _place(best, real, low, high)
    place = tl.where(place < WIDTH, place, -1)
    if SLOTS:
        tl.store(slot_ptr + row * num_groups + m, place.to(tl.int8), mask=there)
    row = row * tl.num_programs(1) + part
    tl.store(group_ptr + row * WIDTH + place, m, mask=place >= 0)
    tl.store(chosen_ptr + row, tl.minimum(WIDTH, chosen))


@triton.jit
def _score_all(
    query_ptr, keys_ptr, pool_ptr, length_ptr, slot_ptr, score_ptr,
    queries, num_groups, stride_p, stride_n, head_dim, chunk_keys, part_keys, parts,
    E: tl.constexpr, GROUP: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the keys of chosen groups, streaming all keys: as `_group_maxima`, but what is written differs."""
    x, first = tl.program_id(1), tl.program_id(2) * chunk_keys
    b = tl.arange(0, BQ)
    q = tl.program_id(0) * BQ + b
    e, tile, g, j = tl.arange(0, E), tl.arange(0, TILE), tl.arange(0, TILE // GROUP), tl.arange(0, GROUP)
    query = _block_of_queries(query_ptr, x, q, queries, head_dim, E)
    there = tl.minimum(first + chunk_keys, tl.load(length_ptr + x).to(tl.int32))
    keys = keys_ptr + tl.load(pool_ptr + x).to(tl.int64) * stride_p
    slots = slot_ptr + (x * queries + q)[:, None].to(tl.int64) * num_groups + g[None, :]
    # Offsets within a block of queries fit 32 bits, and half as many registers.
    scores = score_ptr + (x * queries + tl.program_id(0) * BQ).to(tl.int64) * parts * (WIDTH * GROUP)
    for start in range(first, there, TILE):
        slot = tl.load(slots + start // GROUP, mask=(q < queries)[:, None], other=-1)[:, :, None].to(tl.int32)
        n = start + tile
        key = tl.load(
            keys + n[None, :].to(tl.int64) * stride_n + e[:, None],
            mask=(n < there)[None, :] & (e < head_dim)[:, None],
            other=0.0,
        )
        score = tl.dot(query, key, input_precision=PRECISION)
        score = tl.permute(tl.reshape(score, (BQ, GROUP, TILE // GROUP)), (0, 2, 1))
        at = ((b * parts + start // part_keys) * WIDTH)[:, None, None] + slot
        tl.store(scores + at * GROUP + j[None, None, :], score, mask=slot >= 0)


@triton.jit
def _keys_of(group, j, GROUP: tl.constexpr):
    """Where key j of a group lies in its pool."""
    return group // (TILE // GROUP) * TILE + j * (TILE // GROUP) + group % (TILE // GROUP)


@triton.jit
def _score_chosen(
    query_ptr, keys_ptr, pool_ptr, length_ptr, group_ptr, chosen_ptr, score_ptr,
    queries, num_groups, stride_p, stride_n, head_dim,
    E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Scores of the keys of chosen groups, reading those alone: ROWS candidates of one query in one part."""
    query_row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = query_row * tl.num_programs(1) + part
    c, e = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    candidates = tl.load(chosen_ptr + row) * GROUP
    if tl.program_id(2) * ROWS < candidates:
        x = query_row // queries
        query = tl.load(query_ptr + query_row * head_dim + e, mask=e < head_dim, other=0.0).to(tl.float32)
        group = tl.load(group_ptr + row * WIDTH + c // GROUP, mask=c < candidates, other=0)
        n = _keys_of(group, c % GROUP, GROUP)
        is_key = (c < candidates) & (n < tl.load(length_ptr + x))
        key = tl.load(
            keys_ptr + tl.load(pool_ptr + x).to(tl.int64) * stride_p + n.to(tl.int64)[:, None] * stride_n + e[None, :],
            mask=is_key[:, None] & (e < head_dim)[None, :],
            other=0.0,
        )
        tl.store(score_ptr + row * (WIDTH * GROUP) + c, tl.sum(key.to(tl.float32) * query[None, :], axis=1))


@triton.jit
def _rank_keys(
    candidate_ptr, group_ptr, chosen_ptr, length_ptr, score_ptr, index_ptr, queries,
    GROUP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The R best candidates of a query in a part, best first; of those that tie, the one that lies first."""
    query_row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = query_row * tl.num_programs(1) + part
    w, c = tl.arange(0, WIDTH), tl.arange(0, WIDTH * GROUP)
    candidates = tl.load(chosen_ptr + row) * GROUP
    at = candidate_ptr + row * (WIDTH * GROUP)
    score = tl.load(at + c, mask=c < candidates, other=float("-inf"))
    group = tl.load(group_ptr + row * WIDTH + c // GROUP, mask=c < candidates, other=0)
    index = _keys_of(group, c % GROUP, GROUP)
    real = (c < candidates) & (index < tl.load(length_ptr + query_row // queries)) & (score > float("-inf"))

    # Keep at most WIDTH of them, where the candidates were: all have been read, or no bracket would be known.
    low, high = _bracket(score, real, tl.minimum(R, tl.sum(real.to(tl.int32), axis=0)), WIDTH)
    place, held = _place(score, real, low, high)
    keep = (place >= 0) & (place < WIDTH)
    held = tl.minimum(WIDTH, held)
    tl.store(at + place, score, mask=keep)
    tl.store(at + WIDTH + place, index.to(tl.float32, bitcast=True), mask=keep)
    tl.debug_barrier()

    # A key's rank is the number of better ones.
    score = tl.load(at + w, mask=w < held, other=0.0)
    index = tl.load(at + WIDTH + w, mask=w < held, other=0.0).to(tl.int32, bitcast=True)
    better = tl.zeros((WIDTH, 16), tl.int32)
    for start in range(0, held, 16):
        i = start + tl.arange(0, 16)
        other = tl.load(at + i, mask=i < held, other=float("-inf"))
        other_index = tl.load(at + WIDTH + i, mask=i < held, other=0.0).to(tl.int32, bitcast=True)
        tie = (other[None, :] == score[:, None]) & (other_index[None, :] < index[:, None])
        better += ((other[None, :] > score[:, None]) | tie).to(tl.int32)
    rank = tl.sum(better, axis=1)
    ranked = (w < held) & (rank < R)
    tl.store(score_ptr + row * R + rank, score, mask=ranked)
    tl.store(index_ptr + row * R + rank, index.to(tl.int64), mask=ranked)
    nothing = (w >= held) & (w < R)
    tl.store(score_ptr + row * R + w, tl.full((WIDTH,), float("-inf"), tl.float32), mask=nothing)
    tl.store(index_ptr + row * R + w, tl.zeros((WIDTH,), tl.int64), mask=nothing)
