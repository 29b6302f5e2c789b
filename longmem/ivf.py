"""An inverted file over a bank's keys, for banks too large to be read at every token.

Keys lie in lists by nearest centroid, as a few int8 numbers each (in the basis of `longmem.sketch`); a query reads the
lists whose centroids it scores highest, and the best candidates are scored again from the bank's keys. How many lists
that takes is measured on queries the bank's own heads asked: queries of attention are distributed unlike keys, and a
number tuned on keys would miss much of what is looked for.

Needs faiss: `pip install 'longmem[faiss]'`.

X searches (a memory head of a bank each), Q queries, N keys, n of a block, E head size, S coordinates kept,
C candidates, R retrieved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.errors import ConfigError, MissingExtraError
from longmem.ops import cpu
from longmem.sketch import Basis, halves, recall, some, with_tail

# Candidates for each retrieved key, scored again in float32.
SPARE = 4
_POINTS = 64  # keys of each list that k-means sees
_BLOCK = 1 << 17  # keys added at a time


def import_faiss() -> Any:
    """The faiss package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(
            "An inverted file needs faiss, which is not installed. Run: pip install 'longmem[faiss]'; "
            "or search without one: `longmem.sketch` and `longmem.ops` need no extra."
        ) from error
    return faiss


@dataclass(frozen=True)
class InvertedFile:
    """The first N tokens of a bank in lists. A cache: it can be made again from the bank's keys and some queries.

    Attributes:
        basis: where the coordinates come from.
        size: S, coordinates kept.
        lists: a faiss index for each search.
        probes: lists that a query of each search reads.
        recall: share of the true nearest keys that each search finds so, measured with queries that chose nothing;
            empty if it was not measured.
    """

    basis: Basis
    size: int
    lists: tuple[Any, ...]
    probes: tuple[int, ...]
    recall: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Keys of each search."""
        return self.lists[0].ntotal

    @classmethod
    def choose(
        cls,
        keys_XNE: Tensor,
        query_XQE: Tensor,
        *,
        top_k: int = 64,
        target: float = 0.98,
        size: int = 32,
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
            num_lists: 4 · √N by default.

        Raises:
            MissingExtraError: faiss is not installed.
            ConfigError: there are too few keys or queries, or the target is out of reach with so few coordinates.
        """
        searches, num_keys, head_dim = keys_XNE.shape
        num_lists = num_lists or default_lists(num_keys)
        if num_keys < max(num_lists, SPARE * top_k) or query_XQE.shape[1] < 2:
            raise ConfigError(
                f"An inverted file of {num_lists} lists was asked for {num_keys} keys and {query_XQE.shape[1]} "
                f"recorded queries; it needs at least {max(num_lists, SPARE * top_k)} keys and 2 queries. "
                "Search a bank so small exactly."
            )
        if not 0 < size <= head_dim:
            raise ConfigError(f"size must be from 1 to the head size, {head_dim}; got {size}.")
        choosing_XQE, measuring_XQE = halves(query_XQE)
        basis = Basis.fit(keys_XNE, choosing_XQE)
        choosing_XQE, measuring_XQE = some(choosing_XQE), some(measuring_XQE)
        whole = cls.build(keys_XNE, basis, size, (num_lists,) * searches, num_lists=num_lists, seed=seed)
        truth_XQR = cpu.topk_scan(choosing_XQE, keys_XNE, top_k)[0]
        probes = []
        for x in range(searches):
            one = slice(x, x + 1)
            probes.append(whole[one]._fewest_probes(choosing_XQE[one], keys_XNE[one], truth_XQR[one], target))
        chosen = replace(whole, probes=tuple(probes))
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
        num_lists: int | None = None,
        seed: int = 0,
    ) -> InvertedFile:
        """Index all keys with settings that are known, such as those of an index that the bank has outgrown."""
        faiss = import_faiss()
        lists = tuple(
            _in_lists(faiss, keys_NE, centre_E, matrix_EE[:, :size], num_lists or default_lists(len(keys_NE)), seed)
            for keys_NE, centre_E, matrix_EE in zip(keys_XNE, basis.centre_XE, basis.keys_XEE, strict=True)
        )
        return cls(basis, size, lists, probes)

    def __getitem__(self, searches: slice) -> InvertedFile:
        """The index of some of the searches (such as a layer's heads), sharing memory."""
        basis = Basis(*(part[searches] for part in self.basis))
        return InvertedFile(basis, self.size, self.lists[searches], self.probes[searches], self.recall[searches])

    def _fewest_probes(self, query_1QE: Tensor, keys_1NE: Tensor, truth_1QR: Tensor, target: float) -> int:
        """Lists to read for the target recall, of an index of one search that reads them all."""
        low, high = 0, self.lists[0].nlist

        def found(probes: int) -> float:
            index_1QR, _ = replace(self, probes=(probes,)).search(query_1QE, keys_1NE, truth_1QR.shape[-1])
            return float(recall(index_1QR, truth_1QR))

        if (best := found(high)) < target:
            raise ConfigError(
                f"Even with every list read, {self.size} coordinates find {best:.3f} of the true nearest keys; "
                f"{target} were asked for. Give a larger size, or a lower target."
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if found(middle) >= target else (middle, high)
        return high

    def search(self, query_XQE: Tensor, keys_XNE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The `top_k` keys of largest dot product for each query, but for the share that `recall` says.

        Args:
            query_XQE: queries.
            keys_XNE: the bank's keys: those indexed, and any that were appended since. These are searched exactly.
            top_k: R.

        Returns:
            index_XQR and score_XQR as `ops.topk_scan` returns them; scores are those of the keys themselves.
        """
        faiss = import_faiss()
        count = min(SPARE * top_k, len(self))
        index_XQR = torch.zeros(*query_XQE.shape[:2], top_k, dtype=torch.int64)
        score_XQR = torch.full(index_XQR.shape, -torch.inf)
        kept = slice(min(top_k, count))
        for x, index in enumerate(self.lists):
            query_QE = query_XQE[x].float()
            coordinate_QS = query_QE @ self.basis.queries_XEE[x, :, : self.size]
            reading = faiss.SearchParametersIVF(nprobe=self.probes[x])
            candidate_QC = torch.from_numpy(index.search(coordinate_QS.numpy(), count, params=reading)[1])
            # Lists that hold fewer keys than asked for leave −1.
            valid_QC, candidate_QC = candidate_QC >= 0, candidate_QC.clamp(min=0)
            index_XQR[x, :, kept], score_XQR[x, :, kept] = cpu.rescore(
                query_QE, keys_XNE[x], candidate_QC, kept.stop, valid_QC
            )
        return with_tail(index_XQR, score_XQR, query_XQE, keys_XNE, len(self))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `from_state` makes the same index of: tensors by name, and settings for JSON."""
        faiss = import_faiss()
        tensors = dict(self.basis._asdict())
        for x, index in enumerate(self.lists):
            tensors[f"lists.{x}"] = torch.from_numpy(faiss.serialize_index(index))
        return tensors, {"size": self.size, "probes": self.probes, "recall": self.recall}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> InvertedFile:
        """An index as `state` gave it; KeyError if something is missing.

        Raises:
            MissingExtraError: faiss is not installed.
        """
        faiss = import_faiss()
        basis = Basis(*(tensors[name] for name in Basis._fields))
        probes = tuple(settings["probes"])
        lists = tuple(faiss.deserialize_index(tensors[f"lists.{x}"].numpy()) for x in range(len(probes)))
        return cls(basis, settings["size"], lists, probes, tuple(settings["recall"]))


def default_lists(num_keys: int) -> int:
    """A search reads centroids and a share of the keys; both cost about the same with so many lists."""
    return max(1, round(4 * num_keys**0.5))


def _in_lists(faiss: Any, keys_NE: Tensor, centre_E: Tensor, matrix_ES: Tensor, num_lists: int, seed: int) -> Any:
    """The keys of one search in lists, coded by coordinates."""

    def coordinates(keys_nE: Tensor) -> np.ndarray:
        return ((keys_nE.float() - centre_E) @ matrix_ES).numpy()

    size = matrix_ES.shape[-1]
    sample_n = torch.randperm(len(keys_NE), generator=torch.Generator().manual_seed(seed))[: _POINTS * num_lists]
    points = coordinates(keys_NE[sample_n])
    clusters = faiss.Kmeans(
        size, num_lists, niter=10, seed=seed, min_points_per_centroid=1, max_points_per_centroid=_POINTS
    )
    clusters.train(points)
    nearest, best = faiss.IndexFlatL2(size), faiss.IndexFlatIP(size)
    nearest.add(clusters.centroids)
    best.add(clusters.centroids)
    code, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(nearest, size, num_lists, code, metric, False)
    index.train(points)
    for keys_nE in keys_NE.split(_BLOCK):
        index.add(coordinates(keys_nE))
    # Keys were put into lists by distance, since those of a list should be alike; queries choose lists by score.
    best.this.disown()
    index.quantizer, index.own_fields = best, True
    return index
