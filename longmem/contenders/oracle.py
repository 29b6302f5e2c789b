"""The backbone with the evidence itself in its window: the ceiling of what retrieving could give."""

from __future__ import annotations

from collections.abc import Sequence

from longmem.contenders.contender import GAP, Contender, Prompt, View
from longmem.data import Document
from longmem.errors import UnavailableError


class Oracle(Contender):
    name = "oracle"
    title = "backbone, shown the evidence"
    order = 1000

    def learn(self, documents: Sequence[Document]) -> None:
        pass

    def view(self, prompt: Prompt) -> View:
        if prompt.evidence is None:
            raise UnavailableError("the task does not say where the answers stand")
        self.seen = prompt.evidence
        evidence = self.reader.tokenize("".join(each + GAP for each in prompt.evidence))
        fitted = self.fitted(evidence, prompt, min(self.config.window, self.model.backbone.max_positions))
        return View([], fitted.told + fitted.asked)

    def kept_bytes(self) -> int:
        return 0
