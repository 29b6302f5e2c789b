"""Several texts decoded side by side, each with its own bank.

    prompt of a row → forward, once → its place in the windows
    one token of every row → backbone + SideNet ⇄ banks → logits, recorded on a GPU and replayed

A token of one text makes a GPU wait for the launch of some thousand kernels and for the weights to be read; a
recorded step is one launch, and its weights serve every text.

B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longmem.attention import MemoryRead
from longmem.bank import MemoryBank
from longmem.data import to_device
from longmem.decoding import KeyValueBuffer
from longmem.errors import ConfigError
from longmem.generation import (
    Continuation,
    GenerationConfig,
    LocalWindow,
    Piece,
    prompt_ids,
    read_on,
    sample,
    sampler,
)
from longmem.index import PlacedReader, Retrieve
from longmem.model import LongMem
from longmem.windows import WindowBuffer, Windows, window_step


class BatchCache:
    """Local windows of B texts: what `LongMem.read` extends by one token a row."""

    def __init__(self, rows: int, capacity: int, device: torch.device, *, compile: bool) -> None:
        self.length_B = torch.zeros(rows, dtype=torch.int64, device=device)
        run = torch.compile(window_step, dynamic=False) if compile else window_step
        self.backbone = Windows(self.length_B, capacity, run)
        self.sidenet = Windows(self.length_B, capacity, run)

    def look_at(self, room: int) -> None:
        """Steps look at the first `room` tokens of each window from now on."""
        self.backbone.room = self.sidenet.room = room


class BatchDecoder:
    """Next-token logits of B texts, one step a token for all of them.

    On a GPU a step is recorded as a CUDA graph when it is first taken, and again when a bank moves to another place
    in memory (its memory doubles when it is full). A bank on another device than the model is read step by step.

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
        self._cache = BatchCache(rows, capacity, model.device, compile=compile)
        self._lengths = [0] * rows
        self._token_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self._recorded: _Recorded | None = None

    @torch.no_grad()
    def begin(self, row: int, tokens_N: Tensor, bank: MemoryBank | None = None) -> tuple[Tensor, list[MemoryRead]]:
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
        for layer, buffer in enumerate(cache.backbone.layers):
            assert isinstance(buffer, KeyValueBuffer)
            _fill(self._cache.backbone.of(layer), row, buffer)
        for (layer, stream), buffer in cache.sidenet.items():
            _fill(self._cache.sidenet.of(layer, stream), row, buffer)
        self._lengths[row] = len(tokens_N)
        self._cache.length_B[row] = len(tokens_N)
        return result

    @torch.no_grad()
    def step(self, tokens: Sequence[int | None], banks: Sequence[MemoryBank | None]) -> tuple[Tensor, list[MemoryRead]]:
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
        on_device = all(bank is None or bank.device == self.model.device for bank in banks)
        recording = self.model.device.type == "cuda" and on_device
        # One place more than the longest text has, for the token that it gets.
        self._cache.look_at(self.capacity if recording else max(self._lengths) + 1)
        if recording:
            places = PlacedReader.places(banks)
            if self._recorded is None or self._recorded.places != places:
                self._recorded = _Recorded(self, banks)
            logits_BV, reads = self._recorded.replay(banks)
        else:
            logits_BV, reads = self.run(self.model.reader(banks, self.rows))
        taken = [int(token is not None) for token in tokens]
        self._cache.length_B += to_device(torch.tensor(taken), self.model.device)
        self._lengths = [length + one for length, one in zip(self._lengths, taken, strict=True)]
        return logits_BV, reads

    def run(self, reader: Retrieve | None) -> tuple[Tensor, list[MemoryRead]]:
        """What is recorded: the tokens that wait, through everything, to logits (B, V)."""
        hidden_B1D, reads = self.model.read(self._token_B1, reader, memory=self.memory, cache=self._cache)
        return self.model.backbone.logits(hidden_B1D)[:, 0], reads

    def _check(self, tokens: Sequence[int | None], banks: Sequence[MemoryBank | None]) -> None:
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
        for bank in banks:
            if bank is not None:
                self.model.check(bank)


class _Recorded:
    """A step over banks in certain places, as a CUDA graph."""

    def __init__(self, decoder: BatchDecoder, banks: Sequence[MemoryBank | None]) -> None:
        self.places = PlacedReader.places(banks)
        self._reader = PlacedReader(banks, decoder.model.config, decoder.model.device)
        reader = self._reader if any(self.places) else None
        # Kernels are compiled and memory is taken before the recording. A step writes only behind the texts' ends,
        # and the step that follows writes there again.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                decoder.run(reader)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = decoder.run(reader)

    def replay(self, banks: Sequence[MemoryBank | None]) -> tuple[Tensor, list[MemoryRead]]:
        self._reader.read(banks)
        self._graph.replay()
        return self._result


def _fill(to: WindowBuffer, row: int, buffer: KeyValueBuffer) -> None:
    assert buffer.keys is not None and buffer.values is not None
    to.fill(row, buffer.keys[0], buffer.values[0])


# ---- generation ----------------------------------------------------------------------------------------------


def generate_batch(
    model: LongMem,
    prompts: Sequence[str | Tensor],
    *,
    banks: Sequence[MemoryBank | None] | MemoryBank | None = None,
    config: GenerationConfig | None = None,
    sources: Sequence[str | None] | None = None,
    rows: int = 32,
    compile: bool = False,
) -> Iterator[tuple[int, Piece]]:
    """Continue many texts side by side; as `longmem.generation.generate` for each, up to the order of sums.

    Args:
        prompts: texts, or token ids (T,) without the prefix.
        banks: one a prompt, or one for all.
        config: as for one text; a cache is always kept.
        sources: names of what leaves each window, in its bank.
        rows: texts side by side; the next prompt begins as soon as one is done.
        compile: see `BatchDecoder`.

    Yields:
        Number of the prompt, and its next piece.

    Raises:
        ConfigError: not one bank or source a prompt, or settings out of range.
        BankMismatchError: a bank belongs to another model.
    """
    config = config or GenerationConfig()
    if banks is None or isinstance(banks, MemoryBank):
        banks = [banks] * len(prompts)
    sources = [None] * len(prompts) if sources is None else sources
    if not len(banks) == len(sources) == len(prompts):
        raise ConfigError(
            f"{len(banks)} banks and {len(sources)} sources were given for {len(prompts)} prompts; give one of each a "
            "prompt."
        )
    windows = [LocalWindow(model, bank, config, source=source) for bank, source in zip(banks, sources, strict=True)]
    return _side_by_side(model, prompts, windows, config, min(rows, len(prompts)), compile)


def _side_by_side(
    model: LongMem,
    prompts: Sequence[str | Tensor],
    windows: Sequence[LocalWindow],
    config: GenerationConfig,
    rows: int,
    compile: bool,
) -> Iterator[tuple[int, Piece]]:
    if not prompts:
        return
    decoder = BatchDecoder(model, rows, windows[0].size, memory=config.memory, compile=compile)
    samplers = [sampler(config) for _ in prompts]
    waiting = deque(range(len(prompts)))
    texts: dict[int, tuple[int, Continuation]] = {}
    # A row whose text is done keeps its bank, so that a recorded step need not be recorded again without it.
    banks: list[MemoryBank | None] = [None] * rows
    while waiting or texts:
        for row in range(rows):
            if row not in texts and waiting:
                number = waiting.popleft()
                texts[row] = number, Continuation(windows[number], prompt_ids(model, prompts[number]))
        # A text that is new, or whose window has just moved, is read; all others take a step.
        results = {
            row: (*decoder.begin(row, text.window.tokens_N, text.window.visible), 0)
            for row, (_, text) in texts.items()
            if text.token_id is None or text.moved
        }
        if len(results) < len(texts):
            stepping = [row in texts and row not in results for row in range(rows)]
            banks = [texts[row][1].window.visible if row in texts else banks[row] for row in range(rows)]
            logits_BV, reads = decoder.step(
                [texts[row][1].token_id if steps else None for row, steps in enumerate(stepping)], banks
            )
            results |= {row: (logits_BV[row], reads, row) for row, steps in enumerate(stepping) if steps}
        token_of = _sample(results, config, {row: samplers[number] for row, (number, _) in texts.items()})
        for row, (number, text) in sorted(texts.items()):
            _, reads, place = results[row]
            piece = text.add(token_of[row], reads, place)
            if text.done:
                del texts[row]
            yield number, piece


def _sample(
    results: dict[int, tuple[Tensor, list[MemoryRead], int]],
    config: GenerationConfig,
    samplers: dict[int, torch.Generator],
) -> dict[int, int]:
    """The next token of each row; the device is waited for once."""
    logits_BV = torch.stack([logits_V for logits_V, _, _ in results.values()])
    if config.temperature == 0:
        return dict(zip(results, logits_BV.argmax(-1).tolist(), strict=True))
    return {
        row: sample(logits_V, config, samplers[row]) for row, logits_V in zip(results, logits_BV.cpu(), strict=True)
    }
