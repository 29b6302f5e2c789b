"""The local window: the latest tokens of an endless text. What leaves it is remembered.

    prefix | tokens of the local window → logits → next token
              ↓ when it is full, its older half
             bank

What stays is read again from position 0, so positions stay in the trained range however long a text grows.

N tokens of a stretch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longmem.attention import MemoryRead
from longmem.attribution import NOTICED, Attribution, joined
from longmem.bank import BankEntry, DrawnOn, MemoryBank
from longmem.errors import ConfigError
from longmem.focus import Focus, still_there
from longmem.group import BankGroup, Readable, members
from longmem.model import LongMem, ModelCache
from longmem.recall import Hit, Recaller, as_told
from longmem.retrieved import PLACES
from longmem.steps import BatchDecoder, read_on, records
from longmem.text import TextDecoder, tokenize

if TYPE_CHECKING:
    from longmem.generation import GenerationConfig

DEFAULT_WINDOW = 1536
# Tokens that are read in recorded steps one by one; for more, the whole window is read again at once.
_MOST_STEPS = 32


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
            drew_on=joined(self._drew_on),
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
        own = bank.source_number(self._source or "")
        if own is None:
            return 0
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


def _new_source(bank: MemoryBank) -> str:
    return next(name for n in count(1) if bank.source_number(name := f"generated/{n}") is None)
