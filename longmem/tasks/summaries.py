"""Summaries of long documents, told in advance, by a question.

Stories are of SQuALITY (Wang et al. 2022; CC BY 4.0), meetings of QMSum (Zhong et al. 2021; MIT). ROUGE is what the
library `rouge-score` says.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from longmem.contenders.contender import Prompt
from longmem.data import Document
from longmem.errors import UnavailableError
from longmem.evals.facts import opening_and_turn
from longmem.tasks.task import Answer, Case, Measure, Round, Task

Asked = tuple[str, tuple[str, ...], tuple[str, ...] | None]  # question, right answers, evidence
_RUN = 4  # words
_TYPES = ("rouge1", "rouge2", "rougeL")


class Summaries(Task):
    """Questions that ask for a summary."""

    measures = (
        Measure("ROUGE-L"),
        Measure("ROUGE-1"),
        Measure("ROUGE-2"),
        Measure("covered"),
        Measure("log-probability", "number"),
    )

    @abstractmethod
    def asked(self, row: dict[str, Any]) -> tuple[str, Sequence[Asked]]:
        """A document, and questions with right answers and, if known, evidence."""

    def documents_of(self, *parts: str) -> Iterator[Round]:
        if find_spec("rouge_score") is None:
            raise UnavailableError("rouge-score is not installed: pip install 'longmem[rouge]'")
        rows = [json.loads(line) for line in self.data_file(*parts).read_text("utf-8").split("\n") if line.strip()]
        rng, left = self.rng(), self.config.cases
        documents = [self.asked(rows[place]) for place in rng.permutation(len(rows))]
        if self.short:
            documents.sort(key=lambda each: len(each[0]))
        for text, questions in documents:
            some = [questions[n] for n in rng.permutation(len(questions))[: min(left, 4)]]
            left -= len(some)
            if some:
                yield Round((Document("document", text),), tuple(self.case(*each) for each in some))

    def case(self, question: str, answers: tuple[str, ...], evidence: tuple[str, ...] | None) -> Case:
        most = 48 if self.short else 192
        room = max(most, len(self.tokens(answers[0])) + 8)
        opening, turn = opening_and_turn(self.tokenizer, f"{question} Answer in a paragraph.")
        return Case(Prompt(turn, question, opening, evidence, room), answers, stop=(), most=most)

    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        found = [rouge(answer.text, reference) for reference in case.answers]
        best = {kind: max(each[kind] for each in found) for kind in _TYPES}
        named = {"ROUGE-L": best["rougeL"], "ROUGE-1": best["rouge1"], "ROUGE-2": best["rouge2"]}
        if case.prompt.evidence:
            named["covered"] = covered(case.prompt.evidence, answer.drawn_on)
        return named | {"log-probability": answer.log_probability / max(1, answer.tokens)}


def rouge(text: str, reference: str) -> dict[str, float]:
    """F-measures."""
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    scores = RougeScorer(list(_TYPES), use_stemmer=True).score(reference, text)
    return {kind: scores[kind].fmeasure for kind in _TYPES}


def covered(evidence: Sequence[str], drawn_on: Sequence[str]) -> float:
    """Which share of the evidence stands in what an answer was drawn from: of its runs of four words."""

    def runs(texts: Sequence[str]) -> set[tuple[str, ...]]:
        words = [text.lower().split() for text in texts]
        return {tuple(some[n : n + _RUN]) for some in words for n in range(len(some) - _RUN + 1)}

    gold = runs(evidence)
    return len(gold & runs(drawn_on)) / len(gold) if gold else 0.0


class Squality(Summaries):
    name = "squality"
    title = "SQuALITY: summaries of stories by question"
    order = 50

    def rounds(self) -> Iterator[Round]:
        return self.documents_of("squality", "dev.jsonl")

    def asked(self, row: dict[str, Any]) -> tuple[str, Sequence[Asked]]:
        questions = [
            (each["question_text"], tuple(r["response_text"] for r in each["responses"]), None)
            for each in row["questions"]
        ]
        return row["document"], questions


class QmSum(Summaries):
    name = "qmsum"
    title = "QMSum: summaries of meetings by question"
    order = 51

    def rounds(self) -> Iterator[Round]:
        return self.documents_of("qmsum", "ALL_val.jsonl")

    def asked(self, row: dict[str, Any]) -> tuple[str, Sequence[Asked]]:
        turns = [f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"]]
        questions = [
            (each["query"], (each["answer"],), (self.span(turns, each["relevant_text_span"]),))
            for each in row["specific_query_list"]
        ]
        return "\n".join(turns), questions

    def span(self, turns: Sequence[str], spans: Sequence[Sequence[str]]) -> str:
        return "\n".join(turn for first, last in spans for turn in turns[int(first) : int(last) + 1])
