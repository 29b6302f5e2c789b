"""Questions whose answers are remembered: how they are asked, judged and counted. Shared by the evaluations of recall.

The same question is asked under five conditions: the bank holds the evidence (`bank_on`), nothing (`bank_off`) or the
same with other values (`bank_wrong`); the bank is empty and the evidence stands in the local window, with the SideNet
(`window`, the ceiling) and without (`backbone_window`).

T tokens of a prompt, A tokens of an answer, V vocabulary, N tokens of a source.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longmem.bank import BankEntry, MemoryBank
from longmem.data import TokenizedDocuments
from longmem.errors import ConfigError, SourceError
from longmem.model import LongMem

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


# ---- asking --------------------------------------------------------------------------------------------------


def ask_everywhere(
    model: LongMem, question: Question, on: Sequence[BankEntry], wrong: Sequence[BankEntry]
) -> dict[str, Outcome]:
    """A question's outcome under every condition.

    Args:
        on: sources of the bank that holds the evidence.
        wrong: sources of the bank that holds other values in its place.

    Raises:
        ConfigError: evidence and question do not fit the backbone's window.
    """
    alone = question.opening + question.prompt
    window = question.opening + question.evidence + question.prompt
    return {
        "bank_on": ask(model, question, alone, bank_of(model, on)),
        "bank_off": ask(model, question, alone),
        "bank_wrong": ask(model, question, alone, bank_of(model, wrong)),
        "window": ask(model, question, window),
        "backbone_window": ask(model, question, window, memory=0.0),
    }


@torch.no_grad()
def ask(
    model: LongMem, question: Question, text: str, bank: MemoryBank | None = None, *, memory: float = 1.0
) -> Outcome:
    """Continue `text` greedily, and measure how probable the right answer was.

    Args:
        text: of the local window; ends with the question's prompt.
        memory: 0 asks the backbone alone.

    Raises:
        ConfigError: the window is too small for the text.
    """
    prompt, answer = prompt_and_answer(model, text, question.answer)
    if 1 + len(prompt) + len(answer) > model.backbone.max_positions:
        raise ConfigError(
            f"Evidence, question and answer take {1 + len(prompt) + len(answer)} tokens, but the window of backbone "
            f"{model.backbone.name!r} has {model.backbone.max_positions}. Make passages or sessions shorter."
        )
    input_ids_1T = model.with_prefix(torch.tensor(prompt))[None].to(model.device)
    answer_1A = torch.tensor([answer], device=model.device)
    cache = model.new_cache()
    first_11V = model(input_ids_1T, bank, memory=memory, cache=cache, last_only=True).logits_BTV
    # Two ways lead on from the prompt: what the answer says, and what the model would say.
    branch = copy.deepcopy(cache)
    rest_1AV = first_11V[:, :0]
    if len(answer) > 1:
        rest_1AV = model(answer_1A[:, :-1], bank, memory=memory, cache=branch).logits_BTV
    log_probability_1AV = torch.cat((first_11V, rest_1AV), dim=1).float().log_softmax(-1)
    log_probability = float(log_probability_1AV.gather(-1, answer_1A[..., None]).sum())

    said: list[int] = []
    next_id = int(first_11V[0, -1].argmax())
    candidates = list(question.labels)
    for _ in range(2 + max(map(len, candidates), default=0)):
        said.append(next_id)
        ended = next_id == model.tokenizer.eos_token_id
        spoken = model.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if ended or not undecided(spoken, candidates):
            break
        step_11 = torch.tensor([[next_id]], device=model.device)
        logits_11V = model(step_11, bank, memory=memory, cache=cache, last_only=True).logits_BTV
        next_id = int(logits_11V[0, -1].argmax())
    given = answer_in(spoken, candidates)
    return Outcome(None if given is None else question.labels[given], log_probability)


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


def encode_filler(model: LongMem, texts: Sequence[str], on_passage: Any = None) -> list[BankEntry]:
    """One source a passage, each different text encoded once."""
    encoded: dict[str, BankEntry] = {}
    entries = []
    for number, text in enumerate(texts):
        source = f"filler/{number}"
        if text not in encoded:
            encoded[text] = model.encode_text(text, source=source)
        entries.append(dataclasses.replace(encoded[text], source=source))
        if on_passage is not None:
            on_passage(1)
    return entries


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
