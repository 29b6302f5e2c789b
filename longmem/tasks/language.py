"""Long-context language modelling: the next 256 tokens of a held-out text, behind 512 tokens of it in the prompt and
everything before those told in advance, in growing amounts. What is told beyond 65,536 tokens is other texts, as in a
bank that has grown for long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from longmem.contenders.contender import Prompt
from longmem.data import Document, read_documents
from longmem.errors import UnavailableError
from longmem.probe.text import python_documents
from longmem.tasks.task import Answer, Case, Measure, Round, Task, TaskConfig

_SCORED, _BEFORE = 256, 512
_SIZES = (1024, 4096, 16384, 65536, 262144, 1048576)
_PAST = 65536  # tokens of a text's own past at most; few texts have more


class Language(Task):
    name = "language"
    title = "next tokens of a text, its past told"
    order = 60
    measures = (Measure("perplexity", "perplexity", higher=False),)

    def __init__(self, config: TaskConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._starts: dict[str, np.ndarray] = {}

    def rounds(self) -> Iterator[Round]:
        sizes = sorted({size for size in _SIZES if size <= self.config.told} | {self.config.told})
        past = min(sizes[-1], _PAST)
        needed = past + _BEFORE + _SCORED
        count = max(1, self.config.cases // len(sizes))
        found = 0
        texts = list(self.documents()) if sizes[-1] > past else []
        for number, document in enumerate(texts or self.documents()):
            starts = self.starts(document.text)
            if len(starts) <= needed:
                continue
            found += 1
            asked = past + int(self.rng(number).integers(len(starts) - needed))
            first, last = (starts[asked + tokens] for tokens in (_BEFORE, _BEFORE + _SCORED))
            for size in sizes:
                own = Document(document.name, document.text[starts[asked - min(size, past)] : starts[asked]])
                more = self.others(texts[number + 1 :] + texts[:number], size - past)
                prompt = Prompt(
                    document.text[starts[asked] : first], self.query(document.text[:first]), room=_SCORED + 16
                )
                case = Case(prompt, continuation=document.text[first:last], kind=f"{size:,} told")
                yield Round((*more, own), (case,))
            if found == count:
                return
        if not found:
            raise UnavailableError(f"no text has the {needed:,} tokens that are told and asked")

    def others(self, texts: Sequence[Document], tokens: int) -> list[Document]:
        """Other texts, of so many tokens together."""
        some: list[Document] = []
        for each in texts:
            if tokens <= 0:
                break
            starts = self.starts(each.text)
            some.append(Document(each.name, each.text[: starts[tokens]] if tokens < len(starts) else each.text))
            tokens -= len(starts)
        if tokens > 0:
            raise UnavailableError(f"the texts are too few: {tokens:,} more tokens are to be told")
        return some

    def starts(self, text: str) -> np.ndarray:
        """Where each token starts."""
        if text not in self._starts:
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            self._starts[text] = np.array([start for start, _ in offsets])
        return self._starts[text]

    def strange(self, one: Round, other: Round) -> bool:
        """As much, nothing of the same text."""
        own = one.documents[-1].name
        return one.cases[0].kind == other.cases[0].kind and own not in {each.name for each in other.documents}

    def documents(self) -> Iterator[Document]:
        """Held-out books, or else what every Python has."""
        if self.config.data is not None and (self.config.data / "books").is_dir():
            return read_documents([self.config.data / "books"])
        return python_documents()

    def query(self, text: str) -> str:
        """What to look for: the last sentences or so."""
        return text[-400:]

    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        return {"perplexity": -answer.log_probability / answer.tokens}
