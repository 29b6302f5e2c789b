"""The backbone manages its own memory by tool calls, after MemGPT (Packer et al. 2023, arXiv 2310.08560).

Everything told passes through the window block by block and is archived in pieces. After each block the model may write
a line into a core memory that always stands in the window; when that is full, it says which line the new one replaces.
Asked something, it may search the archive before it answers, in words of its own.

A backbone that was never taught tool calls would hardly ever emit a valid one. So calls are decoded under constraints:
their skeleton is given, names and lines to replace are chosen among those there are by their mean log-probability, and
only texts in quotes are free, up to the closing quote.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longmem.contenders.chunks import Retriever
from longmem.contenders.contender import ContenderConfig, Prompt, View, joined
from longmem.contenders.rag_bm25 import Words
from longmem.data import Document
from longmem.errors import UnavailableError
from longmem.model import LongMem

_LINES, _LINE = 4, 16  # lines of core memory, tokens of each at most
_QUERY = 16  # tokens of a search
_RESERVED = 64  # tokens of a call
_SEARCHES = 2
_MOST = 1 << 19  # letters told
_CALL = 'Call: {"function": "'
_STORE = """You keep notes on what you read. An example:

New text: Her sister Nora moved to Lisbon in 1987. The weather there is mild.
Call: {"function": "core_memory_append", "content": "Her sister Nora lives in Lisbon since 1987."}

"""
_SEARCH = """You may search your archive before you answer. An example:

Prompt: Where does her sister live?
Call: {"function": "archive_search", "query": "sister lives moved"}

"""


class MemGpt(Retriever):
    name = "memgpt"
    title = "backbone that keeps notes and searches its archive by tool calls"
    order = 60
    converses = True

    def __init__(self, model: LongMem, config: ContenderConfig) -> None:
        super().__init__(model, config)
        self.core: list[str] = []

    def index(self, pieces: Sequence[str]) -> None:
        self._ranking = Words(pieces)

    def scores(self, query: str) -> np.ndarray:
        return self._ranking.scores(query)

    def learn(self, documents: Sequence[Document]) -> None:
        self.core = []
        if sum(len(document.text) for document in documents) > _MOST:
            raise UnavailableError(
                f"more than {_MOST:,} letters are told, which it would read block by block, and stop to take notes"
            )
        super().learn(documents)
        told = self.reader.tokenize(joined(documents))
        for first in range(0, len(told), self.config.window // 2):
            self._take_notes(told[first : first + self.config.window // 2])

    def view(self, prompt: Prompt) -> View:
        found: list[str] = []
        for _ in range(_SEARCHES):
            shown = self._core() + self._shown(found)
            self.cost.asked_tokens += self._look(f"{_SEARCH}{shown}Prompt: ", prompt.wanted)
            if self._choose(['archive_search", "query": "', 'answer"}']) == 1:
                break
            query, _ = self.reader.say(_QUERY, ('"', "\n"))
            score_P = self.scores(query)
            new = [self.pieces[p] for p in np.argsort(-score_P, kind="stable") if score_P[p] > 0]
            found += [piece for piece in new if piece not in found][: -(-self.config.chunks // _SEARCHES)]
        # The core memory first: it is shown whatever was found.
        return self.shown([*([self._core().strip()] if self.core else []), *found], prompt)

    def kept_bytes(self) -> int:
        return super().kept_bytes() + sum(len(line.encode()) for line in self.core)

    def _take_notes(self, block: Sequence[int]) -> None:
        text = self.model.tokenizer.decode(block, skip_special_tokens=True)
        self.cost.told_tokens += self._look(f"{_STORE}{self._core()}New text: ", text)
        if self._choose(['core_memory_append", "content": "', 'nothing"}']) == 1:
            return
        line, _ = self.reader.say(_LINE, ('"', "\n"))
        if not line.strip() or line.strip() in self.core:
            return
        if len(self.core) == _LINES:
            self.cost.told_tokens += self._look(f"{_STORE}{self._core()}New line: ", line)
            self._choose(['core_memory_replace", "old": "'])
            del self.core[self._choose(self.core)]
        self.core.append(line.strip())

    def _core(self) -> str:
        return "".join(["Core memory:\n", *(f"- {line}\n" for line in self.core), "\n"]) if self.core else ""

    def _shown(self, found: Sequence[str]) -> str:
        return "".join(f"Found: {piece}\n\n" for piece in found)

    def _look(self, before: str, text: str) -> int:
        """Read a window that ends in a begun call, the end of the text as far as it fits; how many tokens that took."""
        parts = [self.reader.tokenize(part) for part in (before, text, f"\n{_CALL}")]
        room = min(self.config.window, self.model.backbone.max_positions) - 1 - _RESERVED
        left = max(0, room - len(parts[0]) - len(parts[2]))
        parts[1] = parts[1][max(0, len(parts[1]) - left) :]
        return self.reader.read([*parts[0], *parts[1], *parts[2]][-room:])

    def _choose(self, options: Sequence[str]) -> int:
        """Which of some texts is most probable, token by token, to follow; it then stands in the window."""
        tokens = [self.reader.tokenize(option) for option in options]
        best = 0 if len(tokens) == 1 else int(np.argmax([np.mean(each) for each in self.reader.options(tokens)]))
        self.reader.read_on(tokens[best])
        return best
