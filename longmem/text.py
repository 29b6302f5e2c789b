"""Text of a stream of tokens: what can be shown of it already, which characters each token covers, where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longmem.model import LongMem


def tokenize(model: LongMem, text: str) -> list[int]:
    """Token ids of a text, without the tokens a tokenizer would put around it."""
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


class TextDecoder:
    """Text of a growing sequence of tokens, and which characters each token covers.

    Text comes out as soon as later tokens cannot change it: the tokens of one character come out together and share
    its range. Special tokens cover no characters.

    Attributes:
        text: everything that is certain.
        offsets: [start, end) in `text` of every token that is certain.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._context: list[int] = []
        self._waiting: list[tuple[int, bool]] = []
        self._taken = 0
        self.text = ""
        self.offsets: list[tuple[int, int]] = []

    def push(self, token_id: int, *, silent: bool = False) -> None:
        """Add a token. A silent one covers no characters, as if it were special."""
        self._waiting.append((token_id, not silent and token_id not in self._special))
        self._settle(final=False)

    def flush(self) -> None:
        """Make everything certain: no token follows that could complete a character."""
        self._settle(final=True)

    def take(self) -> str:
        """Text that became certain since the last call."""
        new, self._taken = self.text[self._taken :], len(self.text)
        return new

    def replace(self, begin: int, end: int, token_ids: Sequence[int]) -> None:
        """Put others in the place of tokens [begin, end). Everything is certain and taken then."""
        self.flush()
        other = TextDecoder(self._tokenizer)
        for token_id in token_ids:
            other.push(token_id)
        other.flush()
        start = self.offsets[begin - 1][1] if begin else 0
        stop = self.offsets[end - 1][1] if end > begin else start
        longer = len(other.text) - (stop - start)
        self.text = self.text[:start] + other.text + self.text[stop:]
        self._taken = len(self.text)
        self.offsets = [
            *self.offsets[:begin],
            *((start + first, start + last) for first, last in other.offsets),
            *((first + longer, last + longer) for first, last in self.offsets[end:]),
        ]

    def forget(self, tokens: int) -> None:
        """Drop the first tokens and their text."""
        cut = self.offsets[tokens - 1][1]
        self.text, self._taken = self.text[cut:], max(0, self._taken - cut)
        # max: where the cut goes through a character, its text went with the first part.
        self.offsets = [(max(0, start - cut), max(0, end - cut)) for start, end in self.offsets[tokens:]]

    def _settle(self, *, final: bool) -> None:
        visible = [token_id for token_id, shown in self._waiting if shown]
        # A decoder may drop the space before its first token, so new tokens are decoded behind earlier ones.
        before = self._decode(self._context)
        new = self._decode(self._context + visible)[len(before) :]
        incomplete = new.endswith("\ufffd")
        if visible and not final and (not new or incomplete or self._in_byte_run(visible[-1])):
            return
        start = len(self.text)
        self.text += new
        self.offsets += [(start, len(self.text))] * len(self._waiting)
        self._waiting.clear()
        if new:
            # Bytes given up as incomplete must not join those that follow.
            self._context = [] if incomplete else visible

    def _in_byte_run(self, token_id: int) -> bool:
        """Byte tokens (<0xE2>) are decoded run by run: one bad byte spoils its whole run."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Ends a stream before the first of some strings; holds text back while it may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        self._held += text
        starts = [start for start in (self._held.find(stop) for stop in self._stops) if start >= 0]
        if starts:
            self.found = True
            shown, self._held = self._held[: min(starts)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
