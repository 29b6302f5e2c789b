"""LongMem: all that it was told is in its bank, the last of it in its window as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from longmem.bank import BankEntry, MemoryBank
from longmem.contenders.contender import ContenderConfig
from longmem.contenders.kept import Kept
from longmem.contenders.window import Window
from longmem.data import Document
from longmem.evals.answers import encode_texts
from longmem.model import LongMem

# Tokens of texts that may be told again.
_KEPT = {"cpu": 1 << 17, "cuda": 1 << 22}


class LongMemContender(Window):
    name = "longmem"
    title = "LongMem, bank on, last tokens in its window"
    order = 70
    memory = 1.0

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        super().__init__(model, config)
        self.bank, self._text_bytes = model.new_bank(), 0
        # Texts that are told again are not encoded again. They count as if they were.
        most = _KEPT.get(model.device.type, _KEPT["cpu"])
        self._encoded: Kept[BankEntry] = Kept(most, lambda text, entry: len(entry))

    def learn(self, documents: Sequence[Document]) -> MemoryBank:
        self._told = self.last_of(documents)
        return self.remember(documents)

    def remember(self, documents: Sequence[Document]) -> MemoryBank:
        """A new bank of documents."""
        self.bank = self.model.new_bank()
        texts = list(dict.fromkeys(document.text for document in documents))
        entries = {text: entry for text in texts if (entry := self._encoded.get(text)) is not None}
        for text, entry in self._encode([text for text in texts if text not in entries]).items():
            entries[text] = entry
            self._encoded.put(text, entry)
        for number, document in enumerate(documents):
            entry = entries[document.text]
            self.bank.append(dataclasses.replace(entry, source=f"{number} {document.name}"))
            self.cost.told_tokens += len(entry)
        self._text_bytes = sum(len(text.encode()) for text in texts)
        return self.bank

    def _encode(self, texts: list[str]) -> dict[str, BankEntry]:
        if self.model.device.type == "cpu":  # there is a shorter way for one at a time
            return {text: self.model.encode_text(text, source="") for text in texts}
        return dict(zip(texts, encode_texts(self.model, texts), strict=True))

    def kept_bytes(self) -> int:
        keys_HNE = self.bank.keys_HNE
        return super().kept_bytes() + 2 * keys_HNE.numel() * keys_HNE.element_size() + self._text_bytes
