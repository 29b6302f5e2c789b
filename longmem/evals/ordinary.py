"""Ordinary prompts, which ask for nothing that is remembered: is the reply still the backbone's own?

Replies are greedy. The backbone's own is read behind its prompt with the SideNet, which would say the same up to the
first token that it finds less likely than another.

T tokens of a window, N tokens of a prompt, R tokens of a reply, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.bank import MemoryBank
from longmem.data import TokenizedDocuments
from longmem.errors import ConfigError
from longmem.evals.answers import bank_of, encode_texts, other_text, save_json, wilson
from longmem.evals.chats import ChatConfig, generate_chats
from longmem.evals.facts import between, opening_and_turn, session_text
from longmem.focus import FOCUS, Focus
from longmem.focus import check as check_focus
from longmem.group import Readable
from longmem.model import LongMem

# Kept from training: `longmem.histories` has other ones.
PROMPTS = (
    "Hello, who are you?",
    "Who are you, and what can you do for me?",
    "Hello! Nice day, isn't it?",
    "Are you a human being or a machine?",
    "Tell me what you are called.",
    "I don't feel well this evening.",
    "Give me a hand with my essay, please.",
    "That makes sense, thanks for explaining.",
    "What is the capital city of Denmark?",
    "Who discovered America?",
    "Why do birds sing?",
    "How many hours does a week have?",
    "What is a volcano?",
    "Please explain how a fridge works.",
    "What is 23 plus 19?",
    "Multiply six by seven.",
    "Write a poem about the wind.",
    "Tell me a bedtime story about a dragon.",
    "Suggest a name for a new puppy.",
    "My hamster won't eat. Is it ill?",
    "How should I cook mushrooms?",
    "What is a good present for a grandmother?",
    "Name four birds that cannot fly.",
    "Translate “the window is open” into French.",
    "What is another word for tired?",
    "Please make this sentence shorter: I would be very grateful if you could answer my letter soon.",
    "Should children have their own telephone?",
    "What should I pack for a weekend in London?",
    "How do I stop hiccups?",
    "Is it better to shower in the morning or in the evening?",
    "What does a birthday mean to people?",
    "How does one choose a safe password?",
)
CONDITIONS = ("bank_on", "bank_off")


@dataclass(frozen=True)
class OrdinaryConfig:
    """What is remembered, and how much of a reply is compared.

    Attributes:
        prompts: how many of `PROMPTS` are said.
        tokens: of each reply that are compared.
        chats: users whose conversations (four sessions each, as `longmem eval facts` has them) are remembered.
        remembered: tokens of other text in the bank.
        passage: tokens of a piece of it.
        focus: tokens that are read of a bank at most, as `generate` does (`longmem.focus`); 0 is all.
        seed: of everything drawn.
    """

    prompts: int = len(PROMPTS)
    tokens: int = 8
    chats: int = 1
    remembered: int = 16384
    passage: int = 512
    focus: int = FOCUS
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= len(PROMPTS):
            raise ConfigError(f"prompts must be from 1 to {len(PROMPTS)}; got {self.prompts}.")
        for name, least in (("tokens", 1), ("chats", 0), ("remembered", 0), ("passage", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        check_focus(self.focus)


@dataclass(frozen=True)
class Agreement:
    """How far replies are the backbone's own.

    Attributes:
        first, whole: share of the replies whose first token, and whose first tokens all, are the backbone's.
        whole_interval: 95 % interval of the latter (Wilson).
        tokens: of a reply that are the backbone's before the first other one, on average.
    """

    first: float
    whole: float
    whole_interval: tuple[float, float]
    tokens: float


@dataclass(frozen=True)
class OrdinaryResult:
    """Agreement by condition (`bank_on`, `bank_off`), and one row a prompt: the backbone's reply as far as it is
    compared, and how many tokens of it each condition says."""

    agreement: dict[str, Agreement]
    bank_tokens: int
    cases: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        save_json(path, self.to_dict())


def ordinary(
    model: LongMem,
    filler: TokenizedDocuments | None,
    config: OrdinaryConfig = OrdinaryConfig(),
    *,
    on_case: Callable[[int], None] | None = None,
) -> OrdinaryResult:
    """Measure how far replies to ordinary prompts are the backbone's own, with a bank and with an empty one.

    Args:
        filler: documents whose passages lie between the sessions; not needed if nothing else is remembered.
        on_case: progress, called with 1 for every passage encoded and every prompt (`steps` says how many).
    """
    advance = on_case or (lambda steps: None)
    bank, focus = _bank(model, filler, config, advance), Focus(config.focus)
    said: dict[str, list[int]] = {name: [] for name in CONDITIONS}
    lengths, cases = [], []
    for prompt in PROMPTS[: config.prompts]:
        prompt_N = conversation_ids(model, prompt)
        pieces = model.generate(prompt_N, max_new_tokens=config.tokens, memory=0.0, remember=False)
        reply = [piece.token_id for piece in pieces]
        lengths.append(len(reply))
        read = focus.on(bank, prompt_N.tolist())
        for name, remembered in zip(CONDITIONS, (read, None), strict=True):
            said[name].append(same_tokens(model, prompt_N, reply, remembered))
        text = model.tokenizer.decode(reply, skip_special_tokens=True)
        cases.append({"prompt": prompt, "reply": text, "same": {name: counts[-1] for name, counts in said.items()}})
        advance(1)
    agreement = {name: _agreement(counts, lengths) for name, counts in said.items()}
    return OrdinaryResult(agreement, len(bank), cases, dataclasses.asdict(config))


def steps(config: OrdinaryConfig) -> int:
    """How often `ordinary` reports progress."""
    return config.remembered // config.passage + config.prompts


def conversation_ids(model: LongMem, prompt: str) -> Tensor:
    """Token ids (N,) of a new conversation up to where the reply begins, without the prefix."""
    text = "".join(opening_and_turn(model.tokenizer, prompt))
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    # Some chat templates begin with the very token that every window begins with.
    return torch.tensor(ids[ids[:1] == [model.backbone.prefix_token_id] :])


@torch.no_grad()
def same_tokens(model: LongMem, prompt_N: Tensor, reply: Sequence[int], bank: Readable | None) -> int:
    """How many tokens of a reply a model would say itself, greedily, before the first other one.

    Args:
        prompt_N: token ids without the prefix.
        reply: token ids.
    """
    reply_R = torch.tensor(reply)
    window_1T = model.with_prefix(torch.cat((prompt_N, reply_R)))[None].to(model.device)
    logits_TV = model(window_1T, bank).logits_BTV[0]
    # The prefix comes first: the last token of the prompt, at N, predicts the first of the reply.
    likeliest_R = logits_TV[len(prompt_N) : -1].argmax(-1).cpu()
    return int((likeliest_R == reply_R).long().cumprod(0).sum())


def _bank(
    model: LongMem, filler: TokenizedDocuments | None, config: OrdinaryConfig, advance: Callable[[int], None]
) -> MemoryBank:
    chats = islice(generate_chats(config.chats, "unseen", ChatConfig(seed=config.seed)), config.chats)
    sessions = [session_text(model.tokenizer, session) for chat in chats for session in chat.sessions]
    encoded = [dataclasses.replace(each, source=f"chat/{i}") for i, each in enumerate(encode_texts(model, sessions))]
    size, seed = config.passage, config.seed
    others, _ = other_text(model, filler, tokens=config.remembered, size=size, seed=seed, on_passage=advance)
    return bank_of(model, between(others, encoded) if encoded else others)


def _agreement(same: Sequence[int], lengths: Sequence[int]) -> Agreement:
    whole = sum(count == length for count, length in zip(same, lengths, strict=True))
    return Agreement(
        first=sum(count > 0 for count in same) / len(same),
        whole=whole / len(same),
        whole_interval=wilson(whole, len(same)),
        tokens=sum(same) / len(same),
    )
