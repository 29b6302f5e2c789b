"""Recall: the stretches of remembered text that a query is about.

Two rankings are added up, and both are visible in every hit: what the memory heads attend to when they read the
query, and which passages share its words (BM25).

N remembered tokens, P passages, Q query heads, X retrieved tokens of all query tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import bm25s
import numpy as np
import torch
from bm25s.stopwords import STOPWORDS_EN_PLUS
from torch import Tensor

from longmem.bank import MemoryBank
from longmem.errors import ConfigError
from longmem.group import Readable, members
from longmem.model import LongMem
from longmem.retrieved import PLACES

LONGEST = 256  # tokens of a passage; a longer paragraph is cut at sentence or line ends
SHORT = 64  # paragraphs up to so many tokens are joined with their neighbours
WORDS = 0.7  # default share of the word score: benchmarks/recall_xquad.py
_LONGEST_QUERY = 256  # tokens the memory heads read of a query, its last ones
_BEHIND = 1 / 32
_SKIPPED = 32  # passages at most that there is no use for: what stands in a window is hardly more
_FITS = 0.35  # score of a passage worth showing: more than the memory heads give without a word in common
_NOTICED = 0.01  # share of a query token's attention from which on a remembered token counts as found

_BLANK_LINES = re.compile(r"\s*\n[^\S\n]*\n\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+|\s*\n\s*")


@dataclass(frozen=True)
class Passage:
    """Characters [start, end) of a source."""

    source: str
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Hit(Passage):
    """A passage that answers a query.

    Attributes:
        score: (1 − words) · memory_score + words · word_score, times its bank's weight if several are read.
        memory_score: evidence of the memory heads, 0 … 1, relative to the best passage of this query.
        word_score: BM25, 0 … 1, relative to the best passage of this query.
        bank: name of the bank that remembers it; None if that has none.
    """

    score: float
    memory_score: float
    word_score: float
    bank: str | None = None


def recall(
    model: LongMem,
    bank: Readable,
    query: str,
    top_k: int = 8,
    words: float | None = None,
    *,
    index: PassageIndex | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Hit]:
    """The best passages for a query, best first; none if nothing is remembered.

    Args:
        bank: what is remembered, in one bank or in a group.
        words: share of the word score, from 0 (memory heads alone) to 1 (BM25 alone); None is the measured default.
        index: the bank's passages, to ask many questions of a bank; made anew if the bank has changed.
        on_progress: called with the sources cut into passages so far, and how many there are.

    Raises:
        ConfigError: the query is empty, or a setting is out of range.
        BankMismatchError: the bank belongs to another model.
    """
    model.check(bank)
    words = WORDS if words is None else words
    if not query.strip():
        raise ConfigError(
            "The query is empty: say what to look for, for example `recall(model, bank, 'Where is it?')`."
        )
    if top_k < 1:
        raise ConfigError(f"top_k must be at least 1; got {top_k}.")
    if not 0.0 <= words <= 1.0:
        raise ConfigError(f"words must be from 0 (memory heads alone) to 1 (words alone); got {words}.")
    if index is None or index.behind(bank) != 0:
        index = PassageIndex(bank, on_progress)
    return ranked(model, bank, query, index, top_k, words)


class Recaller:
    """Recalls what is worth a place in the window, from a bank that grows.

    Passages that hardly fit are left out: to a greeting nothing is recalled. Those of the bank are found anew once it
    has grown by more than `_BEHIND`; what came since is not recalled before.
    """

    def __init__(self, model: LongMem) -> None:
        self._model = model
        self._index: PassageIndex | None = None

    def recall(
        self, bank: Readable, query: str, top_k: int, *, skip: Callable[[Hit], bool] = lambda hit: False
    ) -> list[Hit]:
        """At most so many passages, best first, without those to skip."""
        if not query.strip():
            return []
        behind = None if self._index is None else self._index.behind(bank)
        if self._index is None or behind is None or behind > _BEHIND * sum(self._index.sizes):
            self._index = PassageIndex(bank)
        hits = ranked(self._model, bank, query, self._index, top_k + _SKIPPED, WORDS)
        return [hit for hit in hits if hit.score >= _FITS and not skip(hit)][:top_k]


def ranked(model: LongMem, bank: Readable, query: str, index: PassageIndex, top_k: int, words: float) -> list[Hit]:
    """The best passages of an index, which may lack what was remembered last."""
    if not index.passages:
        return []
    memory_P = _relative(memory_scores(model, bank, query, index)) if words < 1 else torch.zeros(len(index.passages))
    word_P = _relative(index.word_scores(query))
    weight_P = torch.tensor([weight for _, weight in members(bank)])[index.bank_P]
    score_P = ((1 - words) * memory_P + words * word_P) * weight_P
    hits = []
    for place in score_P.argsort(descending=True, stable=True)[:top_k].tolist():
        passage, score = index.passages[place], float(score_P[place])
        if score > 0:
            scores = (score, float(memory_P[place]), float(word_P[place]))
            of, _ = members(bank)[int(index.bank_P[place])]
            hits.append(Hit(passage.source, passage.start, passage.end, passage.text, *scores, of.name))
    return hits


def as_told(hits: Sequence[Hit], bank: Readable) -> list[Hit]:
    """Hits in the order of their sources, the one begun last at the end, so that what is newer is read later."""
    begun = {
        (one.name, source): (number, place)
        for number, (one, _) in enumerate(members(bank))
        for place, source in enumerate(one.sources)
    }
    return sorted(hits, key=lambda hit: (*begun[hit.bank, hit.source], hit.start))


def _sizes(bank: Readable) -> list[int]:
    return [len(one) for one, _ in members(bank)]


def _relative(score_P: Tensor) -> Tensor:
    best = float(score_P.max())
    return score_P / best if best > 0 else torch.zeros_like(score_P)


@torch.no_grad()
def memory_scores(model: LongMem, bank: Readable, query: str, index: PassageIndex) -> Tensor:
    """How much attention each passage gets while the memory heads read the query, (P,).

    The share of each token's attention is summed over tokens and heads, without those of the last memory layer if
    there are others: that one copies what the layers below have looked up. Some remembered tokens attract a head
    whatever it reads, so each is damped by how many tokens of the query turn to it (as frequent words count less than
    rare ones in BM25). What is older is not discounted: that says which of two facts holds, not what a query is about.
    """
    token_ids = model.tokenizer(query, add_special_tokens=False)["input_ids"][-_LONGEST_QUERY:]
    input_ids_1T = model.with_prefix(torch.tensor(token_ids, dtype=torch.int64))[None].to(model.device)
    _, reads = model.read(input_ids_1T, model.reader(bank, rows=1))
    score_P, sizes = torch.zeros(len(index.passages)), torch.tensor(index.sizes)
    for read in reads[:-1] or reads:
        # (heads, tokens · R), without what the prefix read
        position_QX = read.index_BKGTR[0, :, :, 1:].flatten(0, 1).flatten(1).cpu()
        weight_QX = (read.log_match_BKGTR.exp() * read.valid_BKGTR)[0, :, :, 1:].flatten(0, 1).flatten(1).float().cpu()
        for position_X, weight_X in zip(position_QX, weight_QX, strict=True):
            position_U, inverse_X = position_X.unique(return_inverse=True)
            zeros_U = torch.zeros(len(position_U))
            readers_U = zeros_U.index_add(0, inverse_X, (weight_X > _NOTICED).float())
            damping_U = ((len(token_ids) + 2) / (readers_U + 1)).log()
            weight_U = zeros_U.index_add(0, inverse_X, weight_X) * damping_U
            number_U, place_U = position_U // PLACES, position_U % PLACES
            known_U = place_U < sizes[number_U]
            token_U = (index.begins[number_U] + place_U)[known_U]
            score_P.index_add_(0, index.passage_N[token_U], weight_U[known_U])
    return score_P


# ---- passages ----------------------------------------------------------------------------------------------------


class PassageIndex:
    """The passages of a bank, ready to be ranked: which tokens each has, and its words.

    Attributes:
        passages: bank by bank, in the order of sources and text.
        passage_N: which passage each remembered token belongs to, those of several banks one after the other.
        bank_P: which of the banks (`longmem.group.members`) each passage is in.
        sizes: tokens of each bank.
        begins: where the tokens of each bank begin in `passage_N`.
    """

    def __init__(self, bank: Readable, on_progress: Callable[[int, int], None] | None = None) -> None:
        self.passages: list[Passage] = []
        self.sizes = _sizes(bank)
        self.begins = torch.tensor([0, *self.sizes]).cumsum(0)[:-1]
        self.passage_N = torch.zeros(sum(self.sizes), dtype=torch.int64)
        banks = [one for one, _ in members(bank)]
        self._layouts = [one.layout for one in banks]
        sources, done, counts = sum(len(one.sources) for one in banks), 0, []
        for one, begin in zip(banks, self.begins.tolist(), strict=True):
            before = len(self.passages)
            for _ in self._cut(one, begin):
                done += 1
                if on_progress is not None:
                    on_progress(done, sources)
            counts.append(len(self.passages) - before)
        self.bank_P = torch.arange(len(banks)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
        self._words = self._index_words()

    def behind(self, bank: Readable) -> int | None:
        """How many tokens came since; None if anything it was made of is no longer there or has moved."""
        if [one.layout for one, _ in members(bank)] != self._layouts:
            return None
        return sum(_sizes(bank)) - sum(self.sizes)

    def _cut(self, bank: MemoryBank, begin: int) -> Iterator[str]:
        """Cut a bank into passages; yields each source when it is done."""
        order_N = bank.source_index_N.argsort(stable=True)
        counts = torch.bincount(bank.source_index_N, minlength=len(bank.sources)).tolist()
        for source, tokens_n in zip(bank.sources, order_N.split(counts), strict=True):
            text = bank.text_of(source)
            offsets_n2 = bank.offsets_N2[tokens_n]
            # By all tokens of the source, also those that have no row any more.
            spans = cut(text, bank.offsets_of(source)[:, 0].tolist())
            if spans:
                # By its end: a token often has the space before its word.
                begins = torch.tensor([start for start, _ in spans])
                place_n = (torch.searchsorted(begins, offsets_n2[:, 1].contiguous()) - 1).clamp(min=0)
                self.passage_N[begin + tokens_n] = place_n + len(self.passages)
                self.passages += [Passage(source, start, end, text[start:end]) for start, end in spans]
            yield source

    def _index_words(self) -> bm25s.BM25 | None:
        texts = _tokenize([passage.text for passage in self.passages])
        if not any(texts):
            return None  # bm25s has no empty vocabulary
        index = bm25s.BM25(k1=0.9, b=0.4)  # for short passages: length and repetition mean less than in documents
        index.index(texts, show_progress=False)
        return index

    def word_scores(self, query: str) -> Tensor:
        """BM25 of every passage, (P,)."""
        (tokens,) = _tokenize([query])
        if self._words is None or not tokens:
            return torch.zeros(len(self.passages))
        return torch.from_numpy(np.asarray(self._words.get_scores(tokens), dtype=np.float32))


def _tokenize(texts: Sequence[str]) -> list[list[str]]:
    options: dict[str, Any] = {"stopwords": STOPWORDS_EN_PLUS, "return_ids": False, "show_progress": False}
    return bm25s.tokenize(list(texts), **options)  # pyright: ignore[reportReturnType]


def cut(text: str, token_starts: Sequence[int], longest: int = LONGEST, short: int = SHORT) -> list[tuple[int, int]]:
    """Passages [start, end) of a text: its paragraphs, the long ones cut, short neighbours joined.

    Args:
        token_starts: where each token begins, ascending.
    """

    def tokens(start: int, end: int) -> int:
        return bisect_left(token_starts, end) - bisect_left(token_starts, start)

    spans: list[tuple[int, int]] = []
    for start, end in _between(text, 0, len(text), _BLANK_LINES):
        if spans and tokens(spans[-1][0], end) <= short:
            spans[-1] = (spans[-1][0], end)
        elif tokens(start, end) <= longest:
            spans.append((start, end))
        else:
            spans += _parts(text, start, end, longest, token_starts)
    return spans


def _parts(text: str, start: int, end: int, longest: int, token_starts: Sequence[int]) -> list[tuple[int, int]]:
    """A long paragraph in parts of about equal size, each of whole sentences or lines where they are short enough."""
    origin, total = bisect_left(token_starts, start), bisect_left(token_starts, end)
    target = (total - origin) / -(-(total - origin) // longest)
    parts: list[tuple[int, int]] = []
    for first, last in _between(text, start, end, _SENTENCE_END):
        low, high = bisect_left(token_starts, first), bisect_left(token_starts, last)
        # A sentence that is too long by itself (a table, a list of numbers) is cut between tokens.
        edges = [first, *(token_starts[i] for i in range(low + longest, high, longest)), last]
        for piece_first, piece_last in _trimmed(text, pairwise(edges)):
            low, high = bisect_left(token_starts, piece_first), bisect_left(token_starts, piece_last)
            in_share = (low + high) / 2 - origin <= target * len(parts)
            if parts and in_share and high - bisect_left(token_starts, parts[-1][0]) <= longest:
                parts[-1] = (parts[-1][0], piece_last)
            else:
                parts.append((piece_first, piece_last))
    return parts


def _between(text: str, start: int, end: int, separator: re.Pattern[str]) -> list[tuple[int, int]]:
    """The stretches of text[start:end] between separators, without white space around them."""
    edges = [start, *(edge for match in separator.finditer(text, start, end) for edge in match.span()), end]
    return list(_trimmed(text, zip(edges[::2], edges[1::2], strict=True)))


def _trimmed(text: str, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans without the white space at their ends, and without those that are nothing else."""
    for start, end in spans:
        piece = text[start:end]
        if piece.strip():
            yield end - len(piece.lstrip()), start + len(piece.rstrip())
