"""Several texts continued side by side, each with its own bank and its own window.

B texts, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longmem.attention import MemoryRead
from longmem.errors import ConfigError
from longmem.focus import Focus
from longmem.generation import Continuation, GenerationConfig, Piece, begun, sample, sampler
from longmem.group import Readable
from longmem.local_window import LocalWindow
from longmem.model import LongMem
from longmem.recall import Recaller
from longmem.steps import BatchDecoder


def generate_batch(
    model: LongMem,
    prompts: Sequence[str | Tensor],
    *,
    banks: Sequence[Readable | None] | Readable | None = None,
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
    if banks is None or isinstance(banks, Readable):
        banks = [banks] * len(prompts)
    sources = [None] * len(prompts) if sources is None else sources
    if not len(banks) == len(sources) == len(prompts):
        raise ConfigError(
            f"{len(banks)} banks and {len(sources)} sources were given for {len(prompts)} prompts; give one of each a "
            "prompt."
        )
    # The passages and the words of a bank are found once for all its texts.
    recallers = {id(bank): Recaller(model) for bank in banks}
    focuses = {id(bank): Focus(config.focus) for bank in banks}
    windows = [
        LocalWindow(model, bank, config, source=source, recaller=recallers[id(bank)], focus=focuses[id(bank)])
        for bank, source in zip(banks, sources, strict=True)
    ]
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
    banks: list[Readable | None] = [None] * rows
    while waiting or texts:
        for row in range(rows):
            if row not in texts and waiting:
                number = waiting.popleft()
                window = windows[number]
                texts[row] = number, Continuation(window, begun(window, prompts[number]))
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
        # Of all before any is added: a text whose window moves may write to a bank that another one has read.
        sources = {row: text.drawn_on(*results[row][1:]) for row, (_, text) in texts.items()}
        for row, (number, text) in sorted(texts.items()):
            piece = text.add(token_of[row], sources[row])
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
