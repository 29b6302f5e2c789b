"""Retrieval by words (BM25) into the window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN_PLUS

from longmem.contenders.chunks import Retriever


class Words:
    """BM25 over pieces of text."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._count = len(pieces)
        found = _words(pieces)
        self._index = bm25s.BM25(k1=0.9, b=0.4) if any(found) else None  # bm25s has no empty vocabulary
        if self._index is not None:
            self._index.index(found, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        (words,) = _words([query])
        if self._index is None or not words:
            return np.zeros(self._count)
        return np.asarray(self._index.get_scores(words))


def _words(texts: Sequence[str]) -> Any:
    options: dict[str, Any] = {"stopwords": STOPWORDS_EN_PLUS, "return_ids": False, "show_progress": False}
    return bm25s.tokenize(list(texts), **options)


class RagBm25(Retriever):
    name = "rag-bm25"
    title = "backbone, BM25 pieces in its window"
    order = 30

    def index(self, pieces: Sequence[str]) -> None:
        self._ranking = Words(pieces)

    def scores(self, query: str) -> np.ndarray:
        return self._ranking.scores(query)
