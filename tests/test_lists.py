"""Keys in lists: what is found, what they say is found, and that they can be kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem import lists
from longmem.errors import ConfigError
from longmem.lists import GpuLists, KeyLists, default_lists
from longmem.ops import Pools, topk_scan
from longmem.ops.lists import MOST_LISTS, TILE
from longmem.sketch import Basis


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clumps(keys: int, seed: int = 0) -> Tensor:
    """Keys in clumps far from zero."""
    clump_CE = 2 * normal(30, 16, seed=seed)
    keys_NE = clump_CE[torch.arange(keys) % 30] + 0.5 * normal(keys, 16, seed=seed + 1) + 3.0
    return keys_NE[None].bfloat16()


KEYS_1NE = clumps(12_000)
# Queries that do not look like keys, three of each token.
QUERY_1QE = normal(1, 300, 16, seed=2) * torch.linspace(0.2, 2, 16)


@pytest.fixture(scope="module")
def index() -> KeyLists:
    return KeyLists.choose(KEYS_1NE, QUERY_1QE, top_k=8, target=0.95, size=12, num_lists=40, together=3)


def found(index: KeyLists, query_TGE: Tensor) -> float:
    """Recall of tokens one after another, as they are asked."""
    shares = []
    for query_GE in query_TGE:
        index_GR = index.search(query_GE[None], KEYS_1NE, 8)[0][0]
        truth_GR = topk_scan(query_GE[None], KEYS_1NE, 8)[0][0]
        shares += [len(set(i.tolist()) & set(t.tolist())) / 8 for i, t in zip(index_GR, truth_GR, strict=True)]
    return sum(shares) / len(shares)


def test_the_recall_it_reports_is_what_it_finds(index: KeyLists) -> None:
    query_TGE = QUERY_1QE[0].unflatten(0, (100, 3))
    assert index.recall == pytest.approx((found(index, query_TGE[50:]),))
    assert found(index, query_TGE[:50]) >= 0.95
    assert 1 <= index.reads < index.tiles and 0 < index.share < 1
    less = replace(index, reads=index.reads - 1)
    assert index.reads == 1 or found(less, query_TGE[:50]) < 0.95


def test_queries_that_are_asked_together_read_together(index: KeyLists) -> None:
    """So that less has to be read for the same recall."""
    alone = KeyLists.choose(KEYS_1NE, QUERY_1QE, top_k=8, target=0.95, size=12, num_lists=40)
    assert alone.reads >= index.reads


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 700), st.integers(1, 40), st.sampled_from([4, 8]), st.integers(0, 20))
def test_every_key_lies_in_one_list(keys: int, num_lists: int, size: int, seed: int) -> None:
    """With its code, in a list that is whole tiles, none of them long."""
    keys_1NE, num_lists = 3 + normal(1, keys, 8, seed=seed), min(keys, num_lists)
    basis = Basis.fit(keys_1NE, normal(1, 50, 8, seed=seed))
    made = KeyLists.build(keys_1NE, basis, size, 1, num_lists=num_lists, seed=seed)
    place_N = made.row_M.argsort(stable=True)[-keys:]
    assert torch.equal(made.row_M[place_N], torch.arange(keys, dtype=torch.int32)) and len(made) == keys
    assert (made.row_M >= 0).sum() == keys and len(made.code_MS) == len(made.row_M) == made.tiles * TILE
    coordinate_NS = ((keys_1NE - basis.centre_XE[:, None]) @ basis.keys_XEE)[0, :, :size]
    rounding_NS = (made.code_MS[place_N] * made.scale_S - coordinate_NS).abs()
    assert (rounding_NS <= 0.5001 * made.scale_S + 1e-5).all()
    tiles_L = made.first_L1.diff()
    assert made.first_L1[0] == 0 and made.first_L1[-1] == made.tiles and len(tiles_L) == len(made.centroid_LS)
    assert (tiles_L >= 0).all() and tiles_L.max() <= -(-4 * keys // (num_lists * TILE))
    # No key lies behind a place of none in its tile, so that only the last tile of a list has such places.
    real_TM = (made.row_M >= 0).unflatten(0, (-1, TILE))
    assert (real_TM[:, 1:] <= real_TM[:, :-1]).all() and real_TM[:, 0].all()


def test_a_long_list_is_cut() -> None:
    """Its parts share a centroid, so they are read together."""
    keys_1NE = torch.cat((torch.ones(1, 2000, 8), normal(1, 500, 8)), dim=1)
    made = KeyLists.build(keys_1NE, Basis.fit(keys_1NE, normal(1, 50, 8)), 8, 1, num_lists=20)
    _, which_L, number_L = made.centroid_LS.unique(dim=0, return_inverse=True, return_counts=True)
    tiles_L = made.first_L1.diff()
    assert tiles_L.max() == 4 and number_L.max() >= 4
    assert tiles_L[which_L == number_L.argmax()].sum() >= 2000 // TILE
    # A query that reads one tile reads all parts, since they tie.
    asked_11E = torch.ones(1, 1, 8)
    assert made.search(asked_11E, keys_1NE, 64)[1].isfinite().all()


def test_reading_all_lists_with_all_coordinates_is_exact() -> None:
    made = KeyLists.build(KEYS_1NE, Basis.fit(KEYS_1NE, QUERY_1QE), 16, 1 << 30, num_lists=40)
    query_1QE = QUERY_1QE[:, :5]
    for mine, its in zip(made.search(query_1QE, KEYS_1NE, 8), topk_scan(query_1QE, KEYS_1NE, 8), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-3, rtol=1e-4)
    assert made.share == 1.0


def test_scores_are_those_of_the_keys(index: KeyLists) -> None:
    index_1QR, score_1QR = index.search(QUERY_1QE[:, :9], KEYS_1NE, 8)
    true_1QN = QUERY_1QE[:, :9] @ KEYS_1NE.float().mT
    torch.testing.assert_close(true_1QN.gather(-1, index_1QR), score_1QR, atol=1e-3, rtol=1e-4)
    assert (score_1QR.diff(dim=-1) <= 0).all()


def test_appended_tokens_are_found(index: KeyLists) -> None:
    late_1nE = (100 * QUERY_1QE[:, :5]).bfloat16()
    index_1QR, _ = index.search(QUERY_1QE[:, :5], torch.cat((KEYS_1NE, late_1nE), dim=1), 8)
    best_1Q = (QUERY_1QE[:, :5] @ late_1nE.float().mT).argmax(-1) + 12_000
    assert torch.equal(index_1QR[..., 0], best_1Q)


def test_many_queries_are_answered_exactly(index: KeyLists) -> None:
    for mine, its in zip(
        index.search(QUERY_1QE[:, :17], KEYS_1NE, 8), topk_scan(QUERY_1QE[:, :17], KEYS_1NE, 8), strict=True
    ):
        assert torch.equal(mine, its)


def test_heads_are_searched_at_once(index: KeyLists) -> None:
    """Though they differ in what they read, and in how many lists they have."""
    other_1NE = clumps(12_000, seed=5)
    other = KeyLists.build(other_1NE, Basis.fit(other_1NE, QUERY_1QE), 12, 9, num_lists=170)
    heads = [(index, KEYS_1NE), (other, other_1NE)]
    query_XQE, length_X = normal(2, 3, 16, seed=8), torch.tensor([12_000, 12_000])
    at_once = GpuLists.of([head for head, _ in heads])
    assert at_once.lists.centroid_PLS.shape[1] % TILE == 0
    index_XQR, score_XQR = at_once.search(query_XQE, Pools.of([keys_1NE[0] for _, keys_1NE in heads]), 8, length_X)
    for x, (head, keys_1NE) in enumerate(heads):
        alone = head.search(query_XQE[x : x + 1], keys_1NE, 8)
        assert torch.equal(index_XQR[x], alone[0][0]) and torch.equal(score_XQR[x], alone[1][0])


def test_its_state_gives_back_the_same_index(index: KeyLists) -> None:
    tensors, state = index.state()
    again = KeyLists.from_state(tensors, json.loads(json.dumps(state)))
    assert (again.recall, again.reads, len(again)) == (index.recall, index.reads, 12_000)
    expected = index.search(QUERY_1QE[:, :9], KEYS_1NE, 8)
    for made in (again, index.to("cpu")):
        for mine, its in zip(made.search(QUERY_1QE[:, :9], KEYS_1NE, 8), expected, strict=True):
            assert torch.equal(mine, its)


def test_there_are_no_more_lists_than_can_be_chosen_from() -> None:
    for num_keys in (1, 1000, 1 << 20, 9_437_184, 1 << 24, 1 << 28):
        usual = default_lists(num_keys)
        longest = -(-lists._LONGEST * num_keys // (usual * TILE))
        # Lists that are cut, when all tiles but one of each lie in long ones.
        assert usual + (-(-num_keys // TILE) + usual) // longest <= MOST_LISTS
    assert default_lists(1 << 20) == 4096 and default_lists(1 << 24) == 12_288


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(ConfigError, match="exactly"):
        KeyLists.choose(KEYS_1NE[:, :20], QUERY_1QE)
    with pytest.raises(ConfigError, match="larger size"):
        KeyLists.choose(KEYS_1NE, QUERY_1QE, top_k=8, target=0.99, size=1, num_lists=40)
