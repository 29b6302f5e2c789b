"""A sketch of a bank's keys: a few int8 numbers a key that rank keys almost as their scores do.

What a memory head asks varies in few directions. In the basis where the scores of recorded queries vary most, first,
the leading 24 to 32 of 64 coordinates rank the keys of real text nearly perfectly; the best are then scored again from
the keys themselves. A search reads a quarter of the bytes that exact search reads. A sketch of all coordinates (`size`
is the head size) and `exact=True` is an exact search that reads half of them.

On a GPU the sketch ranks groups of 8 or 16 keys, and all keys of the best are scored again (`ops.topk_coded`).

X searches (a memory head of a bank each), Q queries, N keys, n of a block, E head size, S coordinates kept,
C candidates, R retrieved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longmem.ops import Pools, code_queries, cpu, reads_apart, topk_coded, topk_scan

# Candidates for each retrieved key, scored again in float32. What is to be proved exact needs some more.
SPARE = 4
SPARE_EXACT = 6
# Coordinates whose queries vary less than this share of the largest variance count as if they varied that much:
# a basis learnt from few queries must stay invertible.
LEAST_VARIANCE = 1e-3
# Queries that measure recall. The exact search that tells the truth is most of their cost.
MEASURED = 256
# On a GPU, keys that are scored again for each retrieved one: two groups. More than all are not worth it.
_AGAIN = 32
_SAMPLE = 1 << 16  # keys that a basis is fitted to
_BLOCK = 1 << 16  # keys encoded at a time
_SCORES = 1 << 20  # scores of a block of queries


class Basis(NamedTuple):
    """Coordinates of keys and queries: q·k = q·centre + coordinates(q)·coordinates(k), the first mattering most.

    Attributes:
        centre_XE: what is subtracted from keys. It shifts all scores of a query alike.
        keys_XEE, queries_XEE: a row (key or query) times its matrix is the row's coordinates.
    """

    centre_XE: Tensor
    keys_XEE: Tensor
    queries_XEE: Tensor

    @classmethod
    def fit(cls, keys_XNE: Tensor, query_XQE: Tensor) -> Basis:
        """The basis in which the scores of these queries vary most in the first coordinates.

        Keys alone do not tell: queries of attention are distributed quite unlike them.

        Args:
            keys_XNE: at least one key.
            query_XQE: recorded queries; a few hundred or more.
        """
        sample_XNE = keys_XNE[:, :: -(-keys_XNE.shape[1] // _SAMPLE)].float()
        query_XQE = query_XQE.float()
        centre_XE = sample_XNE.mean(1)
        covariance_XEE = query_XQE.mT @ query_XQE / query_XQE.shape[1]
        variance_XE, axes_XEE = torch.linalg.eigh(covariance_XEE)
        spread_X1E = variance_XE.clamp(min=LEAST_VARIANCE * variance_XE[:, -1:]).sqrt()[:, None]
        # With keys stretched as queries vary, and queries shrunk alike, every query varies the same in all directions;
        # there the directions in which keys vary most are those in which scores do.
        into_keys_XEE = axes_XEE * spread_X1E
        stretched_XNE = (sample_XNE - centre_XE[:, None]) @ into_keys_XEE
        _, order_XEE = torch.linalg.eigh(stretched_XNE.mT @ stretched_XNE)
        order_XEE = order_XEE.flip(-1)
        return cls(centre_XE, into_keys_XEE @ order_XEE, (axes_XEE / spread_X1E) @ order_XEE)


@dataclass(frozen=True)
class Sketch:
    """The first N tokens of a bank, S bytes each. A cache: it can be made again from the bank's keys.

    Attributes:
        basis: where the coordinates come from.
        codes_XNS: int8.
        scale_XS: a code's unit.
        left_out_X: norm of the largest key's coordinates beyond the first S.
        rounded_X: norm of the largest key's rounding, in units of its codes.
        recall: share of the true nearest keys that each search finds, if it was measured.
    """

    basis: Basis
    codes_XNS: Tensor
    scale_XS: Tensor
    left_out_X: Tensor
    rounded_X: Tensor
    recall: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Keys of each search."""
        return self.codes_XNS.shape[1]

    def to(self, device: torch.device | str) -> Sketch:
        """The sketch on a device."""
        names = ("codes_XNS", "scale_XS", "left_out_X", "rounded_X")
        tensors = {name: getattr(self, name).to(device) for name in names}
        return replace(self, basis=Basis(*(part.to(device) for part in self.basis)), **tensors)

    def __getitem__(self, searches: slice) -> Sketch:
        """The sketch of some of the searches (such as a layer's heads), sharing memory."""
        basis, *rest = (getattr(self, field.name) for field in fields(self))
        return Sketch(Basis(*(part[searches] for part in basis)), *(part[searches] for part in rest))

    @classmethod
    def choose(cls, keys_XNE: Tensor, query_XQE: Tensor, *, top_k: int = 64, target: float = 0.99) -> Sketch:
        """Sketch all keys, with as few coordinates as reach a target recall.

        Args:
            keys_XNE: at least one.
            query_XQE: recorded queries in the order they were asked, some hundreds at least. The first half chooses,
                the second measures.
            top_k: R, what recall is measured at.
            target: recall of every search among the R true nearest, of the queries that choose.
        """
        choosing_XQE, measuring_XQE = halves(query_XQE)
        basis = Basis.fit(keys_XNE, choosing_XQE)
        choosing_XQE, measuring_XQE = some(choosing_XQE), some(measuring_XQE)
        truth_XQR = topk_scan(choosing_XQE, keys_XNE, top_k)[0]
        head_dim = keys_XNE.shape[-1]
        for size in (*range(16, head_dim, 16 if keys_XNE.is_cuda else 8), head_dim):
            sketch = cls.build(keys_XNE, basis, size)
            if recall(sketch.search(choosing_XQE, keys_XNE, top_k)[0], truth_XQR).amin() >= target:
                break
        found_XQR = sketch.search(measuring_XQE, keys_XNE, top_k)[0]
        measured_X = recall(found_XQR, topk_scan(measuring_XQE, keys_XNE, top_k)[0])
        return replace(sketch, recall=tuple(measured_X.tolist()))

    @classmethod
    def build(cls, keys_XNE: Tensor, basis: Basis, size: int) -> Sketch:
        """Sketch all keys.

        Args:
            keys_XNE: on the device of the basis.
            size: S, coordinates kept; multiples of 8 are fastest, of 16 on a GPU.
        """
        (searches, num_keys, _), device = keys_XNE.shape, keys_XNE.device
        codes_XNS = torch.empty(searches, num_keys, size, dtype=torch.int8, device=device)
        scale_XS = torch.full((searches, size), 1e-30, device=device)
        left_out_X, rounded_X = torch.zeros(2, searches, device=device)
        blocks = [slice(first, first + _BLOCK) for first in range(0, num_keys, _BLOCK)]

        def coordinates(block: slice) -> Tensor:
            return (keys_XNE[:, block].float() - basis.centre_XE[:, None]) @ basis.keys_XEE

        for block in blocks:
            coordinate_XnE = coordinates(block)
            scale_XS = scale_XS.maximum(coordinate_XnE[..., :size].abs().amax(1) / 127)
            left_out_X = left_out_X.maximum(coordinate_XnE[..., size:].norm(dim=-1).amax(-1))
        for block in blocks:
            exact_XnS = coordinates(block)[..., :size] / scale_XS[:, None]
            code_XnS = exact_XnS.round()
            codes_XNS[:, block] = code_XnS.to(torch.int8)
            rounded_X = rounded_X.maximum((exact_XnS - code_XnS).norm(dim=-1).amax(-1))
        return cls(basis, codes_XNS, scale_XS, left_out_X, rounded_X)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `from_state` makes the same sketch of: tensors by name, and settings for JSON."""
        tensors = {name: getattr(self, name) for name in ("codes_XNS", "scale_XS", "left_out_X", "rounded_X")}
        return self.basis._asdict() | tensors, {"recall": self.recall}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Sketch:
        """A sketch as `state` gave it; KeyError if something is missing."""
        basis = Basis(*(tensors[name] for name in Basis._fields))
        parts = (tensors[name] for name in ("codes_XNS", "scale_XS", "left_out_X", "rounded_X"))
        return cls(basis, *parts, recall=tuple(settings["recall"]))

    @property
    def size(self) -> int:
        """S, coordinates kept."""
        return self.codes_XNS.shape[-1]

    def search(self, query_XQE: Tensor, keys_XNE: Tensor, top_k: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
        """The `top_k` keys of largest dot product for each query, nearly always all of them.

        Args:
            query_XQE: queries.
            keys_XNE: the bank's keys: those sketched, and any that were appended since. These are searched exactly.
            top_k: R.
            exact: search again, without the sketch, each query that the sketch is not proved to have answered exactly.
                Few need it if all coordinates are kept, nearly all otherwise. On a CPU.

        Returns:
            index_XQR and score_XQR as `ops.topk_scan` returns them; scores are those of the keys themselves.
        """
        searches, queries, _ = query_XQE.shape
        if len(self) <= SPARE_EXACT * top_k:
            return topk_scan(query_XQE, keys_XNE, top_k)
        if reads_apart(query_XQE.device, top_k):
            return GpuSketch.of([self]).search(query_XQE, Pools.of(list(keys_XNE)), top_k)
        index_XQR = torch.empty(searches, queries, top_k, dtype=torch.int64)
        score_XQR = torch.empty(searches, queries, top_k)
        step = max(cpu.FEW, _SCORES // len(self))
        for x in range(searches):
            for first in range(0, queries, step):
                rows = slice(first, first + step)
                index_XQR[x, rows], score_XQR[x, rows] = self._search(
                    x, query_XQE[x, rows].float(), keys_XNE[x, : len(self)], top_k, exact
                )
        return with_tail(index_XQR, score_XQR, query_XQE, keys_XNE, len(self))

    @property
    def coder_XES(self) -> Tensor:
        """What `ops.code_queries` needs: products of the queries' codes with those of keys rank keys nearly as scores
        do."""
        return self.basis.queries_XEE[..., : self.size] * self.scale_XS[:, None]

    def code_queries(self, query_XQE: Tensor) -> Tensor:
        """What stands for queries, (X, Q, S) int8."""
        return code_queries(query_XQE, self.coder_XES)[0]

    def _search(self, x: int, query_QE: Tensor, keys_NE: Tensor, top_k: int, exact: bool) -> tuple[Tensor, Tensor]:
        size = self.codes_XNS.shape[-1]
        coordinate_QE = query_QE @ self.basis.queries_XEE[x]
        scaled_QS = coordinate_QE[:, :size] * self.scale_XS[x]
        # A product of int8 twice as fine needs twice the queries: worth it only where a bound has to be tight.
        levels = 127 * 128 if exact else 127
        unit_Q1 = scaled_QS.abs().amax(-1, keepdim=True).clamp(min=1e-30) / levels
        whole_QS = (scaled_QS / unit_Q1).round()
        codes_NS, parts = self.codes_XNS[x], whole_QS
        if exact:
            high_QS = (whole_QS / 128).round()
            parts = torch.cat((high_QS, whole_QS - 128 * high_QS))
        part_codes = parts.to(torch.int8)

        def score(keys: slice) -> Tensor:
            score_Qn = cpu.int8_products(part_codes, codes_NS[keys])
            if exact:
                high_Qn, low_Qn = score_Qn.split(len(query_QE))
                score_Qn = low_Qn.add(high_Qn, alpha=128)
            return score_Qn

        candidate_QC, least_Q = cpu.best_of(score, len(self), (SPARE_EXACT if exact else SPARE) * top_k)
        index_QR, score_QR = cpu.rescore(query_QE, keys_NE, candidate_QC, top_k)
        if not exact:
            return index_QR, score_QR
        # No other key scores more than its rough score and what each of the three approximations can take from one.
        most_Q = query_QE @ self.basis.centre_XE[x] + least_Q * unit_Q1[:, 0]
        most_Q += coordinate_QE[:, size:].norm(dim=-1) * self.left_out_X[x]
        most_Q += scaled_QS.norm(dim=-1) * self.rounded_X[x]
        most_Q += unit_Q1[:, 0] / 2 * 127 * size
        unproved_Q = score_QR[:, -1] < most_Q
        if unproved_Q.any():
            found_1QR = cpu.topk_scan(query_QE[None, unproved_Q], keys_NE[None], top_k)
            index_QR[unproved_Q], score_QR[unproved_Q] = (part_1QR[0] for part_1QR in found_1QR)
        return index_QR, score_QR


@dataclass(frozen=True)
class GpuSketch:
    """Sketches of one bank and one size, which are searched at once on a GPU.

    Attributes:
        coder_XES: of all of their searches.
        codes: their codes, a pool (N, S) each.
    """

    coder_XES: Tensor
    codes: Pools

    @classmethod
    def of(cls, sketches: Sequence[Sketch]) -> GpuSketch:
        codes = [codes_NS for sketch in sketches for codes_NS in sketch.codes_XNS]
        return cls(torch.cat([sketch.coder_XES for sketch in sketches]), Pools.of(codes))

    def search(
        self, query_XQE: Tensor, keys: Pools, top_k: int, length_X: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Sketch.search`.

        Args:
            length_X: how many keys there are, no fewer than those sketched; all of `keys` by default.
        """
        searches, queries, _ = query_XQE.shape
        known = self.codes.most
        if length_X is None:
            length_X = torch.full((searches,), keys.most, device=query_XQE.device)
        if known <= SPARE_EXACT * top_k or _AGAIN * top_k * queries > known:
            return topk_scan(query_XQE, keys, top_k, length_X)
        codes = code_queries(query_XQE, self.coder_XES)[0], self.codes
        first = torch.full_like(length_X, known)
        index_XQR, score_XQR = topk_coded(query_XQE, keys.between(0, known), *codes, top_k, first)
        if known == keys.most:
            return index_XQR, score_XQR
        late = topk_scan(query_XQE, keys.between(known, keys.most), top_k, length_X - known)
        return both(index_XQR, score_XQR, *late, known)


def with_tail(
    index_XQR: Tensor, score_XQR: Tensor, query_XQE: Tensor, keys_XNE: Tensor, known: int
) -> tuple[Tensor, Tensor]:
    """Results among the first `known` keys, and those of an exact search of all later ones, in one."""
    if known == keys_XNE.shape[1]:
        return index_XQR, score_XQR
    top_k = index_XQR.shape[-1]
    return both(index_XQR, score_XQR, *topk_scan(query_XQE, keys_XNE[:, known:], top_k), known)


def both(
    index_XQR: Tensor, score_XQR: Tensor, late_index_XQR: Tensor, late_score_XQR: Tensor, known: int
) -> tuple[Tensor, Tensor]:
    """What was found among the first `known` keys, and among those behind them, in one."""
    late_index_XQR = torch.where(late_score_XQR > -torch.inf, late_index_XQR + known, late_index_XQR)
    score_XQR, among_XQR = torch.cat((score_XQR, late_score_XQR), dim=-1).topk(score_XQR.shape[-1], dim=-1)
    return torch.cat((index_XQR, late_index_XQR), dim=-1).gather(-1, among_XQR), score_XQR


def halves(query_XQE: Tensor) -> tuple[Tensor, Tensor]:
    """Recorded queries to choose a setting by, and later ones to measure it with."""
    middle = -(-query_XQE.shape[1] // 2)
    return query_XQE[:, :middle].float(), query_XQE[:, middle:].float()


def some(query_XQE: Tensor) -> Tensor:
    """At most `MEASURED` queries, evenly spread."""
    return query_XQE[:, :: -(-query_XQE.shape[1] // MEASURED)] if query_XQE.shape[1] else query_XQE


def recall(index_XQR: Tensor, truth_XQR: Tensor) -> Tensor:
    """Share of the true neighbours that were found, of each search (X,)."""
    found_XQR = (truth_XQR[..., :, None] == index_XQR[..., None, :]).any(-1)
    return found_XQR.float().mean((1, 2))
