"""How each model family's decoder layer is taken apart.

The SideNet runs copies of backbone layers with memory in their attention, so it needs a layer's pieces rather than
its `forward`: queries, keys and values before rotary, the output projection, and whatever follows it. A family is
a stateless object; the modules it is handed may be the backbone's own or the SideNet's copies.

B batch, T tokens, D hidden size, H query heads, K key-value heads, E head size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longmem.errors import UnsupportedBackboneError

Rotary = tuple[Tensor, Tensor] | None


class Family(Protocol):
    """One way of building a decoder layer."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `config.model_type`."""
        ...

    @property
    def layers_name(self) -> str:
        """Attribute of the base model that holds its decoder layers."""
        ...

    @property
    def norm_name(self) -> str:
        """Attribute of the base model that holds the final norm."""
        ...

    @property
    def norms_branch(self) -> bool:
        """Whether a norm stands between the output projection and the residual add."""
        ...

    def embed(self, base: Any, input_ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Hidden states at boundary 0."""
        ...

    def position_embeddings(self, base: Any, layer: int, hidden_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        """(cos, sin) for a layer, each (B, T, rotated size), or None where positions are learned embeddings."""
        ...

    def qkv(self, layer: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries BHTE, keys BKTE, values BKTE: after the input norm and any QK-norm, before rotary."""
        ...

    def rotate(self, heads_BHTE: Tensor, rotary: Rotary) -> Tensor:
        """Apply rotary position embedding to queries or keys."""
        ...

    def scaling(self, layer: Any) -> float:
        """What q·k is multiplied by."""
        ...

    def window(self, layer: Any) -> int | None:
        """Tokens that a sliding-window layer sees, itself included; None sees all."""
        ...

    def output_weight(self, layer: Any) -> Tensor:
        """Weight of the output projection, (D, H·E)."""
        ...

    def project(self, layer: Any, heads_BTF: Tensor) -> Tensor:
        """Output projection with its bias, F = H·E → D."""
        ...

    def after_projection(self, layer: Any, branch_BTD: Tensor) -> Tensor:
        """What stands between the output projection and the residual add: nothing unless `norms_branch`."""
        ...

    def finish(self, layer: Any, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        """The layer's output, given its input and its finished attention branch."""
        ...


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def split_heads(x_BTF: Tensor, head_dim: int) -> Tensor:
    return x_BTF.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class LlamaFamily:
    """Llama (SmolLM2 too), Mistral, Qwen2: pre-norm, separate projections, rotary over the whole head."""

    model_types = ("llama", "mistral", "qwen2")
    layers_name = "layers"
    norm_name = "norm"
    norms_branch = False

    def embed(self, base: Any, input_ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        return base.embed_tokens(input_ids_BT)

    def position_embeddings(self, base: Any, layer: int, hidden_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        return base.rotary_emb(hidden_BTD, position_ids=positions_BT)

    def qkv(self, layer: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, normed_BTD = layer.self_attn, layer.input_layernorm(x_BTD)
        query_BHTE = split_heads(attention.q_proj(normed_BTD), attention.head_dim)
        key_BKTE = split_heads(attention.k_proj(normed_BTD), attention.head_dim)
        value_BKTE = split_heads(attention.v_proj(normed_BTD), attention.head_dim)
        return query_BHTE, key_BKTE, value_BKTE

    def rotate(self, heads_BHTE: Tensor, rotary: Rotary) -> Tensor:
        assert rotary is not None
        cos_B1TE, sin_B1TE = (part.unsqueeze(1) for part in rotary)
        return heads_BHTE * cos_B1TE + rotate_half(heads_BHTE) * sin_B1TE

    def scaling(self, layer: Any) -> float:
        return float(layer.self_attn.scaling)

    def window(self, layer: Any) -> int | None:
        attention = layer.self_attn
        if hasattr(attention, "sliding_window"):
            return attention.sliding_window
        return getattr(attention.config, "sliding_window", None) if attention.config.model_type == "mistral" else None

    def output_weight(self, layer: Any) -> Tensor:
        return layer.self_attn.o_proj.weight

    def project(self, layer: Any, heads_BTF: Tensor) -> Tensor:
        return layer.self_attn.o_proj(heads_BTF)

    def after_projection(self, layer: Any, branch_BTD: Tensor) -> Tensor:
        return branch_BTD

    def finish(self, layer: Any, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + branch_BTD
        return x_BTD + layer.mlp(layer.post_attention_layernorm(x_BTD))


class Qwen3Family(LlamaFamily):
    """Qwen3: as Llama, with a norm on each head's queries and keys."""

    model_types = ("qwen3",)

    def qkv(self, layer: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_BHTE, key_BKTE, value_BKTE = super().qkv(layer, x_BTD)
        return layer.self_attn.q_norm(query_BHTE), layer.self_attn.k_norm(key_BKTE), value_BKTE


class Gemma3Family(Qwen3Family):
    """Gemma 3 (text): QK-norm, local and global layers with their own rotary base, norms after both branches."""

    model_types = ("gemma3_text",)
    norms_branch = True

    def position_embeddings(self, base: Any, layer: int, hidden_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        return base.rotary_emb(hidden_BTD, positions_BT, base.config.layer_types[layer])

    def after_projection(self, layer: Any, branch_BTD: Tensor) -> Tensor:
        return layer.post_attention_layernorm(branch_BTD)

    def finish(self, layer: Any, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + branch_BTD
        return x_BTD + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x_BTD)))


class GPTNeoXFamily:
    """GPT-NeoX (Pythia): fused QKV with biases, rotary over part of the head, attention and MLP in parallel."""

    model_types = ("gpt_neox",)
    layers_name = "layers"
    norm_name = "final_layer_norm"
    norms_branch = False

    def embed(self, base: Any, input_ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        return base.embed_in(input_ids_BT)

    def position_embeddings(self, base: Any, layer: int, hidden_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        return base.rotary_emb(hidden_BTD, position_ids=positions_BT)

    def qkv(self, layer: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = layer.attention
        fused_BTF = attention.query_key_value(layer.input_layernorm(x_BTD))
        query_BHTE, key_BKTE, value_BKTE = split_heads(fused_BTF, 3 * attention.head_size).chunk(3, dim=-1)
        return query_BHTE, key_BKTE, value_BKTE

    def rotate(self, heads_BHTE: Tensor, rotary: Rotary) -> Tensor:
        assert rotary is not None
        cos_B1TR, sin_B1TR = (part.unsqueeze(1) for part in rotary)
        rotated_size = cos_B1TR.shape[-1]
        turned, kept = heads_BHTE[..., :rotated_size], heads_BHTE[..., rotated_size:]
        return torch.cat((turned * cos_B1TR + rotate_half(turned) * sin_B1TR, kept), dim=-1)

    def scaling(self, layer: Any) -> float:
        return float(layer.attention.scaling)

    def window(self, layer: Any) -> int | None:
        return None

    def output_weight(self, layer: Any) -> Tensor:
        return layer.attention.dense.weight

    def project(self, layer: Any, heads_BTF: Tensor) -> Tensor:
        return layer.attention.dense(heads_BTF)

    def after_projection(self, layer: Any, branch_BTD: Tensor) -> Tensor:
        return branch_BTD

    def finish(self, layer: Any, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        if layer.use_parallel_residual:
            return layer.mlp(layer.post_attention_layernorm(x_BTD)) + branch_BTD + x_BTD
        x_BTD = branch_BTD + x_BTD
        return layer.mlp(layer.post_attention_layernorm(x_BTD)) + x_BTD


class GPT2Family:
    """GPT-2: fused QKV with biases, learned positions (already in the hidden states, so nothing is rotated)."""

    model_types = ("gpt2",)
    layers_name = "h"
    norm_name = "ln_f"
    norms_branch = False

    def embed(self, base: Any, input_ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        return base.wte(input_ids_BT) + base.wpe(positions_BT)

    def position_embeddings(self, base: Any, layer: int, hidden_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        return None

    def qkv(self, layer: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = layer.attn
        parts = attention.c_attn(layer.ln_1(x_BTD)).split(attention.split_size, dim=2)
        query_BHTE, key_BKTE, value_BKTE = (split_heads(part, attention.head_dim) for part in parts)
        return query_BHTE, key_BKTE, value_BKTE

    def rotate(self, heads_BHTE: Tensor, rotary: Rotary) -> Tensor:
        return heads_BHTE

    def scaling(self, layer: Any) -> float:
        return float(layer.attn.scaling)

    def window(self, layer: Any) -> int | None:
        return None

    def output_weight(self, layer: Any) -> Tensor:
        return layer.attn.c_proj.weight.T  # Conv1D keeps its weight as (in, out)

    def project(self, layer: Any, heads_BTF: Tensor) -> Tensor:
        return layer.attn.c_proj(heads_BTF)

    def after_projection(self, layer: Any, branch_BTD: Tensor) -> Tensor:
        return branch_BTD

    def finish(self, layer: Any, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        x_BTD = branch_BTD + x_BTD
        return x_BTD + layer.mlp(layer.ln_2(x_BTD))


FAMILIES: tuple[Family, ...] = (LlamaFamily(), Qwen3Family(), Gemma3Family(), GPTNeoXFamily(), GPT2Family())


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face causal language model.

    Raises:
        UnsupportedBackboneError: names the families there are.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UnsupportedBackboneError(
        f"longmem has no adapter for models of type {model_type!r}. Supported model types: {known}. "
        "A family is about 40 lines in longmem/families.py."
    )
