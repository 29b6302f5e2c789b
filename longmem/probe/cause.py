"""The causal test: which heads bring a remembered fact to the answer.

B sessions, T question tokens, S context tokens, D hidden size, L layers, H query heads, K key-value heads, G query
heads that share one, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longmem.backbone import Backbone
from longmem.config import MemoryHead
from longmem.data import TokenizedDocuments
from longmem.errors import ConfigError
from longmem.probe.config import ProbeConfig, Progress
from longmem.probe.lookup import stretches
from longmem.probe.result import Addition

_NAMES = ("Alice", "Arthur", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "James", "Laura", "Peter", "Thomas")
_PETS = ("Rex", "Bella", "Max", "Luna", "Charlie", "Daisy", "Rocky", "Molly", "Buddy", "Sadie", "Ruby", "Milo", "Coco")
_TOWNS = ("Paris", "Berlin", "Oxford", "Vienna", "Boston", "Dublin", "Chicago", "Madrid", "Rome", "Prague", "Geneva")
_COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "pink", "brown")
_NUMBERS = tuple(str(number) for number in range(12, 99))
_JOBS = ("baker", "teacher", "nurse", "farmer", "lawyer", "pilot", "doctor", "painter", "gardener", "dentist")
_INSTRUMENTS = ("piano", "violin", "guitar", "flute", "drums", "trumpet", "harp", "cello")

# What is told, what is asked, how the answer begins, and what it may be.
_TEMPLATES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("I have a dog called {}.", "What is my dog called?", "Your dog is called", _PETS),
    ("My sister's name is {}.", "What is my sister's name?", "Your sister's name is", _NAMES),
    ("I live in {}.", "Where do I live?", "You live in", _TOWNS),
    ("My cat is named {}.", "What is my cat named?", "Your cat is named", _PETS),
    ("I was born in {}.", "Where was I born?", "You were born in", _TOWNS),
    ("My best friend is {}.", "Who is my best friend?", "Your best friend is", _NAMES),
    ("I painted my door {}.", "What colour did I paint my door?", "You painted your door", _COLOURS),
    ("My bus is number {}.", "Which bus is mine?", "Your bus is number", _NUMBERS),
    ("I work as a {}.", "What do I work as?", "You work as a", _JOBS),
    ("I play the {}.", "Which instrument do I play?", "You play the", _INSTRUMENTS),
    ("My teacher is called {}.", "What is my teacher called?", "Your teacher is called", _NAMES),
    ("My favourite colour is {}.", "What is my favourite colour?", "Your favourite colour is", _COLOURS),
)


@dataclass(frozen=True)
class Fact:
    """Something told once and asked for later: the full answer is `begun + " " + answer`."""

    statement: str
    question: str
    begun: str
    answer: str


def generate_facts(count: int, rng: np.random.Generator) -> list[Fact]:
    """Facts of different kinds whose answers all differ.

    Raises:
        ConfigError: there are not so many kinds.
    """
    if count > len(_TEMPLATES):
        raise ConfigError(
            f"There are {len(_TEMPLATES)} kinds of facts; got facts={count}. Ask for more sessions instead."
        )
    facts: list[Fact] = []
    for index in rng.permutation(len(_TEMPLATES))[:count]:
        told, asked, begun, values = _TEMPLATES[index]
        taken = {fact.answer for fact in facts}
        answer = str(rng.choice([value for value in values if value not in taken]))
        facts.append(Fact(told.format(answer), asked, begun, answer))
    return facts


@dataclass(frozen=True)
class Session:
    """Token ids of a context that begins with the prefix token, and of each question with the length of its answer.

    What was `told` begins with the first fact: a system prompt before it knows nothing, and stays visible to all.
    """

    context: list[int]
    told: slice
    questions: list[tuple[list[int], int]]


def make_sessions(
    backbone: Backbone, documents: TokenizedDocuments, config: ProbeConfig, rng: np.random.Generator
) -> list[Session]:
    """Sessions whose contexts are equally long."""
    if backbone.tokenizer is None:
        raise ConfigError(
            "The causal test of a probe tells the backbone facts in words, so the backbone needs its tokenizer."
        )
    told, preamble, asked = [], [], []
    for _ in range(config.sessions):
        facts = generate_facts(config.facts, rng)
        session, questions = tell(backbone.tokenizer, facts)
        told.append(backbone.tokenizer(session, add_special_tokens=False).input_ids)
        before = session[: session.index(facts[0].statement)]
        preamble.append(len(backbone.tokenizer(before, add_special_tokens=False).input_ids))
        asked.append([_question_ids(backbone.tokenizer, q, f.answer) for q, f in zip(questions, facts, strict=True)])
    longest = max(map(len, told))
    room = backbone.max_positions - 1 - longest - max(len(ids) for row in asked for ids, _ in row)
    if room < 0:
        raise ConfigError(
            f"The backbone's window of {backbone.max_positions} tokens does not hold a session of {config.facts} facts "
            f"({longest} tokens) and a question. Ask for fewer facts a session."
        )
    size = longest + min(config.filler, room)
    sessions = []
    fillers = stretches(documents, max(size - min(map(len, told)), 1), config.sessions, rng)
    for ids, begin, questions, filler in zip(told, preamble, asked, fillers, strict=True):
        context = [backbone.prefix_token_id, *ids, *filler[: size - len(ids)].tolist()]
        sessions.append(Session(context, slice(1 + begin, 1 + len(ids)), questions))
    return sessions


def tell(tokenizer: Any, facts: Sequence[Fact]) -> tuple[str, list[str]]:
    """The session as text, and what follows the filler up to the begun answer, for each fact."""
    turns = []
    for fact in facts:
        turns += [
            {"role": "user", "content": fact.statement},
            {"role": "assistant", "content": "I will remember that."},
        ]
    asked = [[{"role": "user", "content": fact.question}] for fact in facts]
    if getattr(tokenizer, "chat_template", None):
        session = tokenizer.apply_chat_template(turns, tokenize=False)
        whole = [
            tokenizer.apply_chat_template(turns + ask, tokenize=False, add_generation_prompt=True) for ask in asked
        ]
        if all(text.startswith(session) for text in whole):
            questions = [text[len(session) :] for text in whole]
        else:  # the template rewrites earlier turns: ask in a conversation of its own
            questions = [
                tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True) for ask in asked
            ]
        return session, [text + fact.begun for text, fact in zip(questions, facts, strict=True)]
    session = "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in turns)
    return session, [f"\nUser: {fact.question}\nAssistant: {fact.begun}" for fact in facts]


def _question_ids(tokenizer: Any, question: str, answer: str) -> tuple[list[int], int]:
    """Ids of question and answer, and how many of them are the answer's."""
    begun = tokenizer(question, add_special_tokens=False).input_ids
    ids = tokenizer(f"{question} {answer}", add_special_tokens=False).input_ids
    # Where the tokenizer merges across the border, the merged token is the answer's.
    border = next((i for i, (left, right) in enumerate(zip(begun, ids, strict=False)) if left != right), len(begun))
    return ids, len(ids) - border


def attend(
    backbone: Backbone,
    layer: int,
    x_BTD: Tensor,
    positions_BT: Tensor,
    mask_BKTS: Tensor,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One backbone layer with a mask for each key-value head.

    Args:
        x_BTD: input of the layer.
        mask_BKTS: True where the query heads of a key-value head may look, over `past` and the T tokens
            themselves. B and K may be 1, for all.
        past: rotated keys and values (B, K, S − T, E) of earlier tokens.

    Returns:
        Output of the layer, and the rotated keys and values of its T tokens.
    """
    family, module = backbone.family, backbone.layers[layer]
    query_BHTE, key_BKTE, value_BKTE = family.qkv(module, x_BTD)
    rotary = backbone.position_embeddings(layer, x_BTD, positions_BT)
    query_BHTE, key_BKTE = family.rotate(query_BHTE, rotary), family.rotate(key_BKTE, rotary)
    key_BKSE = key_BKTE if past is None else torch.cat((past[0], key_BKTE), dim=2)
    value_BKSE = value_BKTE if past is None else torch.cat((past[1], value_BKTE), dim=2)
    kv_heads, tokens = key_BKTE.shape[1:3]
    group = query_BHTE.shape[1] // kv_heads
    # The query heads of a group become more queries of one head, so that keys need no copies.
    heads = F.scaled_dot_product_attention(
        query_BHTE.unflatten(1, (kv_heads, group)).flatten(2, 3),
        key_BKSE,
        value_BKSE,
        attn_mask=mask_BKTS.repeat(1, 1, group, 1),
        scale=family.scaling(module),
    )
    heads_BTF = heads.unflatten(2, (group, tokens)).flatten(1, 2).transpose(1, 2).flatten(2)
    branch_BTD = family.after_projection(module, family.project(module, heads_BTF))
    return family.finish(module, x_BTD, branch_BTD), (key_BKTE, value_BKTE)


class Questions:
    """Questions about sessions in the local window, of which any set of heads may see the session.

    Only question tokens are ever let look: filler is computed as if there were no session, so that it cannot pass on
    what it read. Keys and values of the context are therefore the same whichever heads look, and a condition costs one
    pass over the questions. Those about one session stand in one row, blind to each other.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, sessions: Sequence[Session]) -> None:
        self.backbone = backbone
        self.context = len(sessions[0].context)
        device = backbone.device
        count = len(sessions[0].questions)
        # The last answer token is only predicted, never read.
        self.tokens = max(len(ids) for session in sessions for ids, _ in session.questions) - 1

        told_BS = torch.zeros(len(sessions), self.context, dtype=torch.bool, device=device)
        question_ids = torch.zeros(len(sessions), count, self.tokens + 1, dtype=torch.int64)
        scored: list[tuple[int, int, int]] = []  # row, column of the predicting token, predicted id
        self.lengths: list[int] = []
        for row, session in enumerate(sessions):
            told_BS[row, session.told] = True
            for index, (ids, answer) in enumerate(session.questions):
                question_ids[row, index, : len(ids)] = torch.tensor(ids)
                scored += [(row, index * self.tokens + at - 1, ids[at]) for at in range(len(ids) - answer, len(ids))]
                self.lengths.append(answer)
        self.row, self.column, self.target = torch.tensor(scored, device=device).unbind(1)

        context_BS = torch.tensor([session.context for session in sessions], device=device)
        questions_BQT = question_ids[..., :-1].to(device)
        context_BSD, self.embedded_BTD = self._embed(context_BS, questions_BQT)
        self.positions_BT = (
            torch.arange(self.tokens, device=device).repeat(count).expand(len(sessions), -1) + self.context
        )

        block_T = torch.arange(count, device=device).repeat_interleave(self.tokens)
        place_T = self.positions_BT[0]
        place_S = torch.arange(self.context, device=device)
        self.distance_TS = place_T[:, None] - torch.cat((place_S, place_T))[None, :]
        self.visible_TS = torch.cat(
            (
                torch.ones(len(place_T), self.context, dtype=torch.bool, device=device),
                block_T[:, None] == block_T[None, :],
            ),
            dim=1,
        ) & (self.distance_TS >= 0)
        self.told_BS = torch.cat((told_BS, torch.zeros_like(self.positions_BT, dtype=torch.bool)), dim=1)
        self.past = self._read_context(context_BSD, told_BS)

    def _embed(self, context_BS: Tensor, questions_BQT: Tensor) -> tuple[Tensor, Tensor]:
        """Input of layer 0 for contexts (B, S, D) and for questions (B, Q·T, D), at their places in the window."""
        contexts, questions = [], []
        for context_S, questions_QT in zip(context_BS, questions_BQT, strict=True):
            ids = torch.cat((context_S.expand(len(questions_QT), -1), questions_QT), dim=1)
            hidden = self.backbone(ids, boundaries={0}).hidden_states[0]
            contexts.append(hidden[0, : self.context])
            questions.append(hidden[:, self.context :].flatten(0, 1))
        return torch.stack(contexts), torch.stack(questions)

    def _read_context(self, context_BSD: Tensor, told_BS: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rotated keys and values of the contexts in every layer. One row at a time: the masks are large."""
        place_S = torch.arange(self.context, device=context_BSD.device)
        distance_SS = place_S[:, None] - place_S[None, :]
        rows: list[list[tuple[Tensor, Tensor]]] = []
        for hidden_SD, told_S in zip(context_BSD, told_BS, strict=True):
            filler_S = ~told_S & (told_S.cumsum(0) > 0)
            visible_SS = (distance_SS >= 0) & ~(filler_S[:, None] & told_S[None, :])
            hidden_1SD, kept = hidden_SD[None], []
            for layer in range(self.backbone.num_layers):
                mask_11SS = self._within(layer, visible_SS, distance_SS)[None, None]
                hidden_1SD, keys_values = attend(self.backbone, layer, hidden_1SD, place_S[None], mask_11SS)
                kept.append(keys_values)
            rows.append(kept)
        return [
            (torch.cat([row[layer][0] for row in rows]), torch.cat([row[layer][1] for row in rows]))
            for layer in range(self.backbone.num_layers)
        ]

    def _within(self, layer: int, visible_TS: Tensor, distance_TS: Tensor) -> Tensor:
        window = self.backbone.family.window(self.backbone.layers[layer])
        return visible_TS if window is None else visible_TS & (distance_TS < window)

    @torch.no_grad()
    def read(self, looks_LK: Tensor, first: int = 0, hidden_BTD: Tensor | None = None) -> list[Tensor]:
        """Hidden states of the questions at boundaries first … L.

        Args:
            looks_LK: bool, which heads may look at the session.
            first: layer to begin with.
            hidden_BTD: its input; the embedding by default.
        """
        states = [self.embedded_BTD if hidden_BTD is None else hidden_BTD]
        for layer in range(first, self.backbone.num_layers):
            mask_BKTS = self._mask(layer, looks_LK[layer])
            states.append(attend(self.backbone, layer, states[-1], self.positions_BT, mask_BKTS, self.past[layer])[0])
        return states

    def _mask(self, layer: int, looks_K: Tensor) -> Tensor:
        """Where questions may look, (B, K, T, S + T); B and K are 1 where that is the same for all."""
        visible_TS = self._within(layer, self.visible_TS, self.distance_TS)
        if looks_K.all():
            return visible_TS[None, None]
        if not looks_K.any():
            looks_K = looks_K[:1]
        hides_BKS = self.told_BS[:, None] & ~looks_K.to(self.told_BS.device)[:, None]
        return visible_TS & ~hides_BKS[:, :, None]

    @torch.no_grad()
    def score(self, hidden_BTD: Tensor) -> tuple[float, float]:
        """Mean log-probability of the answers in nats, and the share that greedy decoding gets right."""
        logits_PV = self.backbone.logits(hidden_BTD[self.row, self.column][None])[0].float()
        log_prob_P = logits_PV.log_softmax(-1).gather(1, self.target[:, None])[:, 0]
        right_P = logits_PV.argmax(-1) == self.target
        right = sum(bool(answer.all()) for answer in right_P.split(self.lengths))
        return float(log_prob_P.double().sum()) / len(self.lengths), right / len(self.lengths)

    def answer(self, looks_LK: Tensor) -> tuple[float, float]:
        """`score` when these heads look."""
        return self.score(self.read(looks_LK)[-1])

    def knock_out(self, on_step: Callable[[int, int], None]) -> tuple[tuple[float, ...], ...]:
        """Nats lost when all heads look but one, L × K."""
        layers, kv_heads = self.backbone.num_layers, self.backbone.num_key_value_heads
        looks_LK = torch.ones(layers, kv_heads, dtype=torch.bool)
        states = self.read(looks_LK)
        whole, _ = self.score(states[-1])
        effects = []
        for layer in range(layers):
            row = []
            for kv_head in range(kv_heads):
                on_step(layer * kv_heads + kv_head, layers * kv_heads)
                row.append(whole - self._changed(looks_LK, MemoryHead(layer, kv_head), states))
            effects.append(tuple(row))
        on_step(layers * kv_heads, layers * kv_heads)
        return tuple(effects)

    def with_one_more(self, looks_LK: Tensor, heads: Sequence[MemoryHead], on_step: Callable[[], None]) -> list[float]:
        """Log-probability of the answers when one of these heads looks too, for each of them."""
        states = self.read(looks_LK)
        scores = []
        for head in heads:
            scores.append(self._changed(looks_LK, head, states))
            on_step()
        return scores

    def _changed(self, looks_LK: Tensor, head: MemoryHead, states: list[Tensor]) -> float:
        """Score with one head the other way; layers below it are as they were."""
        changed_LK = looks_LK.clone()
        changed_LK[head] = ~changed_LK[head]
        return self.score(self.read(changed_LK, head.layer, states[head.layer])[-1])[0]


def add_greedily(
    questions: Questions,
    look_up_kv: tuple[tuple[float, ...], ...],
    knock_out: tuple[tuple[float, ...], ...],
    config: ProbeConfig,
    progress: Progress,
) -> tuple[Addition, ...]:
    """Let heads look one by one: the look-up heads, best first, then whichever adds most."""
    heads = [MemoryHead(layer, head) for layer, row in enumerate(knock_out) for head in range(len(row))]
    finders = [head for head in heads if look_up_kv[head.layer][head.kv_head] >= config.min_hit_rate]
    finders = sorted(finders, key=lambda head: -look_up_kv[head.layer][head.kv_head])[: config.max_heads]
    # A head whose loss costs nothing may still help a starved model; but then others do its work in a whole one.
    candidates = [h for h in heads if h not in finders and knock_out[h.layer][h.kv_head] >= config.min_effect]
    # The most steps there can be: the search may stop early.
    total = len(finders) + sum(range(len(candidates), 0, -1)[: max(config.max_heads - len(finders), 0)])
    steps = 0

    def on_step() -> None:
        nonlocal steps
        steps += 1
        progress("addition", steps, total)

    looks_LK = torch.zeros(len(knock_out), len(knock_out[0]), dtype=torch.bool)
    now, _ = questions.answer(looks_LK)
    path: list[Addition] = []
    for head in finders:
        (then,) = questions.with_one_more(looks_LK, [head], on_step)
        path.append(Addition(head, "look-up", then, then - now, chosen=True))
        looks_LK[head], now = True, then
    while candidates and len(path) < config.max_heads:
        scores = questions.with_one_more(looks_LK, candidates, on_step)
        then, head = max(zip(scores, candidates, strict=True))
        chosen = then - now >= config.min_gain
        path.append(Addition(head, "copy-out", then, then - now, chosen))
        if not chosen:
            break
        candidates.remove(head)
        looks_LK[head], now = True, then
    progress("addition", total, total)
    return tuple(path)
