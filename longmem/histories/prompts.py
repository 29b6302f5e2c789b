"""What a user says to any assistant, where nothing needs to be remembered: greetings, questions of knowledge, requests.

All of it is written for this package (`prompts.txt`, which says how it is written).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from longmem.errors import ConfigError
from longmem.histories.values import pick

_PLACE = re.compile(r"{(\w+)}")
# So many draws without anything new, and there is hardly anything left.
_PATIENCE = 2000


@dataclass(frozen=True)
class Prompts:
    """Frames for prompts, and what their places may be filled with."""

    frames: tuple[str, ...]
    words: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, text: str) -> Prompts:
        """Of a file like `prompts.txt`."""
        frames: list[str] = []
        words: dict[str, tuple[str, ...]] = {}
        for line in text.splitlines():
            if line.startswith("+ "):
                frames += line[2:].split(" | ")
            elif line and not line.startswith("#"):
                name, _, some = line.partition(": ")
                words[name] = tuple(some.split(" | "))
        return cls(tuple(frames), words)

    def draw(self, count: int, seed: int = 0) -> Iterator[str]:
        """Different prompts, every frame as often as any other, while there are new ones of it.

        A seed gives the same first prompts however many are asked for.

        Raises:
            ConfigError: there are not so many.
        """
        rng = np.random.default_rng(seed)
        drawn: set[str] = set()
        misses = 0
        while len(drawn) < count:
            prompt = self._filled(rng, pick(rng, self.frames))
            if prompt in drawn:
                misses += 1
                if misses == _PATIENCE:
                    raise ConfigError(
                        f"{count} different prompts were asked for, but there are few more than {len(drawn)}."
                    )
                continue
            misses = 0
            drawn.add(prompt)
            yield prompt

    def _filled(self, rng: np.random.Generator, frame: str) -> str:
        used: set[str] = set()

        def word(match: re.Match[str]) -> str:
            # What stands twice in a frame should be two things.
            some = [each for each in self.words[match[1]] if each not in used]
            used.add(drawn := pick(rng, some))
            return drawn

        text = _PLACE.sub(word, frame)
        return text[0].upper() + text[1:]


PROMPTS = Prompts.read((files("longmem.histories") / "prompts.txt").read_text("utf-8"))
