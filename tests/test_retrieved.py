"""Attention over what was found, against a softmax over its rows by hand."""

from __future__ import annotations

import torch
from banks import config, make_bank, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem.index import BankReader, GroupReader
from longmem.retrieved import PLACES, Retrieved, RetrievedRows, place_of

SCALING = 0.3
sizes = st.lists(st.integers(0, 9), min_size=1, max_size=3)


def query(rows: int, seed: int = 0) -> Tensor:
    return normal(rows, 2, 2, 3, 4, seed=seed)


def found(size: int, rows: int = 1, seed: int = 0) -> RetrievedRows:
    bank = make_bank(size, seed) if size else None
    return BankReader([bank] * rows, config())(1, query(rows))


def by_hand(read: RetrievedRows, query_BKGTE: Tensor, bias_BKGTR: Tensor) -> Tensor:
    score_BKGTR = (read.rows(read.keys_PNE) @ query_BKGTE[..., None])[..., 0] * SCALING + bias_BKGTR
    return score_BKGTR.masked_fill(~read.valid_BKGTR, -torch.inf)


@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_attention_is_a_softmax_over_what_was_found(size: int, rows: int, doubts: bool, seed: int) -> None:
    read, query_BKGTE = found(size, rows, seed), query(rows)
    bias_BKGTR = normal(*read.index_BKGTR.shape, seed=seed) if doubts else torch.zeros(read.index_BKGTR.shape)
    score_BKGTR = read.scores(query_BKGTE, SCALING, None, bias_BKGTR)
    torch.testing.assert_close(score_BKGTR, by_hand(read, query_BKGTE, bias_BKGTR))
    output_BKGTE, logsumexp_BKGT = read.attend(query_BKGTE, SCALING, None, bias_BKGTR)
    torch.testing.assert_close(logsumexp_BKGT, score_BKGTR.logsumexp(-1))
    log_share_BKGTR = read.log_weights(query_BKGTE, SCALING, None, bias_BKGTR)
    torch.testing.assert_close(log_share_BKGTR.exp().sum(-1), torch.ones(logsumexp_BKGT.shape))
    if size:
        expected = (log_share_BKGTR.exp()[..., None] * read.rows(read.values_PNE)).sum(-2)
        torch.testing.assert_close(output_BKGTE, expected)
    else:
        assert not output_BKGTE.any() and (logsumexp_BKGT == -torch.inf).all()
    # What the search scored is what attention scores, without biases.
    torch.testing.assert_close(read.matches(torch.full((2, 2), SCALING)), read.scores(query_BKGTE, SCALING))


def test_what_is_older_counts_for_less() -> None:
    """By a cost times the share of attention that goes to what is newer."""
    read, query_BKGTE = found(9), query(1)
    plain_BKGTR = read.scores(query_BKGTE, SCALING)
    newer_BKGTRR = read.order_BKGTR[..., None, :] > read.order_BKGTR[..., :, None]
    share_BKGTR = (plain_BKGTR.softmax(-1)[..., None, :] * newer_BKGTRR).sum(-1)
    discounted_BKGTR = read.scores(query_BKGTE, SCALING, torch.full(query_BKGTE.shape[:-1], 2.0))
    torch.testing.assert_close(discounted_BKGTR, plain_BKGTR - 2 * share_BKGTR)
    assert int((share_BKGTR > 0).sum()) > 0


@settings(max_examples=30)
@given(sizes, st.integers(0, 99))
def test_several_banks_are_one_softmax_with_their_weights(bank_sizes: list[int], seed: int) -> None:
    banks = [make_bank(size, seed + number) for number, size in enumerate(bank_sizes)]
    weights = [1.0 + number for number in range(len(banks))]
    query_BKGTE = query(1)
    together = GroupReader([list(zip(banks, weights, strict=True))], config())(1, query_BKGTE)
    parts = [BankReader([bank], config())(1, query_BKGTE) for bank in banks]
    score_BKGTR = torch.cat(
        [part.scores(query_BKGTE, SCALING) + torch.tensor(w).log() for part, w in zip(parts, weights, strict=True)], -1
    )
    torch.testing.assert_close(together.scores(query_BKGTE, SCALING), score_BKGTR)
    output_BKGTE, logsumexp_BKGT = together.attend(query_BKGTE, SCALING)
    torch.testing.assert_close(logsumexp_BKGT, score_BKGTR.logsumexp(-1))
    if any(bank_sizes):
        value_BKGTRE = torch.cat([part.rows(part.values_PNE) for part in parts], -2)
        torch.testing.assert_close(output_BKGTE, (score_BKGTR.softmax(-1)[..., None] * value_BKGTRE).sum(-2))
    assert [place_of(int(index))[0] for index in together.index_BKGTR[0, 0, 0, 0, ::4]] == list(range(len(banks)))
    assert place_of(2 * PLACES + 7) == (2, 7)


def test_one_bank_among_absent_ones_is_read_as_by_itself() -> None:
    alone, query_BKGTE = found(9), query(1)
    bank, absent = make_bank(9), make_bank(0, 5)
    together: Retrieved = GroupReader([[(absent, 3.0), (bank, 1.0)]], config())(1, query_BKGTE)
    for mine, its in zip(together.attend(query_BKGTE, SCALING), alone.attend(query_BKGTE, SCALING), strict=True):
        assert torch.equal(mine, its)
