"""Histories: sessions in which facts are told and changed, passages with things hidden in them, and questions that come
when what they ask for has long left the window.

Sessions stand in the backbone's chat template, as `longmem.evals.facts` renders them and `ChatSession` leaves them in a
bank. All wording is that of `facts.txt`, `wording` and `instructions`; what is said besides may be the backbone's own
(`replies`), so that a network trained on histories keeps what the backbone says where nothing is to be remembered.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from longmem.data import Document, TokenizedDocuments
from longmem.errors import ConfigError, SourceError
from longmem.evals.chats import Turn
from longmem.evals.facts import opening_and_turn, session_text
from longmem.histories import wording
from longmem.histories.facts import FACTS, Fact, capital, second_person
from longmem.histories.instructions import CHANGE_ALL, INSTRUCTIONS
from longmem.histories.replies import Reply
from longmem.histories.topics import Topic, exchange, fill, in_plain_text, plain_exchange, question, refusal
from longmem.histories.values import VALUES, pick

# Two sentences of prose, one after the other.
_SENTENCES = re.compile(r'(?<=[.!?]\s)([A-Z][^.!?"“”|_]{30,120}[.!?])\s([A-Z][^.!?"“”|_]{20,100}[.!?])')


@dataclass(frozen=True)
class HistoryConfig:
    """How much is written, and how far apart things are.

    Attributes:
        tokens: of all histories together, at least.
        shortest, longest: tokens of a history, which is longer by what its last part has too many.
        distance: tokens, at least, between the last mention of something and a question for it. No less than a training
            segment, or the answer may stand in the window; and a whole number of segments, as questions are put where
            every so many tokens begin.
        near: share of the questions, as far as there is enough to ask, that ask for what was mentioned less than `NEAR`
            tokens ago, so that the window stays trusted. Their answers are not marked.
        reply_share: how often ordinary prompts with replies, if there are any, stand where questions would.
        seed: of everything drawn.
    """

    tokens: int = 20_000_000
    shortest: int = 16384
    longest: int = 32768
    distance: int = 2048
    near: float = 0.15
    reply_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1; got {self.tokens}.")
        if not 0 <= self.distance < self.shortest <= self.longest:
            raise ConfigError(
                "A history is from shortest to longest tokens long, and longer than the distance of its questions; got "
                f"shortest {self.shortest}, longest {self.longest}, distance {self.distance}."
            )
        if not 0 <= self.near < 1:
            raise ConfigError(f"near is a share of the questions, from 0 to less than 1; got {self.near}.")
        if not 0 <= self.reply_share < 1:
            raise ConfigError(
                f"reply_share is a share of the questions, from 0 to less than 1; got {self.reply_share}."
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
        kind: `fact`, `instruction`, `earlier` (the value before the newest), `only` (the same, but there is no other),
            `secret`, `pair`, `quote`, or `unknown`: never told.
        subject: as in `Told`.
        answer: what stands at `start`; None if it was never told.
        start: in characters.
        tokens_since: tokens, at least, between the last mention of the answer and the question.
        near: whether the answer was mentioned only a little before, so that the window has it.
    """

    kind: str
    subject: str
    answer: str | None
    start: int
    tokens_since: int
    near: bool = False


@dataclass(frozen=True)
class Replied:
    """A reply to an ordinary prompt.

    Attributes:
        reply: what stands at `start`.
        start: in characters.
        begun: how many of its characters are marked like an answer, since they decide whether it is one or a refusal.
            None of every other reply: what is marked is learned from with the right bank only.
    """

    reply: str
    start: int
    begun: int


@dataclass(frozen=True)
class History:
    """One user's history, and what is told, asked and otherwise replied in it, in order."""

    name: str
    text: str
    told: tuple[Told, ...]
    asked: tuple[Asked, ...]
    replied: tuple[Replied, ...] = ()

    @property
    def document(self) -> Document:
        """The text, with the answers marked that must be remembered: those of near questions need no memory."""
        far = (each for each in self.asked if not each.near)
        spans = [(each.start, each.start + len(each.answer)) for each in far if each.answer is not None]
        spans += [(each.start, each.start + each.begun) for each in self.replied if each.begun]
        return Document(self.name, self.text, tuple(sorted(spans)))


def generate_histories(
    filler: TokenizedDocuments, tokenizer: Any, config: HistoryConfig, replies: Sequence[Reply] = ()
) -> Iterator[History]:
    """Histories until there are `config.tokens` tokens; a seed gives the same first ones however many are asked for.

    Args:
        filler: documents whose passages lie between what is told and asked.
        tokenizer: of the backbone that will be trained; its chat template is used.
        replies: that backbone's own, to ordinary prompts.

    Raises:
        SourceError: the filler is empty.
    """
    if not filler.num_tokens:
        raise SourceError("The texts between what is told and asked are empty. Give documents with text in them.")
    template = _Template(tokenizer)
    number = written = 0
    while written < config.tokens:
        writer = _Writer(filler, template, config, replies, np.random.default_rng((config.seed, number)))
        yield writer.write(f"history/{config.seed}/{number}")
        written += writer.tokens
        number += 1


@dataclass
class _Known:
    """Something that was told.

    Attributes:
        topic: what it is; a `Fact` may change.
        value: its newest value.
        last: tokens of the history when it was last mentioned.
        session: which session told it.
        before: its values before the newest.
    """

    topic: Topic
    value: str
    last: int = 0
    session: int = 0
    before: list[str] = field(default_factory=list)

    @property
    def subject(self) -> str:
        return self.topic.subject


@dataclass(frozen=True)
class _Mark:
    """What begins at a character of a text; the `start` of the record is put in when the text has its place."""

    start: int
    record: Told | Asked | Replied


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
_EARLY, _LATE = (0.36, 0.08, 0.14, 0.32, 0.10), (0.13, 0.05, 0.08, 0.24, 0.50)
_BEGINNING = 0.4
# Some facts have few values (days of the week), and a new one must be none that was told before.
MOST_CHANGES = 4
# How likely a question is to be of each kind, where something of each was told.
_KINDS = {"fact": 0.5, "secret": 0.2, "pair": 0.17, "instruction": 0.08, "quote": 0.05}
# Tokens: what was mentioned fewer ago is near.
NEAR = 500
# Words of a reply that decide what it is.
_BEGUN = re.compile(r"\S+(?:\s+\S+){0,2}")


class _Template:
    """A chat template, rendered once for each number of turns: it says the same around any turns."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.opening = opening_and_turn(tokenizer, "-")[0]
        # Some templates end a reply with what `session_text` leaves to the next turn.
        self.end = ""
        if getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _TURN}]
            _, _, end = tokenizer.apply_chat_template(turns, tokenize=False).partition(_TURN)
            self.end = end.removeprefix(
                session_text(tokenizer, [Turn("user", "-"), Turn("assistant", _TURN)]).partition(_TURN)[2]
            )
        self.rendered: dict[int, list[_Said]] = {}

    def around(self, count: int) -> list[_Said]:
        """What stands before, between and behind so many turns."""
        if count not in self.rendered:
            turns = [Turn("assistant" if i % 2 else "user", _TURN) for i in range(count)]
            self.rendered[count] = [_Said(text) for text in session_text(self.tokenizer, turns).split(_TURN)]
        return self.rendered[count]


# Stands for what is said where the template is rendered.
_TURN = "8c1f9e"


class _Writer:
    """Writes one history."""

    def __init__(
        self,
        filler: TokenizedDocuments,
        template: _Template,
        config: HistoryConfig,
        replies: Sequence[Reply],
        rng: np.random.Generator,
    ) -> None:
        self.filler = filler
        self.template = template
        self.tokenizer = template.tokenizer
        self.config = config
        self.replies = replies
        self.rng = rng
        self.tokens = 0
        self.characters = 0
        self.session = 0
        self.pieces: list[str] = []
        self.told: list[Told] = []
        self.asked: list[Asked] = []
        self.replied: list[Replied] = []
        self.known: dict[str, _Known] = {}
        # Some histories are dense, others have long passages as a bank of books would.
        self.passage = int(pick(rng, ("150", "300", "300", "512", "800")))

    def write(self, name: str) -> History:
        length = int(self.rng.integers(self.config.shortest, self.config.longest + 1))
        parts = {"tell": self._tell, "list": self._list, "hide": self._hide, "read": self._read, "ask": self._ask}
        if self._may_reply and self._chance(0.3):
            self._converse(far=True)
        while self.tokens < length:
            if self._chance(0.75) and self._ask_at_once():
                continue
            odds = _EARLY if self.tokens < _BEGINNING * length else _LATE
            parts[_PARTS[int(self.rng.choice(len(_PARTS), p=odds))]]()
        return History(name, "".join(self.pieces), tuple(self.told), tuple(self.asked), tuple(self.replied))

    # ---- parts of a history ----------------------------------------------------------------------------------

    def _tell(self) -> None:
        """A session in which things are told or changed, among small talk; one of them may be asked for at once."""
        count = int(self.rng.integers(1, 5))
        exchanges = [self._change() if self._chance(0.4) else self._fact() for _ in range(count)]
        near = self._near_question() if self._owes_near else None
        talk = self._small_talk(3)
        self._write_session([*exchanges, *talk], then=[near] if near else [], opened=self._chance(0.3))

    def _ask(self, *, plain: float = 0.3, far: bool = False) -> None:
        """Questions, most of them in a session, or, as likely as `plain`, one as text without a chat; `far`: none of
        them near."""
        if self._may_reply and self._chance(self.config.reply_share):
            self._converse(far=far)
            return
        if self._chance(plain):
            said = self._unknown_in_plain_text() if self._chance(0.12) else self._plain_question(far=far)
            if said is not None:
                self._write_plain(said)
                return
        exchanges: list[Exchange] = []
        if self._chance(0.1):
            exchanges.append(self._fact())
        # In a session that tells in any order nothing may be asked for twice, or for what it tells.
        asked = set(self._subjects(exchanges))
        for _ in range(int(self.rng.integers(1, 6))):
            found = self._question(asked, far=far)
            if found is not None:
                exchanges.append(found)
                asked.update(self._subjects([found]))
        if self._chance(0.4 + 0.2 * (not exchanges)):
            exchanges.append(self._unknown())
        if not exchanges:
            self._read()
            return
        self._write_session([*exchanges, *self._small_talk(1)], opened=far or self._chance(0.5))

    def _converse(self, *, far: bool) -> None:
        """A session of ordinary talk; something may be asked for in the end."""
        exchanges = [self._reply() for _ in range(int(self.rng.integers(1, 4)))]
        asked = None
        if self._chance(0.4):
            asked = self._unknown() if self._chance(0.25) else self._question(far=far)
        self._write_session(exchanges, then=[asked] if asked else [], opened=self._chance(0.6))

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
                asked = tuple(template.replace("{k}", key) for template in wording.QUOTING)
                topic = Topic(kind="quote", subject=subject, asked=asked, answered=wording.QUOTED, framed=False)
                self._know(_Known(topic, value))
                said = _Said(passage, (_Mark(match.start(2), Told(subject, value, 0)),))
        if self._chance(0.5):
            self._write_plain(said)
        else:
            sharing, shared = pick(self.rng, wording.SHARING), pick(self.rng, wording.SHARED)
            self._write_session([(said.behind(sharing), _Said(shared))])

    def _ask_at_once(self) -> bool:
        """Where a segment ends soon, fill it with a passage to the token, and ask at the very beginning of the next
        one: nothing but the bank can help where a window begins with a question. False if its end is far."""
        left = -self.tokens % self.config.distance if self.config.distance else 0
        left -= len(self._ids(self._separator))
        if not 0 < left <= self.passage:
            return False
        document = self.filler[int(self.rng.integers(len(self.filler)))]
        start = int(self.rng.integers(max(1, len(document) - left - 8)))
        text = self.tokenizer.decode(document[start : start + left + 8].tolist(), skip_special_tokens=True).strip()
        text = self.tokenizer.decode(self._ids(text)[:left], skip_special_tokens=True).rstrip("\ufffd")
        if not text.strip():
            return False
        self._write_plain(_Said(text))
        self._ask(plain=0.6, far=True)
        return True

    def _hide(self) -> None:
        """A passage with a secret in it, as a paragraph of its own."""
        topic, kind = self._secret()
        if topic.subject in self.known:
            self._read()
            return
        value = self._fresh(kind)
        (name,) = topic.names
        hidden = wording.HIDDEN if self._chance(0.8) else wording.NOTED
        template = pick(self.rng, hidden)
        key = name.removeprefix("the ")
        template = template.replace("{N}", capital(name)).replace("{n}", name).replace("{key}", key)
        sentence, span = fill(template.replace("{key_}", key.replace(" ", "_").replace("'", "")), value)
        self._know(_Known(topic, value))
        said = _Said(sentence, (_Mark(span[0], Told(topic.subject, value, 0)),))
        if self._chance(0.15):
            opener = pick(self.rng, wording.LISTING)
            self._write_session([(said.behind(opener), _Said(pick(self.rng, wording.HEARD))), *self._small_talk(1)])
        else:
            self._write_plain(self._amid(said))

    def _list(self) -> None:
        """Keys with values, told by the user or in a passage."""
        line, asking, answering = wording.LISTED[int(self.rng.integers(len(wording.LISTED)))]
        keys = pick(self.rng, ("hex8", "hex8", "uuid", "plate", "word", "digits5", "lettered", "name", "town"))
        values = pick(
            self.rng, ("words", "words", "words", "word", "anydigits", "anydigits", "brand", "lettered", "time")
        )
        # Lines of data stand below each other, sentences side by side.
        between = " " if line.endswith(".") else "\n"
        said = _Said("")
        for _ in range(int(self.rng.integers(1, 7))):
            key, value = self._fresh(keys), self._fresh(values)
            asked = asking.replace("{k}", key)
            if asked in self.known:
                continue
            topic = Topic(kind="pair", subject=asked, asked=(asked,), answered=(answering.replace("{k}", key),))
            self._know(_Known(topic, value))
            sentence, span = fill(line.replace("{k}", key), value)
            told = _Said(sentence, (_Mark(span[0], Told(asked, value, 0)),))
            said = said + _Said(between) + told if said.text else told
        if not said.text:
            self._read()
        elif self._chance(0.5):
            self._write_plain(self._amid(said))
        else:
            opener = pick(self.rng, wording.LISTING)
            self._write_session([(said.behind(opener), _Said(pick(self.rng, wording.HEARD)))])

    # ---- exchanges -------------------------------------------------------------------------------------------

    def _fact(self) -> Exchange:
        """Something is told that was not told before."""
        fact = self._new_fact()
        value = self._fresh_of(fact)
        self._know(_Known(fact, value))
        sentence, span = fill(pick(self.rng, fact.told), value)
        said = _Said(sentence, (_Mark(span[0], Told(fact.subject, value, 0)),))
        return said.behind(pick(self.rng, wording.TELLING)), _Said(pick(self.rng, wording.HEARD))

    def _change(self) -> Exchange:
        """Something that an earlier session told is different now."""
        some = [
            each
            for each in self.known.values()
            if isinstance(each.topic, Fact) and each.session < self.session and len(each.before) < MOST_CHANGES
        ]
        if not some:
            return self._fact()
        known = some[int(self.rng.integers(len(some)))]
        assert isinstance(known.topic, Fact)
        value = self._fresh_of(known.topic, {known.value, *known.before})
        known.before.append(known.value)
        known.value = value
        self._know(known)
        sentence, span = fill(pick(self.rng, known.topic.changed), value)
        said = _Said(sentence, (_Mark(span[0], Told(known.subject, value, 0)),))
        heard = pick(self.rng, wording.HEARD)
        if self._chance(0.3):
            heard, _ = fill(pick(self.rng, wording.HEARD_CHANGE), value)
        return said.behind(pick(self.rng, wording.CHANGING)), _Said(heard)

    @property
    def _owes_near(self) -> bool:
        """Whether near questions are fewer than their share."""
        near = sum(each.near for each in self.asked)
        return near < self.config.near * (len(self.asked) + 1)

    def _choose(
        self, without: Collection[str] = (), *, kinds: Collection[str] = tuple(_KINDS), far: bool = False
    ) -> tuple[_Known, bool] | None:
        """What to ask for, and whether it is near: something last mentioned long enough ago, or not long at all; None
        if there is no such thing."""
        nearness = 0 if far or not self._owes_near else self._nearness
        some = [each for each in self.known.values() if each.topic.kind in kinds and each.subject not in without]
        near = [each for each in some if self.tokens - each.last < nearness]
        some = [each for each in some if self.tokens - each.last >= self.config.distance]
        some = near or some
        present = [kind for kind in _KINDS if any(each.topic.kind == kind for each in some)]
        if not present:
            return None
        odds = np.array([_KINDS[kind] for kind in present])
        kind = present[int(self.rng.choice(len(present), p=odds / odds.sum()))]
        some = [each for each in some if each.topic.kind == kind]
        changed = [each for each in some if each.before]
        # Half of the questions for facts are for those that changed, where only the newest value is right.
        return self._one_of(changed if changed and self._chance(0.5) else some), bool(near)

    @property
    def _nearness(self) -> int:
        """In tokens."""
        return min(NEAR, self.config.distance)

    def _question(self, without: Collection[str] = (), *, far: bool = False) -> Exchange | None:
        """Something that was told is asked for; None if nothing fits."""
        chosen = self._choose(without, far=far)
        return None if chosen is None else self._exchange(*chosen)

    def _near_question(self) -> Exchange | None:
        """Something is asked for that was mentioned only a little before."""
        some = [each for each in self.known.values() if self.tokens - each.last < self._nearness]
        return self._exchange(self._one_of(some), True) if some else None

    def _exchange(self, known: _Known, near: bool) -> Exchange:
        # Of a change near by, the value before it may be far.
        if known.topic.kind == "fact" and not near and self._chance(0.2 if known.before else 0.1):
            asked = question(self.rng, known.topic, after=pick(self.rng, wording.BEFORE))
            kind, answers = ("earlier", wording.WAS) if known.before else ("only", wording.ONLY)
            value = known.before[-1] if known.before else known.value
            return _Said(asked), self._answered(known, pick(self.rng, answers), value, near, kind)
        asked, template = exchange(self.rng, known.topic)
        return _Said(asked), self._answered(known, template, known.value, near, known.topic.kind)

    def _plain_question(self, *, far: bool = False) -> _Said | None:
        kinds = ("pair", "secret") if self._chance(0.7) else ("fact", "pair", "secret")
        chosen = self._choose(kinds=kinds, far=far)
        if chosen is None:
            return None
        known, near = chosen
        return self._answered(known, plain_exchange(self.rng, known.topic), known.value, near, known.topic.kind)

    def _answered(self, known: _Known, template: str, value: str, near: bool, kind: str) -> _Said:
        """A template with a value, marked as an answer."""
        text, span = fill(template, value)
        asked = Asked(kind, known.subject, text[slice(*span)], 0, self.tokens - known.last, near)
        known.last = self.tokens
        return _Said(text, (_Mark(span[0], asked),))

    def _unknown(self) -> Exchange:
        """Something is asked for that was never told."""
        asked, refused = self._refused(*self._never_told())
        return _Said(asked), refused

    def _unknown_in_plain_text(self) -> _Said:
        asked, refused = self._refused(*self._never_told())
        text = in_plain_text(self.rng, asked, refused.text)
        return _Said(text, refused.behind(text[: text.rindex(refused.text)]).marks)

    def _refused(self, topic: Topic, refusals: Sequence[str]) -> tuple[str, _Said]:
        asked = question(self.rng, topic)
        if refusals:
            text = pick(self.rng, refusals)
        else:
            text = refusal(self.rng, topic, [second_person(each) for each in (*topic.clauses, *topic.names)])
        return asked, _Said(text, (_Mark(0, Asked("unknown", topic.subject, None, 0, 0)),))

    def _never_told(self) -> tuple[Topic, Sequence[str]]:
        """Something that was never told, and how it is refused if in a way of its own."""
        pairs = [each for each in self.known.values() if each.topic.kind == "pair"]
        shape = self.rng.random()
        if shape < 0.15 and pairs:
            _, asking, answering = wording.LISTED[int(self.rng.integers(len(wording.LISTED)))]
            key = self._fresh(pick(self.rng, ("hex8", "plate", "word", "lettered")))
            asked = asking.replace("{k}", key)
            if asked not in self.known:
                topic = Topic(kind="pair", subject=asked, asked=(asked,), answered=(answering.replace("{k}", key),))
                return topic, [text.replace("{k}", key) for text in wording.NO_ENTRY]
        if shape < 0.4:
            topic, _ = self._secret(alike=True)
            if topic.subject not in self.known:
                return topic, ()
        return self._like_one_told() if self._chance(0.8) else self._new_fact(instructions=False), ()

    def _small_talk(self, most: int) -> list[Exchange]:
        count = int(self.rng.integers(most + 1))
        own = sum(self._chance(0.5) for _ in range(count)) if self._may_reply else 0
        some = self.rng.permutation(len(wording.EXCHANGES))[: count - own]
        exchanges = [(_Said(wording.EXCHANGES[i][0]), _Said(wording.EXCHANGES[i][1])) for i in some]
        return exchanges + [self._reply() for _ in range(own)]

    @property
    def _may_reply(self) -> bool:
        """Whether there are replies, and nothing that was told would change them."""
        return bool(self.replies) and not self.known.keys() & CHANGE_ALL

    def _reply(self) -> Exchange:
        reply = self.replies[int(self.rng.integers(len(self.replies)))]
        match = _BEGUN.match(reply.reply)
        begun = len(match[0]) if match and self._chance(0.5) else 0
        return _Said(reply.prompt), _Said(reply.reply, (_Mark(0, Replied(reply.reply, 0, begun)),))

    # ---- what there is to draw from ----------------------------------------------------------------------------

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _one_of(self, some: Sequence[_Known]) -> _Known:
        return some[int(self.rng.integers(len(some)))]

    def _new_fact(self, *, instructions: bool = True) -> Fact:
        """A fact that was not told."""
        while True:
            # Facts that belong to somebody are the most by far: every other one is of another kind.
            shape = self.rng.random()
            some = INSTRUCTIONS if shape < 0.08 and instructions else FACTS if shape < 0.6 else _OTHERS
            fact = some[int(self.rng.integers(len(some)))]
            if fact.subject not in self.known:
                return fact

    def _like_one_told(self) -> Fact:
        """A fact that was not told, but may be taken for one that was: the name of the cat if that of the dog was."""
        told = [each.topic for each in self.known.values() if isinstance(each.topic, Fact)]
        told = [topic for topic in told if topic.kind == "fact"]
        if told:
            one = told[int(self.rng.integers(len(told)))]
            alike = [fact for fact in FACTS if fact.subject not in self.known and fact.resembles(one)]
            # Nearest of all is what is asked for in the same words.
            nearest = [fact for fact in alike if fact.group == one.group and fact.owner]
            alike = nearest if nearest and self._chance(0.5) else alike
            if alike:
                return alike[int(self.rng.integers(len(alike)))]
        return self._new_fact(instructions=False)

    def _secret(self, *, alike: bool = False) -> tuple[Topic, str]:
        """A secret and the kind of its value; `alike`: of a place that has another one, or of the name of another."""
        kind = pick(self.rng, wording.SECRET_KINDS)
        secret, place = pick(self.rng, wording.SECRETS[kind]), pick(self.rng, wording.PLACES)
        names = [each.topic.names[0] for each in self.known.values() if each.topic.kind == "secret"]
        if alike and names:
            other, _, of_place = pick(self.rng, names).removeprefix("the ").partition(" of the ")
            if self._chance(0.5):
                secret = other
            elif of_place:
                place = of_place
        name = f"the {secret} of the {place}" if alike or self._chance(0.8) else f"the {secret}"

        def named(frames: Sequence[str]) -> tuple[str, ...]:
            return tuple(frame.replace("{n}", name).replace("{N}", capital(name)) for frame in frames)

        topic = Topic(
            kind="secret",
            subject=name,
            asked=named(wording.SOUGHT),
            answered=named(wording.FOUND),
            clauses=(f"what {name} is",),
            names=(name,),
            unfinished=(f"{capital(name)} is",),
        )
        return topic, kind

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

    @staticmethod
    def _subjects(exchanges: Sequence[Exchange]) -> Iterator[str]:
        """What exchanges tell and ask."""
        records = (mark.record for both in exchanges for said in both for mark in said.marks)
        return (record.subject for record in records if not isinstance(record, Replied))

    # ---- writing -----------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _write_session(
        self, exchanges: Sequence[Exchange], *, then: Sequence[Exchange] = (), opened: bool = False
    ) -> None:
        """Exchanges in any order and what comes `then`, in the chat template; `opened`: as a new window begins, with
        the system prompt."""
        shuffled = [exchanges[place] for place in self.rng.permutation(len(exchanges))]
        said = [each for both in (*shuffled, *then) for each in both]
        # The templates of chats begin turns with tokens that need nothing before them.
        text = _Said("" if getattr(self.tokenizer, "chat_template", None) else self._separator[:1])
        if opened:
            text += _Said(self.template.opening)
        for frame, each in zip_longest(self.template.around(len(said)), said, fillvalue=_Said("")):
            text += frame + each
        # Every reply is ended, whatever follows; a session that goes on with the same text need not begin with it.
        end = self.template.end
        if end and not opened and self.pieces and self.pieces[-1].endswith(end) and text.text.startswith(end):
            moved = tuple(_Mark(mark.start - len(end), mark.record) for mark in text.marks)
            text = _Said(text.text.removeprefix(end), moved)
        self._write(text + _Said(end))
        self.session += 1

    def _write_plain(self, said: _Said) -> None:
        self._write(said.behind(self._separator))

    @property
    def _separator(self) -> str:
        """What stands before text: pieces must not meet where a tokenizer would make one token of both."""
        return "\n\n" if self.pieces and not self.pieces[-1].endswith("\n") else ""

    def _write(self, said: _Said) -> None:
        for mark in said.marks:
            start = self.characters + mark.start
            if isinstance(mark.record, Told):
                self.told.append(dataclasses.replace(mark.record, start=start))
            elif isinstance(mark.record, Replied):
                self.replied.append(dataclasses.replace(mark.record, start=start))
            else:
                self.asked.append(dataclasses.replace(mark.record, start=start))
        self.pieces.append(said.text)
        self.characters += len(said.text)
        self.tokens += len(self._ids(said.text))
        # Distances count from the end of the part that mentions a thing.
        subjects = {mark.record.subject for mark in said.marks if not isinstance(mark.record, Replied)}
        for subject in subjects & self.known.keys():
            self.known[subject].last = self.tokens


_OTHERS = tuple(fact for fact in FACTS if fact.group in ("own", "seen"))
