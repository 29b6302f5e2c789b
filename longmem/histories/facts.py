"""What a user may tell: `facts.txt` read, its noun phrases and its two persons spelt out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

from longmem.evals.chats import ATTRIBUTES
from longmem.histories.topics import Topic
from longmem.histories.values import VALUES, Draw, of


@dataclass(frozen=True, kw_only=True)
class Fact(Topic):
    """Something a user may tell.

    Attributes:
        group: facts of a group are asked for alike, so that one must be told from the other.
        owner: whose fact it is, if not the user's.
        draw: its values.
        told, changed: sentences with the value, the first time and later.
    """

    group: str
    owner: str = ""
    draw: Draw
    told: tuple[str, ...]
    changed: tuple[str, ...]

    def resembles(self, other: Fact) -> bool:
        """Whether one may be taken for the other: asked for alike, of the same kind of value, or of the same owner."""
        alike = self.group == other.group and self.group not in ("own", "seen")
        return alike or self.draw is other.draw or bool(self.owner and self.owner == other.owner)


_PERSONS = {
    **{"I am": "you are", "I'm": "you're", "I was": "you were", "am I": "are you", "was I": "were you", "I": "you"},
    **{"me": "you", "my": "your", "mine": "yours", "myself": "yourself"},
    **{"we": "you", "us": "you", "our": "your", "ours": "yours", "ourselves": "yourselves"},
}
_FIRST_PERSON = re.compile(rf"\b(?:{'|'.join(_PERSONS)})\b", re.IGNORECASE)
# What is told in such words cannot be answered in them.
_NO_ANSWER = re.compile(
    r"\b(?:you|your|mean|hello|regards|find|told|mentioned|believe|mistaken|reckoned)\b|[!?;]", re.IGNORECASE
)


def second_person(text: str) -> str:
    """What a user says of themselves, said to the user: "I fed my parrot." → "You fed your parrot."."""

    def turned(match: re.Match[str]) -> str:
        word = match[0]
        # No other word of the first person is written with a capital inside a sentence.
        begins = match.start() == 0 or text[: match.start()].endswith((". ", ": "))
        other = _PERSONS.get(word) or _PERSONS[word[0].lower() + word[1:]]
        return other[0].upper() + other[1:] if begins and word[0].isupper() else other

    return _FIRST_PERSON.sub(turned, text)


def capital(text: str) -> str:
    """As a sentence begins."""
    return text[:1].upper() + text[1:]


# How noun phrases (`{n}`, `{N}` with a capital; `{w}` is what, who or when) tell, change, ask and answer.
_TOLD = ("{N} is {v}.", "{v} is {n}.", "{N}: {v}.")
_CHANGED = (
    "{N} is {v} now.",
    "{N} is now {v}.",
    "{N} has changed: it is {v}.",
    "{N} isn't what it was, it's {v} now.",
    "{N} is not the same any more: {v}.",
)
_ASKED = ("{W} is {n}?", "{W}'s {n}?", "{W} was {n} again?", "{N} is … {w}?", "{N}: {w} is it?")
_CLAUSE = "{w} {n} is"
_ANSWERED = ("{N} is {v}.", "{v} is {n}.", "{N}: {v}.")


def _phrased(frames: Sequence[str], phrases: Sequence[str], word: str) -> tuple[str, ...]:
    """Frames filled with noun phrases."""
    return tuple(
        frame.replace("{n}", phrase)
        .replace("{N}", capital(phrase))
        .replace("{w}", word)
        .replace("{W}", word.capitalize())
        for phrase in phrases
        for frame in frames
    )


@dataclass
class _Group:
    """A group of `facts.txt` as it stands there."""

    name: str
    kind: str
    word: str
    lines: dict[str, tuple[str, ...]]

    def fact(self, noun: str) -> Fact:
        """The fact of one owner; without a noun, of the user alone."""

        def owned(sign: str) -> tuple[str, ...]:
            return tuple(
                re.sub(r"{([Mm]y|[Yy]our)}", lambda match: f"{match[1]} {noun}", text)
                for text in self.lines.get(sign, ())
            )

        names, told = owned("of"), owned("+")
        yours = tuple(map(second_person, names))
        answers = tuple(second_person(text) for text in told if not _NO_ANSWER.search(text))
        return Fact(
            kind="fact",
            subject=f"{self.name}, {noun}" if noun else self.name,
            group=self.name if noun else "own",
            owner=noun,
            draw=VALUES[self.kind],
            told=told + _phrased(_TOLD, names, self.word),
            changed=owned("~") + _phrased(_CHANGED, names, self.word),
            asked=owned("?") + _phrased(_ASKED, names, self.word),
            clauses=owned("&") + _phrased((_CLAUSE,), names, self.word),
            names=names,
            answered=tuple(dict.fromkeys(owned("=") + answers + _phrased(_ANSWERED, yours, self.word))),
            unfinished=tuple(
                text.removesuffix(" {v}.") for text in told if text.endswith(" {v}.") and "{a}" not in text
            ),
        )


def _read(text: str) -> Iterator[Fact]:
    """The facts of a file like `facts.txt`, which says how it is written."""
    nouns: list[str] = [""]
    group: _Group | None = None
    for line in text.splitlines():
        sign, _, rest = line.partition(" ")
        if not line or sign == "#":
            continue
        if line.startswith("[") or (" = " in line and sign not in ("of", "+", "~", "?", "&", "=")):
            if group is not None:
                yield from map(group.fact, nouns)
            group = None
            if line.startswith("["):
                nouns = line.partition("] ")[2].split(", ")
                continue
            name, _, kind = line.partition(" = ")
            kind, _, word = kind.partition(" ")
            group = _Group(name, kind, word or "what", {})
            continue
        assert group is not None and sign in ("of", "+", "~", "?", "&", "="), line
        group.lines[sign] = group.lines.get(sign, ()) + tuple(rest.split(" | "))
    if group is not None:
        yield from map(group.fact, nouns)


# What conversations for evaluation are also about, in the wording that they leave to training.
_DRAWS = {each.values: of("\n".join(each.values), "\n") for each in ATTRIBUTES}
_SEEN = tuple(
    Fact(
        kind="fact",
        subject=f"seen, {each.name}",
        group="seen",
        draw=_DRAWS[each.values],
        told=(each.seen.told.replace("{}", "{v}"),),
        changed=(each.seen.corrected.replace("{}", "{v}"),),
        asked=(each.seen.question,),
        answered=(each.seen.begun + " {v}.",),
    )
    for each in ATTRIBUTES
)
FACTS: tuple[Fact, ...] = (*_read((files("longmem.histories") / "facts.txt").read_text("utf-8")), *_SEEN)
