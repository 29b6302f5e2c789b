"""Top-k search that never keeps a score a key: exact, or exact among the groups that a copy in int8 finds promising.

X searches, Q queries, P pools of N keys, E head size, R retrieved; L tiles of 128 keys, M groups of keys in them,
S parts of a pool, C slots for what is chosen or for its keys; D numbers of a code.

The R best keys lie in the R groups of keys whose best is best. So a search streams the keys past a block of queries
and keeps the best score of each group; chooses the R best groups of a query; scores the keys of those again; and ranks
them. Where a query's groups hold few of all keys, those keys are read again by themselves; and where there are more
groups than can be chosen from at once, the R best tiles are chosen first, since they hold the R best groups. Otherwise
all keys are streamed once more, which costs what the first pass did and writes only what was chosen. A chosen group has
its own slot to write to, without atomics: the result is exact however scores are distributed, and the same every time.

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
# A query's maxima are held in registers: of more groups the best tiles are chosen first, of more tiles in parts.
MOST_GROUPS = 4096
MOST_TILES = 8192
# Groups of a query that are scored again, at most; and keys of those that are ranked. Slots fit eight bits.
WIDTH = tl.constexpr(128)
# The same where groups are chosen by codes: more of them, and to spare, since telling the last apart takes longest.
CODED_WIDTH = tl.constexpr(256)
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
    best_XQM, tile_XQL = keys.maxima()
    if keys.few or 2 * top_k * keys.group * keys.queries <= keys.most:
        return keys.rank_groups(*keys.choose(best_XQM, tile_XQL, top_k, WIDTH.value), top_k)
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
    group_XQC, chosen_XQ = codes.choose(*codes.maxima(), 2 * top_k, CODED_WIDTH.value)
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
        least_parts: into which what is chosen from is divided, at least.
    """

    query_XQE: Tensor
    source: Source
    length_X: Tensor | None
    pool_X: Tensor | None
    most: int
    group: int
    least_parts: int

    @classmethod
    def of(
        cls, query_XQE: Tensor, keys_PNE: Tensor | Pools, length_X: Tensor | None, pool_X: Tensor | None, parts: int
    ) -> _Keys:
        assert length_X is not None or not isinstance(keys_PNE, Pools)
        length_X = None if length_X is None else length_X.contiguous()
        pool_X = None if pool_X is None else pool_X.contiguous()
        most = keys_PNE.shape[1]
        group = 8 if most <= 8 * MOST_GROUPS else 16
        return cls(query_XQE.contiguous(), Source.of(keys_PNE), length_X, pool_X, most, group, parts)

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
    def tiles(self) -> int:
        return triton.cdiv(self.most, TILE.value)

    def parts(self, most_tiles: int) -> tuple[int, int]:
        """Tiles of a part, and parts, so that none has more than so many."""
        part_tiles = min(triton.cdiv(self.tiles, self.least_parts), most_tiles)
        return part_tiles, triton.cdiv(self.tiles, part_tiles)

    @property
    def group_parts(self) -> tuple[int, int]:
        """`parts` whose groups are chosen from at once."""
        return self.parts(MOST_GROUPS * self.group // TILE.value)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty tensor (X, Q, …)."""
        return torch.empty(*self.query_XQE.shape[:2], *shape, dtype=dtype, device=self.query_XQE.device)

    @property
    def _where(self) -> tuple[Any, ...]:
        return self.query_XQE, self.source.rows, self.source.address_P, self.pool_X, self.length_X

    @property
    def _shape(self) -> tuple[int, ...]:
        groups = self.tiles * TILE.value // self.group
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

    @property
    def _key_bytes(self) -> int:
        return self._constants["E"] * self.source.rows.element_size()

    @property
    def _precision(self) -> str:
        return "ieee" if self.source.rows.dtype == torch.float32 else "tf32"

    def _streaming(self) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
        """Grid, keys of a program and settings of a kernel that all keys stream through, past many queries."""
        searches, block = self.query_XQE.shape[0], 128
        blocks = triton.cdiv(self.queries, block)
        # Several times the programs that run at once (two on a multiprocessor), so that the last ones leave little
        # idle; each with enough tiles to be worth its start.
        programs = 16 * _processors(self.query_XQE.device)
        chunk_tiles = max(8, triton.cdiv(self.tiles, triton.cdiv(programs, searches * blocks)))
        # As many tiles at once as let two programs share a multiprocessor's memory.
        settings = {
            "BQ": block,
            "PRECISION": self._precision,
            "num_warps": 8,
            "num_stages": 4 if self._key_bytes <= 128 else 3 if self._key_bytes <= 256 else 2,
        }
        return (blocks, searches, triton.cdiv(self.tiles, chunk_tiles)), chunk_tiles * TILE.value, settings

    def _streaming_few(self) -> tuple[tuple[int, int], int, dict[str, Any]]:
        """The same past few queries. A program is one warp, so that nothing is passed between warps; some ten run on a
        multiprocessor."""
        searches, at_once = self.query_XQE.shape[0], 2 if self._key_bytes <= 64 else 1
        programs = 32 * _processors(self.query_XQE.device)
        chunk_tiles = at_once * triton.cdiv(max(16, triton.cdiv(self.tiles, triton.cdiv(programs, searches))), at_once)
        settings = {
            "BQ": 8 if self.queries <= 8 else FEW,
            "TILES": at_once,
            "PRECISION": self._precision,
            "num_warps": 1,
            "num_stages": 4 if self._key_bytes <= 128 else 3 if self._key_bytes <= 512 else 2,
        }
        return (triton.cdiv(self.tiles, chunk_tiles), searches), chunk_tiles * TILE.value, settings

    def maxima(self) -> tuple[Tensor, Tensor | None]:
        """Best score of each group, (X, Q, M), and of each tile, (X, Q, L), where there are too many groups to choose
        from at once. What lies beyond a search's keys is undefined."""
        best_XQM = self.new(self._shape[2])
        best_XQL = self.new(self.tiles) if self.group_parts[1] > 1 else None
        grid, chunk_keys, settings = self._streaming_few() if self.few else self._streaming()
        kernel = _few_maxima if self.few else _group_maxima
        kernel[grid](
            *self._where, best_XQM, best_XQL, *self._shape, self.tiles, chunk_keys, **self._constants, **settings
        )  # fmt: skip
        return best_XQM, best_XQL

    def choose(self, best_XQM: Tensor, best_XQL: Tensor | None, count: int, width: int) -> tuple[Tensor, Tensor]:
        """The `count` best groups of each query and, where that is cheaper than telling them apart, up to half as many
        more, at most `width`: (X, Q, C), and how many (X, Q)."""
        if best_XQL is None:
            group_XQSC, chosen_XQS = self._choose_in_parts(best_XQM, self.group, *self.group_parts, count, width)
            return group_XQSC[:, :, 0], chosen_XQS[:, :, 0]
        # Tiles, in parts; tiles that were chosen in some parts again, until that is one part; and groups of those.
        part_tiles, parts = self.parts(MOST_TILES)
        value_XQSC = self.new(parts, width)
        chosen = self._choose_in_parts(
            best_XQL, TILE.value, part_tiles, parts, count, width, value_XQSC=value_XQSC, within_XQM=best_XQM
        )
        while parts > 1:
            inputs = value_XQSC, *chosen
            at_once = min(max(2, MOST_TILES // width), triton.next_power_of_2(parts))
            left = triton.cdiv(parts, at_once)
            value_XQSC, *chosen = (self.new(left, *old.shape[3:], dtype=old.dtype) for old in inputs)
            _choose_again[(self.rows, left)](
                *inputs, value_XQSC, *chosen, best_XQM if left == 1 else None, parts, best_XQM.shape[2],
                GROUP=self.group, M=at_once * width, R=count, W=width, num_warps=self._warps(at_once * width),
            )  # fmt: skip
            parts = left
        index_XQSC, chosen_XQS = chosen
        return index_XQSC[:, :, 0], chosen_XQS[:, :, 0]

    def _choose_in_parts(
        self,
        best_XQM: Tensor,
        keys: int,
        part_tiles: int,
        parts: int,
        count: int,
        width: int,
        *,
        value_XQSC: Tensor | None = None,
        slot_XQM: Tensor | None = None,
        within_XQM: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best groups or tiles, of so many keys each, of each part: (X, Q, S, C), and how many. If that is one
        part of tiles, the best groups `within_XQM` the best tiles."""
        index_XQSC = self.new(parts, width, dtype=torch.int32)
        chosen_XQS = self.new(parts, dtype=torch.int32)
        most = triton.next_power_of_2(part_tiles * TILE.value // keys)
        within_XQM = within_XQM if parts == 1 else None
        _choose[(self.rows, parts)](
            best_XQM, self.length_X, slot_XQM, value_XQSC, index_XQSC, chosen_XQS, within_XQM,
            self.queries, self.most, best_XQM.shape[2], part_tiles * TILE.value // keys,
            0 if within_XQM is None else within_XQM.shape[2],
            KEYS=keys, GROUP=self.group, M=most, R=count, W=width, num_warps=self._warps(most),
        )  # fmt: skip
        return index_XQSC, chosen_XQS

    def _warps(self, width: int) -> int:
        """Warps that choose from so many: many where few programs run, whose instructions count."""
        return max(1, min(16, width // 256) if self.rows <= 512 else min(4, width // 512))

    def rank_groups(self, group_XQC: Tensor, chosen_XQ: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The best keys of some groups, which are read again: indices and scores (X, Q, R)."""
        width = group_XQC.shape[2]
        score_XQC = self.new(width * self.group)
        _score_chosen[(self.rows, width * self.group // ROWS.value)](
            *self._where, group_XQC, chosen_XQ, score_XQC, *self._shape, **self._constants, W=width, num_warps=4
        )
        return self._rank(score_XQC, group_XQC, chosen_XQ, 1, top_k)

    def rank_all(self, best_XQM: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The best keys of the best groups, all keys being streamed again: indices and scores (X, Q, R)."""
        # Which slot of a query's candidates a group was given; −1 if it was not chosen.
        slot_XQM = self.new(best_XQM.shape[2], dtype=torch.int8)
        part_tiles, parts = self.group_parts
        group_XQSC, chosen_XQS = self._choose_in_parts(
            best_XQM, self.group, part_tiles, parts, top_k, WIDTH.value, slot_XQM=slot_XQM
        )
        score_XQSC = self.new(parts, WIDTH.value * self.group)
        grid, chunk_keys, settings = self._streaming()
        _score_all[grid](
            *self._where, slot_XQM, score_XQSC, *self._shape, chunk_keys, part_tiles * TILE.value, parts,
            **self._constants, **settings, maxnreg=128,
        )  # fmt: skip
        index_XQSR, score_XQSR = self._rank(score_XQSC, group_XQSC, chosen_XQS, parts, top_k)
        if parts == 1:
            return index_XQSR, score_XQSR
        score_XQR, among_XQR = score_XQSR.topk(top_k, dim=-1)
        return index_XQSR.gather(-1, among_XQR), score_XQR

    def _rank(
        self, score_XQSC: Tensor, group_XQSC: Tensor, chosen_XQS: Tensor, parts: int, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """The best keys of each part, one part after the other: (X, Q, S · R)."""
        index_XQR = self.new(parts * top_k, dtype=torch.int64)
        score_XQR = self.new(parts * top_k)
        few = self.rows <= 512
        _rank_keys[(self.rows, parts)](
            score_XQSC, group_XQSC, chosen_XQS, self.length_X, score_XQR, index_XQR, self.queries, self.most,
            GROUP=self.group, R=top_k, W=group_XQSC.shape[-1], AT_ONCE=WIDTH.value if few else 16,
            num_warps=8 if few else 4,
        )  # fmt: skip
        return index_XQR, score_XQR


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
def _product(left, right, PRECISION: tl.constexpr):
    """Scores, int32 of codes and float32 of others."""
    if left.dtype == tl.int8:
        score = tl.dot(left, right, out_dtype=tl.int32)
    else:
        score = tl.dot(left, right, input_precision=PRECISION)
    return score


@triton.jit
def _few_maxima(
    query_ptr, keys_ptr, address_ptr, pool_ptr, length_ptr, best_ptr, tile_ptr,
    queries, most, num_groups, stride_p, stride_n, head_dim, num_tiles, chunk_keys,
    E: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, BQ: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_group_maxima`, for few queries: one warp, which holds all keys of a group in the same thread."""
    x, first = tl.program_id(1), tl.program_id(0) * chunk_keys
    q, e, k = tl.arange(0, BQ), tl.arange(0, E), tl.arange(0, TILES * TILE)
    query_EQ = tl.load(
        query_ptr + (x * queries + q)[None, :].to(tl.int64) * head_dim + e[:, None],
        mask=(q < queries)[None, :] & (e < head_dim)[:, None],
        other=0,
    )
    there = tl.minimum(first + chunk_keys, _length(length_ptr, x, most))
    keys = pool_at(keys_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED)
    row = (x * queries + q).to(tl.int64)
    whole = first + tl.maximum(there - first, 0) // (TILES * TILE) * (TILES * TILE)
    for start in range(first, whole, TILES * TILE):
        n = (start + k).to(tl.int64)
        key_NE = tl.load(keys + n[:, None] * stride_n + e[None, :], mask=(e < head_dim)[None, :], other=0)
        score_NQ = _product(key_NE, query_EQ, PRECISION)
        _store_few(score_NQ, row, q < queries, start, best_ptr, tile_ptr, num_groups, num_tiles, GROUP, TILES, BQ)
    if whole < there:
        n = whole + k
        key_NE = tl.load(
            keys + n[:, None].to(tl.int64) * stride_n + e[None, :],
            mask=(n < there)[:, None] & (e < head_dim)[None, :],
            other=0,
        )
        score_NQ = tl.where((n < there)[:, None], _product(key_NE, query_EQ, PRECISION).to(tl.float32), float("-inf"))
        _store_few(score_NQ, row, q < queries, whole, best_ptr, tile_ptr, num_groups, num_tiles, GROUP, TILES, BQ)


@triton.jit
def _store_few(
    score_NQ, row, wanted, start, best_ptr, tile_ptr, num_groups, num_tiles,
    GROUP: tl.constexpr, TILES: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Maxima of groups and tiles from `start` on."""
    EACH: tl.constexpr = TILE // GROUP
    best = tl.max(tl.reshape(score_NQ, (TILES, GROUP, EACH, BQ)), axis=1)
    group = start // GROUP + tl.arange(0, TILES * EACH)
    tl.store(
        best_ptr + row[None, :] * num_groups + group[:, None],
        tl.reshape(best, (TILES * EACH, BQ)).to(tl.float32),
        mask=wanted[None, :] & (group < num_groups)[:, None],
    )
    if tile_ptr is not None:
        tile = start // TILE + tl.arange(0, TILES)
        tl.store(
            tile_ptr + row[None, :] * num_tiles + tile[:, None],
            tl.max(best, axis=1).to(tl.float32),
            mask=wanted[None, :] & (tile < num_tiles)[:, None],
        )


@triton.jit
def _group_maxima(
    query_ptr, keys_ptr, address_ptr, pool_ptr, length_ptr, best_ptr, tile_ptr,
    queries, most, num_groups, stride_p, stride_n, head_dim, num_tiles, chunk_keys,
    E: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Best score of each group. Group g of a tile holds its keys g, g + TILE / GROUP, g + 2 · TILE / GROUP, …"""
    x, first = tl.program_id(1), tl.program_id(2) * chunk_keys
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    e, tile, g = tl.arange(0, E), tl.arange(0, TILE), tl.arange(0, TILE // GROUP)
    query = _block_of_queries(query_ptr, x, q, queries, head_dim, E)
    there = tl.minimum(first + chunk_keys, _length(length_ptr, x, most))
    keys = pool_at(keys_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED)
    row = (x * queries + q).to(tl.int64)
    at = best_ptr + row[:, None] * num_groups + g[None, :]
    whole = first + tl.maximum(there - first, 0) // TILE * TILE
    for start in range(first, whole, TILE):
        n = (start + tile).to(tl.int64)
        key = tl.load(keys + n[None, :] * stride_n + e[:, None], mask=(e < head_dim)[:, None], other=0)
        score = _product(query, key, PRECISION).to(tl.float32)
        best = tl.max(tl.reshape(score, (BQ, GROUP, TILE // GROUP)), axis=1)
        tl.store(at + start // GROUP, best, mask=(q < queries)[:, None])
        if tile_ptr is not None:
            tl.store(tile_ptr + row * num_tiles + start // TILE, tl.max(best, axis=1), mask=q < queries)
    if whole < there:
        n = whole + tile
        key = tl.load(
            keys + n[None, :].to(tl.int64) * stride_n + e[:, None],
            mask=(n < there)[None, :] & (e < head_dim)[:, None],
            other=0,
        )
        score = tl.where((n < there)[None, :], _product(query, key, PRECISION).to(tl.float32), float("-inf"))
        best = tl.max(tl.reshape(score, (BQ, GROUP, TILE // GROUP)), axis=1)
        tl.store(at + whole // GROUP, best, mask=(q < queries)[:, None])
        if tile_ptr is not None:
            tl.store(tile_ptr + row * num_tiles + whole // TILE, tl.max(best, axis=1), mask=q < queries)


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
def _best_places(best, R: tl.constexpr, W: tl.constexpr):
    """A place below W for each of the R best values, perhaps for half as many more; −1 for others. And how many."""
    real = best > float("-inf")
    wanted = tl.minimum(R, tl.sum(real.to(tl.int32), axis=0))
    low, high = _bracket(best, real, wanted, tl.minimum(W, wanted + wanted // 2))
    place, chosen = _place(best, real, low, high)
    return tl.where(place < W, place, -1), tl.minimum(W, chosen)


@triton.jit
def _choose(
    best_ptr, length_ptr, slot_ptr, value_ptr, index_ptr, chosen_ptr, within_ptr,
    queries, most, num, part_num, num_groups,
    KEYS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The R best groups, or tiles, of a query in a part and, where that is cheaper than telling them apart, half as
    many more. Those that tie are taken from the front. They hold KEYS keys each."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles = (_length(length_ptr, row // queries, most) + TILE - 1) // TILE
    m = part * part_num + tl.arange(0, M)
    there = m < tl.minimum(tiles * (TILE // KEYS), (part + 1) * part_num)
    best = tl.load(best_ptr + row * num + m, mask=there, other=float("-inf"))
    place, chosen = _best_places(best, R, W)
    if slot_ptr is not None:
        tl.store(slot_ptr + row * num + m, place.to(tl.int8), mask=there)
    at = row * tl.num_programs(1) + part
    tl.store(index_ptr + at * W + place, m, mask=place >= 0)
    if value_ptr is not None:
        tl.store(value_ptr + at * W + place, best, mask=place >= 0)
    if within_ptr is None:
        tl.store(chosen_ptr + at, chosen)
    else:
        _choose_within(within_ptr + row * num_groups, index_ptr + at * W, chosen_ptr + at, chosen, GROUP, R, W)


@triton.jit
def _choose_again(
    value_ptr, index_ptr, chosen_ptr, to_value_ptr, to_index_ptr, to_chosen_ptr, within_ptr, parts, num_groups,
    GROUP: tl.constexpr, M: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """As `_choose`, of tiles that were chosen in M / W parts."""
    row, left = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m = tl.arange(0, M)
    part = left * (M // W) + m // W
    held = tl.load(chosen_ptr + row * parts + part, mask=part < parts, other=0)
    at, there = (row * parts + part) * W + m % W, m % W < held
    best = tl.load(value_ptr + at, mask=there, other=float("-inf"))
    index = tl.load(index_ptr + at, mask=there, other=0)
    place, chosen = _best_places(best, R, W)
    at = row * tl.num_programs(1) + left
    tl.store(to_index_ptr + at * W + place, index, mask=place >= 0)
    tl.store(to_value_ptr + at * W + place, best, mask=place >= 0)
    if within_ptr is None:
        tl.store(to_chosen_ptr + at, chosen)
    else:
        _choose_within(within_ptr + row * num_groups, to_index_ptr + at * W, to_chosen_ptr + at, chosen, GROUP, R, W)


@triton.jit
def _choose_within(
    best_ptr, index_ptr, chosen_ptr, tiles, GROUP: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """The R best groups of a query's chosen tiles, which `index_ptr` holds, take their place."""
    EACH: tl.constexpr = TILE // GROUP
    c = tl.arange(0, W * EACH)
    tl.debug_barrier()
    tile = tl.load(index_ptr + c // EACH, mask=c < tiles * EACH, other=0)
    group = tile * EACH + c % EACH
    best = tl.load(best_ptr + group, mask=c < tiles * EACH, other=float("-inf"))
    place, chosen = _best_places(best, R, W)
    # All have read which tiles there are.
    tl.debug_barrier()
    tl.store(index_ptr + place, group, mask=place >= 0)
    tl.store(chosen_ptr, chosen)


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
        score = _product(query, key, PRECISION).to(tl.float32)
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
    E: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Scores of the keys of chosen groups, reading those alone: ROWS candidates of one query."""
    row = tl.program_id(0).to(tl.int64)
    c, e = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    candidates = tl.load(chosen_ptr + row) * GROUP
    if tl.program_id(1) * ROWS < candidates:
        x = row // queries
        query = tl.load(query_ptr + row * head_dim + e, mask=e < head_dim, other=0.0).to(tl.float32)
        group = tl.load(group_ptr + row * W + c // GROUP, mask=c < candidates, other=0)
        n = _keys_of(group, c % GROUP, GROUP)
        is_key = (c < candidates) & (n < _length(length_ptr, x, most))
        keys = pool_at(keys_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED)
        key = tl.load(
            keys + n.to(tl.int64)[:, None] * stride_n + e[None, :],
            mask=is_key[:, None] & (e < head_dim)[None, :],
            other=0.0,
        )
        tl.store(score_ptr + row * (W * GROUP) + c, tl.sum(key.to(tl.float32) * query[None, :], axis=1))


@triton.jit
def _rank_keys(
    candidate_ptr, group_ptr, chosen_ptr, length_ptr, score_ptr, index_ptr, queries, most,
    GROUP: tl.constexpr, R: tl.constexpr, W: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The R best candidates of a query in a part, best first; of those that tie, the one that lies first."""
    query_row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = query_row * tl.num_programs(1) + part
    w, c = tl.arange(0, WIDTH), tl.arange(0, W * GROUP)
    candidates = tl.load(chosen_ptr + row) * GROUP
    at = candidate_ptr + row * (W * GROUP)
    score = tl.load(at + c, mask=c < candidates, other=float("-inf"))
    group = tl.load(group_ptr + row * W + c // GROUP, mask=c < candidates, other=0)
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
    better = tl.zeros((WIDTH, AT_ONCE), tl.int32)
    for start in range(0, held, AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)
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
