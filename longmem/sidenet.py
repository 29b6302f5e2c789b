"""SideNet: the small trained network that queries the bank and corrects the frozen backbone (paper, section 2.2).

It carries only the difference d to the backbone, so the paper's cross-network residual is exact:

    d ← 0
    for each SideNet layer, spanning backbone layers [lo, hi):
        x = H[lo] + d
        alpha:       d ← d + α ⊙ (layer(x) − x) + Δ_mem
        difference:  d ← d + layer(x) − layer(H[lo]) + Δ_mem
    logits = head(norm(H[L] + d))

Δ_mem = branch(joint attention) − branch(local attention). A branch is everything between the heads' outputs and the
residual add, with its own trainable copy of the output projection. It is exactly 0 where nothing is retrieved.

B batch, T tokens, S local keys, D hidden size, H query heads, K memory heads of a layer, G query heads each, E head
size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longmem.attention import MemoryAttention, MemoryRead, local_attention
from longmem.config import SideNetConfig
from longmem.families import Family, Rotary
from longmem.index import Retrieve
from longmem.ops import causal_logsumexp

PositionEmbeddings = Callable[[int, Tensor, Tensor], Rotary]


class SideNetCache:
    """Rotated keys and values of every SideNet layer, for token-by-token generation."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, stream: str, key_BKTE: Tensor, value_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Append to what `layer` holds of a stream ("x", or "plain" for the uncorrected one); returns all of it."""
        if (layer, stream) in self._kept:
            past_key, past_value = self._kept[layer, stream]
            key_BKTE = torch.cat((past_key, key_BKTE), dim=2)
            value_BKTE = torch.cat((past_value, value_BKTE), dim=2)
        self._kept[layer, stream] = (key_BKTE, value_BKTE)
        return key_BKTE, value_BKTE


@dataclass(frozen=True)
class SideNetOutput:
    """The correction to the backbone's last hidden state (B, T, D), and what each memory layer read."""

    difference_BTD: Tensor
    reads: list[MemoryRead] = field(default_factory=list)


class SideNetLayer(nn.Module):
    """A trainable copy of one backbone layer, with memory in its attention if its span begins at a memory layer.

    Args:
        family: how the decoder layer is taken apart.
        source: the backbone layer that is copied.
        lo: first backbone layer of the span: gives position embeddings and names the memory layer.
        kv_heads: key-value heads of layer `lo` that are remembered; none for a layer without memory.
    """

    def __init__(
        self,
        family: Family,
        source: nn.Module,
        lo: int,
        kv_heads: list[int],
        config: SideNetConfig,
        head_dim: int,
        group: int,
    ) -> None:
        super().__init__()
        self.family = family
        self.lo = lo
        self.kv_heads = kv_heads
        self.group = group
        self.head_dim = head_dim
        self.update = config.update
        self.decoder = copy.deepcopy(source).requires_grad_(True)
        weight_DF = family.output_weight(source).detach()
        if config.update == "alpha":
            self.alpha_D = nn.Parameter(torch.zeros(weight_DF.shape[0], device=weight_DF.device))
        if kv_heads:
            self.memory = MemoryAttention(lo, len(kv_heads), group, head_dim, family.scaling(source), config.fusion)
            self.memory.to(weight_DF.device)
            # Only the columns of memory heads can matter: elsewhere joint and local attention are equal.
            columns = weight_DF.unflatten(1, (-1, group, head_dim))[:, kv_heads].flatten(1)
            self.memory_output_DF = nn.Parameter(columns.clone())

    def forward(
        self,
        difference_BTD: Tensor | None,
        hidden_BTD: Tensor,
        rotary: Rotary,
        retrieve: Retrieve | None,
        cache: SideNetCache | None,
        memory: float,
    ) -> tuple[Tensor | None, MemoryRead | None]:
        """The next difference d (None stands for exactly 0), and what was read.

        Args:
            difference_BTD: d so far; None is exactly 0.
            hidden_BTD: H[lo], the backbone's hidden states at the start of the span.
            rotary: position embeddings of layer `lo`.
            retrieve: the bank; None is an empty one.
            cache: keys and values of earlier tokens, extended in place.
            memory: scales what memory adds.
        """
        x_BTD = hidden_BTD if difference_BTD is None else hidden_BTD + difference_BTD
        branch_BTD, delta_BTD, read = self._attend(x_BTD, rotary, retrieve, cache, "x")
        change_BTD = None if delta_BTD is None else memory * delta_BTD
        if self.update == "alpha":
            step_BTD = self.alpha_D * (self.family.finish(self.decoder, x_BTD, branch_BTD) - x_BTD)
            change_BTD = step_BTD if change_BTD is None else step_BTD + change_BTD
        elif difference_BTD is not None:
            plain_branch_BTD, _, _ = self._attend(hidden_BTD, rotary, None, cache, "plain")
            step_BTD = self.family.finish(self.decoder, x_BTD, branch_BTD) - self.family.finish(
                self.decoder, hidden_BTD, plain_branch_BTD
            )
            change_BTD = step_BTD if change_BTD is None else step_BTD + change_BTD
        elif cache is not None:
            # d may cease to be 0 at a later token, which will attend to this one.
            self._attend(hidden_BTD, rotary, None, cache, "plain")
        if difference_BTD is None or change_BTD is None:
            return change_BTD if difference_BTD is None else difference_BTD, read
        return difference_BTD + change_BTD, read

    def _attend(
        self, x_BTD: Tensor, rotary: Rotary, retrieve: Retrieve | None, cache: SideNetCache | None, stream: str
    ) -> tuple[Tensor, Tensor | None, MemoryRead | None]:
        """The layer's finished attention branch, Δ_mem (None without memory), and what was read."""
        family, decoder = self.family, self.decoder
        scaling, window = family.scaling(decoder), family.window(decoder)
        query_BHTE, key_BKTE, value_BKTE = family.qkv(decoder, x_BTD)
        rotated_BHTE, key_BKSE = family.rotate(query_BHTE, rotary), family.rotate(key_BKTE, rotary)
        value_BKSE = value_BKTE
        if cache is not None:
            key_BKSE, value_BKSE = cache.extend(self.lo, stream, key_BKSE, value_BKTE)
        heads_BHTE = local_attention(rotated_BHTE, key_BKSE, value_BKSE, scaling, window)
        projected_BTD = family.project(decoder, heads_BHTE.transpose(1, 2).flatten(2))
        branch_BTD = family.after_projection(decoder, projected_BTD)
        if not self.kv_heads or retrieve is None:
            return branch_BTD, None, None

        query_BKGTE = self._memory_heads(query_BHTE)
        local_BKGT = causal_logsumexp(self._memory_heads(rotated_BHTE), key_BKSE[:, self.kv_heads], scaling, window)
        found = retrieve(self.lo, query_BKGTE.detach())
        joint_BKGTE, read = self.memory(query_BKGTE, self._memory_heads(heads_BHTE), local_BKGT, found)
        correction_BTF = joint_BKGTE.flatten(1, 2).transpose(1, 2).flatten(2)
        correction_BTD = torch.nn.functional.linear(correction_BTF, self.memory_output_DF)
        if not family.norms_branch:
            return branch_BTD, correction_BTD, read
        delta_BTD = family.after_projection(decoder, projected_BTD + correction_BTD) - branch_BTD
        return branch_BTD, delta_BTD, read

    def _memory_heads(self, heads_BHTE: Tensor) -> Tensor:
        return heads_BHTE.unflatten(1, (-1, self.group))[:, self.kv_heads]


class CompiledFamily:
    """A family whose pieces are compiled: the SideNet's layers share their graphs."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.qkv = torch.compile(family.qkv)
        self.rotate = torch.compile(family.rotate)
        self.finish = torch.compile(family.finish)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


class SideNet(nn.Module):
    """A few decoder layers beside the frozen backbone.

    Args:
        config: spans, memory heads, form of the update.
        family: the backbone's family.
        layers: the backbone's decoder layers, which are copied.
        head_dim, num_heads, num_kv_heads: of the backbone.
    """

    def __init__(
        self,
        config: SideNetConfig,
        family: Family,
        layers: nn.ModuleList,
        *,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        for lo, hi in config.spans:
            kv_heads = [head.kv_head for head in config.memory_heads if head.layer == lo]
            source = layers[lo if kv_heads or config.init == "first" else hi - 1]
            self.layers.append(SideNetLayer(family, source, lo, kv_heads, config, head_dim, num_heads // num_kv_heads))

    def compile_layers(self) -> None:
        """Run compiled layers from now on (`torch.compile`): faster on a GPU, where many calls have the same shape."""
        layers: list[Any] = list(self.layers)
        compiled = CompiledFamily(layers[0].family)
        for layer in layers:
            layer.family = compiled

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Backbone boundaries whose hidden states the SideNet reads."""
        return tuple(lo for lo, _ in self.config.spans)

    def forward(
        self,
        hidden_states: dict[int, Tensor],
        positions_BT: Tensor,
        position_embeddings: PositionEmbeddings,
        retrieve: Retrieve | None,
        *,
        cache: SideNetCache | None = None,
        memory: float = 1.0,
    ) -> SideNetOutput:
        """The correction to the backbone's last hidden state.

        Args:
            hidden_states: boundary → (B, T, D), at least at `boundaries`.
            positions_BT: positions in the local window.
            position_embeddings: (layer, hidden states, positions) → rotary of that layer.
            retrieve: bank search; None is an empty bank.
            cache: for generation.
            memory: 1 is the trained strength; between 0 and 1 what memory adds, and d as a whole, are scaled.
        """
        difference_BTD: Tensor | None = None
        reads = []
        for layer in self.layers:
            assert isinstance(layer, SideNetLayer)
            hidden_BTD = hidden_states[layer.lo]
            rotary = position_embeddings(layer.lo, hidden_BTD, positions_BT)
            difference_BTD, read = layer(difference_BTD, hidden_BTD, rotary, retrieve, cache, memory)
            if read is not None:
                reads.append(read)
        if difference_BTD is None:
            difference_BTD = torch.zeros_like(hidden_states[self.boundaries[0]])
        return SideNetOutput(memory * difference_BTD, reads)
