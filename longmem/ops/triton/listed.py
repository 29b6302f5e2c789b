"""Top-k search that reads the lists of keys that look best for a query, and no others.

X searches, Q queries, P pools of N keys, E head size, R retrieved; L lists, S numbers of a code; T tiles of 128 keys,
M groups of 8 or 16 keys in them, C slots for what is chosen.

Which lists a query reads is known on the device alone. So there is a place for the best score of every tile of a
search, those of its lists and behind them those of keys that came later than the lists; what is not read scores −∞.
One kernel streams the codes of the lists that any query of a search has chosen, once, past all of its queries, and
keeps the best score of each tile and of each group of keys in it; the R best groups lie in the R best tiles. From there
on it is as in `search.py`: the best tiles are chosen, then the best groups in them, and their keys are read, scored and
ranked. Every result has a place of its own, without atomics, so it is the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem.ops.lists import AT_ONCE, Lists
from longmem.ops.pools import Pools
from longmem.ops.triton.coding import code_queries
from longmem.ops.triton.rows import Source, pool_at, pool_of
from longmem.ops.triton.search import MOST, TILE, _bracket, _keys_of, _length, _place

# Tiles that are chosen from at once; more are chosen from in parts, as many as can be chosen from at once in the end.
MOST_TILES = 8192
MOST_PARTS = 32
# Tiles, or groups of keys, of a query that are chosen, at most: more than have to be, since telling the last apart
# takes longest; and keys of those that are ranked.
WIDTH = tl.constexpr(256)
RANKED = tl.constexpr(128)
# Up to so many keys lie in groups of 8.
FEW_KEYS = 1 << 15
# Keys that are read again at a time.
ROWS = tl.constexpr(64)
# Lists that a program looks at, and tiles of later keys that it streams.
AT_A_TIME = tl.constexpr(8)


def topk_listed(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    lists: Lists,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `longmem.ops.reference.topk_listed`, but for a few groups more that may be looked at.

    Raises:
        ValueError: more queries than may be asked at once, or `top_k` is more than `MOST`.
    """
    searches, queries, _ = query_XQE.shape
    if top_k > MOST or queries > AT_ONCE:
        raise ValueError(f"top_k is {top_k} of {queries} queries, expected at most {MOST} of {AT_ONCE}")
    if not searches or not queries:
        index_XQR = torch.zeros(searches, queries, top_k, dtype=torch.int64, device=query_XQE.device)
        return index_XQR, torch.full(index_XQR.shape, -torch.inf, device=query_XQE.device)
    search = _Search.of(query_XQE, keys_PNE, lists, length_X, pool_X)
    best_XQT, best_XQM = search.maxima()
    return search.rank(*search.choose(best_XQT, best_XQM, 2 * top_k), top_k)


@dataclass(frozen=True)
class _Search:
    """Searches as the kernels take them.

    Attributes:
        query_XQE: contiguous, in the keys' precision.
        code_XQS, unit_XQ: what stands for the queries, as `code_queries` gives them.
        keys: the bank's keys.
        length_X, pool_X: contiguous, or None.
        most: keys of the largest pool.
        group: keys of a group. Small groups leave less to score again, but there are more of them to choose from.
    """

    query_XQE: Tensor
    code_XQS: Tensor
    unit_XQ: Tensor
    keys: Source
    length_X: Tensor | None
    pool_X: Tensor | None
    lists: Lists
    most: int
    group: int

    @classmethod
    def of(
        cls,
        query_XQE: Tensor,
        keys_PNE: Tensor | Pools,
        lists: Lists,
        length_X: Tensor | None,
        pool_X: Tensor | None,
    ) -> _Search:
        coder_XES = lists.coder_PES if pool_X is None else lists.coder_PES[pool_X]
        length_X = None if length_X is None else length_X.contiguous()
        pool_X = None if pool_X is None else pool_X.contiguous()
        group = 8 if keys_PNE.shape[1] <= FEW_KEYS else 16
        return cls(
            query_XQE.to(keys_PNE.dtype).contiguous(), *code_queries(query_XQE, coder_XES), Source.of(keys_PNE),
            length_X, pool_X, lists, keys_PNE.shape[1], group,
        )  # fmt: skip

    @property
    def searches(self) -> int:
        return self.query_XQE.shape[0]

    @property
    def queries(self) -> int:
        return self.query_XQE.shape[1]

    @property
    def rows(self) -> int:
        """Queries of all searches."""
        return self.searches * self.queries

    @property
    def late_tiles(self) -> int:
        """Tiles of later keys that there may be, as many as let rows of maxima begin at multiples of 64 bytes."""
        return triton.cdiv(max(0, self.most - self.lists.known), 16 * TILE.value) * 16

    @property
    def tiles(self) -> int:
        """T."""
        return self.lists.tiles + self.late_tiles

    @property
    def _head(self) -> dict[str, int]:
        """E and the block of queries."""
        head_dim = self.query_XQE.shape[2]
        return {"E": max(16, triton.next_power_of_2(head_dim)), "BQ": 8 if self.queries <= 8 else AT_ONCE}

    @property
    def _size(self) -> int:
        """S as products need it."""
        return max(32, triton.next_power_of_2(self.code_XQS.shape[2]))

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.searches, *shape, dtype=dtype, device=self.query_XQE.device)

    def maxima(self) -> tuple[Tensor, Tensor]:
        """Best score of each tile (X, Q, T) and of each group of keys (X, Q, M); of tiles that are not read −∞, and of
        groups in them undefined."""
        lists, queries, num_lists = self.lists, self.queries, self.lists.centroid_PLS.shape[1]
        size = self.code_XQS.shape[2]
        best_XQT = self.new(queries, self.tiles)
        best_XQM = self.new(queries, self.tiles * TILE.value // self.group)
        score_XQL = self.new(queries, num_lists, dtype=torch.int32)
        _score_lists[(triton.cdiv(num_lists, TILE.value), self.searches)](
            self.code_XQS, lists.centroid_PLS, lists.first_PL1, self.pool_X, score_XQL, best_XQT,
            queries, num_lists, lists.tiles, self.tiles, size, S=self._size, BQ=self._head["BQ"], num_warps=4,
        )  # fmt: skip
        least_XQ = self.new(queries, dtype=torch.int32)
        width = triton.next_power_of_2(num_lists)
        _least_score[(self.rows,)](
            score_XQL, lists.first_PL1, lists.reads_P, self.pool_X, least_XQ, queries, num_lists,
            M=width, num_warps=_warps(width),
        )  # fmt: skip
        _list_maxima[(triton.cdiv(num_lists, AT_A_TIME.value), self.searches)](
            self.query_XQE, self.code_XQS, self.unit_XQ, lists.centre_PE, lists.codes.address_P.view(torch.int8),
            lists.codes.address_P, self._rows, lists.rows.address_P, self.pool_X, score_XQL, least_XQ, lists.first_PL1,
            best_XQT, best_XQM, queries, num_lists, self.tiles, size, self.query_XQE.shape[2],
            S=self._size, GROUP=self.group, ALIGNED=size % 16 == 0, **self._head, num_warps=1, num_stages=4,
        )  # fmt: skip
        if self.late_tiles:
            _late_maxima[(triton.cdiv(self.late_tiles, AT_A_TIME.value), self.searches)](
                *self._where, best_XQT, best_XQM, queries, self.most, lists.known, lists.tiles, self.tiles,
                *self._strides, GROUP=self.group, PRECISION="ieee" if self.keys.rows.dtype == torch.float32 else "tf32",
                ALIGNED=self.keys.aligned, **self._head, num_warps=4, num_stages=3,
            )  # fmt: skip
        return best_XQT, best_XQM

    def choose(self, best_XQT: Tensor, best_XQM: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` best groups of each query, and some more where that is cheaper than telling them apart:
        (X, Q, C), and how many (X, Q)."""
        part_tiles = min(MOST_TILES, triton.next_power_of_2(self.tiles))
        while (parts := triton.cdiv(self.tiles, part_tiles)) > MOST_PARTS:
            part_tiles *= 2
        chosen: tuple[Tensor | None, ...] = (None, None, None)
        width = part_tiles
        if parts > 1:
            chosen = (
                self.new(self.queries, parts, WIDTH.value),
                self.new(self.queries, parts, WIDTH.value, dtype=torch.int32),
                self.new(self.queries, parts, dtype=torch.int32),
            )
            _best_tiles[(self.rows, parts)](
                best_XQT, *chosen, self.tiles, M=part_tiles, COUNT=count, num_warps=_warps(part_tiles)
            )  # fmt: skip
            width = triton.next_power_of_2(parts) * WIDTH.value
        tile_XQC = self.new(self.queries, WIDTH.value, dtype=torch.int32)
        group_XQC = torch.empty_like(tile_XQC)
        chosen_XQ = self.new(self.queries, dtype=torch.int32)
        _best_groups[(self.rows,)](
            best_XQT, *chosen, best_XQM, tile_XQC, group_XQC, chosen_XQ, parts, self.tiles,
            GROUP=self.group, M=width, COUNT=count,
            num_warps=_warps(max(width, WIDTH.value * TILE.value // self.group)),
        )  # fmt: skip
        return group_XQC, chosen_XQ

    def rank(self, group_XQC: Tensor, chosen_XQ: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The best keys of some groups: indices and scores (X, Q, R)."""
        candidates = WIDTH.value * self.group
        score_XQC = self.new(self.queries, candidates)
        row_XQC = self.new(self.queries, candidates, dtype=torch.int32)
        _score_chosen[(self.rows, candidates // ROWS.value)](
            *self._where, self._rows, self.lists.rows.address_P, group_XQC, chosen_XQ, score_XQC, row_XQC,
            self.queries, self.most, self.lists.known, self.lists.tiles, *self._strides,
            GROUP=self.group, ALIGNED=self.keys.aligned, E=self._head["E"], num_warps=4,
        )  # fmt: skip
        index_XQR = self.new(self.queries, top_k, dtype=torch.int64)
        score_XQR = self.new(self.queries, top_k)
        _rank[(self.rows,)](
            score_XQC, row_XQC, chosen_XQ, score_XQR, index_XQR, GROUP=self.group, R=top_k, num_warps=8
        )  # fmt: skip
        return index_XQR, score_XQR

    @property
    def _rows(self) -> Tensor:
        return self.lists.rows.address_P.view(torch.int32)

    @property
    def _where(self) -> tuple[Any, ...]:
        return self.query_XQE, self.keys.rows, self.keys.address_P, self.pool_X, self.length_X

    @property
    def _strides(self) -> tuple[int, ...]:
        return self.keys.stride_p, self.keys.stride_n, self.query_XQE.shape[2]


def _warps(width: int) -> int:
    return max(1, min(16, width // 512))


@triton.jit
def _queries_of(query_ptr, x, q, queries, size, S: tl.constexpr):
    """Queries or their codes, (S, BQ)."""
    s = tl.arange(0, S)
    return tl.load(
        query_ptr + (x * queries + q)[None, :].to(tl.int64) * size + s[:, None],
        mask=(q < queries)[None, :] & (s < size)[:, None],
        other=0,
    )


@triton.jit
def _score_lists(
    code_ptr, centroid_ptr, first_ptr, pool_ptr, score_ptr, tile_ptr, queries, num_lists, list_tiles, num_tiles, size,
    S: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Scores of TILE centroids. The tiles of their lists score −∞ until they are read."""
    x, q, s = tl.program_id(1), tl.arange(0, BQ), tl.arange(0, S)
    pool, row = pool_of(pool_ptr, x), (x * queries + q).to(tl.int64)
    code_SQ = _queries_of(code_ptr, x, q, queries, size, S)
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    centroid_NS = tl.load(
        centroid_ptr + (pool * num_lists + n).to(tl.int64)[:, None] * size + s[None, :],
        mask=(n < num_lists)[:, None] & (s < size)[None, :],
        other=0,
    )
    score_NQ = tl.dot(centroid_NS, code_SQ, out_dtype=tl.int32)
    tl.store(
        score_ptr + row[None, :] * num_lists + n[:, None],
        score_NQ,
        mask=(q < queries)[None, :] & (n < num_lists)[:, None],
    )
    first = first_ptr + pool * (num_lists + 1)
    begin = tl.load(first + tl.program_id(0) * TILE)
    end = tl.load(first + tl.minimum(tl.program_id(0) * TILE + TILE, num_lists))
    end = tl.where(tl.program_id(0) == tl.num_programs(0) - 1, list_tiles, end)
    for start in range(begin, end, TILE):
        t = start + tl.arange(0, TILE)
        tl.store(
            tile_ptr + row[None, :] * num_tiles + t[:, None],
            tl.full((TILE, BQ), float("-inf"), tl.float32),
            mask=(q < queries)[None, :] & (t < end)[:, None],
        )


@triton.jit
def _least_score(
    score_ptr, first_ptr, reads_ptr, pool_ptr, least_ptr, queries, num_lists, M: tl.constexpr
):  # fmt: skip
    """Score of the last list that a query reads: the most for which lists that score so much have enough tiles."""
    row = tl.program_id(0)
    pool = pool_of(pool_ptr, row // queries)
    n = tl.arange(0, M)
    score = tl.load(score_ptr + row.to(tl.int64) * num_lists + n, mask=n < num_lists, other=-2147483647)
    first = first_ptr + pool * (num_lists + 1) + n
    tiles = tl.load(first + 1, mask=n < num_lists, other=0) - tl.load(first, mask=n < num_lists, other=0)
    wanted = tl.minimum(tl.load(reads_ptr + pool), tl.sum(tiles, axis=0))
    high = tl.max(score, axis=0) + 1
    low = tl.min(tl.where(n < num_lists, score, high), axis=0)
    # Lists of `low` or more have enough, those of `high` or more have not.
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.sum(tl.where(score >= middle, tiles, 0), axis=0) >= wanted:
            low = middle
        else:
            high = middle
    tl.store(least_ptr + row, low)


@triton.jit
def _later_tiles(length_ptr, x, most, known):
    """Tiles of the keys that came later than the lists."""
    return (tl.maximum(_length(length_ptr, x, most) - known, 0) + TILE - 1) // TILE


@triton.jit
def _store_maxima(
    score_NQ, row, wanted, t, tile_ptr, group_ptr, num_tiles, GROUP: tl.constexpr, BQ: tl.constexpr
):  # fmt: skip
    """Maxima of a tile. Its group g holds its keys g, g + TILE / GROUP, g + 2 · TILE / GROUP, …"""
    EACH: tl.constexpr = TILE // GROUP
    best_GQ = tl.max(tl.reshape(score_NQ, (GROUP, EACH, BQ)), axis=0)
    at = row * num_tiles + t
    tl.store(group_ptr + at[None, :] * EACH + tl.arange(0, EACH)[:, None], best_GQ, mask=wanted[None, :])
    tl.store(tile_ptr + at, tl.max(best_GQ, axis=0), mask=wanted)


@triton.jit
def _list_maxima(
    query_ptr, code_ptr, unit_ptr, centre_ptr, codes_ptr, codes_address_ptr, rows_ptr, rows_address_ptr, pool_ptr,
    score_ptr, least_ptr, first_ptr, tile_ptr, group_ptr, queries, num_lists, num_tiles, size, head_dim,
    E: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Best scores, as codes tell them, of the tiles and groups of those lists that any query of a search reads, of
    AT_A_TIME lists that lie far apart: neighbours may have been one list that was cut."""
    x, q, e, s = tl.program_id(1), tl.arange(0, BQ), tl.arange(0, E), tl.arange(0, S)
    tile, a, wanted = tl.arange(0, TILE), tl.arange(0, AT_A_TIME), q < queries
    pool, row = pool_of(pool_ptr, x), (x * queries + q).to(tl.int64)
    mine = tl.program_id(0) + a * tl.num_programs(0)
    score_AQ = tl.load(
        score_ptr + row[None, :] * num_lists + mine[:, None],
        mask=wanted[None, :] & (mine < num_lists)[:, None],
        other=-2147483648,
    )
    least_Q = tl.load(least_ptr + row, mask=wanted, other=0)
    # Which lists are read, as bits.
    read_A = tl.max((score_AQ >= least_Q[None, :]).to(tl.int32), axis=1)
    read = tl.sum(read_A << a, axis=0)
    if read > 0:
        code_SQ = _queries_of(code_ptr, x, q, queries, size, S)
        query_EQ = _queries_of(query_ptr, x, q, queries, head_dim, E).to(tl.float32)
        centre_E = tl.load(centre_ptr + pool * head_dim + e, mask=e < head_dim, other=0.0)
        shift_Q = tl.sum(query_EQ * centre_E[:, None], axis=0)
        unit_Q = tl.load(unit_ptr + row, mask=wanted, other=0.0)
        codes = pool_at(codes_ptr, codes_address_ptr, pool_ptr, x, 0, ALIGNED)
        rows = pool_at(rows_ptr, rows_address_ptr, pool_ptr, x, 0, True)
        for i in range(AT_A_TIME):
            first = first_ptr + pool * (num_lists + 1) + tl.program_id(0) + i * tl.num_programs(0)
            is_read = (read >> i) % 2 == 1
            begin = tl.load(first, mask=is_read, other=0)
            end = tl.load(first + 1, mask=is_read, other=0)
            for t in range(begin, end):
                n = t * TILE + tile
                at = n.to(tl.int64)
                code_NS = tl.load(codes + at[:, None] * size + s[None, :], mask=(s < size)[None, :], other=0)
                score_NQ = tl.dot(code_NS, code_SQ, out_dtype=tl.int32).to(tl.float32)
                score_NQ = score_NQ * unit_Q[None, :] + shift_Q[None, :]
                # Only the last tile of a list may have places of no key.
                index = tl.load(rows + at, mask=n >= (end - 1) * TILE, other=0)
                score_NQ = tl.where((index >= 0)[:, None], score_NQ, float("-inf"))
                _store_maxima(score_NQ, row, wanted, t, tile_ptr, group_ptr, num_tiles, GROUP, BQ)


@triton.jit
def _late_maxima(
    query_ptr, keys_ptr, address_ptr, pool_ptr, length_ptr, tile_ptr, group_ptr,
    queries, most, known, list_tiles, num_tiles, stride_p, stride_n, head_dim,
    E: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Best scores of the tiles and groups of keys that came later than the lists; of tiles of no keys −∞."""
    x, q, e, tile = tl.program_id(1), tl.arange(0, BQ), tl.arange(0, E), tl.arange(0, TILE)
    wanted, row = q < queries, (x * queries + q).to(tl.int64)
    length = _length(length_ptr, x, most)
    begin = tl.program_id(0) * AT_A_TIME
    t = list_tiles + begin + tl.arange(0, AT_A_TIME)
    tl.store(
        tile_ptr + row[None, :] * num_tiles + t[:, None],
        tl.full((AT_A_TIME, BQ), float("-inf"), tl.float32),
        mask=wanted[None, :] & ((known + (t - list_tiles) * TILE >= length) & (t < num_tiles))[:, None],
    )
    query_EQ = _queries_of(query_ptr, x, q, queries, head_dim, E)
    keys = pool_at(keys_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED)
    late_tiles = (tl.maximum(length - known, 0) + TILE - 1) // TILE
    for t in range(begin, tl.minimum(begin + AT_A_TIME, late_tiles)):
        n = known + t * TILE + tile
        key_NE = tl.load(
            keys + n[:, None].to(tl.int64) * stride_n + e[None, :],
            mask=(n < length)[:, None] & (e < head_dim)[None, :],
            other=0,
        )
        score_NQ = tl.where((n < length)[:, None], tl.dot(key_NE, query_EQ, input_precision=PRECISION), float("-inf"))
        _store_maxima(score_NQ, row, wanted, list_tiles + t, tile_ptr, group_ptr, num_tiles, GROUP, BQ)


@triton.jit
def _best_places(best, COUNT: tl.constexpr):
    """A place below WIDTH for each of the COUNT best values, perhaps for a quarter more; −1 for others. And how
    many."""
    real = best > float("-inf")
    count = tl.minimum(COUNT, tl.sum(real.to(tl.int32), axis=0))
    low, high = _bracket(best, real, count, tl.minimum(WIDTH, count + count // 4))
    place, chosen = _place(best, real, low, high)
    return tl.where(place < WIDTH, place, -1), tl.minimum(WIDTH, chosen)


@triton.jit
def _best_tiles(
    best_ptr, value_ptr, tile_ptr, chosen_ptr, num_tiles, M: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """The best tiles of a query in a part."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, m = row * tl.num_programs(1) + part, part * M + tl.arange(0, M)
    best = tl.load(best_ptr + row * num_tiles + m, mask=m < num_tiles, other=float("-inf"))
    place, chosen = _best_places(best, COUNT)
    tl.store(value_ptr + at * WIDTH + place, best, mask=place >= 0)
    tl.store(tile_ptr + at * WIDTH + place, m, mask=place >= 0)
    tl.store(chosen_ptr + at, chosen)


@triton.jit
def _best_groups(
    best_ptr, value_ptr, part_ptr, held_ptr, group_ptr, tile_ptr, to_ptr, chosen_ptr, parts, num_tiles,
    GROUP: tl.constexpr, M: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The best tiles of a query, of all or of those that were chosen in parts, and the best groups in them."""
    EACH: tl.constexpr = TILE // GROUP
    row, m, c = tl.program_id(0).to(tl.int64), tl.arange(0, M), tl.arange(0, WIDTH * EACH)
    if value_ptr is None:
        tile = m
        best = tl.load(best_ptr + row * num_tiles + m, mask=m < num_tiles, other=float("-inf"))
    else:
        part = m // WIDTH
        held = tl.load(held_ptr + row * parts + part, mask=part < parts, other=0)
        at, there = (row * parts + part) * WIDTH + m % WIDTH, m % WIDTH < held
        best = tl.load(value_ptr + at, mask=there, other=float("-inf"))
        tile = tl.load(part_ptr + at, mask=there, other=0)
    place, chosen = _best_places(best, COUNT)
    tl.store(tile_ptr + row * WIDTH + place, tile, mask=place >= 0)
    tl.debug_barrier()
    there = c < chosen * EACH
    group = tl.load(tile_ptr + row * WIDTH + c // EACH, mask=there, other=0) * EACH + c % EACH
    best = tl.load(group_ptr + row * num_tiles * EACH + group, mask=there, other=float("-inf"))
    place, chosen = _best_places(best, COUNT)
    tl.store(to_ptr + row * WIDTH + place, group, mask=place >= 0)
    tl.store(chosen_ptr + row, chosen)


@triton.jit
def _score_chosen(
    query_ptr, keys_ptr, address_ptr, pool_ptr, length_ptr, rows_ptr, rows_address_ptr, group_ptr, chosen_ptr,
    score_ptr, row_ptr, queries, most, known, list_tiles, stride_p, stride_n, head_dim,
    E: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Scores of the keys of chosen groups, and which keys they are: ROWS candidates of one query."""
    row = tl.program_id(0).to(tl.int64)
    c, e = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    candidates = tl.load(chosen_ptr + row) * GROUP
    if tl.program_id(1) * ROWS < candidates:
        x = row // queries
        query_E = tl.load(query_ptr + row * head_dim + e, mask=e < head_dim, other=0.0).to(tl.float32)
        group = tl.load(group_ptr + row * WIDTH + c // GROUP, mask=c < candidates, other=0)
        # A place in the lists, or behind them.
        n = _keys_of(group, c % GROUP, GROUP)
        is_listed = n < list_tiles * TILE
        rows = pool_at(rows_ptr, rows_address_ptr, pool_ptr, x, 0, True)
        listed = tl.load(rows + n, mask=(c < candidates) & is_listed, other=-1)
        index = tl.where(is_listed, listed, known + n - list_tiles * TILE)
        is_key = (c < candidates) & (index >= 0) & (index < _length(length_ptr, x, most))
        keys = pool_at(keys_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED)
        key_CE = tl.load(
            keys + index.to(tl.int64)[:, None] * stride_n + e[None, :],
            mask=is_key[:, None] & (e < head_dim)[None, :],
            other=0.0,
        )
        score = tl.sum(key_CE.to(tl.float32) * query_E[None, :], axis=1)
        at = row * (WIDTH * GROUP) + c
        tl.store(score_ptr + at, tl.where(is_key, score, float("-inf")))
        tl.store(row_ptr + at, index)


@triton.jit
def _rank(candidate_ptr, row_ptr, chosen_ptr, score_ptr, index_ptr, GROUP: tl.constexpr, R: tl.constexpr):
    """The R best candidates of a query, best first; of those that tie, the one that lies first."""
    row = tl.program_id(0).to(tl.int64)
    r, c = tl.arange(0, RANKED), tl.arange(0, WIDTH * GROUP)
    candidates = tl.load(chosen_ptr + row) * GROUP
    at, index_at = candidate_ptr + row * (WIDTH * GROUP), row_ptr + row * (WIDTH * GROUP)
    score = tl.load(at + c, mask=c < candidates, other=float("-inf"))
    index = tl.load(index_at + c, mask=c < candidates, other=0)
    real = score > float("-inf")
    # Keep at most RANKED of them, where the candidates were: all have been read, or no bracket would be known.
    low, high = _bracket(score, real, tl.minimum(R, tl.sum(real.to(tl.int32), axis=0)), RANKED)
    place, held = _place(score, real, low, high)
    keep = (place >= 0) & (place < RANKED)
    held = tl.minimum(RANKED, held)
    tl.store(at + place, score, mask=keep)
    tl.store(index_at + place, index, mask=keep)
    tl.debug_barrier()

    # A key's rank is the number of better ones.
    score, index = tl.load(at + r, mask=r < held, other=float("-inf")), tl.load(index_at + r, mask=r < held, other=0)
    better = tl.zeros((RANKED, 32), tl.int32)
    for start in range(0, held, 32):
        i = start + tl.arange(0, 32)
        other = tl.load(at + i, mask=i < held, other=float("-inf"))
        other_index = tl.load(index_at + i, mask=i < held, other=0)
        tie = (other[None, :] == score[:, None]) & (other_index[None, :] < index[:, None])
        better += ((other[None, :] > score[:, None]) | tie).to(tl.int32)
    rank = tl.sum(better, axis=1)
    ranked = (r < held) & (rank < R)
    tl.store(score_ptr + row * R + rank, score, mask=ranked)
    tl.store(index_ptr + row * R + rank, index.to(tl.int64), mask=ranked)
    nothing = (r >= held) & (r < R)
    tl.store(score_ptr + row * R + r, tl.full((RANKED,), float("-inf"), tl.float32), mask=nothing)
    tl.store(index_ptr + row * R + r, tl.zeros((RANKED,), tl.int64), mask=nothing)
