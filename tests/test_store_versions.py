"""Versions, tags, forks, merges, files: which pieces a bank holds, and that nobody else's pieces change with it."""

from __future__ import annotations

import dataclasses
import io
import sqlite3
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TINY_TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import SPEC, assert_same, files_of, largest_file, make_entry, readable, segment_files

from longmem.bank import BankEntry, DrawnOn, MemoryBank
from longmem.errors import (
    BankError,
    BankMismatchError,
    BankNotFoundError,
    StoreCorruptError,
    StoreNotWritableError,
)
from longmem.model import LongMem
from longmem.store import ChangedSource, MemoryStore, StoredBank, Stretch


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    return LongMem.from_pretrained(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def other_model(other_tiny_model_dir: Path) -> LongMem:
    return LongMem.from_pretrained(str(other_tiny_model_dir), device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memories"


@pytest.fixture
def store(folder: Path):
    with MemoryStore.open(folder) as store:
        yield store


def append(bank: MemoryBank, source: str, text: str, seed: int = 0) -> None:
    bank.append(make_entry(source, text, bank.length_of(source), seed))


@pytest.fixture
def notes(store: MemoryStore) -> StoredBank:
    """Three versions: a, b, more of a."""
    bank = store.bank("notes", SPEC)
    for seed, (source, text) in enumerate([("a", "one "), ("b", "other"), ("a", "two")]):
        append(bank, source, text, seed)
    return bank


# ---- log and time travel -----------------------------------------------------------------------------------


def test_every_version_can_be_opened_again(notes: StoredBank, store: MemoryStore) -> None:
    expected = MemoryBank(SPEC)
    assert len(store.bank("notes", version=0)) == 0
    for number, (source, text) in enumerate([("a", "one "), ("b", "other"), ("a", "two")], start=1):
        append(expected, source, text, number - 1)
        past = store.bank("notes", version=number)
        assert_same(past, expected)
        assert past.version == number
    assert_same(store.bank("notes"), expected)
    first, second, third = store.log("notes")
    assert [version.number for version in (first, second, third)] == [1, 2, 3]
    assert [(v.operation, v.tokens, v.added, v.sources) for v in (first, second, third)] == [
        ("append", 4, 4, ("a",)),
        ("append", 9, 5, ("b",)),
        ("append", 12, 3, ("a",)),
    ]
    assert first.time < second.time < third.time


def test_a_past_version_cannot_be_written(notes: StoredBank, store: MemoryStore) -> None:
    past = store.bank("notes", version=2)
    for attempt in (lambda: append(past, "c", "x"), lambda: past.forget("a")):
        with pytest.raises(StoreNotWritableError, match=r"longmem fork --bank notes --version 2 --to NAME"):
            attempt()
    append(notes, "c", "new")
    past.refresh()
    assert past.sources == ("a", "b") and past.text_of("a") == "one "


def test_what_is_forgotten_is_forgotten_in_all_versions(notes: StoredBank, store: MemoryStore) -> None:
    past = store.bank("notes", version=2)
    store.tag("notes", "then", 2)
    notes.forget("b")
    past.refresh()
    assert past.sources == ("a",) and store.bank("notes", version="then").sources == ("a",)
    log = store.log("notes")
    assert [(v.operation, v.tokens, v.forgotten) for v in log] == [
        ("append", 4, 0),
        ("append", 4, 5),
        ("append", 7, 0),
        ("forget", 7, 0),
    ]
    assert log[-1].note == "receipt 1" and log[1].sources == ()
    assert store.receipts()[0].facts["banks"][0]["tags"] == ["then"]


def test_tags(notes: StoredBank, store: MemoryStore) -> None:
    assert store.tag("notes", "first", 1) == 1 and store.tag("notes", "v2.0") == 3
    assert store.tags("notes") == {"first": 1, "v2.0": 3}
    assert store.log("notes")[0].tags == ("first",)
    append(notes, "c", "new")
    assert store.bank("notes", version="v2.0").sources == ("a", "b")
    with pytest.raises(BankError, match="has a tag 'first' already, of version 1"):
        store.tag("notes", "first")
    for label in ("3", "", "a b", "ä"):
        with pytest.raises(BankError, match="cannot name a version"):
            store.tag("notes", label)
    store.untag("notes", "first")
    with pytest.raises(BankError, match=r"no tag 'first'; it has: v2\.0"):
        store.untag("notes", "first")
    for version in ("first", 9, -1):
        for attempt in (lambda v: store.bank("notes", version=v), lambda v: store.tag("notes", "x", v)):
            with pytest.raises(BankError, match=r"versions 0 \(empty\) to 4, and tags: v2\.0"):
                attempt(version)
    with pytest.raises(BankNotFoundError):
        store.bank("new", SPEC, version=1)
    with pytest.raises(BankNotFoundError):
        store.log("new")


# ---- fork, merge, diff -------------------------------------------------------------------------------------


def test_a_fork_in_its_namespace_shares_files(notes: StoredBank, store: MemoryStore, folder: Path) -> None:
    before = files_of(folder)
    store.fork("notes", "notes/draft", version=2)
    assert files_of(folder) == before
    draft = store.bank("notes/draft")
    assert_same(draft, store.bank("notes", version=2))
    append(draft, "a", "three", 7)
    append(draft, "c", "mine", 8)
    assert notes.sources == ("a", "b") and store.bank("notes").text_of("a") == "one two"
    assert draft.text_of("a") == "one three"
    assert [(v.operation, v.note) for v in store.log("notes/draft")][2:] == [
        ("fork", "of notes, version 2"),
        ("append", None),
        ("append", None),
    ]
    infos = {info.name: info for info in store.banks()}
    assert infos["notes/draft"].namespace == "notes" and infos["notes/draft"].version == 5
    assert store.verify().ok


def test_forgetting_reaches_forks_and_not_other_namespaces(notes: StoredBank, store: MemoryStore, folder: Path) -> None:
    store.fork("notes", "notes/draft")
    store.fork("notes", "copy")
    store.fork("notes/draft", "notes/draft/2")
    draft, copy = store.bank("notes/draft"), store.bank("copy")
    append(draft, "b", " and more", 5)
    store.consolidate("notes/draft")
    assert store.verify().ok
    receipt = store.forget("notes", [Stretch("b")])
    assert [one["bank"] for one in receipt.facts["banks"]] == ["notes", "notes/draft", "notes/draft/2"]
    for name in ("notes", "notes/draft", "notes/draft/2"):
        assert store.bank(name).sources == ("a",)
    copy.refresh()
    assert copy.sources == ("a", "b") and store.verify().ok
    store.delete("copy")
    left = readable(folder)
    assert b"other" not in left and b"one " in left


def test_a_part_is_forgotten_in_forks_where_they_say_the_same(store: MemoryStore, model: LongMem) -> None:
    bank = store.bank("notes", model.bank_spec)
    model.write_text(bank, "Ada keeps bees. The harbour ", source="a")
    store.fork("notes", "notes/draft")
    draft = store.bank("notes/draft")
    model.write_text(bank, "is quiet in winter.", source="a", append=True)
    model.write_text(draft, "was quite full. Really.", source="a", append=True)
    # The middle of what they share, and the first characters of what each has written by itself.
    stretch = Stretch("a", 20, 34)
    assert bank.text_of("a", 20, 34) == "harbour is qui"
    assert store.preview_forget("notes", [stretch]).banks == ("notes", "notes/draft")
    store.forget("notes", [stretch], model)
    for one, rest in ((bank, "et in winter."), (draft, "was quite full. Really.")):
        one.refresh()
        never = model.new_bank()
        model.write_text(never, "Ada keeps bees. The ", source="a")
        model.write_text(never, rest, source="a", append=True)
        assert_same(one, never)
    assert store.verify().ok


def test_deleting_a_bank_leaves_its_forks(notes: StoredBank, store: MemoryStore, folder: Path) -> None:
    store.consolidate("notes")
    store.fork("notes", "notes/draft", version=1)
    expected = store.bank("notes", version=1)
    store.delete("notes")
    assert_same(store.bank("notes/draft"), expected)
    assert store.verify().ok
    # What only the deleted bank held is gone, though it shared a file.
    assert b"other" not in readable(folder)
    store.delete("notes/draft")
    assert segment_files(folder) == []


def test_forks_are_repaired_together(store: MemoryStore, model: LongMem, folder: Path) -> None:
    bank = store.bank("notes", model.bank_spec)
    model.write_text(bank, TINY_TEXT, source="a")
    store.fork("notes", "notes/draft")
    draft = store.bank("notes/draft")
    model.write_text(draft, "Mine. ", source="a", append=True)
    store.consolidate("notes/draft")
    (path,) = segment_files(folder)
    data = bytearray(path.read_bytes())
    data[-700] ^= 1
    path.write_bytes(data)
    assert {fault.bank for fault in store.verify().faults} == {"notes", "notes/draft"}
    mended = store.repair(model, "notes")
    assert [(one.bank, one.pieces) for one in mended] == [("notes", 1), ("notes/draft", 2)]
    assert store.verify().ok
    assert_same(store.bank("notes"), bank)
    assert_same(store.bank("notes/draft"), draft)


@pytest.mark.parametrize("to", ["notes/draft", "other"])
def test_names_that_are_taken_or_cannot_be(notes: StoredBank, store: MemoryStore, model: LongMem, to: str) -> None:
    store.bank(to, SPEC)
    for attempt in (lambda name: store.fork("notes", name), lambda name: store.copy("notes", name, model)):
        with pytest.raises(BankError, match="already"):
            attempt(to)
        with pytest.raises(BankError, match="cannot name a bank"):
            attempt("a b")


@pytest.mark.parametrize("where", ["notes/other", "other"])
def test_what_a_bank_lacks_is_merged(notes: StoredBank, store: MemoryStore, folder: Path, where: str) -> None:
    store.fork("notes", where, version=2)
    other = store.bank(where)
    append(other, "c", "mine", 8)
    append(other, "b", " more", 9)
    assert store.merge("notes", where) == 9
    expected = MemoryBank(SPEC)
    for source, text, seed in [
        ("a", "one ", 0),
        ("b", "other", 1),
        ("a", "two", 2),
        ("c", "mine", 8),
        ("b", " more", 9),
    ]:
        append(expected, source, text, seed)
    notes.refresh()
    assert_same(notes, expected)
    assert_same(store.bank("notes"), expected)
    assert (store.log("notes")[-1].operation, store.log("notes")[-1].note) == ("merge", f"of {where}, version 5")
    # Once more brings nothing; and the other way round what this one has more.
    assert store.merge("notes", where) == 0 and len(store.log("notes")) == 4
    assert store.merge(where, "notes") == 3
    assert {s: store.bank(where).text_of(s) for s in "abc"} == {s: notes.text_of(s) for s in "abc"}
    assert store.verify().ok


def test_sources_that_went_on_differently_are_not_merged(notes: StoredBank, store: MemoryStore) -> None:
    store.fork("notes", "notes/draft", version=2)
    draft = store.bank("notes/draft")
    append(draft, "a", "else", 9)
    append(draft, "c", "mine", 8)
    with pytest.raises(BankError, match=r"Sources 'a' went on differently.*nothing was merged"):
        store.merge("notes", "notes/draft")
    assert len(store.log("notes")) == 3
    found = store.diff("notes", "notes/draft")
    assert found.changed == (ChangedSource("a", 4, 7, 8),)
    assert (found.ours, found.theirs, found.same) == ((), ("c",), ("b",))
    assert store.diff("notes", "notes", version=1).theirs == ("b",)
    store.bank("another", dataclasses.replace(SPEC, weights="1" * 64))
    with pytest.raises(BankMismatchError, match="longmem copy"):
        store.merge("notes", "another")


operations = st.lists(
    st.tuples(
        st.sampled_from(["append", "fork", "merge", "forget", "consolidate"]), st.integers(0, 2), st.integers(0, 2)
    ),
    max_size=12,
)


@settings(max_examples=40)
@given(operations)
def test_any_operations_give_what_sets_of_pieces_give(steps: list[tuple[str, int, int]]) -> None:
    """Against a model in which a bank is a list of (source, text, seed); three names, two of one namespace."""
    names = ["n", "n/fork", "m"]
    held: dict[str, list[tuple[str, str, int]]] = {}
    spaces = {"n": "n", "n/fork": "n/fork", "m": "m"}
    with tempfile.TemporaryDirectory() as name, MemoryStore.open(name) as store:
        store.bank("n", SPEC)
        held["n"] = []
        for seed, (step, one, two) in enumerate(steps):
            ours, other = names[one], names[two]
            if step == "append" and ours in held:
                source = "ab"[two % 2]
                append(store.bank(ours), source, f"{seed} text", seed)
                held[ours].append((source, f"{seed} text", seed))
            elif step == "fork" and ours in held and other not in held:
                store.fork(ours, other)
                held[other] = list(held[ours])
                spaces[other] = spaces[ours] if other.startswith(f"{spaces[ours]}/") else other
            elif step == "merge" and ours in held and other in held:
                try:
                    store.merge(ours, other)
                except BankError:
                    continue
                held[ours] += [piece for piece in held[other] if piece not in held[ours]]
            elif step == "forget" and ours in held and any(piece[0] == "a" for piece in held[ours]):
                store.forget(ours, [Stretch("a")])
                for bank in held:
                    if spaces[bank] == spaces[ours]:
                        held[bank] = [piece for piece in held[bank] if piece[0] != "a"]
            elif step == "consolidate" and ours in held:
                store.consolidate(ours)
        for bank, pieces in held.items():
            expected = MemoryBank(SPEC)
            for source, text, seed in pieces:
                append(expected, source, text, seed)
            assert_same(store.bank(bank), expected)
        assert store.verify().ok
        # No file that nothing names, and none that is missing.
        assert store.orphans() == []
        rows = store.manifest.query("SELECT COUNT(*) FROM piece WHERE id NOT IN (SELECT piece FROM held)")
        assert rows == [(0,)]


# ---- one file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consolidated", [False, True])
def test_a_bank_goes_through_a_file(notes: StoredBank, store: MemoryStore, tmp_path: Path, consolidated: bool) -> None:
    store.tag("notes", "second", 2)
    entry = make_entry("chat", "said", 0, 5)
    notes.append(dataclasses.replace(entry, drew_on=(DrawnOn(None, "a", 0, 3, 0.5),)))
    store.fork("notes", "notes/draft")
    append(store.bank("notes/draft"), "hidden", "not exported", 6)
    if consolidated:
        store.consolidate("notes/draft")  # one file, which holds what is not the bank's
    path, seen = tmp_path / "notes.longmem", []
    size = store.export("notes", path, on_bytes=seen.append)
    assert size == path.stat().st_size and sum(seen) > 0
    with MemoryStore.open(tmp_path / "elsewhere") as other:
        assert other.import_(path, on_bytes=seen.append) == "notes"
        assert b"one " in readable(tmp_path / "elsewhere") and b"not exported" not in readable(tmp_path / "elsewhere")
        assert other.import_(path, "user/1") == "user/1"
        for name in ("notes", "user/1"):
            assert_same(other.bank(name), notes)
            assert_same(other.bank(name, version="second"), store.bank("notes", version=2))
            assert [v.operation for v in other.log(name)] == ["append"] * 4 + ["import"]
            assert [v.time for v in other.log(name)][:4] == [v.time for v in store.log("notes")]
            # What was said of it is known there, too, under the new name.
            assert len(other.preview_forget(name, [Stretch("a")]).generated) == 1
        assert other.verify().ok
        with pytest.raises(BankError, match="already"):
            other.import_(path)
    with pytest.raises(BankError, match="exists already"):
        store.export("notes", path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "memories", "notes.longmem"]


def test_an_exported_version_holds_nothing_later(notes: StoredBank, store: MemoryStore, tmp_path: Path) -> None:
    store.consolidate("notes")
    store.export("notes", tmp_path / "file", version=1)
    with MemoryStore.open(tmp_path / "elsewhere") as other:
        other.import_(tmp_path / "file", "again")
        assert_same(other.bank("again"), store.bank("notes", version=1))
    assert b"one " in readable(tmp_path / "elsewhere") and b"other" not in readable(tmp_path / "elsewhere")


def test_the_file_is_a_store_with_checksums(notes: StoredBank, store: MemoryStore, tmp_path: Path) -> None:
    store.export("notes", tmp_path / "file")
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "xf", tmp_path / "file", "-C", tmp_path / "unpacked"], check=True)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "unpacked", check=True)
    with MemoryStore.open(tmp_path / "unpacked") as unpacked:
        assert_same(unpacked.bank("notes"), notes)


def test_damaged_files_are_not_imported(notes: StoredBank, store: MemoryStore, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    store.export("notes", path)
    whole, before = path.read_bytes(), files_of(folder)
    with tarfile.open(path) as archive:
        members = [(m.offset_data, m.size) for m in archive.getmembers()]
    for start, size in members:
        for place in (start, start + size // 2, start + size - 1):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(StoreCorruptError, match=str(path)):
                store.import_(path, "again")
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:1536]):
        path.write_bytes(content)
        with pytest.raises(StoreCorruptError, match=str(path)):
            store.import_(path, "again")
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("../escape"), io.BytesIO())
    with pytest.raises(StoreCorruptError, match="no exported bank"):
        store.import_(path, "again")
    with pytest.raises(FileNotFoundError):
        store.import_(tmp_path / "nothing")
    assert files_of(folder) == before and [info.name for info in store.banks()] == ["notes"]
    path.write_bytes(whole)
    store.import_(path, "again")
    assert_same(store.bank("again"), notes)


def test_a_full_disk_leaves_nothing_behind(notes: StoredBank, store: MemoryStore, folder: Path, tmp_path: Path) -> None:
    store.export("notes", tmp_path / "file")
    before, known = files_of(folder), [info.name for info in store.banks()]
    with largest_file(100):
        for attempt in (
            lambda: store.fork("notes", "copy"),
            lambda: store.export("notes", tmp_path / "other"),
            lambda: store.import_(tmp_path / "file", "again"),
        ):
            with pytest.raises(StoreNotWritableError):
                attempt()
    assert files_of(folder) == before and [info.name for info in store.banks()] == known
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "memories"]
    assert store.verify().ok


# ---- another backbone --------------------------------------------------------------------------------------


def test_a_copy_by_another_backbone_is_what_it_would_have_written(
    store: MemoryStore, model: LongMem, other_model: LongMem
) -> None:
    bank, expected = store.bank("notes", model.bank_spec), other_model.new_bank()
    for source, text in [("a", TINY_TEXT), ("b", "Other text. "), ("a", "The end.")]:
        model.write_text(bank, text, source=source, append=True)
        other_model.write_text(expected, text, source=source, append=True)
    seen: list[int] = []
    store.copy("notes", "new", other_model, on_tokens=seen.append)
    copy = store.bank("new", other_model.bank_spec)
    assert_same(copy, expected)
    assert not torch.equal(copy.keys_HNE, bank.keys_HNE) and sum(seen) == len(bank)
    assert [v.operation for v in store.log("new")] == ["append"] * 3 + ["copy"]
    assert_same(store.bank("notes"), bank)
    store.copy("notes", "old", other_model, version=1)
    assert store.bank("old").sources == ("a",) and store.verify().ok


def test_tokens_that_say_the_same_to_it_stay(store: MemoryStore, model: LongMem, other_model: LongMem) -> None:
    """Special tokens of a conversation are no text; the same tokenizer keeps them."""
    ids = model.tokenizer("Hello there", add_special_tokens=False)["input_ids"]
    ids_N = torch.tensor([model.tokenizer.eos_token_id, *ids])
    offsets_N2 = torch.tensor([[0, 0], *([0, 11] for _ in ids)])

    store.bank("notes", model.bank_spec).append(
        BankEntry("chat", "Hello there", 0, ids_N, offsets_N2, *model.encode(ids_N))
    )
    store.copy("notes", "new", other_model)
    copy = store.bank("new")
    assert torch.equal(copy.tokens_of("chat"), ids_N)
    assert torch.equal(copy.keys_HNE, other_model.encode(ids_N)[0])


# ---- stores of earlier versions ------------------------------------------------------------------------------

SCHEMA_2 = """
CREATE TABLE bank (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL,
    revision INTEGER NOT NULL, created TEXT NOT NULL, updated TEXT NOT NULL);
CREATE TABLE segment (id INTEGER PRIMARY KEY AUTOINCREMENT, bank INTEGER NOT NULL REFERENCES bank (id),
    file TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE piece (id INTEGER PRIMARY KEY AUTOINCREMENT, bank INTEGER NOT NULL REFERENCES bank (id),
    ordinal INTEGER NOT NULL, source TEXT NOT NULL, char_start INTEGER NOT NULL, chars INTEGER NOT NULL,
    tokens INTEGER NOT NULL, segment INTEGER NOT NULL REFERENCES segment (id), first_token INTEGER NOT NULL,
    first_char INTEGER NOT NULL, created TEXT NOT NULL, UNIQUE (bank, ordinal));
CREATE INDEX piece_segment ON piece (segment);
CREATE TABLE record (piece INTEGER PRIMARY KEY REFERENCES piece (id), data BLOB NOT NULL);
CREATE TABLE quarantine (id INTEGER PRIMARY KEY AUTOINCREMENT, bank INTEGER NOT NULL REFERENCES bank (id),
    source TEXT NOT NULL, char_start INTEGER NOT NULL, chars INTEGER NOT NULL, file TEXT, record BLOB, reason TEXT,
    created TEXT NOT NULL);
"""


def test_a_store_of_the_second_version_is_migrated(notes: StoredBank, store: MemoryStore, folder: Path) -> None:
    store.bank("gone", SPEC)
    store.delete("gone")
    store.close()
    manifest = folder / "manifest.sqlite"
    old = sqlite3.connect(folder / "old.sqlite")
    old.executescript(SCHEMA_2)
    old.execute("ATTACH ? AS new", (str(manifest),))
    old.execute("INSERT INTO bank SELECT id, name, spec, revision, created, updated FROM new.bank")
    old.execute("INSERT INTO segment SELECT id, 1, file, sha256, bytes FROM new.segment")
    old.execute(
        "INSERT INTO piece SELECT id, 1, ordinal * 3, source, char_start, chars, tokens, segment, first_token, "
        "first_char, created FROM new.piece JOIN new.held ON held.piece = piece.id"
    )
    old.execute("INSERT INTO record SELECT * FROM new.record")
    old.execute("INSERT INTO quarantine VALUES (7, 1, 'lost', 0, 4, NULL, NULL, 'gone', 'then')")
    old.execute("UPDATE sqlite_sequence SET seq = 2 WHERE name = 'bank'")
    old.execute("PRAGMA application_id = 0x4C4D454D")
    old.execute("PRAGMA user_version = 2")
    old.commit()
    old.close()
    manifest.unlink()
    (folder / "twin.sqlite").unlink()
    (folder / "old.sqlite").rename(manifest)
    for _ in range(2):
        with MemoryStore.open(folder) as again:
            assert_same(again.bank("notes"), notes)
            assert [(v.operation, v.tokens) for v in again.log("notes")] == [("append", n) for n in (4, 9, 12)]
            report = again.verify()
            assert report.ok and (report.quarantined, report.without_record) == (1, 0)
    with MemoryStore.open(folder) as again:
        again.bank("new", SPEC)
        # The id of a bank that is gone is not given again.
        assert again.find("new") == (3, SPEC)
        assert again.bank("notes").forget("b") == 5
