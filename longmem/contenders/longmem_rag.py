"""LongMem with the best remembered passages in its window as well: bank and retrieval together."""

from __future__ import annotations

from collections.abc import Sequence

from longmem.bank import MemoryBank
from longmem.contenders.contender import ContenderConfig, Prompt, View
from longmem.contenders.longmem import LongMemContender
from longmem.contenders.rag_bm25 import RagBm25
from longmem.data import Document
from longmem.model import LongMem


class LongMemRag(LongMemContender):
    name = "longmem+rag"
    title = "LongMem, bank on and BM25 pieces in its window"
    order = 80

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        super().__init__(model, config)
        # The very pieces that `rag-bm25` shows, so that the difference between the two is the bank.
        self._words = RagBm25(model, config)

    def learn(self, documents: Sequence[Document]) -> MemoryBank:
        self._words.learn(documents)
        return super().learn(documents)

    def view(self, prompt: Prompt) -> View:
        view = self._words.view(prompt)
        self.seen = self._words.drawn_on()
        return view

    def kept_bytes(self) -> int:
        return super().kept_bytes() + self._words.kept_bytes()
