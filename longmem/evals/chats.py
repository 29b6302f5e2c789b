"""Generated conversations: facts of a user told among small talk, some corrected in a later session.

Everything said is written for this file. Wording is split in two: what is *seen* may be trained on, what is *unseen* is
kept for evaluation; no sentence of one is in the other. Values (names, towns, dates …) are shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from longmem.errors import ConfigError

Kind = Literal["once", "corrected", "silent"]
Split = Literal["seen", "unseen"]
KINDS: tuple[Kind, ...] = ("once", "corrected", "silent")
SPLITS: tuple[Split, ...] = ("seen", "unseen")


@dataclass(frozen=True)
class Wording:
    """How a fact is told, corrected and asked for; `{}` is its value."""

    told: str
    corrected: str
    question: str
    begun: str


@dataclass(frozen=True)
class Attribute:
    """A fact of a user, and what its value may be."""

    name: str
    values: tuple[str, ...]
    seen: Wording
    unseen: Wording


@dataclass(frozen=True)
class SmallTalk:
    """What is said besides facts.

    Attributes:
        exchanges: a user's remark and the reply.
        told, corrected: what may stand before a fact, and before a correction.
        replies: to either.
    """

    exchanges: tuple[tuple[str, str], ...]
    told: tuple[str, ...]
    corrected: tuple[str, ...]
    replies: tuple[str, ...]


_NAMES = "Agnes Bruno Celia Dmitri Elsa Farid Greta Hugo Irene Jonas Klara Leon Mabel Nils Olga Pablo Rosa Stefan Tilda"
_PETS = "Biscuit Pepper Ziggy Mocha Waffles Shadow Clover Pickle Nugget Tango Olive Bandit Maple Domino Sprout Comet"
_TOWNS = "Lisbon Oslo Naples Krakow Ghent Seville Bergen Lyon Dresden Porto Turin Malmo Cork Graz Basel Split Leeds"
_JOBS = "carpenter nurse baker pilot plumber librarian dentist welder florist tailor chemist farmer lawyer barber chef"
_COLOURS = "turquoise crimson yellow purple orange silver green maroon beige indigo scarlet violet brown pink gold"
_FOODS = "dumplings lasagna pancakes sushi curry ramen paella tacos falafel risotto goulash noodles pizza omelettes"
_DRINKS = "lemonade cocoa espresso cider tea milk coffee kombucha ginger-ale buttermilk"
_INSTRUMENTS = "cello piano trumpet harp banjo flute oboe violin drums clarinet ukulele accordion"
_LANGUAGES = "Welsh Italian Turkish Finnish Korean Swahili Polish Greek Dutch Hindi Basque Czech"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_CARS = "Volvo Fiat Toyota Skoda Renault Mazda Subaru Honda Peugeot Bentley"
_SUBJECTS = "chemistry history botany geology law medicine music physics astronomy philosophy economics"
_SPORTS = "rowing fencing tennis judo curling archery swimming climbing badminton skiing boxing cycling"
_FLOWERS = "tulips roses orchids peonies daisies lilies irises dahlias lavender violets"
_ALLERGENS = "peanuts pollen shellfish penicillin strawberries latex eggs wasps mustard celery"
_PROJECTS = "Firefly Lighthouse Marigold Compass Sparrow Granite Tidepool Juniper Meteor Harvest"
_MONTHS = "January February March April May June July August September October November December"


def _attribute(name: str, values: Sequence[str], seen: Sequence[str], unseen: Sequence[str]) -> Attribute:
    return Attribute(name, tuple(values), Wording(*seen), Wording(*unseen))


ATTRIBUTES = (
    _attribute(
        "dog",
        _PETS.split(),
        ("My dog is called {}.", "My dog is called {} now.", "What is my dog called?", "Your dog is called"),
        ("We named our dog {}.", "We renamed our dog {}.", "What did we name our dog?", "You named your dog"),
    ),
    _attribute(
        "cat",
        _PETS.split(),
        ("My cat's name is {}.", "My cat's name is {} after all.", "What is my cat's name?", "Your cat's name is"),
        ("Our cat answers to {}.", "Our cat now answers to {}.", "What does our cat answer to?", "Your cat answers to"),
    ),
    _attribute(
        "home",
        _TOWNS.split(),
        ("I live in {}.", "I have moved, and now I live in {}.", "Where do I live?", "You live in"),
        ("My home is in {}.", "My home is in {} these days.", "Where is my home?", "Your home is in"),
    ),
    _attribute(
        "sister's town",
        _TOWNS.split(),
        ("My sister lives in {}.", "My sister lives in {} now.", "Where does my sister live?", "Your sister lives in"),
        (
            "My sister has a flat in {}.",
            "My sister has a new flat, in {}.",
            "Which town is my sister's flat in?",
            "Your sister's flat is in",
        ),
    ),
    _attribute(
        "job",
        _JOBS.split(),
        ("I work as a {}.", "I changed jobs and now work as a {}.", "What do I work as?", "You work as a"),
        (
            "I earn my living as a {}.",
            "I now earn my living as a {}.",
            "How do I earn my living?",
            "You earn your living as a",
        ),
    ),
    _attribute(
        "colour",
        _COLOURS.split(),
        (
            "My favourite colour is {}.",
            "My favourite colour is {} now.",
            "What is my favourite colour?",
            "Your favourite colour is",
        ),
        (
            "The colour I like best is {}.",
            "The colour I like best has become {}.",
            "Which colour do I like best?",
            "The colour you like best is",
        ),
    ),
    _attribute(
        "food",
        _FOODS.split(),
        (
            "My favourite food is {}.",
            "My favourite food is {} these days.",
            "What is my favourite food?",
            "Your favourite food is",
        ),
        ("I love to eat {}.", "What I love to eat now is {}.", "What do I love to eat?", "You love to eat"),
    ),
    _attribute(
        "drink",
        _DRINKS.split(),
        (
            "In the morning I drink {}.",
            "In the morning I drink {} now.",
            "What do I drink in the morning?",
            "In the morning you drink",
        ),
        (
            "I start my day with {}.",
            "I now start my day with {}.",
            "What do I start my day with?",
            "You start your day with",
        ),
    ),
    _attribute(
        "instrument",
        _INSTRUMENTS.split(),
        ("I play the {}.", "I have switched and play the {}.", "Which instrument do I play?", "You play the"),
        (
            "I am learning the {}.",
            "I gave that up and am learning the {}.",
            "Which instrument am I learning?",
            "You are learning the",
        ),
    ),
    _attribute(
        "language",
        _LANGUAGES.split(),
        (
            "I am studying {}.",
            "I dropped that and am studying {}.",
            "Which language am I studying?",
            "You are studying",
        ),
        ("I take lessons in {}.", "I take lessons in {} now.", "What do I take lessons in?", "You take lessons in"),
    ),
    _attribute(
        "dentist",
        _DAYS.split(),
        (
            "My dentist appointment is on {}.",
            "My dentist appointment is on {} instead.",
            "When is my dentist appointment?",
            "Your dentist appointment is on",
        ),
        (
            "The dentist will see me on {}.",
            "The dentist will see me on {}, not when I said.",
            "On which day will the dentist see me?",
            "The dentist will see you on",
        ),
    ),
    _attribute(
        "gym",
        _DAYS.split(),
        (
            "I go to the gym every {}.",
            "I go to the gym every {} now.",
            "When do I go to the gym?",
            "You go to the gym every",
        ),
        (
            "My day for the gym is {}.",
            "My day for the gym is now {}.",
            "What is my day for the gym?",
            "Your day for the gym is",
        ),
    ),
    _attribute(
        "brother",
        _NAMES.split(),
        (
            "My brother's name is {}.",
            "My brother goes by {} now.",
            "What is my brother's name?",
            "Your brother's name is",
        ),
        ("I have a brother, {}.", "My brother calls himself {}.", "Who is my brother?", "Your brother is"),
    ),
    _attribute(
        "friend",
        _NAMES.split(),
        ("My best friend is {}.", "My best friend is {} now.", "Who is my best friend?", "Your best friend is"),
        (
            "The friend I trust most is {}.",
            "The friend I trust most is now {}.",
            "Which friend do I trust most?",
            "The friend you trust most is",
        ),
    ),
    _attribute(
        "teacher",
        _NAMES.split(),
        (
            "My teacher is called {}.",
            "My new teacher is called {}.",
            "What is my teacher called?",
            "Your teacher is called",
        ),
        ("I am taught by {}.", "I am taught by {} now.", "Who am I taught by?", "You are taught by"),
    ),
    _attribute(
        "car",
        _CARS.split(),
        ("I drive a {}.", "I sold my car and drive a {}.", "Which car do I drive?", "You drive a"),
        ("My car is a {}.", "My car is now a {}.", "What make is my car?", "Your car is a"),
    ),
    _attribute(
        "daughter",
        _SUBJECTS.split(),
        (
            "My daughter studies {}.",
            "My daughter studies {} now.",
            "What does my daughter study?",
            "Your daughter studies",
        ),
        (
            "My daughter is reading {} at university.",
            "My daughter has changed to {} at university.",
            "Which subject is my daughter's at university?",
            "Your daughter's subject at university is",
        ),
    ),
    _attribute(
        "sport",
        _SPORTS.split(),
        ("My sport is {}.", "My sport is {} now.", "What is my sport?", "Your sport is"),
        ("I train for {}.", "I train for {} now.", "What do I train for?", "You train for"),
    ),
    _attribute(
        "flowers",
        _FLOWERS.split(),
        ("My mother loves {}.", "My mother loves {} more.", "Which flowers does my mother love?", "Your mother loves"),
        (
            "My mother would be happy about {}.",
            "My mother would rather be given {}.",
            "Which flowers should I give my mother?",
            "You should give your mother",
        ),
    ),
    _attribute(
        "allergy",
        _ALLERGENS.split(),
        (
            "I am allergic to {}.",
            "The test says I am allergic to {} instead.",
            "What am I allergic to?",
            "You are allergic to",
        ),
        (
            "I must stay away from {}.",
            "What I must stay away from is {}.",
            "What must I stay away from?",
            "You must stay away from",
        ),
    ),
    _attribute(
        "project",
        _PROJECTS.split(),
        (
            "My project is named {}.",
            "My project is named {} now.",
            "What is my project named?",
            "Your project is named",
        ),
        ("At work I lead {}.", "At work I have moved on to lead {}.", "Which project do I lead?", "At work you lead"),
    ),
    _attribute(
        "bus",
        [str(number) for number in range(12, 98)],
        ("My bus is number {}.", "My bus is number {} now.", "Which bus is mine?", "Your bus is number"),
        ("I get home by bus {}.", "I get home by bus {} now.", "By which bus do I get home?", "You get home by bus"),
    ),
    _attribute(
        "room",
        [str(number) for number in range(101, 480, 7)],
        ("My office is room {}.", "My office is room {} now.", "Which room is my office?", "Your office is room"),
        ("You can find me in room {}.", "Now you can find me in room {}.", "Which room am I in?", "You are in room"),
    ),
    _attribute(
        "birthday",
        [f"{day} {month}" for month in _MONTHS.split() for day in (3, 8, 14, 19, 22, 27)],
        (
            "My wife's birthday is on {}.",
            "My wife's birthday is on {}, I mixed it up.",
            "When is my wife's birthday?",
            "Your wife's birthday is on",
        ),
        (
            "My wife was born on {}.",
            "My wife was in fact born on {}.",
            "On which date was my wife born?",
            "Your wife was born on",
        ),
    ),
)

TALK: dict[Split, SmallTalk] = {
    "seen": SmallTalk(
        exchanges=(
            ("How are you today?", "I am well, thank you. How can I help?"),
            ("It has rained all morning.", "Then it is a good day to stay inside."),
            ("I slept badly.", "I am sorry to hear that. A short walk may help."),
            ("Tell me something nice.", "Bees dance to show each other the way to flowers."),
            ("I have a lot to do.", "Shall we make a list, and begin with the shortest task?"),
            ("What should I cook with leeks?", "A soup with potatoes is quick and warms you."),
            ("My train was late again.", "How annoying. I hope you did not wait long."),
            ("The neighbours are noisy.", "Perhaps a friendly word with them will do."),
            ("I finished a good book.", "That is a fine feeling. Was the end a surprise?"),
            ("Do you like music?", "I cannot hear it, but I like to talk about it."),
            ("I need a short break.", "Stand up, stretch, and look out of the window."),
            ("Is it too late for another cup?", "That depends on how well you want to sleep."),
        ),
        told=("", "By the way: ", "Just so you know: ", "Something about me: "),
        corrected=("", "Correction: ", "Something has changed: "),
        replies=("I will remember that.", "Thank you for telling me.", "Good to know.", "Noted."),
    ),
    "unseen": SmallTalk(
        exchanges=(
            ("Good evening!", "Good evening! What shall we talk about?"),
            ("The sun is out at last.", "Wonderful. It is time to open the windows."),
            ("I am a little tired.", "Then let us keep it short."),
            ("Can you cheer me up?", "Otters hold hands while they sleep, so as not to drift apart."),
            ("I cleaned the whole kitchen.", "Well done. That deserves a rest."),
            ("What goes well with beetroot?", "Goat cheese, walnuts and a few drops of vinegar."),
            ("There was a long queue at the bakery.", "At least the bread must be good there."),
            ("My phone is nearly empty.", "Plug it in soon, and dim the screen until then."),
            ("I watched the snow fall for an hour.", "That sounds peaceful."),
            ("Do you ever get bored?", "Not while there is somebody to talk to."),
            ("I cannot find my glasses.", "Have you looked on top of your head?"),
            ("I wrote three letters today.", "Few people still do. They will be glad."),
        ),
        told=("", "Please keep in mind: ", "You should know this: ", "For your information: "),
        corrected=("", "An update for you: ", "I have to put something right: "),
        replies=("All right, I have it.", "I see, thanks.", "That is useful to know.", "Understood."),
    ),
}


@dataclass(frozen=True)
class Turn:
    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True)
class Telling:
    """Where a fact is told: characters of the content of one turn.

    Attributes:
        attribute, value: what is told.
        session, turn: where.
        evidence: [start, end) of the sentence.
        span: [start, end) of the value.
        current: False where a later session corrects it.
    """

    attribute: str
    value: str
    session: int
    turn: int
    evidence: tuple[int, int]
    span: tuple[int, int]
    current: bool


@dataclass(frozen=True)
class Chat:
    """Sessions of one user, and what is asked in the next one.

    Attributes:
        kind: `once` told, `corrected` later (the newest value is right), or `silent`: never told.
        attribute: asked for.
        sessions: turns of each session, oldest first.
        tellings: every fact told in them.
        wrong_sessions: the same sessions with other values.
        question, begun: asked in a new session, and how the answer begins.
        answer: what follows; of a silent chat a value that is told nowhere in it.
        stale: the value before the correction.
        wrong: what the wrong sessions say.
    """

    kind: Kind
    attribute: str
    sessions: tuple[tuple[Turn, ...], ...]
    tellings: tuple[Telling, ...]
    wrong_sessions: tuple[tuple[Turn, ...], ...]
    question: str
    begun: str
    answer: str
    stale: str | None
    wrong: str | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ChatConfig:
    """How conversations are made.

    Attributes:
        sessions: before the one that asks.
        facts: told besides the one that is asked for.
        small_talk: exchanges of each session that tell nothing.
        seed: of everything drawn.
    """

    sessions: int = 4
    facts: int = 4
    small_talk: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("sessions", 2, None),
            ("facts", 0, len(ATTRIBUTES) - 1),
            ("small_talk", 1, min(len(TALK[split].exchanges) for split in SPLITS)),
        ):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                bounds = f"at least {least}" if most is None else f"from {least} to {most}"
                raise ConfigError(f"{name} must be {bounds}; got {value}.")


def generate_chats(count: int, split: Split, config: ChatConfig | None = None) -> Iterator[Chat]:
    """Conversations in the wording of one split, kinds in turn.

    A seed gives the same first conversations however many are asked for. Train on `seen`, evaluate on `unseen`.
    """
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}; choose {' or '.join(SPLITS)}.")
    config = config or ChatConfig()
    for number in range(count):
        rng = np.random.default_rng((config.seed, SPLITS.index(split), number))
        yield _chat(KINDS[number % len(KINDS)], split, config, rng)


@dataclass(frozen=True)
class _Plan:
    """A fact to be told: what the sessions say, and what the wrong ones say."""

    attribute: Attribute
    session: int
    correction: bool
    values: tuple[str, str]
    current: bool = True


def _chat(kind: Kind, split: Split, config: ChatConfig, rng: np.random.Generator) -> Chat:
    asked, *others = (ATTRIBUTES[i] for i in rng.permutation(len(ATTRIBUTES))[: 1 + config.facts])
    taken: set[str] = set()

    def draw(attribute: Attribute) -> str:
        value = str(rng.choice([value for value in attribute.values if value not in taken]))
        taken.add(value)
        return value

    # The asked fact draws first: days of the week run out.
    answer = draw(asked)
    wrong = stale = None
    plans = []
    if kind == "once":
        wrong = draw(asked)
        plans.append(_Plan(asked, int(rng.integers(config.sessions)), False, (answer, wrong)))
    elif kind == "corrected":
        wrong, stale, wrong_stale = draw(asked), draw(asked), draw(asked)
        first, second = sorted(int(n) for n in rng.choice(config.sessions, size=2, replace=False))
        plans.append(_Plan(asked, first, False, (stale, wrong_stale), current=False))
        plans.append(_Plan(asked, second, True, (answer, wrong)))
    for attribute in others:
        session = int(rng.integers(config.sessions))
        plans.append(_Plan(attribute, session, False, (draw(attribute), draw(attribute))))

    talk = TALK[split]
    told: list[tuple[Turn, ...]] = []
    told_wrong: list[tuple[Turn, ...]] = []
    tellings: list[Telling] = []
    for session in range(config.sessions):
        said: list[_Plan | tuple[str, str]] = [plan for plan in plans if plan.session == session]
        said += [talk.exchanges[i] for i in rng.permutation(len(talk.exchanges))[: config.small_talk]]
        right, other = [], []
        for place in rng.permutation(len(said)):
            item = said[place]
            if isinstance(item, tuple):
                contents, reply = (item[0], item[0]), item[1]
            else:
                wording = getattr(item.attribute, split)
                template = wording.corrected if item.correction else wording.told
                opener = str(rng.choice(talk.corrected if item.correction else talk.told))
                contents = tuple(opener + template.format(value) for value in item.values)
                reply = str(rng.choice(talk.replies))
                start = len(opener) + template.index("{}")
                tellings.append(
                    Telling(
                        attribute=item.attribute.name,
                        value=item.values[0],
                        session=session,
                        turn=len(right),
                        evidence=(len(opener), len(contents[0])),
                        span=(start, start + len(item.values[0])),
                        current=item.current,
                    )
                )
            right += [Turn("user", contents[0]), Turn("assistant", reply)]
            other += [Turn("user", contents[1]), Turn("assistant", reply)]
        told.append(tuple(right))
        told_wrong.append(tuple(other))
    wording = getattr(asked, split)
    return Chat(
        kind=kind,
        attribute=asked.name,
        sessions=tuple(told),
        tellings=tuple(tellings),
        wrong_sessions=tuple(told_wrong),
        question=wording.question,
        begun=wording.begun,
        answer=answer,
        stale=stale,
        wrong=wrong,
    )
