"""One token at a time on a CPU: a layer's step, compiled, and buffers for keys and values.

A step is one row times every weight, so it takes as long as reading the weights from memory. Weights that are exactly
representable in bfloat16, as those of a model published in bfloat16 are, are read in half the bytes and multiplied in
float32: the same arithmetic, rounded in another order. PyTorch has no such product; `torch.compile` makes one.

B batch and T tokens (1 each, in a step), S tokens before it, C capacity of a buffer, D hidden size, H query heads,
K key-value heads, G query heads each, E head size, O outputs of a product, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from longmem.errors import CompilerError
from longmem.families import Family, Rotary

_SMALLEST_BUFFER = 256


class KeyValueBuffer(DynamicLayer):
    """Keys and values of one layer's tokens, in memory that doubles when it is full.

    Transformers' own copies everything it holds at every token.

    Attributes:
        keys, values: (B, K, S, E), views of the buffers; None while empty.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, E) each; returns all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self._capacity = 0
        assert self.keys is not None and self.values is not None
        before = self.keys.shape[2]
        end = before + key_states.shape[2]
        # Never quite full: a full buffer would be contiguous, which a compiler takes for another kind of input.
        # And what transformers has cropped or reordered since is no view of the buffers any more.
        if end >= self._capacity or self.keys is not self._view:
            self._capacity = max(2 * end, _SMALLEST_BUFFER)
            self._buffers = (_grown(self.keys, self._capacity), _grown(self.values, self._capacity))
        key_BKCE, value_BKCE = self._buffers
        key_BKCE[:, :, before:end] = key_states
        value_BKCE[:, :, before:end] = value_states
        self.keys, self.values = key_BKCE[:, :, :end], value_BKCE[:, :, :end]
        self._view = self.keys
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything. (What transformers does differs between its versions.)"""
        self.keys = self.values = None
        self.is_initialized = False


def _grown(rows_BKSE: Tensor, capacity: int) -> Tensor:
    batch, kv_heads, length, head_dim = rows_BKSE.shape
    rows_BKCE = rows_BKSE.new_empty(batch, kv_heads, capacity, head_dim)
    rows_BKCE[:, :, :length] = rows_BKSE
    return rows_BKCE


class RowLinear(nn.Module):
    """A linear layer for a single row, of float32 arithmetic on a weight that is stored in bfloat16 if that is exact.

    Args:
        weight_OD: float32; shared, not copied, if bfloat16 cannot hold it exactly.
        bias_O: or None.
    """

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        weight_OD = weight_OD.detach()
        rounded_OD = weight_OD.to(torch.bfloat16).contiguous()
        exact = torch.equal(rounded_OD.float(), weight_OD)
        self.weight_OD = nn.Parameter(rounded_OD if exact else weight_OD.contiguous(), requires_grad=False)
        self.bias_O = bias_O

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, O), where … is 1 row."""
        # As a product of matrices this would be a call to a library that has no bfloat16 times float32.
        y_O = (self.weight_OD.float() * x.reshape(1, -1)).sum(-1)
        if self.bias_O is not None:
            y_O = y_O + self.bias_O
        return y_O.view(*x.shape[:-1], -1)


def for_single_rows(module: nn.Module) -> Any:
    """A twin of a module that takes single rows: its linear layers are `RowLinear`, everything else is shared."""
    if isinstance(module, Conv1D):  # GPT-2's, which keeps its weight as (in, out)
        return RowLinear(module.weight.T, module.bias)
    if isinstance(module, nn.Linear):
        return RowLinear(module.weight, module.bias)
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {
        name: None if child is None else for_single_rows(child) for name, child in module._modules.items()
    }
    return twin


class LayerStep(NamedTuple):
    """What one token does in one layer.

    Attributes:
        output_BTD: the layer's output.
        key_BKTE, value_BKTE: after rotary, to be kept.
        query_BHTE: before rotary.
        heads_BHTE: what attention gave.
        logsumexp_BHT: of its scores.
        projected_BTD: the heads after the output projection.
        branch_BTD: the finished attention branch.
    """

    output_BTD: Tensor
    key_BKTE: Tensor
    value_BKTE: Tensor
    query_BHTE: Tensor
    heads_BHTE: Tensor
    logsumexp_BHT: Tensor
    projected_BTD: Tensor
    branch_BTD: Tensor


def layer_step(
    family: Family,
    layer: Any,
    x_BTD: Tensor,
    rotary: Rotary,
    past_key_BKSE: Tensor,
    past_value_BKSE: Tensor,
    seen_BS: Tensor | None = None,
) -> LayerStep:
    """One token (T = 1) through one layer, given the keys and values of tokens before it.

    Args:
        seen_BS: which of those the layer sees; None is all.
    """
    query_BHTE, key_BKTE, value_BKTE = family.qkv(layer, x_BTD)
    rotated_BHTE, key_BKTE = family.rotate(query_BHTE, rotary), family.rotate(key_BKTE, rotary)
    # T is 1: its place in the query holds the G heads that share a key.
    query_BKGE = rotated_BHTE.view(*key_BKTE.shape[:2], -1, key_BKTE.shape[3]).float() * family.scaling(layer)
    past_BKGS = _each_product(query_BKGE, past_key_BKSE.transpose(2, 3))
    if seen_BS is not None:
        past_BKGS = past_BKGS.masked_fill(~seen_BS[:, None, None], -torch.inf)
    own_BKG1 = (query_BKGE * key_BKTE).sum(-1, keepdim=True)
    largest_BKG1 = torch.maximum(past_BKGS.amax(-1, keepdim=True), own_BKG1)
    past_BKGS, own_BKG1 = (past_BKGS - largest_BKG1).exp(), (own_BKG1 - largest_BKG1).exp()
    total_BKG1 = past_BKGS.sum(-1, keepdim=True) + own_BKG1
    heads_BKGE = _each_product(past_BKGS, past_value_BKSE) + own_BKG1 * value_BKTE
    heads_BHTE = (heads_BKGE / total_BKG1).view(query_BHTE.shape).to(x_BTD.dtype)
    logsumexp_BHT = (total_BKG1.log() + largest_BKG1).view(query_BHTE.shape[:3])
    projected_BTD = family.project(layer, heads_BHTE.transpose(1, 2).flatten(2))
    branch_BTD = family.after_projection(layer, projected_BTD)
    output_BTD = family.finish(layer, x_BTD, branch_BTD)
    return LayerStep(output_BTD, key_BKTE, value_BKTE, query_BHTE, heads_BHTE, logsumexp_BHT, projected_BTD, branch_BTD)


def _each_product(rows_BKGM: Tensor, matrix_BKMN: Tensor) -> Tensor:
    """rows @ matrix of each key-value head, in float32."""
    if torch.compiler.is_compiling():
        # Products and sums compile to one loop, without the cost of a call each.
        return (rows_BKGM[..., None] * matrix_BKMN[:, :, None]).sum(-2)
    return rows_BKGM @ matrix_BKMN.float()


def _logits_step(norm: Any, head: Any, hidden_D: Tensor) -> Tensor:
    return head(norm(hidden_D.view(1, 1, -1)))


class RowDecoder:
    """Compiles steps of one token, once for all layers that are built alike.

    Args:
        family: how layers are taken apart.
        compile: False runs the same steps as they are, slowly: what the compiled ones are tested on.
    """

    def __init__(self, family: Family, *, compile: bool = True) -> None:
        wrap: Callable[[Any], Any] = torch.compile if compile else (lambda function: function)
        self._family = family
        self._layer_step, self._logits_step = wrap(layer_step), wrap(_logits_step)

    def layer(self, layer: nn.Module) -> RowLayer:
        """A layer for single tokens; later changes to the layer's weights do not reach it."""
        return RowLayer(self._family, for_single_rows(layer), self._layer_step)

    def logits(self, norm: nn.Module, head: nn.Module) -> Callable[[Tensor], Tensor]:
        """Final norm and head of one row: (1, 1, D) → (1, 1, V)."""
        step = partial(self._logits_step, norm, for_single_rows(head))
        # Flat, since the strides of a row that was cut from others are not those of a row by itself.
        return torch.no_grad()(lambda hidden_BTD: step(hidden_BTD.flatten()))


class RowLayer:
    """One layer for single tokens. (No `nn.Module`: it has no parameters of its own to save or train.)"""

    def __init__(self, family: Family, layer: Any, step: Callable[..., LayerStep]) -> None:
        self._family, self._layer, self._step = family, layer, step
        self._window = family.window(layer)

    @staticmethod
    def takes(x: Tensor, buffer: KeyValueBuffer) -> bool:
        """Whether x (B, T, …) is one token of one row, behind two tokens or more.

        (A compiler takes a size of 1 for a constant, so one token behind another would be a second compilation.)
        """
        return x.shape[:2] == (1, 1) and buffer.get_seq_length() >= 2

    @torch.no_grad()
    def __call__(self, x_BTD: Tensor, rotary: Rotary, buffer: KeyValueBuffer) -> LayerStep:
        """Run a token through the layer; its key and value are added to the buffer."""
        past_key_BKSE, past_value_BKSE = buffer.keys, buffer.values
        assert past_key_BKSE is not None and past_value_BKSE is not None
        if self._window is not None:
            # The token itself is one of those that the layer sees.
            first = max(0, past_key_BKSE.shape[2] - self._window + 1)
            past_key_BKSE, past_value_BKSE = past_key_BKSE[:, :, first:], past_value_BKSE[:, :, first:]
        for past_BKSE in (past_key_BKSE, past_value_BKSE):
            torch._dynamo.maybe_mark_dynamic(past_BKSE, 2)
        step = self._step(self._family, self._layer, x_BTD, rotary, past_key_BKSE, past_value_BKSE)
        buffer.update(step.key_BKTE, step.value_BKTE)
        return step


@contextmanager
def compiling() -> Iterator[None]:
    """Tells what to do where a compilation inside fails.

    Raises:
        CompilerError: it failed.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    try:
        yield
    except (BackendCompilerFailed, InductorError, InvalidCxxCompiler, CppCompileError) as error:
        raise CompilerError(
            "Compiled decoding needs a working C++ compiler and Python's headers. Install them (Debian: apt-get "
            "install g++ python3-dev; macOS: xcode-select --install), name another compiler in the environment "
            f"variable CXX, or decode without compiling. The compiler said: {_first_paragraph(str(error))}"
        ) from error


def _first_paragraph(text: str) -> str:
    """Without the advice on debugging PyTorch that follows."""
    return text.strip().split("\n\n")[0][:500]
