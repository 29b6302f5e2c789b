"""Rings of training streams, against a Python list and against banks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from banks import SPEC, config, make_bank, naive_search, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem.index import BankReader
from longmem.streams import StreamBanks


@settings(max_examples=60)
@given(st.data())
def test_a_ring_keeps_the_last_tokens_of_each_row(data: st.DataObject) -> None:
    rows, capacity = data.draw(st.integers(1, 3), "rows"), data.draw(st.integers(1, 12), "capacity")
    banks = StreamBanks(rows, capacity, config(4), 4, dtype=torch.float32, device=torch.device("cpu"))
    kept: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(rows)]
    for step in range(data.draw(st.integers(0, 6), "steps")):
        if data.draw(st.booleans(), "reset"):
            gone = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows), "rows to empty")
            banks.reset(torch.tensor(gone))
            kept = [[] if empty else row for empty, row in zip(gone, kept, strict=True)]
        new = data.draw(st.integers(0, 2 * capacity), "tokens")
        keys, values = normal(3, rows, new, 4, seed=step), normal(3, rows, new, 4, seed=step + 50)
        ids_BT = torch.randint(1000, (rows, new))
        banks.append(keys, values, ids_BT)
        for row in range(rows):
            kept[row] += [(int(ids_BT[row, t]), keys[:, row, t], values[:, row, t]) for t in range(new)]
            kept[row] = kept[row][-capacity:]
    assert banks.length_B.tolist() == [len(row) for row in kept]

    query_BKGTE = normal(rows, 2, 2, 3, 4, seed=99)
    reader = banks.reader()
    found = reader(1, query_BKGTE)
    ids_BKGTR = reader.token_ids(found.index_BKGTR)
    for b, row in enumerate(kept):
        for k in range(2):
            keys_NE = torch.stack([key[k] for _, key, _ in row]) if row else torch.empty(0, 4)
            for g in range(2):
                for t in range(3):
                    best = naive_search(query_BKGTE[b, k, g, t], keys_NE, 4, 1)
                    valid_R = found.valid_BKGTR[b, k, g, t]
                    assert ids_BKGTR[b, k, g, t][valid_R].tolist() == [row[i][0] for i in best]
                    for r, i in enumerate(best):
                        assert torch.equal(found.rows(found.keys_PNE)[b, k, g, t, r], row[i][1][k])
                        assert torch.equal(found.rows(found.values_PNE)[b, k, g, t, r], row[i][2][k])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12))
def test_a_ring_knows_what_is_newer(written: list[int], capacity: int) -> None:
    settings = replace(config(4), newest_wins=True)
    rings = StreamBanks(2, capacity, settings, 4, dtype=torch.float32, device=torch.device("cpu"))
    total = 0
    for tokens in written:
        ids_BT = torch.arange(total, total + tokens).expand(2, tokens)
        rings.append(normal(3, 2, tokens, 4, seed=total), normal(3, 2, tokens, 4), ids_BT)
        total += tokens
    reader = rings.reader()
    found = reader(1, normal(2, 2, 2, 3, 4))
    # Token ids count upwards here.
    for ids_R, order_R, valid_R in zip(
        reader.token_ids(found.index_BKGTR).flatten(0, 3),
        found.order_BKGTR.flatten(0, 3),
        found.valid_BKGTR.flatten(0, 3),
        strict=True,
    ):
        assert torch.equal(ids_R[valid_R].argsort(), order_R[valid_R].argsort())


@given(st.permutations(range(3)))
def test_rows_may_read_each_others_banks(source: list[int]) -> None:
    banks = StreamBanks(3, 8, config(4), 4, dtype=torch.float32, device=torch.device("cpu"))
    ids_BT = torch.arange(18).view(3, 6)
    banks.append(normal(3, 3, 6, 4), normal(3, 3, 6, 4, seed=1), ids_BT)
    query_BKGTE = normal(3, 1, 2, 3, 4, seed=2)
    reader = banks.reader(torch.tensor(source))
    found = reader(2, query_BKGTE)
    ids_BKGTR = reader.token_ids(found.index_BKGTR)
    # The queries of row b put to bank source[b], asked as if it were row source[b].
    turned = torch.empty_like(query_BKGTE)
    turned[torch.tensor(source)] = query_BKGTE
    plain = banks.reader()(2, turned)
    for row, other in enumerate(source):
        assert found.valid_BKGTR[row].all() and found.bank_size_B[row] == 6
        assert ((ids_BKGTR[row] >= 6 * other) & (ids_BKGTR[row] < 6 * other + 6)).all()
        assert torch.equal(found.index_BKGTR[row], plain.index_BKGTR[other])
        assert torch.equal(found.rows(found.values_PNE)[row], plain.rows(plain.values_PNE)[other])


@given(
    st.lists(st.integers(0, 7), unique=True),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([4, 6, 8]),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
)
def test_a_crowd_is_read_as_one_bank(crowded: list[int], crowd: int, filled: int, source: list[int]) -> None:
    rings = StreamBanks(4, 8, config(4), 4, dtype=torch.float32, device=torch.device("cpu"))
    ids_BT = torch.arange(4 * filled).view(4, filled)
    keys_HBTE, values_HBTE = normal(3, 4, filled, 4), normal(3, 4, filled, 4, seed=1)
    rings.append(keys_HBTE, values_HBTE, ids_BT)
    # Several rows may read one bank: windows of a stream do.
    query_BKGTE = normal(8, 2, 2, 3, 4, seed=2)
    reader = rings.reader(torch.tensor(source), crowded, crowd, filled)
    found = reader(1, query_BKGTE)
    ids_BKGTR = reader.token_ids(found.index_BKGTR)
    for row, own in enumerate(source):
        first = own // crowd * crowd if row in crowded else own
        others = slice(first, first + (crowd if row in crowded else 1))
        assert found.bank_size_B[row] == filled * (others.stop - others.start)
        for k, g, t in ((0, 0, 0), (1, 1, 2), (0, 1, 1)):
            keys_NE = keys_HBTE[k, others].flatten(0, 1)
            best = naive_search(query_BKGTE[row, k, g, t], keys_NE, 4, 1)
            assert found.valid_BKGTR[row, k, g, t].all()
            assert ids_BKGTR[row, k, g, t].tolist() == ids_BT[others].flatten()[best].tolist()
            assert torch.equal(found.rows(found.keys_PNE)[row, k, g, t], keys_NE[best])
            assert torch.equal(found.rows(found.values_PNE)[row, k, g, t], values_HBTE[k, others].flatten(0, 1)[best])


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 12), st.integers(0, 12))
def test_rings_together_are_one_bank(rows: int, capacity: int, tokens: int, filled: int) -> None:
    tokens = min(tokens, capacity)
    filled = min(filled, tokens)
    rings = StreamBanks(rows, capacity, config(4), 4, dtype=torch.float32, device=torch.device("cpu"))
    ids_BT = torch.arange(rows * tokens).view(rows, tokens)
    keys_HBTE, values_HBTE = normal(3, rows, tokens, 4), normal(3, rows, tokens, 4, seed=1)
    rings.append(keys_HBTE, values_HBTE, ids_BT)
    bank = rings.together(filled, SPEC)
    others_HBTE = normal(3, rows, capacity, 4, seed=2)
    rings.append(others_HBTE, others_HBTE, torch.zeros(rows, capacity, dtype=torch.int64))
    assert bank.spec is SPEC and len(bank) == rows * filled
    for row in range(rows):
        place = slice(row * filled, (row + 1) * filled)
        assert torch.equal(bank.keys_HNE[:, place], keys_HBTE[:, row, :filled])
        assert torch.equal(bank.values_HNE[:, place], values_HBTE[:, row, :filled])
        assert torch.equal(bank.token_ids_N[place], ids_BT[row, :filled])


def test_rows_that_are_no_whole_crowds_are_named() -> None:
    rings = StreamBanks(4, 8, config(4), 4, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="4 rows are not whole crowds of 3"):
        rings.reader(None, [0], 3)


def test_a_ring_and_a_bank_of_the_same_tokens_are_read_alike() -> None:
    for top_k, chunk_size in ((4, 1), (4, 2)):
        bank = make_bank(11)
        ring = StreamBanks(1, 20, config(top_k, chunk_size), 4, dtype=torch.float32, device=torch.device("cpu"))
        ring.append(bank.keys_HNE[:, None], bank.values_HNE[:, None], bank.token_ids_N[None])
        query_BKGTE = normal(1, 2, 2, 3, 4, seed=5)
        from_bank = BankReader([bank], config(top_k, chunk_size))(1, query_BKGTE)
        from_ring = ring.reader()(1, query_BKGTE)
        assert torch.equal(from_bank.index_BKGTR, from_ring.index_BKGTR)
        assert torch.equal(from_bank.rows(from_bank.values_PNE), from_ring.rows(from_ring.values_PNE))
        assert torch.equal(from_bank.bank_size_B, from_ring.bank_size_B)


def test_a_ring_holds_whole_chunks() -> None:
    with pytest.raises(ValueError, match="multiple of chunk_size"):
        StreamBanks(1, 10, config(4, 4), 4, dtype=torch.float32, device=torch.device("cpu"))
