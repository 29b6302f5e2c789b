"""A user's own task: their documents, and questions in a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longmem.data import read_documents, read_text
from longmem.errors import SourceError
from longmem.tasks.scoring import QuestionTask, asking
from longmem.tasks.task import Case, Round, TaskConfig

_WANTED = 'an object such as {"question": "…", "answer": "…", "evidence": "…"}, evidence being optional'


class OwnQuestions(QuestionTask):
    """Questions of a file about the documents of some paths.

    Args:
        documents: text files, JSONL files, folders of them.
        questions: JSONL; a line has `question`, `answer` (a string, or a list of right ones) and perhaps `evidence` (a
            string, or a list), which the contender `oracle` is shown.

    Raises:
        SourceError: names the file and the line that cannot be used.
    """

    name = "qa"
    title = "questions on documents told in advance"

    def __init__(self, documents: Sequence[Path], questions: Path, config: TaskConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._cases = tuple(read_questions(questions))
        self._documents = tuple(read_documents(documents))

    def rounds(self) -> Iterator[Round]:
        yield Round(self._documents, self._cases[: self.config.cases])


def read_questions(path: Path) -> Iterator[Case]:
    """Cases of a JSONL file.

    Raises:
        SourceError: names the line that cannot be used; also if there is no question at all.
    """
    # Not `splitlines`: JSON strings may hold other line separators, such as U+2028, as they are.
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SourceError(f"{path}, line {number}: not JSON ({error}). Expected {_WANTED}.") from error
        if not isinstance(row, dict):
            raise SourceError(f"{path}, line {number}: expected {_WANTED}; got {line[:60]!r}.")
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise SourceError(
                f"{path}, line {number}: `question` must be a text; got {question!r}. Expected {_WANTED}."
            )
        answers = _texts(row.get("answer"))
        if not answers:
            raise SourceError(
                f"{path}, line {number}: `answer` must be a text or a list of texts; got {row.get('answer')!r}. "
                f"Expected {_WANTED}."
            )
        evidence = row.get("evidence")
        if evidence is not None and not _texts(evidence):
            raise SourceError(f"{path}, line {number}: `evidence` must be a text or a list of texts; got {evidence!r}.")
        yield Case(asking(question, None if evidence is None else _texts(evidence)), answers)


def _texts(value: Any) -> tuple[str, ...]:
    """A text, or those of a list; none if anything else is there."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    fine = all(isinstance(each, str) and each.strip() for each in values)
    return tuple(each.strip() for each in values) if fine else ()
