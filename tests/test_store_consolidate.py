"""Consolidation changes where tokens lie, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_store import (
    SPEC,
    assert_same,
    files_of,
    largest_file,
    make_entry,
    make_index,
    readable,
    segment_files,
    write_version_1,
)

from longmem.bank import MemoryBank
from longmem.errors import BankNotFoundError, SourceError, StoreCorruptError, StoreNotWritableError
from longmem.store import MemoryStore, StoredBank


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memories"


@pytest.fixture
def store(folder: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(folder) as store:
        yield store


@pytest.fixture
def bank(store: MemoryStore) -> StoredBank:
    """Thirty pieces of three sources in turn."""
    bank = store.bank("notes", SPEC)
    for seed in range(30):
        source = "abc"[seed % 3]
        bank.append(make_entry(source, f"ü{seed} ", bank.length_of(source), seed))
    return bank


def test_one_file_holds_what_many_held(store: MemoryStore, bank: StoredBank, folder: Path) -> None:
    merged = []
    made = store.consolidate("notes", on_segments=merged.append)
    assert (made.segments_before, made.segments, merged) == (30, 1, [30])
    (path,) = segment_files(folder)
    assert path.stat().st_size == made.bytes == store.banks()[0].bytes
    assert_same(store.bank("notes"), bank)
    assert store.bank("notes").source_infos() == bank.source_infos()
    assert store.verify().ok and store.verify().without_record == 0
    again = store.consolidate("notes")
    assert (again.segments_before, again.segments) == (1, 1) and segment_files(folder) == [path]


def test_a_bank_that_is_open_goes_on(store: MemoryStore, bank: StoredBank, folder: Path) -> None:
    reader = store.bank("notes", verify=False)
    store.consolidate("notes")
    keys_HNE = reader.keys_HNE
    reader.refresh()
    assert reader.keys_HNE.data_ptr() == keys_HNE.data_ptr()  # nothing was read again
    bank.append(make_entry("a", "more", bank.length_of("a"), 99))
    reader.refresh()
    assert_same(reader, bank)
    assert store.consolidate("notes").segments == 1
    assert_same(store.bank("notes"), bank)


def test_forgetting_rewrites_what_is_shared(store: MemoryStore, bank: StoredBank, folder: Path) -> None:
    bank.append(make_entry("secret", "s3cret", 0, 7))
    store.consolidate("notes")
    (before,) = segment_files(folder)
    bank.forget("secret")
    (after,) = segment_files(folder)
    assert before != after
    assert b"s3cret" not in readable(folder)
    assert_same(store.bank("notes"), bank)
    bank.forget("b")
    assert_same(store.bank("notes"), bank)
    assert store.verify().ok
    with pytest.raises(SourceError, match="'b' to forget"):
        bank.forget("b")
    bank.forget("a")
    bank.forget("c")
    assert segment_files(folder) == [] and store.verify().ok


def test_large_segments_are_left_alone(store: MemoryStore, bank: StoredBank, folder: Path) -> None:
    largest = max(path.stat().st_size for path in segment_files(folder))
    made = store.consolidate("notes", segment_bytes=6 * largest)
    assert 3 <= made.segments <= 8 and len(segment_files(folder)) == made.segments
    before = segment_files(folder)
    bank.append(make_entry("a", "x", bank.length_of("a"), 99))
    store.consolidate("notes", segment_bytes=made.bytes // made.segments)
    assert set(before) <= set(segment_files(folder))
    assert_same(store.bank("notes"), bank)


def test_an_index_still_fits(store: MemoryStore) -> None:
    bank = store.bank("notes", SPEC)
    for seed in range(10):
        bank.append(make_entry("ab"[seed % 2], "x" * 30, bank.length_of("ab"[seed % 2]), seed))
    bank.save_index(make_index(bank))
    store.consolidate("notes")
    assert len(store.bank("notes", search="index").index or ()) == 300


def test_damage_stops_it_and_is_named(store: MemoryStore, bank: StoredBank, folder: Path) -> None:
    path = segment_files(folder)[7]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = files_of(folder)
    with pytest.raises(StoreCorruptError, match=rf"{path.name} is damaged.*longmem repair"):
        store.consolidate("notes")
    assert files_of(folder) == before


def test_a_full_disk_changes_nothing(store: MemoryStore, bank: StoredBank, folder: Path) -> None:
    before = files_of(folder)
    with (
        largest_file(1000),
        pytest.raises(StoreNotWritableError, match="not consolidated any further"),
    ):
        store.consolidate("notes")
    assert files_of(folder) == before
    assert_same(store.bank("notes"), bank)
    with pytest.raises(BankNotFoundError, match="It has: notes"):
        store.consolidate("other")


def test_what_is_forgotten_meanwhile_stays_forgotten(
    store: MemoryStore, bank: StoredBank, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is made outside of the transaction; a forget that comes between makes it begin again."""
    write = MemoryStore.write_segment
    forgotten = []

    def write_late(self: MemoryStore, entries: list, bank: str) -> object:
        if not forgotten and len(entries) > 1:
            with MemoryStore.open(folder) as other:
                forgotten.append(other.bank("notes").forget("b"))
        return write(self, entries, bank)

    monkeypatch.setattr(MemoryStore, "write_segment", write_late)
    assert store.consolidate("notes").segments == 1
    again = store.bank("notes")
    assert forgotten and again.sources == ("a", "c") and store.verify().ok
    bank.refresh()
    assert_same(again, bank)


def test_a_store_of_the_first_version_gets_records(tmp_path: Path) -> None:
    entries = [make_entry("a", "one "), make_entry("b", "other", 0, 1), make_entry("a", "two", 4, 2)]
    write_version_1(tmp_path / "old", entries)
    expected = MemoryBank(SPEC)
    for entry in entries:
        expected.append(entry)
    with MemoryStore.open(tmp_path / "old") as store:
        assert store.verify().without_record == 3
        store.consolidate("notes")
        assert store.verify().ok and store.verify().without_record == 0
        assert_same(store.bank("notes"), expected)
        assert torch.equal(store.bank("notes").keys_HNE, expected.keys_HNE)
