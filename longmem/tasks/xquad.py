"""XQuAD: paragraphs of Wikipedia told in advance, questions about them (Artetxe et al. 2020; CC BY-SA 4.0)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from longmem.data import Document
from longmem.errors import UnavailableError
from longmem.tasks.scoring import QuestionTask, asking
from longmem.tasks.task import Case, Round


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
        rng = self.rng()
        told, size = [], 0
        for place in rng.permutation(len(paragraphs)):
            told.append(place)
            size += len(self.tokens(paragraphs[place]["context"]))
            if size >= self.config.told:
                break
        documents = tuple(Document(f"paragraph {place}", paragraphs[place]["context"]) for place in sorted(told))
        asked = [
            (question, paragraphs[place]["context"]) for place in sorted(told) for question in paragraphs[place]["qas"]
        ]
        some = rng.permutation(len(asked))[: self.config.cases]
        yield Round(documents, tuple(self.case(*asked[place]) for place in some))

    def case(self, question: dict, context: str) -> Case:
        answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
        return Case(asking(question["question"], (context,)), answers)
