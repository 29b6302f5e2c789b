"""The plain implementation and every fast path of a CPU agree on the perplexity to four digits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor

from longmem.approximate import BankIndex
from longmem.bank import MemoryBank
from longmem.decoding import RowDecoder
from longmem.index import BankReader
from longmem.model import LongMem
from longmem.ops import cpu, reference
from longmem.retrieved import Retrieve, Retrieved

TOKENS, REMEMBERED = 24, 500


class PlainReader(BankReader):
    """Searches by the reference alone."""

    def _search(self, bank: MemoryBank, heads: slice, query_KQE: Tensor) -> tuple[Tensor, Tensor]:
        return reference.topk_scan(query_KQE.float(), bank.keys_HNE[heads], self.config.top_k)


@torch.no_grad()
def at_once(model: LongMem, retrieve: Retrieve) -> float:
    """Perplexity of a text read in one piece."""
    ids_T = model.with_prefix(tiny.tokens(TOKENS, seed=9))
    hidden_1TD, _ = model.read(ids_T[None, :-1], retrieve)
    return _perplexity(model.backbone.logits(hidden_1TD)[0], ids_T)


@torch.no_grad()
def one_by_one(model: LongMem, retrieve: Retrieve) -> float:
    """The same, token by token behind a cache."""
    ids_T, cache = model.with_prefix(tiny.tokens(TOKENS, seed=9)), model.new_cache()
    hidden = [model.read(token_1[None], retrieve, cache=cache)[0] for token_1 in ids_T[:-1].split(1)]
    return _perplexity(torch.cat([model.backbone.logits(hidden_11D)[0] for hidden_11D in hidden]), ids_T)


def _perplexity(logits_TV: Tensor, ids_T: Tensor) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:]).item())


@pytest.fixture(params=["llama", "gemma3", "llama, with evidence"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LongMem:
    monkeypatch.setattr(cpu, "has_bfloat16_products", lambda: True)
    family, _, evidence = request.param.partition(", ")
    made = tiny.model(family, passage_evidence=bool(evidence), newest_wins=bool(evidence))
    for layer in made.sidenet.layers if evidence else ():
        if hasattr(layer, "memory"):
            torch.nn.init.ones_(layer.memory.evidence_KG)
    return made


def compiled(model: LongMem, retrieve: Retrieve) -> float:
    model.decode_by(RowDecoder(model.backbone.family, compile=False))
    try:
        return one_by_one(model, retrieve)
    finally:
        model.decode_by(None)


@pytest.mark.parametrize("read", [at_once, one_by_one, compiled])
def test_fast_paths_agree_with_the_reference(model: LongMem, read: Callable[[LongMem, Retrieve], float]) -> None:
    assert TOKENS > cpu.FEW  # so that a text read at once is the reference's, attention to what was found included
    bank, searched = tiny.bank(model, REMEMBERED), []
    plain, fast = PlainReader([bank], model.config), BankReader([bank], model.config)

    def recording(layer: int, query_BKGTE: Tensor) -> Retrieved:
        searched.append(query_BKGTE[0].flatten(1, 2))
        return plain(layer, query_BKGTE)

    expected = at_once(model, recording)
    # The bank matters, or any search would do.
    assert abs(at_once(model, PlainReader([tiny.bank(model, REMEMBERED, seed=3)], model.config)) - expected) > 1e-2
    assert read(model, fast) == pytest.approx(expected, rel=5e-5)
    # So does the evidence of passages, where it is read.
    if model.config.passage_evidence:
        without = dataclasses.replace(model.config, passage_evidence=False)
        other = LongMem(model.backbone, without).eval()
        other.sidenet.load_state_dict(model.sidenet.state_dict(), strict=False)
        assert abs(at_once(other, PlainReader([bank], without)) - expected) > 1e-2
    # An index of all coordinates finds all there is to find.
    bank.use_index(BankIndex.choose(bank.keys_HNE, torch.cat(searched), top_k=model.config.top_k, target=1.0))
    assert bank.index is not None and min(bank.index.recall) == 1.0
    assert read(model, fast) == pytest.approx(expected, rel=5e-5)
