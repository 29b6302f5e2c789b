"""Generation with memory: a local window that never ends, streamed text, and which memories each token drew on.

    prefix | tokens of the local window → logits → next token
              ↓ when it is full, its older half
             bank

What leaves the window is remembered and what stays is read again from position 0, so positions stay in the trained
range however long a text grows.

B batch, T tokens, N tokens of a stretch, V vocabulary; K, G, R as in `longmem.retrieved`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longmem.attention import MemoryRead
from longmem.bank import BankEntry, DrawnOn, MemoryBank
from longmem.errors import ConfigError
from longmem.focus import FOCUS, Focus, still_there
from longmem.focus import check as check_focus
from longmem.group import BankGroup, Readable, members
from longmem.model import LongMem, ModelCache
from longmem.recall import Hit, Recaller, as_told
from longmem.retrieved import PLACES, place_of
from longmem.steps import BatchDecoder, read_on, records

DEFAULT_WINDOW = 1536
# A token drew on a span if it paid it so much of the memory heads' attention; less is noise.
NOTICED = 0.05
# Tokens that are read in recorded steps one by one; for more, the whole window is read again at once.
_MOST_STEPS = 32


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
class Attribution:
    """A stretch of remembered text that a token drew on.

    Attributes:
        source, start, end, text: characters [start, end) of a source.
        weight: share of the memory heads' attention that went there, 0 … 1 (mean over heads).
        bank: name of the bank that remembers it; None if that has none.
    """

    source: str
    start: int
    end: int
    text: str
    weight: float
    bank: str | None = None


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
        yield text.add(sample(logits_V, window.config, generator), reads)


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

    def add(self, token_id: int, reads: Sequence[MemoryRead], row: int = 0) -> Piece:
        """Add a token.

        Args:
            reads: what was read for it, in batch row `row`.
        """
        window, stops = self.window, self._stops
        wanted = window.config.attribute
        sources = ()
        if wanted and (visible := window.visible) is not None and reads:
            window.count(visible, *_last_read(reads, row))
            sources = attribute(reads, visible, row=row)
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


class StopStrings:
    """Ends a stream before the first of some strings; holds text back while it may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        self._held += text
        starts = [start for start in (self._held.find(stop) for stop in self._stops) if start >= 0]
        if starts:
            self.found = True
            shown, self._held = self._held[: min(starts)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ---- text ----------------------------------------------------------------------------------------------------


def tokenize(model: LongMem, text: str) -> list[int]:
    """Token ids of a text, without the tokens a tokenizer would put around it."""
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


class TextDecoder:
    """Text of a growing sequence of tokens, and which characters each token covers.

    Text comes out as soon as later tokens cannot change it: the tokens of one character come out together and share
    its range. Special tokens cover no characters.

    Attributes:
        text: everything that is certain.
        offsets: [start, end) in `text` of every token that is certain.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._context: list[int] = []
        self._waiting: list[tuple[int, bool]] = []
        self._taken = 0
        self.text = ""
        self.offsets: list[tuple[int, int]] = []

    def push(self, token_id: int, *, silent: bool = False) -> None:
        """Add a token. A silent one covers no characters, as if it were special."""
        self._waiting.append((token_id, not silent and token_id not in self._special))
        self._settle(final=False)

    def flush(self) -> None:
        """Make everything certain: no token follows that could complete a character."""
        self._settle(final=True)

    def take(self) -> str:
        """Text that became certain since the last call."""
        new, self._taken = self.text[self._taken :], len(self.text)
        return new

    def replace(self, begin: int, end: int, token_ids: Sequence[int]) -> None:
        """Put others in the place of tokens [begin, end). Everything is certain and taken then."""
        self.flush()
        other = TextDecoder(self._tokenizer)
        for token_id in token_ids:
            other.push(token_id)
        other.flush()
        start = self.offsets[begin - 1][1] if begin else 0
        stop = self.offsets[end - 1][1] if end > begin else start
        longer = len(other.text) - (stop - start)
        self.text = self.text[:start] + other.text + self.text[stop:]
        self._taken = len(self.text)
        self.offsets = [
            *self.offsets[:begin],
            *((start + first, start + last) for first, last in other.offsets),
            *((first + longer, last + longer) for first, last in self.offsets[end:]),
        ]

    def forget(self, tokens: int) -> None:
        """Drop the first tokens and their text."""
        cut = self.offsets[tokens - 1][1]
        self.text, self._taken = self.text[cut:], max(0, self._taken - cut)
        # max: where the cut goes through a character, its text went with the first part.
        self.offsets = [(max(0, start - cut), max(0, end - cut)) for start, end in self.offsets[tokens:]]

    def _settle(self, *, final: bool) -> None:
        visible = [token_id for token_id, shown in self._waiting if shown]
        # A decoder may drop the space before its first token, so new tokens are decoded behind earlier ones.
        before = self._decode(self._context)
        new = self._decode(self._context + visible)[len(before) :]
        incomplete = new.endswith("\ufffd")
        if visible and not final and (not new or incomplete or self._in_byte_run(visible[-1])):
            return
        start = len(self.text)
        self.text += new
        self.offsets += [(start, len(self.text))] * len(self._waiting)
        self._waiting.clear()
        if new:
            # Bytes given up as incomplete must not join those that follow.
            self._context = [] if incomplete else visible

    def _in_byte_run(self, token_id: int) -> bool:
        """Byte tokens (<0xE2>) are decoded run by run: one bad byte spoils its whole run."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---- the local window ------------------------------------------------------------------------------------------


class LocalWindow:
    """The latest tokens of an endless stream, behind a prefix token; the older ones are in the bank.

    When it is full, its older half leaves (at a character boundary), and the rest is read again from position 0.
    Nothing is written twice: tokens that `remember` wrote while they were in the window simply leave it.
    What the model reads is the bank without those tokens, since it sees them locally.

    Args:
        bank: None drops what leaves; of a group, the first gets it.
        source: name of the stream in the bank, continued if it is there already.
        recaller, focus: of this bank, if others recall from it or read it as well.

    Attributes:
        remembered: the bank or group as it was given.
        bank: that what leaves goes to.
        token_ids: in the window, without the prefix.
        decoder: their text.
        recalled: passages that were put into the window, what was remembered last at the end.
    """

    def __init__(
        self,
        model: LongMem,
        bank: Readable | None,
        config: GenerationConfig,
        *,
        source: str | None = None,
        recaller: Recaller | None = None,
        focus: Focus | None = None,
    ) -> None:
        longest = model.backbone.max_positions
        self.size = min(DEFAULT_WINDOW, longest) if config.window is None else config.window
        if self.size > longest:
            raise ConfigError(
                f"A local window of {self.size} tokens does not fit backbone {model.backbone.name!r}, which was "
                f"trained on {longest}. Choose a window of at most {longest}."
            )
        if bank is not None:
            model.check(bank)
        self.model, self.remembered, self.config = model, bank, config
        self.bank = bank.first if isinstance(bank, BankGroup) else bank
        self.token_ids: list[int] = []
        self.decoder = TextDecoder(model.tokenizer)
        self._source = source
        self._cache: ModelCache | None = None
        self._steps: BatchDecoder | None = None
        self._read = 0
        # The window is [unremembered | in the bank | not yet in the bank]; what is shown of the bank ends the first.
        self._unremembered = 0
        self._shown = 0
        self._in_bank = 0
        self._moved = 0  # and not told yet
        self.recalled: tuple[Hit, ...] = ()
        self._recaller = recaller or Recaller(model)
        self._focus = focus or Focus(config.focus)
        self._chosen: Readable | None = None  # what is read of banks that are not read whole
        self._to_choose = True  # when they are next read
        self._drew_on: list[Attribution] = []

    def draw_on(self, sources: Sequence[Attribution]) -> None:
        """Note what the last token drew on, for what will be written of it."""
        self._drew_on += [span for span in sources if span.weight >= NOTICED]

    def count(self, visible: Readable, position_X: Tensor, weight_X: Tensor) -> None:
        """Let the bank that is written to count the attention that its rows were paid; others are only read.

        Args:
            visible: what was read.
            position_X, weight_X: rows of it, and their shares of attention.
        """
        assert self.remembered is not None
        for number, ((one, _), (read, _)) in enumerate(zip(members(self.remembered), members(visible), strict=True)):
            if one is self.bank:
                mine_X = (position_X // PLACES == number) & (weight_X > 0)
                one.attend(read.in_whole(position_X[mine_X] % PLACES), weight_X[mine_X])

    def extend(self, token_ids: Sequence[int], *, remember: bool = True, silent: bool = False) -> int:
        """Add tokens at the end; returns how many left the window to make room.

        Args:
            remember: False for tokens that are never written (only at the start of a stream).
            silent: they cover no text, as special tokens do.
        """
        moved, self._moved = self._moved, 0
        for token_id in token_ids:
            if 1 + len(self.token_ids) >= self.size:
                moved += self._move()
            self.token_ids.append(token_id)
            self.decoder.push(token_id, silent=silent)
            if not remember:
                self._unremembered += 1
        return moved

    def recollect(self, query: str, *, room: int) -> None:
        """Show the passages that a query is about instead of those shown before, after what is never written.

        Args:
            room: tokens that will follow.
        """
        if self.remembered is None or not self.config.recall:
            return
        passages: dict[Hit, list[int]] = {}
        left = self.size // 3
        for hit in self._recaller.recall(self.remembered, query, self.config.recall, skip=self._is_here):
            passages[hit] = tokenize(self.model, hit.text + "\n\n")
            left -= len(passages[hit])
            if left < 0:
                del passages[hit]
                break
        self.recalled = tuple(as_told(list(passages), self.remembered))
        shown = [token_id for hit in self.recalled for token_id in passages[hit]]
        # What would leave as soon as the rest comes leaves now, or what is shown would leave with it.
        most = self.size - 1 - len(shown) - min(room, self.size // 3)
        if shown == self._shown_ids and len(self.token_ids) - len(shown) <= most:
            return  # and what was read of the window stays
        self._show([])
        while len(self.token_ids) > most:
            self._moved += self._move()
        self._show(shown)

    def _is_here(self, hit: Hit) -> bool:
        """Whether a passage stands in the window, in part at least, since it has just been said."""
        if self.bank is None or not self._in_bank or (hit.bank, hit.source) != (self.bank.name, self._source):
            return False
        first, last = self._unremembered, self._unremembered + self._in_bank - 1
        here = self.decoder.offsets[last][1] - self.decoder.offsets[first][0]
        return hit.end > self.bank.length_of(hit.source) - here

    @property
    def _shown_ids(self) -> list[int]:
        return self.token_ids[self._unremembered - self._shown : self._unremembered]

    def _show(self, token_ids: list[int]) -> None:
        if self._shown or token_ids:
            begin, end = self._unremembered - self._shown, self._unremembered
            self.decoder.replace(begin, end, token_ids)
            self.token_ids[begin:end] = token_ids
            self._unremembered += len(token_ids) - self._shown
            self._shown = len(token_ids)
            self._read_anew()

    def look_anew(self) -> None:
        """What is read of large banks is chosen again, by what stands in the window now."""
        if self._chosen is not None or self._focus.chooses(self.remembered):
            self._read_anew()

    def _read_anew(self) -> None:
        """Nothing that was read of the window counts any more, nor what was chosen for it."""
        self._cache, self._read, self._to_choose = None, 0, True

    def remember(self) -> int:
        """Write what is not in the bank yet, durably if the bank is a stored one; returns how many tokens."""
        self.decoder.flush()
        return self._write(len(self.token_ids))

    @torch.no_grad()
    def logits(self) -> tuple[Tensor, list[MemoryRead]]:
        """Next-token logits (V,), and what the last token read; on a GPU both until the next call."""
        tokens_N = self.tokens_N.to(self.model.device)
        if not self.config.cache:
            output = self.model.forward(tokens_N[None], self.visible, memory=self.config.memory, last_only=True)
            return output.logits_BTV[0, -1], output.reads
        if records(self.model.device):
            return self._step(tokens_N)
        if self._cache is None or self._read == len(tokens_N):
            self._cache, self._read = self.model.new_cache(), 0
        unread_N, self._read = tokens_N[self._read :], len(tokens_N)
        return read_on(self.model, unread_N, self.visible, self._cache, self.config.memory)

    def _step(self, tokens_N: Tensor) -> tuple[Tensor, list[MemoryRead]]:
        """`logits` by recorded steps, as texts side by side take them."""
        if self._steps is None:
            settings = {"memory": self.config.memory, "compile": self.model.fuses_steps}
            self._steps = BatchDecoder(self.model, 1, self.size, **settings)
        unread, known, self._read = tokens_N[self._read :].tolist(), self._read, len(tokens_N)
        if not known or not 0 < len(unread) <= _MOST_STEPS:
            return self._steps.begin(0, tokens_N, self.visible)
        logits_1V, reads = [self._steps.step([token], [self.visible]) for token in unread][-1]
        return logits_1V[0], reads

    def _move(self) -> int:
        """Make room: the older half leaves."""
        half = len(self.token_ids) // 2
        if len(self.decoder.offsets) <= half:
            self.decoder.flush()
        cut = half
        # Not inside a character, unless one fills the whole half (bytes that make no text).
        while cut and self.decoder.offsets[cut - 1][1] > self.decoder.offsets[cut][0]:
            cut -= 1
        cut = cut or half
        if self.config.remember:
            self._write(cut)
        unremembered = min(cut, self._unremembered)
        self._unremembered -= unremembered
        self._shown = min(self._shown, self._unremembered)
        self._in_bank = max(0, self._in_bank - (cut - unremembered))
        del self.token_ids[:cut]
        self.decoder.forget(cut)
        self._read_anew()
        return cut

    def _write(self, end: int) -> int:
        """Bring the tokens before `end` into the bank, as far as they are not there."""
        begin = self._unremembered + self._in_bank
        if self.bank is None or end <= begin:
            return 0
        offsets_N2 = torch.tensor(self.decoder.offsets[begin:end], dtype=torch.int64)
        first, last = int(offsets_N2[0, 0]), int(offsets_N2[-1, 1])
        self._source = self._source or _new_source(self.bank)
        remember_tokens(
            self.model,
            self.bank,
            torch.tensor(self.token_ids[begin:end], dtype=torch.int64),
            self.decoder.text[first:last],
            offsets_N2 - first,
            source=self._source,
            drew_on=_joined(self._drew_on),
        )
        self._drew_on = []
        self._in_bank += end - begin
        return end - begin

    @property
    def tokens_N(self) -> Tensor:
        """Token ids in the window, behind the prefix."""
        return self.model.with_prefix(torch.tensor(self.token_ids, dtype=torch.int64))

    @property
    def visible(self) -> Readable | None:
        """What is read: what is remembered, without what is in the window; of large banks what is chosen."""
        if self.remembered is None:
            return None
        # Not each time: a bank may grow meanwhile, but what was forgotten is read no more.
        if self._to_choose or not (self._chosen is None or still_there(self._chosen, self.remembered)):
            chooses, self._to_choose = self._focus.chooses(self.remembered), False
            self._chosen = self._focus.on(self.remembered, self.token_ids, self._hidden) if chooses else None
        if self._chosen is not None:
            return self._chosen
        if not (self.bank and self._hidden):
            return self.remembered
        part = self.bank.between(0, len(self.bank) - self._hidden)
        return self.remembered.with_first(part) if isinstance(self.remembered, BankGroup) else part

    @property
    def _hidden(self) -> int:
        """How many of the last rows of the bank are tokens that are in the window."""
        if self.bank is None or not self._in_bank:
            return 0
        bank, near = self.bank, slice(max(0, len(self.bank) - self._in_bank), None)
        own = bank.sources.index(self._source) if self._source in bank.sources else -1
        # By their places in the source: a bank that is thinned may have rows for some of them only.
        first = bank.written(self._source or "") - self._in_bank
        hidden_n = (bank.source_index_N[near] == own) & (bank.place_N[near] >= first)
        hidden = int(hidden_n.sum())
        # Somebody else has written since: better to see part of the window twice than to miss what is new.
        return hidden if bool(hidden_n[len(hidden_n) - hidden :].all()) else 0


def remember_tokens(
    model: LongMem,
    bank: MemoryBank,
    token_ids_N: Tensor,
    text: str,
    offsets_N2: Tensor,
    *,
    source: str,
    drew_on: tuple[DrawnOn, ...] = (),
) -> None:
    """Append tokens to a source as they are. (Writing their text would tokenise it anew, perhaps differently.)

    Args:
        token_ids_N: int64.
        text: what they say.
        offsets_N2: [start, end) of each in `text`.
        source: continued if it is in the bank already.
        drew_on: what they drew on when they were generated.
    """
    past = bank.length_of(source)
    before_N = bank.tokens_of(source)
    ids_N = torch.cat((before_N, token_ids_N))
    keys_HNE, values_HNE = model.encode(ids_N, len(before_N), windows=bank.spec.encode)
    bank.append(BankEntry(source, text, past, token_ids_N, offsets_N2 + past, keys_HNE, values_HNE, drew_on=drew_on))
    model.keep_to_cap(bank)


def _joined(spans: Sequence[Attribution]) -> tuple[DrawnOn, ...]:
    """What all tokens of a stretch drew on: spans that overlap are one, with the largest weight."""
    joined: list[DrawnOn] = []
    for span in sorted(spans, key=lambda span: (span.bank or "", span.source, span.start)):
        last = joined[-1] if joined else None
        if last is not None and (last.bank, last.source) == (span.bank, span.source) and span.start <= last.end:
            end, weight = max(last.end, span.end), max(last.weight, span.weight)
            joined[-1] = replace(last, end=end, weight=weight)
        else:
            joined.append(DrawnOn(span.bank, span.source, span.start, span.end, span.weight))
    return tuple(joined)


def _new_source(bank: MemoryBank) -> str:
    taken = set(bank.sources)
    return next(name for n in range(1, len(taken) + 2) if (name := f"generated/{n}") not in taken)


# ---- attribution -----------------------------------------------------------------------------------------------

_HEAVIEST = 32  # tokens a generated token is attributed to, before neighbours are joined
_GAP = 8
_PAD = 4  # half the gap, so that spans never overlap


def attribute(reads: Sequence[MemoryRead], bank: Readable, spans: int = 3, *, row: int = 0) -> tuple[Attribution, ...]:
    """The stretches of remembered text that the last token of a batch row drew on most, heaviest first."""
    banks = [one for one, _ in members(bank)]
    if not reads:
        return ()
    index_X, weight_X = _last_read(reads, row)
    heads = sum(read.mass_BKGT[row, :, :, -1].numel() for read in reads)
    position_P, inverse_X = index_X.unique(return_inverse=True)
    weight_P = torch.zeros(len(position_P)).index_add(0, inverse_X, weight_X) / heads
    top_weight, top = weight_P.topk(min(_HEAVIEST, len(position_P)))
    runs: list[list[int]] = []  # of neighbours: number of the bank, first and last position
    for number, position in map(place_of, sorted(position_P[top[top_weight > 0]].tolist())):
        last = runs[-1] if runs else [-1, 0, 0]
        gap = banks[number].gap(last[2], position) if number == last[0] else None
        if gap is not None and 0 < gap <= _GAP:
            last[2] = position
        else:
            runs.append([number, position, position])
    found = []
    for number, first, last in runs:
        of, begin = banks[number], number * PLACES
        weight = float(weight_P[(position_P >= begin + first) & (position_P <= begin + last)].sum())
        for _ in range(_PAD):
            # Not over a gap: what has no row was not read.
            first -= first > 0 and of.gap(first - 1, first) == 1
            last += last + 1 < len(of) and of.gap(last, last + 1) == 1
        span = of.span(first, last)
        found.append(Attribution(span.source, span.start, span.end, span.text, weight, of.name))
    return tuple(sorted(found, key=lambda a: -a.weight)[:spans])


def _last_read(reads: Sequence[MemoryRead], row: int) -> tuple[Tensor, Tensor]:
    """Rows that the last token of a batch row read, and their shares of attention; (X,) each."""
    index_X = torch.cat([read.index_BKGTR[row, :, :, -1].flatten() for read in reads]).cpu()
    weight_X = torch.cat([read.weight_BKGTR[row, :, :, -1].flatten() for read in reads]).float().cpu()
    return index_X, weight_X
