"""An inverted file over a bank's keys, for banks too large to be read at every token on a CPU.

Keys lie in lists of keys that are alike, as a few int8 numbers each (in the basis of `longmem.sketch`). Lists are many
and short, and a query reads those whose best key promises most: the score of a list's mean, and what its keys may score
above it. All queries that are asked together read what any of them chose, in one product; the best candidates are
scored again from the bank's keys. How many lists that takes is measured on queries the bank's own heads asked: queries
of attention are distributed unlike keys, and a number tuned on keys would miss much of what is looked for.

X searches (a memory head of a bank each), Q queries (q asked together), N keys (n of a part), E head size, S
coordinates kept (P = 2 S), L lists, B blocks of `ROWS` places, M places for keys, C candidates, R retrieved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longmem.clusters import moved, nearest
from longmem.errors import ConfigError
from longmem.ops import NativeOps, cpu, in_large_pages
from longmem.sketch import MEASURED, Basis, halves, recall, with_tail

# Candidates for each retrieved key, scored again in float32.
SPARE = 4
# A list's best key is expected so many standard deviations above its mean, in each coordinate and towards the query.
# (In all at once it would be some two; this is a plain product.) Between .4 and .8 the number matters little.
PROMISE = 0.5
# Places for keys of which lists are made up: the more, the more are empty; the fewer, the more have to be fetched.
ROWS = 16
# Lists are made inside of cells of about so many: to compare every key with all lists would take minutes.
_CELL = 1024
_ROUNDS = 6  # of k-means
_POINTS = 64  # keys of each list that k-means sees
_BLOCK = 1 << 17  # keys at a time


class ListedKeys(NamedTuple):
    """The keys of one search in lists.

    Attributes:
        promise_LP: int8, mean and scaled deviation of the coordinates of each list's keys. Their product with a query's
            coordinates and those without sign is what the list promises.
        promise_scale_P: its unit.
        first_L, blocks_L: int64, where the blocks of each list begin, and how many there are.
        codes_MS: int8; places of a list that are left over are 0, and so score as the mean of all keys does.
        row_M: int32, which key a place holds; −1 is none.
        scale_S: a code's unit.
    """

    promise_LP: Tensor
    promise_scale_P: Tensor
    first_L: Tensor
    blocks_L: Tensor
    codes_MS: Tensor
    row_M: Tensor
    scale_S: Tensor

    def __len__(self) -> int:
        """Lists."""
        return len(self.first_L)


@dataclass(frozen=True)
class InvertedFile:
    """The first N tokens of a bank in lists. A cache: it can be made again from the bank's keys and some queries.

    Attributes:
        basis: where the coordinates come from.
        num_keys: N.
        lists: of each search.
        probes: lists that a query of each search chooses.
        together: queries that follow each other and read what any of them chose: the query heads of a memory head.
        recall: share of the true nearest keys that each search finds so, measured with queries that chose nothing;
            empty if it was not measured.
    """

    basis: Basis
    num_keys: int
    lists: tuple[ListedKeys, ...]
    probes: tuple[int, ...]
    together: int = 1
    recall: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Keys of each search."""
        return self.num_keys

    @classmethod
    def choose(
        cls,
        keys_XNE: Tensor,
        query_XQE: Tensor,
        *,
        top_k: int = 64,
        target: float = 0.98,
        size: int = 32,
        together: int = 1,
        num_lists: int | None = None,
        seed: int = 0,
    ) -> InvertedFile:
        """Index all keys; the number of lists to read is the least that reaches the target recall.

        Args:
            keys_XNE: on the CPU.
            query_XQE: recorded queries in the order they were asked, some hundreds at least. The first half chooses,
                the second measures.
            top_k: R, what recall is measured at.
            target: recall among the R true nearest, of the queries that choose.
            size: S. Fewer coordinates are faster to read; too few cannot reach the target.
            together: how many of the queries, one after another, are asked at once.
            num_lists: `default_lists` by default. About so many are made.

        Raises:
            ConfigError: there are too few keys or queries, or the target is out of reach with so few coordinates.
        """
        searches, num_keys, head_dim = keys_XNE.shape
        num_lists = num_lists or default_lists(num_keys)
        if num_keys < max(num_lists, SPARE * top_k) or query_XQE.shape[1] < 2 * together:
            raise ConfigError(
                f"An inverted file of {num_lists} lists was asked for {num_keys} keys and {query_XQE.shape[1]} "
                f"recorded queries, {together} at once; it needs at least {max(num_lists, SPARE * top_k)} keys and "
                f"{2 * together} queries. Search a bank so small exactly."
            )
        if not 0 < size <= head_dim:
            raise ConfigError(f"size must be from 1 to the head size, {head_dim}; got {size}.")
        whole_tokens = query_XQE.shape[1] // (2 * together) * 2 * together
        choosing_XQE, measuring_XQE = halves(query_XQE[:, :whole_tokens])
        basis = Basis.fit(keys_XNE, choosing_XQE)
        choosing_XQE, measuring_XQE = _some(choosing_XQE, together), _some(measuring_XQE, together)
        unread = cls.build(keys_XNE, basis, size, (1,) * searches, together=together, num_lists=num_lists, seed=seed)
        truth_XQR = cpu.topk_scan(choosing_XQE, keys_XNE, top_k)[0]
        probes = []
        for x in range(searches):
            one = slice(x, x + 1)
            probes.append(unread[one]._fewest_probes(choosing_XQE[one], keys_XNE[one], truth_XQR[one], target))
        chosen = replace(unread, probes=tuple(probes))
        truth_XQR = cpu.topk_scan(measuring_XQE, keys_XNE, top_k)[0]
        measured_X = recall(chosen.search(measuring_XQE, keys_XNE, top_k)[0], truth_XQR)
        return replace(chosen, recall=tuple(measured_X.tolist()))

    @classmethod
    def build(
        cls,
        keys_XNE: Tensor,
        basis: Basis,
        size: int,
        probes: tuple[int, ...],
        *,
        together: int = 1,
        num_lists: int | None = None,
        seed: int = 0,
    ) -> InvertedFile:
        """Index all keys with settings that are known, such as those of an index that the bank has outgrown."""
        num_keys = keys_XNE.shape[1]
        lists = tuple(
            _in_lists(keys_NE, centre_E, matrix_EE[:, :size], num_lists or default_lists(num_keys), seed)
            for keys_NE, centre_E, matrix_EE in zip(keys_XNE, basis.centre_XE, basis.keys_XEE, strict=True)
        )
        return cls(basis, num_keys, lists, probes, together)

    @property
    def size(self) -> int:
        """S, coordinates kept."""
        return self.lists[0].codes_MS.shape[1]

    def __getitem__(self, searches: slice) -> InvertedFile:
        """The index of some of the searches (such as a layer's heads), sharing memory."""
        basis = Basis(*(part[searches] for part in self.basis))
        parts = (self.lists[searches], self.probes[searches], self.together, self.recall[searches])
        return InvertedFile(basis, self.num_keys, *parts)

    def _fewest_probes(self, query_1QE: Tensor, keys_1NE: Tensor, truth_1QR: Tensor, target: float) -> int:
        """Lists to read for the target recall, to within 2 %."""
        most = len(self.lists[0])

        def found(probes: int) -> float:
            index_1QR, _ = replace(self, probes=(probes,)).search(query_1QE, keys_1NE, truth_1QR.shape[-1])
            return float(recall(index_1QR, truth_1QR))

        low, high = 0, max(1, most // 64)
        while (best := found(high)) < target:
            if high == most:
                raise ConfigError(
                    f"Even with every list read, {self.size} coordinates find {best:.3f} of the true nearest keys; "
                    f"{target} were asked for. Give a larger size, or a lower target."
                )
            low, high = high, min(2 * high, most)
        while high - low > 1 + high // 50:
            middle = (low + high) // 2
            low, high = (low, middle) if found(middle) >= target else (middle, high)
        return high

    def search(
        self, query_XQE: Tensor, keys_XNE: Tensor, top_k: int, native: NativeOps | None = None
    ) -> tuple[Tensor, Tensor]:
        """The `top_k` keys of largest dot product for each query, but for the share that `recall` says.

        Args:
            query_XQE: queries, of which `together` at a time are asked at once.
            keys_XNE: the bank's keys: those indexed, and any that were appended since. These are searched exactly.
            top_k: R.
            native: searches lists in one call, if it takes such queries and keys.

        Returns:
            index_XQR and score_XQR as `ops.topk_scan` returns them; scores are those of the keys themselves.
        """
        index_XQR = torch.zeros(*query_XQE.shape[:2], top_k, dtype=torch.int64)
        score_XQR = torch.full(index_XQR.shape, -torch.inf)
        for x in range(len(self.lists)):
            if native is not None and native.takes(query_XQE, keys_XNE):
                matrix_ES, found = self.basis.queries_XEE[x, :, : self.size], (index_XQR[x], score_XQR[x])
                lists = self.lists[x], self.probes[x]
                native.search_lists(query_XQE[x], self.together, matrix_ES, *lists, keys_XNE[x], SPARE * top_k, *found)
                continue
            parts = (rows_XQ[x].split(self.together) for rows_XQ in (query_XQE, index_XQR, score_XQR))
            for query_qE, index_qR, score_qR in zip(*parts, strict=True):
                self._search(x, query_qE.float(), keys_XNE[x], index_qR, score_qR)
        return with_tail(index_XQR, score_XQR, query_XQE, keys_XNE, len(self))

    def _search(self, x: int, query_qE: Tensor, keys_NE: Tensor, index_qR: Tensor, score_qR: Tensor) -> None:
        """Queries that are asked at once; what they find is written into the last two."""
        lists = self.lists[x]
        # Small things by NumPy: it takes half the time to begin one.
        coordinate_qS = (query_qE @ self.basis.queries_XEE[x, :, : self.size]).numpy()
        block_B = _blocks_of(lists, _promising(lists, coordinate_qS, self.probes[x]))
        codes_MS = lists.codes_MS.view(-1, ROWS * self.size).index_select(0, block_B).view(-1, self.size)
        score_qM = _products(coordinate_qS, codes_MS, lists.scale_S)
        top_k, read = index_qR.shape[-1], len(codes_MS)
        place_qC, _ = cpu.best_of(lambda part: score_qM[:, part], read, min(SPARE * top_k, read))
        candidate_qC = lists.row_M[block_B[place_qC // ROWS] * ROWS + place_qC % ROWS].long()
        kept = slice(min(top_k, candidate_qC.shape[-1]))
        # There may be fewer keys in what was read than are looked for.
        valid_qC, candidate_qC = candidate_qC >= 0, candidate_qC.clamp(min=0)
        index_qR[:, kept], score_qR[:, kept] = cpu.rescore(query_qE, keys_NE, candidate_qC, kept.stop, valid_qC)
        index_qR.masked_fill_(score_qR == -torch.inf, 0)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `from_state` makes the same index of: tensors by name, and settings for JSON."""
        tensors = dict(self.basis._asdict())
        for x, lists in enumerate(self.lists):
            tensors |= {f"lists.{x}.{name}": part for name, part in lists._asdict().items()}
        names = ("num_keys", "probes", "together", "recall")
        return tensors, {name: getattr(self, name) for name in names}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> InvertedFile:
        """An index as `state` gave it; KeyError if something is missing."""
        basis = Basis(*(tensors[name] for name in Basis._fields))
        probes = tuple(settings["probes"])
        lists = tuple(
            ListedKeys(*(in_large_pages(tensors[f"lists.{x}.{name}"]) for name in ListedKeys._fields))
            for x in range(len(probes))
        )
        return cls(basis, settings["num_keys"], lists, probes, settings["together"], tuple(settings["recall"]))


def default_lists(num_keys: int) -> int:
    """A search looks at all lists and reads a share of the keys: with so many, both cost little. More would be half
    empty."""
    return max(1, min(round(16 * num_keys**0.5), num_keys // (2 * ROWS)))


def _some(query_XQE: Tensor, together: int) -> Tensor:
    """At most `MEASURED` queries, evenly spread; those that are asked at once stay together."""
    query_XTGE = query_XQE.unflatten(1, (-1, together))
    return query_XTGE[:, :: -(-query_XQE.shape[1] // MEASURED)].flatten(1, 2)


def _promising(lists: ListedKeys, coordinate_qS: np.ndarray, probes: int) -> np.ndarray:
    """The lists that any of the queries chooses, in order."""
    towards_qP = np.concatenate((coordinate_qS, np.abs(coordinate_qS)), axis=-1)
    promise_qL = _products(towards_qP, lists.promise_LP, lists.promise_scale_P)
    chosen_L = np.zeros(len(lists), dtype=bool)
    chosen_L[np.argpartition(promise_qL.numpy(), -probes, axis=-1)[:, -probes:]] = True
    return np.flatnonzero(chosen_L)


def _products(row_qP: np.ndarray, codes_LP: Tensor, scale_P: Tensor) -> Tensor:
    """What codes score (q, L) int32, in units that differ between rows."""
    scaled_qP = row_qP * scale_P.numpy()
    unit_q1 = np.abs(scaled_qP).max(-1, keepdims=True).clip(1e-30) / 127
    return cpu.int8_products(torch.from_numpy(np.rint(scaled_qP / unit_q1).astype(np.int8)), codes_LP)


def _blocks_of(lists: ListedKeys, chosen: np.ndarray) -> Tensor:
    """All blocks of some lists."""
    blocks_l = lists.blocks_L.numpy()[chosen]
    before_l = blocks_l.cumsum() - blocks_l
    block_B = np.repeat(lists.first_L.numpy()[chosen] - before_l, blocks_l)
    block_B += np.arange(len(block_B))
    return torch.from_numpy(block_B)


def _in_lists(keys_NE: Tensor, centre_E: Tensor, matrix_ES: Tensor, num_lists: int, seed: int) -> ListedKeys:
    """The keys of one search in lists, coded by coordinates."""

    def coordinates(rows_n: Tensor) -> Tensor:
        return (keys_NE[rows_n].float() - centre_E) @ matrix_ES

    list_N, number = _clusters(coordinates, len(keys_NE), num_lists, seed)
    length_L = torch.bincount(list_N, minlength=number)
    blocks_L = (length_L + ROWS - 1) // ROWS
    first_L = blocks_L.cumsum(0) - blocks_L
    # Keys list by list, each list in the bank's order, from a block's beginning on.
    row_N = list_N.argsort(stable=True)
    place_N = torch.arange(len(row_N)) + (first_L * ROWS - (length_L.cumsum(0) - length_L))[list_N[row_N]]
    row_M = torch.full((int(blocks_L.sum()) * ROWS,), -1, dtype=torch.int32)
    row_M[place_N] = row_N.to(torch.int32)
    size = matrix_ES.shape[1]
    largest_S = torch.zeros(size)
    sum_LS, square_LS = torch.zeros(2, number, size, dtype=torch.float64)
    for row_n in row_N.split(_BLOCK):
        coordinate_nS = coordinates(row_n)
        largest_S = largest_S.maximum(coordinate_nS.abs().amax(0))
        for total_LS, part_nS in ((sum_LS, coordinate_nS), (square_LS, coordinate_nS.square())):
            total_LS.index_add_(0, list_N[row_n], part_nS.double())
    scale_S = (largest_S / 127).clamp(min=1e-30)
    codes_MS = torch.zeros(len(row_M), size, dtype=torch.int8)
    for row_n, place_n in zip(row_N.split(_BLOCK), place_N.split(_BLOCK), strict=True):
        codes_MS[place_n] = (coordinates(row_n) / scale_S).round().to(torch.int8)
    mean_LS = sum_LS / length_L[:, None]
    deviation_LS = (square_LS / length_L[:, None] - mean_LS.square()).clamp(min=0).sqrt()
    promise_LP = torch.cat((mean_LS, PROMISE * deviation_LS), dim=-1).float()
    promise_scale_P = (promise_LP.abs().amax(0) / 127).clamp(min=1e-30)
    promise_LP = (promise_LP / promise_scale_P).round().to(torch.int8)
    return ListedKeys(promise_LP, promise_scale_P, first_L, blocks_L, in_large_pages(codes_MS), row_M, scale_S)


def _clusters(coordinates: Callable[[Tensor], Tensor], num_keys: int, num_lists: int, seed: int) -> tuple[Tensor, int]:
    """The list of each key, int64, and how many lists there are, none of them empty.

    First into cells, then each cell into lists: a key is compared with the lists of its own cell alone. Lists that fit
    a little less well cost less than fewer ones would.
    """
    random = torch.Generator().manual_seed(seed)
    cells = -(-num_lists // _CELL)
    sample_n = torch.randperm(num_keys, generator=random)[: _POINTS * cells * 16]
    point_nS = coordinates(sample_n)
    # (Samples are in random order.)
    centroid_CS = moved(point_nS, point_nS[:cells], _ROUNDS, random)
    cell_N = torch.cat([nearest(coordinates(row_n), centroid_CS) for row_n in torch.arange(num_keys).split(_BLOCK)])
    list_N, made = torch.empty_like(cell_N), 0
    for cell in range(cells):
        row_n = (cell_N == cell).nonzero()[:, 0]
        if not len(row_n):
            continue
        point_nS = coordinates(row_n)
        wanted = max(1, round(len(row_n) * num_lists / num_keys))
        sample_n = torch.randperm(len(row_n), generator=random)[: _POINTS * wanted]
        some_nS = point_nS[sample_n]
        nearest_n = nearest(point_nS, moved(some_nS, some_nS[:wanted], _ROUNDS, random))
        used, list_n = nearest_n.unique(return_inverse=True)
        list_N[row_n] = list_n + made
        made += len(used)
    return list_N, made
