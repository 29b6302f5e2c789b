"""Retrieval by words and by meaning together: the two rankings are fused (Cormack et al. 2009, reciprocal ranks)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longmem.contenders.rag_bm25 import Words
from longmem.contenders.rag_dense import RagDense

_RANK = 60  # as in the paper


class RagHybrid(RagDense):
    name = "rag-hybrid"
    title = "backbone, pieces by BM25 and embeddings in its window"
    order = 50

    def index(self, pieces: Sequence[str]) -> None:
        super().index(pieces)
        self._ranking = Words(pieces)

    def scores(self, query: str) -> np.ndarray:
        words_P = self._ranking.scores(query)
        # A piece that shares no word with the query has no rank among those that do.
        return _shares(super().scores(query)) + np.where(words_P > 0, _shares(words_P), 0.0)


def _shares(score_P: np.ndarray) -> np.ndarray:
    """What each piece's rank is worth."""
    return 1 / (_RANK + 1 + np.argsort(np.argsort(-score_P, kind="stable"), kind="stable"))
