"""Inverted files: what they find, what they say they find, and that they can be kept."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import Tensor

from longmem import ivf
from longmem.errors import ConfigError, MissingExtraError
from longmem.ivf import InvertedFile
from longmem.ops import topk_scan
from longmem.sketch import halves, some


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def bank() -> tuple[Tensor, Tensor]:
    """Keys in clumps far from zero, and queries that do not look like them."""
    clump_XCE = 2 * normal(2, 30, 16)
    keys_XNE = clump_XCE[:, torch.arange(3000) % 30] + 0.5 * normal(2, 3000, 16, seed=1) + 3.0
    return keys_XNE.bfloat16(), normal(2, 300, 16, seed=2) * torch.linspace(0.2, 2, 16)


@pytest.fixture(scope="module")
def index(bank: tuple[Tensor, Tensor]) -> InvertedFile:
    pytest.importorskip("faiss")
    return InvertedFile.choose(*bank, top_k=8, target=0.95, size=12, num_lists=40)


def shares(index_XQR: Tensor, truth_XQR: Tensor) -> list[float]:
    counts = [
        [len(set(i.tolist()) & set(t.tolist())) for i, t in zip(*pair, strict=True)]
        for pair in zip(index_XQR, truth_XQR, strict=True)
    ]
    return [sum(count) / (len(count) * truth_XQR.shape[-1]) for count in counts]


def test_the_recall_it_reports_is_what_it_finds(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    keys_XNE, query_XQE = bank
    choosing_XQE, measuring_XQE = (some(half_XQE) for half_XQE in halves(query_XQE))
    truth_XQR, _ = topk_scan(measuring_XQE, keys_XNE, 8)
    assert list(index.recall) == pytest.approx(shares(index.search(measuring_XQE, keys_XNE, 8)[0], truth_XQR))
    truth_XQR, _ = topk_scan(choosing_XQE, keys_XNE, 8)
    assert min(shares(index.search(choosing_XQE, keys_XNE, 8)[0], truth_XQR)) >= 0.95
    assert all(1 < probes < 40 for probes in index.probes)


def test_scores_are_those_of_the_keys(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    keys_XNE, query_XQE = bank
    index_XQR, score_XQR = index.search(query_XQE[:, :9], keys_XNE, 8)
    true_XQN = query_XQE[:, :9] @ keys_XNE.float().mT
    torch.testing.assert_close(true_XQN.gather(-1, index_XQR), score_XQR, atol=1e-3, rtol=1e-4)
    assert (score_XQR.diff(dim=-1) <= 0).all()


def test_appended_tokens_are_found(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    keys_XNE, query_XQE = bank
    late_XNE = (100 * query_XQE[:, :5]).bfloat16()
    index_XQR, _ = index.search(query_XQE[:, :5], torch.cat((keys_XNE, late_XNE), dim=1), 8)
    best_XQ = (query_XQE[:, :5] @ late_XNE.float().mT).argmax(-1) + 3000
    assert torch.equal(index_XQR[..., 0], best_XQ)


def test_a_search_that_finds_too_few_says_so(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    """One list holds fewer keys than are asked for."""
    keys_XNE, query_XQE = bank
    narrow = InvertedFile(index.basis, index.size, index.lists, (1, 1), index.recall)
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
    for mine, its in zip(again.search(query_XQE, keys_XNE, 8), index.search(query_XQE, keys_XNE, 8), strict=True):
        assert torch.equal(mine, its)


def test_known_settings_build_the_same_index(bank: tuple[Tensor, Tensor], index: InvertedFile) -> None:
    keys_XNE, query_XQE = bank
    again = InvertedFile.build(keys_XNE, index.basis, 12, index.probes, num_lists=40)
    assert again.recall == ()
    for x in range(2):
        one = slice(x, x + 1)
        mine = again[one].search(query_XQE[one], keys_XNE[one], 8)[0]
        assert torch.equal(mine, index.search(query_XQE, keys_XNE, 8)[0][one])


def test_what_cannot_be_built_says_why(bank: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("faiss")
    keys_XNE, query_XQE = bank
    with pytest.raises(ConfigError, match="exactly"):
        InvertedFile.choose(keys_XNE[:, :20], query_XQE)
    with pytest.raises(ConfigError, match="larger size"):
        InvertedFile.choose(keys_XNE, query_XQE, top_k=8, target=0.99, size=1, num_lists=40)


def test_without_faiss_the_extra_is_named(bank: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'longmem\[faiss\]'"):
        ivf.import_faiss()
