"""Generation with memory: streamed text, and which memories each token drew on.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longmem.attention import MemoryRead
from longmem.attribution import Attribution, attribute, last_read
from longmem.errors import ConfigError
from longmem.focus import FOCUS
from longmem.focus import check as check_focus
from longmem.group import Readable
from longmem.local_window import LocalWindow
from longmem.model import LongMem
from longmem.text import StopStrings, tokenize


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a text.

    Attributes:
        max_new_tokens: stop after so many.
        temperature: 0 takes the most likely token, higher values sample.
        top_p: sample from the most likely tokens that have this share of the probability together; 1 is all.
        top_k: sample from so many of the most likely tokens; 0 is all.
        seed: of sampling; None draws a new one each time.
        window: tokens of the local window, its prefix among them; None is 1536, or the backbone's window if smaller.
        memory: dial from 0 (the backbone alone) to 1 (the trained strength).
        attribute: find out which remembered text each token drew on (`Piece.sources`). What is remembered of the
            generated text then says so, too, so that it can be found when that text is forgotten.
        remember: write what leaves the window to the bank; otherwise it is dropped.
        recall: passages of the bank at most that are put into the window, before everything that is remembered of it:
            those that a prompt or a turn is about (`longmem.recall`), in up to a third of the window. The bank is read
            beside them as ever. They cost reading; a fact that stands in the window is used more surely.
        focus: tokens of a bank that are read at most: of a larger one those stretches that share words with the window
            (`longmem.focus`), chosen anew for each prompt or turn, and whenever the older half of the window leaves. 0
            reads everything.
        stop: end before any of these strings.
        stop_token_ids: end at any of these; None is the tokenizer's end of text.
        cache: False reads the whole window again for every token. Slow; the reference that the cache is tested on.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    window: int | None = None
    memory: float = 1.0
    attribute: bool = False
    remember: bool = True
    recall: int = 0
    focus: int = FOCUS
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("recall", self.recall >= 0, "0 (no passages) or more"),
            ("window", self.window is None or self.window >= 8, "at least 8 tokens"),
            ("memory", 0 <= self.memory <= 1, "from 0 (the backbone alone) to 1 (the trained strength)"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
        ):
            if not valid:
                raise ConfigError(f"{name} must be {expected}; got {getattr(self, name)!r}.")
        check_focus(self.focus)


@dataclass(frozen=True)
class Piece:
    """A generated token.

    Attributes:
        text: what it adds to the text; empty while a character is incomplete, and for a token that ends the text.
        sources: what it drew on, heaviest first, if asked for.
        moved: tokens that left the window before it was generated.
    """

    text: str
    token_id: int
    sources: tuple[Attribution, ...] = ()
    moved: int = 0


def generate(
    model: LongMem,
    prompt: str | Tensor,
    *,
    bank: Readable | None = None,
    config: GenerationConfig | None = None,
    source: str | None = None,
) -> Iterator[Piece]:
    """Continue a text, token by token.

    Args:
        prompt: text, or token ids (T,) without the prefix; as long as you like.
        bank: what is remembered. The part of the text that leaves the window is added to it; to the first of a group.
        source: name of that part in the bank, continued if it is there already; "generated/1", 2, … by default.

    Raises:
        ConfigError: settings that are out of range or too large for the backbone.
        BankMismatchError: the bank belongs to another model.
    """
    config = config or GenerationConfig()
    window = LocalWindow(model, bank, config, source=source)
    return continue_text(window, begun(window, prompt), sampler(config))


def begun(window: LocalWindow, prompt: str | Tensor) -> list[int]:
    """Token ids of a prompt, which may be given as such; the window shows what it recalls to it."""
    token_ids = prompt.flatten().tolist() if isinstance(prompt, Tensor) else tokenize(window.model, prompt)
    if window.config.recall:
        text = prompt if isinstance(prompt, str) else window.model.tokenizer.decode(token_ids)
        window.recollect(text, room=len(token_ids))
    return token_ids


def continue_text(window: LocalWindow, token_ids: Sequence[int], generator: torch.Generator) -> Iterator[Piece]:
    """Read `token_ids`, then generate until the config says stop. Every token stays in the window, stop tokens too."""
    text = Continuation(window, token_ids)
    while not text.done:
        logits_V, reads = window.logits()
        yield text.add(sample(logits_V, window.config, generator), text.drawn_on(reads))


class Continuation:
    """A text that is being continued: takes sampled tokens, gives what can be shown of them.

    Attributes:
        window: the text's local window.
        token_id: the last token that was added, None before the first.
        moved: tokens that left the window since that token was sampled (before the first: while the text was read).
        done: the config says stop.
    """

    def __init__(self, window: LocalWindow, token_ids: Sequence[int]) -> None:
        self.window = window
        self.token_id: int | None = None
        self.done = False
        self.moved = window.extend(token_ids)
        window.look_anew()
        window.decoder.take()
        self._ends = stop_token_ids(window.model, window.config)
        self._stops = StopStrings(window.config.stop)
        self._left = window.config.max_new_tokens

    def drawn_on(self, reads: Sequence[MemoryRead], row: int = 0) -> tuple[Attribution, ...]:
        """What the next token draws on, if that is wanted. To be asked before anything is written to what was read.

        Args:
            reads: what was read for it, in batch row `row`.
        """
        window = self.window
        if not (window.config.attribute and reads) or (visible := window.visible) is None:
            return ()
        window.count(visible, *last_read(reads, row))
        return attribute(reads, visible, row=row)

    def add(self, token_id: int, sources: tuple[Attribution, ...] = ()) -> Piece:
        """Add a token, which drew on `sources`."""
        window, stops = self.window, self._stops
        moved, self.moved = self.moved, window.extend([token_id], silent=token_id in self._ends)
        window.draw_on(sources)
        self.token_id = token_id
        self._left -= 1
        self.done = token_id in self._ends or not self._left
        if self.done:
            window.decoder.flush()
        text = stops.push(window.decoder.take())
        self.done = self.done or stops.found
        if self.done and window.bank is not None:
            window.bank.save_attention()
        return Piece(text + stops.flush() if self.done else text, token_id, sources, moved)


# ---- sampling ------------------------------------------------------------------------------------------------


def sampler(config: GenerationConfig) -> torch.Generator:
    """A generator on the CPU, so that a seed gives the same text wherever the model runs."""
    generator = torch.Generator()
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    return generator


def sample(logits_V: Tensor, config: GenerationConfig, generator: torch.Generator) -> int:
    """The next token id."""
    if config.temperature == 0:
        return int(logits_V.argmax())
    score_V, token_V = (logits_V.float().cpu() / config.temperature).sort(descending=True, stable=True)
    probability_V = score_V.softmax(-1)
    if config.top_k:
        probability_V[config.top_k :] = 0
    # A token is kept if those before it have less than top_p together: the first one always is.
    before_V = probability_V.cumsum(-1) - probability_V
    probability_V[before_V >= config.top_p * probability_V.sum()] = 0
    return int(token_V[torch.multinomial(probability_V, 1, generator=generator)])


def stop_token_ids(model: LongMem, config: GenerationConfig) -> frozenset[int]:
    """Tokens that end the text."""
    if config.stop_token_ids is not None:
        return frozenset(config.stop_token_ids)
    end = model.tokenizer.eos_token_id
    return frozenset() if end is None else frozenset({int(end)})
