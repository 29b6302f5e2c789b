"""Inverted files: what they find, what they say they find, and that they can be kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem import ivf
from longmem.errors import ConfigError
from longmem.ivf import ROWS, InvertedFile, default_lists
from longmem.ops import topk_scan
from longmem.sketch import Basis, halves


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clumps(searches: int, keys: int, seed: int = 0) -> Tensor:
    """Keys in clumps far from zero."""
    clump_XCE = 2 * normal(searches, 30, 16, seed=seed)
    keys_XNE = clump_XCE[:, torch.arange(keys) % 30] + 0.5 * normal(searches, keys, 16, seed=seed + 1) + 3.0
    return keys_XNE.bfloat16()


@pytest.fixture(scope="module")
def bank() -> tuple[Tensor, Tensor]:
    """Keys in clumps, and queries that do not look like them."""
    return clumps(2, 3000), normal(2, 300, 16, seed=2) * torch.linspace(0.2, 2, 16)


@pytest.fixture(scope="module")
def index(bank: tuple[Tensor, Tensor]) -> InvertedFile:
    return InvertedFile.choose(*bank, top_k=8, target=0.95, size=12, together=3, num_lists=40)


def shares(index_XQR: Tensor, truth_XQR: Tensor) -> list[float]:
    counts = [
        [len(set(i.tolist()) & set(t.tolist())) for i, t in zip(*pair, strict=True)]
        for pair in zip(index_XQR, truth_XQR, strict=True)
    ]
    return [sum(count) / (len(count) * truth_XQR.shape[-1]) for count in counts]


def test_the_recall_it_reports_is_what_it_finds(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    keys_XNE, query_XQE = bank
    choosing_XQE, measuring_XQE = halves(query_XQE)
    truth_XQR, _ = topk_scan(measuring_XQE, keys_XNE, 8)
    assert list(index.recall) == pytest.approx(shares(index.search(measuring_XQE, keys_XNE, 8)[0], truth_XQR))
    truth_XQR, _ = topk_scan(choosing_XQE, keys_XNE, 8)
    assert min(shares(index.search(choosing_XQE, keys_XNE, 8)[0], truth_XQR)) >= 0.95
    assert all(1 < probes < 40 for probes in index.probes)
    fewer = replace(index, probes=tuple(probes - 1 - probes // 25 for probes in index.probes))
    assert max(shares(fewer.search(choosing_XQE, keys_XNE, 8)[0], truth_XQR)) < 0.95


def test_scores_are_those_of_the_keys(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    keys_XNE, query_XQE = bank
    index_XQR, score_XQR = index.search(query_XQE[:, :9], keys_XNE, 8)
    true_XQN = query_XQE[:, :9] @ keys_XNE.float().mT
    torch.testing.assert_close(true_XQN.gather(-1, index_XQR), score_XQR, atol=1e-3, rtol=1e-4)
    assert (score_XQR.diff(dim=-1) <= 0).all()


@settings(max_examples=25)
@given(
    keys=st.integers(1, 700),
    tail=st.integers(0, 20),
    lists=st.integers(1, 60),
    top_k=st.integers(1, 9),
    together=st.integers(1, 4),
    cell=st.sampled_from([5, 1024]),
    seed=st.integers(0, 50),
)
def test_where_all_is_read_all_is_found(
    keys: int, tail: int, lists: int, top_k: int, together: int, cell: int, seed: int
) -> None:
    """Every key lies in one list, whatever their sizes and the cells they were made in."""
    keys_1NE, query_1QE = clumps(1, keys + tail, seed), normal(1, 7, 16, seed=seed + 2)
    lists = min(lists, keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ivf, "_CELL", cell)
        patch.setattr(ivf, "SPARE", 1000)  # what int8 confuses is scored again
        known_1NE = keys_1NE[:, :keys]
        basis = Basis.fit(known_1NE, query_1QE)
        made = InvertedFile.build(known_1NE, basis, 16, (10**6,), together=together, num_lists=lists, seed=seed)
        made = replace(made, probes=(len(made.lists[0]),))
        found = made.search(query_1QE, keys_1NE, top_k)
    row_M = made.lists[0].row_M
    assert torch.equal(row_M[row_M >= 0].sort().values, torch.arange(keys, dtype=torch.int32))
    assert len(made) == keys and len(row_M) <= keys + len(made.lists[0]) * (ROWS - 1)
    torch.testing.assert_close(found[1], topk_scan(query_1QE, keys_1NE, top_k)[1], atol=1e-4, rtol=1e-4)


def test_queries_read_what_those_beside_them_chose(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    """And nothing of what others did: rows of a batch are what they would be alone."""
    keys_XNE, query_XQE = bank
    truth_XQR, _ = topk_scan(query_XQE, keys_XNE, 8)
    whole = index.search(query_XQE, keys_XNE, 8)
    for token in (0, 17, 99):
        one = slice(3 * token, 3 * token + 3)
        found = index.search(query_XQE[:, one], keys_XNE, 8)
        assert all(torch.equal(mine, its[:, one]) for mine, its in zip(found, whole, strict=True))
    alone = replace(index, together=1)
    assert sum(shares(whole[0], truth_XQR)) > sum(shares(alone.search(query_XQE, keys_XNE, 8)[0], truth_XQR))


def test_lists_that_vary_promise_more() -> None:
    """Two lists of one mean: what a query looks for lies in the one whose keys differ."""
    keys_NE = torch.zeros(600, 4)
    keys_NE[:300, 1], keys_NE[300:, 1] = 5.0, -5.0
    keys_NE[:300, 0] = torch.linspace(-9, 9, 300)
    made = InvertedFile.build(keys_NE[None], Basis.fit(keys_NE[None], normal(1, 50, 4)), 4, (1,), num_lists=2)
    index_1QR, _ = made.search(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), keys_NE[None], 3)
    assert index_1QR.flatten().tolist() == [299, 298, 297]


def test_appended_tokens_are_found(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    keys_XNE, query_XQE = bank
    late_XNE = (100 * query_XQE[:, :5]).bfloat16()
    index_XQR, _ = index.search(query_XQE[:, :5], torch.cat((keys_XNE, late_XNE), dim=1), 8)
    best_XQ = (query_XQE[:, :5] @ late_XNE.float().mT).argmax(-1) + 3000
    assert torch.equal(index_XQR[..., 0], best_XQ)


def test_a_search_that_finds_too_few_says_so(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    """One list holds fewer keys than are asked for, and none of its empty places is found."""
    keys_XNE, query_XQE = bank
    narrow = replace(index, probes=(1, 1), together=1)
    index_XQR, score_XQR = narrow.search(query_XQE[:, :4], keys_XNE, 400)
    missing_XQR = score_XQR == -torch.inf
    assert missing_XQR.any() and not missing_XQR[..., 0].any()
    assert (index_XQR[missing_XQR] == 0).all()
    for row_R, missing_R in zip(index_XQR.flatten(0, 1), missing_XQR.flatten(0, 1), strict=True):
        assert len(row_R[~missing_R].unique()) == int((~missing_R).sum())


def test_its_state_gives_back_the_same_index(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    keys_XNE, query_XQE = bank
    tensors, settings = index.state()
    again = InvertedFile.from_state(tensors, json.loads(json.dumps(settings)))
    assert again.recall == index.recall and again.probes == index.probes and len(again) == 3000
    assert again.together == 3 and again.size == 12
    for mine, its in zip(again.search(query_XQE, keys_XNE, 8), index.search(query_XQE, keys_XNE, 8), strict=True):
        assert torch.equal(mine, its)


def test_known_settings_build_the_same_index(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    keys_XNE, query_XQE = bank
    again = InvertedFile.build(keys_XNE, index.basis, 12, index.probes, together=3, num_lists=40)
    assert again.recall == ()
    for x in range(2):
        one = slice(x, x + 1)
        mine = again[one].search(query_XQE[one], keys_XNE[one], 8)[0]
        assert torch.equal(mine, index.search(query_XQE, keys_XNE, 8)[0][one])


def test_what_cannot_be_built_says_why(bank: tuple[Tensor, Tensor]) -> None:
    keys_XNE, query_XQE = bank
    with pytest.raises(ConfigError, match="exactly"):
        InvertedFile.choose(keys_XNE[:, :20], query_XQE)
    with pytest.raises(ConfigError, match="6 queries"):
        InvertedFile.choose(keys_XNE, query_XQE[:, :5], top_k=8, together=3)
    with pytest.raises(ConfigError, match="larger size"):
        InvertedFile.choose(keys_XNE, query_XQE, top_k=8, target=0.99, size=1, num_lists=40)


@given(st.integers(1, 1 << 24))
def test_lists_are_not_mostly_empty(keys: int) -> None:
    assert default_lists(keys) >= 1 and (keys < 2 * ROWS or keys / default_lists(keys) >= 2 * ROWS)
