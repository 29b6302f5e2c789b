"""What can be asked for, and how questions and answers are put: frames filled with the words of a topic.

Frames multiply: an opening, one of a topic's own questions or a frame around what it asks, a closing; an opening, one
of its answers, a closing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longmem.histories import wording
from longmem.histories.values import pick


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Something that can be asked for.

    Attributes:
        kind: as in `Asked`.
        subject: what it is about; no two topics have the same.
        asked: questions.
        answered: sentences with the value, `{v}`; each answers every question.
        clauses: what a question asks: "where my aunt lives".
        names: noun phrases: "the name of my aunt".
        unfinished: sentences of the user that end where the value would stand: "My aunt lives in".
        dialogue: requests, each with the reply that shows the value, instead of all of these.
        framed: whether anything may stand around questions and answers.
    """

    kind: str
    subject: str
    asked: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    clauses: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    dialogue: tuple[tuple[str, str], ...] = ()
    framed: bool = True


def article(value: str) -> str:
    """a or an."""
    return "an" if value[0].lower() in "aeiou" else "a"


def fill(template: str, value: str) -> tuple[str, tuple[int, int]]:
    """A sentence with its value, and where the value stands in it."""
    an = article(value)
    before, _, after = template.replace("{a}", an).replace("{A}", an.capitalize()).partition("{v}")
    # A sentence may begin with its value, but codes stay as they are.
    begins = not before or before.endswith((". ", "! ", "? ", "\n"))
    if begins and not any(letter.isdigit() for letter in value):
        value = value[0].upper() + value[1:]
    return before + value + after, (len(before), len(before) + len(value))


def question(rng: np.random.Generator, topic: Topic, *, after: str = "", plain: bool = False) -> str:
    """A question for a topic.

    Args:
        after: what must follow it.
        plain: rather as it is, as text without a chat has it.
    """
    if not topic.framed:
        return pick(rng, topic.asked) + after
    shape = rng.random()
    if shape < 0.3 and topic.clauses:
        text = pick(rng, wording.KNOWING).replace("{c}", pick(rng, topic.clauses))
    elif 0.3 <= shape < 0.45 and topic.names:
        text = _named(pick(rng, wording.REQUESTING), pick(rng, topic.names))
    else:
        text = pick(rng, topic.asked)
    often = 0.15 if plain else 0.45
    if rng.random() < often:
        text = pick(rng, wording.ASKING) + text
    if not after and rng.random() < often / 2:
        after = pick(rng, wording.CLOSING)
    return text + after


def answer(rng: np.random.Generator, topic: Topic, *, plain: bool = False) -> str:
    """An answer with `{v}` in the place of the value.

    Args:
        plain: as it is, as text without a chat has it.
    """
    text = pick(rng, topic.answered)
    if plain or not topic.framed:
        return text
    shape = rng.random()
    if shape < 0.12:
        return pick(rng, wording.BARE)
    if shape < 0.34 and text.startswith(_STARTS) and ": " not in text:
        text = pick(rng, wording.ANSWERING_THAT) + (text if text.startswith("{v}") else text[0].lower() + text[1:])
    elif shape < 0.5:
        text = pick(rng, wording.ANSWERING) + text
    return text + (pick(rng, wording.ANSWERED) if rng.random() < 0.1 else "")


# Sentences that can stand behind "that".
_STARTS = ("{v} ", "Your ", "You ", "You're ", "The ", "There ", "It ")


def exchange(rng: np.random.Generator, topic: Topic) -> tuple[str, str]:
    """A question and its answer, with `{v}` in the place of the value."""
    if topic.dialogue:
        return topic.dialogue[int(rng.integers(len(topic.dialogue)))]
    shape = rng.random() if topic.framed else 1.0
    if shape < 0.06 and topic.unfinished:
        begun = pick(rng, topic.unfinished)
        return pick(rng, wording.FINISHING).replace("{s}", begun), pick(rng, wording.FINISHED)
    if shape < 0.14:
        return question(rng, topic, after=pick(rng, wording.BRIEFLY)), pick(rng, wording.BARE)
    return question(rng, topic), answer(rng, topic)


def plain_exchange(rng: np.random.Generator, topic: Topic) -> str:
    """The same as text without a chat, or the statement alone."""
    if topic.dialogue:
        asked, answered = exchange(rng, topic)
    elif rng.random() < 0.3 and topic.framed:
        return answer(rng, topic, plain=True)
    elif rng.random() < 0.15 and topic.names:
        return _named(pick(rng, wording.NOTED), pick(rng, topic.names))
    elif rng.random() < 0.5:
        # The plainest of all, one of the first questions and answers.
        asked, answered = topic.asked[0], topic.answered[0]
    else:
        asked, answered = question(rng, topic, plain=True), answer(rng, topic, plain=True)
    return in_plain_text(rng, asked, answered)


def in_plain_text(rng: np.random.Generator, asked: str, answered: str) -> str:
    """A question and an answer as text without a chat."""
    return pick(rng, wording.PLAIN).replace("{q}", asked).replace("{r}", answered)


def refusal(rng: np.random.Generator, topic: Topic, second_person: Sequence[str]) -> str:
    """What is answered if a topic was never told.

    Args:
        second_person: its clauses and then its names, said to the user, or none.
    """
    clauses, names = second_person[: len(topic.clauses)], second_person[len(topic.clauses) :]
    shape = rng.random()
    if shape < 0.35 and clauses:
        return pick(rng, wording.NOT_KNOWING).replace("{c}", pick(rng, clauses))
    if 0.35 <= shape < 0.55 and names:
        return _named(pick(rng, wording.NOT_GIVEN), pick(rng, names))
    return pick(rng, wording.UNKNOWN)


def _named(frame: str, name: str) -> str:
    underscored = name.removeprefix("the ").replace("'s", "").replace(" ", "_").replace("-", "_")
    begun = name[0].upper() + name[1:]
    return (
        frame.replace("{n}", name)
        .replace("{N}", begun)
        .replace("{key}", name.removeprefix("the "))
        .replace("{key_}", underscored)
    )
