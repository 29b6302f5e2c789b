"""The frozen language model: hidden states at layer boundaries, keys and values of memory heads, logits.

B batch, T tokens, D hidden size, K key-value heads, E head size.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from longmem.decoding import KeyValueBuffer, LayerStep, RowDecoder, RowLayer
from longmem.encoding import Passes, encode_window, exact_in_bfloat16, layer_keys_values
from longmem.families import Rotary, family_of
from longmem.ops.cpu import has_bfloat16_products
from longmem.pretrained import load_pretrained
from longmem.windows import Windows


@dataclass(frozen=True)
class BackboneOutput:
    """What the backbone's layers said about a piece of text.

    Attributes:
        hidden_states: boundary → (B, T, D). Boundary l is the input of layer l; boundary `num_layers` is the output
            of the last layer, before the final norm (transformers' `hidden_states[-1]` is after it).
        positions_BT: position of each token in the local window.
    """

    hidden_states: dict[int, Tensor]
    positions_BT: Tensor


class Backbone(nn.Module):
    """A Hugging Face causal language model that is only read, never changed.

    Args:
        model: any `…ForCausalLM` of a family in `longmem.families`. Its parameters stop requiring gradients.
        tokenizer: its fast tokenizer, or None where only token ids are used.
        name: how banks and checkpoints call it.

    Raises:
        UnsupportedBackboneError: no family fits.
    """

    def __init__(self, model: Any, tokenizer: Any = None, name: str = "backbone") -> None:
        super().__init__()
        self.family = family_of(model)
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
        self._rows: _Rows | None = None
        self._passes = Passes()

    @classmethod
    def from_pretrained(cls, name: str, *, dtype: torch.dtype = torch.float32, device: str = "auto") -> Backbone:
        """An embedded model by name (`smollm2-135m`), a folder, or a Hub id."""
        loaded = load_pretrained(name, dtype=dtype, device=device)
        return cls(loaded.model, loaded.tokenizer, loaded.name)

    def train(self, mode: bool = True) -> Backbone:
        """A frozen model has no training mode (no dropout, ever)."""
        return super().train(False)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def base(self) -> Any:
        """The model without its head."""
        return self.model.base_model

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.base, self.family.layers_name)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden_size // self.num_heads)

    @property
    def max_positions(self) -> int:
        """Tokens of its trained window."""
        return int(self.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def prefix_token_id(self) -> int:
        """The token that stands before every local window and every encoded window.

        It takes the role of attention sink and is never remembered. The document separator of pre-training serves best.
        """
        if self.tokenizer is not None:
            separator = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
            if separator is not None and self.tokenizer.convert_ids_to_tokens(separator) == "<|endoftext|>":
                return int(separator)
        for token_id in (self.config.bos_token_id, self.config.eos_token_id):
            first = token_id[0] if isinstance(token_id, list | tuple) else token_id
            if first is not None and 0 <= first < self.config.vocab_size:
                return int(first)
        return 0

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over names, shapes and bytes of all parameters, in their stored precision of bfloat16, and over the
        settings that change what they compute.

        A bank's keys mean something only to these very weights. Hashing in bfloat16 makes the hash the same
        whether the model computes in float32 or bfloat16.
        """
        settings = [self.config.model_type, getattr(self.config, "sliding_window", None)]
        settings += _rope_settings(getattr(self.config, "rope_parameters", None))
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            stored = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(stored.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def new_cache(self) -> Cache:
        """An empty key-value cache for `forward`."""
        return Cache(layers=[KeyValueBuffer() for _ in self.layers])

    @torch.no_grad()
    def forward(
        self, input_ids_BT: Tensor, *, boundaries: Collection[int], cache: Cache | Windows | None = None
    ) -> BackboneOutput:
        """Run the layers below the highest boundary asked for, and no others.

        Args:
            input_ids_BT: int64; continues what `cache` holds.
            boundaries: which hidden states to return, 0 … num_layers.
            cache: extended in place. `Windows` take one token a row.
        """
        if isinstance(cache, Windows):

            def run(layer: int, x_BTD: Tensor, rotary: Rotary) -> LayerStep:
                return cache.of(layer).step(self.family, self.layers[layer], x_BTD, rotary)

            return self._step(run, input_ids_BT, cache.length_B[:, None], boundaries, cache.branch.reached)
        highest = max(boundaries)
        past = cache.get_seq_length() if cache is not None else 0
        positions_BT = torch.arange(past, past + input_ids_BT.shape[1], device=input_ids_BT.device).expand_as(
            input_ids_BT
        )
        if self._rows is not None and cache is not None and self._rows.takes(input_ids_BT, cache):
            return self._step(self._rows.behind(cache), input_ids_BT, positions_BT, boundaries)
        trunk = self._trunk(highest)
        with _captured(getattr(trunk, self.family.layers_name), boundaries) as hidden_states:
            output = trunk(
                input_ids=input_ids_BT,
                past_key_values=_Unkept() if cache is None else cache,
                use_cache=cache is not None,
                position_ids=positions_BT,
            )
        hidden_states[highest] = output.last_hidden_state
        return BackboneOutput(hidden_states, positions_BT)

    def keys_values(self, layer: int, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before rotary and values of a layer, each (B, K, T, E), from the hidden states at its boundary."""
        return layer_keys_values(self.family, self.layers[layer], hidden_BTD)

    @torch.no_grad()
    def encode(
        self, input_ids_BT: Tensor, layers: Collection[int], *, first: int = 0
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """`keys_values` of some layers for a window of text, of the tokens from `first` on, by the shortest way
        (`longmem.encoding`).

        On a CPU weights in float32 that bfloat16 holds exactly are multiplied in bfloat16 if the processor can: as a
        GPU does, but with sums of layers kept in float32.
        """
        positions_1T = torch.arange(input_ids_BT.shape[1], device=self.device)[None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._encodes_in_bfloat16):
            x_BTD = self.family.embed(self.base, input_ids_BT, positions_1T)
            rotary_of = self.rotary_of(x_BTD, positions_1T)
            return encode_window(self.family, list(self.layers), x_BTD, rotary_of, layers, first, self._passes)

    @cached_property
    def _encodes_in_bfloat16(self) -> bool:
        return (
            self.device.type == "cpu"
            and self.dtype == torch.float32
            and has_bfloat16_products()
            and exact_in_bfloat16(self.layers.parameters())
        )

    def position_embeddings(self, layer: int, hidden_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        """(cos, sin) of a layer's rotary embedding at the given positions."""
        return self.family.position_embeddings(self.base, layer, hidden_BTD, positions_BT)

    def final_norm(self, hidden_BTD: Tensor) -> Tensor:
        return getattr(self.base, self.family.norm_name)(hidden_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Final norm and head: hidden states at the last boundary → (B, T, vocabulary)."""
        if self._rows is not None and hidden_BTD.shape[:2] == (1, 1):
            return self._rows.logits(hidden_BTD)
        return self.model.get_output_embeddings()(self.final_norm(hidden_BTD))

    @property
    def output_weight_VD(self) -> Tensor:
        """The output embeddings, for losses that never hold all logits at once."""
        return self.model.get_output_embeddings().weight

    def decode_by(self, decoder: RowDecoder | None) -> None:
        """Give single tokens behind a cache to a decoder from now on; None to none. It copies weights as they are."""
        if decoder is None:
            self._rows = None
            return
        layers = [decoder.layer(layer) for layer in self.layers]
        norm = getattr(self.base, self.family.norm_name)
        self._rows = _Rows(layers, decoder.logits(norm, self.model.get_output_embeddings()))

    def _step(
        self,
        run: Callable[[int, Tensor, Rotary], LayerStep],
        input_ids_BT: Tensor,
        positions_BT: Tensor,
        boundaries: Collection[int],
        reached: Callable[[int], None] = lambda boundary: None,
    ) -> BackboneOutput:
        """`forward` of a single token a row; `run` takes it through a layer, `reached` hears of every boundary."""
        x_BTD = self.family.embed(self.base, input_ids_BT, positions_BT)
        rotary_of = self.rotary_of(x_BTD, positions_BT)
        hidden_states = {0: x_BTD}
        reached(0)
        for layer in range(max(boundaries)):
            x_BTD = run(layer, x_BTD, rotary_of(layer)).output_BTD
            hidden_states[layer + 1] = x_BTD
            reached(layer + 1)
        return BackboneOutput({boundary: hidden_states[boundary] for boundary in boundaries}, positions_BT)

    def rotary_of(self, x_BTD: Tensor, positions_BT: Tensor) -> Callable[[int], Rotary]:
        """Rotary embeddings by layer, each computed when asked for; layers of one type share one. Of the hidden states
        only precision and device matter."""
        types = getattr(self.config, "layer_types", None) or [""] * self.num_layers
        made: dict[str, Rotary] = {}

        def rotary_of(layer: int) -> Rotary:
            if types[layer] not in made:
                made[types[layer]] = self.position_embeddings(layer, x_BTD, positions_BT)
            return made[types[layer]]

        return rotary_of

    def compile_layers(self) -> None:
        """Run compiled layers from now on (`torch.compile`): faster on a GPU, where many calls have the same shape."""
        self._run_layers = [torch.compile(layer) for layer in self.layers]
        self._trunks.clear()
        if self.device.type != "cpu":
            self._passes = Passes.compiled()

    @cached_property
    def _run_layers(self) -> list[Any]:
        return list(self.layers)

    @cached_property
    def _trunks(self) -> dict[int, Any]:
        return {}

    def _trunk(self, depth: int) -> Any:
        """The first `depth` layers without the final norm: a shallow copy that shares every module."""
        if depth not in self._trunks:
            trunk = copy.copy(self.base)
            trunk.__dict__["_modules"] = dict(self.base._modules)
            setattr(trunk, self.family.layers_name, nn.ModuleList(self._run_layers[:depth]))
            setattr(trunk, self.family.norm_name, nn.Identity())
            self._trunks[depth] = trunk
        return self._trunks[depth]


class _Unkept(Cache):
    """Keeps nothing. Without any cache transformers looks whether the rows are packed sequences, and to know the answer
    waits for everything that the device has to do."""

    def __init__(self) -> None:
        super().__init__(layers=[DynamicLayer()])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


@dataclass(frozen=True)
class _Rows:
    """What single tokens run through. (No module: it has no parameters of its own to save or hash.)"""

    layers: list[RowLayer]
    logits: Callable[[Tensor], Tensor]

    def takes(self, input_ids_BT: Tensor, cache: Any) -> bool:
        return self.layers[0].takes(input_ids_BT, cache.layers[0])

    def behind(self, cache: Any) -> Callable[[int, Tensor, Rotary], LayerStep]:
        """A token through a layer, behind what `cache` holds."""
        return lambda layer, x_BTD, rotary: self.layers[layer](x_BTD, rotary, cache.layers[layer])


@contextmanager
def _captured(layers: nn.ModuleList, boundaries: Collection[int]) -> Iterator[dict[int, Tensor]]:
    captured: dict[int, Tensor] = {}

    def keep(boundary: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured[boundary] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [
        layers[boundary].register_forward_pre_hook(keep(boundary), with_kwargs=True)
        for boundary in set(boundaries) - {max(boundaries)}
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _rope_settings(parameters: Any) -> list[Any]:
    """Bases and factors of rotary embeddings, wherever a family nests them."""
    if not isinstance(parameters, dict):
        return []
    found = []
    for name, value in sorted(parameters.items()):
        if isinstance(value, dict):
            found += [name, *_rope_settings(value)]
        elif name in ("rope_theta", "factor", "partial_rotary_factor"):
            found += [name, value]
    return found
