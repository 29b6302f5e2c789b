"""Finds the memory heads of a backbone: the key-value heads whose keys and values are worth remembering.

Two tests, since few heads do either of two things. *Look-up* heads find where in memory the present text went on
before. *Copy-out* heads bring what was found to the output; their queries are only right once they have seen the
finding, so nothing but their effect betrays them.

1. Look-up, on text. The last window of a text queries the earlier windows by q·k before rotary, as a bank is queried.
   At every token whose next token already followed the same token in memory: is that next token among the `top_k`
   best keys?
2. Cause, on generated facts. Facts told in a chat, other text, then a question whose answer is begun. Cutting one
   head off from the chat costs log-probability of the answer: its effect. Then no head looks at all, and heads are let
   look again one by one: first the look-up heads, then at each step the one that helps most.

B sessions, T question tokens, S context tokens, N remembered tokens, P counted positions, D hidden size, L layers,
H query heads, K key-value heads, G query heads that share one, E head size.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.columns import Columns
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from longmem.backbone import Backbone
from longmem.config import MemoryHead, read_json
from longmem.data import Document, TokenizedDocuments
from longmem.errors import CheckpointError, ConfigError, MissingExtraError

Stage = Literal["look-up", "knock-out", "addition"]
Progress = Callable[[Stage, int, int], None]


@dataclass(frozen=True)
class ProbeConfig:
    """How heads are tested and chosen.

    Attributes:
        texts: stretches of text for the look-up test.
        remembered: tokens that stand in memory before the ones that query it.
        window: tokens of an encoding window, and of the querying one (fewer where the backbone's window is smaller).
        top_k: retrieved keys a query head.
        max_pair, max_current: a position counts if its (current, next) pair stands in memory 1 … `max_pair` times and
            its current token at most `max_current` times: rarer than what any head could get right by luck.
        sessions, facts: sessions of the causal test, and facts told in each.
        filler: tokens of text between a session and its questions (fewer where the backbone's window is smaller).
        min_hit_rate: a key-value head one of whose query heads reaches it is a look-up head.
        min_effect: nats that knocking a head out must cost for it to be a candidate of the greedy addition.
        min_gain: nats that a head must add to be chosen.
        max_heads: of the choice, look-up heads included.
        seed: of everything drawn.
    """

    texts: int = 6
    remembered: int = 7168
    window: int = 1024
    top_k: int = 64
    max_pair: int = 8
    max_current: int = 60
    sessions: int = 4
    facts: int = 8
    filler: int = 1024
    min_hit_rate: float = 0.5
    min_effect: float = 0.1
    min_gain: float = 0.5
    max_heads: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        may_be_zero = {"filler", "seed"}
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in may_be_zero else 1
            if isinstance(value, int) and value < least:
                raise ConfigError(f"A probe needs {name} >= {least}; got {value}.")
        if not 0.0 < self.min_hit_rate <= 1.0:
            raise ConfigError(f"min_hit_rate is a share of positions, above 0 and at most 1; got {self.min_hit_rate}.")


@dataclass(frozen=True)
class Addition:
    """A step of the greedy addition.

    Attributes:
        head: the head that is let look from here on.
        reason: "look-up" for those that came first, "copy-out" for those chosen by gain.
        log_probability: of the answers, now that it looks.
        gain: how much of that is this head's, in nats.
        chosen: False only for a last step, whose gain was too small.
    """

    head: MemoryHead
    reason: Literal["look-up", "copy-out"]
    log_probability: float
    gain: float
    chosen: bool


@dataclass(frozen=True)
class Evidence:
    """What the figures of a probe rest on.

    Attributes:
        positions: how many were counted in the look-up test.
        chance: hit rate of `top_k` keys drawn at random.
        facts: questions of the causal test.
        context: tokens before each question: prefix, session and filler.
        log_probability_all, log_probability_none: of the answers (mean over facts of their tokens' sum, in nats), when
            all heads may look at the session and when none may.
        right_all: share of answers that greedy decoding gives when all heads look.
    """

    positions: int
    chance: float
    facts: int
    context: int
    log_probability_all: float
    log_probability_none: float
    right_all: float


@dataclass(frozen=True)
class ProbeResult:
    """The memory heads of a backbone, and why.

    Attributes:
        backbone: its name.
        memory_heads: the choice in ascending order, as `SideNetConfig` takes it. Empty if no head can look anything up
            or helps to answer.
        look_up: hit rate of each layer's query heads, L × H.
        knock_out: nats lost without each layer's key-value heads, L × K.
        path: the greedy addition.
        evidence: what these rest on.
        config: the settings.
        seconds: wall time of each stage.
    """

    backbone: str
    memory_heads: tuple[MemoryHead, ...]
    look_up: tuple[tuple[float, ...], ...]
    knock_out: tuple[tuple[float, ...], ...]
    path: tuple[Addition, ...]
    evidence: Evidence
    config: ProbeConfig
    seconds: dict[str, float]

    @property
    def look_up_kv(self) -> tuple[tuple[float, ...], ...]:
        """Hit rate of each key-value head, L × K: that of its best query head."""
        return _best_of_group(self.look_up, len(self.knock_out[0]))

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        return json.dumps(fields | {"look_up_kv": self.look_up_kv}, indent=1)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, or not a probe's result.
        """
        fields = read_json(Path(path))
        fields.pop("look_up_kv", None)
        try:
            fields["memory_heads"] = tuple(MemoryHead(*head) for head in fields["memory_heads"])
            for name in ("look_up", "knock_out"):
                fields[name] = tuple(tuple(row) for row in fields[name])
            fields["path"] = tuple(Addition(**step | {"head": MemoryHead(*step["head"])}) for step in fields["path"])
            fields["evidence"] = Evidence(**fields["evidence"])
            fields["config"] = ProbeConfig(**fields["config"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not the result of a probe: {error}. Expected a file written by `longmem probe`."
            ) from error

    def heat_map(self) -> RenderableType:
        """Layers × heads for a terminal: look-up hit rates beside knock-out effects. Chosen heads are underlined."""
        group = len(self.look_up[0]) // len(self.knock_out[0])
        return Columns(
            [
                _heat_table("look-up, hit rate", self.look_up, 1.0, group, self.memory_heads),
                _heat_table("knock-out, nats", self.knock_out, self._largest_effect, 1, self.memory_heads),
            ],
            padding=(0, 4),
        )

    def plot(self, path: str | Path) -> None:
        """Draw the heat map into an image file.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError(
                "Plots need matplotlib, which is not installed. Run: pip install 'longmem[plot]'."
            ) from error
        layers, heads = len(self.look_up), len(self.look_up[0])
        kv_heads = len(self.knock_out[0])
        figure = Figure(figsize=(3 + 0.45 * (heads + kv_heads), 1.5 + 0.22 * layers), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(heads, kv_heads))
        panels = (
            (left, self.look_up, 1.0, heads // kv_heads, "look-up: hit rate", "query head"),
            (right, self.knock_out, self._largest_effect, 1, "knock-out: nats", "KV head"),
        )
        for axes, values, top, group, title, label in panels:
            axes.imshow(values, aspect="auto", cmap="Oranges", vmin=0.0, vmax=top)
            axes.set(title=title, xlabel=label, xticks=range(len(values[0])), yticks=range(layers))
            for layer, row in enumerate(values):
                for head, value in enumerate(row):
                    weight = "bold" if (layer, head // group) in self.memory_heads else "normal"
                    axes.text(head, layer, _number(value), ha="center", va="center", fontsize=6, fontweight=weight)
        left.set_ylabel("layer")
        figure.suptitle(f"{self.backbone}: " + " ".join(f"({layer},{head})" for layer, head in self.memory_heads))
        figure.savefig(path, dpi=150)

    @property
    def _largest_effect(self) -> float:
        return max(max(max(row) for row in self.knock_out), 1e-6)


def probe(
    backbone: Backbone,
    documents: TokenizedDocuments,
    *,
    config: ProbeConfig = ProbeConfig(),
    on_progress: Progress | None = None,
) -> ProbeResult:
    """Find the memory heads of a backbone. About 5 minutes for 135M parameters in bfloat16 on two CPU cores.

    Args:
        backbone: with its tokenizer. Facts are told in its chat template if it has one.
        documents: text the backbone reads well, at least one document of `remembered + window` tokens;
            `default_documents` if there is none at hand.
        on_progress: called with stage, steps done and steps in all.

    Raises:
        ConfigError: no document is long enough, the backbone has no tokenizer, or its window holds no session.
    """
    progress: Progress = on_progress or (lambda stage, done, total: None)
    rng = np.random.default_rng(config.seed)
    seconds: dict[str, float] = {}

    begin = time.perf_counter()
    questions = _Questions(backbone, _sessions(backbone, documents, config, rng))
    seconds["context"] = time.perf_counter() - begin

    begin = time.perf_counter()
    look_up, positions, chance = look_up_rates(backbone, documents, config, rng, progress)
    seconds["look-up"] = time.perf_counter() - begin

    begin = time.perf_counter()
    knock_out = questions.knock_out(lambda done, total: progress("knock-out", done, total))
    seconds["knock-out"] = time.perf_counter() - begin

    begin = time.perf_counter()
    path = _add_greedily(questions, _best_of_group(look_up, backbone.num_key_value_heads), knock_out, config, progress)
    seconds["addition"] = time.perf_counter() - begin

    everywhere = torch.ones(backbone.num_layers, backbone.num_key_value_heads, dtype=torch.bool)
    score_all, right_all = questions.answer(everywhere)
    score_none, _ = questions.answer(~everywhere)
    evidence = Evidence(
        positions, chance, config.sessions * config.facts, questions.context, score_all, score_none, right_all
    )
    memory_heads = tuple(sorted(step.head for step in path if step.chosen))
    return ProbeResult(backbone.name, memory_heads, look_up, knock_out, path, evidence, config, seconds)


def default_documents(tokenizer: Any) -> TokenizedDocuments:
    """English text that ships with CPython: its language reference (`pydoc_data.topics`) and library docstrings."""
    return TokenizedDocuments.from_documents(_python_documents(), tokenizer)


def _python_documents() -> Iterator[Document]:
    from pydoc_data.topics import topics

    yield Document("python topics", "\n\n".join(topics[name] for name in sorted(topics)))
    docstrings = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue  # a broken file of the installation is no concern of a probe
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                # One-liners all say much the same.
                if text and len(text) > 400:
                    docstrings.append(text)
    if docstrings:
        yield Document("python docstrings", "\n\n".join(docstrings))


# ---- look-up on text -------------------------------------------------------------------------------------------


def look_up_rates(
    backbone: Backbone, documents: TokenizedDocuments, config: ProbeConfig, rng: np.random.Generator, progress: Progress
) -> tuple[tuple[tuple[float, ...], ...], int, float]:
    """Hit rates L × H, positions counted, and the hit rate of chance.

    Raises:
        ConfigError: no document is long enough, or no position counts.
    """
    window = min(config.window, backbone.max_positions - 1)
    hits_LH = torch.zeros(backbone.num_layers, backbone.num_heads)
    positions, chance = 0, 0.0
    # One token more than is read: the last position's next token.
    for done, tokens in enumerate(_stretches(documents, config.remembered + window + 1, config.texts, rng)):
        progress("look-up", done, config.texts)
        memory_N, new_T = tokens[: config.remembered], tokens[config.remembered :]
        places = repeated_pairs(memory_N, new_T, config.max_pair, config.max_current)
        if not places:
            continue
        wanted_PN = torch.zeros(len(places), config.remembered, dtype=torch.bool, device=backbone.device)
        for row, targets in enumerate(places.values()):
            wanted_PN[row, targets] = True
            chance += chance_of_hit(config.remembered, len(targets), config.top_k)
        positions += len(places)
        hits_LH += _hits(backbone, memory_N, new_T[:-1], list(places), wanted_PN, window, config.top_k)
    progress("look-up", config.texts, config.texts)
    if not positions:
        raise ConfigError(
            f"In {config.texts} texts nothing new repeats a pair of tokens that is remembered from before. "
            "Give natural text, or more of it (texts, remembered)."
        )
    rates = (hits_LH / positions).tolist()
    return tuple(tuple(row) for row in rates), positions, chance / positions


def repeated_pairs(memory_N: np.ndarray, new_T: np.ndarray, max_pair: int, max_current: int) -> dict[int, list[int]]:
    """Positions t of new text whose (current, next) pair stands in memory, each with the places of that next token.

    The place is the token *after* the earlier occurrence of the current one: the value there is the next token's, and
    the key there carries the token before it (that is how induction heads find it).

    Args:
        memory_N, new_T: token ids.
        max_pair: pairs that stand in memory more often do not count.
        max_current: nor do current tokens.
    """
    after: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    memory, new = memory_N.tolist(), new_T.tolist()
    for place, pair in enumerate(pairwise(memory), start=1):
        after[pair].append(place)
    current = Counter(memory)
    return {
        t: after[pair]
        for t, pair in enumerate(pairwise(new))
        if pair in after and len(after[pair]) <= max_pair and current[pair[0]] <= max_current
    }


def chance_of_hit(remembered: int, targets: int, top_k: int) -> float:
    """Probability that `top_k` of `remembered` tokens, drawn without replacement, hold one of `targets`."""
    if top_k > remembered - targets:
        return 1.0
    return 1.0 - math.exp(sum(math.log1p(-targets / (remembered - drawn)) for drawn in range(top_k)))


def in_top(query_KPE: Tensor, key_KNE: Tensor, wanted_PN: Tensor, top_k: int) -> Tensor:
    """(K, P) bool: whether one of the wanted keys is among the `top_k` of highest q·k. Each head K has its own keys."""
    score_KPN = query_KPE.float() @ key_KNE.float().transpose(1, 2)
    best_KP1 = score_KPN.masked_fill(~wanted_PN, -torch.inf).amax(-1, keepdim=True)
    return (score_KPN > best_KP1).sum(-1) < top_k


def _hits(
    backbone: Backbone,
    memory_N: np.ndarray,
    new_T: np.ndarray,
    positions: list[int],
    wanted_PN: Tensor,
    window: int,
    top_k: int,
) -> Tensor:
    """How many positions each query head got right, (L, H)."""
    keys: list[list[Tensor]] = [[] for _ in range(backbone.num_layers)]
    for start in range(0, len(memory_N), window):
        for layer, hidden_1TD in enumerate(_hidden_states(backbone, memory_N[start : start + window])):
            key_1KTE, _ = backbone.keys_values(layer, hidden_1TD)
            keys[layer].append(key_1KTE[0, :, 1:])  # the prefix is never remembered
    hits_LH = []
    group = backbone.num_heads // backbone.num_key_value_heads
    rows = torch.tensor(positions, device=backbone.device) + 1
    for layer, hidden_1TD in enumerate(_hidden_states(backbone, new_T)):
        query_1HTE, _, _ = backbone.family.qkv(backbone.layers[layer], hidden_1TD)
        query_KGPE = query_1HTE[0, :, rows].unflatten(0, (-1, group))
        # The query heads of a group become more queries of one head.
        right = in_top(query_KGPE.flatten(1, 2), torch.cat(keys[layer], dim=1), wanted_PN.repeat(group, 1), top_k)
        hits_LH.append(right.view(query_KGPE.shape[:3]).sum(-1).flatten().float().cpu())
    return torch.stack(hits_LH)


@torch.no_grad()
def _hidden_states(backbone: Backbone, tokens_T: np.ndarray) -> list[Tensor]:
    """Each layer's input for one window behind the prefix token, (1, 1 + T, D)."""
    ids = [backbone.prefix_token_id, *tokens_T.tolist()]
    input_ids_1T = torch.tensor([ids], dtype=torch.int64, device=backbone.device)
    hidden_states = backbone(input_ids_1T, boundaries=range(backbone.num_layers)).hidden_states
    return [hidden_states[layer] for layer in range(backbone.num_layers)]


def _stretches(
    documents: TokenizedDocuments, length: int, count: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """`count` stretches of text at random places; different documents as long as there are any."""
    usable = np.flatnonzero(documents.lengths >= length)
    if not len(usable):
        raise ConfigError(
            f"The probe needs a document of {length} tokens; the longest of {len(documents)} has "
            f"{int(documents.lengths.max(initial=0))}. Give longer documents, or let it remember fewer tokens."
        )
    order = rng.permutation(usable)
    for index in np.resize(order, count):
        start = rng.integers(documents.lengths[index] - length + 1)
        yield documents[int(index)][start : start + length]


# ---- cause on facts ----------------------------------------------------------------------------------------------

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
class _Session:
    """Token ids of a context that begins with the prefix token, and of each question with the length of its answer.

    What was `told` begins with the first fact: a system prompt before it knows nothing, and stays visible to all.
    """

    context: list[int]
    told: slice
    questions: list[tuple[list[int], int]]


def _sessions(
    backbone: Backbone, documents: TokenizedDocuments, config: ProbeConfig, rng: np.random.Generator
) -> list[_Session]:
    """Sessions whose contexts are equally long."""
    if backbone.tokenizer is None:
        raise ConfigError(
            "The causal test of a probe tells the backbone facts in words, so the backbone needs its tokenizer."
        )
    told, preamble, asked = [], [], []
    for _ in range(config.sessions):
        facts = generate_facts(config.facts, rng)
        session, questions = _chat(backbone.tokenizer, facts)
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
    fillers = _stretches(documents, max(size - min(map(len, told)), 1), config.sessions, rng)
    for ids, begin, questions, filler in zip(told, preamble, asked, fillers, strict=True):
        context = [backbone.prefix_token_id, *ids, *filler[: size - len(ids)].tolist()]
        sessions.append(_Session(context, slice(1 + begin, 1 + len(ids)), questions))
    return sessions


def _chat(tokenizer: Any, facts: Sequence[Fact]) -> tuple[str, list[str]]:
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


class _Questions:
    """Questions about sessions in the local window, of which any set of heads may see the session.

    Only question tokens are ever let look: filler is computed as if there were no session, so that it cannot pass on
    what it read. Keys and values of the context are therefore the same whichever heads look, and a condition costs one
    pass over the questions. Those about one session stand in one row, blind to each other.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, sessions: Sequence[_Session]) -> None:
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


def _add_greedily(
    questions: _Questions,
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


# ---- presentation --------------------------------------------------------------------------------------------------


def _best_of_group(rates: tuple[tuple[float, ...], ...], kv_heads: int) -> tuple[tuple[float, ...], ...]:
    """L × H hit rates of query heads → L × K of key-value heads."""
    group = len(rates[0]) // kv_heads
    return tuple(tuple(max(row[k * group : (k + 1) * group]) for k in range(kv_heads)) for row in rates)


def _number(value: float) -> str:
    """Two decimals without the zero before the point: .93, 1.00, -.05; a dot for nothing."""
    text = f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.2f}"
    return "·" if text in (".00", "-.00") else text


def _heat_table(
    title: str, values: tuple[tuple[float, ...], ...], top: float, group: int, chosen: Sequence[MemoryHead]
) -> Table:
    table = Table(title=title, box=None, padding=0, header_style="dim")
    table.add_column("layer ", justify="right", style="dim", no_wrap=True)
    for head in range(len(values[0])):
        table.add_column(f"{head} ", justify="right", min_width=5, no_wrap=True)
    for layer, row in enumerate(values):
        cells = []
        for head, value in enumerate(row):
            heat = min(max(value / top, 0.0), 1.0)
            background = f"rgb({255 - int(25 * heat)},{255 - int(155 * heat)},{255 - int(255 * heat)})"
            underline = " bold underline" if (layer, head // group) in chosen else ""
            cell = Text(f"{_number(value):>4}", style=f"rgb(40,40,40) on {background}{underline}")
            cells.append(cell.append(" ", style=f"on {background} not underline"))
        table.add_row(f"{layer} ", *cells)
    return table
