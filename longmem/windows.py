"""Local windows of several texts side by side, in memory that never moves.

A step takes one token of every text through a layer. Its shapes and places are always the same, however long each
text is, so that a GPU can record a step once and replay it.

B texts, C tokens that a window can hold, S of them that a step looks at, T = 1 new token, D hidden size, K key-value
heads, E head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longmem.decoding import LayerStep, layer_step
from longmem.evidence import PassageSums
from longmem.families import Family, Rotary


class Branch:
    """Where the SideNet runs: behind the backbone, on the same stream."""

    def reached(self, boundary: int) -> None:
        """The backbone's hidden states at a boundary have been asked for."""

    def wait(self, boundary: int) -> None:
        """What follows needs the hidden states at a boundary."""

    def __enter__(self) -> None:
        """What follows is the SideNet's."""

    def __exit__(self, *error: object) -> None:
        """What follows needs what the SideNet computed."""


class SideBranch(Branch):
    """Beside the backbone: a SideNet layer needs hidden states up to its own, not those above it.

    Recorded, the two are branches of one graph. A step of few texts is a chain of small kernels, which leave most of a
    GPU idle. (What one branch takes from the other is held until `__exit__`: memory freed on one stream may be in
    use on the other.)
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._events: dict[int, Any] = {}

    def reached(self, boundary: int) -> None:
        self._events[boundary] = torch.cuda.current_stream().record_event()

    def wait(self, boundary: int) -> None:
        self._stream.wait_event(self._events[boundary])

    def __enter__(self) -> None:
        self._before = torch.cuda.current_stream()
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_stream(self._before)
        self._before.wait_stream(self._stream)


class WindowBuffer:
    """Keys and values of one layer, (B, K, C, E) each: memory is taken when the first text comes."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self.keys_BKCE: Tensor | None = None
        self.values_BKCE: Tensor | None = None

    def fill(self, row: int, keys_KNE: Tensor, values_KNE: Tensor) -> None:
        """Begin a row anew with N tokens."""
        if self.keys_BKCE is None or self.values_BKCE is None:
            kv_heads, _, head_dim = keys_KNE.shape
            shape = (self._windows.rows, kv_heads, self._windows.capacity, head_dim)
            # Zeros: what is masked is multiplied by 0, which does not make a number of anything.
            self.keys_BKCE, self.values_BKCE = keys_KNE.new_zeros(shape), values_KNE.new_zeros(shape)
        self.keys_BKCE[row, :, : keys_KNE.shape[1]] = keys_KNE
        self.values_BKCE[row, :, : values_KNE.shape[1]] = values_KNE

    def step(self, family: Family, layer: Any, x_BTD: Tensor, rotary: Rotary) -> LayerStep:
        """One token of every text through a layer; its keys and values are kept behind those of the text."""
        assert self.keys_BKCE is not None and self.values_BKCE is not None
        windows, room = self._windows, self._windows.room
        keys_BKSE, values_BKSE = self.keys_BKCE[:, :, :room], self.values_BKCE[:, :, :room]
        return windows.run(family, layer, x_BTD, rotary, keys_BKSE, values_BKSE, windows.length_B, family.window(layer))


class Windows:
    """All layers of the backbone, or of a SideNet, over the same texts.

    Args:
        length_B: int64, tokens of each text; shared, and advanced by whoever owns it.
        capacity: C.
        run: `window_step`, or a compiled one.
        branch: where the SideNet runs.
        sums: what passages of banks drew of a SideNet's attention; None for a backbone.

    Attributes:
        room: tokens of the windows that a step looks at, its own included: all of them where steps must be alike.
    """

    def __init__(
        self,
        length_B: Tensor,
        capacity: int,
        run: Callable[..., LayerStep],
        branch: Branch,
        sums: PassageSums | None = None,
    ) -> None:
        self.length_B, self.capacity, self.run, self.branch = length_B, capacity, run, branch
        self.sums = sums or PassageSums()
        self.rows = length_B.shape[0]
        self.room = capacity
        self._kept: defaultdict[tuple[int, str], WindowBuffer] = defaultdict(lambda: WindowBuffer(self))

    def of(self, layer: int, stream: str = "x") -> WindowBuffer:
        """What `layer` holds of a stream (see `SideNetCache`)."""
        return self._kept[layer, stream]

    def clear(self) -> None:
        """Hold nothing."""
        self._kept.clear()


def window_step(
    family: Family,
    layer: Any,
    x_BTD: Tensor,
    rotary: Rotary,
    keys_BKSE: Tensor,
    values_BKSE: Tensor,
    length_B: Tensor,
    window: int | None,
) -> LayerStep:
    """`layer_step` behind the first `length_B` tokens of each row; keys and values are written there, in place.

    A row that is full is overwritten at its end, which is for rows whose text is done.
    """
    rows, room = keys_BKSE.shape[0], keys_BKSE.shape[2]
    place_S = torch.arange(room, device=x_BTD.device)
    seen_BS = place_S < length_B[:, None]
    if window is not None:
        seen_BS = seen_BS & (place_S > length_B[:, None] - window)
    step = layer_step(family, layer, x_BTD, rotary, keys_BKSE, values_BKSE, seen_BS)
    row_B, at_B = torch.arange(rows, device=x_BTD.device), length_B.clamp(max=room - 1)
    keys_BKSE[row_B, :, at_B] = step.key_BKTE[:, :, 0]
    values_BKSE[row_B, :, at_B] = step.value_BKTE[:, :, 0]
    return step
