"""Local attention, and its fusion with what memory heads retrieved.

B batch, H query heads, T query tokens, S local keys, E head size; K memory heads of the layer, G query heads
that share each, R retrieved tokens.

The joint softmax over local keys, retrieved keys and a null key is computed as a mixture. With Z the sum of
exponentiated scores of each part and g = Z_mem / (Z_local + Z_mem + Z_null),

    joint − local = g · (memory output − local output)

so a head that finds nothing (g = 0) leaves local attention exactly as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longmem.evidence import PassageSums
from longmem.ops import JointHeads, causal_mask
from longmem.retrieved import Retrieved

# Bank size at which the size bias is 0, so that it and the plain bias can be learned apart.
REFERENCE_SIZE = 16384
# log of the sum of attention from which evidence counts, at the start: a twentieth of one token's attention.
EVIDENCE_FROM = -3.0


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


def pick_heads(heads_BHTE: Tensor, picked: Sequence[int]) -> Tensor:
    """Some of the heads (dimension 1); a view where they are neighbours. A list as an index would be copied to the
    device, which waits for all it has to do, and cannot be recorded."""
    if list(picked) == list(range(picked[0], picked[-1] + 1)):
        return heads_BHTE[:, picked[0] : picked[-1] + 1]
    return torch.stack([heads_BHTE[:, head] for head in picked], dim=1)


@dataclass(frozen=True)
class MemoryRead:
    """How much one memory layer drew on memory, and on what.

    Attributes:
        layer: backbone layer.
        mass_BKGT: share of the attention that went to memory, 0 … 1.
        found: the retrieved tokens.
        weigh, match: compute `log_weight_BKGTR` and `log_match_BKGTR`.
    """

    layer: int
    mass_BKGT: Tensor
    found: Retrieved
    weigh: Callable[[], Tensor]
    match: Callable[[], Tensor]

    @property
    def index_BKGTR(self) -> Tensor:
        """Positions of the retrieved tokens in each row's bank."""
        return self.found.index_BKGTR

    @property
    def valid_BKGTR(self) -> Tensor:
        """False where the bank held fewer than R tokens."""
        return self.found.valid_BKGTR

    @cached_property
    def log_weight_BKGTR(self) -> Tensor:
        """log of each retrieved token's share among the retrieved ones; computed when asked for."""
        return self.weigh()

    @property
    def log_match_BKGTR(self) -> Tensor:
        """The same by how well each token matches alone, as if being older cost nothing."""
        return self.match()

    @property
    def weight_BKGTR(self) -> Tensor:
        """Share of the attention that went to each retrieved token; sums to the mass."""
        return self.mass_BKGT[..., None] * self.log_weight_BKGTR.exp()


class MemoryAttention(nn.Module):
    """Fuses retrieved tokens with local attention, for the memory heads of one layer.

    Trainable, one number a query head: a scale of memory scores (1 at the start), a bias b₀ and a bias per
    log of the bank's size b₁ (0; the size is counted in units of 16,384 tokens); and a null key with its bias, which
    takes attention that would otherwise go to useless memories. With `newest_wins` also what being older costs
    (`longmem.ops.reference.discounted`), as a number and a vector that the query is multiplied by: a question may ask
    for the newest of several memories, or for the one before. With `passage_evidence` also how much scores are raised
    in passages that other queries found (`longmem.evidence`): a gain, a number and a vector as well (0), and log of the
    sum from which it counts. With `fusion="gate"` the paper's static gate σ(g) instead of all (equation 5).

    Args:
        layer: backbone layer whose keys are queried.
        kv_heads: K, how many of its key-value heads are memory heads.
        group: G, query heads a key-value head.
        head_dim: E.
        scaling: what the backbone multiplies q·k by.
    """

    def __init__(
        self,
        layer: int,
        kv_heads: int,
        group: int,
        head_dim: int,
        scaling: float,
        fusion: Literal["joint", "gate"],
        newest_wins: bool = False,
        passage_evidence: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.scaling = scaling
        self.fusion = fusion
        self.newest_wins = newest_wins
        self.passage_evidence = passage_evidence
        if fusion == "gate":
            # σ(−4) ≈ 0.02: close to the backbone at the start, with a gradient.
            self.gate_KG = nn.Parameter(torch.full((kv_heads, group), -4.0))
        else:
            self.scale_KG = nn.Parameter(torch.ones(kv_heads, group))
            self.bias_KG = nn.Parameter(torch.zeros(kv_heads, group))
            self.size_bias_KG = nn.Parameter(torch.zeros(kv_heads, group))
            self.null_key_KGE = nn.Parameter(torch.zeros(kv_heads, group, head_dim))
            self.null_bias_KG = nn.Parameter(torch.zeros(kv_heads, group))
        if newest_wins:
            self.newest_KG = nn.Parameter(torch.zeros(kv_heads, group))
            self.newest_query_KGE = nn.Parameter(torch.zeros(kv_heads, group, head_dim))
        if passage_evidence:
            self.evidence_KG = nn.Parameter(torch.zeros(kv_heads, group))
            self.evidence_query_KGE = nn.Parameter(torch.zeros(kv_heads, group, head_dim))
            self.evidence_from_KG = nn.Parameter(torch.full((kv_heads, group), EVIDENCE_FROM))

    def forward(
        self,
        query_BKGTE: Tensor,
        local_BKGTE: Tensor,
        local_logsumexp_BKGT: Tensor,
        found: Retrieved,
        sums: PassageSums | None = None,
    ) -> tuple[Tensor, MemoryRead]:
        """joint − local attention output (B, K, G, T, E), and what was read.

        Args:
            query_BKGTE: queries before rotary.
            local_BKGTE: output of local attention.
            local_logsumexp_BKGT: its log-sum-exp (not used by the gate).
            found: what the bank returned for these queries.
            sums: what passages drew before, and below; they go on with these queries. None is nothing.
        """
        bias_BKGTR = None
        if self.passage_evidence:
            bias_BKGTR = self._raise(query_BKGTE, local_logsumexp_BKGT, found, sums or PassageSums())
        if self.fusion == "joint":
            inputs = query_BKGTE, local_BKGTE, local_logsumexp_BKGT
            joined = found.join(*inputs, self._joint_heads, bias_BKGTR)
            if joined is not None:
                difference_BKGTE, mass_BKGT, log_weight_BKGTR = joined
                return difference_BKGTE, MemoryRead(
                    self.layer,
                    mass_BKGT,
                    found,
                    weigh=lambda: log_weight_BKGTR,
                    match=lambda: found.log_weights(self._scaled(query_BKGTE), self.scaling),
                )
        discount_BKGT = None
        if self.newest_wins:
            discount_BKGT = self.newest_KG[..., None] + self._products(query_BKGTE, self.newest_query_KGE)
        rest_BKGT = local_logsumexp_BKGT
        if self.fusion == "joint":
            rest_BKGT = self._rest(query_BKGTE, local_logsumexp_BKGT)
            query_BKGTE = self._scaled(query_BKGTE)
        memory_BKGTE, memory_BKGT = found.attend(query_BKGTE, self.scaling, discount_BKGT, bias_BKGTR)
        if self.fusion == "gate":
            mass_BKGT = self.gate_KG.sigmoid()[..., None].expand(memory_BKGT.shape)
            mass_BKGT = mass_BKGT.masked_fill(memory_BKGT == -torch.inf, 0.0)
        else:
            # Where nothing was found the log-sum-exp is −inf and the mass exactly 0.
            mass_BKGT = torch.sigmoid(memory_BKGT + self._bias(found) - rest_BKGT)
        difference_BKGTE = mass_BKGT[..., None].to(local_BKGTE.dtype) * (
            memory_BKGTE.to(local_BKGTE.dtype) - local_BKGTE
        )
        match = partial(found.log_weights, query_BKGTE, self.scaling)
        return difference_BKGTE, MemoryRead(
            self.layer, mass_BKGT, found, weigh=partial(match, discount_BKGT, bias_BKGTR), match=match
        )

    @torch.no_grad()
    def _drawn(self, query_BKGTE: Tensor, local_logsumexp_BKGT: Tensor, found: Retrieved) -> Tensor:
        """Share of the attention (B, K, G, T, R) that each retrieved token would get by its match alone."""
        match_BKGTR = found.matches(self.scale_KG * self.scaling)
        rest_BKGT = self._rest(query_BKGTE, local_logsumexp_BKGT) - self._bias(found)
        all_BKGT = torch.logaddexp(match_BKGTR.logsumexp(-1), rest_BKGT)
        return (match_BKGTR - all_BKGT[..., None]).exp()

    def _raise(self, query_BKGTE: Tensor, local_logsumexp_BKGT: Tensor, found: Retrieved, sums: PassageSums) -> Tensor:
        """What evidence adds to scores, (B, K, G, T, R)."""
        if found.raises_at_once(query_BKGTE):
            tables = sums.tables(self.layer, len(query_BKGTE), query_BKGTE.device)
            return found.raised(query_BKGTE, local_logsumexp_BKGT, self._joint_heads, tables)
        drawn_BKGTR = self._drawn(query_BKGTE, local_logsumexp_BKGT, found)
        sum_BKGTR = sums.evidence(self.layer, found.index_BKGTR, drawn_BKGTR)
        counted_BKGTR = (sum_BKGTR * (-self.evidence_from_KG.float()).exp()[..., None, None]).log1p()
        gain_BKGT = self.evidence_KG[..., None] + self._products(query_BKGTE, self.evidence_query_KGE)
        # What others found is never held against a passage.
        return gain_BKGT.clamp(min=0)[..., None] * counted_BKGTR

    def _rest(self, query_BKGTE: Tensor, local_logsumexp_BKGT: Tensor) -> Tensor:
        """log-sum-exp (B, K, G, T) of what memory competes with: local keys and the null key."""
        null_BKGT = self._products(query_BKGTE, self.null_key_KGE) + self.null_bias_KG[..., None]
        return torch.logaddexp(local_logsumexp_BKGT, null_BKGT)

    def _bias(self, found: Retrieved) -> Tensor:
        """What is added to the scores of all that a row found, (B, K, G, 1)."""
        log_size_B111 = (found.bank_size_B.clamp(min=1) / REFERENCE_SIZE).log()[:, None, None, None]
        return self.bias_KG[..., None] + self.size_bias_KG[..., None] * log_size_B111

    def _products(self, query_BKGTE: Tensor, vector_KGE: Tensor) -> Tensor:
        """Scaled products (B, K, G, T) of queries and one vector a head."""
        return (query_BKGTE * vector_KGE[..., None, :]).sum(-1).float() * self.scaling

    def _scaled(self, query_BKGTE: Tensor) -> Tensor:
        return query_BKGTE.float() * self.scale_KG[..., None, None].float()

    @property
    def _joint_heads(self) -> JointHeads:
        always = self.scale_KG, self.bias_KG, self.size_bias_KG, self.null_key_KGE, self.null_bias_KG
        newest = (self.newest_KG, self.newest_query_KGE) if self.newest_wins else (None, None)
        evidence = ()
        if self.passage_evidence:
            evidence = self.evidence_KG, self.evidence_query_KGE, self.evidence_from_KG
        return JointHeads(self.scaling, REFERENCE_SIZE, *always, *newest, *evidence)
