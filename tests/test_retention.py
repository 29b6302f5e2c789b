"""Caps: how much stays, which, and that what stays is what was there."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_store import SPEC, assert_same, make_entry

from longmem.bank import MemoryBank
from longmem.errors import ConfigError
from longmem.retention import POLICIES, Cap, plan, repeated, units

NOW = datetime(2026, 1, 31, tzinfo=UTC)


def bank_of(*lengths: int) -> MemoryBank:
    """Sources a, b, a, b, … in pieces of these lengths."""
    bank = MemoryBank(SPEC)
    for number, length in enumerate(lengths):
        source = "ab"[number % 2]
        bank.append(make_entry(source, "x" * length, bank.length_of(source), number))
    return bank


LENGTHS = st.lists(st.integers(0, 20), max_size=5)


@given(LENGTHS, st.integers(1, 60), st.integers(1, 9), st.sampled_from(POLICIES), st.booleans(), st.integers(0, 9))
def test_whole_units_stay_and_no_more_than_the_cap(lengths, tokens, unit, policy, pinned, seed):
    bank = bank_of(*lengths)
    score_N = torch.rand(len(bank), generator=torch.Generator().manual_seed(seed))
    cap = Cap(tokens=tokens, policy=policy, unit=unit, pinned=("b",) if pinned else ())
    chosen = plan(bank, cap, score_N)
    held = len(bank.tokens_of("b")) if pinned else 0
    assert chosen.rows <= max(tokens, held) and chosen.rows_before == len(bank)
    if len(bank) <= tokens:
        assert chosen.rows == len(bank)
    elif held <= tokens:
        assert chosen.rows > tokens - unit  # no more goes than has to
    unit_N = units(bank, unit)
    for number in range(int(unit_N.max()) + 1 if len(unit_N) else 0):
        of_unit = chosen.keep_N[unit_N == number]
        assert bool(of_unit.all()) or not bool(of_unit.any())
    if pinned and "b" in bank.sources:
        assert bool(chosen.keep_N[bank.source_index_N == bank.sources.index("b")].all())
    assert sum(chosen.thinned.values()) == chosen.rows_before - chosen.rows


@given(LENGTHS, st.integers(0, 99))
def test_a_thinned_bank_keeps_texts_and_rows_as_they_were(lengths, seed):
    bank, whole = bank_of(*lengths), bank_of(*lengths)
    keep_N = torch.rand(len(bank), generator=torch.Generator().manual_seed(seed)) < 0.5
    bank.thin(keep_N)
    assert len(bank) == int(keep_N.sum()) and bank.sources == whole.sources
    for source in bank.sources:
        assert bank.text_of(source) == whole.text_of(source)
        assert torch.equal(bank.tokens_of(source), whole.tokens_of(source))
        assert torch.equal(bank.offsets_of(source), whole.offsets_of(source))
    assert torch.equal(bank.keys_HNE, whole.keys_HNE[:, keep_N])
    assert torch.equal(bank.values_HNE, whole.values_HNE[:, keep_N])
    for name in ("token_ids_N", "source_index_N", "offsets_N2", "place_N"):
        assert torch.equal(getattr(bank, name), getattr(whole, name)[keep_N])
    # It goes on, and forgets, as one that is whole.
    for each in (bank, whole):
        each.append(make_entry("a", "more", each.length_of("a"), 77))
    assert torch.equal(bank.place_N[-4:], whole.place_N[-4:])
    for each in (bank, whole):
        assert each.forget("a") == sum(lengths[::2]) + 4
    assert bank.sources == whole.sources


def test_what_each_policy_lets_go_first():
    bank = MemoryBank(SPEC)
    for source in "abc":
        bank.append(make_entry(source, "x" * 10, 0, ord(source)))
    cap = Cap(tokens=20, unit=10)
    assert plan(bank, cap).thinned == {"a": 10}
    score_N = torch.tensor([2.0, 1.0, 3.0]).repeat_interleave(10)
    for policy in ("attention", "surprise"):
        assert plan(bank, replace(cap, policy=policy), score_N).thinned == {"b": 10}
        with pytest.raises(ConfigError, match="needs a score of every row"):
            plan(bank, replace(cap, policy=policy))
    again = replace(make_entry("d", "x" * 10), token_ids_N=bank.tokens_of("b"))
    bank.append(again)
    assert plan(bank, Cap(tokens=30, unit=10, policy="duplicates")).thinned == {"b": 10}  # the later copy stays
    assert plan(bank, Cap(tokens=20, unit=10, policy="duplicates")).thinned == {"b": 10, "a": 10}
    assert plan(bank, Cap(tokens=30, unit=10, pinned=("a*",))).thinned == {"b": 10}


def test_a_bank_that_is_thinned_often_is_an_even_sample_of_all_that_was_written():
    """Thinned after each write or once at the end: the same stays."""
    cap = Cap(tokens=40, policy="spread", unit=2)
    often, once = MemoryBank(SPEC), MemoryBank(SPEC)
    for number in range(30):
        for bank in (often, once):
            bank.append(make_entry("a", "x" * 10, bank.length_of("a"), number))
        often.thin(plan(often, cap).keep_N)
    once.thin(plan(once, cap).keep_N)
    assert_same(often, once)
    assert len(once) == 40 and 100 < float(once.place_N.double().mean()) < 200


def test_repetitions_are_counted_in_runs_that_stay_inside_a_unit():
    ids_N = torch.tensor([1, 2, 3, 4, 5, 6, 9, 9, 2, 3, 4, 5, 6, 7])
    unit_N = torch.tensor([0] * 7 + [1] * 7)
    assert repeated(ids_N, unit_N).tolist() == [pytest.approx(1 / 3), 0.0]
    assert repeated(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).tolist() == []


def test_time_to_live_forgets_what_was_written_last_long_ago():
    bank = bank_of(5, 5, 5)
    written = {"a": NOW - timedelta(days=9), "b": NOW - timedelta(days=11)}
    chosen = plan(bank, Cap(days=10), written=written, now=NOW)
    assert chosen.forgotten == ("b",) and chosen.rows == 10 and chosen.thinned == {}
    assert plan(bank, Cap(days=10, pinned=("b",)), written=written, now=NOW).forgotten == ()
    with pytest.raises(ConfigError, match="only stored ones know"):
        plan(bank, Cap(days=10))


def test_a_cap_in_bytes_counts_keys_and_values():
    for precision, row in (("full", 64), ("int4", 24)):
        assert replace(SPEC, precision=precision).bytes_per_token == row
        assert Cap(bytes=10 * row + 1).rows(row) == 10
        assert Cap(bytes=10 * row, tokens=7).rows(row) == 7
    assert Cap().rows(64) is None


def test_caps_are_checked_and_survive_json():
    cap = Cap(tokens=5, policy="surprise", unit=3, days=1.5, pinned=("a", "b*"))
    assert Cap.from_json(cap.to_json()) == cap
    for wrong, said in (
        ({"policy": "best"}, "choose among oldest"),
        ({"tokens": 0}, "more than 0"),
        ({"unit": 0}, "unit"),
    ):
        with pytest.raises(ConfigError, match=said):
            Cap(**wrong)


def test_thinning_in_memory_is_appending_thinned_entries():
    entry = make_entry("a", "x" * 12)
    keep_N = torch.arange(12) % 3 == 0
    bank, other = MemoryBank(SPEC), MemoryBank(SPEC)
    bank.append(entry)
    bank.thin(keep_N)
    other.append(entry.thinned(keep_N))
    assert_same(bank, other)
    twice = entry.thinned(keep_N).thinned(torch.tensor([True, False, True, False]))
    assert twice.kept_K is not None and twice.kept_K.tolist() == [0, 6] and twice.rows == 2
