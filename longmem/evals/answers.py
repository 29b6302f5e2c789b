"""Questions whose answers are remembered: how they are asked, judged and counted. Shared by the evaluations of recall.

The same question is asked under five conditions: the bank holds the evidence (`bank_on`), nothing (`bank_off`) or the
same with other values (`bank_wrong`); the bank is empty and the evidence stands in the local window, with the SideNet
(`window`, the ceiling) and without (`backbone_window`).

B rows of a batch, T tokens of a window, A tokens of an answer, N tokens of a source, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from longmem.backbone import BackboneOutput
from longmem.bank import BankEntry, MemoryBank
from longmem.data import TokenizedDocuments
from longmem.errors import ConfigError, SourceError
from longmem.focus import Focus
from longmem.model import LongMem

Item = TypeVar("Item")
CONDITIONS = ("bank_on", "bank_off", "bank_wrong", "window", "backbone_window")
RIGHT = "answer"


@dataclass(frozen=True)
class Question:
    """What is asked, and what may be answered.

    Attributes:
        prompt: the question and the beginning of its answer, without a space at the end.
        answer: what is to follow; its tokens' log-probability is measured.
        labels: answers worth telling apart, and what to call them; `RIGHT` for the right one.
        opening: what stands first in the window, such as a system prompt.
        evidence: what tells the answer, as it would stand in the window.
    """

    prompt: str
    answer: str
    labels: Mapping[str, str]
    opening: str = ""
    evidence: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a model made of a question.

    Attributes:
        given: label of the answer that greedy continuation gave, None for any other text.
        log_probability: of the right answer's tokens in all, in nats.
    """

    given: str | None
    log_probability: float


@dataclass(frozen=True)
class Ask:
    """A question under one condition.

    Attributes:
        question: what is asked.
        text: of the local window; ends with the question's prompt.
        bank: what is remembered; None is nothing.
        memory: 0 asks the backbone alone.
    """

    question: Question
    text: str
    bank: MemoryBank | None = None
    memory: float = 1.0


# ---- asking --------------------------------------------------------------------------------------------------

# Tokens of a batch, padding included. On a CPU larger batches are no faster.
_BATCH = {"cpu": 1024, "cuda": 16384}
# Tokens of all banks that are held at once. One is 1.5 kB for SmolLM2-135M with six memory heads.
_BANKS = {"cpu": 1 << 17, "cuda": 1 << 22}


def under_all_conditions(
    model: LongMem, question: Question, on: Sequence[BankEntry], wrong: Sequence[BankEntry], focus: int = 0
) -> dict[str, Ask]:
    """A question under every condition.

    Args:
        on: sources of the bank that holds the evidence.
        wrong: sources of the bank that holds other values in its place.
        focus: tokens that are read of a bank at most (`longmem.focus`); 0 is all.
    """
    alone = question.opening + question.prompt
    window = question.opening + question.evidence + question.prompt
    asked = model.tokenizer(alone, add_special_tokens=False)["input_ids"]

    def read(entries: Sequence[BankEntry]) -> MemoryBank:
        found = Focus(focus).on(bank_of(model, entries), asked)
        assert isinstance(found, MemoryBank)
        return found

    return {
        "bank_on": Ask(question, alone, read(on)),
        "bank_off": Ask(question, alone),
        "bank_wrong": Ask(question, alone, read(wrong)),
        "window": Ask(question, window),
        "backbone_window": Ask(question, window, memory=0.0),
    }


def ask_everywhere(model: LongMem, cases: Sequence[Mapping[str, Ask]]) -> list[dict[str, Outcome]]:
    """The outcomes of questions under every condition, all of them asked together (see `ask_all`)."""
    outcomes = iter(ask_all(model, [each for case in cases for each in case.values()]))
    return [{name: next(outcomes) for name in case} for case in cases]


def cases_at_once(model: LongMem, bank_tokens: int) -> int:
    """How many cases, of two banks of so many tokens each, are asked together."""
    return max(1, min(64, _BANKS.get(model.device.type, _BANKS["cpu"]) // (2 * bank_tokens + 1)))


class _Kind(NamedTuple):
    """What can be asked in one go: the strength of memory, and whether there is any."""

    memory: float
    banked: bool


@dataclass
class _Row:
    """An ask on its way.

    Attributes:
        ask: what is asked.
        prompt, answer: token ids.
        guess: token ids that may follow what was said; right guesses save passes.
        said: what the model says, token by token.
        log_probability: of the answer.
        outcome: once what is said decides.
    """

    ask: Ask
    prompt: list[int]
    answer: list[int]
    guess: list[int]
    said: list[int] = dataclasses.field(default_factory=list)
    log_probability: float = 0.0
    outcome: Outcome | None = None

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.said, *self.guess]

    @property
    def kind(self) -> _Kind:
        return _Kind(self.ask.memory, bool(self.ask.bank))


@torch.no_grad()
def ask_all(model: LongMem, asks: Sequence[Ask]) -> list[Outcome]:
    """Continue every text greedily, and measure how probable the right answers were.

    One pass reads a prompt and the right answer behind it: it tells the answer's probability, and what the model would
    say as far as it says the answer. Where it says something else that may still become one of the labels, another pass
    reads that. Rows are padded behind their end, where causal attention does not look, so that batches change nothing
    but rounding.

    Raises:
        ConfigError: the window is too small for a text.
    """
    rows = []
    for ask in asks:
        prompt, answer = prompt_and_answer(model, ask.text, ask.question.answer)
        if (needed := 1 + len(prompt) + len(answer)) > model.backbone.max_positions:
            raise ConfigError(
                f"Evidence, question and answer take {needed} tokens, but the window of backbone "
                f"{model.backbone.name!r} has {model.backbone.max_positions}. Make passages or sessions shorter."
            )
        rows.append(_Row(ask, prompt, answer, answer))
    while waiting := [row for row in rows if row.outcome is None]:
        # Conditions that share a window share the backbone's work.
        alike: dict[tuple[int, ...], list[_Row]] = {}
        for row in waiting:
            alike.setdefault(tuple(row.tokens), []).append(row)
        for batch in batches(model, list(alike.items()), lambda each: 1 + len(each[0])):
            _read_on(model, dict(batch))
    return [row.outcome for row in rows if row.outcome is not None]


def ask(
    model: LongMem, question: Question, text: str, bank: MemoryBank | None = None, *, memory: float = 1.0
) -> Outcome:
    """`ask_all` of a single question."""
    return ask_all(model, [Ask(question, text, bank, memory)])[0]


def batches(model: LongMem, items: Sequence[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in batches of similar lengths, shortest first."""
    budget = _BATCH.get(model.device.type, _BATCH["cpu"])
    batch: list[Item] = []
    for item in sorted(items, key=length):
        if batch and (len(batch) + 1) * length(item) > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _read_on(model: LongMem, rows_of: Mapping[tuple[int, ...], Sequence[_Row]]) -> None:
    """One pass over windows, given by their tokens: what rows say behind their prompts, as far as it was guessed."""
    top = model.backbone.num_layers
    seen = model.backbone(padded(model, list(rows_of)), boundaries={*model.sidenet.boundaries, top})
    places = [(place, row) for place, rows in enumerate(rows_of.values()) for row in rows]
    # An empty bank is read apart from others, so that nothing of memory runs for it.
    for kind in sorted({row.kind for _, row in places}):
        some = [(place, row) for place, row in places if row.kind == kind]
        where = torch.tensor([place for place, _ in some], device=model.device)
        hidden_states = {boundary: hidden_BTD[where] for boundary, hidden_BTD in seen.hidden_states.items()}
        hidden_BTD = hidden_states[top]
        if kind.memory:
            retrieve = model.reader([row.ask.bank for _, row in some], rows=len(some))
            part = BackboneOutput(hidden_states, seen.positions_BT[where])
            hidden_BTD, _ = model.correct(part, retrieve, memory=kind.memory)
        _hear(model, [row for _, row in some], hidden_BTD)


def _hear(model: LongMem, rows: Sequence[_Row], hidden_BTD: torch.Tensor) -> None:
    """What rows say, from the hidden states of their windows."""
    # Logits of the last known token of each row and of what was guessed: a vocabulary for each token would be a lot.
    wanted = []
    for row, hidden_TD in zip(rows, hidden_BTD, strict=True):
        last = len(row.prompt) + len(row.said)
        wanted.append(hidden_TD[last : last + 1 + len(row.guess)])
    logits_XV = model.backbone.logits(torch.cat(wanted)[None])[0].float()
    for row, logits_AV in zip(rows, logits_XV.split([len(hidden_AD) for hidden_AD in wanted]), strict=True):
        if not row.said:
            log_probability_AV = logits_AV[: len(row.answer)].log_softmax(-1)
            answer_A1 = torch.tensor(row.answer, device=logits_AV.device)[:, None]
            row.log_probability = float(log_probability_AV.gather(-1, answer_A1).sum())
        _say(model, row, logits_AV.argmax(-1).tolist())


def _say(model: LongMem, row: _Row, next_ids: Sequence[int]) -> None:
    """Take over what follows the row's tokens and each of its guesses, up to the first wrong guess or to a decision."""
    labels = row.ask.question.labels
    most = 2 + max(map(len, labels), default=0)
    spoken = ""
    for place, next_id in enumerate(next_ids):
        row.said.append(next_id)
        spoken = model.tokenizer.decode(row.said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ended = next_id == model.tokenizer.eos_token_id or len(row.said) == most
        if ended or not undecided(spoken, list(labels)):
            given = answer_in(spoken, list(labels))
            row.outcome = Outcome(None if given is None else labels[given], row.log_probability)
            return
        if row.guess[place : place + 1] != [next_id]:
            break
    row.guess = _guess(model, row.said, spoken, list(labels))


def _guess(model: LongMem, said: list[int], spoken: str, candidates: Sequence[str]) -> list[int]:
    """Token ids that would make a candidate of what was said; none if its tokens are unlike any candidate's."""
    for candidate in candidates:
        if candidate.lower().startswith(spoken.lstrip().lower()):
            ids = model.tokenizer(f" {candidate}", add_special_tokens=False)["input_ids"]
            if ids[: len(said)] == said:
                return ids[len(said) :]
    return []


def padded(model: LongMem, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids (B, T) behind the prefix token, with anything behind the end of shorter rows."""
    longest = max(map(len, token_ids))
    rows = [[model.backbone.prefix_token_id, *ids, *[0] * (longest - len(ids))] for ids in token_ids]
    return torch.tensor(rows, device=model.device)


def prompt_and_answer(model: LongMem, text: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt (the prefix token left out) and of the answer that follows it after a space."""

    def ids(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt, whole = ids(text), ids(f"{text} {answer}")
    # Where a tokenizer merges across the border, the answer is tokenised by itself.
    after = whole[len(prompt) :] if whole[: len(prompt)] == prompt else ids(f" {answer}")
    # Some chat templates begin with the very token that every window begins with.
    return prompt[prompt[:1] == [model.backbone.prefix_token_id] :], after


def answer_in(said: str, candidates: Sequence[str]) -> str | None:
    """The longest candidate that a text begins with as whole words or numbers; capitals do not matter."""
    text = said.lstrip().lower()
    found = [c for c in candidates if text.startswith(c.lower()) and not text[len(c) : len(c) + 1].isalnum()]
    return max(found, key=len, default=None)


def undecided(said: str, candidates: Sequence[str]) -> bool:
    """Whether more text could still make, or unmake, one of the candidates."""
    text = said.lstrip().lower()
    return any(candidate.lower().startswith(text) for candidate in candidates)


# ---- banks ---------------------------------------------------------------------------------------------------


def bank_of(model: LongMem, entries: Sequence[BankEntry]) -> MemoryBank:
    """A bank of these sources. What is encoded already is only copied."""
    bank = model.new_bank()
    for each in entries:
        bank.append(each)
    return bank


def joined(entries: Sequence[BankEntry], source: str) -> BankEntry:
    """Whole texts, one behind the other, as one source: a bank takes one entry in a moment, thousands in seconds."""
    ends = list(itertools.accumulate(len(each.text) for each in entries))
    offsets = [each.offsets_N2 + end - len(each.text) for each, end in zip(entries, ends, strict=True)]
    return BankEntry(
        source,
        "".join(each.text for each in entries),
        0,
        torch.cat([each.token_ids_N for each in entries]),
        torch.cat(offsets),
        torch.cat([each.keys_HNE for each in entries], dim=1),
        torch.cat([each.values_HNE for each in entries], dim=1),
    )


def passages(
    documents: TokenizedDocuments, tokenizer: Any, *, tokens: int, size: int, rng: np.random.Generator
) -> tuple[list[str], float]:
    """Text to hide things in: pieces of documents in random order, all of them again in another order if too few.

    Args:
        tokens: wanted in all; pieces are `size` tokens each, so what is left over is left out.
        size: tokens of a piece. Read again as text, a piece may have a few more or fewer.

    Returns:
        The pieces, and how often each stands among them on average (1 or less: none is repeated).

    Raises:
        SourceError: no document has `size` tokens.
    """
    count = tokens // size
    starts = [(d, start) for d in range(len(documents)) for start in range(0, documents.lengths[d] - size + 1, size)]
    if count and not starts:
        raise SourceError(
            f"No document has the {size} tokens of a passage; the longest has {int(documents.lengths.max())}. "
            "Give longer documents, or make passages shorter."
        )
    texts: list[str] = []
    while len(texts) < count:
        for place in rng.permutation(len(starts))[: count - len(texts)]:
            document, start = starts[place]
            texts.append(tokenizer.decode(documents[document][start : start + size].tolist(), skip_special_tokens=True))
    return texts, count / max(1, len(starts))


def other_text(
    model: LongMem,
    documents: TokenizedDocuments | None,
    *,
    tokens: int,
    size: int,
    seed: int,
    on_passage: Callable[[int], None] | None = None,
) -> tuple[list[BankEntry], float]:
    """`passages` of documents, encoded, and how often each stands among them; nothing for no tokens.

    Raises:
        ConfigError: tokens are wanted of no documents.
        SourceError: no document has a passage.
    """
    if not tokens:
        return [], 0.0
    if documents is None:
        raise ConfigError(f"remembered={tokens} tokens of other text need documents; got none.")
    rng = np.random.default_rng(seed)
    texts, repeats = passages(documents, model.tokenizer, tokens=tokens, size=size, rng=rng)
    return encode_filler(model, texts, on_passage), repeats


def encode_filler(
    model: LongMem, texts: Sequence[str], on_passage: Callable[[int], None] | None = None
) -> list[BankEntry]:
    """One source a passage, each different text encoded once."""
    entries = encode_texts(model, texts, on_text=on_passage)
    return [dataclasses.replace(each, source=f"filler/{number}") for number, each in enumerate(entries)]


@torch.no_grad()
def encode_texts(
    model: LongMem, texts: Sequence[str], *, on_text: Callable[[int], None] | None = None
) -> list[BankEntry]:
    """Texts as `LongMem.encode_text` encodes each, but for rounding: their windows in batches, padded at the end.

    Equal texts are encoded once. Sources are still to be named.

    Args:
        on_text: progress, called with how many of the texts are encoded.
    """
    different = list(dict.fromkeys(texts))
    found = [model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in different]
    windows = [
        (number, window)
        for number, encoded in enumerate(found)
        for window in model.config.encode.windows(0, len(encoded["input_ids"]))
    ]
    # Windows that a text still lacks.
    left = Counter(number for number, _ in windows)
    parts: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for batch in batches(model, windows, lambda each: 1 + each[1][2] - each[1][0]):
        ids = [found[number]["input_ids"][first:end] for number, (first, _, end) in batch]
        seen = model.backbone(padded(model, ids), boundaries=model.config.memory_layers)
        keys_HBTE, values_HBTE = model.keys_values(seen)
        for row, (number, (first, kept, end)) in enumerate(batch):
            # +1: the prefix is never remembered.
            places = slice(1 + kept - first, 1 + end - first)
            parts[number, kept] = keys_HBTE[:, row, places].clone(), values_HBTE[:, row, places].clone()
            left[number] -= 1
            if on_text is not None and not left[number]:
                on_text(texts.count(different[number]))
    entries = {}
    for number, (text, encoded) in enumerate(zip(different, found, strict=True)):
        ids_N = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        pieces = [parts[number, kept] for _, kept, _ in model.config.encode.windows(0, len(ids_N))]
        if pieces:
            keys_HNE, values_HNE = (torch.cat(some, dim=1) for some in zip(*pieces, strict=True))
        else:
            keys_HNE, values_HNE = model.encode(ids_N)
        offsets_N2 = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
        entries[text] = BankEntry("", text, 0, ids_N, offsets_N2, keys_HNE, values_HNE)
    return [entries[text] for text in texts]


# ---- counting ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Outcomes of many questions under one condition.

    Attributes:
        cases: questions asked.
        rates: label → share of the questions that were answered so.
        intervals: label → its 95 % interval (Wilson).
        log_probability: mean over questions of the right answer's log-probability, in nats.
    """

    cases: int
    rates: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    log_probability: float


@dataclass(frozen=True)
class Group:
    """Scores of one kind of question.

    Attributes:
        scores: condition → its score.
        relative: right answers with the bank on, as a share of those with the evidence in the window; None where there
            are none of those.
        relative_interval: its 95 % bootstrap interval over questions; None where nothing was right with the bank on
            (every draw would say 0) or a draw has no right answer in the window.
    """

    scores: dict[str, Score]
    relative: float | None
    relative_interval: tuple[float, float] | None


def score_group(outcomes: Sequence[Mapping[str, Outcome]], labels: Sequence[str], seed: int = 0) -> Group:
    """Count the outcomes of one kind of question.

    Args:
        outcomes: one mapping from condition a question.
        labels: to count; `RIGHT` among them gives the relative recall.
    """
    scores = {}
    for condition in CONDITIONS:
        some = [outcome[condition] for outcome in outcomes]
        hits = {label: sum(outcome.given == label for outcome in some) for label in labels}
        scores[condition] = Score(
            cases=len(some),
            rates={label: count / len(some) for label, count in hits.items()},
            intervals={label: wilson(count, len(some)) for label, count in hits.items()},
            log_probability=float(np.mean([outcome.log_probability for outcome in some])),
        )
    relative = interval = None
    on, window = (np.array([o[c].given == RIGHT for o in outcomes], dtype=float) for c in ("bank_on", "window"))
    if window.any():
        relative = float(on.sum() / window.sum())
        draws = np.random.default_rng(seed).integers(len(on), size=(2000, len(on)))
        found = window[draws].sum(1)
        if on.any() and found.all():
            low, high = np.percentile(on[draws].sum(1) / found, [2.5, 97.5])
            interval = float(low), float(high)
    return Group(scores, relative, interval)


def wilson(hits: int, cases: int) -> tuple[float, float]:
    """The 95 % interval of a rate, sensible near 0 and 1 too."""
    z, rate = 1.959964, hits / cases
    middle = (rate + z * z / (2 * cases)) / (1 + z * z / cases)
    half = z / (1 + z * z / cases) * math.sqrt(rate * (1 - rate) / cases + z * z / (4 * cases * cases))
    # At the ends the bound is the rate itself, which rounding misses.
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == cases else middle + half)


def save_json(path: Path, figures: dict[str, Any]) -> None:
    """Write figures to a file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
