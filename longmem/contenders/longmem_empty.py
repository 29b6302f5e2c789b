"""LongMem with an empty bank: what its SideNet alone is worth."""

from __future__ import annotations

from collections.abc import Sequence

from longmem.contenders.contender import Contender, Prompt, View
from longmem.data import Document


class LongMemEmpty(Contender):
    name = "longmem-empty"
    title = "LongMem, told nothing"
    order = 65
    memory = 1.0

    def learn(self, documents: Sequence[Document]) -> None:
        pass

    def view(self, prompt: Prompt) -> View:
        return self.fitted([], prompt, min(self.config.window, self.model.backbone.max_positions))

    def kept_bytes(self) -> int:
        return 0
