"""Long-context language modelling: the next 256 tokens of a held-out text, behind 512 tokens of it in the prompt and
everything before those told in advance, in growing amounts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from longmem.contenders.contender import Prompt
from longmem.data import Document, read_documents
from longmem.errors import UnavailableError
from longmem.probe.text import python_documents
from longmem.tasks.task import Answer, Case, Measure, Round, Task

_SCORED, _BEFORE = 256, 512


class Language(Task):
    name = "language"
    title = "next tokens of a text, its past told"
    order = 60
    measures = (Measure("perplexity", "perplexity", higher=False),)

    def rounds(self) -> Iterator[Round]:
        sizes = sorted({size for size in (1024, 4096, 16384, 65536) if size <= self.config.told} | {self.config.told})
        needed = sizes[-1] + _BEFORE + _SCORED
        count = max(1, self.config.cases // len(sizes))
        found = 0
        for number, document in enumerate(self.documents()):
            encoded = self.tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
            starts = [start for start, _ in encoded["offset_mapping"]]
            if len(starts) <= needed:
                continue
            found += 1
            asked = sizes[-1] + int(self.rng(number).integers(len(starts) - needed))
            first, last = (starts[asked + tokens] for tokens in (_BEFORE, _BEFORE + _SCORED))
            for size in sizes:
                told = document.text[starts[asked - size] : starts[asked]]
                prompt = Prompt(
                    document.text[starts[asked] : first], self.query(document.text[:first]), room=_SCORED + 16
                )
                case = Case(prompt, continuation=document.text[first:last], kind=f"{size:,} told")
                yield Round((Document(document.name, told),), (case,))
            if found == count:
                return
        if not found:
            raise UnavailableError(f"no text has the {needed:,} tokens that are told and asked")

    def strange(self, one: Round, other: Round) -> bool:
        """As much of another text."""
        return one.cases[0].kind == other.cases[0].kind and one.documents[0].name != other.documents[0].name

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
