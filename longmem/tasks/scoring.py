"""How answers in words are compared with right ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from longmem.contenders.contender import Prompt
from longmem.tasks.task import Answer, Case, Measure, Task

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles (as SQuAD compares answers)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(text: str, answers: Sequence[str]) -> float:
    return float(any(normalised(text) == normalised(answer) for answer in answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, with the answer it fits best."""

    def one(answer: str) -> float:
        said, right = normalised(text).split(), normalised(answer).split()
        common = sum((Counter(said) & Counter(right)).values())
        return 2 * common / (len(said) + len(right)) if common else 0.0

    return max(map(one, answers), default=0.0)


def found(texts: Sequence[str], answers: Sequence[str]) -> float:
    """Whether a right answer stands in one of some texts."""
    told = [f" {normalised(text)} " for text in texts]
    return float(any(f" {normalised(answer)} " in text for answer in answers for text in told))


# An answered question shows a small backbone that a few words are wanted; without it, most answers are empty.
_SHOWN = "Question: Who wrote the letter?\nAnswer: Anna Berg\n\n"


def asking(question: str, evidence: tuple[str, ...] | None, room: int = 24) -> Prompt:
    """A question as plain text, after one that is answered."""
    return Prompt(f"{_SHOWN}Question: {question.strip()}\nAnswer:", question, evidence=evidence, room=room)


class QuestionTask(Task):
    """Questions with short answers."""

    measures = (Measure("F1"), Measure("exact"), Measure("found"), Measure("log-probability", "number"))

    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        return {
            "F1": f1(answer.text, case.answers),
            "exact": exact(answer.text, case.answers),
            "found": found(answer.drawn_on, case.answers),
            "log-probability": answer.log_probability,
        }
