"""LongMem by the paper's own recipe: one memory layer, all its heads, mean keys of four tokens, a static gate."""

from __future__ import annotations

import dataclasses

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
        loaded = LongMem.from_pretrained(config.paper, backbone=model.backbone)
        super().__init__(loaded, dataclasses.replace(config, focus=0))  # the paper's banks are read whole
