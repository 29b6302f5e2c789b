"""What contenders have in common: they are told documents, then asked about them.

A contender says what stands in the model's window for a prompt (`view`) and what else the model has (a bank); reading,
answering and counting what it costs are the same for all.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from longmem.attention import MemoryRead
from longmem.attribution import attribute
from longmem.bank import MemoryBank
from longmem.contenders.reader import Reader
from longmem.data import Document
from longmem.errors import ConfigError
from longmem.focus import FOCUS, Focus
from longmem.focus import check as check_focus
from longmem.model import LongMem

GAP = "\n\n"
_STEP = 64  # tokens by which told text is cut, so that prompts of about one length find the same text before them


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        text: what stands last in the window, without a space at the end; what follows it is the answer.
        query: what to look for in the documents; the text itself if empty.
        opening: what stands first in the window, such as a system prompt.
        evidence: what tells the answer, for a contender that is shown it; None if the task does not name it.
        room: tokens of the longest answer, which must fit behind the text.
    """

    text: str
    query: str = ""
    opening: str = ""
    evidence: tuple[str, ...] | None = None
    room: int = 32

    @property
    def wanted(self) -> str:
        return self.query or self.text


@dataclass(frozen=True)
class View:
    """Token ids in the model's window.

    Attributes:
        told: what is there before anything is asked.
        asked: what the prompt brings.
    """

    told: list[int]
    asked: list[int]


@dataclass(frozen=True)
class Posed:
    """A prompt in its window, to be answered at any time.

    Attributes:
        token_ids: of the window, the prefix token left out.
        bank: what the model reads beside it.
        seen: what of the documents stands in the window.
    """

    token_ids: tuple[int, ...]
    bank: MemoryBank | None
    seen: tuple[str, ...] = ()


@dataclass(frozen=True)
class ContenderConfig:
    """What contenders may use.

    Attributes:
        window: tokens of every contender's window but the extended ones', answer included.
        extended: tokens of the long window.
        stretched: tokens of a window that is longer than the trained one.
        chunk: tokens of a retrieved piece of text at most.
        chunks: how many are put into the window.
        focus: tokens that are read of a bank at most, as `generate` does (`longmem.focus`); 0 is all.
        paper: folder of a SideNet trained by the paper's recipe.
    """

    window: int = 1024
    extended: int = 8192
    stretched: int = 32768
    chunk: int = 128
    chunks: int = 4
    focus: int = FOCUS
    paper: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("window", 64), ("extended", 64), ("stretched", 64), ("chunk", 8), ("chunks", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        check_focus(self.focus)


@dataclass
class Cost:
    """What a contender spent.

    Attributes:
        told_tokens: read when it was told something.
        asked_tokens: read when it was asked, answers left out.
        first_seconds: from each prompt to the first token of the answer.
        said_tokens: generated.
        said_seconds: the time that took.
        kept_bytes: the most that was kept of what it was told, in memory or on disk.
    """

    told_tokens: int = 0
    asked_tokens: int = 0
    first_seconds: list[float] = field(default_factory=list)
    said_tokens: int = 0
    said_seconds: float = 0.0
    kept_bytes: int = 0


class Contender(ABC):
    """A way to use documents that were told in advance.

    Args:
        model: whose backbone every contender uses; `memory` says whether its SideNet is used too.

    Attributes:
        converses: it asks the model while it learns or before it answers.

    Raises:
        UnavailableError: it cannot be used here; says why.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    order: ClassVar[int] = 1000
    memory: ClassVar[float] = 0.0
    converses: ClassVar[bool] = False

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        self.model, self.config, self.cost = model, config, Cost()
        self.reader = Reader(model, self.memory)
        self._prompt: Prompt | None = None
        self._told_bank: MemoryBank | None = None
        self._focus = Focus(config.focus)
        self.seen: tuple[str, ...] = ()
        self.others: tuple[Document, ...] = ()

    @abstractmethod
    def learn(self, documents: Sequence[Document]) -> MemoryBank | None:
        """Take in documents instead of earlier ones; a bank is what the model reads beside its window."""

    @abstractmethod
    def view(self, prompt: Prompt) -> View:
        """What the window holds when the prompt is asked."""

    @abstractmethod
    def kept_bytes(self) -> int:
        """How much is kept of the documents."""

    def drawn_on(self) -> tuple[str, ...]:
        """What of the documents the last prompt was answered from, as far as can be told."""
        return drawn_on(self.reader.reads, self.reader.bank) + self.seen

    def prepare(self, documents: Sequence[Document], others: Sequence[Document] = ()) -> None:
        """Be told documents; what was told earlier is forgotten. `others` are what is told in another case."""
        self.reader.forget()
        self.others = tuple(others)
        self._told_bank = self.learn(documents)
        self.reader.forget(self._told_bank)
        self._prompt = None

    def rehearse(self, prompt: Prompt) -> None:
        """Begin an answer and forget it: what a device gets ready at first is nobody's cost."""
        cost, self.cost = self.cost, Cost()
        self.generate(prompt, most=2)
        self.cost, self._prompt = cost, None
        self.reader.forget(self._told_bank)

    def pose(self, prompt: Prompt) -> Posed:
        """A prompt in its window; not read yet."""
        self._prompt = None  # the view may read something else
        view = self.view(prompt)
        token_ids = (*view.told, *view.asked)
        return Posed(token_ids, self._read_of_bank(token_ids), self.seen)

    def _read_of_bank(self, token_ids: Sequence[int]) -> MemoryBank | None:
        """What is read for a window of what is remembered."""
        if self._told_bank is None or not self._focus.chooses(self._told_bank):
            return self._told_bank
        read = self._focus.on(self._told_bank, token_ids)
        assert isinstance(read, MemoryBank)
        return read

    def log_likelihood(self, prompt: Prompt, continuation: str) -> list[float]:
        """Log-probability of each token of a continuation, which follows the prompt as it is, in nats."""
        return self.likelihood(prompt, continuation)[0]

    def likelihood(self, prompt: Prompt, continuation: str) -> tuple[list[float], bool]:
        """`log_likelihood`, and whether the model would say just that."""
        self._read(prompt)
        return self.reader.log_likelihoods(self.reader.tokenize(continuation))

    def generate(self, prompt: Prompt, stop: Sequence[str] = (), most: int = 0) -> str:
        """What the model answers, greedily, up to a stop string (left out) or so many tokens; 0 is `prompt.room`."""
        self._read(prompt)
        start = time.perf_counter()
        text, tokens = self.reader.say(most or prompt.room, stop)
        # The first token is there when the prompt is read.
        self.cost.said_tokens += max(0, tokens - 1)
        self.cost.said_seconds += time.perf_counter() - start
        return text

    def fitted(self, told: Sequence[int], prompt: Prompt, window: int) -> View:
        """A window of so many tokens: as much of the prompt's end as fits, and before it as much of the told text's
        end as fits (in steps of 64 tokens)."""
        opening, text = self.reader.tokenize(prompt.opening), self.reader.tokenize(prompt.text)
        left = window - 1 - prompt.room - len(opening)
        if left < 8:
            raise ConfigError(
                f"A window of {window} tokens has no room for a prompt and an answer of {prompt.room} tokens. "
                "Make the window larger."
            )
        text = text[-left:]
        room = left - len(text)
        if len(told) > room:
            told = told[len(told) - room // _STEP * _STEP :]
        return View(opening + list(told), text)

    def shown(self, best_first: Sequence[str], prompt: Prompt) -> View:
        """Pieces before the prompt, the best one last, as many as fit half of the window; a long prompt keeps the other
        half."""
        window = min(self.config.window, self.model.backbone.max_positions)
        opening, found = self.reader.tokenize(prompt.opening), []
        self.seen = ()
        for piece in best_first:
            more = self.reader.tokenize(piece + GAP)
            if len(found) + len(more) > (window - prompt.room) // 2:
                break
            found = more + found
            self.seen = (piece, *self.seen)
        text = self.fitted([], prompt, window - len(found)).asked
        return View(opening, found + text)

    def _read(self, prompt: Prompt) -> None:
        if prompt == self._prompt:
            return  # read already
        self.reader.wait()
        start = time.perf_counter()
        view = self.view(prompt)
        if (bank := self._read_of_bank(view.told + view.asked)) is not self.reader.bank:
            self.reader.forget(bank)
            self.reader.wait()
        seconds = time.perf_counter() - start
        # Beside a part of the bank, which the prompt chooses, told text is read when it has come.
        if view.told and bank is self._told_bank:
            self.cost.told_tokens += self.reader.read(view.told)
            self.reader.wait()
        start = time.perf_counter()
        self.cost.asked_tokens += self.reader.read(view.told + view.asked)
        self.reader.wait()
        self.cost.first_seconds.append(seconds + time.perf_counter() - start)
        self.cost.kept_bytes = max(self.cost.kept_bytes, self.kept_bytes())
        self._prompt = prompt


def drawn_on(reads: Sequence[MemoryRead], bank: MemoryBank | None, row: int = 0) -> tuple[str, ...]:
    """The stretches of a bank that the last token drew on most."""
    return () if bank is None else tuple(each.text for each in attribute(reads, bank, row=row))


def joined(documents: Sequence[Document]) -> str:
    """Documents as one text."""
    return "".join(document.text + GAP for document in documents)
