"""Texts side by side, one step a token for all of them.

    tokens of a text → forward, once → its place in the windows
    one token of every row → backbone + SideNet ⇄ banks → logits, recorded on a GPU and replayed

A token of one text makes a GPU wait for the launch of some thousand kernels and for the weights to be read; a
recorded step is one launch, and its weights serve every text.

B texts, T tokens, N tokens of a stretch, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longmem.attention import MemoryRead
from longmem.bank import MemoryBank
from longmem.config import BankSpec
from longmem.data import to_device
from longmem.decoding import KeyValueBuffer
from longmem.errors import ConfigError
from longmem.evidence import SteadyPassageSums
from longmem.group import BankGroup, Readable
from longmem.index import PlacedReader
from longmem.model import LongMem, ModelCache
from longmem.retrieved import Retrieve
from longmem.windows import Branch, SideBranch, WindowBuffer, Windows, window_step

# Retrieved keys and values of T tokens take T · heads · top_k · 2 vectors: a long prompt is read in pieces. So it is
# without a bank, where pieces need only a mask of T times all tokens.
_PREFILL, _PLAIN = 256, 4096


def records(device: torch.device) -> bool:
    """Whether steps are recorded on a device."""
    return device.type == "cuda"


@torch.no_grad()
def read_on(
    model: LongMem, tokens_N: Tensor, bank: Readable | None, cache: ModelCache, memory: float
) -> tuple[Tensor, list[MemoryRead]]:
    """Read tokens behind what `cache` holds; next-token logits (V,), and what the last piece read."""
    for piece_T in tokens_N.to(model.device).split(_PREFILL if memory and bank is not None else _PLAIN):
        output = model.forward(piece_T[None], bank, memory=memory, cache=cache, last_only=True)
    return output.logits_BTV[0, -1], output.reads


class BatchCache:
    """Local windows of B texts: what `LongMem.read` extends by one token a row."""

    def __init__(
        self, rows: int, capacity: int, memory_layers: tuple[int, ...], device: torch.device, *, compile: bool
    ) -> None:
        self.length_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.takes_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.sums = SteadyPassageSums(memory_layers, rows, self.takes_B)
        run = torch.compile(window_step, dynamic=False) if compile else window_step
        branch = SideBranch(device) if device.type == "cuda" else Branch()
        self.backbone = Windows(self.length_B, capacity, run, branch)
        self.sidenet = Windows(self.length_B, capacity, run, branch, self.sums)

    def look_at(self, room: int) -> None:
        """Steps look at the first `room` tokens of each window from now on."""
        self.backbone.room = self.sidenet.room = room


class BatchDecoder:
    """Next-token logits of B texts, one step a token for all of them.

    On a GPU a step is recorded as a CUDA graph when it is first taken, and again when a bank needs more room than the
    recorded step has (room doubles), or when rows no longer share one bank, or begin to. Otherwise banks may change
    from step to step. What is read by chunks, or on another device than the model's, is not recorded.

    Args:
        model: in its final precision, on its final device.
        rows: B.
        capacity: tokens that a text's window can hold, prefix included.
        memory: dial from 0 (the backbone alone) to 1 (the trained strength).
        compile: fuse what a layer does to a token; pays on a GPU, after a minute.

    Raises:
        ConfigError: no rows, or a window that does not fit the backbone.
    """

    def __init__(self, model: LongMem, rows: int, capacity: int, *, memory: float = 1.0, compile: bool = False) -> None:
        longest = model.backbone.max_positions
        if rows < 1:
            raise ConfigError(f"A batch has at least one row; got {rows}.")
        if not 2 <= capacity <= longest:
            raise ConfigError(
                f"A local window of {capacity} tokens does not fit backbone {model.backbone.name!r}: choose 2 to "
                f"{longest}."
            )
        self.model, self.rows, self.capacity, self.memory = model, rows, capacity, memory
        layers = model.config.memory_layers if model.config.passage_evidence else ()
        self._cache = BatchCache(rows, capacity, layers, model.device, compile=compile)
        self._lengths = [0] * rows
        self._token_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self._recorded: _Recorded | None = None
        self._specs: list[BankSpec | None] = [None] * rows  # of banks that were found to be the model's

    @property
    def passage_sums(self) -> SteadyPassageSums:
        """What passages of the banks drew of each row's attention."""
        return self._cache.sums

    @torch.no_grad()
    def begin(self, row: int, tokens_N: Tensor, bank: Readable | None = None) -> tuple[Tensor, list[MemoryRead]]:
        """Read a text into a row, in place of what the row held.

        Args:
            tokens_N: token ids, prefix included; at most `capacity`.

        Returns:
            Next-token logits (V,), and what the last piece read (batch of one).

        Raises:
            ConfigError: the text is empty or longer than the window.
        """
        if not 1 <= len(tokens_N) <= self.capacity:
            raise ConfigError(f"A text of {len(tokens_N)} tokens does not fit a window of {self.capacity}.")
        cache = self.model.new_cache()
        result = read_on(self.model, tokens_N, bank, cache, self.memory)
        self._take(row, 0, len(tokens_N), cache)
        return result

    @torch.no_grad()
    def fill(self, texts: Mapping[int, Tensor], banks: Sequence[Readable | None]) -> None:
        """Read several texts into rows, side by side, in place of what these held. Nothing is said about what follows:
        give the last token of a text to `step`.

        Args:
            texts: row → token ids, prefix included; at most `capacity`.
            banks: one a row of the decoder.

        Raises:
            ConfigError: a text is empty or longer than the window.
        """
        for tokens_N in texts.values():
            if not 1 <= len(tokens_N) <= self.capacity:
                raise ConfigError(f"A text of {len(tokens_N)} tokens does not fit a window of {self.capacity}.")
        # Shorter texts are padded behind their end, where no token looks.
        ids_BT = pad_sequence([tokens_N.cpu() for tokens_N in texts.values()], batch_first=True)
        ends_B = torch.tensor([len(tokens_N) for tokens_N in texts.values()])
        cache = self.model.new_cache(to_device(ends_B, self.model.device))
        reader = self.model.reader([banks[row] for row in texts], len(texts)) if self.memory else None
        self.model.read(ids_BT.to(self.model.device), reader, memory=self.memory, cache=cache)
        for at, (row, tokens_N) in enumerate(texts.items()):
            self._take(row, at, len(tokens_N), cache)

    def _take(self, row: int, at: int, length: int, cache: ModelCache) -> None:
        """The first tokens of batch row `at` are a row's text from now on."""
        for layer, buffer in enumerate(cache.backbone.layers):
            assert isinstance(buffer, KeyValueBuffer)
            _fill(self._cache.backbone.of(layer), row, buffer, at, length)
        for (layer, stream), buffer in cache.sidenet.items():
            _fill(self._cache.sidenet.of(layer, stream), row, buffer, at, length)
        self._cache.sums.begin(row, cache.sidenet.sums, at)
        self._lengths[row] = length
        self._cache.length_B[row] = length

    @torch.no_grad()
    def step(self, tokens: Sequence[int | None], banks: Sequence[Readable | None]) -> tuple[Tensor, list[MemoryRead]]:
        """Add a token to every row.

        Args:
            tokens: one a row; None leaves a row as it is (its logits mean nothing).
            banks: one a row, None is an empty one.

        Returns:
            Next-token logits (B, V), and what was read. On a GPU both are overwritten by the next step.

        Raises:
            ConfigError: not one token and bank a row, or a row that is full or was never begun.
            BankMismatchError: a bank was written by another model.
        """
        self._check(tokens, banks)
        self._token_B1.copy_(to_device(torch.tensor([[token or 0] for token in tokens]), self.model.device))
        model = self.model
        # Banks that are read together are read step by step.
        plain = [bank for bank in banks if not isinstance(bank, BankGroup)]
        takes = len(plain) == len(banks) and PlacedReader.takes(plain, model.config, model.device)
        recording = records(model.device) and takes
        # One place more than the longest text has, for the token that it gets.
        self._cache.look_at(self.capacity if recording else max(self._lengths) + 1)
        if recording and (self._recorded is None or not self._recorded.fits(plain)):
            self._recorded = None  # its memory is free for the next
            self._cache.takes_B.zero_()  # trials before the recording are no tokens
            self._recorded = _Recorded(self, plain)
        takes_B = to_device(torch.tensor([token is not None for token in tokens]), self.model.device)
        self._cache.takes_B.copy_(takes_B)
        if recording and self._recorded is not None:
            logits_BV, reads = self._recorded.replay(plain)
        else:
            logits_BV, reads = self.run(model.reader(banks, self.rows))
        self._cache.length_B += takes_B
        self._lengths = [length + (token is not None) for length, token in zip(self._lengths, tokens, strict=True)]
        return logits_BV, reads

    def empty(self) -> None:
        """Rows hold no text any more; memory and recording stay for the next ones."""
        self._lengths = [0] * self.rows
        self._cache.length_B.zero_()

    def release(self) -> None:
        """Give back the memory of windows and recording now: not before a garbage collection would it be free."""
        self._recorded = None
        self._cache.backbone.clear()
        self._cache.sidenet.clear()
        self._lengths = [0] * self.rows

    def run(self, reader: Retrieve | None) -> tuple[Tensor, list[MemoryRead]]:
        """What is recorded: the tokens that wait, through everything, to logits (B, V)."""
        hidden_B1D, reads = self.model.read(self._token_B1, reader, memory=self.memory, cache=self._cache)
        return self.model.backbone.logits(hidden_B1D)[:, 0], reads

    def _check(self, tokens: Sequence[int | None], banks: Sequence[Readable | None]) -> None:
        if not len(tokens) == len(banks) == self.rows:
            raise ConfigError(
                f"{len(tokens)} tokens and {len(banks)} banks were given for {self.rows} rows; give one of each a row."
            )
        if not any(self._lengths):
            raise ConfigError("No text was begun. Give each row its text with `begin` first.")
        for row, token in enumerate(tokens):
            if token is not None and not 0 < self._lengths[row] < self.capacity:
                what = "is full" if self._lengths[row] else "was never begun"
                raise ConfigError(
                    f"Row {row} {what} ({self._lengths[row]} of {self.capacity} tokens). Begin a text in it, or give "
                    "None."
                )
        for row, bank in enumerate(banks):
            bank = bank.first if isinstance(bank, BankGroup) else bank
            # Once: the device waits meanwhile.
            if bank is not None and bank.spec is not self._specs[row]:
                self.model.check(bank)
                self._specs[row] = bank.spec


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Nothing is collected meanwhile: an earlier recording that is freed during the next one spoils it."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Recorded:
    """A step as a CUDA graph."""

    def __init__(self, decoder: BatchDecoder, banks: Sequence[MemoryBank | None]) -> None:
        # Where nothing is remembered, there is nothing to record of a search.
        self._reader = PlacedReader(banks, decoder.model.config, decoder.model.device) if any(banks) else None
        # Kernels are compiled and memory is taken before the recording. A step writes only behind the texts' ends,
        # and the step that follows writes there again.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                decoder.run(self._reader)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with _no_garbage(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits_BV, self._reads = decoder.run(self._reader)

    def fits(self, banks: Sequence[MemoryBank | None]) -> bool:
        """Whether the step can be replayed over these banks."""
        return not any(banks) if self._reader is None else self._reader.fits(banks)

    def replay(self, banks: Sequence[MemoryBank | None]) -> tuple[Tensor, list[MemoryRead]]:
        if self._reader is not None:
            self._reader.read(banks)
        self._graph.replay()
        # New ones: a read keeps what it has computed of its tensors, which now hold something else.
        return self._logits_BV, [replace(read) for read in self._reads]


def _fill(to: WindowBuffer, row: int, buffer: KeyValueBuffer, at: int, length: int) -> None:
    assert buffer.keys is not None and buffer.values is not None
    to.fill(row, buffer.keys[at, :, :length], buffer.values[at, :, :length])
