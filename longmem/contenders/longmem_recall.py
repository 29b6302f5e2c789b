"""LongMem that shows itself what it recalls: passages that its memory heads and words rank first, with the bank on.

Nothing but the bank is kept: its own keys find the passages, where `longmem+rag` keeps an index beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from longmem.bank import MemoryBank
from longmem.contenders.contender import Prompt, View
from longmem.contenders.longmem import LongMemContender
from longmem.data import Document
from longmem.recall import PassageIndex, recall


class LongMemRecall(LongMemContender):
    name = "longmem+recall"
    title = "LongMem, bank on and what `recall` finds in it in its window"
    order = 85

    def learn(self, documents: Sequence[Document]) -> MemoryBank:
        self._passages: PassageIndex | None = None
        return super().learn(documents)

    def view(self, prompt: Prompt) -> View:
        if self._passages is None:
            self._passages = PassageIndex(self.bank)
        hits = []
        if prompt.wanted.strip():
            hits = recall(self.model, self.bank, prompt.wanted, self.config.chunks, index=self._passages)
            self.cost.asked_tokens += len(self.reader.tokenize(prompt.wanted))
        return self.shown([hit.text for hit in hits], prompt)
