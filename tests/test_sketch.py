"""Sketches: how much they find, and that they say so truly."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem import sketch
from longmem.ops import Pools, cpu, topk_scan
from longmem.sketch import Basis, GpuSketch, Sketch, halves, recall, some


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keys_and_queries(searches: int, keys: int, queries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys far from zero; queries that vary in few of their sixteen directions, as those of attention do."""
    directions_XDE = normal(searches, 4, 16, seed=seed)
    query_XQE = normal(searches, queries, 4, seed=seed + 1) @ directions_XDE
    query_XQE = query_XQE + 0.05 * normal(searches, queries, 16, seed=seed + 2)
    keys_XNE = 3.0 + normal(searches, keys, 16, seed=seed + 3)
    return keys_XNE.bfloat16(), query_XQE


def same_scores(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[1], truth[1], atol=1e-4, rtol=1e-4)


@settings(max_examples=40)
@given(
    searches=st.integers(1, 3),
    keys=st.integers(1, 500),
    tail=st.integers(0, 30),
    top_k=st.integers(1, 9),
    size=st.sampled_from([3, 8, 16]),
    seed=st.integers(0, 50),
)
def test_exact_search_is_exact(searches: int, keys: int, tail: int, top_k: int, size: int, seed: int) -> None:
    """Whatever is left out, and with tokens appended since."""
    keys_XNE, query_XQE = keys_and_queries(searches, keys + tail, 30, seed)
    sketch = Sketch.build(keys_XNE[:, :keys], Basis.fit(keys_XNE[:, :keys], query_XQE), size)
    found = sketch.search(query_XQE[:, :5], keys_XNE, top_k, exact=True)
    same_scores(found, topk_scan(query_XQE[:, :5], keys_XNE, top_k))
    real_XQR = found[1] > -torch.inf
    scores_XQR = (query_XQE[:, :5] @ keys_XNE.float().mT).gather(-1, found[0])
    torch.testing.assert_close(scores_XQR[real_XQR], found[1][real_XQR], atol=1e-4, rtol=1e-4)


def test_all_coordinates_prove_most_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    keys_XNE, query_XQE = keys_and_queries(1, 20_000, 40)
    sketch = Sketch.build(keys_XNE, Basis.fit(keys_XNE, query_XQE), 16)
    again = []
    monkeypatch.setattr(
        cpu, "topk_scan", lambda query_XQE, *given: again.append(query_XQE) or topk_scan(query_XQE, *given)
    )
    sketch.search(query_XQE, keys_XNE, 16, exact=True)
    assert sum(query_XQE.shape[1] for query_XQE in again) < 4


def test_a_basis_changes_no_score() -> None:
    keys_XNE, query_XQE = keys_and_queries(2, 300, 50)
    basis = Basis.fit(keys_XNE, query_XQE)
    coordinate_XNE = (keys_XNE.float() - basis.centre_XE[:, None]) @ basis.keys_XEE
    score_XQN = (query_XQE @ basis.queries_XEE) @ coordinate_XNE.mT + query_XQE @ basis.centre_XE[..., None]
    torch.testing.assert_close(score_XQN, query_XQE @ keys_XNE.float().mT, atol=1e-3, rtol=1e-3)


def test_the_first_coordinates_are_those_that_queries_vary_in() -> None:
    keys_XNE, query_XQE = keys_and_queries(2, 3000, 400)
    found = {}
    for fitted in ("queries", "keys"):
        basis = Basis.fit(keys_XNE, query_XQE if fitted == "queries" else keys_XNE.float() - 3.0)
        index_XQR, _ = Sketch.build(keys_XNE, basis, 4).search(query_XQE[:, :50], keys_XNE, 8)
        found[fitted] = recall(index_XQR, topk_scan(query_XQE[:, :50], keys_XNE, 8)[0]).min()
    assert found["queries"] > 0.9 > found["keys"]


def test_choose_takes_as_few_coordinates_as_the_target_needs() -> None:
    keys_XNE, query_XQE = keys_and_queries(2, 1000, 200)
    # Wider vectors whose last directions no query asks for.
    keys_XNE = torch.cat((keys_XNE, normal(2, 1000, 48, seed=9).bfloat16()), dim=-1)
    query_XQE = torch.nn.functional.pad(query_XQE, (0, 48))
    sketch = Sketch.choose(keys_XNE, query_XQE, top_k=8, target=0.99)
    assert sketch.codes_XNS.shape[-1] == 16
    measuring_XQE = some(halves(query_XQE)[1])
    index_XQR, _ = sketch.search(measuring_XQE, keys_XNE, 8)
    truth_XQR, _ = topk_scan(measuring_XQE, keys_XNE, 8)
    for x in range(2):
        hits = [len(set(i.tolist()) & set(t.tolist())) for i, t in zip(index_XQR[x], truth_XQR[x], strict=True)]
        assert sketch.recall[x] == pytest.approx(sum(hits) / (8 * len(hits)))


def test_appended_tokens_are_found() -> None:
    keys_XNE, query_XQE = keys_and_queries(2, 900, 40)
    keys_XNE[:, -1] = 100 * query_XQE[:, 0].bfloat16()
    sketch = Sketch.build(keys_XNE[:, :700], Basis.fit(keys_XNE[:, :700], query_XQE), 8)
    index_XQR, _ = sketch.search(query_XQE[:, :1], keys_XNE, 4)
    assert (index_XQR[:, 0, 0] == 899).all()


def test_a_slice_searches_its_own_heads() -> None:
    keys_XNE, query_XQE = keys_and_queries(3, 700, 40)
    sketch = Sketch.build(keys_XNE, Basis.fit(keys_XNE, query_XQE), 8)
    whole, part = sketch.search(query_XQE, keys_XNE, 4), sketch[1:].search(query_XQE[1:], keys_XNE[1:], 4)
    assert torch.equal(whole[0][1:], part[0])


def test_equal_keys_and_zero_queries() -> None:
    keys_XNE, query_XQE = torch.ones(1, 900, 8).bfloat16(), torch.zeros(1, 3, 8)
    sketch = Sketch.build(keys_XNE, Basis.fit(keys_XNE, torch.ones(1, 5, 8)), 8)
    for exact in (False, True):
        index_XQR, score_XQR = sketch.search(query_XQE, keys_XNE, 5, exact=exact)
        assert (score_XQR == 0).all() and all(len(row_R.unique()) == 5 for row_R in index_XQR[0])


@given(st.integers(1, 40))
def test_halves_do_not_overlap(queries: int) -> None:
    query_XQE = torch.arange(queries).float().expand(1, 1, -1).mT
    first, second = halves(query_XQE)
    assert torch.equal(torch.cat((first, second), dim=1), query_XQE)


def test_its_state_gives_back_the_same_sketch() -> None:
    keys_XNE, query_XQE = keys_and_queries(2, 900, 40)
    sketch = Sketch.choose(keys_XNE, query_XQE, top_k=4)
    tensors, settings = sketch.state()
    again = Sketch.from_state(tensors, json.loads(json.dumps(settings)))
    assert again.recall == sketch.recall and len(again.recall) == 2
    for exact in (False, True):
        mine, its = (s.search(query_XQE, keys_XNE, 4, exact=exact) for s in (again, sketch))
        assert torch.equal(mine[0], its[0]) and torch.equal(mine[1], its[1])


@pytest.mark.parametrize("tail", [0, 150])
def test_a_gpu_finds_as_much(tail: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its kernels, in Triton's interpreter: from a tensor, and from pools with room for more."""
    search = pytest.importorskip("longmem.ops.triton.search")
    keys_XNE, query_XQE = (rows.float() for rows in keys_and_queries(2, 1500 + tail, 200))
    built = Sketch.build(keys_XNE[:, :1500], Basis.fit(keys_XNE[:, :1500], query_XQE[:, 20:]), 8)
    query_XQE = query_XQE[:, :3]
    truth_XQR, score_XQR = topk_scan(query_XQE, keys_XNE, 8)
    for name in ("topk_coded", "topk_scan"):
        monkeypatch.setattr(sketch, name, getattr(search, name))
    monkeypatch.setattr(sketch, "reads_apart", lambda device, top_k: True)
    found = built.search(query_XQE, keys_XNE, 8)
    assert recall(found[0], truth_XQR).min() > 0.95
    torch.testing.assert_close(found[1][..., 0], score_XQR[..., 0], atol=1e-3, rtol=1e-4)
    true_XQR = (query_XQE @ keys_XNE.mT).gather(-1, found[0])
    torch.testing.assert_close(found[1], true_XQR, atol=1e-3, rtol=1e-4)
    roomy_XNE = torch.nn.functional.pad(keys_XNE, (0, 0, 0, 300), value=torch.nan)
    for room_XNE in (roomy_XNE, roomy_XNE[:, : 1500 + tail]):
        length_X = torch.full((2,), 1500 + tail)
        again = GpuSketch.of([built]).search(query_XQE, Pools.of(list(room_XNE)), 8, length_X)
        assert all(map(torch.equal, again, found))
        # A bank's heads are sketched one by one.
        ones = [built[:1], built[1:]]
        again = GpuSketch.of(ones).search(query_XQE, Pools.of(list(room_XNE)), 8, length_X)
        assert all(map(torch.equal, again, found))
