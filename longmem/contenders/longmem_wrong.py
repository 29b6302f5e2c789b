"""LongMem with the bank of another case: what memory costs, or seems to give, when it has nothing to do with the
question."""

from __future__ import annotations

from collections.abc import Sequence

from longmem.bank import MemoryBank
from longmem.contenders.longmem import LongMemContender
from longmem.data import Document
from longmem.errors import UnavailableError


class LongMemWrong(LongMemContender):
    name = "longmem-wrong"
    title = "LongMem, another case's bank, last tokens in its window"
    order = 66

    def learn(self, documents: Sequence[Document]) -> MemoryBank:
        if not self.others:
            raise UnavailableError("no other case is about something else, so there are no others to tell")
        self._told = self.last_of(documents)
        return self.remember(self.others)
