"""Making the index of a bank: what its memory heads ask is recorded while the model reads, and the index fitted to it.

H memory heads, Q queries, E head size, T tokens of a window, G query heads a memory head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longmem.approximate import BankIndex, check, require_searchable
from longmem.bank import MemoryBank
from longmem.errors import ConfigError
from longmem.model import LongMem

# Windows of text that are read to record queries: every other one chooses the index, the rest measure it.
WINDOWS = 16
WINDOW = 256
# Remembered tokens that a window reads. All of a large bank would take minutes, and what a head asks depends little on
# what it was answered.
CONTEXT = 6144


def make_index(
    model: LongMem,
    bank: MemoryBank,
    *,
    recall: float = 0.99,
    text: str | None = None,
    on_step: Callable[[int], None] | None = None,
) -> BankIndex:
    """An index of all that a bank remembers: `bank.use_index(index)`, or `save_index` of a stored bank, to search with.

    What each head finds is measured on text that had no part in choosing the index, and kept as `BankIndex.recall`.

    Args:
        model: asks the queries.
        recall: share of the true nearest keys that each head should find. What is measured may be a per cent less.
        text: what the queries are recorded on; stretches of the bank's own text by default.
        on_step: called with 1 for each of `steps(model)` steps that is done.

    Raises:
        ConfigError: the bank is too small or where no index is searched, the text too short, or the model reads chunks.
        BankMismatchError: the bank belongs to another model.
    """
    model.check(bank)
    top_k = model.config.top_k
    if model.config.chunk_size != 1:
        raise ConfigError(
            f"This SideNet retrieves chunks of {model.config.chunk_size} tokens, which are searched exactly. An index "
            "is for one that retrieves single tokens."
        )
    check(len(bank), top_k, recall)
    require_searchable(bank.device, top_k)
    query_HQE = recorded_queries(model, bank, text, on_step).to(bank.device)
    together = model.backbone.num_heads // model.backbone.num_key_value_heads
    return BankIndex.choose(bank.keys_HNE, query_HQE, top_k=top_k, target=recall, together=together, on_head=on_step)


def steps(model: LongMem) -> int:
    """Steps that `make_index` counts: windows and memory heads."""
    return WINDOWS + len(model.config.memory_heads)


@torch.no_grad()
def recorded_queries(
    model: LongMem, bank: MemoryBank, text: str | None = None, on_step: Callable[[int], None] | None = None
) -> Tensor:
    """What the memory heads ask while the model reads `WINDOWS` stretches of text, (H, Q, E) float32, on the CPU.

    The first half of the queries is of every other stretch, the second half of the rest: no text is in both.
    Each stretch is read in a window of its own with the tokens before it as the bank.

    Args:
        text: what is read, with the end of the bank as its bank; stretches of the bank's own text by default.
    """
    asked = []
    for token_ids_T, past in _stretches(model, bank, text):
        asked.append(model.asked(token_ids_T, past).cpu())
        if on_step is not None:
            on_step(1)
    return torch.cat([*asked[::2], *asked[1::2]], dim=1)


def _stretches(model: LongMem, bank: MemoryBank, text: str | None) -> Iterator[tuple[Tensor, MemoryBank]]:
    """Stretches of tokens, evenly spread, and the part of the bank that each reads."""
    token_ids_N = bank.token_ids_N
    if text is not None:
        token_ids_N = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    total = len(token_ids_N)
    if total < 8 * (WINDOWS + 1):
        raise ConfigError(
            f"The text to record queries on has {total} tokens; expected at least {8 * (WINDOWS + 1)}. Give a longer "
            "one, or none: the bank's own text serves."
        )
    length = min(WINDOW, model.backbone.max_positions - 1, total // (WINDOWS + 1))
    for window in range(1, WINDOWS + 1):
        first = window * total // (WINDOWS + 1)
        end = first if text is None else len(bank)
        yield token_ids_N[first : first + length], bank.between(max(0, end - CONTEXT), end)


__all__ = ["make_index", "recorded_queries", "steps"]
