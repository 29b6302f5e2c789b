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
from collections import defaultdict
from collections.abc import Callable, ItemsView
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longmem.attention import MemoryAttention, MemoryRead, local_attention, pick_heads
from longmem.config import SideNetConfig
from longmem.decoding import KeyValueBuffer, LayerStep, RowDecoder, RowLayer
from longmem.evidence import PassageSums
from longmem.families import Family, Rotary
from longmem.ops import causal_logsumexp
from longmem.retrieved import Retrieve
from longmem.windows import Branch, WindowBuffer, Windows


class SideNetCache:
    """Rotated keys and values of every SideNet layer, and what passages of banks drew of its attention, for
    token-by-token generation.

    Args:
        ends_B: tokens of each row of what is read first that are more than padding; None is all.
    """

    def __init__(self, ends_B: Tensor | None = None) -> None:
        self._kept: defaultdict[tuple[int, str], KeyValueBuffer] = defaultdict(KeyValueBuffer)
        self.sums = PassageSums(ends_B)

    def of(self, layer: int, stream: str) -> KeyValueBuffer:
        """What `layer` holds of a stream ("x", or "plain" for the uncorrected one)."""
        return self._kept[layer, stream]

    def items(self) -> ItemsView[tuple[int, str], KeyValueBuffer]:
        """All that is held, by layer and stream."""
        return self._kept.items()


@dataclass(frozen=True)
class _Local:
    """A layer without memory: tensors as in `LayerStep`, and what is computed only when called for."""

    query_BHTE: Tensor
    heads_BHTE: Tensor
    projected_BTD: Tensor
    branch_BTD: Tensor
    logsumexp: Callable[[], Tensor]  # (B, K, G, T)
    output: Callable[[], Tensor]  # (B, T, D)


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
        self._rows: RowLayer | None = None
        weight_DF = family.output_weight(source).detach()
        if config.update == "alpha":
            self.alpha_D = nn.Parameter(torch.zeros(weight_DF.shape[0], device=weight_DF.device))
        if kv_heads:
            self.memory = MemoryAttention(
                lo,
                len(kv_heads),
                group,
                head_dim,
                family.scaling(source),
                config.fusion,
                config.newest_wins,
                config.passage_evidence,
            )
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
        cache: SideNetCache | Windows | None,
        memory: float,
        sums: PassageSums,
    ) -> tuple[Tensor | None, MemoryRead | None]:
        """The next difference d (None stands for exactly 0), and what was read.

        Args:
            difference_BTD: d so far; None is exactly 0.
            hidden_BTD: H[lo], the backbone's hidden states at the start of the span.
            rotary: position embeddings of layer `lo`.
            retrieve: the bank; None is an empty one.
            cache: keys and values of earlier tokens, extended in place.
            memory: scales what memory adds.
            sums: what passages drew of the attention of earlier tokens and of the layers below.
        """
        x_BTD = hidden_BTD if difference_BTD is None else hidden_BTD + difference_BTD
        local = self._local(x_BTD, rotary, cache, "x")
        delta_BTD, read = None, None
        if retrieve is not None and self.kv_heads:
            delta_BTD, read = self._read_memory(local, retrieve, sums)
        change_BTD = delta_BTD if delta_BTD is None or memory == 1.0 else memory * delta_BTD
        if self.update == "alpha":
            step_BTD = self.alpha_D * (local.output() - x_BTD)
            change_BTD = step_BTD if change_BTD is None else step_BTD + change_BTD
        elif difference_BTD is not None:
            step_BTD = local.output() - self._local(hidden_BTD, rotary, cache, "plain").output()
            change_BTD = step_BTD if change_BTD is None else step_BTD + change_BTD
        elif cache is not None:
            # d may cease to be 0 at a later token, which will attend to this one.
            self._local(hidden_BTD, rotary, cache, "plain")
        if difference_BTD is None or change_BTD is None:
            return change_BTD if difference_BTD is None else difference_BTD, read
        return difference_BTD + change_BTD, read

    def _local(self, x_BTD: Tensor, rotary: Rotary, cache: SideNetCache | Windows | None, stream: str) -> _Local:
        """The layer as the backbone would run it; its keys and values are added to the cache."""
        family, decoder = self.family, self.decoder
        scaling, window = family.scaling(decoder), family.window(decoder)
        buffer = None if cache is None else cache.of(self.lo, stream)
        if isinstance(buffer, WindowBuffer):
            return self._of_step(buffer.step(family, decoder, x_BTD, rotary))
        if self._rows is not None and buffer is not None and self._rows.takes(x_BTD, buffer):
            return self._of_step(self._rows(x_BTD, rotary, buffer))
        query_BHTE, key_BKTE, value_BKSE = family.qkv(decoder, x_BTD)
        rotated_BHTE, key_BKSE = family.rotate(query_BHTE, rotary), family.rotate(key_BKTE, rotary)
        if buffer is not None:
            key_BKSE, value_BKSE = buffer.update(key_BKSE, value_BKSE)
        heads_BHTE = local_attention(rotated_BHTE, key_BKSE, value_BKSE, scaling, window)
        projected_BTD = family.project(decoder, heads_BHTE.transpose(1, 2).flatten(2))
        branch_BTD = family.after_projection(decoder, projected_BTD)
        return _Local(
            query_BHTE,
            heads_BHTE,
            projected_BTD,
            branch_BTD,
            logsumexp=lambda: causal_logsumexp(
                self._memory_heads(rotated_BHTE), pick_heads(key_BKSE, self.kv_heads), scaling, window
            ),
            output=lambda: family.finish(decoder, x_BTD, branch_BTD),
        )

    def _of_step(self, step: LayerStep) -> _Local:
        return _Local(
            step.query_BHTE,
            step.heads_BHTE,
            step.projected_BTD,
            step.branch_BTD,
            logsumexp=lambda: self._memory_heads(step.logsumexp_BHT),
            output=lambda: step.output_BTD,
        )

    def _read_memory(self, local: _Local, retrieve: Retrieve, sums: PassageSums) -> tuple[Tensor, MemoryRead]:
        """Δ_mem, and what was read."""
        query_BKGTE = self._memory_heads(local.query_BHTE)
        found = retrieve(self.lo, query_BKGTE.detach())
        heads_BKGTE = self._memory_heads(local.heads_BHTE)
        joint_BKGTE, read = self.memory(query_BKGTE, heads_BKGTE, local.logsumexp(), found, sums)
        correction_BTF = joint_BKGTE.flatten(1, 2).transpose(1, 2).flatten(2)
        correction_BTD = torch.nn.functional.linear(correction_BTF, self.memory_output_DF)
        if not self.family.norms_branch:
            return correction_BTD, read
        joint_branch_BTD = self.family.after_projection(self.decoder, local.projected_BTD + correction_BTD)
        return joint_branch_BTD - local.branch_BTD, read

    def decode_by(self, decoder: RowDecoder | None) -> None:
        """Give single tokens behind a cache to a decoder from now on; None to none. It copies weights as they are."""
        self._rows = None if decoder is None else decoder.layer(self.decoder)

    def _memory_heads(self, heads_BHTE: Tensor) -> Tensor:
        return pick_heads(heads_BHTE.unflatten(1, (-1, self.group)), self.kv_heads)


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

    def decode_by(self, decoder: RowDecoder | None) -> None:
        """Give single tokens behind a cache to a decoder from now on; None to none. It copies weights as they are."""
        for layer in self.layers:
            assert isinstance(layer, SideNetLayer)
            layer.decode_by(decoder)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Backbone boundaries whose hidden states the SideNet reads."""
        return tuple(lo for lo, _ in self.config.spans)

    def forward(
        self,
        hidden_states: dict[int, Tensor],
        rotary_of: Callable[[int], Rotary],
        retrieve: Retrieve | None,
        *,
        cache: SideNetCache | Windows | None = None,
        memory: float = 1.0,
    ) -> SideNetOutput:
        """The correction to the backbone's last hidden state.

        Args:
            hidden_states: boundary → (B, T, D), at least at `boundaries`.
            rotary_of: position embeddings by layer.
            retrieve: bank search; None is an empty bank.
            cache: for generation.
            memory: 1 is the trained strength; between 0 and 1 what memory adds, and d as a whole, are scaled.
        """
        branch = cache.branch if isinstance(cache, Windows) else Branch()
        sums = PassageSums() if cache is None else cache.sums
        sums.start()
        difference_BTD: Tensor | None = None
        reads = []
        with branch:
            for layer in self.layers:
                assert isinstance(layer, SideNetLayer)
                branch.wait(layer.lo)
                hidden_BTD, rotary = hidden_states[layer.lo], rotary_of(layer.lo)
                difference_BTD, read = layer(difference_BTD, hidden_BTD, rotary, retrieve, cache, memory, sums)
                if read is not None:
                    reads.append(read)
            if difference_BTD is None:
                difference_BTD = torch.zeros_like(hidden_states[self.boundaries[0]])
            return SideNetOutput(difference_BTD if memory == 1.0 else memory * difference_BTD, reads)
