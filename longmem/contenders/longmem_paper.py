"""LongMem by the paper's own recipe: one memory layer, all its heads, mean keys of four tokens, a static gate."""

from __future__ import annotations

from longmem.contenders.contender import ContenderConfig
from longmem.contenders.longmem import LongMemContender
from longmem.errors import UnavailableError
from longmem.model import LongMem


class LongMemPaper(LongMemContender):
    name = "longmem-paper"
    title = "LongMem by the paper's recipe, bank on"
    order = 90

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        if config.paper is None:
            raise UnavailableError(
                "no weights: none ship; train them (longmem train … --recipe paper --out DIR) and give --paper DIR"
            )
        super().__init__(LongMem.from_pretrained(config.paper, backbone=model.backbone), config)
