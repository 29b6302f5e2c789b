"""Passage evidence (`longmem.evidence`) of single tokens in two launches a layer, and how it counts.

B batch, K memory heads of a layer, G query heads each, R retrieved, P places of the sums, E head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longmem.ops.joint import FoundRows, JointHeads

# Tokens that are one passage; a passage shares what it drew with those beside it.
PASSAGE = 32
# Passages so far apart share a sum. A prime, so that banks that are read together do not share theirs in step.
PLACES = 4093
# What is left of a sum after a token: half after 14 tokens.
FADING = 0.95
# Sums are counted in these units, since the order in which a GPU adds changes sums of floating-point numbers.
UNIT = 2.0**-24


class PassageTables(NamedTuple):
    """Sums of a layer where kernels keep them, changed in place.

    Attributes:
        kept_BP: float32, what passages drew of this layer's attention up to the last token.
        below_BP: float32, of the layers below, up to this token; afterwards of this layer, too.
        drawn_BP: int32, zeros.
        takes_B: bool, rows whose token counts.
        lowest: whether there is no layer below, and `below_BP` holds nothing yet.
    """

    kept_BP: Tensor
    below_BP: Tensor
    drawn_BP: Tensor
    takes_B: Tensor
    lowest: bool

    @classmethod
    def zeros(cls, rows: int, takes_B: Tensor) -> PassageTables:
        """Of nothing yet."""
        kept_BP, below_BP = (torch.zeros(rows, PLACES, device=takes_B.device) for _ in range(2))
        drawn_BP = torch.zeros(rows, PLACES, dtype=torch.int32, device=takes_B.device)
        return cls(kept_BP, below_BP, drawn_BP, takes_B, lowest=True)


def raise_rows(
    query_BKG1E: Tensor,
    local_logsumexp_BKG1: Tensor,
    found: FoundRows,
    heads: JointHeads,
    tables: PassageTables,
) -> Tensor:
    """What evidence adds to the scores (B, K, G, 1, R) of one token a row, which counts in the tables from now on.

    Args:
        query_BKG1E, local_logsumexp_BKG1: any strides.
    """
    from longmem.ops.triton import passages

    return passages.raise_rows(query_BKG1E, local_logsumexp_BKG1, found, heads, tables)
