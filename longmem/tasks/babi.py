"""bAbI: one supporting fact among others (Weston et al. 2015; CC BY 3.0). Stories told in advance, then asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from longmem.contenders.contender import Prompt
from longmem.data import Document
from longmem.tasks.task import Answer, Case, Measure, Round, Task

_FILES = {"one fact": "qa1_single-supporting-fact_test.txt", "relations": "qa4_two-arg-relations_test.txt"}


class Babi(Task):
    name = "babi"
    title = "bAbI: where people and places are, among the places there are"
    order = 43
    measures = (Measure("right"), Measure("log-probability", "number"))

    def rounds(self) -> Iterator[Round]:
        each = -(-self.config.cases // len(_FILES))
        for number, (kind, name) in enumerate(_FILES.items()):
            text = self.data_file("babi", "en", name).read_text("utf-8")
            stories = list(self.stories(text))
            places = tuple(sorted({answer for _, (_, answer, _) in stories}))
            for place in self.rng(number).permutation(len(stories))[:each]:
                lines, (question, answer, support) = stories[place]
                evidence = tuple(lines[line] for line in support)
                prompt = Prompt(f"Question: {question}\nAnswer: the", question, evidence=evidence, room=8)
                yield Round(
                    (Document("story", "\n".join(lines.values())),), (Case(prompt, (answer,), places, kind=kind),)
                )

    def stories(self, text: str) -> Iterator[tuple[dict[int, str], tuple[str, str, list[int]]]]:
        """Lines told before each question, by their number; and question, answer, supporting lines."""
        lines: dict[int, str] = {}
        for row in text.splitlines():
            number, _, rest = row.partition(" ")
            if number == "1":
                lines = {}
            question, *more = rest.replace("|", "\t").split("\t")
            if more:
                yield dict(lines), (question.strip(), more[0], [int(each) for each in more[1].split()])
            else:
                lines[int(number)] = rest

    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        return {"right": float(answer.text == case.answers[0]), "log-probability": answer.log_probability}
