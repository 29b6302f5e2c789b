"""One thing hidden in generated haystacks: the pass keys and pairs of `longmem eval recall`, for every contender."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from longmem.contenders.contender import Prompt
from longmem.data import Document
from longmem.evals.answers import RIGHT, answer_in
from longmem.evals.recall import RecallConfig, needles
from longmem.tasks.task import Answer, Case, Measure, Round, Task

_PASSAGE = 512


class PassKey(Task):
    name = "passkey"
    title = "a pass key hidden in remembered text"
    order = 10
    measures = (Measure("right"), Measure("log-probability", "number"))

    def rounds(self) -> Iterator[Round]:
        config = RecallConfig(
            (self.name,), (max(self.config.told, _PASSAGE),), self.config.cases, seed=self.config.seed
        )
        texts = self.filler(config.remembered[0])
        for needle in needles(self.name, config):
            place = int(needle.depth * len(texts))
            told = [*texts]
            told[place] = needle.hidden_in(texts[place], needle.evidence)
            query = needle.prompt.partition("?")[0]
            prompt = Prompt(needle.prompt, query, evidence=(told[place],), room=8)
            documents = tuple(Document(f"passage {number}", text) for number, text in enumerate(told))
            yield Round(documents, (Case(prompt, (needle.answer,), notes=needle.labels),))

    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        given = answer_in(answer.text, list(case.notes))
        right = given is not None and case.notes[given] == RIGHT
        return {"right": float(right), "log-probability": answer.log_probability}


class Pairs(PassKey):
    name = "pairs"
    title = "the value of a key, among four hidden side by side"
    order = 11
