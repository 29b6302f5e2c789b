"""MemoryBank against a plain-Python account of what was appended and forgotten."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem import bank as bank_module
from longmem.approximate import BankIndex
from longmem.bank import BankEntry, MemoryBank
from longmem.config import BankSpec, MemoryHead
from longmem.errors import BankError, BankIndexError, ConfigError, SourceError

SPEC = BankSpec("tiny", "0" * 64, (MemoryHead(1, 0), MemoryHead(2, 1)), 8, "float32")


def make_entry(source: str, text: str, char_start: int = 0, seed: int = 0) -> BankEntry:
    """One token a character, with random keys and values."""
    random = torch.Generator().manual_seed(seed)
    tokens = len(text)
    starts_N = torch.arange(char_start, char_start + tokens)
    return BankEntry(
        source=source,
        text=text,
        char_start=char_start,
        token_ids_N=torch.randint(1000, (tokens,), generator=random),
        offsets_N2=torch.stack([starts_N, starts_N + 1], dim=1),
        keys_HNE=torch.randn(2, tokens, 8, generator=random),
        values_HNE=torch.randn(2, tokens, 8, generator=random),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[BankEntry]:
    """Pieces of a few sources, interleaved, each continuing its source."""
    ends: dict[str, int] = {}
    entries = []
    for seed, (source, text) in enumerate(draw(st.lists(st.tuples(st.sampled_from("abc"), st.text(max_size=9))))):
        entries.append(make_entry(source, text, ends.get(source, 0), seed))
        ends[source] = ends.get(source, 0) + len(text)
    return entries


def filled(entries: list[BankEntry]) -> MemoryBank:
    bank = MemoryBank(SPEC)
    for entry in entries:
        bank.append(entry)
    return bank


def assert_holds(bank: MemoryBank, entries: list[BankEntry]) -> None:
    """The bank is, to the bit, what these appends make."""
    sources = list(dict.fromkeys(entry.source for entry in entries))
    assert bank.sources == tuple(sources)
    assert len(bank) == sum(len(entry) for entry in entries)
    names = [sources[index] for index in bank.source_index_N.tolist()]
    assert names == [entry.source for entry in entries for _ in range(len(entry))]
    for source in sources:
        text = "".join(entry.text for entry in entries if entry.source == source)
        assert bank.text_of(source) == text
        assert bank.length_of(source) == len(text)
    if entries:
        assert torch.equal(bank.keys_HNE, torch.cat([entry.keys_HNE for entry in entries], dim=1))
        assert torch.equal(bank.values_HNE, torch.cat([entry.values_HNE for entry in entries], dim=1))
        assert torch.equal(bank.token_ids_N, torch.cat([entry.token_ids_N for entry in entries]))
        assert torch.equal(bank.offsets_N2, torch.cat([entry.offsets_N2 for entry in entries]))


@given(histories())
def test_a_bank_holds_what_was_appended_in_order(entries: list[BankEntry]) -> None:
    assert_holds(filled(entries), entries)


@given(histories(), st.lists(st.sampled_from("abc"), min_size=1, unique=True))
def test_after_forget_the_bank_equals_one_that_never_saw_the_sources(entries: list[BankEntry], gone: list[str]) -> None:
    bank = filled(entries)
    stays = [entry for entry in entries if entry.source not in gone]
    if set(gone) <= set(bank.sources):
        forgotten = bank.forget(gone[0]) if len(gone) == 1 else bank.forget_all(gone)
        assert forgotten == sum(len(entry) for entry in entries) - sum(len(entry) for entry in stays)
    else:
        stays = entries  # one that is not there keeps all
        with pytest.raises(SourceError, match="remembers"):
            bank.forget_all(gone)
    layout = bank.layout
    assert bank.forget_all([]) == 0 and bank.layout is layout
    assert_holds(bank, stays)
    # The source can be written again from its beginning, and others continue where they were.
    again = [make_entry(name, "more", bank.length_of(name)) for name in "abc"]
    for entry in again:
        bank.append(entry)
    assert_holds(bank, stays + again)


@given(histories(), st.integers(0, 30), st.integers(0, 30))
def test_text_of_slices_like_a_string(entries: list[BankEntry], start: int, end: int) -> None:
    bank = filled(entries)
    for source in bank.sources:
        text = "".join(entry.text for entry in entries if entry.source == source)
        assert bank.text_of(source, start) == text[start:]
        assert bank.text_of(source, start, end) == text[start:end]


@given(histories(), st.data())
def test_span_is_the_text_that_tokens_cover(entries: list[BankEntry], data: st.DataObject) -> None:
    bank = filled(entries)
    pieces = [entry for entry in entries if len(entry)]
    if not pieces:
        return
    which = data.draw(st.integers(0, len(pieces) - 1))
    before = sum(len(entry) for entry in pieces[:which])
    first = data.draw(st.integers(0, len(pieces[which]) - 1))
    last = data.draw(st.integers(first, len(pieces[which]) - 1))
    span = bank.span(before + first, before + last)
    assert span.source == pieces[which].source
    assert span.start == pieces[which].char_start + first
    assert span.text == pieces[which].text[first : last + 1]
    assert span.end - span.start == len(span.text)


@given(histories())
def test_tokens_of_gathers_a_source_from_all_its_pieces(entries: list[BankEntry]) -> None:
    bank = filled(entries)
    for source in bank.sources:
        ids = [entry.token_ids_N for entry in entries if entry.source == source]
        assert torch.equal(bank.tokens_of(source), torch.cat(ids))
    assert bank.tokens_of("unknown").numel() == 0
    assert bank.length_of("unknown") == 0


def test_appending_token_by_token_moves_memory_logarithmically_often() -> None:
    bank = MemoryBank(SPEC)
    places = set()
    for position in range(1000):
        bank.append(make_entry("a", "x", position))
        places.add(bank._keys_HCE.data_ptr())
    assert len(places) <= 12


def wrong_entries() -> list[tuple[str, BankEntry]]:
    good = make_entry("a", "four", 0)
    return [
        ("keys_HNE", replace(good, keys_HNE=good.keys_HNE[:1])),
        ("keys_HNE", replace(good, keys_HNE=good.keys_HNE[:, :3])),
        ("values_HNE", replace(good, values_HNE=good.values_HNE[..., :4])),
        ("bfloat16", replace(good, values_HNE=good.values_HNE.bfloat16())),
        ("token_ids_N", replace(good, token_ids_N=good.token_ids_N[None])),
        ("offsets_N2", replace(good, offsets_N2=good.offsets_N2[:3])),
        ("up to character 0", replace(good, char_start=1)),
        ("up to character 5", replace(good, source="known")),
    ]


@pytest.mark.parametrize(("message", "entry"), wrong_entries())
def test_an_entry_that_does_not_fit_changes_nothing(message: str, entry: BankEntry) -> None:
    known = [make_entry("known", "there")]
    bank = filled(known)
    with pytest.raises(BankError, match=message):
        bank.append(entry)
    assert_holds(bank, known)


def test_a_copy_that_fails_leaves_the_bank_as_it_was() -> None:
    known = [make_entry("known", "there")]
    bank = filled(known)
    with pytest.raises(RuntimeError):
        bank.append(replace(make_entry("new", "x"), keys_HNE=torch.empty(2, 1, 8, device="meta")))
    assert_holds(bank, known)


def test_reading_an_unknown_source_names_those_there_are() -> None:
    with pytest.raises(SourceError, match="nothing yet"):
        MemoryBank(SPEC).text_of("a")
    with pytest.raises(SourceError, match="known"):
        filled([make_entry("known", "there")]).text_of("a")


@settings(max_examples=10)
@given(histories())
def test_entries_keep_their_memory_to_themselves(entries: list[BankEntry]) -> None:
    bank = filled(entries)
    kept = [replace(entry, keys_HNE=entry.keys_HNE.clone()) for entry in entries]
    for entry in entries:
        entry.keys_HNE.zero_()
    assert_holds(bank, kept)


# An index


def indexed(length: int = 200, more: str = "") -> tuple[MemoryBank, BankIndex]:
    """A bank with an index, and sources that were written after it was made."""
    bank = filled([make_entry("a", "x" * length, seed=1)])
    index = BankIndex.choose(bank.keys_HNE, bank.keys_HNE[:, ::2], top_k=4)
    bank.use_index(index)
    for seed, source in enumerate(more):
        bank.append(make_entry(source, "y" * 10, seed=seed + 2))
    return bank, index


def test_appending_keeps_an_index_and_forgetting_drops_it() -> None:
    bank, index = indexed(more="bc")
    assert bank.index is index and len(bank) == 220
    bank.forget("c")
    assert bank.index is None
    bank.use_index(index)  # what it knows is still there
    bank.forget("a")
    with pytest.raises(BankIndexError, match=r"200 tokens .* the bank's 10: .*exactly"):
        bank.use_index(index)
    bank.append(make_entry("a", "x" * 200, seed=1))
    with pytest.raises(BankIndexError, match="another bank, or something was forgotten"):
        bank.use_index(index)  # the same tokens, at another place
    assert bank.index is None


def test_an_index_of_another_bank_is_refused() -> None:
    _, index = indexed()
    other = filled([make_entry("a", "x" * 200, seed=9)])
    with pytest.raises(BankIndexError):
        other.use_index(index)
    assert other.index is None


def test_a_part_shares_memory_and_an_index_that_knows_no_more() -> None:
    bank, index = indexed(more="bc")
    for first, last, kept in ((0, 220, True), (0, 200, True), (0, 199, False), (1, 210, False), (50, 50, False)):
        part = bank.between(first, last)
        assert torch.equal(part.keys_HNE, bank.keys_HNE[:, first:last])
        assert torch.equal(part.values_HNE, bank.values_HNE[:, first:last])
        assert len(part) == last - first and (part.index is index) == kept
    assert bank.between(3, 9).keys_HNE.data_ptr() == bank.keys_HNE[:, 3:].data_ptr()


def test_a_part_can_only_be_read() -> None:
    bank, _ = indexed(more="bc")
    for part, row_P in ((bank.between(3, 9), torch.arange(3, 9)), (bank.part(row := torch.tensor([0, 4, 215])), row)):
        assert torch.equal(part.in_whole(torch.arange(len(part))), row_P)
        assert torch.equal(part.token_ids_N, bank.token_ids_N[row_P]) and part.span(0, 0) == bank.span(
            int(row_P[0]), int(row_P[0])
        )
        with pytest.raises(BankError, match="part of a bank, which can only be read"):
            part.append(make_entry("d", "xyz"))
        with pytest.raises(BankError, match="Change the bank"):
            part.forget("b")
        with pytest.raises(BankError):
            part.thin(torch.ones(len(part), dtype=torch.bool))
    assert bank.sources == ("a", "b", "c") and len(bank) == 220
    rows = MemoryBank.of_rows(bank.spec, bank.keys_HNE, bank.values_HNE, bank.token_ids_N)
    with pytest.raises(BankError, match="can only be read"):
        rows.append(make_entry("d", "xyz"))
    assert torch.equal(bank.in_whole(torch.tensor([1, 5])), torch.tensor([1, 5]))


def test_a_layout_is_another_once_rows_have_gone_or_moved() -> None:
    bank, _ = indexed(more="bc")
    layout, part = bank.layout, bank.between(3, 9)
    bank.append(make_entry("d", "xyz"))
    bank.to("cpu")
    assert bank.layout is layout and bank.still_has(part) and bank.still_has(bank) and not part.still_has(bank)
    assert part.layout is not layout  # it has other rows
    for change in (
        lambda: bank.thin(torch.arange(len(bank)) != 4),
        lambda: bank.forget("d"),
        lambda: bank.to("meta"),
    ):
        change()
        assert bank.layout is not layout and not bank.still_has(part)
        layout = bank.layout
        part = bank.between(0, 1)


def test_an_index_is_for_a_cpu() -> None:
    bank, index = indexed()
    bank.to("cpu")
    assert bank.index is index
    bank.to("meta")
    assert bank.index is None
    with pytest.raises(ConfigError, match=r"on meta.*exactly"):
        bank.use_index(index)


@settings(max_examples=60)
@given(st.data())
def test_attention_is_counted_for_tokens_whatever_becomes_of_their_rows(data: st.DataObject) -> None:
    bank, expected, made = filled([make_entry(name, name * 6) for name in "abc"]), {}, 3
    with mock.patch.object(bank_module, "_MOST_PAID", 2):
        for what in data.draw(st.lists(st.sampled_from(["attend", "append", "thin", "forget", "take"]), max_size=12)):
            if what == "attend" and len(bank):
                rows = data.draw(st.lists(st.integers(0, len(bank) - 1), min_size=1, max_size=5))
                weights = [float(2**n) for n in range(len(rows))]  # sums of them are exact
                bank.attend(torch.tensor(rows), torch.tensor(weights))
                for row, weight in zip(rows, weights, strict=True):
                    source = bank.sources[int(bank.source_index_N[row])]
                    of_source = expected.setdefault(source, [0.0] * 6)
                    of_source[int(bank.place_N[row])] += weight
            elif what == "append":
                bank.append(make_entry(f"more {made}", "x" * 6))
                made += 1
            elif what == "thin":
                bank.thin(torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(bank), max_size=len(bank)))) > 0)
            elif what == "forget" and bank.sources:
                gone = data.draw(st.sampled_from(bank.sources))
                bank.forget(gone)
                expected.pop(gone, None)
            elif what == "take":
                assert {name: taken_M.tolist() for name, taken_M in bank.take_attention().items()} == expected
                expected = {}
        assert {name: taken_M.tolist() for name, taken_M in bank.take_attention().items()} == expected


def test_a_source_has_a_number_as_long_as_it_is_remembered() -> None:
    bank = filled([make_entry(name, "x" * 4) for name in "abc"])
    assert [bank.source_number(name) for name in "abcd"] == [0, 1, 2, None]
    bank.forget("b")
    assert [bank.source_number(name) for name in "abcd"] == [0, None, 1, None] and bank.sources == ("a", "c")
    assert bank.span(4, 5).source == "c" == bank.between(4, 8).span(0, 1).source
