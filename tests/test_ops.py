"""The plain kernels against torch's own, at sizes that fit nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem.ops import gather_rows, linear_cross_entropy, linear_divergence, linear_nll, reference, topk_scan
from longmem.ops.reference import discounted


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_finds_the_best(query_XQE: Tensor, keys_XNE: Tensor, top_k: int, lengths: list[int], found: tuple) -> None:
    index_XQR, score_XQR = found
    assert index_XQR.shape == score_XQR.shape == (*query_XQE.shape[:2], top_k)
    assert index_XQR.dtype == torch.int64 and score_XQR.dtype == torch.float32
    for x, length in enumerate(lengths):
        kept = min(top_k, length)
        score_QN = query_XQE[x].float() @ keys_XNE[x, :length].float().T
        best = score_QN.topk(kept, dim=-1)
        torch.testing.assert_close(score_XQR[x, :, :kept], best.values, atol=1e-5, rtol=1e-5)
        assert torch.equal(index_XQR[x, :, :kept], best.indices)
        assert (score_XQR[x, :, kept:] == -torch.inf).all() and (index_XQR[x, :, kept:] == 0).all()


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(0, 5), st.integers(0, 300), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_topk_scan_is_topk(searches: int, queries: int, keys: int, top_k: int, seed: int, ragged: bool) -> None:
    query_XQE, keys_XNE = normal(searches, queries, 5, seed=seed), normal(searches, keys, 5, seed=seed + 1)
    lengths = [keys] * searches
    length_X = None
    if ragged:
        length_X = torch.randint(keys + 1, (searches,), generator=torch.Generator().manual_seed(seed))
        lengths = length_X.tolist()
        for x, length in enumerate(lengths):
            keys_XNE[x, length:] = torch.nan  # what lies beyond is never looked at
    found = topk_scan(query_XQE, keys_XNE, top_k, length_X)
    if queries:
        assert_finds_the_best(query_XQE, keys_XNE, top_k, lengths, found)


@pytest.mark.parametrize("keys", [2047, 2048, 2063, 5001])
@pytest.mark.parametrize("top_k", [1, 16, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_scan_of_many_keys(keys: int, top_k: int, dtype: torch.dtype) -> None:
    """Long enough for the two-stage ranking, with and without keys left over from its groups."""
    query_XQE, keys_XNE = normal(2, 7, 8).to(dtype), normal(2, keys, 8, seed=1).to(dtype)
    for length_X in (None, torch.tensor([keys - 5, 3])):
        lengths = [keys] * 2 if length_X is None else length_X.tolist()
        assert_finds_the_best(query_XQE, keys_XNE, top_k, lengths, topk_scan(query_XQE, keys_XNE, top_k, length_X))


def test_topk_scan_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    query_XQE, keys_XNE = normal(2, 11, 8), normal(2, 50, 8, seed=1)
    whole = topk_scan(query_XQE, keys_XNE, 6)
    for most in (1, 300, 1000):
        monkeypatch.setitem(reference.MAX_SCORES, "cpu", most)
        blocks = topk_scan(query_XQE, keys_XNE, 6)
        assert torch.equal(blocks[0], whole[0])
        torch.testing.assert_close(blocks[1], whole[1])


@given(st.integers(1, 80), st.integers(1, 20))
def test_topk_scan_of_equal_scores_finds_different_keys(keys: int, top_k: int) -> None:
    index_XQR, score_XQR = topk_scan(torch.ones(1, 2, 3), torch.ones(1, keys, 3), top_k)
    real_QR = (score_XQR > -torch.inf)[0]
    for row_R, real_R in zip(index_XQR[0], real_QR, strict=True):
        assert len(set(row_R[real_R].tolist())) == int(real_R.sum()) == min(keys, top_k)


def test_topk_scan_takes_keys_of_any_stride() -> None:
    keys_NXE = normal(40, 3, 8)
    query_XQE = normal(3, 2, 8, seed=1)
    found = topk_scan(query_XQE, keys_NXE.transpose(0, 1), 5)
    assert_finds_the_best(query_XQE, keys_NXE.transpose(0, 1).contiguous(), 5, [40] * 3, found)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 4), st.integers(1, 4), st.booleans())
def test_gather_rows_is_indexing(searches: int, rows: int, queries: int, found: int, strided: bool) -> None:
    rows_XNE = normal(searches, rows + 3, 5)[:, :rows] if strided else normal(searches, rows, 5)
    index_XQR = torch.randint(rows, (searches, queries, found))
    expected_XQRE = torch.stack([rows_XNE[x][index_XQR[x]] for x in range(searches)])
    assert torch.equal(gather_rows(rows_XNE, index_XQR), expected_XQRE)


@given(st.integers(1, 13), st.integers(1, 15), st.integers(2, 30), st.integers(0, 99))
def test_linear_cross_entropy_has_the_value_and_gradient_of_torch(rows: int, chunk: int, words: int, seed: int) -> None:
    weight_VD = normal(words, 6, seed=seed)
    target_X = torch.randint(words, (rows,), generator=torch.Generator().manual_seed(seed))
    row_weight_X = normal(rows, seed=seed + 1).abs()
    mine_XD, torchs_XD = (normal(rows, 6, seed=seed + 2).requires_grad_() for _ in range(2))
    loss = linear_cross_entropy(mine_XD, weight_VD, target_X, row_weight_X, chunk)
    expected = (F.cross_entropy(torchs_XD @ weight_VD.T, target_X, reduction="none") * row_weight_X).sum()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    (3.0 * loss).backward()
    (3.0 * expected).backward()
    torch.testing.assert_close(mine_XD.grad, torchs_XD.grad, atol=1e-5, rtol=1e-4)
    assert weight_VD.grad is None


@given(st.integers(1, 13), st.integers(1, 15), st.integers(2, 30), st.integers(0, 99))
def test_linear_divergence_has_the_value_and_gradient_of_torch(rows: int, chunk: int, words: int, seed: int) -> None:
    weight_VD, told_XD = normal(words, 6, seed=seed), normal(rows, 6, seed=seed + 1)
    mine_XD, torchs_XD = (normal(rows, 6, seed=seed + 2).requires_grad_() for _ in range(2))
    loss = linear_divergence(mine_XD, told_XD, weight_VD, 0.3, chunk)
    heard_XV, told_XV = ((part_XD @ weight_VD.T).log_softmax(-1) for part_XD in (torchs_XD, told_XD))
    expected = 0.3 * F.kl_div(heard_XV, told_XV, reduction="sum", log_target=True)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    (3.0 * loss).backward()
    (3.0 * expected).backward()
    torch.testing.assert_close(mine_XD.grad, torchs_XD.grad, atol=1e-5, rtol=1e-4)
    assert linear_divergence(told_XD, told_XD, weight_VD, 1.0).abs() < 1e-5


@given(st.integers(1, 13), st.integers(1, 15), st.integers(0, 99))
def test_linear_nll_is_the_loss_of_each_row(rows: int, chunk: int, seed: int) -> None:
    hidden_XD, weight_VD = normal(rows, 6, seed=seed), normal(17, 6, seed=seed + 1)
    target_X = torch.randint(17, (rows,), generator=torch.Generator().manual_seed(seed))
    expected_X = F.cross_entropy(hidden_XD @ weight_VD.T, target_X, reduction="none")
    nll_X = linear_nll(hidden_XD, weight_VD, target_X, chunk)
    torch.testing.assert_close(nll_X, expected_X, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 9), st.floats(-5, 5), st.integers(0, 99))
def test_the_discount_counts_what_is_newer_whenever_it_was(found: int, discount: float, seed: int) -> None:
    score_XQR = normal(2, 3, found, seed=seed)
    order_XQR = torch.rand(2, 3, 1000, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :found]
    discount_XQ = torch.full((2, 3), discount)
    scores = discounted(score_XQR, order_XQR, discount_XQ)
    # Only the order matters, not the time between.
    assert torch.equal(scores, discounted(score_XQR, order_XQR**2 + 7, discount_XQ))
    # The newest loses nothing; the oldest all but its own share.
    newest_XQ1, oldest_XQ1 = order_XQR.argmax(-1, keepdim=True), order_XQR.argmin(-1, keepdim=True)
    lost_XQR = score_XQR - scores
    torch.testing.assert_close(lost_XQR.gather(-1, newest_XQ1), torch.zeros(2, 3, 1))
    share_XQ1 = score_XQR.softmax(-1).gather(-1, oldest_XQ1)
    torch.testing.assert_close(lost_XQR.gather(-1, oldest_XQ1), discount * (1 - share_XQ1), atol=1e-5, rtol=1e-4)


def test_of_two_equal_rows_the_older_loses_half_the_discount() -> None:
    scores = discounted(torch.tensor([[[1.0, 1.0, -torch.inf]]]), torch.tensor([[[8, 3, 9]]]), torch.tensor([[4.0]]))
    torch.testing.assert_close(scores, torch.tensor([[[1.0, -1.0, -torch.inf]]]))


def test_losses_of_bfloat16_are_float32_and_close() -> None:
    hidden_XD, weight_VD = normal(9, 6), normal(17, 6, seed=1)
    target_X = torch.arange(9)
    expected_X = F.cross_entropy(hidden_XD @ weight_VD.T, target_X, reduction="none")
    nll_X = linear_nll(hidden_XD.bfloat16(), weight_VD.bfloat16(), target_X, 4)
    assert nll_X.dtype == torch.float32
    torch.testing.assert_close(nll_X, expected_X, atol=0.1, rtol=0.05)
    mixed_XD = hidden_XD.clone().requires_grad_()
    loss = linear_cross_entropy(mixed_XD, weight_VD.bfloat16(), target_X, torch.ones(9), 4)
    loss.backward()
    assert mixed_XD.grad is not None and mixed_XD.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected_X.sum(), atol=0.5, rtol=0.05)
