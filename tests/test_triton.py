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

from longmem.ops import reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it comes for Linux only)", allow_module_level=True)

from longmem.ops.triton import attend_rows, causal_logsumexp, cross_entropy_slope, search, topk_scan


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


def test_search_of_nothing() -> None:
    for queries, keys in ((0, 5), (3, 0)):
        index_XQR, score_XQR = topk_scan(normal(2, queries, 16), normal(2, keys, 16), 4)
        assert index_XQR.shape == score_XQR.shape == (2, queries, 4)
        assert not index_XQR.any() and (score_XQR == -torch.inf).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 9),
    st.sampled_from([8, 20]), st.booleans(), st.booleans(), st.integers(0, 99),
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
        discounts = (order_XQR, discount_XQ) if newest else ()
        output_XQE, logsumexp_XQ = attend(query_XQE, *rows, pool_X, slot_XQR, valid_XQR, 0.3, *discounts)
        finite_XQ = logsumexp_XQ.masked_fill(logsumexp_XQ == -torch.inf, 0.0)
        ((output_XQE * grads[0]).sum() + (finite_XQ * grads[1]).sum()).backward()
        grad_XQ = discount_XQ.grad if newest else torch.zeros(())
        results.append((output_XQE.detach(), logsumexp_XQ.detach(), query_XQE.grad, grad_XQ))
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
