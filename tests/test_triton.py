"""Triton kernels in Triton's interpreter, against their plain twins, at sizes that fit nothing.

The interpreter's matrix product knows no bfloat16: `benchmarks/kernels.py` checks that on a GPU before it times
anything.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem.ops import Lists, Pools, reference
from longmem.ops.lists import TILE

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it comes for Linux only)", allow_module_level=True)

from longmem.ops.triton import (
    attend_rows,
    causal_logsumexp,
    code_queries,
    cross_entropy_slope,
    gather_rows,
    listed,
    search,
    topk_coded,
    topk_listed,
    topk_scan,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def assert_same_search(
    query_XQE: Tensor, keys_PNE: Tensor, top_k: int, length_X: Tensor, pool_X: Tensor, found
) -> None:
    index_XQR, score_XQR = found
    expected = reference.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X)
    assert index_XQR.dtype == torch.int64 and score_XQR.dtype == torch.float32
    torch.testing.assert_close(score_XQR, expected[1], atol=1e-4, rtol=1e-4)
    assert_true_scores(query_XQE, keys_PNE, top_k, length_X, pool_X, found)


def assert_true_scores(
    query_XQE: Tensor, keys_PNE: Tensor, top_k: int, length_X: Tensor, pool_X: Tensor, found
) -> None:
    index_XQR, score_XQR = found
    # Indices are those of the scores returned (ties aside), each once.
    for x in range(query_XQE.shape[0]):
        keys_NE = keys_PNE[pool_X[x]].float()
        for q in range(query_XQE.shape[1]):
            real_R = score_XQR[x, q] > -torch.inf
            assert int(real_R.sum()) == min(top_k, int(length_X[x]))
            index_R = index_XQR[x, q][real_R]
            assert len(index_R.unique()) == len(index_R) and (index_R < length_X[x]).all()
            torch.testing.assert_close(
                keys_NE[index_R] @ query_XQE[x, q].float(), score_XQR[x, q][real_R], atol=1e-4, rtol=1e-4
            )
            assert (index_XQR[x, q][~real_R] == 0).all()


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_search(data: st.DataObject) -> None:
    pools, searches = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    queries, keys = data.draw(st.integers(1, 4) | st.just(17)), data.draw(st.integers(1, 700))
    head_dim, top_k = data.draw(st.sampled_from([8, 20, 64])), data.draw(st.sampled_from([1, 3, 16, 64]))
    parts, seed = data.draw(st.sampled_from([1, 2, 5])), data.draw(st.integers(0, 99))
    query_XQE = normal(searches, queries, head_dim, seed=seed)
    keys_PNE = normal(pools, keys, head_dim, seed=seed + 1)
    pool_X, length_X = integers(0, pools, searches, seed=seed), integers(0, keys + 1, searches, seed=seed)
    seen_P = torch.stack(
        [length_X[pool_X == p].max() if (pool_X == p).any() else length_X.new_zeros(()) for p in range(pools)]
    )
    for p in range(pools):
        keys_PNE[p, seen_P[p] :] = torch.nan  # what lies beyond is never looked at
    found = topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X, parts=parts)
    assert_same_search(query_XQE, keys_PNE.nan_to_num(), top_k, length_X, pool_X, found)


@pytest.mark.parametrize("top_k", [5, 64])
@pytest.mark.parametrize("queries", [2, 17])  # few read the keys of chosen groups, many stream all keys again
@pytest.mark.parametrize(
    "crowded", ["equal", "one group", "nearly equal", "sorted", "a few high, many equal", "far apart"]
)
def test_search_where_more_keys_are_candidates_than_there_is_room_for(top_k: int, queries: int, crowded: str) -> None:
    keys = 1500
    score_N = normal(keys, seed=3)
    if crowded == "equal":
        score_N[:] = 1.0
    elif crowded == "one group":
        # The best keys of all lie in one group: the maxima of the others say little.
        score_N[5 :: search.TILE.value] += 100.0
        score_N[7 :: search.TILE.value // 8] += 50.0
    elif crowded == "nearly equal":
        score_N = 1.0 + 1e-6 * score_N
    elif crowded == "sorted":
        score_N = torch.arange(keys).float()
    elif crowded == "far apart":
        score_N[::2] = -1e30
    else:
        score_N[:] = -3.0
        score_N[-20:] = 5.0
    keys_PNE, query_XQE = torch.zeros(1, keys, 16), torch.zeros(1, queries, 16)
    keys_PNE[0, :, 0], query_XQE[0, :, 0] = score_N, torch.linspace(1.0, 0.5, queries)
    found = topk_scan(query_XQE, keys_PNE, top_k)
    assert_same_search(query_XQE, keys_PNE, top_k, torch.tensor([keys]), torch.tensor([0]), found)
    again = topk_scan(query_XQE, keys_PNE, top_k)
    assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])


@pytest.mark.parametrize("queries", [1, 17])
def test_search_lists_ties_by_index(queries: int) -> None:
    keys_PNE = normal(1, 300, 16)
    keys_PNE[0, 200:] = keys_PNE[0, :100]
    index_XQR, score_XQR = topk_scan(normal(1, queries, 16, seed=1), keys_PNE, 20)
    tied = score_XQR[..., 1:] == score_XQR[..., :-1]
    assert tied.any() and (index_XQR.diff(dim=-1)[tied] > 0).all()


@pytest.mark.parametrize("queries", [3, 20])
def test_search_of_empty_banks_beside_full_ones(queries: int) -> None:
    keys_PNE = torch.full((1, 400, 16), torch.nan)
    keys_PNE[0, :300] = normal(300, 16)
    length_X = torch.tensor([0, 300, 1])
    pool_X = torch.zeros(3, dtype=torch.int64)
    query_XQE = normal(3, queries, 16, seed=1)
    index_XQR, score_XQR = topk_scan(query_XQE, keys_PNE, 64, length_X, pool_X)
    assert not index_XQR[0].any() and (score_XQR[0] == -torch.inf).all()
    assert_same_search(query_XQE, keys_PNE.nan_to_num(), 64, length_X, pool_X, (index_XQR, score_XQR))


@pytest.mark.parametrize("queries", [2, 20])
def test_search_with_one_length_and_one_pool_for_all(queries: int) -> None:
    query_XQE, keys_PNE = normal(3, queries, 16), normal(2, 300, 16, seed=1)
    length_X, pool_X = torch.tensor([170]).expand(3), torch.tensor([1]).expand(3)
    keys_PNE[:, 170:] = torch.nan
    found = topk_scan(query_XQE, keys_PNE, 5, length_X, pool_X)
    assert_same_search(query_XQE, keys_PNE.nan_to_num(), 5, length_X, pool_X, found)
    slot_XQR, _ = found
    inputs = (query_XQE, keys_PNE, keys_PNE, pool_X, slot_XQR, torch.ones_like(slot_XQR, dtype=torch.bool), 0.3)
    for mine, plain in zip(attend_rows(*inputs), reference.attend_rows(*inputs), strict=True):
        torch.testing.assert_close(mine, plain)


def test_search_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    query_XQE, keys_PNE = normal(2, 40, 16), normal(2, 300, 16, seed=1)
    whole = topk_scan(query_XQE, keys_PNE, 5)
    monkeypatch.setattr(search, "MOST_BYTES", 2 * 300 * 17)
    index_XQR, score_XQR = topk_scan(query_XQE, keys_PNE, 5)
    assert torch.equal(index_XQR, whole[0])
    torch.testing.assert_close(score_XQR, whole[1])  # the last block is small, and sums in another order


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=4), st.integers(0, 99), st.sampled_from([8, 20]), st.data())
def test_pools_that_lie_apart_are_read_as_one_tensor_of_them(
    sizes: list[int], seed: int, head_dim: int, data: st.DataObject
) -> None:
    """Banks of different sizes, each in memory of its own: searched, attended to and gathered from by address."""
    most, searches = max(1, *sizes), len(sizes) + 1
    queries = data.draw(st.sampled_from([3, 17]))
    rows_PNE = normal(2, len(sizes), most, head_dim, seed=seed)
    keys, values = (Pools.of([part[p, :size].clone() for p, size in enumerate(sizes)]) for part in rows_PNE)
    pool_X = integers(0, len(sizes), searches, seed=seed)
    length_X = torch.tensor(sizes)[pool_X]
    query_XQE = normal(searches, queries, head_dim, seed=seed + 1)
    found = topk_scan(query_XQE, keys, 16, length_X, pool_X)
    for either in (found, reference.topk_scan(query_XQE, keys, 16, length_X, pool_X)):
        assert_same_search(query_XQE, rows_PNE[0], 16, length_X, pool_X, either)
    valid_XQR = found[1] > -torch.inf
    one = attend_rows(query_XQE, *rows_PNE, pool_X, found[0], valid_XQR, 0.3)
    for mine, plain in zip(attend_rows(query_XQE, keys, values, pool_X, found[0], valid_XQR, 0.3), one, strict=True):
        assert torch.equal(mine, plain)
    full = [x for x in range(searches) if length_X[x]]
    if full:
        slot_XQR, pool_X = found[0][full], pool_X[full]
        assert torch.equal(gather_rows(keys, slot_XQR, pool_X), reference.gather_rows(keys, slot_XQR, pool_X))


def test_pools_are_rows_without_gaps() -> None:
    assert Pools.of([normal(3, 8), normal(0, 8)]).shape == (2, 3, 8)
    for wrong in (normal(8, 3).T, normal(3, 16)[:, ::2], normal(3, 4), normal(3, 8).bfloat16()):
        with pytest.raises(ValueError, match="without gaps"):
            Pools.of([normal(3, 8), wrong])


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_search_by_codes(data: st.DataObject) -> None:
    pools, searches = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    queries, keys = data.draw(st.integers(1, 4) | st.just(17)), data.draw(st.integers(1, 900))
    head_dim, size, top_k = 20, data.draw(st.sampled_from([5, 20, 40])), data.draw(st.sampled_from([1, 3, 16]))
    parts, seed = data.draw(st.sampled_from([1, 2, 5])), data.draw(st.integers(0, 99))
    query_XQE = normal(searches, queries, head_dim, seed=seed)
    keys_PNE = normal(pools, keys, head_dim, seed=seed + 1)
    # Whole numbers: a code that keeps all of them is exact, one that keeps some ranks as well as it can.
    query_XQE, keys_PNE = (query_XQE * 9).round(), (keys_PNE * 9).round()
    codes = [torch.nn.functional.pad(rows, (0, max(0, size - 20)))[..., :size] for rows in (query_XQE, keys_PNE)]
    code_query_XQD, codes_PND = (code.to(torch.int8) for code in codes)
    pool_X, length_X = integers(0, pools, searches, seed=seed), integers(0, keys + 1, searches, seed=seed)
    for p in range(pools):
        mine_X = length_X[pool_X == p]
        keys_PNE[p, mine_X.max() if len(mine_X) else 0 :] = torch.nan
    inputs = (query_XQE, keys_PNE, code_query_XQD, codes_PND, top_k, length_X, pool_X)
    found = topk_coded(*inputs, parts=parts)
    clean_PNE = keys_PNE.nan_to_num()
    if size >= head_dim:
        assert_same_search(query_XQE, clean_PNE, top_k, length_X, pool_X, found)
    plain = reference.topk_coded(*inputs, group=8)
    # Groups that are as good as the last are looked at as well: never less is found.
    assert (found[1] >= plain[1] - 1e-3).all()
    assert_true_scores(query_XQE, clean_PNE, top_k, length_X, pool_X, found)
    assert_true_scores(query_XQE, clean_PNE, top_k, length_X, pool_X, plain)


@pytest.mark.parametrize("coded", [False, True])
def test_groups_are_chosen_from_in_as_many_rounds_as_it_takes(coded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of hundreds of millions of keys: 8 parts of tiles, of which two at a time are chosen from; then groups."""
    monkeypatch.setattr(search, "MOST_GROUPS", 256)
    monkeypatch.setattr(search, "MOST_TILES", 32)
    keys, length_X, pool_X = 8 * 256 * 16 - 100, torch.tensor([8 * 256 * 16 - 333]), torch.tensor([0])
    query_XQE, keys_PNE = (normal(1, rows, 16, seed=rows) * 9 for rows in (2, keys))
    query_XQE, keys_PNE = query_XQE.round(), keys_PNE.round()
    keys_PNE[:, int(length_X) :] = torch.nan
    if coded:
        codes = query_XQE.to(torch.int8), keys_PNE.nan_to_num().to(torch.int8)
        found = topk_coded(query_XQE, keys_PNE, *codes, 64, length_X, pool_X)
    else:
        found = topk_scan(query_XQE, keys_PNE, 64, length_X, pool_X)
    assert_same_search(query_XQE, keys_PNE.nan_to_num(), 64, length_X, pool_X, found)


def in_lists(keys_PNE: Tensor, known: int, num_lists: int, size: int, reads: int, seed: int) -> Lists:
    """Keys of whole numbers in lists at random, some of them empty. Codes are exact if they have all numbers."""
    pools, _, head_dim = keys_PNE.shape
    codes, rows, firsts = [], [], []
    for p in range(pools):
        # Squared, so that the first lists are long and some of the last empty.
        list_N = (num_lists * torch.rand(known, generator=torch.Generator().manual_seed(seed + p)) ** 2).long()
        code, row, first = [], [], [0]
        for each in range(num_lists):
            row_n = (list_N == each).nonzero()
            places = -(-len(row_n) // TILE) * TILE
            # What lies at a place of no key looks better than any key.
            code_nS = torch.full((places, size), 127, dtype=torch.int8)
            code_nS[: len(row_n)] = keys_PNE[p, row_n[:, 0], :size].to(torch.int8)
            code.append(code_nS)
            row.append(torch.nn.functional.pad(row_n, (0, 0, 0, places - len(row_n)), value=-1))
            first.append(first[-1] + places // TILE)
        codes.append(torch.cat(code))
        rows.append(torch.cat(row).to(torch.int32))
        firsts.append(first)
    return Lists(
        centre_PE=torch.zeros(pools, head_dim),
        coder_PES=torch.eye(head_dim)[:, :size].expand(pools, -1, -1).contiguous(),
        centroid_PLS=integers(-9, 10, pools, num_lists, size, seed=seed).to(torch.int8),
        first_PL1=torch.tensor(firsts, dtype=torch.int32),
        codes=Pools.of(codes),
        rows=Pools.of(rows),
        reads_P=torch.full((pools,), reads, dtype=torch.int32),
        known=known,
        tiles=max(first[-1] for first in firsts) + seed % 3,
    )


def whole_queries(*shape: int, seed: int = 0) -> Tensor:
    """Queries of whole numbers whose codes are exact."""
    query_XQE = integers(-9, 10, *shape, seed=seed).float()
    query_XQE[..., 0] = 127.0
    return query_XQE


def assert_best_of_what_is_read(
    query_XQE: Tensor, keys_PNE: Tensor, lists: Lists, top_k: int, length_X: Tensor, pool_X: Tensor, found
) -> None:
    """Where codes are exact, the best among the lists that are read and all later keys is found."""
    index_XQR, score_XQR = found
    for x, (pool, length) in enumerate(zip(pool_X.tolist(), length_X.tolist(), strict=True)):
        code_XQS, _ = reference.code_queries(query_XQE[x : x + 1], lists.coder_PES[pool : pool + 1])
        row_n = lists.rows[pool][reference._places_read(lists, pool, code_XQS[0]), 0]
        row_n = torch.cat((row_n[row_n >= 0], torch.arange(lists.known, length)))
        best_QR = (query_XQE[x] @ keys_PNE[pool, row_n].T).topk(min(top_k, len(row_n)), dim=-1).values
        torch.testing.assert_close(score_XQR[x, :, : best_QR.shape[1]], best_QR)
        assert (score_XQR[x, :, best_QR.shape[1] :] == -torch.inf).all()
        assert (index_XQR[x, :, best_QR.shape[1] :] == 0).all()
        true_QR = torch.einsum("qre,qe->qr", keys_PNE[pool][index_XQR[x]], query_XQE[x])
        real_QR = score_XQR[x] > -torch.inf
        assert torch.equal(true_QR[real_QR], score_XQR[x][real_QR])
        for index_R, real_R in zip(index_XQR[x], real_QR, strict=True):
            assert len(index_R[real_R].unique()) == int(real_R.sum())
            assert torch.isin(index_R[real_R], row_n).all()


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_search_by_lists(data: st.DataObject) -> None:
    pools, searches = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    queries, keys = data.draw(st.sampled_from([1, 3, 9, 16])), data.draw(st.integers(1, 900))
    head_dim, num_lists = data.draw(st.sampled_from([8, 20])), data.draw(st.integers(1, 12) | st.just(140))
    known, reads = data.draw(st.integers(0, keys)), data.draw(st.sampled_from([1, 2, 5, 1000]))
    top_k, seed = data.draw(st.sampled_from([1, 3, 16, 64])), data.draw(st.integers(0, 99))
    apart = data.draw(st.booleans())
    keys_PNE = integers(-9, 10, pools, keys, head_dim, seed=seed).float()
    lists = in_lists(keys_PNE, known, num_lists, head_dim, reads, seed)
    query_XQE = whole_queries(searches, queries, head_dim, seed=seed + 1)
    pool_X, length_X = integers(0, pools, searches, seed=seed), integers(known, keys + 1, searches, seed=seed)
    clean_PNE = keys_PNE.clone()
    for p in range(pools):
        mine_X = length_X[pool_X == p]
        keys_PNE[p, mine_X.max() if len(mine_X) else known :] = torch.nan
    given = Pools.of([keys_NE.clone() for keys_NE in keys_PNE]) if apart else keys_PNE
    for search_by_lists in (topk_listed, reference.topk_listed):
        found = search_by_lists(query_XQE, given, lists, top_k, length_X, pool_X)
        assert found[0].dtype == torch.int64 and found[1].dtype == torch.float32
        assert_best_of_what_is_read(query_XQE, clean_PNE, lists, top_k, length_X, pool_X, found)
    if reads == 1000:
        assert_same_search(query_XQE, clean_PNE, top_k, length_X, pool_X, found)


def test_search_by_lists_that_leave_numbers_out() -> None:
    """Codes rank then, and scores are true all the same; later keys are found whatever the codes say."""
    query_XQE, keys_PNE = normal(2, 3, 20), normal(2, 700, 20, seed=1)
    later_X3E = 10 * query_XQE
    lists = in_lists((9 * keys_PNE).round(), 600, 7, 8, 2, seed=3)
    keys_PNE = torch.cat((keys_PNE[:, :697], later_X3E), dim=1)
    found = topk_listed(query_XQE, keys_PNE, lists, 16)
    assert_true_scores(query_XQE, keys_PNE, 16, torch.tensor([700, 700]), torch.tensor([0, 1]), found)
    best_XQ = (query_XQE @ later_X3E.mT).argmax(-1)
    assert torch.equal(found[0][..., 0], 697 + best_XQ)
    plain = reference.topk_listed(query_XQE, keys_PNE, lists, 16, group=8)
    # Groups that are as good as the last are looked at as well: never less is found.
    assert (found[1] >= plain[1] - 1e-4).all()
    again = topk_listed(query_XQE, keys_PNE, lists, 16)
    assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])


@pytest.mark.parametrize("most_tiles", [4, 16])
def test_lists_are_chosen_from_in_parts(most_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of tens of millions of keys; parts grow where there would be too many."""
    monkeypatch.setattr(listed, "MOST_TILES", most_tiles)
    monkeypatch.setattr(listed, "MOST_PARTS", 16)
    monkeypatch.setattr(listed, "FEW_KEYS", 0)
    keys_PNE, query_XQE = integers(-9, 10, 2, 8000, 16).float(), whole_queries(2, 2, 16)
    keys_PNE[:, 7700:] = torch.nan
    own_X, length_X = torch.arange(2), torch.tensor([7700, 7600])
    for reads in (20, 10_000):
        lists = in_lists(keys_PNE.nan_to_num(), 7000, 30, 16, reads, seed=2)
        found = topk_listed(query_XQE, keys_PNE, lists, 64, length_X)
        assert_best_of_what_is_read(query_XQE, keys_PNE.nan_to_num(), lists, 64, length_X, own_X, found)


def test_a_query_that_asks_nothing_reads_all_lists() -> None:
    """They tie."""
    keys_PNE = integers(-9, 10, 1, 500, 8).float()
    lists = in_lists(keys_PNE, 500, 9, 8, 1, seed=1)
    _, score_XQR = topk_listed(torch.zeros(1, 1, 8), keys_PNE, lists, 64)
    assert (score_XQR == 0).all()
    many = torch.zeros(1, 17, 8)
    for search_by_lists in (topk_listed, reference.topk_listed):
        with pytest.raises(ValueError, match="17 queries"):
            search_by_lists(many, keys_PNE, lists, 4)
        index_XQR, score_XQR = search_by_lists(many[:, :0], keys_PNE, lists, 4)
        assert index_XQR.shape == score_XQR.shape == (1, 0, 4)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(0, 4), st.sampled_from([8, 20, 64]), st.sampled_from([5, 16, 20]), st.booleans())
def test_queries_as_codes(searches: int, queries: int, head_dim: int, size: int, rounded: bool) -> None:
    query_XQE = normal(searches, queries, head_dim, dtype=torch.bfloat16 if rounded else torch.float32)
    query_XQE[:, :1] = 0.0
    coder_XES = normal(searches, head_dim, size, seed=1)
    (found, unit_XQ), (expected, plain_XQ) = (
        code(query_XQE, coder_XES) for code in (code_queries, reference.code_queries)
    )
    torch.testing.assert_close(unit_XQ, plain_XQ)
    assert found.dtype == expected.dtype == torch.int8 and found.shape == expected.shape
    # Sums in another order, and halves.
    difference = (found.int() - expected.int()).abs()
    assert (difference <= 1).all() and difference.float().sum() <= 0.01 * difference.numel()
    assert (found[:, 1:].int().abs().amax(-1) == 127).all() and not found[:, :1].any()


def test_search_of_nothing() -> None:
    for queries, keys in ((0, 5), (3, 0)):
        query_XQE, keys_PNE = normal(2, queries, 16), normal(2, keys, 16)
        codes = query_XQE.to(torch.int8), keys_PNE.to(torch.int8)
        for found in (topk_scan(query_XQE, keys_PNE, 4), topk_coded(query_XQE, keys_PNE, *codes, 4)):
            index_XQR, score_XQR = found
            assert index_XQR.shape == score_XQR.shape == (2, queries, 4)
            assert not index_XQR.any() and (score_XQR == -torch.inf).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 9),
    st.sampled_from([8, 20]), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_attention_over_rows(
    pools: int,
    searches: int,
    queries: int,
    keys: int,
    found: int,
    head_dim: int,
    rounded: bool,
    newest: bool,
    raised: bool,
    seed: int,
) -> None:
    dtype = torch.bfloat16 if rounded else torch.float32
    rows = [normal(pools, keys, head_dim, seed=seed + i, dtype=dtype) for i in (1, 2)]
    pool_X, slot_XQR = integers(0, pools, searches, seed=seed), integers(0, keys, searches, queries, found, seed=seed)
    valid_XQR = integers(0, 3, searches, queries, found, seed=seed) > 0
    valid_XQR[0, 0] = False
    grads = normal(searches, queries, head_dim, seed=seed), normal(searches, queries, seed=seed + 1)
    order_XQR = integers(0, 6, searches, queries, found, seed=seed + 4)  # with ties
    results = []
    for attend in (attend_rows, reference.attend_rows):
        query_XQE = normal(searches, queries, head_dim, seed=seed + 3).requires_grad_()
        discount_XQ = (2 * normal(searches, queries, seed=seed + 5)).requires_grad_()
        bias_XQR = normal(searches, queries, found, seed=seed + 6).requires_grad_()
        extra = *((order_XQR, discount_XQ) if newest else (None, None)), bias_XQR if raised else None
        output_XQE, logsumexp_XQ = attend(query_XQE, *rows, pool_X, slot_XQR, valid_XQR, 0.3, *extra)
        finite_XQ = logsumexp_XQ.masked_fill(logsumexp_XQ == -torch.inf, 0.0)
        ((output_XQE * grads[0]).sum() + (finite_XQ * grads[1]).sum()).backward()
        grads_of = [query_XQE.grad, *([discount_XQ.grad] if newest else []), *([bias_XQR.grad] if raised else [])]
        results.append((output_XQE.detach(), logsumexp_XQ.detach(), *grads_of))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-4)
    assert not results[0][0][0, 0].any() and results[0][1][0, 0] == -torch.inf


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.integers(0, 90),
    st.none() | st.integers(1, 100), st.sampled_from([8, 20]), st.integers(0, 99),
)  # fmt: skip
def test_causal_logsumexp(
    batch: int, kv_heads: int, group: int, tokens: int, past: int, window: int | None, head_dim: int, seed: int
) -> None:
    grad_BKGT = normal(batch, kv_heads, group, tokens, seed=seed)
    results = []
    for logsumexp in (causal_logsumexp, reference.causal_logsumexp):
        query_BKGTE = normal(batch, kv_heads, group, tokens, head_dim, seed=seed + 1).requires_grad_()
        key_BKSE = normal(batch, kv_heads, tokens + past, head_dim, seed=seed + 2).requires_grad_()
        logsumexp_BKGT = logsumexp(query_BKGTE, key_BKSE, 0.3, window)
        (logsumexp_BKGT * grad_BKGT).sum().backward()
        results.append((logsumexp_BKGT.detach(), query_BKGTE.grad, key_BKSE.grad))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("words", [1, 100, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_slope(words: int, dtype: torch.dtype) -> None:
    logits_XV, target_X = 3 * normal(5, words, dtype=dtype), integers(0, words, 5)
    weight_X = normal(5, seed=1).abs()
    mine_XV, plain_XV = logits_XV.clone(), logits_XV.clone()
    loss_X = cross_entropy_slope(mine_XV, target_X, weight_X)
    torch.testing.assert_close(loss_X, reference.cross_entropy_slope(plain_XV, target_X, weight_X))
    torch.testing.assert_close(mine_XV, plain_XV, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)
