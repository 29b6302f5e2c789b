"""LongMem: what it was told is in its bank, and its window holds the prompt alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from longmem.bank import BankEntry, MemoryBank
from longmem.contenders.contender import Contender, ContenderConfig, Prompt, View
from longmem.data import Document
from longmem.evals.answers import encode_texts
from longmem.model import LongMem


class LongMemContender(Contender):
    name = "longmem"
    title = "LongMem, bank on"
    order = 70
    memory = 1.0

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        super().__init__(model, config)
        self.bank = model.new_bank()
        # Texts that are told again, in the next documents, are not encoded again. They count as if they were.
        self._encoded: dict[str, BankEntry] = {}

    def learn(self, documents: Sequence[Document]) -> MemoryBank:
        known, self._encoded, self.bank = self._encoded, {}, self.model.new_bank()
        texts = list(dict.fromkeys(document.text for document in documents))
        self._encoded = {text: known[text] for text in texts if text in known}
        self._encoded |= self._encode([text for text in texts if text not in known])
        for number, document in enumerate(documents):
            entry = self._encoded[document.text]
            self.bank.append(dataclasses.replace(entry, source=f"{number} {document.name}"))
            self.cost.told_tokens += len(entry)
        return self.bank

    def _encode(self, texts: list[str]) -> dict[str, BankEntry]:
        if self.model.device.type == "cpu":  # there is a shorter way for one at a time
            return {text: self.model.encode_text(text, source="") for text in texts}
        return dict(zip(texts, encode_texts(self.model, texts), strict=True))

    def view(self, prompt: Prompt) -> View:
        return self.fitted([], prompt, min(self.config.window, self.model.backbone.max_positions))

    def kept_bytes(self) -> int:
        keys_HNE = self.bank.keys_HNE
        return 2 * keys_HNE.numel() * keys_HNE.element_size() + sum(len(text.encode()) for text in self._encoded)
