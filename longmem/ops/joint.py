"""Joint attention of memory heads in one kernel, for whoever needs no gradient.

B batch, K memory heads of a layer, G query heads each, T query tokens, R retrieved, P pools of N keys and values,
E head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longmem.ops.dispatch import HAS_TRITON
from longmem.ops.pools import Pools


class JointHeads(NamedTuple):
    """What memory heads have learned, as `longmem.attention.MemoryAttention` describes it. Of what a layer does not
    have, both or all three are None.

    Attributes:
        scaling: what q·k is multiplied by.
        reference_size: bank size at which the size bias is 0.
    """

    scaling: float
    reference_size: float
    scale_KG: Tensor
    bias_KG: Tensor
    size_bias_KG: Tensor
    null_key_KGE: Tensor
    null_bias_KG: Tensor
    newest_KG: Tensor | None = None
    newest_query_KGE: Tensor | None = None
    evidence_KG: Tensor | None = None
    evidence_query_KGE: Tensor | None = None
    evidence_from_KG: Tensor | None = None

    @property
    def joining(self) -> list[Tensor | None]:
        """What joint attention asks for, in this order and without gaps."""
        return [None if part is None else part.contiguous() for part in self[2:9]]

    @property
    def raising(self) -> list[Tensor]:
        """What passage evidence asks for."""
        return [part.contiguous() for part in (*self[2:7], *self[9:]) if part is not None]


class FoundRows(NamedTuple):
    """What queries found and where it lies, as `longmem.retrieved.RetrievedRows` describes it."""

    keys_PNE: Tensor | Pools
    values_PNE: Tensor | Pools
    pool_BK: Tensor
    slot_BKGTR: Tensor
    score_BKGTR: Tensor
    index_BKGTR: Tensor
    order_BKGTR: Tensor
    bank_size_B: Tensor


def joins_at_once(device: torch.device) -> bool:
    """Whether `joint_rows` can be used: on a GPU, where no gradient is wanted."""
    return HAS_TRITON and device.type == "cuda" and not torch.is_grad_enabled()


def joint_rows(
    query_BKGTE: Tensor,
    local_BKGTE: Tensor,
    local_logsumexp_BKGT: Tensor,
    found: FoundRows,
    heads: JointHeads,
    bias_BKGTR: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `longmem.attention.MemoryAttention` computes of these, in one launch. What that rounds at every step is
    rounded once.

    Args:
        query_BKGTE, local_BKGTE, local_logsumexp_BKGT: any strides.
        bias_BKGTR: what is added to scores; None is nothing.

    Returns:
        joint − local attention (B, K, G, T, E), of which heads and tokens lie as an output projection takes them;
        mass (B, K, G, T); and log of each retrieved token's share among them (B, K, G, T, R), as
        `longmem.retrieved.Retrieved.log_weights`.
    """
    from longmem.ops.triton import joint

    return joint.joint_rows(query_BKGTE, local_BKGTE, local_logsumexp_BKGT, found, heads, bias_BKGTR)
