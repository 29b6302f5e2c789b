"""Reading a window of text for its keys and values alone.

The frozen layers are run piece by piece (`longmem.families`) rather than by transformers: keys and values of a
memory layer are those that its attention needs anyway, nothing beyond those of the last memory layer is computed, and
nothing in it for tokens that are only context.

B batch, T tokens of a window, D hidden size, H query heads, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longmem.families import Family, Rotary
from longmem.ops import causal_mask, cpu


class Passed(NamedTuple):
    """What a layer made of a window.

    Attributes:
        output_BTD: hidden states above it.
        key_BKTE, value_BKTE: keys before rotary, and values.
    """

    output_BTD: Tensor
    key_BKTE: Tensor
    value_BKTE: Tensor


def pass_layer(family: Family, layer: Any, x_BTD: Tensor, rotary: Rotary) -> Passed:
    """A window through a layer."""
    attend = cpu.causal_attention if x_BTD.device.type == "cpu" else causal_attention
    query_BHTE, key_BKTE, value_BKTE = family.qkv(layer, x_BTD)
    heads_BHTE = attend(
        family.rotate(query_BHTE, rotary),
        family.rotate(key_BKTE, rotary),
        value_BKTE,
        family.scaling(layer),
        family.window(layer),
    )
    branch_BTD = family.after_projection(layer, family.project(layer, heads_BHTE.transpose(1, 2).flatten(2)))
    return Passed(family.finish(layer, x_BTD, branch_BTD), key_BKTE, value_BKTE)


def layer_keys_values(family: Family, layer: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys before rotary and values of a layer, (B, K, T, E) each."""
    _, key_BKTE, value_BKTE = family.qkv(layer, x_BTD)
    return key_BKTE, value_BKTE


class Passes(NamedTuple):
    """`pass_layer` for all layers but the last one wanted, and `layer_keys_values` for that: as they are, or
    compiled. A compiled one serves all layers, whose weights it takes as arguments."""

    layer: Callable[[Family, Any, Tensor, Rotary], Passed] = pass_layer
    top: Callable[[Family, Any, Tensor], tuple[Tensor, Tensor]] = layer_keys_values

    @classmethod
    def compiled(cls) -> Passes:
        return cls(torch.compile(pass_layer), torch.compile(layer_keys_values))


def encode_window(
    family: Family,
    layers: Sequence[Any],
    x_BTD: Tensor,
    rotary_of: Callable[[int], Rotary],
    wanted: Collection[int],
    first: int = 0,
    passes: Passes = Passes(),  # noqa: B008 (a tuple of functions)
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys before rotary and values of some layers, each (B, K, T − first, E).

    Args:
        layers: of the backbone, from its lowest on.
        x_BTD: hidden states at boundary 0.
        rotary_of: a layer's rotary embedding for the whole window.
        wanted: layers whose keys and values are wanted.
        first: tokens before it are context.
    """
    found = {}
    top = max(wanted)
    for number in range(top):
        x_BTD, key_BKTE, value_BKTE = passes.layer(family, layers[number], x_BTD, rotary_of(number))
        if number in wanted:
            found[number] = (key_BKTE[:, :, first:], value_BKTE[:, :, first:])
    found[top] = passes.top(family, layers[top], x_BTD[:, first:])
    return found


def causal_attention(
    query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, scaling: float, window: int | None = None
) -> Tensor:
    """What each token of a window takes from itself and those before it: (B, H, T, E), by PyTorch's kernels.

    Args:
        query_BHTE, key_BKTE: after rotary.
        window: tokens that each one sees, itself included; None is all.
    """
    tokens, group = query_BHTE.shape[2], query_BHTE.shape[1] // key_BKTE.shape[1]
    mask_TT = None if window is None or tokens <= window else causal_mask(tokens, tokens, window, query_BHTE.device)
    if mask_TT is not None or query_BHTE.dtype == torch.float32:
        # Only the kernel for half precision without a mask takes fewer heads of keys than of queries.
        key_BKTE, value_BKTE = (part.repeat_interleave(group, dim=1) for part in (key_BKTE, value_BKTE))
        group = 1
    return F.scaled_dot_product_attention(
        query_BHTE,
        key_BKTE,
        value_BKTE,
        attn_mask=mask_TT,
        is_causal=mask_TT is None,
        scale=scaling,
        enable_gqa=group > 1,
    )


def exact_in_bfloat16(weights: Iterable[Tensor]) -> bool:
    """Whether bfloat16 holds these weights as they are, as it does those of a model that was published in it."""
    return all(torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight) for weight in weights)
