"""What was made of texts, for when they are told again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Kept(Generic[Made]):
    """Text → what was made of it, up to some size; what was not asked for longest goes first.

    Args:
        most: sum of sizes.
        size: of one.
    """

    def __init__(self, most: int, size: Callable[[str, Made], int]) -> None:
        self._most, self._size, self._held = most, size, 0
        self._made: OrderedDict[str, Made] = OrderedDict()

    def get(self, text: str) -> Made | None:
        if text not in self._made:
            return None
        self._made.move_to_end(text)
        return self._made[text]

    def put(self, text: str, made: Made) -> None:
        """Keep what was made of a text that is not here, if it is not too large by itself."""
        assert text not in self._made
        size = self._size(text, made)
        if size > self._most:
            return
        while self._held + size > self._most:
            self._held -= self._size(*self._made.popitem(last=False))
        self._made[text] = made
        self._held += size

    def __len__(self) -> int:
        return len(self._made)
