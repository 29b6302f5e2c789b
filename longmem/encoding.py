"""Reading a window of text for its keys and values alone, on a CPU.

The frozen layers are run piece by piece (`longmem.families`) rather than by transformers: keys and values of a
memory layer are those that its attention needs anyway, nothing beyond the last memory layer is computed, and
nothing in the layer below it for tokens that are only context.

B batch, T tokens of a window, D hidden size, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from longmem.families import Family, Rotary
from longmem.ops import cpu


def encode_window(
    family: Family,
    layers: Sequence[Any],
    x_BTD: Tensor,
    rotary_of: Callable[[int], Rotary],
    wanted: Collection[int],
    first: int = 0,
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
    for number in range(top + 1):
        layer, last = layers[number], number == top
        kept_BtD = x_BTD[:, first:] if last else x_BTD
        query_BHTE, key_BKTE, value_BKTE = family.qkv(layer, kept_BtD)
        if number in wanted:
            found[number] = (key_BKTE, value_BKTE) if last else (key_BKTE[:, :, first:], value_BKTE[:, :, first:])
        if last:
            break
        rotary = rotary_of(number)
        heads_BHTE = cpu.causal_attention(
            family.rotate(query_BHTE, rotary),
            family.rotate(key_BKTE, rotary),
            value_BKTE,
            family.scaling(layer),
            family.window(layer),
        )
        branch_BTD = family.after_projection(layer, family.project(layer, heads_BHTE.transpose(1, 2).flatten(2)))
        x_BTD = family.finish(layer, x_BTD, branch_BTD)
    return found


def exact_in_bfloat16(weights: Iterable[Tensor]) -> bool:
    """Whether bfloat16 holds these weights as they are, as it does those of a model that was published in it."""
    return all(torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight) for weight in weights)
