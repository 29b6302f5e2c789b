"""Histories: sessions in which facts are told and changed, passages with things hidden in them, and questions that come
when what they ask for has long left the window.

Sessions stand in the backbone's chat template, as `longmem.evals.facts` renders them and `ChatSession` leaves them in a
bank. All wording is that of `longmem.histories.wording`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError, SourceError
from longmem.evals.chats import Turn
from longmem.evals.facts import opening_and_turn, session_text
from longmem.histories import wording
from longmem.histories.values import VALUES, pick
from longmem.histories.wording import FACTS, Fact, fill

# Two sentences of prose, one after the other.
_SENTENCES = re.compile(r'(?<=[.!?]\s)([A-Z][^.!?"“”|_]{30,120}[.!?])\s([A-Z][^.!?"“”|_]{20,100}[.!?])')


@dataclass(frozen=True)
class HistoryConfig:
    """How much is written, and how far apart things are.

    Attributes:
        tokens: of all histories together, at least.
        shortest, longest: tokens of a history, which is longer by what its last part has too many.
        distance: tokens, at least, between the last mention of something and a question for it. No less than a training
            segment, or the answer may stand in the window.
        seed: of everything drawn.
    """

    tokens: int = 20_000_000
    shortest: int = 16384
    longest: int = 32768
    distance: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1; got {self.tokens}.")
        if not 0 <= self.distance < self.shortest <= self.longest:
            raise ConfigError(
                "A history is from shortest to longest tokens long, and longer than the distance of its questions; got "
                f"shortest {self.shortest}, longest {self.longest}, distance {self.distance}."
            )


@dataclass(frozen=True)
class Told:
    """Where something is said for the first time, or a new value of it: `value` stands at `start` (characters)."""

    subject: str
    value: str
    start: int


@dataclass(frozen=True)
class Asked:
    """A question and its answer.

    Attributes:
        kind: `fact`, `earlier` (the value before the newest), `secret`, `pair`, `quote`, or `unknown`: never told.
        subject: as in `Told`.
        answer: what stands at `start`; None if it was never told.
        start: in characters.
        tokens_since: tokens, at least, between the last mention of the answer and the question.
    """

    kind: str
    subject: str
    answer: str | None
    start: int
    tokens_since: int


@dataclass(frozen=True)
class History:
    """One user's history, and what is told and asked in it, in order."""

    name: str
    text: str
    told: tuple[Told, ...]
    asked: tuple[Asked, ...]

    @property
    def document(self) -> Document:
        """The text, with the answers marked that must be remembered."""
        spans = ((each.start, each.start + len(each.answer)) for each in self.asked if each.answer is not None)
        return Document(self.name, self.text, tuple(spans))


def generate_histories(filler: TokenizedDocuments, tokenizer: Any, config: HistoryConfig) -> Iterator[History]:
    """Histories until there are `config.tokens` tokens; a seed gives the same first ones however many are asked for.

    Args:
        filler: documents whose passages lie between what is told and asked.
        tokenizer: of the backbone that will be trained; its chat template is used.

    Raises:
        SourceError: the filler is empty.
    """
    if not filler.num_tokens:
        raise SourceError("The texts between what is told and asked are empty. Give documents with text in them.")
    number = written = 0
    while written < config.tokens:
        writer = _Writer(filler, tokenizer, config, np.random.default_rng((config.seed, number)))
        yield writer.write(f"history/{config.seed}/{number}")
        written += writer.tokens
        number += 1


@dataclass
class _Known:
    """Something that was told.

    Attributes:
        kind: as in `Asked`.
        subject, group, value: what it is, and its newest value.
        asked, answered: templates.
        last: tokens of the history when it was last mentioned.
        session: which session told it.
        before: its values before the newest.
        fact: where it may change.
    """

    kind: str
    subject: str
    group: str
    value: str
    asked: Sequence[str]
    answered: Sequence[str]
    last: int = 0
    session: int = 0
    before: list[str] = field(default_factory=list)
    fact: Fact | None = None


@dataclass(frozen=True)
class _Mark:
    """What begins at a character of a text; the `start` of the record is put in when the text has its place."""

    start: int
    record: Told | Asked


@dataclass(frozen=True)
class _Said:
    """A text and its marks."""

    text: str
    marks: tuple[_Mark, ...] = ()

    def behind(self, before: str) -> _Said:
        moved = (_Mark(len(before) + mark.start, mark.record) for mark in self.marks)
        return _Said(before + self.text, tuple(moved))

    def __add__(self, other: _Said) -> _Said:
        return _Said(self.text + other.text, self.marks + other.behind(self.text).marks)


Exchange = tuple[_Said, _Said]
# How likely each part of a history is: in its beginning, and then.
_PARTS = ("tell", "list", "hide", "read", "ask")
_EARLY, _LATE = (0.36, 0.08, 0.12, 0.34, 0.10), (0.13, 0.05, 0.06, 0.24, 0.52)
_BEGINNING = 0.4
# Some facts have few values (days of the week), and a new one must be none that was told before.
MOST_CHANGES = 4
_KINDS = {"fact": 0.6, "pair": 0.2, "secret": 0.14, "quote": 0.06}


class _Writer:
    """Writes one history."""

    def __init__(
        self, filler: TokenizedDocuments, tokenizer: Any, config: HistoryConfig, rng: np.random.Generator
    ) -> None:
        self.filler = filler
        self.tokenizer = tokenizer
        self.config = config
        self.rng = rng
        self.tokens = 0
        self.characters = 0
        self.session = 0
        self.pieces: list[str] = []
        self.told: list[Told] = []
        self.asked: list[Asked] = []
        self.known: dict[str, _Known] = {}
        self.opening = opening_and_turn(tokenizer, "-")[0]
        # Some histories are dense, others have long passages as a bank of books would.
        self.passage = int(pick(rng, ("150", "300", "300", "512", "800")))

    def write(self, name: str) -> History:
        length = int(self.rng.integers(self.config.shortest, self.config.longest + 1))
        parts = {"tell": self._tell, "list": self._list, "hide": self._hide, "read": self._read, "ask": self._ask}
        while self.tokens < length:
            odds = _EARLY if self.tokens < _BEGINNING * length else _LATE
            parts[_PARTS[int(self.rng.choice(len(_PARTS), p=odds))]]()
        return History(name, "".join(self.pieces), tuple(self.told), tuple(self.asked))

    # ---- parts of a history ----------------------------------------------------------------------------------

    def _tell(self) -> None:
        """A session in which things are told or changed, among small talk."""
        count = int(self.rng.integers(1, 5))
        exchanges = [self._change() if self._chance(0.4) else self._fact() for _ in range(count)]
        self._write_session([*exchanges, *self._small_talk(3)])

    def _ask(self) -> None:
        """Questions, most of them in a session."""
        if self._chance(0.25):
            found = self._question(("pair", "secret"))
            if found is not None:
                question, answer = found
                self._write_plain(question + _Said(" ") + answer)
                return
        exchanges = [found for _ in range(int(self.rng.integers(1, 5))) if (found := self._question(tuple(_KINDS)))]
        if self._chance(0.12 + 0.3 * (not exchanges)):
            exchanges.append(self._unknown())
        if self._chance(0.1):
            exchanges.append(self._fact())
        if not exchanges:
            self._read()
            return
        self._write_session([*exchanges, *self._small_talk(1)], opened=self._chance(0.5))

    def _read(self) -> None:
        """A passage, as it is or shared by the user; a sentence of it may be asked for."""
        passage = self._passage()
        said = _Said(passage)
        pairs = list(_SENTENCES.finditer(passage))
        if pairs and self._chance(0.4):
            match = pairs[int(self.rng.integers(len(pairs)))]
            key = " ".join(match[1].split()[-8:])
            subject, value = f"after “{key}”", " ".join(match[2].split())
            if subject not in self.known and passage.count(match[2]) == 1:
                asked = [template.replace("{k}", key) for template in wording.QUOTING]
                self._know(_Known("quote", subject, "quote", value, asked, wording.QUOTED))
                said = _Said(passage, (_Mark(match.start(2), Told(subject, value, 0)),))
        if self._chance(0.5):
            self._write_plain(said)
        else:
            sharing, shared = pick(self.rng, wording.SHARING), pick(self.rng, wording.SHARED)
            self._write_session([(said.behind(sharing), _Said(shared))])

    def _hide(self) -> None:
        """A passage with a secret in it, as a paragraph of its own."""
        secret = pick(self.rng, wording.SECRETS)
        if self._chance(0.75):
            secret += pick(self.rng, (" of", " for", " to")) + f" the {pick(self.rng, wording.PLACES)}"
        subject = f"the {secret}"
        if subject in self.known:
            self._read()
            return
        kind = pick(self.rng, ("digits5", "digits5", "code", "word", "words", "plate", "hex8"))
        value = self._fresh(kind)
        sentence, span = fill(pick(self.rng, wording.HIDDEN).replace("{secret}", secret), value)
        asked, answered = (
            [each.replace("{secret}", secret) for each in some] for some in (wording.SOUGHT, wording.FOUND)
        )
        self._know(_Known("secret", subject, "secret", value, asked, answered))
        hidden = _Said(sentence, (_Mark(span[0], Told(subject, value, 0)),))
        self._write_plain(self._amid(hidden))

    def _list(self) -> None:
        """Keys with values, told by the user or in a passage."""
        line, question, answer = wording.LISTED[int(self.rng.integers(len(wording.LISTED)))]
        keys = pick(self.rng, ("hex8", "hex8", "uuid", "plate", "word", "digits5"))
        values = pick(self.rng, ("words", "words", "words", "word", "digits5", "brand"))
        said = _Said("")
        for _ in range(int(self.rng.integers(1, 7))):
            key, value = self._fresh(keys), self._fresh(values)
            subject = question.replace("{k}", key)
            if subject in self.known:
                continue
            self._know(_Known("pair", subject, "pair", value, [subject], [answer.replace("{k}", key)]))
            sentence, span = fill(line.replace("{k}", key), value)
            told = _Said(sentence, (_Mark(span[0], Told(subject, value, 0)),))
            said = said + _Said(" ") + told if said.text else told
        if self._chance(0.5):
            self._write_plain(self._amid(said))
        else:
            opener = pick(self.rng, wording.LISTING)
            self._write_session([(said.behind(opener), _Said(pick(self.rng, wording.HEARD)))])

    # ---- exchanges -------------------------------------------------------------------------------------------

    def _fact(self) -> Exchange:
        """Something is told that was not told before."""
        fact = self._new_fact()
        value = self._fresh_of(fact)
        known = _Known("fact", fact.subject, fact.group, value, fact.asked, fact.answered, fact=fact)
        self._know(known)
        sentence, span = fill(pick(self.rng, fact.told), value)
        said = _Said(sentence, (_Mark(span[0], Told(fact.subject, value, 0)),))
        return said.behind(pick(self.rng, wording.TELLING)), _Said(pick(self.rng, wording.HEARD))

    def _change(self) -> Exchange:
        """Something that an earlier session told is different now."""
        some = [
            each
            for each in self.known.values()
            if each.fact is not None and each.session < self.session and len(each.before) < MOST_CHANGES
        ]
        if not some:
            return self._fact()
        known = some[int(self.rng.integers(len(some)))]
        assert known.fact is not None
        value = self._fresh_of(known.fact, {known.value, *known.before})
        known.before.append(known.value)
        known.value = value
        self._know(known)
        sentence, span = fill(pick(self.rng, known.fact.changed), value)
        said = _Said(sentence, (_Mark(span[0], Told(known.subject, value, 0)),))
        heard = pick(self.rng, wording.HEARD)
        if self._chance(0.3):
            heard, _ = fill(pick(self.rng, wording.HEARD_CHANGE), value)
        return said.behind(pick(self.rng, wording.CHANGING)), _Said(heard)

    def _question(self, kinds: Sequence[str]) -> Exchange | None:
        """Something that was last mentioned long enough ago is asked for; None if there is no such thing."""
        some = [each for each in self.known.values() if self.tokens - each.last >= self.config.distance]
        present = [kind for kind in kinds if any(each.kind == kind for each in some)]
        if not present:
            return None
        odds = np.array([_KINDS[kind] for kind in present])
        kind = present[int(self.rng.choice(len(present), p=odds / odds.sum()))]
        some = [each for each in some if each.kind == kind]
        changed = [each for each in some if each.before]
        # Half of the questions for facts are for those that changed, where only the newest value is right.
        known = self._one_of(changed if changed and self._chance(0.5) else some)
        question = pick(self.rng, known.asked)
        since = self.tokens - known.last
        known.last = self.tokens
        if known.before and self._chance(0.08):
            answer, span = fill(pick(self.rng, wording.WAS), known.before[-1])
            mark = _Mark(span[0], Asked("earlier", known.subject, answer[slice(*span)], 0, since))
            return _Said(question + pick(self.rng, wording.BEFORE)), _Said(answer, (mark,))
        bare = kind == "fact" and self._chance(0.15)
        answer, span = fill(pick(self.rng, wording.BARE if bare else known.answered), known.value)
        said = _Said(answer, (_Mark(span[0], Asked(kind, known.subject, answer[slice(*span)], 0, since)),))
        if kind != "fact":
            return _Said(question), said
        lead = "" if bare else pick(self.rng, wording.ANSWERING)
        return _Said(pick(self.rng, wording.ASKING) + question), said.behind(lead)

    def _unknown(self) -> Exchange:
        """Something is asked for that was never told."""
        fact = self._new_fact(alike=True)
        mark = _Mark(0, Asked("unknown", fact.subject, None, 0, 0))
        question = pick(self.rng, wording.ASKING) + pick(self.rng, fact.asked)
        return _Said(question), _Said(pick(self.rng, wording.UNKNOWN), (mark,))

    def _small_talk(self, most: int) -> list[Exchange]:
        count = int(self.rng.integers(most + 1))
        some = self.rng.permutation(len(wording.EXCHANGES))[:count]
        return [(_Said(wording.EXCHANGES[i][0]), _Said(wording.EXCHANGES[i][1])) for i in some]

    # ---- what there is to draw from ----------------------------------------------------------------------------

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _one_of(self, some: Sequence[_Known]) -> _Known:
        return some[int(self.rng.integers(len(some)))]

    def _new_fact(self, *, alike: bool = False) -> Fact:
        """A fact that was not told; `alike`: rather one of a group of which something was told."""
        groups = {each.group for each in self.known.values()} if alike and self._chance(0.7) else set()
        while True:
            # Facts that belong to people are the most by far: every other one is of another kind.
            some = FACTS if self._chance(0.5) else _OTHERS
            fact = some[int(self.rng.integers(len(some)))]
            if fact.subject not in self.known and (fact.group in groups or not groups or self._chance(0.02)):
                return fact

    def _fresh(self, kind: str) -> str:
        """A value that nothing has yet, if a few draws find one."""
        taken = {each.value for each in self.known.values()}
        draws = (VALUES[kind](self.rng) for _ in range(8))
        value = VALUES[kind](self.rng)
        return next((drawn for drawn in draws if drawn not in taken), value)

    def _fresh_of(self, fact: Fact, never: Collection[str] = ()) -> str:
        """A value of a fact that nothing else has, if a few draws find one; none of `never`."""
        taken = {each.value for each in self.known.values()}.union(never)
        for attempt in range(1000):
            value = fact.draw(self.rng)
            if value not in (taken if attempt < 8 else never):
                return value
        raise AssertionError(f"{fact.subject} has too few values")

    def _know(self, known: _Known) -> None:
        known.last, known.session = self.tokens, self.session
        self.known[known.subject] = known

    def _passage(self) -> str:
        """A stretch of a random document, between two words."""
        wanted = int(self.passage * self.rng.uniform(0.5, 1.5))
        while True:
            document = self.filler[int(self.rng.integers(len(self.filler)))]
            start = int(self.rng.integers(max(1, len(document) - wanted)))
            text = self.tokenizer.decode(document[start : start + wanted].tolist(), skip_special_tokens=True)
            whole = text if len(document) <= wanted else text.partition(" ")[2].rpartition(" ")[0]
            if whole.strip():
                return whole.strip()

    def _amid(self, said: _Said) -> _Said:
        """As a paragraph of its own in a passage."""
        passage = self._passage()
        gaps = [0, *(i for i, letter in enumerate(passage) if letter.isspace()), len(passage)]
        gap = gaps[int(self.rng.integers(len(gaps)))]
        before, after = passage[:gap], passage[gap:].lstrip()
        return said.behind(f"{before}\n\n" if before else "") + _Said(f"\n\n{after}" if after else "")

    # ---- writing -----------------------------------------------------------------------------------------------

    def _write_session(self, exchanges: Sequence[Exchange], *, opened: bool = False) -> None:
        """Exchanges in any order, in the chat template; `opened`: as a new window begins, with the system prompt."""
        said = [each for place in self.rng.permutation(len(exchanges)) for each in exchanges[place]]
        turns = [Turn("assistant" if i % 2 else "user", each.text) for i, each in enumerate(said)]
        text = (self.opening if opened else "") + session_text(self.tokenizer, turns)
        marks, at = [], 0
        for each in said:
            at = text.index(each.text, at)
            marks += _Said(each.text, each.marks).behind(text[:at]).marks
            at += len(each.text)
        self._write(_Said(text, tuple(marks)))
        self.session += 1

    def _write_plain(self, said: _Said) -> None:
        self._write(said.behind("\n\n") + _Said("\n\n"))

    def _write(self, said: _Said) -> None:
        for mark in said.marks:
            start = self.characters + mark.start
            if isinstance(mark.record, Told):
                self.told.append(dataclasses.replace(mark.record, start=start))
            else:
                self.asked.append(dataclasses.replace(mark.record, start=start))
        self.pieces.append(said.text)
        self.characters += len(said.text)
        self.tokens += len(self.tokenizer(said.text, add_special_tokens=False)["input_ids"])
        # Distances count from the end of the part that mentions a thing.
        for subject in {mark.record.subject for mark in said.marks} & self.known.keys():
            self.known[subject].last = self.tokens


_OTHERS = tuple(fact for fact in FACTS if fact.group in ("own", "seen"))
