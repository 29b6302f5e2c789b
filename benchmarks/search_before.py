"""Top-k search that never keeps a score a key: exact, or exact among the groups that a copy in int8 finds promising.

X searches, Q queries, P pools of N keys, E head size, R retrieved; M groups of keys, S parts of a pool, C slots for
chosen groups or for their keys; D numbers of a code.

The R best keys lie in the R groups of keys whose best is best. So a search streams the keys past a block of queries
and keeps the best score of each group; chooses the R best groups of a query; scores the keys of those again; and ranks
them. Where a query's groups hold few of all keys, those keys are read again by themselves. Otherwise all keys are
streamed once more, which costs what the first pass did and writes only what was chosen. A chosen group has its own slot
to write to, without atomics: the result is exact however scores are distributed, and the same every time.

Codes take the place of the keys in the first pass, which reads nearly all of the bytes; more groups are chosen then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem.ops.pools import Pools
from longmem.ops.triton.rows import Source, pool_at

# Most keys that a search may ask for.
MOST = 64
TILE = tl.constexpr(128)
# A query's group maxima are held in registers: those of a larger pool are chosen from in parts.
MOST_GROUPS = 4096
# Groups of a query that are scored again, at most; and keys of those that are ranked. Slots fit eight bits.
WIDTH = tl.constexpr(128)
# Memory that a search may take beside its result: more queries are searched in blocks.
MOST_BYTES = 6 << 30
# Keys that are read again at a time.
ROWS = tl.constexpr(64)
# Up to so many queries of a search fill one block of a matrix product.
FEW = 16


def topk_scan(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
    *,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """As `longmem.ops.reference.topk_scan`.

    Args:
        parts: least number of parts that groups of a pool are chosen from.

    Raises:
        ValueError: `top_k` is more than `MOST`.
    """
    if nothing := _nothing(query_XQE, keys_PNE, top_k):
        return nothing
    # Maxima, slots and scores of groups take about a byte a key and query.
    most = max(FEW, MOST_BYTES // (len(query_XQE) * keys_PNE.shape[1]))
    if query_XQE.shape[1] > most:
        blocks = [topk_scan(part, keys_PNE, top_k, length_X, pool_X, parts=parts) for part in query_XQE.split(most, 1)]
        index_XQR, score_XQR = (torch.cat(found, dim=1) for found in zip(*blocks, strict=True))
        return index_XQR, score_XQR
    keys = _Keys.of(query_XQE.to(keys_PNE.dtype), keys_PNE, length_X, pool_X, parts)
    best_XQM = keys.group_maxima()
    if keys.few or 2 * top_k * keys.group * keys.queries <= keys.most:
        return keys.rank_groups(*keys.choose(best_XQM, top_k, top_k + top_k // 2), top_k)
    return keys.rank_all(best_XQM, top_k)


def topk_coded(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    code_query_XQD: Tensor,
    codes_PND: Tensor | Pools,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
    *,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """As `longmem.ops.reference.topk_coded`, but for a few groups more that may be looked at.

    Args:
        parts: least number of parts that groups of a pool are chosen from.

    Raises:
        ValueError: `top_k` is more than `MOST`.
    """
    if nothing := _nothing(query_XQE, keys_PNE, top_k):
        return nothing
    assert codes_PND.shape[1] == keys_PNE.shape[1] and codes_PND.dtype == code_query_XQD.dtype == torch.int8
    codes = _Keys.of(code_query_XQD, codes_PND, length_X, pool_X, parts)
    group_XQC, chosen_XQ = codes.choose(codes.group_maxima(), 2 * top_k, WIDTH.value)
    keys = _Keys.of(query_XQE.to(keys_PNE.dtype), keys_PNE, length_X, pool_X, parts)
    return keys.rank_groups(group_XQC, chosen_XQ, top_k)


def _nothing(query_XQE: Tensor, keys_PNE: Tensor | Pools, top_k: int) -> tuple[Tensor, Tensor] | None:
    """What is found where there is nothing to search with or in."""
    if top_k > MOST:
        raise ValueError(f"top_k is {top_k}, expected at most {MOST}")
    if query_XQE.shape[0] and query_XQE.shape[1] and keys_PNE.shape[1]:
        return None
    index_XQR = torch.zeros(*query_XQE.shape[:2], top_k, dtype=torch.int64, device=query_XQE.device)
    return index_XQR, torch.full(index_XQR.shape, -torch.inf, device=query_XQE.device)


@dataclass(frozen=True)
class _Keys:
    """The keys (or codes) of a search and its queries, as the kernels take them.

    Attributes:
        query_XQE: contiguous.
        source: the keys.
        length_X, pool_X: contiguous (kernels step through both; an expanded tensor has one element for all), or None.
        most: N.
        group: keys of a group. Small groups leave less to score again, but there are more of them to choose from.
        part_tiles, parts: into which the groups are divided where they are chosen from.
    """

    query_XQE: Tensor
    source: Source
    length_X: Tensor | None
    pool_X: Tensor | None
    most: int
    group: int
    part_tiles: int
    parts: int

    @classmethod
    def of(
        cls, query_XQE: Tensor, keys_PNE: Tensor | Pools, length_X: Tensor | None, pool_X: Tensor | None, parts: int
    ) -> _Keys:
        assert length_X is not None or not isinstance(keys_PNE, Pools)
        length_X = None if length_X is None else length_X.contiguous()
        pool_X = None if pool_X is None else pool_X.contiguous()
        most = keys_PNE.shape[1]
        group = 8 if most <= 8 * MOST_GROUPS else 16
        tiles = triton.cdiv(most, TILE.value)
        part_tiles = min(triton.cdiv(tiles, parts), MOST_GROUPS * group // TILE.value)
        parts = triton.cdiv(tiles, part_tiles)
        return cls(
            query_XQE.contiguous(), Source.of(keys_PNE), length_X, pool_X, most, group, part_tiles, parts
        )  # fmt: skip

    @property
    def queries(self) -> int:
        return self.query_XQE.shape[1]

    @property
    def few(self) -> bool:
        return self.queries <= FEW

    @property
    def rows(self) -> int:
        """Queries of all searches."""
        return self.query_XQE.shape[0] * self.queries

    @property
    def part_groups(self) -> int:
        return self.part_tiles * TILE.value // self.group

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty tensor (X, Q, …)."""
        return torch.empty(*self.query_XQE.shape[:2], *shape, dtype=dtype, device=self.query_XQE.device)

    @property
    def _where(self) -> tuple[Any, ...]:
        return self.query_XQE, self.source.rows, self.source.address_P, self.pool_X, self.length_X

    @property
    def _shape(self) -> tuple[int, ...]:
        groups = triton.cdiv(self.most, TILE.value) * TILE.value // self.group
        return self.queries, self.most, groups, self.source.stride_p, self.source.stride_n, self.query_XQE.shape[2]

    @property
    def _constants(self) -> dict[str, Any]:
        # A product needs so many numbers of a row at least.
        least = 32 if self.source.rows.dtype == torch.int8 else 16
        return {
            "E": max(least, triton.next_power_of_2(self.query_XQE.shape[2])),
            "GROUP": self.group,
            "ALIGNED": self.source.aligned,
        }

    def _streaming(self) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
        """Grid, keys of a program and settings of a kernel that all keys stream through."""
        searches, block = self.query_XQE.shape[0], FEW if self.few else 128
        tiles, blocks = triton.cdiv(self.most, TILE.value), triton.cdiv(self.queries, block)
        # Several times the programs that run at once (five on a multiprocessor where queries are few, two elsewhere),
        # so that the last ones leave little idle; each with enough tiles to be worth its start.
        programs = (32 if self.few else 16) * _processors(self.query_XQE.device)
        chunk_tiles = max(8, triton.cdiv(tiles, triton.cdiv(programs, searches * blocks)))
        # As many tiles at once as let two programs share a multiprocessor's memory.
        key_bytes = self._constants["E"] * self.source.rows.element_size()
        settings = {
            "BQ": block,
            "PRECISION": "ieee" if self.source.rows.dtype == torch.float32 else "tf32",
            "num_warps": 4 if self.few else 8,
            "num_stages": 4 if key_bytes <= 128 else 3 if key_bytes <= 256 else 2,
        }
        return (blocks, searches, triton.cdiv(tiles, chunk_tiles)), chunk_tiles * TILE.value, settings

    def group_maxima(self) -> Tensor:
        """Best score of each group, (X, Q, M); what lies beyond a search's keys is undefined."""
        grid, chunk_keys, settings = self._streaming()
        best_XQM = self.new(self._shape[2])
        _group_maxima[grid](*self._where, best_XQM, *self._shape, chunk_keys, **self._constants, **settings)
        return best_XQM

    def choose(self, best_XQM: Tensor, count: int, most: int) -> tuple[Tensor, Tensor]:
        """The `count` best groups of each query and, where that is cheaper than telling them apart, up to `most`:
        (X, Q, C), and how many (X, Q)."""
        value_XQSC = self.new(self.parts, WIDTH.value)
        group_XQSC, chosen_XQS = self._choose_in_parts(best_XQM, count, most, value_XQSC=value_XQSC)
        # What was chosen in some parts is chosen from again, until that is one part.
        at_once = MOST_GROUPS // WIDTH.value
        while (parts := chosen_XQS.shape[2]) > 1:
            left = triton.cdiv(parts, at_once)
            inputs = value_XQSC, group_XQSC, chosen_XQS
            value_XQSC, group_XQSC, chosen_XQS = (
                self.new(left, *old.shape[3:], dtype=old.dtype) for old in inputs
            )  # fmt: skip
            width = min(at_once, triton.next_power_of_2(parts)) * WIDTH.value
            _choose_again[(self.rows, left)](
                *inputs, value_XQSC, group_XQSC, chosen_XQS, parts,
                M=width, R=count, KEEP=most, num_warps=_warps(width),
            )  # fmt: skip
        return group_XQSC[:, :, 0], chosen_XQS[:, :, 0]

    def _choose_in_parts(
        self,
        best_XQM: Tensor,
        count: int,
        most: int,
        *,
        value_XQSC: Tensor | None = None,
        slot_XQM: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best groups of each part, (X, Q, S, C), and how many."""
        group_XQSC = self.new(self.parts, WIDTH.value, dtype=torch.int32)
        chosen_XQS = self.new(self.parts, dtype=torch.int32)
        width = triton.next_power_of_2(self.part_groups)
        _choose_groups[(self.rows, self.parts)](
            best_XQM, self.length_X, slot_XQM, value_XQSC, group_XQSC, chosen_XQS,
            self.queries, self.most, best_XQM.shape[2], self.part_groups,
            GROUP=self.group, M=width, R=count, KEEP=most, num_warps=_warps(width),
        )  # fmt: skip
        return group_XQSC, chosen_XQS

    def rank_groups(self, group_XQC: Tensor, chosen_XQ: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The best keys of some groups, which are read again: indices and scores (X, Q, R)."""
        score_XQC = self.new(WIDTH.value * self.group)
        _score_chosen[(self.rows, WIDTH.value * self.group // ROWS.value)](
            *self._where, group_XQC, chosen_XQ, score_XQC, *self._shape, **self._constants, num_warps=4
        )
        return self._rank(score_XQC, group_XQC, chosen_XQ, 1, top_k)

    def rank_all(self, best_XQM: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The best keys of the best groups, all keys being streamed again: indices and scores (X, Q, R)."""
        # Which slot of a query's candidates a group was given; −1 if it was not chosen.
        slot_XQM = self.new(best_XQM.shape[2], dtype=torch.int8)
        group_XQSC, chosen_XQS = self._choose_in_parts(best_XQM, top_k, top_k + top_k // 2, slot_XQM=slot_XQM)
        score_XQSC = self.new(self.parts, WIDTH.value * self.group)
        grid, chunk_keys, settings = self._streaming()
        _score_all[grid](
            *self._where, slot_XQM, score_XQSC, *self._shape, chunk_keys, self.part_tiles * TILE.value, self.parts,
            **self._constants, **settings, maxnreg=128,
        )  # fmt: skip
        index_XQSR, score_XQSR = self._rank(score_XQSC, group_XQSC, chosen_XQS, self.parts, top_k)
        if self.parts == 1:
            return index_XQSR, score_XQSR
        score_XQR, among_XQR = score_XQSR.topk(top_k, dim=-1)
        return index_XQSR.gather(-1, among_XQR), score_XQR

    def _rank(
        self, score_XQSC: Tensor, group_XQSC: Tensor, chosen_XQS: Tensor, parts: int, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """The best keys of each part, one part after the other: (X, Q, S · R)."""
        index_XQR = self.new(parts * top_k, dtype=torch.int64)
        score_XQR = self.new(parts * top_k)
        _rank_keys[(self.rows, parts)](
            score_XQSC, group_XQSC, chosen_XQS, self.length_X, score_XQR, index_XQR, self.queries, self.most,
            GROUP=self.group, R=top_k, num_warps=4,
        )  # fmt: skip
        return index_XQR, score_XQR


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _warps(width: int) -> int:
    return max(1, min(4, width // 512))


@triton.jit
def _length(length_ptr, x, most):
    """Keys of search x: all where `length_ptr` is None."""
    return most if length_ptr is None else tl.load(length_ptr + x).to(tl.int32)


@triton.jit
def _block_of_queries(query_ptr, x, q, queries, head_dim, E: tl.constexpr):
    e = tl.arange(0, E)
    return tl.load(
        query_ptr + (x * queries + q)[:, None].to(tl.int64) * head_dim + e[None, :],
        mask=(q < queries)[:, None] & (e < head_dim)[None, :],
        other=0,
    )


@triton.jit
def _product(query, key, PRECISION: tl.constexpr):
    """Scores (queries, keys), float32."""
    if query.dtype == tl.int8:
        score = tl.dot(query, key, out_dtype=tl.int32).to(tl.float32)
    else:
        score = tl.dot(query, key, input_precision=PRECISION)
    return score


@triton.jit
def _group_maxima(
    query_ptr, keys_ptr, address_ptr, pool_ptr, length_ptr, best_ptr,
    queries, most, num_groups, stride_p, stride_n, head_dim, chunk_keys,
    E: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Best score of each group. Group g of a tile holds its keys g, g + TILE / GROUP, g + 2 · TILE / GROUP, …"""
    x, first = tl.program_id(1), tl.program_id(2) * chunk_keys
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    e, tile, g = tl.arange(0, E), tl.arange(0, TILE), tl.arange(0, TILE // GROUP)
    query = _block_of_queries(query_ptr, x, q, queries, head_dim, E)
    there = tl.minimum(first + chunk_keys, _length(length_ptr, x, most))
    keys = pool_at(keys_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED)
    at = best_ptr + (x * queries + q)[:, None].to(tl.int64) * num_groups + g[None, :]
    whole = first + tl.maximum(there - first, 0) // TILE * TILE
    for start in range(first, whole, TILE):
        n = (start + tile).to(tl.int64)
        key = tl.load(keys + n[None, :] * stride_n + e[:, None], mask=(e < head_dim)[:, None], other=0)
        score = _product(query, key, PRECISION)
        best = tl.max(tl.reshape(score, (BQ, GROUP, TILE // GROUP)), axis=1)
        tl.store(at + start // GROUP, best, mask=(q < queries)[:, None])
    if whole < there:
        n = whole + tile
        key = tl.load(
            keys + n[None, :].to(tl.int64) * stride_n + e[:, None],
            mask=(n < there)[None, :] & (e < head_dim)[:, None],
            other=0,
        )
        score = tl.where((n < there)[None, :], _product(query, key, PRECISION), float("-inf"))
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
    best_ptr, length_ptr, slot_ptr, value_ptr, group_ptr, chosen_ptr, queries, most, num_groups, part_groups,
    GROUP: tl.constexpr, M: tl.constexpr, R: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The R best groups of a query in a part and, where that is cheaper than telling them apart, up to KEEP. Groups
    that tie are taken from the front."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles = (_length(length_ptr, row // queries, most) + TILE - 1) // TILE
    m = part * part_groups + tl.arange(0, M)
    there = m < tl.minimum(tiles * (TILE // GROUP), (part + 1) * part_groups)
    best = tl.load(best_ptr + row * num_groups + m, mask=there, other=float("-inf"))
    place, chosen = _best_places(best, R, KEEP)
    if slot_ptr is not None:
        tl.store(slot_ptr + row * num_groups + m, place.to(tl.int8), mask=there)
    row = row * tl.num_programs(1) + part
    tl.store(group_ptr + row * WIDTH + place, m, mask=place >= 0)
    if value_ptr is not None:
        tl.store(value_ptr + row * WIDTH + place, best, mask=place >= 0)
    tl.store(chosen_ptr + row, chosen)


@triton.jit
def _best_places(best, R: tl.constexpr, KEEP: tl.constexpr):
    """A place below WIDTH for each of the R best values, perhaps for up to KEEP; −1 for others. And how many."""
    real = best > float("-inf")
    wanted = tl.minimum(R, tl.sum(real.to(tl.int32), axis=0))
    low, high = _bracket(best, real, wanted, tl.minimum(KEEP, wanted + wanted // 2))
    place, chosen = _place(best, real, low, high)
    return tl.where(place < WIDTH, place, -1), tl.minimum(WIDTH, chosen)


@triton.jit
def _choose_again(
    value_ptr, group_ptr, chosen_ptr, to_value_ptr, to_group_ptr, to_chosen_ptr, parts,
    M: tl.constexpr, R: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """As `_choose_groups`, of those that were chosen in M / WIDTH parts."""
    row, left = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m = tl.arange(0, M)
    part = left * (M // WIDTH) + m // WIDTH
    held = tl.load(chosen_ptr + row * parts + part, mask=part < parts, other=0)
    at, there = (row * parts + part) * WIDTH + m % WIDTH, m % WIDTH < held
    best = tl.load(value_ptr + at, mask=there, other=float("-inf"))
    group = tl.load(group_ptr + at, mask=there, other=0)
    place, chosen = _best_places(best, R, KEEP)
    row = row * tl.num_programs(1) + left
    tl.store(to_group_ptr + row * WIDTH + place, group, mask=place >= 0)
    tl.store(to_value_ptr + row * WIDTH + place, best, mask=place >= 0)
    tl.store(to_chosen_ptr + row, chosen)


@triton.jit
def _score_all(
    query_ptr, keys_ptr, address_ptr, pool_ptr, length_ptr, slot_ptr, score_ptr,
    queries, most, num_groups, stride_p, stride_n, head_dim, chunk_keys, part_keys, parts,
    E: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the keys of chosen groups, streaming all keys: as `_group_maxima`, but what is written differs."""
    x, first = tl.program_id(1), tl.program_id(2) * chunk_keys
    b = tl.arange(0, BQ)
    q = tl.program_id(0) * BQ + b
    e, tile, g, j = tl.arange(0, E), tl.arange(0, TILE), tl.arange(0, TILE // GROUP), tl.arange(0, GROUP)
    query = _block_of_queries(query_ptr, x, q, queries, head_dim, E)
    there = tl.minimum(first + chunk_keys, _length(length_ptr, x, most))
    keys = pool_at(keys_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED)
    slots = slot_ptr + (x * queries + q)[:, None].to(tl.int64) * num_groups + g[None, :]
    # Offsets within a block of queries fit 32 bits, and half as many registers.
    scores = score_ptr + (x * queries + tl.program_id(0) * BQ).to(tl.int64) * parts * (WIDTH * GROUP)
    for start in range(first, there, TILE):
        slot = tl.load(slots + start // GROUP, mask=(q < queries)[:, None], other=-1)[:, :, None].to(tl.int32)
        n = start + tile
        key = tl.load(
            keys + n[None, :].to(tl.int64) * stride_n + e[:, None],
            mask=(n < there)[None, :] & (e < head_dim)[:, None],
            other=0,
        )
        score = _product(query, key, PRECISION)
        score = tl.permute(tl.reshape(score, (BQ, GROUP, TILE // GROUP)), (0, 2, 1))
        at = ((b * parts + start // part_keys) * WIDTH)[:, None, None] + slot
        tl.store(scores + at * GROUP + j[None, None, :], score, mask=slot >= 0)


@triton.jit
def _keys_of(group, j, GROUP: tl.constexpr):
    """Where key j of a group lies in its pool."""
    return group // (TILE // GROUP) * TILE + j * (TILE // GROUP) + group % (TILE // GROUP)


@triton.jit
def _score_chosen(
    query_ptr, keys_ptr, address_ptr, pool_ptr, length_ptr, group_ptr, chosen_ptr, score_ptr,
    queries, most, num_groups, stride_p, stride_n, head_dim,
    E: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Scores of the keys of chosen groups, reading those alone: ROWS candidates of one query."""
    row = tl.program_id(0).to(tl.int64)
    c, e = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    candidates = tl.load(chosen_ptr + row) * GROUP
    if tl.program_id(1) * ROWS < candidates:
        x = row // queries
        query = tl.load(query_ptr + row * head_dim + e, mask=e < head_dim, other=0.0).to(tl.float32)
        group = tl.load(group_ptr + row * WIDTH + c // GROUP, mask=c < candidates, other=0)
        n = _keys_of(group, c % GROUP, GROUP)
        is_key = (c < candidates) & (n < _length(length_ptr, x, most))
        keys = pool_at(keys_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED)
        key = tl.load(
            keys + n.to(tl.int64)[:, None] * stride_n + e[None, :],
            mask=is_key[:, None] & (e < head_dim)[None, :],
            other=0.0,
        )
        tl.store(score_ptr + row * (WIDTH * GROUP) + c, tl.sum(key.to(tl.float32) * query[None, :], axis=1))


@triton.jit
def _rank_keys(
    candidate_ptr, group_ptr, chosen_ptr, length_ptr, score_ptr, index_ptr, queries, most,
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
    real = (c < candidates) & (index < _length(length_ptr, query_row // queries, most)) & (score > float("-inf"))

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
