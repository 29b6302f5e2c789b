"""XQuAD: paragraphs of Wikipedia told in advance, questions about them (Artetxe et al. 2020; CC BY-SA 4.0)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from longmem.data import Document
from longmem.errors import UnavailableError
from longmem.tasks.scoring import QuestionTask, asking
from longmem.tasks.task import Case, Round

_ROUNDS = 2


class XQuad(QuestionTask):
    name = "xquad"
    title = "XQuAD: questions on paragraphs told in advance"
    order = 40

    def rounds(self) -> Iterator[Round]:
        files = sorted(self.data_file("xquad").glob("*.json"))
        articles = [article for file in files for article in json.loads(file.read_text("utf-8"))["data"]]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        if not paragraphs:
            raise UnavailableError(f"no data: {self.data_file('xquad')} holds no paragraphs")
        # Two rounds, so that each has others' paragraphs to be told by mistake.
        rng, told, size = self.rng(), [[]], 0
        for place in rng.permutation(len(paragraphs)):
            if size >= self.config.told:
                if len(told) == _ROUNDS:
                    break
                told, size = [*told, []], 0
            told[-1].append(place)
            size += len(self.tokens(paragraphs[place]["context"]))
        for number, places in enumerate(told):
            some = [paragraphs[place] for place in sorted(places)]
            documents = tuple(Document(f"paragraph {place}", paragraphs[place]["context"]) for place in sorted(places))
            asked = [self.case(question, each["context"]) for each in some for question in each["qas"]]
            share = (self.config.cases + number) // len(told)
            if share:
                yield Round(documents, tuple(asked[place] for place in rng.permutation(len(asked))[:share]))

    def case(self, question: dict, context: str) -> Case:
        answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
        return Case(asking(question["question"], (context,)), answers)
