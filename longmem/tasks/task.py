"""A task: documents that are told in advance, prompts about them, and how an answer is scored.

A file in this folder that defines a subclass of `Task` with a `name` is a task of `longmem eval compare`; so is any
other Python file, given by its path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from longmem.contenders.contender import Prompt
from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError, UnavailableError
from longmem.evals.answers import passages
from longmem.probe import default_documents


@dataclass(frozen=True)
class Case:
    """A prompt and what should follow it.

    Attributes:
        prompt: what is asked.
        answers: right ones; the first one's log-probability is measured, behind a space.
        choices: if given, the most probable of these is the answer, and nothing is generated.
        continuation: if given, only its probability is measured; it follows the prompt as it is.
        stop: strings that end an answer.
        most: tokens generated at most; as many as the prompt has room for if 0.
        kind: of case, such as the name of a data set; figures are also given for each kind.
        notes: whatever the task needs to score the answer.
    """

    prompt: Prompt
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    continuation: str = ""
    stop: tuple[str, ...] = ("\n",)
    most: int = 0
    kind: str = ""
    notes: Any = None


@dataclass(frozen=True)
class Round:
    """Documents told together, and what is asked about them."""

    documents: tuple[Document, ...]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Answer:
    """What came out of a case.

    Attributes:
        text: what was generated or chosen.
        log_probability: of the first right answer or the continuation, in nats; among choices, relative to these.
        tokens: that this probability is of.
        drawn_on: stretches of the documents that it was answered from, as far as can be told.
        log_probabilities: of each token of a continuation.
    """

    text: str
    log_probability: float
    tokens: int
    drawn_on: tuple[str, ...] = ()
    log_probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measure:
    """A figure of a task.

    Attributes:
        name: short, for a table.
        form: `percent` of a mean between 0 and 1, `number` as it is, or `perplexity`, e to the mean loss a token.
        higher: whether more is better.
    """

    name: str
    form: Literal["percent", "number", "perplexity"] = "percent"
    higher: bool = True


@dataclass(frozen=True)
class TaskConfig:
    """How much is asked.

    Attributes:
        data: folder of data sets, each in a folder of its own; tasks that need one are left out without it.
        cases: prompts a task, or a task and kind where kinds are few.
        told: tokens of generated haystacks, and about how many are told of a data set where one can choose.
        draws: of examples, for many-shot learning.
        seed: of everything drawn.
    """

    data: Path | None = None
    cases: int = 100
    told: int = 16384
    draws: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("cases", "told", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}.")


class Task(ABC):
    """What is told and asked.

    Args:
        tokenizer: of the backbone, to measure texts and to write its chat template.

    Raises:
        UnavailableError: its data are not here; says what is missing.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    order: ClassVar[int] = 1000
    # The first is the one in the summary.
    measures: ClassVar[tuple[Measure, ...]]

    def __init__(self, config: TaskConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer

    @abstractmethod
    def rounds(self) -> Iterator[Round]:
        """The same for a seed."""

    @abstractmethod
    def score(self, case: Case, answer: Answer) -> Mapping[str, float]:
        """Measure → value; those that mean nothing for a case are left out."""

    def other(self, rounds: Sequence[Round], number: int) -> Round | None:
        """A round that is told what has nothing to do with the cases of round `number`: the next one, from the first
        again behind the last; None if there is none."""
        following = [*rounds[number + 1 :], *rounds[:number]]
        return next((each for each in following if self.strange(rounds[number], each)), None)

    def strange(self, one: Round, other: Round) -> bool:
        """Whether what `other` is told has nothing to do with what `one` is asked."""
        return one.documents != other.documents

    def rng(self, *more: int) -> np.random.Generator:
        """Random numbers that no other task draws."""
        return np.random.default_rng((self.config.seed, *self.name.encode(), *more))

    def data_file(self, *parts: str) -> Path:
        """A file or folder of the data.

        Raises:
            UnavailableError: it is not there.
        """
        if self.config.data is None:
            raise UnavailableError(f"no data: give --data DIR with {'/'.join(parts)} in it")
        path = self.config.data.joinpath(*parts)
        if not path.exists():
            raise UnavailableError(f"no data: {'/'.join(parts)} is not in {self.config.data}")
        return path

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def short(self) -> bool:
        """Whether less is told than a full run tells: no place for long documents, many data sets and long answers."""
        return self.config.told < TaskConfig().told

    @cached_property
    def _filler(self) -> TokenizedDocuments:
        return default_documents(self.tokenizer)

    def filler(self, tokens: int, size: int = 512) -> list[str]:
        """Python's documentation in pieces of so many tokens, in random order."""
        return passages(self._filler, self.tokenizer, tokens=tokens, size=size, rng=self.rng(0))[0]
