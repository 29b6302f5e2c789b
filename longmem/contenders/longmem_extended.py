"""LongMem with an empty bank and a long window: what the same SideNet makes of text that it sees."""

from __future__ import annotations

from longmem.contenders.extended import Extended


class LongMemExtended(Extended):
    name = "longmem-extended"
    title = "LongMem, empty bank, the long window"
    order = 67
    memory = 1.0
