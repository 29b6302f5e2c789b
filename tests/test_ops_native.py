"""Compiled search and joint attention find and give what the plain ones do."""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem.attention import MemoryAttention
from longmem.evidence import PassageSums
from longmem.index import BankReader
from longmem.ivf import InvertedFile
from longmem.ops import NativeOps, topk_scan
from longmem.retrieved import RetrievedRows
from longmem.sketch import Basis

CAN_COMPILE = any(map(shutil.which, ("g++", "clang++"))) and Path(sysconfig.get_paths()["include"], "Python.h").exists()
pytestmark = [
    pytest.mark.skipif(not CAN_COMPILE, reason="needs a C++ compiler and Python's headers"),
    pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs AVX-512 VNNI"),
]


@pytest.fixture(scope="module")
def native() -> NativeOps:
    loaded = NativeOps.load()
    assert loaded is not None
    return loaded


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clumps(searches: int, keys: int, head_dim: int, seed: int) -> Tensor:
    clump_XCE = 2 * normal(searches, 30, head_dim, seed=seed)
    clumped_XNE = clump_XCE[:, torch.arange(keys) % 30]
    return (clumped_XNE + 0.5 * normal(searches, keys, head_dim, seed=seed + 1) + 3.0).bfloat16()


@settings(max_examples=40)
@given(
    keys=st.integers(40, 4000),
    tail=st.integers(0, 20),
    lists=st.integers(1, 70),
    head_dim=st.sampled_from([8, 20, 64, 80, 128]),
    size=st.integers(1, 128),
    top_k=st.integers(1, 70),
    together=st.integers(1, 4),
    queries=st.integers(1, 9),
    seed=st.integers(0, 50),
)
def test_where_all_is_read_all_is_found(
    native: NativeOps,
    keys: int,
    tail: int,
    lists: int,
    head_dim: int,
    size: int,
    top_k: int,
    together: int,
    queries: int,
    seed: int,
) -> None:
    """Whatever the sizes: every place of every list is looked at, and scores are those of the keys."""
    keys_XNE, query_XQE = clumps(2, keys + tail, head_dim, seed), normal(2, queries, head_dim, seed=seed + 2)
    known_XNE = keys_XNE[:, :keys]
    basis = Basis.fit(known_XNE, query_XQE)
    made = InvertedFile.build(
        known_XNE, basis, min(size, head_dim), (1, 1), together=together, num_lists=min(lists, keys), seed=seed
    )
    made = replace(made, probes=tuple(map(len, made.lists)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longmem.ivf.SPARE", 10**6)  # every key is scored again
        with torch.no_grad():
            index_XQR, score_XQR = made.search(query_XQE, keys_XNE, top_k, native)
    _, best_XQR = topk_scan(query_XQE, keys_XNE, top_k)
    torch.testing.assert_close(score_XQR, best_XQR, atol=1e-4, rtol=1e-4)
    found_XQR = score_XQR > -torch.inf
    true_XQR = (query_XQE @ keys_XNE.float().mT).gather(-1, index_XQR)
    torch.testing.assert_close(score_XQR[found_XQR], true_XQR[found_XQR], atol=1e-4, rtol=1e-4)
    assert (index_XQR[~found_XQR] == 0).all()
    for row_R, found_R in zip(index_XQR.flatten(0, 1), found_XQR.flatten(0, 1), strict=True):
        assert len(row_R[found_R].unique()) == found_R.sum()


@settings(max_examples=20)
@given(
    probes=st.integers(1, 60), size=st.sampled_from([5, 8, 16, 40]), together=st.integers(1, 4), seed=st.integers(0, 50)
)
def test_the_same_lists_and_candidates_are_chosen(
    native: NativeOps, probes: int, size: int, together: int, seed: int
) -> None:
    keys_XNE, query_XQE = clumps(1, 6000, 40, seed), normal(1, 24, 40, seed=seed + 2)
    made = InvertedFile.build(
        keys_XNE, Basis.fit(keys_XNE, query_XQE), size, (probes,), together=together, num_lists=90, seed=seed
    )
    with torch.no_grad():
        plain_XQR, one_XQR = (made.search(query_XQE, keys_XNE, 8, searched)[0] for searched in (None, native))
    same = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(plain_XQR[0], one_XQR[0], strict=True))
    # Of what is equal in int8, or nearly so before it is rounded, either may be taken.
    assert same >= 0.97 * plain_XQR.numel()


@torch.no_grad()
def test_keys_that_are_no_numbers_are_never_found(native: NativeOps) -> None:
    keys_XNE, query_XQE = clumps(1, 400, 16, 0), normal(1, 3, 16)
    made = InvertedFile.build(keys_XNE, Basis.fit(keys_XNE, query_XQE), 16, (5,), together=3, num_lists=5)
    keys_XNE[:, ::3] = torch.nan
    index_XQR, score_XQR = made.search(query_XQE, keys_XNE, 300, native)
    found_XQR = score_XQR > -torch.inf
    assert found_XQR[..., 0].all() and (index_XQR[found_XQR] % 3 != 0).all()
    assert (index_XQR[~found_XQR] == 0).all() and score_XQR.isnan().sum() == 0


@st.composite
def questions(draw: st.DrawFn) -> tuple:
    """Trained memory heads, their queries and local attention, and what was found in a bank."""
    batch, kv_heads, group, tokens, top_k = (draw(st.integers(1, most)) for most in (3, 3, 3, 4, 70))
    head_dim, seed = draw(st.sampled_from([4, 16, 64, 72])), draw(st.integers(0, 999))
    attention = MemoryAttention(
        1, kv_heads, group, head_dim, head_dim**-0.5, "joint", draw(st.booleans()), draw(st.booleans())
    )
    with torch.no_grad():
        for i, parameter in enumerate(attention.parameters()):
            parameter += 0.5 * normal(*parameter.shape, seed=seed + i)
    shape, size = (batch, kv_heads, group, tokens), draw(st.integers(1, 300))
    keys_PNE, values_PNE = (
        normal(kv_heads, size + 3, head_dim, seed=seed + 50 + i).bfloat16()[:, :size] for i in range(2)
    )
    slot_BKGTR = torch.randint(size, (*shape, top_k), generator=torch.Generator().manual_seed(seed))
    missing_BKGTR = normal(*shape, top_k, seed=seed + 60) > draw(st.sampled_from([-9.0, 0.0, 9.0]))
    score_BKGTR = torch.zeros(slot_BKGTR.shape).masked_fill(missing_BKGTR, -torch.inf)
    pool_BK = torch.arange(kv_heads).expand(batch, kv_heads)
    size_B = 10 ** (3 + normal(batch, seed=seed + 61)).clamp(0, 6)
    places = pool_BK, slot_BKGTR, score_BKGTR, slot_BKGTR
    found = RetrievedRows(keys_PNE, values_PNE, *places, size_B, slot_BKGTR)
    # As heads of a larger tensor lie, and tokens behind heads.
    query_BKGTE = 3 * normal(batch, tokens, kv_heads, group, head_dim, seed=seed + 62).permute(0, 2, 3, 1, 4)
    return attention, query_BKGTE, normal(*shape, head_dim, seed=seed + 63), normal(*shape, seed=seed + 64), found


@settings(max_examples=60)
@given(case=questions())
@torch.no_grad()
def test_joint_attention_is_what_the_plain_one_is(native: NativeOps, case: tuple) -> None:
    attention, *inputs, found = case
    sums, compiled = PassageSums(), PassageSums()
    for _ in range(2):  # the second token knows what the first one found
        for each in (sums, compiled):
            each.start()
        plain_BKGTE, plain = attention(*inputs, found, sums)
        joint_BKGTE, joint = attention(*inputs, replace(found, native=native), compiled)
    for layer, kept_BP in sums.kept.items():
        torch.testing.assert_close(compiled.kept[layer], kept_BP, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(joint_BKGTE, plain_BKGTE, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(joint.mass_BKGT, plain.mass_BKGT, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(joint.weight_BKGTR, plain.weight_BKGTR, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(joint.log_weight_BKGTR, plain.log_weight_BKGTR, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(joint.log_match_BKGTR, plain.log_match_BKGTR, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_it_does_not_take_is_left_to_others(native: NativeOps) -> None:
    rows_NE, query_QE = torch.zeros(9, 4, dtype=torch.bfloat16), torch.zeros(2, 4)
    assert native.takes(query_QE, rows_NE) and native.takes(query_QE, rows_NE[2:5])
    assert not native.takes(query_QE, rows_NE.float()) and not native.takes(query_QE.double(), rows_NE)
    assert not native.takes(query_QE, rows_NE[:, ::2])
    with torch.enable_grad():
        assert not native.takes(query_QE, rows_NE)


@torch.no_grad()
def test_compiled_decoding_reads_so(native: NativeOps, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids_T = tiny.model(), tiny.tokens(9)
    bank = tiny.bank(model, 30)
    plain_BTV = model(ids_T[None], bank).logits_BTV
    taken = []
    joint_rows = NativeOps.joint_rows
    monkeypatch.setattr(NativeOps, "joint_rows", lambda *args: taken.append(1) or joint_rows(*args))
    model._native = native
    torch.testing.assert_close(model(ids_T[None], bank).logits_BTV, plain_BTV, atol=1e-4, rtol=1e-4)
    assert taken
    reader = model.reader(bank, 1)
    assert isinstance(reader, BankReader) and reader.native is native
