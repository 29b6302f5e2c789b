"""Local attention against a naive softmax, and joint attention against one explicit softmax over everything."""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longmem.retrieved
from longmem.attention import REFERENCE_SIZE, MemoryAttention, local_attention
from longmem.evidence import PassageSums
from longmem.ops import causal_logsumexp, causal_mask

SCALING = 0.37


@st.composite
def local_windows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int | None]:
    """Queries that are the last of the keys' positions, and maybe a sliding window."""
    batch, kv_heads, group, head_dim = (draw(st.integers(1, most)) for most in (2, 3, 3, 6))
    queries = draw(st.integers(1, 9))
    keys = queries + draw(st.integers(0, 9))
    window = draw(st.none() | st.integers(1, 12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    query_BHTE = torch.randn(batch, kv_heads * group, queries, head_dim, generator=random)
    key_BKSE, value_BKSE = (torch.randn(batch, kv_heads, keys, head_dim, generator=random) for _ in range(2))
    return query_BHTE, key_BKSE, value_BKSE, window


def visible(query: int, queries: int, keys: int, window: int | None) -> list[int]:
    """Key positions that a query may look at."""
    last = keys - queries + query
    first = 0 if window is None else max(0, last - window + 1)
    return list(range(first, last + 1))


@given(local_windows())
def test_local_attention_is_a_masked_softmax(sizes: tuple) -> None:
    query_BHTE, key_BKSE, value_BKSE, window = sizes
    group = query_BHTE.shape[1] // key_BKSE.shape[1]
    out_BHTE = local_attention(query_BHTE, key_BKSE, value_BKSE, SCALING, window)
    grouped_BKGTE = query_BHTE.unflatten(1, (-1, group))
    logsumexp_BKGT = causal_logsumexp(grouped_BKGTE, key_BKSE, SCALING, window)
    batch, heads, queries, _ = query_BHTE.shape
    assert out_BHTE.shape == query_BHTE.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                seen = visible(t, queries, key_BKSE.shape[2], window)
                score_S = key_BKSE[b, h // group, seen] @ query_BHTE[b, h, t] * SCALING
                expected_E = score_S.softmax(0) @ value_BKSE[b, h // group, seen]
                torch.testing.assert_close(out_BHTE[b, h, t], expected_E, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(
                    logsumexp_BKGT[b, h // group, h % group, t], score_S.logsumexp(0), atol=1e-5, rtol=1e-4
                )


@given(st.integers(1, 12), st.integers(0, 12), st.none() | st.integers(1, 30))
def test_the_mask_is_causal_and_slides(queries: int, past: int, window: int | None) -> None:
    keys = queries + past
    mask_TS = causal_mask(queries, keys, window, torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in mask_TS] == [
        visible(query, queries, keys, window) for query in range(queries)
    ]


@given(local_windows(), st.integers(0, 8))
def test_tokens_a_query_cannot_see_do_not_matter(sizes: tuple, seed: int) -> None:
    query_BHTE, key_BKSE, value_BKSE, window = sizes
    queries, keys = query_BHTE.shape[2], key_BKSE.shape[2]
    unseen = sorted(set(range(keys)) - set(visible(0, queries, keys, window)))
    before = local_attention(query_BHTE, key_BKSE, value_BKSE, SCALING, window)[:, :, 0]
    key_BKSE[:, :, unseen], value_BKSE[:, :, unseen] = 50.0, -50.0
    after = local_attention(query_BHTE, key_BKSE, value_BKSE, SCALING, window)[:, :, 0]
    torch.testing.assert_close(after, before)


@st.composite
def retrievals(draw: st.DrawFn) -> tuple:
    """A trained memory attention, queries, local attention's scores and values, and what was found."""
    batch, kv_heads, group, queries, found, head_dim = (draw(st.integers(1, most)) for most in (2, 2, 3, 4, 5, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    attention = MemoryAttention(
        1, kv_heads, group, head_dim, SCALING, "joint", draw(st.booleans()), draw(st.booleans())
    )
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter += 0.5 * normal(*parameter.shape)
    shape = (batch, kv_heads, group, queries)
    valid_BKGTR = torch.rand(*shape, found, generator=random) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    sizes_B = torch.randint(1, 10**6, (batch,), generator=random).float()
    index_BKGTR = torch.randint(9, (*shape, found), generator=random)
    memories = tiny.retrieved(
        normal(*shape, found, head_dim), normal(*shape, found, head_dim), valid_BKGTR, index_BKGTR, sizes_B
    )
    local_keys = queries + 2
    return (
        attention,
        normal(*shape, head_dim),
        normal(*shape, local_keys),
        normal(*shape, local_keys, head_dim),
        memories,
    )


@settings(max_examples=60)
@given(retrievals())
@torch.no_grad()
def test_joint_attention_is_one_softmax_over_local_retrieved_and_null_keys(case: tuple) -> None:
    attention, query_BKGTE, local_score_BKGTS, local_value_BKGTSE, found = case
    local_BKGTE = (local_score_BKGTS.softmax(-1)[..., None] * local_value_BKGTSE).sum(-2)
    sums = mock.Mock(spec=PassageSums)
    evidence_BKGTR = torch.rand(found.index_BKGTR.shape, generator=torch.Generator().manual_seed(0))
    sums.evidence.return_value = evidence_BKGTR
    difference_BKGTE, read = attention(query_BKGTE, local_BKGTE, local_score_BKGTS.logsumexp(-1), found, sums)
    batch, kv_heads, group, queries, _ = query_BKGTE.shape
    for place in torch.cartesian_prod(*(torch.arange(n) for n in (batch, kv_heads, group, queries))).view(-1, 4):
        b, k, g, t = place.tolist()
        valid_R = found.valid_BKGTR[b, k, g, t]
        bias = attention.bias_KG[k, g] + attention.size_bias_KG[k, g] * math.log(found.bank_size_B[b] / REFERENCE_SIZE)
        key_RE = found.rows(found.keys_PNE)[b, k, g, t]
        score_R = key_RE @ query_BKGTE[b, k, g, t] * SCALING * attention.scale_KG[k, g]
        score_R[~valid_R] = -torch.inf
        match_R = score_R.softmax(0)
        if attention.passage_evidence:
            drawn_R = evidence_BKGTR[b, k, g, t] / attention.evidence_from_KG[k, g].exp()
            gain = attention.evidence_KG[k, g] + query_BKGTE[b, k, g, t] @ attention.evidence_query_KGE[k, g] * SCALING
            score_R = score_R + gain.clamp(min=0) * drawn_R.log1p()
        if attention.newest_wins and valid_R.any():
            discount = attention.newest_KG[k, g] + query_BKGTE[b, k, g, t] @ attention.newest_query_KGE[k, g] * SCALING
            share_R, order = score_R.softmax(0), found.order_BKGTR[b, k, g, t].tolist()
            for r, mine in enumerate(order):
                newer = [s for s, other in enumerate(order) if other > mine or (other == mine and s < r)]
                score_R[r] = score_R[r] - discount * share_R[newer].sum()
        null = query_BKGTE[b, k, g, t] @ attention.null_key_KGE[k, g] * SCALING + attention.null_bias_KG[k, g]
        score_R = score_R + bias
        weights = torch.cat((local_score_BKGTS[b, k, g, t], score_R, null[None])).softmax(0)
        local_S, memory_R, null_1 = weights.split([local_score_BKGTS.shape[-1], len(valid_R), 1])
        if not valid_R.any():
            assert not difference_BKGTE[b, k, g, t].any() and read.mass_BKGT[b, k, g, t] == 0
            continue
        # What the null key takes goes back to local attention.
        joint_E = local_S @ local_value_BKGTSE[b, k, g, t] + memory_R @ found.rows(found.values_PNE)[b, k, g, t]
        joint_E = joint_E + null_1 * local_BKGTE[b, k, g, t]
        torch.testing.assert_close(
            local_BKGTE[b, k, g, t] + difference_BKGTE[b, k, g, t], joint_E, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(read.weight_BKGTR[b, k, g, t], memory_R, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(read.log_match_BKGTR[b, k, g, t].exp(), match_R, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(read.mass_BKGT[b, k, g, t], memory_R.sum(), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(
            read.log_weight_BKGTR[b, k, g, t].exp(), memory_R / memory_R.sum(), atol=1e-5, rtol=1e-4
        )


@given(retrievals())
@torch.no_grad()
def test_the_gate_mixes_by_its_own_number_alone(case: tuple) -> None:
    joint, query_BKGTE, local_score_BKGTS, local_value_BKGTSE, found = case
    kv_heads, group, head_dim = joint.null_key_KGE.shape
    attention = MemoryAttention(1, kv_heads, group, head_dim, SCALING, "gate")
    attention.gate_KG += 3 * torch.randn(kv_heads, group, generator=torch.Generator().manual_seed(0))
    local_BKGTE = local_value_BKGTSE.mean(-2)
    difference_BKGTE, read = attention(query_BKGTE, local_BKGTE, local_score_BKGTS.logsumexp(-1), found)
    score_BKGTR = (found.rows(found.keys_PNE) * query_BKGTE[..., None, :]).sum(-1) * SCALING
    weight_BKGTR = score_BKGTR.masked_fill(~found.valid_BKGTR, -torch.inf).softmax(-1)
    memory_BKGTE = (weight_BKGTR[..., None] * found.rows(found.values_PNE)).sum(-2)
    gate_KG11 = attention.gate_KG.sigmoid()[..., None, None]
    expected_BKGTE = gate_KG11 * memory_BKGTE + (1 - gate_KG11) * local_BKGTE
    something_BKGT = found.valid_BKGTR.any(-1)
    torch.testing.assert_close(
        (local_BKGTE + difference_BKGTE)[something_BKGT], expected_BKGTE[something_BKGT], atol=1e-5, rtol=1e-4
    )
    assert not difference_BKGTE[~something_BKGT].any()
    assert (read.mass_BKGT[~something_BKGT] == 0).all()


@settings(max_examples=40)
@given(retrievals(), st.booleans())
@torch.no_grad()
def test_one_kernel_computes_the_same(case: tuple, apart: bool) -> None:
    """As it does on a GPU where no gradient is wanted; heads, tokens and rows of a batch may lie anywhere."""
    pytest.importorskip("triton")
    attention, query_BKGTE, local_score_BKGTS, local_value_BKGTSE, found = case
    local_BKGTE = (local_score_BKGTS.softmax(-1)[..., None] * local_value_BKGTSE).sum(-2)
    inputs = query_BKGTE, local_BKGTE, local_score_BKGTS.logsumexp(-1)
    expected_BKGTE, expected = attention(*inputs, found)
    if apart:
        inputs = [scattered(tensor) for tensor in inputs]
        names = ("slot_BKGTR", "score_BKGTR", "order_BKGTR")
        found = dataclasses.replace(found, **{name: scattered(getattr(found, name)) for name in names})
    with mock.patch.object(longmem.retrieved, "joins_at_once", lambda device: True):
        difference_BKGTE, read = attention(*inputs, found)
    torch.testing.assert_close(difference_BKGTE, expected_BKGTE, atol=1e-5, rtol=1e-4)
    for name in ("mass_BKGT", "log_weight_BKGTR", "log_match_BKGTR"):
        torch.testing.assert_close(getattr(read, name), getattr(expected, name), atol=1e-5, rtol=1e-4)
    assert not difference_BKGTE[~found.valid_BKGTR.any(-1)].any()


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with rows of a batch behind its heads, as searches of one bank leave them, and with gaps."""
    apart = torch.full((2, *tensor.transpose(0, 1).shape), -7).to(tensor.dtype)
    apart[0] = tensor.transpose(0, 1)
    return apart[0].transpose(0, 1)


@given(retrievals())
def test_gradients_are_finite_even_where_nothing_was_found(case: tuple) -> None:
    attention, query_BKGTE, local_score_BKGTS, local_value_BKGTSE, found = case
    query_BKGTE.requires_grad_()
    difference_BKGTE, read = attention(query_BKGTE, local_value_BKGTSE.mean(-2), local_score_BKGTS.logsumexp(-1), found)
    (difference_BKGTE.square().sum() + read.mass_BKGT.sum()).backward()
    assert query_BKGTE.grad is not None and query_BKGTE.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())
