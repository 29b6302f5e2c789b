"""The index of a bank: what it finds, what it says it finds, and which kind it is."""

from __future__ import annotations

import json

import pytest
import torch
from test_ivf import shares
from test_sketch import keys_and_queries

from longmem import approximate
from longmem.approximate import BankIndex, fingerprint
from longmem.errors import ConfigError
from longmem.ivf import InvertedFile
from longmem.lists import KeyLists
from longmem.ops import topk_scan
from longmem.sketch import Sketch, halves, some

KEYS_HNE, QUERY_HQE = keys_and_queries(3, 1200, 200)
TOP_K = 8


@pytest.fixture(scope="module", params=["sketches", "lists", "key lists"])
def index(request: pytest.FixtureRequest) -> BankIndex:
    if request.param == "key lists":
        return by_key_lists()
    return BankIndex.choose(KEYS_HNE, QUERY_HQE, top_k=TOP_K, target=0.95, lists=request.param == "lists")


def by_key_lists() -> BankIndex:
    """As it is made on a GPU."""
    pairs = zip(KEYS_HNE.split(1), QUERY_HQE.split(1), strict=True)
    heads = tuple(KeyLists.choose(*pair, top_k=TOP_K, target=0.95, size=16, num_lists=20) for pair in pairs)
    return BankIndex(heads, TOP_K, 0.95, fingerprint(KEYS_HNE))


def test_the_recall_it_reports_is_what_it_finds(index: BankIndex) -> None:
    """With queries that chose nothing."""
    measuring_HQE = some(halves(QUERY_HQE)[1])
    truth_HQR, _ = topk_scan(measuring_HQE, KEYS_HNE, TOP_K)
    # One after another: queries that are asked at once may find more.
    found = [index.search(slice(0, 3), query_H1E, KEYS_HNE, TOP_K)[0] for query_H1E in measuring_HQE.split(1, dim=1)]
    found_HQR = torch.cat(found, dim=1)
    assert list(index.recall) == pytest.approx(shares(found_HQR, truth_HQR))
    assert all(0.8 < recall <= 1 for recall in index.recall)
    assert len(index.kinds) == 3 and all("coordinates" in kind for kind in index.kinds)


def test_scores_are_those_of_the_keys_and_heads_are_apart(index: BankIndex) -> None:
    index_HQR, score_HQR = index.search(slice(0, 3), QUERY_HQE, KEYS_HNE, TOP_K)
    true_HQN = QUERY_HQE @ KEYS_HNE.float().mT
    torch.testing.assert_close(true_HQN.gather(-1, index_HQR), score_HQR, atol=1e-3, rtol=1e-4)
    part_KQR, _ = index.search(slice(1, 3), QUERY_HQE[1:], KEYS_HNE[1:], TOP_K)
    assert torch.equal(part_KQR, index_HQR[1:])


def test_appended_tokens_are_found(index: BankIndex) -> None:
    late_HnE = (100 * QUERY_HQE[:, :5]).bfloat16()
    keys_HNE = torch.cat((KEYS_HNE, late_HnE), dim=1)
    index_HQR, _ = index.search(slice(0, 3), QUERY_HQE[:, :5], keys_HNE, TOP_K)
    assert torch.equal(index_HQR[..., 0], (QUERY_HQE[:, :5] @ late_HnE.float().mT).argmax(-1) + len(index))
    assert not index.outgrown(1200) and not index.outgrown(1500) and index.outgrown(1501)


def test_its_state_gives_back_the_same_index(index: BankIndex) -> None:
    tensors, settings = index.state()
    again = BankIndex.from_state(tensors, json.loads(json.dumps(settings)))
    assert (again.top_k, again.target, again.recall, len(again)) == (TOP_K, 0.95, index.recall, 1200)
    assert again.fingerprint == index.fingerprint == fingerprint(KEYS_HNE)
    for mine, its in zip(
        *(made.search(slice(0, 3), QUERY_HQE, KEYS_HNE, TOP_K) for made in (again, index)), strict=True
    ):
        assert torch.equal(mine, its)


def test_each_head_has_the_least_that_it_needs() -> None:
    """One head asks in few directions, the other in all."""
    keys_HNE = torch.cat((KEYS_HNE[:2], torch.zeros(2, 1200, 16).bfloat16()), dim=-1)
    keys_HNE[1] = torch.randn(1200, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    query_HQE = torch.nn.functional.pad(QUERY_HQE[:2], (0, 16))
    query_HQE[1] = torch.randn(200, 32, generator=torch.Generator().manual_seed(2))
    first, second = BankIndex.choose(keys_HNE, query_HQE, top_k=TOP_K).heads
    assert isinstance(first, Sketch) and isinstance(second, Sketch)
    assert (first.size, second.size) == (16, 32)


def test_large_banks_are_searched_by_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    for least, kind in ((1200, InvertedFile), (1201, Sketch)):
        monkeypatch.setitem(approximate.LISTS_FROM, "cpu", least)
        heads = BankIndex.choose(KEYS_HNE[:1], QUERY_HQE[:1], top_k=TOP_K, target=0.9, together=2).heads
        assert isinstance(heads[0], kind)
        assert not isinstance(heads[0], InvertedFile) or heads[0].together == 2


def test_a_head_that_lists_cannot_serve_has_a_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(*_: object, **__: object) -> InvertedFile:
        raise ConfigError("the target is out of reach")

    monkeypatch.setattr(InvertedFile, "choose", out_of_reach)
    (head,) = BankIndex.choose(KEYS_HNE[:1], QUERY_HQE[:1], top_k=TOP_K, lists=True).heads
    assert isinstance(head, Sketch) and head.recall[0] > 0.9


def test_a_target_out_of_reach_takes_more_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a bank's keys are more alike than those among which coordinates were chosen."""
    choose, tried = InvertedFile.choose, []

    def reluctant(*parts: object, size: int, **settings: object) -> InvertedFile:
        tried.append(size)
        if len(tried) == 1:
            raise ConfigError("the target is out of reach")
        return choose(*parts, size=size, **settings)

    monkeypatch.setattr(InvertedFile, "choose", reluctant)
    keys_HNE = torch.cat((KEYS_HNE[:1], torch.zeros(1, 1200, 48).bfloat16()), dim=-1)
    query_HQE = torch.nn.functional.pad(QUERY_HQE[:1], (0, 48))
    (head,) = BankIndex.choose(keys_HNE, query_HQE, top_k=TOP_K, target=0.9, lists=True).heads
    assert isinstance(head, InvertedFile) and head.size == tried[1] == tried[0] + 8


def test_fingerprints_tell_keys_apart() -> None:
    seen = {fingerprint(KEYS_HNE), fingerprint(KEYS_HNE.flip(1)), fingerprint(KEYS_HNE[:, 1:])}
    assert len(seen | {fingerprint(KEYS_HNE.float())}) == 4
    assert fingerprint(torch.cat((KEYS_HNE, KEYS_HNE), dim=1)[:, :1200]) == fingerprint(KEYS_HNE)


@pytest.mark.parametrize("target", [0.0, -1.0, 1.1, float("nan")])
def test_a_target_is_a_share(target: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        BankIndex.choose(KEYS_HNE, QUERY_HQE, top_k=TOP_K, target=target)


def test_what_is_too_small_is_searched_exactly() -> None:
    with pytest.raises(ConfigError, match=r"127 tokens.*from 128 on.*exactly"):
        BankIndex.choose(KEYS_HNE[:, :127], QUERY_HQE, top_k=TOP_K)
    assert len(BankIndex.choose(KEYS_HNE[:, :128], QUERY_HQE, top_k=TOP_K)) == 128
