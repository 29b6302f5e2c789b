"""Keys in lists of what is alike, so that a search reads a few lists instead of all keys.

P pools of N keys, L lists each, M places of keys in lists, S numbers of a code, E head size; Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longmem.ops.pools import Pools

# Keys of a tile: what a kernel reads at a time. A list is whole tiles, the last of them filled up with no keys.
TILE = 128
# Queries of a search that are asked at once, at most; and lists of a pool, which are chosen from at once.
AT_ONCE = 16
MOST_LISTS = 1 << 14


@dataclass(frozen=True)
class Lists:
    """The first N keys of P pools, each as S numbers of eight bits, in lists.

    The product of a query's code with a key's, in the query's unit, is q·k but for q·centre and rounding.

    Attributes:
        centre_PE: float32, what was subtracted from keys before they were coded.
        coder_PES: float32; a query times its matrix is what is rounded to the query's code (`ops.code_queries`).
        centroid_PLS: int8, what stands for a list where lists are chosen, coded as keys are. Lists may be empty.
        first_PL1: int32, the tile that each list begins with, and behind the last list the number of tiles.
        codes: (M, S) int8, list after list.
        rows: (M, 1) int32, which of the pool's keys lies at a place; −1 is none.
        reads_P: int32, tiles that a query of each pool reads: lists in the order of their centroids' scores, whole,
            until there are so many. Lists that tie with the last one are read as well.
        known: N.
        tiles: tiles of the largest pool.
    """

    centre_PE: Tensor
    coder_PES: Tensor
    centroid_PLS: Tensor
    first_PL1: Tensor
    codes: Pools
    rows: Pools
    reads_P: Tensor
    known: int
    tiles: int


__all__ = ["AT_ONCE", "MOST_LISTS", "TILE", "Lists"]
