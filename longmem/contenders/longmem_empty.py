"""LongMem with an empty bank: what its SideNet alone is worth."""

from __future__ import annotations

from longmem.contenders.window import Window


class LongMemEmpty(Window):
    name = "longmem-empty"
    title = "LongMem, empty bank, last tokens in its window"
    order = 65
    memory = 1.0
