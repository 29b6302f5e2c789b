"""Many-shot in-context learning: labelled examples told in advance, a few of them in the prompt (paper, section 3.4).

SST-2, MR, Subj, SST-5, MPQA. The labels' words are the only answers that are compared.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from longmem.contenders.contender import Prompt
from longmem.data import Document
from longmem.tasks.task import Answer, Case, Measure, Round, Task

_BANK, _TOGETHER = 2000, 20  # examples told, and how many of them are one document


@dataclass(frozen=True)
class Labelled:
    """A data set: where its files are, and what its labels and an example are called."""

    folder: str
    train: str
    test: str
    words: tuple[str, ...]
    noun: str = "Review"
    verb: str = "Sentiment"


SETS = {
    "SST-2": Labelled("SST-2", "train.tsv", "dev.tsv", ("negative", "positive")),
    "MR": Labelled("mr", "train.csv", "test.csv", ("negative", "positive")),
    "Subj": Labelled("subj", "train.csv", "test.csv", ("subjective", "objective"), "Input", "Type"),
    "SST-5": Labelled("sst-5", "train.csv", "test.csv", ("terrible", "bad", "okay", "good", "great")),
    "MPQA": Labelled("mpqa", "train.csv", "test.csv", ("negative", "positive")),
}


class ManyShot(Task):
    name = "many-shot-4"
    title = "classification, many labelled examples told, 4 in the prompt"
    order = 70
    measures = (Measure("accuracy"), Measure("log-probability", "number"))
    shots = 4

    def rounds(self) -> Iterator[Round]:
        for number, (kind, labelled) in enumerate(self.sets.items()):
            train, test = (self.examples(labelled, file) for file in (labelled.train, labelled.test))
            for draw in range(self.config.draws):
                rng = self.rng(number, draw)
                order = rng.permutation(len(train))
                told = [self.shown(labelled, *train[place]) for place in order[:_BANK]]
                told = told[: self.fitting(told)]
                shots = "".join(
                    f"{self.shown(labelled, *train[place])}\n\n" for place in order[_BANK : _BANK + self.shots]
                )
                asked = [test[place] for place in rng.permutation(len(test))[: self.each]]
                groups = range(0, len(told), _TOGETHER)
                documents = [Document(f"{kind} {n}", "\n\n".join(told[n : n + _TOGETHER])) for n in groups]
                yield Round(tuple(documents), tuple(self.case(kind, labelled, shots, *example) for example in asked))

    def rng(self, *more: int) -> np.random.Generator:
        """The same whatever the number of shots: the same is told and asked, and what was made of it is kept."""
        return np.random.default_rng((self.config.seed, *b"many-shot", *more))

    def strange(self, one: Round, other: Round) -> bool:
        """Examples of another data set."""
        return one.cases[0].kind != other.cases[0].kind

    @property
    def sets(self) -> dict[str, Labelled]:
        return dict(list(SETS.items())[:2]) if self.short else SETS

    @property
    def each(self) -> int:
        """Cases of a set and draw."""
        return max(1, self.config.cases // len(self.sets))

    def fitting(self, told: list[str]) -> int:
        """How many examples there are in the tokens to be told, where fewer than all were asked for."""
        sizes = np.cumsum([len(self.tokens(each)) + 1 for each in told])
        # 2,000 examples are some 80,000 tokens, which is what a full run is about.
        return max(1, int((sizes <= self.config.told).sum())) if self.short else len(told)

    def case(self, kind: str, labelled: Labelled, shots: str, text: str, label: int) -> Case:
        prompt = Prompt(f"{shots}{self.shown(labelled, text)}", text, room=8)
        return Case(prompt, (labelled.words[label],), labelled.words, kind=kind)

    def shown(self, labelled: Labelled, text: str, label: int | None = None) -> str:
        word = "" if label is None else f" {labelled.words[label]}"
        return f"{labelled.noun}: {text}\n{labelled.verb}:{word}"

    def examples(self, labelled: Labelled, name: str) -> list[tuple[str, int]]:
        """Texts and labels of a file."""
        path = self.data_file("icl_classification", labelled.folder, name)
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".tsv":
                rows = [line.rstrip("\n").rsplit("\t", 1) for line in list(file)[1:]]
                return [(text.strip(), int(label)) for text, label in rows]
            return [(text.strip(), int(label)) for label, text in csv.reader(file)]

    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        return {"accuracy": float(answer.text == case.answers[0]), "log-probability": answer.log_probability}


class ManyShot20(ManyShot):
    name = "many-shot-20"
    title = "the same with 20 in the prompt"
    order = 71
    shots = 20
