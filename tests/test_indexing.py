"""Making an index with a model: recorded queries, and banks that are searched by it."""

from __future__ import annotations

import pytest
import tiny
import torch
from conftest import TINY_TEXT

from longmem import indexing
from longmem.bank import MemoryBank
from longmem.errors import BankMismatchError, ConfigError
from longmem.indexing import make_index, recorded_queries, steps
from longmem.model import LongMem
from longmem.ops import topk_scan


@pytest.fixture(scope="module")
def model() -> LongMem:
    return tiny.model()


@pytest.fixture
def bank(model: LongMem) -> MemoryBank:
    return tiny.bank(model, 600)


def test_queries_are_those_that_the_model_asks(model: LongMem, bank: MemoryBank) -> None:
    """First those of every other stretch, then those of the rest."""
    query_HQE = recorded_queries(model, bank)
    length, group = 600 // 17, 2
    assert query_HQE.shape == (3, 16 * length * group, 8) and query_HQE.dtype == torch.float32
    for place, window in enumerate([*range(0, 16, 2), *range(1, 16, 2)]):
        first = (window + 1) * 600 // 17
        ids_T = bank.token_ids_N[first : first + length]
        reader, asked = model.reader(bank.between(0, first), rows=1), {}
        assert reader is not None
        model.read(
            model.with_prefix(ids_T)[None],
            lambda layer, query, asked=asked, reader=reader: (asked.update({layer: query[0]}), reader(layer, query))[1],
        )
        for head, (layer, k) in enumerate([(1, 0), (1, 1), (2, 0)]):
            mine_QE = query_HQE[head, place * length * group : (place + 1) * length * group]
            torch.testing.assert_close(mine_QE, asked[layer][k, :, 1:].transpose(0, 1).flatten(0, 1))


def test_only_the_end_of_what_is_remembered_is_read(
    model: LongMem, bank: MemoryBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_HQE = recorded_queries(model, bank)
    monkeypatch.setattr(indexing, "CONTEXT", 20)
    part_HQE = recorded_queries(model, bank)
    # What the first memory layer asks depends on nothing that was found.
    torch.testing.assert_close(part_HQE[:2], whole_HQE[:2])
    assert not torch.allclose(part_HQE[2], whole_HQE[2])


def test_reading_by_an_index_is_nearly_reading_exactly(model: LongMem, bank: MemoryBank) -> None:
    done: list[int] = []
    index = make_index(model, bank, recall=0.99, on_step=done.append)
    assert sum(done) == steps(model) == 19
    assert index.target == 0.99 and index.top_k == 8 and len(index) == 600
    query_HQE = recorded_queries(model, bank)
    truth_HQR, _ = topk_scan(query_HQE, bank.keys_HNE, 8)
    found_HQR, _ = index.search(slice(0, 3), query_HQE, bank.keys_HNE, 8)
    assert float((truth_HQR == found_HQR).float().mean()) > 0.95
    ids_BT = tiny.tokens(2, 30, seed=5)
    exact_BTV = model(ids_BT, bank).logits_BTV.detach()
    bank.use_index(index)
    output = model(ids_BT, bank)
    assert float((output.logits_BTV.detach() - exact_BTV).abs().max()) < 0.2 * float(exact_BTV.std())
    apart = model(ids_BT, [bank, bank.between(0, 600)])
    torch.testing.assert_close(apart.logits_BTV, output.logits_BTV, atol=1e-4, rtol=1e-4)
    bank.use_index(None)
    assert torch.equal(model(ids_BT, bank).logits_BTV, exact_BTV)


def test_an_index_of_all_coordinates_changes_nothing(model: LongMem, bank: MemoryBank) -> None:
    ids_BT = tiny.tokens(1, 30, seed=5)
    exact_BTV = model(ids_BT, bank).logits_BTV
    bank.use_index(make_index(model, bank, recall=1.0))
    torch.testing.assert_close(model(ids_BT, bank).logits_BTV, exact_BTV, atol=1e-4, rtol=1e-4)


def test_a_text_can_be_given(tiny_model_dir) -> None:
    model = LongMem.from_pretrained(tiny_model_dir, device="cpu")
    bank = model.new_bank()
    model.write_text(bank, TINY_TEXT * 4, source="notes")
    index = model.make_index(bank, text="The moon is quiet. " * 40)
    assert len(index) == len(bank) and all(0 <= recall <= 1 for recall in index.recall)
    with pytest.raises(ConfigError, match="expected at least 136"):
        make_index(model, bank, text="Too short.")


def test_what_cannot_have_an_index(model: LongMem, bank: MemoryBank) -> None:
    with pytest.raises(ConfigError, match=r"remembers 127 tokens.*128"):
        make_index(model, tiny.bank(model, 127))
    chunks = tiny.model(chunk_size=4)
    with pytest.raises(ConfigError, match="chunks of 4"):
        make_index(chunks, tiny.bank(chunks, 200))
    with pytest.raises(BankMismatchError):
        make_index(tiny.model(seed=3), bank)
    with pytest.raises(ConfigError, match="device='cpu'"):
        make_index(model, bank.to("meta"))
