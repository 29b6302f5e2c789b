"""Facts told in earlier conversations, some corrected later, asked in a new one.

Conversations are generated (`longmem.evals.chats`) and written as `ChatSession` would leave them in a bank: one source
a session, in the backbone's chat template, without the system prompt. Other text lies between the sessions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeVar

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
    encode_texts,
    other_text,
    save_json,
    score_group,
    under_all_conditions,
)
from longmem.evals.chats import ATTRIBUTES, KINDS, Chat, ChatConfig, Split, Turn, generate_chats
from longmem.focus import FOCUS
from longmem.focus import check as check_focus
from longmem.model import LongMem

Part = TypeVar("Part")
LABELS = (RIGHT, "stale", "wrong", "borrowed", "stray")
# Stands for a reply where the template is asked how the next turn begins.
_REPLY = "8c1f9e"


@dataclass(frozen=True)
class FactsConfig:
    """What is told and asked.

    Attributes:
        cases: conversations; their kinds take turns.
        wording: `unseen` for evaluation, `seen` to see how well training drew on it.
        remembered: tokens of other text in the bank.
        passage: tokens of a piece of it.
        sessions, facts, small_talk: see `ChatConfig`.
        focus: tokens that are read of a bank at most, as `generate` does (`longmem.focus`); 0 is all.
        seed: of everything drawn.
    """

    cases: int = 500
    wording: Split = "unseen"
    remembered: int = 16384
    passage: int = 512
    sessions: int = 4
    facts: int = 4
    small_talk: int = 3
    focus: int = FOCUS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("cases", len(KINDS)), ("remembered", 0), ("passage", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        check_focus(self.focus)
        _ = self.chats  # its own checks

    @property
    def chats(self) -> ChatConfig:
        return ChatConfig(self.sessions, self.facts, self.small_talk, self.seed)


@dataclass(frozen=True)
class FactsResult:
    """Rates of every kind of fact.

    Attributes:
        groups: kind → scores. Labels: `answer`; `stale`, the value before the correction; `wrong`, what the wrong bank
            says; `borrowed`, a value told about something else; `stray`, any other value that would fit the question.
            Of `silent` questions nothing is right, and the log-probability is that of a stray value.
        bank_tokens: of the other text.
        filler_repeats: how often a passage of it stands in the bank on average.
        cases: one row a question: what was asked and came out under each condition.
    """

    groups: dict[str, Group]
    bank_tokens: int
    filler_repeats: float
    cases: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        save_json(path, self.to_dict())


def facts(
    model: LongMem,
    filler: TokenizedDocuments | None,
    config: FactsConfig = FactsConfig(),
    *,
    on_case: Callable[[int], None] | None = None,
) -> FactsResult:
    """Measure how often facts are recalled with the bank on, empty and wrong, and from the window.

    Args:
        filler: documents whose passages lie between the sessions; not needed if nothing else is remembered.
        on_case: progress, called with 1 for every passage encoded and every case asked (`steps` says how many).

    Raises:
        SourceError: no document has a passage.
        ConfigError: the sessions with their question do not fit the backbone's window.
    """
    advance = on_case or (lambda steps: None)
    size, seed = config.passage, config.seed
    entries, repeats = other_text(model, filler, tokens=config.remembered, size=size, seed=seed, on_passage=advance)
    outcomes: dict[str, list[dict[str, Outcome]]] = {kind: [] for kind in KINDS}
    rows = []
    chats = generate_chats(config.cases, config.wording, config.chats)
    while some := list(islice(chats, cases_at_once(model, sum(map(len, entries))))):
        for chat, found in zip(some, _outcomes(model, some, entries, config.focus), strict=True):
            outcomes[chat.kind].append(found)
            given = {name: dataclasses.asdict(outcome) for name, outcome in found.items()}
            names = ("kind", "attribute", "question", "begun", "answer", "stale", "wrong")
            rows.append({**{name: getattr(chat, name) for name in names}, "outcomes": given})
            advance(1)
    groups = {kind: score_group(some, LABELS, config.seed) for kind, some in outcomes.items()}
    return FactsResult(groups, sum(map(len, entries)), repeats, rows, dataclasses.asdict(config))


def steps(config: FactsConfig) -> int:
    """How often `facts` reports progress."""
    return config.remembered // config.passage + config.cases


def question_of(chat: Chat, tokenizer: Any) -> Question:
    """The question as it stands in a new session, and the sessions as they would stand before it."""
    opening, turn = opening_and_turn(tokenizer, chat.question)
    evidence = "".join(session_text(tokenizer, session) for session in chat.sessions)
    return Question(turn + chat.begun, chat.answer, labels_of(chat), opening, evidence)


def labels_of(chat: Chat) -> dict[str, str]:
    """What each answer is called; see `FactsResult.groups`."""
    fitting = next(attribute.values for attribute in ATTRIBUTES if attribute.name == chat.attribute)
    labels = dict.fromkeys(fitting, "stray")
    labels |= {telling.value: "borrowed" for telling in chat.tellings if telling.attribute != chat.attribute}
    if chat.stale is not None:
        labels[chat.stale] = "stale"
    if chat.wrong is not None:
        labels[chat.wrong] = "wrong"
    if chat.kind != "silent":
        labels[chat.answer] = RIGHT
    return labels


def _outcomes(
    model: LongMem, chats: Sequence[Chat], filler: Sequence[BankEntry], focus: int
) -> list[dict[str, Outcome]]:
    texts = [
        [
            [session_text(model.tokenizer, session) for session in sessions]
            for sessions in (c.sessions, c.wrong_sessions)
        ]
        for c in chats
    ]
    encoded = iter(encode_texts(model, [text for both in texts for sessions in both for text in sessions]))
    cases = []
    for chat, both in zip(chats, texts, strict=True):
        on, wrong = (
            between(filler, [dataclasses.replace(next(encoded), source=f"chat/{i}") for i in range(len(sessions))])
            for sessions in both
        )
        cases.append(under_all_conditions(model, question_of(chat, model.tokenizer), on, wrong, focus))
    return ask_everywhere(model, cases)


def between(filler: Sequence[Part], sessions: Sequence[Part]) -> list[Part]:
    """Sessions in their order with equal shares of the filler after each."""
    mixed: list[Part] = []
    for number, session in enumerate(sessions):
        first, last = (n * len(filler) // len(sessions) for n in (number, number + 1))
        mixed += [session, *filler[first:last]]
    return mixed


# ---- chat templates ------------------------------------------------------------------------------------------


def session_text(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """What is remembered of a session: its turns in the template, from behind the system prompt to where a next turn
    would begin. Sessions one after the other read as one conversation."""
    opening, _ = opening_and_turn(tokenizer, turns[0].content)
    _, turn = opening_and_turn(tokenizer, "-")
    whole = _render(tokenizer, [*((each.role, each.content) for each in turns), ("user", "-")])
    return whole[len(opening) : len(whole) - len(turn)]


def opening_and_turn(tokenizer: Any, text: str) -> tuple[str, str]:
    """How the template opens a conversation, and the user's first turn up to where the reply begins."""
    opening = _render(tokenizer, [("user", text)])
    _, _, later = _render(tokenizer, [("user", "-"), ("assistant", _REPLY), ("user", text)]).partition(_REPLY)
    # A later turn has no system prompt, so what both end with is the turn.
    backwards = zip(reversed(opening), reversed(later), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
    return opening[: len(opening) - common], opening[len(opening) - common :]


def _render(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
    """Turns in the template, up to where the assistant's next reply begins."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A backbone that was never taught a template reads a dialogue as well as any text.
    return "".join(f"{role.capitalize()}: {content}\n" for role, content in turns) + "Assistant: "
