"""Settings of a probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from longmem.errors import ConfigError

Stage = Literal["look-up", "knock-out", "addition"]
Progress = Callable[[Stage, int, int], None]


@dataclass(frozen=True)
class ProbeConfig:
    """How heads are tested and chosen.

    Attributes:
        texts: stretches of text for the look-up test.
        remembered: tokens that stand in memory before the ones that query it.
        window: tokens of an encoding window, and of the querying one (fewer where the backbone's window is smaller).
        top_k: retrieved keys a query head.
        max_pair, max_current: a position counts if its (current, next) pair stands in memory 1 … `max_pair` times and
            its current token at most `max_current` times: rarer than what any head could get right by luck.
        sessions, facts: sessions of the causal test, and facts told in each.
        filler: tokens of text between a session and its questions (fewer where the backbone's window is smaller).
        min_hit_rate: a key-value head one of whose query heads reaches it is a look-up head.
        min_effect: nats that knocking a head out must cost for it to be a candidate of the greedy addition.
        min_gain: nats that a head must add to be chosen.
        max_heads: of the choice, look-up heads included.
        seed: of everything drawn.
    """

    texts: int = 6
    remembered: int = 7168
    window: int = 1024
    top_k: int = 64
    max_pair: int = 8
    max_current: int = 60
    sessions: int = 4
    facts: int = 8
    filler: int = 1024
    min_hit_rate: float = 0.5
    min_effect: float = 0.1
    min_gain: float = 0.5
    max_heads: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        may_be_zero = {"filler", "seed"}
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in may_be_zero else 1
            if isinstance(value, int) and value < least:
                raise ConfigError(f"A probe needs {name} >= {least}; got {value}.")
        if not 0.0 < self.min_hit_rate <= 1.0:
            raise ConfigError(f"min_hit_rate is a share of positions, above 0 and at most 1; got {self.min_hit_rate}.")
