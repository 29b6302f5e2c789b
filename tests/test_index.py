"""Searching banks, against a search of each row by hand."""

from __future__ import annotations

import pytest
import torch
from banks import HEADS, config, make_bank, naive_search, normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longmem import index, lists, retrieved, sketch
from longmem.approximate import BankIndex, fingerprint
from longmem.bank import BankEntry, MemoryBank
from longmem.config import BankSpec
from longmem.index import BankReader, PlacedReader, search_tokens
from longmem.lists import KeyLists
from longmem.retrieved import RetrievedRows
from longmem.sketch import Basis

sizes = st.lists(st.none() | st.integers(0, 20), min_size=1, max_size=3)


@given(sizes, st.sampled_from([(4, 1), (1, 1), (4, 2), (6, 3), (4, 4)]), st.sampled_from([1, 2]), st.integers(0, 99))
def test_a_reader_searches_each_row_in_its_own_bank(
    bank_sizes: list[int | None], reads: tuple[int, int], layer: int, seed: int
) -> None:
    top_k, chunk_size = reads
    banks = [None if size is None else make_bank(size, seed + row) for row, size in enumerate(bank_sizes)]
    heads = [0, 1] if layer == 1 else [2]
    query_BKGTE = normal(len(banks), len(heads), 2, 3, 4, seed=seed)
    found = BankReader(banks, config(top_k, chunk_size))(layer, query_BKGTE)
    assert found.rows(found.keys_PNE).shape == found.rows(found.values_PNE).shape == (*query_BKGTE.shape[:-1], top_k, 4)
    assert found.bank_size_B.tolist() == [size or 0 for size in bank_sizes]
    for b, bank in enumerate(banks):
        for k, head in enumerate(heads):
            for g in range(2):
                for t in range(3):
                    valid_R = found.valid_BKGTR[b, k, g, t]
                    if bank is None:
                        assert not valid_R.any()
                        continue
                    best = naive_search(query_BKGTE[b, k, g, t], bank.keys_HNE[head], top_k, chunk_size)
                    assert found.index_BKGTR[b, k, g, t][valid_R].tolist() == best
                    assert torch.equal(found.rows(found.keys_PNE)[b, k, g, t][valid_R], bank.keys_HNE[head, best])
                    assert torch.equal(found.rows(found.values_PNE)[b, k, g, t][valid_R], bank.values_HNE[head, best])


@given(st.integers(0, 11), st.sampled_from([2, 4]), st.booleans())
def test_a_chunk_that_is_not_full_cannot_be_found(size: int, chunk_size: int, padded: bool) -> None:
    keys_XNE = torch.full((2, 12 if padded else size, 3), torch.nan)
    keys_XNE[:, :size] = normal(2, size, 3)
    length_X = torch.full((2,), size) if padded else None
    index_XQR, score_XQR = search_tokens(normal(2, 5, 3, seed=1), keys_XNE, 2 * chunk_size, chunk_size, length_X)
    valid_XQR = score_XQR > -torch.inf
    whole = size // chunk_size * chunk_size
    assert (valid_XQR.sum(-1) == min(whole, 2 * chunk_size)).all()
    assert (index_XQR[valid_XQR] < whole).all()
    assert (index_XQR[~valid_XQR] == 0).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_bank_smaller_than_a_chunk_is_read_as_empty(size: int) -> None:
    found = BankReader([make_bank(size)], config(4, 4))(1, normal(1, 2, 2, 3, 4))
    assert not found.valid_BKGTR.any()


def grow(bank: MemoryBank, tokens: int, seed: int = 5) -> None:
    offsets_N2 = torch.stack([torch.arange(tokens), torch.arange(1, tokens + 1)], dim=1)
    keys_HNE, values_HNE = 3 * normal(3, tokens, 4, seed=seed), normal(3, tokens, 4, seed=seed + 1)
    bank.append(BankEntry(f"more {len(bank)}", "y" * tokens, 0, torch.arange(tokens), offsets_N2, keys_HNE, values_HNE))


@pytest.fixture(params=["tensors", "addresses"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a `PlacedReader` finds rows: as a CPU does, or as kernels on a GPU do, in Triton's interpreter."""
    if request.param == "addresses":
        triton = pytest.importorskip("longmem.ops.triton")
        for module, name in ((index, "topk_scan"), (retrieved, "attend_rows"), (retrieved, "gather_rows")):
            monkeypatch.setattr(module, name, getattr(triton, name))
    return request.param


def test_a_reader_of_places_reads_what_banks_hold_now(by: str) -> None:
    one, other, device = make_bank(12), make_bank(30, seed=1), torch.device("cpu")
    query_BKGTE = normal(3, 2, 2, 1, 4)
    assert PlacedReader([one, other, None], config(), device).room < 1 << 15
    for banks in ([one, other, None], [one, one, one], [None, make_bank(0), other], [one, one, one.between(3, 8)]):
        placed = PlacedReader(banks, config(), device)
        for layer, heads in ((1, 2), (2, 1)):
            same(placed(layer, query_BKGTE[:, :heads]), BankReader(banks, config()), layer, query_BKGTE[:, :heads])
        # Banks grow where they lie or move to another place, others come in their stead, and one becomes empty.
        for changed in (banks, [banks[2], banks[0], banks[1]]):
            for bank in {id(bank): bank for bank in banks if bank in (one, other)}.values():
                grow(bank, 9)
            assert placed.fits(changed)
            placed.read(changed)
            same(placed(1, query_BKGTE), BankReader(changed, config()), 1, query_BKGTE)
        placed.read([None] * 3)
        assert not placed(1, query_BKGTE).valid_BKGTR.any()


def test_a_reader_of_places_says_what_it_was_not_made_for() -> None:
    one, other, device = make_bank(12), make_bank(30, seed=1), torch.device("cpu")
    apart, shared = PlacedReader([one, other], config(), device), PlacedReader([one, one], config(), device)
    assert apart.fits([other, one]) and apart.fits([None, one]) and apart.fits([one, one.between(0, 5)])
    assert shared.fits([other, other]) and not shared.fits([one, other]) and not shared.fits([one, one.between(0, 5)])
    assert not apart.fits([one, one]) and not apart.fits([one, other, other])
    one._reserve(apart.room)
    assert apart.fits([one, other])
    one._reserve(apart.room + 1)
    assert not apart.fits([one, other])
    rounded = MemoryBank(BankSpec("tiny", "0" * 64, HEADS, 4, "bfloat16"))
    assert not apart.fits([rounded, None])
    assert not PlacedReader.takes([one, other], config(), device)  # a CPU has no use for it


def test_a_reader_of_places_reads_by_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bank of all rows, in Triton's interpreter; tokens appended since are found as well."""
    search = pytest.importorskip("longmem.ops.triton.search")
    for module, names in ((index, ["topk_scan"]), (sketch, ["topk_scan", "topk_coded"])):
        for name in names:
            monkeypatch.setattr(module, name, getattr(search, name))
    monkeypatch.setattr(sketch, "_AGAIN", 0)  # so few keys would be searched exactly
    bank, query_BKGTE, asked = make_bank(100), normal(3, 2, 2, 1, 4), []
    bank.use_index(BankIndex.choose(bank.keys_HNE, normal(3, 200, 4, seed=7), top_k=4, target=1.0))
    monkeypatch.setattr(sketch, "topk_coded", lambda *given: asked.append(given) or search.topk_coded(*given))
    placed = PlacedReader([bank] * 3, config(), torch.device("cpu"))
    for _ in range(2):
        found, made = placed(1, query_BKGTE), bank.index
        bank.use_index(None)
        exact = BankReader([bank] * 3, config())(1, query_BKGTE)
        assert not placed.fits([bank] * 3)
        bank.use_index(made)
        assert placed.fits([bank] * 3) and len(asked) == 1  # both heads at once
        assert torch.equal(found.index_BKGTR, exact.index_BKGTR) and torch.equal(found.valid_BKGTR, exact.valid_BKGTR)
        asked.clear()
        grow(bank, 9)
        placed.read([bank] * 3)


def use_lists(bank: MemoryBank) -> None:
    """An index as one is made on a GPU, which reads all lists: then it finds what exact search does."""
    asked_HQE = normal(3, 200, 4, seed=7)
    heads = [
        KeyLists.build(keys_1NE, Basis.fit(keys_1NE, query_1QE), 4, 1000, num_lists=9)
        for keys_1NE, query_1QE in zip(bank.keys_HNE.split(1), asked_HQE.split(1), strict=True)
    ]
    bank.use_index(BankIndex(tuple(heads), 4, 1.0, fingerprint(bank.keys_HNE)))


def test_a_reader_of_places_reads_by_lists(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both heads of a layer at once; tokens appended since are found as well."""
    asked, search_by_lists = [], lists.topk_listed
    if by == "addresses":
        search_by_lists = pytest.importorskip("longmem.ops.triton").topk_listed
    monkeypatch.setattr(lists, "topk_listed", lambda *given: asked.append(given) or search_by_lists(*given))
    bank, query_BKGTE = make_bank(400), normal(3, 2, 2, 1, 4)
    use_lists(bank)
    placed = PlacedReader([bank] * 3, config(), torch.device("cpu"))
    for _ in range(2):
        found, made = placed(1, query_BKGTE), bank.index
        assert len(asked) == 1
        bank.use_index(None)
        exact = BankReader([bank] * 3, config())(1, query_BKGTE)
        bank.use_index(made)
        assert torch.equal(found.index_BKGTR, exact.index_BKGTR) and torch.equal(found.valid_BKGTR, exact.valid_BKGTR)
        asked.clear()
        grow(bank, 9)
        placed.read([bank] * 3)


def test_a_reader_has_room_for_some_tokens_that_an_index_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_LEAST_ROOM", 16)
    bank = make_bank(400)
    bank._reserve(1000)
    use_lists(bank)
    placed = PlacedReader([bank], config(), torch.device("cpu"))
    assert (placed.room, placed.late) == (1024, 16)
    grow(bank, 16)
    assert placed.fits([bank])
    grow(bank, 1)
    assert not placed.fits([bank])
    assert PlacedReader([bank], config(), torch.device("cpu")).late == 32
    # Without an index, room for the bank is enough.
    bank.use_index(None)
    placed = PlacedReader([bank], config(), torch.device("cpu"))
    grow(bank, 500)
    assert placed.fits([bank])


def test_the_device_is_told_about_banks_only_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, told = make_bank(12), make_bank(30), []
    placed = PlacedReader([one, other], config(), torch.device("cpu"))
    monkeypatch.setattr(index, "to_device", lambda tensor, device: told.append(tensor) or tensor)
    placed.read([one, other])
    assert not told
    grow(one, 1)
    # One more token, other places, a shorter bank, a later beginning.
    for banks in ([one, other], [other, one], [other, one.between(0, 5)], [other.between(2, 5), one.between(0, 5)]):
        placed.read(banks)
        assert told
        told.clear()
        placed.read(banks)
        assert not told


def test_what_was_found_stays_where_it_was_found(by: str) -> None:
    """A bank that outgrows its memory is copied; what a step found in the old memory can still be looked at."""
    bank, query_BKGTE = make_bank(12), normal(1, 2, 2, 1, 4)
    found = PlacedReader([bank], config(), torch.device("cpu"))(1, query_BKGTE)
    expected = found.scores(query_BKGTE, 0.3)
    before = bank.buffers_HCE[0].data_ptr()
    grow(bank, 500)
    assert bank.buffers_HCE[0].data_ptr() != before
    assert torch.equal(found.scores(query_BKGTE, 0.3), expected)


def same(one: RetrievedRows, reader: BankReader, layer: int, query_BKGTE: Tensor) -> None:
    other = reader(layer, query_BKGTE)
    assert torch.equal(one.valid_BKGTR, other.valid_BKGTR)
    assert torch.equal(one.index_BKGTR * one.valid_BKGTR, other.index_BKGTR * other.valid_BKGTR)
    assert torch.equal(one.bank_size_B, other.bank_size_B)
    for mine, its in zip(one.attend(query_BKGTE, 0.3), other.attend(query_BKGTE, 0.3), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    scores = (read.scores(query_BKGTE, 0.3) for read in (one, other))
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)


def test_queries_in_another_precision_than_the_bank_are_answered_in_theirs() -> None:
    query_BKGTE = normal(1, 2, 2, 3, 4).bfloat16()
    output_BKGTE, _ = BankReader([make_bank(9)], config())(1, query_BKGTE).attend(query_BKGTE, 1.0)
    assert output_BKGTE.dtype == torch.bfloat16
    assert BankReader([make_bank(9), None], config())(1, query_BKGTE.expand(2, -1, -1, -1, -1)).keys_PNE.dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_bank_that_all_rows_share_is_read_as_each_row_would_read_it(dtype: torch.dtype, chunk_size: int) -> None:
    bank, query_BKGTE = make_bank(50), normal(2, 2, 2, 3, 4).to(dtype)
    shared = BankReader([bank, bank], config(4, chunk_size))(1, query_BKGTE)
    apart = BankReader([bank, make_bank(50)], config(4, chunk_size))(1, query_BKGTE)
    assert shared.keys_PNE.data_ptr() == bank.keys_HNE.data_ptr()
    assert apart.keys_PNE.data_ptr() != bank.keys_HNE.data_ptr()
    for name in ("index_BKGTR", "valid_BKGTR", "bank_size_B"):
        assert torch.equal(getattr(shared, name), getattr(apart, name))
    for mine, other in zip(shared.attend(query_BKGTE, 0.3), apart.attend(query_BKGTE, 0.3), strict=True):
        assert torch.equal(mine, other)


def test_a_bank_with_an_index_is_searched_by_it() -> None:
    """An index whose queries chose to keep all coordinates finds what an exact search finds."""
    bank, query_BKGTE = make_bank(100), normal(2, 2, 2, 3, 4)
    exact = BankReader([bank, bank], config())(1, query_BKGTE)
    bank.use_index(BankIndex.choose(bank.keys_HNE, normal(3, 200, 4, seed=7), top_k=4, target=1.0))
    for other in (bank, make_bank(0)):
        found = BankReader([bank, other], config())(1, query_BKGTE)
        assert torch.equal(found.index_BKGTR[0], exact.index_BKGTR[0])
        assert torch.equal(found.valid_BKGTR[0], exact.valid_BKGTR[0])
        mine, its = (read.rows(read.values_PNE)[0] for read in (found, exact))
        assert torch.equal(mine, its)
    assert bank.index is not None
    chunks = BankReader([bank], config(4, 2))(1, query_BKGTE[:1])  # chunks are searched exactly
    bank.use_index(None)
    assert torch.equal(BankReader([bank], config(4, 2))(1, query_BKGTE[:1]).index_BKGTR, chunks.index_BKGTR)


def test_a_search_asks_the_heads_of_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, asked = make_bank(100), []
    bank.use_index(BankIndex.choose(bank.keys_HNE, normal(3, 200, 4, seed=7), top_k=4))
    original = BankIndex.search
    monkeypatch.setattr(
        BankIndex, "search", lambda self, heads, *rest: (asked.append(heads), original(self, heads, *rest))[1]
    )
    BankReader([bank], config())(1, normal(1, 2, 2, 3, 4))
    BankReader([bank], config())(2, normal(1, 1, 2, 3, 4))
    assert asked == [slice(0, 2), slice(2, 3)]
