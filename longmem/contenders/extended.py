"""The backbone with as much of what it was told as a long window holds, within the window it was trained on."""

from __future__ import annotations

from longmem.contenders.contender import ContenderConfig
from longmem.contenders.window import Window
from longmem.model import LongMem


class Extended(Window):
    name = "extended"
    title = "backbone, its long window"
    order = 20

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        super().__init__(model, config)
        self.size = min(config.extended, model.backbone.max_positions)
