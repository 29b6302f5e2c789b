"""The backbone with the last of what it was told in its window."""

from __future__ import annotations

from collections.abc import Sequence

from longmem.bank import MemoryBank
from longmem.contenders.contender import Contender, ContenderConfig, Prompt, View, joined
from longmem.data import Document
from longmem.model import LongMem

_LETTERS = 8  # a token has at most, on average: so far back a text is tokenised


class Window(Contender):
    name = "window"
    title = "backbone, last tokens in its window"
    order = 10

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        super().__init__(model, config)
        self.size = min(config.window, model.backbone.max_positions)
        self._told: list[int] = []
        self._kept = 0

    def learn(self, documents: Sequence[Document]) -> MemoryBank | None:
        self._told = self.last_of(documents)

    def last_of(self, documents: Sequence[Document]) -> list[int]:
        """The last tokens, as many as a window has at most."""
        return self.reader.tokenize(joined(documents)[-_LETTERS * self.size :])[-self.size :]

    def view(self, prompt: Prompt) -> View:
        view = self.fitted(self._told, prompt, self.size)
        self._kept = len(view.told)
        self.seen = (self.model.tokenizer.decode(view.told, skip_special_tokens=True),)
        return view

    def kept_bytes(self) -> int:
        return self._kept * self.reader.bytes_a_token
