"""Local attention, and its fusion with what memory heads retrieved.

B batch, H query heads, T query tokens, S local keys, E head size; K memory heads of the layer, G query heads
that share each, R retrieved tokens.

The joint softmax over local keys, retrieved keys and a null key is computed as a mixture. With Z the sum of
exponentiated scores of each part and g = Z_mem / (Z_local + Z_mem + Z_null),

    joint − local = g · (memory output − local output)

so a head that finds nothing (g = 0) leaves local attention exactly as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmem.index import Retrieved

# Bank size at which the size bias is 0, so that it and the plain bias can be learned apart.
REFERENCE_SIZE = 16384


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S) bool, True where a query may look. The last query stands at the last key."""
    distance_TS = (
        torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    )
    allowed_TS = distance_TS >= 0
    return allowed_TS if window is None else allowed_TS & (distance_TS < window)


def local_attention(
    query_BHTE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, scaling: float, window: int | None = None
) -> Tensor:
    """Causal attention inside the local window: (B, H, T, E). The T queries are the last of the S positions."""
    queries, keys = query_BHTE.shape[2], key_BKSE.shape[2]
    group = query_BHTE.shape[1] // key_BKSE.shape[1]
    key_BHSE = key_BKSE.repeat_interleave(group, dim=1)
    value_BHSE = value_BKSE.repeat_interleave(group, dim=1)
    plain = window is None or keys <= window
    if plain and queries == keys:
        return F.scaled_dot_product_attention(query_BHTE, key_BHSE, value_BHSE, is_causal=True, scale=scaling)
    mask_TS = None if plain and queries == 1 else causal_mask(queries, keys, window, query_BHTE.device)
    return F.scaled_dot_product_attention(query_BHTE, key_BHSE, value_BHSE, attn_mask=mask_TS, scale=scaling)


def local_logsumexp(query_BKGTE: Tensor, key_BKSE: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """log Σ exp of local scores, (B, K, G, T) float32: what memory competes with in the joint softmax."""
    group, queries = query_BKGTE.shape[2:4]
    score_BKGTS = torch.matmul(query_BKGTE.flatten(2, 3), key_BKSE.transpose(2, 3)).unflatten(2, (group, queries))
    mask_TS = causal_mask(queries, key_BKSE.shape[2], window, query_BKGTE.device)
    return (score_BKGTS.float() * scaling).masked_fill(~mask_TS, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class MemoryRead:
    """How much one memory layer drew on memory, and on what.

    Attributes:
        layer: backbone layer.
        mass_BKGT: share of the attention that went to memory, 0 … 1.
        weight_BKGTR: share that went to each retrieved token; sums to the mass.
        log_weight_BKGTR: log of each retrieved token's share among the retrieved ones.
        index_BKGTR, valid_BKGTR: which remembered tokens these are.
    """

    layer: int
    mass_BKGT: Tensor
    weight_BKGTR: Tensor
    log_weight_BKGTR: Tensor
    index_BKGTR: Tensor
    valid_BKGTR: Tensor


class MemoryAttention(nn.Module):
    """Fuses retrieved tokens with local attention, for the memory heads of one layer.

    Trainable, one number a query head: a scale of memory scores (1 at the start), a bias b₀ and a bias per
    log of the bank's size b₁ (0; the size is counted in units of 16,384 tokens); and a null key with its bias, which
    takes attention that would otherwise go to useless memories. With `fusion="gate"` the paper's static gate σ(g)
    instead (equation 5).

    Args:
        layer: backbone layer whose keys are queried.
        kv_heads: K, how many of its key-value heads are memory heads.
        group: G, query heads a key-value head.
        head_dim: E.
        scaling: what the backbone multiplies q·k by.
    """

    def __init__(
        self, layer: int, kv_heads: int, group: int, head_dim: int, scaling: float, fusion: Literal["joint", "gate"]
    ) -> None:
        super().__init__()
        self.layer = layer
        self.scaling = scaling
        self.fusion = fusion
        if fusion == "gate":
            # σ(−4) ≈ 0.02: close to the backbone at the start, with a gradient.
            self.gate_KG = nn.Parameter(torch.full((kv_heads, group), -4.0))
        else:
            self.scale_KG = nn.Parameter(torch.ones(kv_heads, group))
            self.bias_KG = nn.Parameter(torch.zeros(kv_heads, group))
            self.size_bias_KG = nn.Parameter(torch.zeros(kv_heads, group))
            self.null_key_KGE = nn.Parameter(torch.zeros(kv_heads, group, head_dim))
            self.null_bias_KG = nn.Parameter(torch.zeros(kv_heads, group))

    def forward(
        self, query_BKGTE: Tensor, local_BKGTE: Tensor, local_logsumexp_BKGT: Tensor, found: Retrieved
    ) -> tuple[Tensor, MemoryRead]:
        """joint − local attention output (B, K, G, T, E), and what was read.

        Args:
            query_BKGTE: queries before rotary.
            local_BKGTE: output of local attention.
            local_logsumexp_BKGT: its log-sum-exp (not used by the gate).
            found: what the bank returned for these queries.
        """
        score_BKGTR = torch.matmul(found.keys_BKGTRE, query_BKGTE[..., None]).squeeze(-1).float() * self.scaling
        if self.fusion == "joint":
            score_BKGTR = score_BKGTR * self.scale_KG[..., None, None]
        score_BKGTR = score_BKGTR.masked_fill(~found.valid_BKGTR, -torch.inf)
        nothing_BKGT = ~found.valid_BKGTR.any(-1)
        # An all −inf row has no softmax; its mass is set to 0 below, so any finite stand-in will do.
        log_weight_BKGTR = score_BKGTR.masked_fill(nothing_BKGT[..., None], 0.0).log_softmax(-1)
        within_BKGTR = log_weight_BKGTR.exp()
        memory_BKGTE = torch.matmul(
            within_BKGTR.to(found.values_BKGTRE.dtype)[..., None, :], found.values_BKGTRE
        ).squeeze(-2)
        if self.fusion == "gate":
            mass_BKGT = self.gate_KG.sigmoid()[..., None].expand(score_BKGTR.shape[:-1])
        else:
            memory_BKGT = score_BKGTR.masked_fill(nothing_BKGT[..., None], 0.0).logsumexp(-1)
            log_size_B111 = (found.bank_size_B.clamp(min=1) / REFERENCE_SIZE).log()[:, None, None, None]
            memory_BKGT = memory_BKGT + self.bias_KG[..., None] + self.size_bias_KG[..., None] * log_size_B111
            null_BKGT = (query_BKGTE * self.null_key_KGE[..., None, :]).sum(-1).float() * self.scaling
            rest_BKGT = torch.logaddexp(local_logsumexp_BKGT, null_BKGT + self.null_bias_KG[..., None])
            mass_BKGT = torch.sigmoid(memory_BKGT - rest_BKGT)
        mass_BKGT = mass_BKGT.masked_fill(nothing_BKGT, 0.0)
        difference_BKGTE = mass_BKGT[..., None].to(local_BKGTE.dtype) * (memory_BKGTE - local_BKGTE)
        read = MemoryRead(
            self.layer,
            mass_BKGT,
            mass_BKGT[..., None] * within_BKGTR,
            log_weight_BKGTR,
            found.index_BKGTR,
            found.valid_BKGTR,
        )
        return difference_BKGTE, read
