"""LongMem that shows itself what it recalls: passages that its memory heads and words rank first, with the bank on.

Nothing but the bank is kept: its own keys find the passages, where `longmem+rag` keeps an index beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from longmem.bank import MemoryBank
from longmem.contenders.contender import Prompt, View
from longmem.contenders.longmem import LongMemContender
from longmem.data import Document
from longmem.recall import Recaller, as_told


class LongMemRecall(LongMemContender):
    name = "longmem+recall"
    title = "LongMem, bank on and what it recalls in its window"
    order = 85

    def learn(self, documents: Sequence[Document]) -> MemoryBank:
        self._recaller = Recaller(self.model)
        return super().learn(documents)

    def view(self, prompt: Prompt) -> View:
        hits = self._recaller.recall(self.bank, prompt.wanted, self.config.chunks)
        self.cost.asked_tokens += len(self.reader.tokenize(prompt.wanted))
        view = self.shown([hit.text for hit in hits], prompt)
        # As many of the best as fit, what was told last at the end, as `GenerationConfig.recall` shows them.
        order = as_told(hits[: len(self.seen)], self.bank)
        return self.shown([hit.text for hit in reversed(order)], prompt) if order else view
