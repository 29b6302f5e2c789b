"""The backbone with a window beyond the trained one, its rotary positions scaled as transformers offers it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import AutoModelForCausalLM

from longmem.backbone import Backbone
from longmem.contenders.contender import ContenderConfig
from longmem.contenders.window import Window
from longmem.data import Document
from longmem.errors import UnavailableError
from longmem.model import LongMem


class ExtendedRope(Window):
    name = "extended-rope"
    title = "backbone, a window beyond the trained one by RoPE scaling (YaRN)"
    order = 25

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        if config.stretched <= model.backbone.max_positions:
            raise UnavailableError(
                f"the backbone's own window has {model.backbone.max_positions:,} tokens; --stretched must be more"
            )
        super().__init__(LongMem(stretched(model.backbone, config.stretched), model.config), config)
        self.trained = model.backbone.max_positions
        self.size = config.stretched

    def learn(self, documents: Sequence[Document]) -> None:
        super().learn(documents)
        if len(self._told) < self.trained:
            raise UnavailableError(
                f"what is told fits the trained window of {self.trained:,} tokens, so nothing is scaled: see extended"
            )


def stretched(backbone: Backbone, tokens: int) -> Backbone:
    """The same weights with a longer window, by YaRN (Peng et al. 2023).

    Raises:
        UnavailableError: the backbone has no rotary positions of one kind.
    """
    config = copy.deepcopy(backbone.config)
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise UnavailableError(f"backbone {backbone.name!r} has no plain rotary positions to scale")
    trained = backbone.max_positions
    scaling = {"rope_type": "yarn", "factor": tokens / trained, "original_max_position_embeddings": trained}
    config.rope_parameters = {**rope, **scaling}
    config.max_position_embeddings = tokens
    model = AutoModelForCausalLM.from_config(config, dtype=backbone.dtype, attn_implementation="sdpa")
    model.load_state_dict(backbone.model.state_dict())
    return Backbone(model.to(backbone.device), backbone.tokenizer, backbone.name)
