"""Which remembered text a generated token drew on, by the attention of the memory heads.

B batch, T tokens; K, G, R as in `longmem.retrieved`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longmem.attention import MemoryRead
from longmem.bank import DrawnOn
from longmem.group import Readable, members
from longmem.retrieved import PLACES, place_of

# A token drew on a span if it paid it so much of the memory heads' attention; less is noise.
NOTICED = 0.05
_HEAVIEST = 32  # tokens a generated token is attributed to, before neighbours are joined
_GAP = 8
_PAD = 4  # half the gap, so that spans never overlap


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


def attribute(reads: Sequence[MemoryRead], bank: Readable, spans: int = 3, *, row: int = 0) -> tuple[Attribution, ...]:
    """The stretches of remembered text that the last token of a batch row drew on most, heaviest first."""
    banks = [one for one, _ in members(bank)]
    if not reads:
        return ()
    index_X, weight_X = last_read(reads, row)
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


def last_read(reads: Sequence[MemoryRead], row: int) -> tuple[Tensor, Tensor]:
    """Rows that the last token of a batch row read, and their shares of attention; (X,) each."""
    index_X = torch.cat([read.index_BKGTR[row, :, :, -1].flatten() for read in reads]).cpu()
    weight_X = torch.cat([read.weight_BKGTR[row, :, :, -1].flatten() for read in reads]).float().cpu()
    return index_X, weight_X


def joined(spans: Sequence[Attribution]) -> tuple[DrawnOn, ...]:
    """What all tokens of a stretch drew on: spans that overlap are one, with the largest weight."""
    found: list[DrawnOn] = []
    for span in sorted(spans, key=lambda span: (span.bank or "", span.source, span.start)):
        last = found[-1] if found else None
        if last is not None and (last.bank, last.source) == (span.bank, span.source) and span.start <= last.end:
            end, weight = max(last.end, span.end), max(last.weight, span.weight)
            found[-1] = replace(last, end=end, weight=weight)
        else:
            found.append(DrawnOn(span.bank, span.source, span.start, span.end, span.weight))
    return tuple(found)
