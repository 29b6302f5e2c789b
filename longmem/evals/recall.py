"""Recall of things hidden in remembered text: a pass key, or the value of a key among others.

A bank of N remembered tokens holds passages of other text, each a source of its own. One of them, at a random depth,
has the evidence at a random place of its text; it alone is encoded anew for a case, all others once. A bank knows no
positions, so depth matters only where keys are averaged in chunks. Which filler lies around matters much, so every case
has a stretch of its own of a pool of filler, where the pool is larger than the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longmem.bank import BankEntry
from longmem.data import TokenizedDocuments
from longmem.errors import ConfigError
from longmem.evals.answers import (
    RIGHT,
    Group,
    Outcome,
    Question,
    ask_everywhere,
    cases_at_once,
    encode_filler,
    encode_texts,
    joined,
    passages,
    save_json,
    score_group,
    under_all_conditions,
)
from longmem.focus import FOCUS
from longmem.focus import check as check_focus
from longmem.model import LongMem

TASKS = ("passkey", "pairs")
LABELS = (RIGHT, "wrong", "other")
_WORDS = (
    "acorn amber anchor apple arrow autumn badge basket beacon birch bottle bridge bronze button candle canyon carpet "
    "castle cedar chalk cherry circle clover cobalt coffee copper coral cotton cradle crystal desert dragon eagle "
    "ember engine falcon feather fern forest garden ginger glacier hammer harbor hazel helmet honey island ivory "
    "jacket jasper kettle ladder lantern lemon lily magnet maple marble meadow mirror mountain needle oak olive "
    "orchid oyster paper pebble pepper pillow planet pocket prairie puzzle rabbit ribbon river rocket saddle sailor "
    "shadow silver spider stone summer table thunder ticket timber tunnel valley velvet violet walnut whistle willow "
    "window winter yarrow"
)


@dataclass(frozen=True)
class RecallConfig:
    """What is hidden, and in how much.

    Attributes:
        tasks: any of `passkey` (five digits) and `pairs` (two words, asked by a key of eight hexadecimal digits).
        remembered: tokens of the bank, each size measured with the same cases.
        cases: questions a task and size.
        pairs: keys with values that stand side by side, one of which is asked for.
        pool: tokens of filler, of which the bank of every case is a stretch; at least those of the largest bank, which
            alone would stand among the same filler in all cases.
        passage: tokens of a piece of filler, and of the source that holds the evidence, without the evidence.
        context: tokens of other text, not remembered, that stand before the question in the window under every
            condition, as they would where a text is read on; at most `passage`.
        focus: tokens that are read of a bank at most, as `generate` does (`longmem.focus`); 0 is all.
        seed: of everything drawn.
    """

    tasks: tuple[str, ...] = TASKS
    remembered: tuple[int, ...] = (65536,)
    cases: int = 100
    pairs: int = 4
    pool: int = 0
    passage: int = 512
    context: int = 0
    focus: int = FOCUS
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            raise ConfigError(f"tasks must be some of {', '.join(TASKS)}; got {', '.join(self.tasks) or 'none'}.")
        for name in ("cases", "pairs", "passage"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.context <= self.passage:
            raise ConfigError(f"context must be from 0 to the {self.passage} tokens of a passage; got {self.context}.")
        check_focus(self.focus)
        if 4 * self.pairs > len(_WORDS.split()):
            raise ConfigError(f"pairs must be at most {len(_WORDS.split()) // 4}, or words run out; got {self.pairs}.")
        if not self.remembered or min(self.remembered) < self.passage:
            raise ConfigError(
                f"A bank holds at least one passage of {self.passage} tokens; got remembered="
                f"{', '.join(map(str, self.remembered)) or 'nothing'}. Remember more, or make passages shorter."
            )


@dataclass(frozen=True)
class Needle:
    """One case.

    Attributes:
        task: of `TASKS`.
        evidence: the sentences that are hidden.
        wrong: the same with other values.
        prompt: the question and its begun answer.
        answer: what follows.
        labels: answer → `answer`, `wrong` (what the wrong bank says) or `other` (of another key).
        depth: 0 … 1, where in the bank the passage lies.
        place: 0 … 1, where in the passage the evidence stands.
    """

    task: str
    evidence: str
    wrong: str
    prompt: str
    answer: str
    labels: dict[str, str]
    depth: float
    place: float

    def hidden_in(self, passage: str, evidence: str) -> str:
        """A passage with the evidence as a paragraph of its own, between two words at `place`."""
        gaps = [0, *(i for i, letter in enumerate(passage) if letter.isspace()), len(passage)]
        gap = gaps[int(self.place * len(gaps))]
        return f"{passage[:gap]}\n\n{evidence}\n\n{passage[gap:].lstrip()}"


@dataclass(frozen=True)
class RecallResult:
    """Rates of every task at every size.

    Attributes:
        groups: task → tokens of the bank → scores.
        bank_tokens: asked for → tokens that the filler has, on average over cases.
        filler_repeats: how often a passage of filler stands in the pool on average.
        cases: one row a question, size and task: what was asked and came out under each condition.
    """

    groups: dict[str, dict[int, Group]]
    bank_tokens: dict[int, int]
    filler_repeats: float
    cases: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        save_json(path, self.to_dict())


def needles(task: str, config: RecallConfig) -> list[Needle]:
    """The cases of a task: the same ones for a seed, however many are asked for."""
    return [
        _needle(task, config.pairs, np.random.default_rng((config.seed, TASKS.index(task), case)))
        for case in range(config.cases)
    ]


def _needle(task: str, pairs: int, rng: np.random.Generator) -> Needle:
    depth, place = rng.random(2).tolist()
    if task == "passkey":
        answer, wrong = map(str, 10000 + rng.choice(90000, size=2, replace=False))
        told, prompt = "The pass key is {}. Remember it.", "What is the pass key? The pass key is"
        labels = {answer: RIGHT, wrong: "wrong"}
        return Needle(task, told.format(answer), told.format(wrong), prompt, answer, labels, depth, place)
    keys = [f"{number:08x}" for number in rng.choice(1 << 32, size=pairs, replace=False)]
    # Each value shares no word with another.
    vocabulary = _WORDS.split()
    words = rng.choice(len(vocabulary), size=(2 * pairs, 2), replace=False)
    values = [f"{vocabulary[first]} {vocabulary[second]}" for first, second in words]
    told, wrong = (
        " ".join(f"The value of {key} is {value}." for key, value in zip(keys, some, strict=True))
        for some in (values[:pairs], values[pairs:])
    )
    asked = int(rng.integers(pairs))
    labels = dict.fromkeys(values, "other") | {values[asked]: RIGHT, values[pairs + asked]: "wrong"}
    prompt = f"What is the value of {keys[asked]}? The value of {keys[asked]} is"
    return Needle(task, told, wrong, prompt, values[asked], labels, depth, place)


def recall(
    model: LongMem,
    filler: TokenizedDocuments,
    config: RecallConfig = RecallConfig(),
    *,
    on_case: Callable[[int], None] | None = None,
) -> RecallResult:
    """Measure how often hidden things are recalled with the bank on, empty and wrong, and from the window.

    Args:
        filler: documents whose passages fill the bank, each at least one passage long; shorter ones are left out.
        on_case: progress, called with 1 for every passage encoded and every case asked (`steps` says how many).

    Raises:
        SourceError: no document has a passage.
        ConfigError: a passage with its question does not fit the backbone's window.
    """
    advance = on_case or (lambda steps: None)
    rng = np.random.default_rng(config.seed)
    size = _pooled(config) * config.passage + (config.passage if config.context else 0)
    texts, repeats = passages(filler, model.tokenizer, tokens=size, size=config.passage, rng=rng)
    opening = last_tokens(model, texts.pop(), config.context) + "\n\n" if config.context else ""
    entries = encode_filler(model, texts, advance)
    groups: dict[str, dict[int, Group]] = {task: {} for task in config.tasks}
    rows: list[dict[str, Any]] = []
    bank_tokens: dict[int, int] = {}
    for remembered in config.remembered:
        stretches = _stretches(entries, remembered // config.passage, config.cases)
        bank_tokens[remembered] = round(sum(len(each) for part in stretches for each in part) / config.cases)
        for task in config.tasks:
            outcomes = []
            hidden = list(zip(needles(task, config), stretches, strict=True))
            size = cases_at_once(model, remembered)
            for first in range(0, len(hidden), size):
                some = hidden[first : first + size]
                for (needle, _), found in zip(some, _outcomes(model, some, opening, config.focus), strict=True):
                    outcomes.append(found)
                    given = {name: dataclasses.asdict(outcome) for name, outcome in found.items()}
                    rows.append({"remembered": remembered, **dataclasses.asdict(needle), "outcomes": given})
                    advance(1)
            groups[task][remembered] = score_group(outcomes, LABELS, config.seed)
    return RecallResult(groups, bank_tokens, repeats, rows, dataclasses.asdict(config))


def steps(config: RecallConfig) -> int:
    """How often `recall` reports progress."""
    return _pooled(config) + len(config.remembered) * len(config.tasks) * config.cases


def _pooled(config: RecallConfig) -> int:
    """Passages of filler."""
    return max(config.pool, *config.remembered) // config.passage


def _stretches(entries: Sequence[BankEntry], count: int, cases: int) -> list[Sequence[BankEntry]]:
    """Of each case as many entries that follow each other, from beginnings spread evenly."""
    spare = len(entries) - count
    starts = (spare * case // max(cases - 1, 1) for case in range(cases))
    return [entries[start : start + count] for start in starts]


def last_tokens(model: LongMem, text: str, tokens: int) -> str:
    """The end of a text."""
    starts = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[starts[-tokens][0] :] if len(starts) > tokens else text


def _outcomes(
    model: LongMem, some: Sequence[tuple[Needle, Sequence[BankEntry]]], opening: str, focus: int
) -> list[dict[str, Outcome]]:
    placed = [(needle, filler, int(needle.depth * len(filler))) for needle, filler in some]
    texts = [
        needle.hidden_in(filler[place].text, evidence)
        for needle, filler, place in placed
        for evidence in (needle.evidence, needle.wrong)
    ]
    encoded = iter(encode_texts(model, texts))
    cases = []
    for needle, filler, place in placed:
        on, wrong = (dataclasses.replace(next(encoded), source=filler[place].source) for _ in range(2))
        question = Question(needle.prompt, needle.answer, needle.labels, opening, evidence=on.text + "\n\n")
        rest = (("before", filler[:place]), ("after", filler[place + 1 :]))
        before, after = ([joined(part, name)] if part else [] for name, part in rest)
        banks = ([*before, each, *after] for each in (on, wrong))
        cases.append(under_all_conditions(model, question, *banks, focus=focus))
    return ask_everywhere(model, cases)
