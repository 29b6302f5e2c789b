"""An inverted file that is searched where the bank is: on a GPU, for banks too large to be read at every token.

What `longmem.ivf` is for a CPU: the codes of a sketch, ordered by lists of keys that are alike. A query
reads the lists whose centroids it scores highest (`ops.topk_listed`), all in kernels that a recorded step can hold.
How much is read is measured on queries that the bank's own heads asked.

X searches of Q queries, N keys (n of a block), E head size, S coordinates kept, L lists, M places of keys in lists,
R retrieved; T tokens and G queries of each that are asked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longmem.clusters import centroids, nearest
from longmem.errors import ConfigError
from longmem.ops import Lists, Pools, topk_listed, topk_scan
from longmem.ops.lists import AT_ONCE, MOST_LISTS, TILE
from longmem.sketch import MEASURED, Basis, Sketch, recall

_POINTS = 64  # keys of each list that k-means sees
_BLOCK = 1 << 20  # keys put into lists at a time
# A list of more than so many times the usual length is cut, so that none is long to read.
_LONGEST = 4


@dataclass(frozen=True)
class KeyLists:
    """The first N keys of one memory head in lists. A cache: it can be made again from the keys and some queries.

    Attributes:
        basis: where the coordinates come from (X = 1).
        scale_S: a code's unit.
        code_MS: int8, list after list, each in whole tiles.
        row_M: int32, which key a place holds; −1 is none.
        first_L1: int32, the tile that each list begins with, and behind the last list the number of tiles.
        centroid_LS: int8, the middle of each list.
        num_keys: N.
        reads: tiles that a query reads at least: whole lists, until there are so many.
        recall: share of the true nearest keys that are found so, measured with queries that chose nothing; empty if it
            was not measured.
    """

    basis: Basis
    scale_S: Tensor
    code_MS: Tensor
    row_M: Tensor
    first_L1: Tensor
    centroid_LS: Tensor
    num_keys: int
    reads: int
    recall: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Keys."""
        return self.num_keys

    @classmethod
    def choose(
        cls,
        keys_1NE: Tensor,
        query_1QE: Tensor,
        *,
        top_k: int = 64,
        target: float = 0.98,
        size: int = 32,
        together: int = 1,
        num_lists: int | None = None,
        seed: int = 0,
    ) -> KeyLists:
        """Index all keys; what is read is the least that reaches the target recall.

        Args:
            keys_1NE: of one search.
            query_1QE: recorded queries in the order they were asked, some hundreds at least. The first half chooses,
                the second measures.
            top_k: R, what recall is measured at.
            target: recall among the R true nearest, of the queries that choose.
            size: S. Fewer coordinates are faster to read; too few cannot reach the target.
            together: queries that follow each other and are asked at once, each reading what any of them chooses: the
                query heads of a memory head.
            num_lists: `default_lists` of the keys by default.

        Raises:
            ConfigError: there are too few keys or queries, or the target is out of reach with so few coordinates.
        """
        num_lists = num_lists or default_lists(keys_1NE.shape[1])
        if keys_1NE.shape[1] < max(num_lists, top_k) or query_1QE.shape[1] < 2 * together:
            raise ConfigError(
                f"{num_lists} lists were asked for of {keys_1NE.shape[1]} keys and {query_1QE.shape[1]} recorded "
                f"queries, {together} at once; they need at least {max(num_lists, top_k)} keys and {2 * together} "
                "queries. Search a bank so small exactly."
            )
        query_TGE = query_1QE[0, : query_1QE.shape[1] // together * together].unflatten(0, (-1, together)).float()
        middle = -(-len(query_TGE) // 2)
        basis = Basis.fit(keys_1NE, query_TGE[:middle].flatten(0, 1)[None])
        whole = cls.build(keys_1NE, basis, size, 1, num_lists=num_lists, seed=seed)
        choosing_TGE, measuring_TGE = (_some(half_TGE) for half_TGE in (query_TGE[:middle], query_TGE[middle:]))
        chosen = replace(whole, reads=whole._fewest_reads(choosing_TGE, keys_1NE, top_k, target))
        measured = chosen._found(measuring_TGE, keys_1NE, _truth(measuring_TGE, keys_1NE, top_k))
        return replace(chosen, recall=(measured,))

    @classmethod
    def build(
        cls, keys_1NE: Tensor, basis: Basis, size: int, reads: int, *, num_lists: int | None = None, seed: int = 0
    ) -> KeyLists:
        """Index all keys with settings that are known.

        Args:
            keys_1NE: at least one, on the device of the basis.
            size: S, coordinates kept; multiples of 16 are fastest.
            reads: tiles that a query reads.
        """
        num_keys, device = keys_1NE.shape[1], keys_1NE.device
        num_lists = num_lists or default_lists(num_keys)
        sketch = Sketch.build(keys_1NE, basis, size)
        code_NS, scale_S = sketch.codes_XNS[0], sketch.scale_XS[0]
        sample_n = torch.randperm(num_keys, generator=torch.Generator().manual_seed(seed))[: _POINTS * num_lists]
        centroid_LS = centroids(code_NS[sample_n.to(device)].float() * scale_S, num_lists, seed=seed)
        list_N = torch.cat([nearest(code_nS.float() * scale_S, centroid_LS) for code_nS in code_NS.split(_BLOCK)])

        length_L = torch.bincount(list_N, minlength=num_lists)
        tiles_L = (length_L + TILE - 1) // TILE
        first_L = tiles_L.cumsum(0) - tiles_L
        # Keys list by list, each list in the bank's order, from a tile's beginning on.
        row_N = list_N.argsort(stable=True)
        before_L = length_L.cumsum(0) - length_L
        list_N = list_N[row_N]
        place_N = torch.arange(num_keys, device=device) + (first_L * TILE - before_L)[list_N]
        places = int(tiles_L.sum()) * TILE
        row_M = torch.full((places,), -1, dtype=torch.int32, device=device)
        row_M[place_N] = row_N.to(torch.int32)
        code_MS = torch.zeros(places, size, dtype=torch.int8, device=device)
        for place_n, row_n in zip(place_N.split(_BLOCK), row_N.split(_BLOCK), strict=True):
            code_MS[place_n] = code_NS[row_n]

        longest = -(-_LONGEST * num_keys // (num_lists * TILE))
        parts_L = (tiles_L + longest - 1) // longest
        list_P = torch.repeat_interleave(parts_L)
        part_P = torch.arange(len(list_P), device=device) - (parts_L.cumsum(0) - parts_L)[list_P]
        first_P1 = F.pad(first_L[list_P] + part_P * longest, (0, 1), value=places // TILE).to(torch.int32)
        centroid_LS = (centroid_LS / scale_S).round().clamp(-127, 127).to(torch.int8)
        return cls(basis, scale_S, code_MS, row_M, first_P1, centroid_LS[list_P], num_keys, reads)

    @property
    def size(self) -> int:
        """S, coordinates kept."""
        return self.code_MS.shape[-1]

    @property
    def tiles(self) -> int:
        """Of all lists."""
        return len(self.row_M) // TILE

    @property
    def share(self) -> float:
        """Of the keys that one query reads."""
        return min(1.0, self.reads / self.tiles)

    @cached_property
    def _alone(self) -> GpuLists:
        return GpuLists.of([self])

    def to(self, device: torch.device | str) -> KeyLists:
        """The lists on a device."""
        names = ("scale_S", "code_MS", "row_M", "first_L1", "centroid_LS")
        tensors = {name: getattr(self, name).to(device) for name in names}
        return replace(self, basis=Basis(*(part.to(device) for part in self.basis)), **tensors)

    def search(self, query_1QE: Tensor, keys_1NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The `top_k` keys of largest dot product for each query, but for the share that `recall` says.

        Args:
            query_1QE: queries. More than `AT_ONCE` are answered exactly: together they would read most of the keys.
            keys_1NE: the bank's keys: those in lists, and any that were appended since. These are searched exactly.
            top_k: R.

        Returns:
            index_1QR and score_1QR as `ops.topk_scan` returns them; scores are those of the keys themselves.
        """
        return self._alone.search(query_1QE, keys_1NE, top_k)

    def _fewest_reads(self, query_TGE: Tensor, keys_1NE: Tensor, top_k: int, target: float) -> int:
        """Tiles to read for the target recall, to within 2 %."""
        truth_TGR = _truth(query_TGE, keys_1NE, top_k)

        def reaches(reads: int) -> bool:
            return replace(self, reads=reads)._found(query_TGE, keys_1NE, truth_TGR) >= target

        low, high = 0, 1
        while not reaches(high):
            if high >= self.tiles:
                best = replace(self, reads=high)._found(query_TGE, keys_1NE, truth_TGR)
                raise ConfigError(
                    f"Even with every list read, {self.size} coordinates find {best:.3f} of the true nearest keys; "
                    f"{target} were asked for. Give a larger size, or a lower target."
                )
            low, high = high, 2 * high
        while high - low > 1 + high // 50:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle, high)
        return min(high, self.tiles)

    def _found(self, query_TGE: Tensor, keys_1NE: Tensor, truth_TGR: Tensor) -> float:
        """Recall of queries that are asked as a step asks them, G at once."""
        lists, tokens = self._alone.lists, len(query_TGE)
        zero_T = torch.zeros(tokens, dtype=torch.int64, device=query_TGE.device)
        keys, top_k = keys_1NE[:, : len(self)], truth_TGR.shape[-1]
        index_TGR, _ = topk_listed(query_TGE, keys, lists, top_k, zero_T + len(self), zero_T)
        return float(recall(index_TGR, truth_TGR).mean())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `from_state` makes the same index of: tensors by name, and settings for JSON."""
        names = ("scale_S", "code_MS", "row_M", "first_L1", "centroid_LS")
        tensors = self.basis._asdict() | {name: getattr(self, name) for name in names}
        return tensors, {"num_keys": self.num_keys, "reads": self.reads, "recall": self.recall}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> KeyLists:
        """An index as `state` gave it; KeyError if something is missing."""
        basis = Basis(*(tensors[name] for name in Basis._fields))
        names = ("scale_S", "code_MS", "row_M", "first_L1", "centroid_LS")
        parts = {name: tensors[name] for name in names}
        return cls(
            basis, num_keys=settings["num_keys"], reads=settings["reads"], recall=tuple(settings["recall"]), **parts
        )


@dataclass(frozen=True)
class GpuLists:
    """Lists of some heads of one bank and of one size, which are searched at once.

    Attributes:
        lists: as `ops.topk_listed` takes them.
    """

    lists: Lists

    @classmethod
    def of(cls, heads: Sequence[KeyLists]) -> GpuLists:
        # Heads differ in how many lists were cut: the rest are empty ones.
        most = -(-max(len(head.centroid_LS) for head in heads) // TILE) * TILE
        padded = [(head, most - len(head.centroid_LS)) for head in heads]
        coder_PES = torch.cat([head.basis.queries_XEE[..., : head.size] * head.scale_S for head in heads])
        lists = Lists(
            centre_PE=torch.cat([head.basis.centre_XE for head in heads]),
            coder_PES=coder_PES,
            centroid_PLS=torch.stack([F.pad(head.centroid_LS, (0, 0, 0, more)) for head, more in padded]),
            first_PL1=torch.stack([F.pad(head.first_L1, (0, more), value=head.tiles) for head, more in padded]),
            codes=Pools.of([head.code_MS for head in heads]),
            rows=Pools.of([head.row_M[:, None] for head in heads]),
            reads_P=torch.tensor([head.reads for head in heads], dtype=torch.int32, device=coder_PES.device),
            known=len(heads[0]),
            # Rows of maxima that begin at multiples of 64 bytes are read faster.
            tiles=-(-max(head.tiles for head in heads) // 16) * 16,
        )
        return cls(lists)

    def search(
        self, query_XQE: Tensor, keys_XNE: Tensor | Pools, top_k: int, length_X: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `KeyLists.search`.

        Args:
            length_X: how many keys there are, no fewer than those in lists; all of `keys_XNE` by default.
        """
        if query_XQE.shape[1] > AT_ONCE:
            return topk_scan(query_XQE, keys_XNE, top_k, length_X)
        return topk_listed(query_XQE, keys_XNE, self.lists, top_k, length_X)


def default_lists(num_keys: int) -> int:
    """4 · √N, but lists of two tiles at least, and no more than can be chosen from once long ones are cut."""
    return max(1, min(round(4 * num_keys**0.5), num_keys // (2 * TILE), 3 * MOST_LISTS // 4))


def _some(query_TGE: Tensor) -> Tensor:
    """At most `MEASURED` queries, evenly spread, those asked at once together."""
    return query_TGE[:: -(-query_TGE.shape[0] * query_TGE.shape[1] // MEASURED)]


def _truth(query_TGE: Tensor, keys_1NE: Tensor, top_k: int) -> Tensor:
    """The true nearest keys, (T, G, R)."""
    index_1QR, _ = topk_scan(query_TGE.flatten(0, 1)[None], keys_1NE, top_k)
    return index_1QR.view(*query_TGE.shape[:2], -1)


__all__ = ["GpuLists", "KeyLists", "default_lists"]
