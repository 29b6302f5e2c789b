"""Pieces of documents that can be put into a window, and what retrievers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from longmem.contenders.contender import Contender, ContenderConfig, Prompt, View
from longmem.contenders.kept import Kept
from longmem.data import Document
from longmem.model import LongMem
from longmem.recall import cut

_KEPT = 1 << 25  # letters of texts that may be told again


def chunks(text: str, tokenizer: Any, size: int) -> list[str]:
    """Pieces of at most so many tokens: paragraphs, the long ones cut at sentence or line ends, short ones joined."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = cut(text, [start for start, _ in offsets], longest=size, short=size // 4)
    return [text[start:end] for start, end in spans]


class Retriever(Contender):
    """Puts the best pieces of what it was told before the prompt, the best one last."""

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        super().__init__(model, config)
        self.pieces: list[str] = []
        # Texts that are told again are not cut again.
        self._cut: Kept[list[str]] = Kept(_KEPT, lambda text, pieces: len(text))

    @abstractmethod
    def index(self, pieces: Sequence[str]) -> None:
        """Get ready to rank pieces."""

    @abstractmethod
    def scores(self, query: str) -> np.ndarray:
        """How well each piece fits a query."""

    def learn(self, documents: Sequence[Document]) -> None:
        self.pieces = [piece for document in documents for piece in self._pieces(document.text)]
        self.index(self.pieces)

    def _pieces(self, text: str) -> list[str]:
        pieces = self._cut.get(text)
        if pieces is None:
            pieces = chunks(text, self.model.tokenizer, self.config.chunk)
            self._cut.put(text, pieces)
        return pieces

    def view(self, prompt: Prompt) -> View:
        ranked = np.argsort(-self.scores(prompt.wanted), kind="stable")[: self.config.chunks]
        return self.shown([self.pieces[place] for place in ranked], prompt)

    def kept_bytes(self) -> int:
        return sum(len(piece.encode()) for piece in self.pieces)
