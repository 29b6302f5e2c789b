"""Focus: of a large bank, the stretches that share words with what is being read.

Memory heads tell the right one of a hundred thousand remembered tokens from the others; among millions, near misses
outnumber it. So a large bank is read in two stages, as search engines read: words choose stretches of it (BM25 with
token ids as terms, Robertson and Zaragoza 2009; a stretch counts for itself and for its surroundings, as passages and
documents do in Callan 1994), and memory heads search these alone.

    window's token ids → stretches of the bank, `focus` tokens in all → a bank of these → memory heads

N remembered tokens, S stretches, Q different token ids that are asked for, X their postings.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from longmem.bank import MemoryBank
from longmem.errors import ConfigError
from longmem.group import BankGroup, Readable, members

# Tokens of a stretch; whole passages of evidence (`longmem.ops.PASSAGE`).
STRETCH = 256
# Tokens that are read of a larger bank, unless said otherwise.
FOCUS = 1 << 16
# Of what is read, at least a sixteenth is what was remembered last, and an eighth what the window's last tokens, which
# may be a question about anything, ask for; the rest has to do with all of the window.
_NEWEST, _ASKED = 16, 8
_LAST = 64
# A window of so many tokens chooses all of that rest, a shorter one its share.
_LONG = 1024
# Stretches that are the surroundings of one, and how much their mean counts beside it.
_SURROUNDINGS, _AROUND = 65, 10.0
# BM25's saturation: a word that stands in a stretch twice says little more than one that stands there once.
_SATURATION = 0.9
# Runs of stretches that are searched one after the other before they are made one.
_MOST_RUNS = 8


class _Run:
    """Postings of the stretches of consecutive tokens: (token id, stretch), ascending, and how often."""

    def __init__(self, token_ids_N: Tensor, first: int) -> None:
        stretch_N = torch.arange(len(token_ids_N), device=token_ids_N.device) // STRETCH
        self.stretches = len(token_ids_N) // STRETCH
        posting_P, count_P = torch.unique(token_ids_N * self.stretches + stretch_N, return_counts=True)
        self.token_P, self.count_P = (posting_P // self.stretches).int(), count_P.int()
        self.stretch_P = (posting_P % self.stretches + first).int()

    def postings(self, token_Q: Tensor) -> tuple[Tensor, Tensor]:
        """Where the postings of each token id begin, and how many there are; (Q,) each."""
        token_Q = token_Q.int()
        begin_Q = torch.searchsorted(self.token_P, token_Q)
        return begin_Q, torch.searchsorted(self.token_P, token_Q, right=True) - begin_Q


class WordIndex:
    """Which token ids stand in which stretch of a bank; grows with it."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._layout: object = None

    def __len__(self) -> int:
        """S: whole stretches; a bank's last tokens are in none until it is full."""
        return sum(run.stretches for run in self._runs)

    def update(self, bank: MemoryBank) -> None:
        """Know what a bank remembers: what came since the last call is added; if anything else changed, all is made
        anew."""
        if bank.layout is not self._layout:
            self._runs, self._layout = [], bank.layout
        known, whole = len(self) * STRETCH, len(bank) // STRETCH * STRETCH
        if whole == known:
            return
        if len(self._runs) == _MOST_RUNS:
            self._runs, known = [], 0
        self._runs.append(_Run(bank.token_ids_N[known:whole], known // STRETCH))

    def scores(self, token_ids_T: Tensor) -> Tensor:
        """How much each stretch has to do with a text, (S,)."""
        stretches, device = len(self), token_ids_T.device
        score_S = torch.zeros(stretches, device=device)
        token_Q, asked_Q = token_ids_T.unique(return_counts=True)
        found = [run.postings(token_Q) for run in self._runs]
        among_Q = sum((count_Q for _, count_Q in found), torch.zeros_like(token_Q))
        # Rare words count for a stretch and for the text alike, as in the product of two tf-idf vectors.
        weight_Q = ((stretches - among_Q + 0.5) / (among_Q + 0.5)).log1p().square() * (1 + asked_Q.log())
        for run, (begin_Q, count_Q) in zip(self._runs, found, strict=True):
            of_X = torch.arange(len(token_Q), device=device).repeat_interleave(count_Q)
            before_Q = count_Q.cumsum(0) - count_Q
            posting_X = torch.arange(len(of_X), device=device) + (begin_Q - before_Q)[of_X]
            often_X = run.count_P[posting_X].float()
            part_X = weight_Q[of_X] * often_X * (_SATURATION + 1) / (often_X + _SATURATION)
            score_S.index_add_(0, run.stretch_P[posting_X], part_X)
        return score_S


def with_surroundings(score_S: Tensor) -> Tensor:
    """Scores of stretches that stand among others with high ones raised: a text is about its own document."""
    around = min(_SURROUNDINGS, 2 * len(score_S) - 1)
    around_S = avg_pool1d(score_S[None], around, 1, around // 2, count_include_pad=False)[0]
    return score_S + _AROUND * around_S


class Focus:
    """Chooses what is read of banks for a window. Of several banks each is read so far, as each is searched by itself.

    Args:
        tokens: read of a bank at most; smaller banks are read whole. 0 reads all of every bank.

    Raises:
        ConfigError: neither 0 nor room for two stretches.
    """

    def __init__(self, tokens: int = FOCUS) -> None:
        check(tokens)
        self.tokens = tokens
        self._words: WeakKeyDictionary[MemoryBank, WordIndex] = WeakKeyDictionary()

    def chooses(self, bank: Readable | None) -> bool:
        """Whether less than everything of a bank would be read."""
        banks = () if bank is None else members(bank)
        return bool(self.tokens) and any(len(one) > self.tokens for one, _ in banks)

    def on(self, bank: Readable, token_ids: Sequence[int], hidden: int = 0) -> Readable:
        """What is read for a window: a bank, or a group, that can only be read.

        Args:
            token_ids: of the window; its last ones choose a share by themselves.
            hidden: last rows of the bank, or of a group's first, that are not read.
        """
        if isinstance(bank, BankGroup):
            read = (
                self._part(one, token_ids, hidden if one is bank.first else 0) if weight else one
                for one, weight in zip(bank.banks, bank.weights, strict=True)
            )
            return BankGroup(tuple(read), bank.weights)
        return self._part(bank, token_ids, hidden)

    def _part(self, bank: MemoryBank, token_ids: Sequence[int], hidden: int) -> MemoryBank:
        before = len(bank) - hidden
        if not self.tokens or before <= self.tokens:
            return bank.between(0, before) if hidden else bank
        words = self._words.setdefault(bank, WordIndex())
        words.update(bank)
        window_T = torch.tensor(token_ids, dtype=torch.int64, device=bank.device)
        place_S = torch.arange(before // STRETCH, device=bank.device)
        # What was remembered last is read whatever it says: a text goes on where it was, and what is new wins.
        chosen_S = place_S >= max(0, before - self.tokens // _NEWEST) // STRETCH

        def left() -> int:
            return self.tokens - before % STRETCH - STRETCH * int(chosen_S.sum())

        _choose(chosen_S, words.scores(window_T[-_LAST:]), self.tokens // _ASKED)
        # Where little was said, little is known of what it is about, and near misses draw attention: what is not chosen
        # for its words is what is newest.
        share = min(1.0, len(token_ids) / _LONG)
        _choose(chosen_S, with_surroundings(words.scores(window_T)), int(share * left()))
        _choose(chosen_S, place_S.float(), left())
        row_CB = chosen_S.nonzero() * STRETCH + torch.arange(STRETCH, device=bank.device)
        rest_R = torch.arange(len(chosen_S) * STRETCH, before, device=bank.device)
        return bank.part(torch.cat((row_CB.flatten(), rest_R)))


def still_there(read: Readable, bank: Readable) -> bool:
    """Whether all that is read of banks is remembered still: nothing was forgotten or thinned since it was chosen."""
    return all(one.still_has(part) for (one, _), (part, _) in zip(members(bank), members(read), strict=True))


def _choose(chosen_S: Tensor, score_S: Tensor, tokens: int) -> None:
    """The best stretches that were not chosen yet, as many as so many tokens have."""
    open_S = score_S[: len(chosen_S)].masked_fill(chosen_S, -torch.inf)
    chosen_S[open_S.topk(min(tokens // STRETCH, int((~chosen_S).sum()))).indices] = True


def check(tokens: int) -> None:
    """Raise a `ConfigError` if a focus cannot have so many tokens."""
    least = _ASKED * STRETCH
    if tokens and tokens < least:
        raise ConfigError(f"focus must be 0 (banks are read whole) or at least {least} tokens; got {tokens}.")
