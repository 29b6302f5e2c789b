"""The search on a CPU finds what float32 scores say, at sizes that fit nothing and where rounding would mislead."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem.ops import cpu, reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow or not, bfloat16 products are the same on every processor."""
    monkeypatch.setattr(cpu, "has_bfloat16_products", lambda: True)


def assert_finds_the_best(query_XQE: Tensor, keys_XNE: Tensor, top_k: int, lengths: list[int], found: tuple) -> None:
    index_XQR, score_XQR = found
    assert index_XQR.shape == score_XQR.shape == (*query_XQE.shape[:2], top_k)
    assert index_XQR.dtype == torch.int64 and score_XQR.dtype == torch.float32
    for x, length in enumerate(lengths):
        kept = min(top_k, length)
        true_QN = query_XQE[x].double() @ keys_XNE[x, :length].double().T
        best_QR = true_QN.topk(kept, dim=-1).values
        torch.testing.assert_close(score_XQR[x, :, :kept].double(), best_QR, atol=1e-5, rtol=1e-5)
        # Each score is that of its own key, and no key is found twice: equal keys may stand in any order.
        torch.testing.assert_close(true_QN.gather(-1, index_XQR[x, :, :kept]), best_QR, atol=1e-5, rtol=1e-5)
        for row_R in index_XQR[x, :, :kept]:
            assert len(row_R.unique()) == kept
        assert (score_XQR[x, :, kept:] == -torch.inf).all() and (index_XQR[x, :, kept:] == 0).all()


@settings(max_examples=60)
@given(
    searches=st.integers(1, 3),
    queries=st.one_of(st.integers(0, 20), st.integers(cpu.MANY - 1, 2 * cpu.MANY + 2)),
    keys=st.integers(0, 400),
    top_k=st.integers(1, 9),
    seed=st.integers(0, 99),
    ragged=st.booleans(),
    dtypes=st.sampled_from([(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32,) * 2]),
)
def test_topk_scan_is_topk(
    searches: int, queries: int, keys: int, top_k: int, seed: int, ragged: bool, dtypes: tuple
) -> None:
    query_XQE = normal(searches, queries, 5, seed=seed).to(dtypes[0])
    keys_XNE = normal(searches, keys, 5, seed=seed + 1).to(dtypes[1])
    lengths, length_X = [keys] * searches, None
    if ragged:
        length_X = torch.randint(keys + 1, (searches,), generator=torch.Generator().manual_seed(seed))
        lengths = length_X.tolist()
        for x, length in enumerate(lengths):
            keys_XNE[x, length:] = torch.nan  # what lies beyond is never looked at
    found = cpu.topk_scan(query_XQE, keys_XNE, top_k, length_X)
    assert_finds_the_best(query_XQE, keys_XNE, top_k, lengths, found)


@pytest.mark.parametrize("keys", [8191, 8192, 8200, 20011])
@pytest.mark.parametrize("top_k", [1, 31])
def test_topk_scan_of_many_keys(keys: int, top_k: int) -> None:
    """Long enough for the two-stage ranking, with and without keys left over from its groups."""
    keys_XNE = normal(2, keys, 8, seed=1).bfloat16()
    for query_XQE in (normal(2, 7, 8), normal(2, 7, 8).bfloat16(), normal(2, cpu.MANY + 3, 8)):
        found = cpu.topk_scan(query_XQE, keys_XNE, top_k)
        assert_finds_the_best(query_XQE, keys_XNE, top_k, [keys] * 2, found)


@pytest.mark.parametrize("offset", [0.0, 30.0, 3000.0])
@pytest.mark.parametrize("queries", [3, cpu.FEW + 1])
def test_scores_that_bfloat16_cannot_tell_apart_are_still_ranked(offset: float, queries: int) -> None:
    """A part that all keys share drowns their differences in rounding: proved where possible, else searched again."""
    keys_XNE = normal(1, 5000, 16).bfloat16()
    keys_XNE[..., 0] = 1.0
    query_XQE = normal(1, queries, 16, seed=1)
    query_XQE[..., 0] = offset
    index_XQR, _ = cpu.topk_scan(query_XQE, keys_XNE, 16)
    true_XQN = query_XQE.double() @ keys_XNE.double().mT
    worst_XQ = true_XQN.gather(-1, index_XQR).amin(-1)
    assert (worst_XQ >= true_XQN.topk(16, dim=-1).values[..., -1] - 1e-6 * max(offset, 1.0)).all()


@pytest.mark.parametrize("queries", [1, cpu.FEW + 1])
def test_what_rounding_takes_from_a_query_counts(queries: int) -> None:
    """In bfloat16 this query is (1, 1), and every one of these keys scores zero."""
    steps_N = torch.randperm(3000, generator=torch.Generator().manual_seed(0)) / 3000
    keys_XNE = torch.stack((-steps_N, steps_N), dim=-1)[None].bfloat16()
    query_XQE = torch.tensor([1.0, 1.0 + 2.0**-9]).expand(1, queries, 2)
    found = cpu.topk_scan(query_XQE, keys_XNE, 3)
    best = (query_XQE.double() @ keys_XNE.double().mT).topk(3, dim=-1).values
    torch.testing.assert_close(found[1].double(), best, atol=1e-7, rtol=0)


@given(st.integers(1, 80), st.integers(1, 20))
def test_equal_keys_are_found_once_each(keys: int, top_k: int) -> None:
    keys_XNE = torch.ones(1, keys, 3).bfloat16()
    query_XQE = torch.ones(1, 2, 3)
    found = cpu.topk_scan(query_XQE, keys_XNE, top_k)
    assert_finds_the_best(query_XQE, keys_XNE, top_k, [keys], found)


def test_keys_of_any_stride() -> None:
    keys_NXE = normal(300, 3, 8).bfloat16()
    query_XQE = normal(3, 2, 8, seed=1)
    found = cpu.topk_scan(query_XQE, keys_NXE.transpose(0, 1), 5)
    assert_finds_the_best(query_XQE, keys_NXE.transpose(0, 1), 5, [300] * 3, found)


def test_what_bfloat16_cannot_speed_up_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    keys_XNE, query_XQE = normal(1, 300, 8).bfloat16(), normal(1, 2, 8, seed=1)
    for scan in ("_scan", "_scan_many"):
        monkeypatch.setattr(cpu, scan, lambda *_: pytest.fail("searched in bfloat16"))
    many_XQE = normal(1, cpu.FEW + 1, 8)
    cpu.topk_scan(query_XQE, keys_XNE.float(), 4)
    cpu.topk_scan(many_XQE, keys_XNE.float(), 4)
    monkeypatch.setattr(cpu, "has_bfloat16_products", lambda: False)
    cpu.topk_scan(query_XQE, keys_XNE, 4)
    assert torch.equal(cpu.topk_scan(many_XQE, keys_XNE, 4)[0], reference.topk_scan(many_XQE, keys_XNE, 4)[0])


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3000), st.integers(1, 12), st.integers(0, 9), st.sampled_from([700, 1 << 18]))
def test_best_of_bounds_what_it_leaves_out(queries: int, keys: int, count: int, seed: int, block: int) -> None:
    count = min(count, keys)
    score_QN = normal(queries, keys, seed=seed).mul(1000).to(torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK", block)
        candidate_QC, least_Q = cpu.best_of(lambda part: score_QN[:, part], keys, count)
    left_QN = score_QN.float().scatter(-1, candidate_QC, -torch.inf)
    assert (left_QN.amax(-1) <= least_Q).all()
    assert torch.equal(score_QN.gather(-1, candidate_QC).amin(-1).float(), least_Q)
    assert all(len(row_C.unique()) == count for row_C in candidate_QC)


def test_blocks_of_keys_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys_XNE, query_XQE = normal(2, 1500, 8).bfloat16(), normal(2, 3, 8, seed=1)
    whole = cpu.topk_scan(query_XQE, keys_XNE, 6)
    for block in (64, 1000):
        monkeypatch.setattr(cpu, "BLOCK", block)
        assert torch.equal(cpu.topk_scan(query_XQE, keys_XNE, 6)[0], whole[0])


@settings(max_examples=60)
@given(
    searches=st.integers(1, 3),
    queries=st.integers(0, 20),
    retrieved=st.integers(0, 9),
    missing=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_attention_over_rows_is_the_reference_s(
    searches: int, queries: int, retrieved: int, missing: bool, dtype: torch.dtype, seed: int
) -> None:
    """With gradients to the queries, and pools that are views of larger ones."""
    random = torch.Generator().manual_seed(seed)
    keys_PNE, values_PNE = normal(2, 4, 30, 5, seed=seed)[:, :, 3:20].bfloat16()
    pool_X = torch.randint(4, (searches,), generator=random)
    slot_XQR = torch.randint(17, (searches, queries, retrieved), generator=random)
    valid_XQR = torch.ones_like(slot_XQR, dtype=torch.bool)
    if missing:
        valid_XQR = torch.rand(slot_XQR.shape, generator=random) < 0.5
    results, bias_XQR = [], normal(*slot_XQR.shape, seed=seed + 3)
    for ops in (cpu, reference):
        query_XQE = normal(searches, queries, 5, seed=seed + 1).to(dtype).requires_grad_()
        inputs = query_XQE, keys_PNE, values_PNE, pool_X, slot_XQR, valid_XQR, 0.7
        output_XQE, sum_XQ = ops.attend_rows(*inputs, None, None, bias_XQR if seed % 2 else None)
        (output_XQE.float().sum() + sum_XQ.masked_fill(sum_XQ == -torch.inf, 0.0).sum()).backward()
        results.append((output_XQE, sum_XQ, query_XQE.grad))
    for mine, its in zip(*results, strict=True):
        assert mine.dtype == its.dtype
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(mine, its, atol=tolerance, rtol=tolerance)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 2 * cpu.ROWS + 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 2 * cpu.ROWS)),
    seed=st.integers(0, 99),
)
def test_causal_attention_is_attention(tokens: int, kv_heads: int, group: int, window: int | None, seed: int) -> None:
    query_BHTE = normal(2, kv_heads * group, tokens, 5, seed=seed)
    key_BKTE, value_BKTE = normal(2, 2, kv_heads, tokens, 5, seed=seed + 1)
    distance_TT = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen_TT = (distance_TT >= 0) & (distance_TT < (window or tokens))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query_BHTE, key_BKTE, value_BKTE, attn_mask=seen_TT, scale=0.3, enable_gqa=True
    )
    found = cpu.causal_attention(query_BHTE, key_BKTE, value_BKTE, 0.3, window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
