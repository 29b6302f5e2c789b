"""The manifest has a second copy of its rows: damage to either is noticed, never served, and mended."""

from __future__ import annotations

import multiprocessing
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from conftest import TINY_TEXT
from test_store import SPEC, assert_same, files_of, largest_file, make_entry, readable

from longmem.errors import LongMemError, StoreCorruptError, StoreError, StoreNotWritableError
from longmem.model import LongMem
from longmem.store import MemoryStore, StoredBank, Stretch
from longmem.store.manifest import MANIFEST, compare_in
from longmem.store.twin import TABLES, TWIN, Comparison, columns_of, crc

NO_ROWS = {"drew", "cap", "quarantine", "encryption", "location"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store in which most tables have rows, closed."""
    folder = tmp_path / "memories"
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        for number in range(4):
            bank.append(make_entry(f"source {number}", f"text {number} " * 9, seed=number))
        bank.append(make_entry("source 0", "more", len("text 0 " * 9)))
        bank.keep_scores("surprise", {bank.pieces[0].id: torch.ones(bank.pieces[0].tokens)})
        bank.thin(torch.arange(len(bank)) % 7 > 0)
        store.fork("notes", "notes/draft")
        store.fork("notes", "copy")
        store.tag("notes", "first", 2)
        store.forget("notes", [Stretch("source 2")])
    return folder


@pytest.fixture
def held(folder: Path) -> dict[str, StoredBank]:
    return banks(folder)


def banks(folder: Path) -> dict[str, StoredBank]:
    with MemoryStore.open(folder) as store:
        return {info.name: store.bank(info.name) for info in store.banks()}


def execute(path: Path, sql: str) -> None:
    database = sqlite3.connect(path)
    database.execute(sql)
    database.commit()
    database.close()


def rows(path: Path, *, twin: bool = False) -> dict[str, list[tuple]]:
    database = sqlite3.connect(path)
    found = {}
    for table in TABLES:
        columns = [name for name in columns_of(database, table) if name != "crc"]
        found[table] = sorted(database.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall(), key=repr)
    database.close()
    return found


def assert_mended(folder: Path, held: dict[str, StoredBank], before: dict[str, list[tuple]]) -> None:
    now = banks(folder)
    assert set(now) == set(held)
    for name, bank in held.items():
        assert_same(now[name], bank)
    after = rows(folder / MANIFEST)
    after["commits"] = before["commits"]
    assert after == before
    with MemoryStore.open(folder) as store:
        report = store.verify()
        assert report.ok and report.without_record == 0


def test_the_twin_has_all_rows_after_every_commit(folder: Path) -> None:
    assert all(rows(folder / MANIFEST)[table] for table in set(TABLES) - NO_ROWS)
    assert rows(folder / TWIN) == rows(folder / MANIFEST)
    with MemoryStore.open(folder) as store:
        store.consolidate("notes")
        store.merge("notes", "copy")
        store.delete("notes/draft")
        assert compare_in(folder, writable=True) == Comparison({}, {})
        assert rows(folder / TWIN) == rows(folder / MANIFEST)
    with pytest.raises(StoreError), MemoryStore.open(folder) as store, store.manifest.transaction() as database:
        database.execute("DELETE FROM tag")
        database.execute("DELETE FROM nothing")
    assert rows(folder / TWIN) == rows(folder / MANIFEST) and rows(folder / TWIN)["tag"]


def test_the_checksum_is_what_the_format_says(folder: Path) -> None:
    database = sqlite3.connect(folder / TWIN)
    (said, check) = database.execute(
        "SELECT quote(bank) || ',' || quote(name) || ',' || version, crc FROM tag"
    ).fetchone()
    database.close()
    assert said == "1,'first',2" and crc(said) == check


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE piece SET source = 'Source 0' WHERE id = 1",
        "UPDATE piece SET chars = chars + 1 WHERE id = 4",
        "UPDATE held SET ordinal = ordinal + 64 WHERE ordinal = 1",
        "UPDATE bank SET name = 'notfs' WHERE name = 'notes'",
        "UPDATE segment SET sha256 = 'f' || substr(sha256, 2)",
        "UPDATE tag SET version = 3",
        "UPDATE secret SET key = x'00'",
        "DELETE FROM version WHERE number = 2",
    ],
)
def test_rows_that_were_not_written_are_noticed_and_put_right(
    folder: Path, held: dict[str, StoredBank], change: str
) -> None:
    before = rows(folder / MANIFEST)
    with MemoryStore.open(folder) as store:
        execute(folder / MANIFEST, change)
        assert [fault.kind for fault in store.verify().faults if fault.file == MANIFEST] == ["manifest"]
    damaged = rows(folder / MANIFEST)
    with pytest.raises(StoreCorruptError, match=r"rows are not what was written .*longmem repair"):
        MemoryStore.open(folder)
    assert rows(folder / MANIFEST) == damaged
    rebuilt = MemoryStore.rebuild(folder)
    assert rebuilt is not None and rebuilt.rows > 0 and not rebuilt.whole
    assert MemoryStore.rebuild(folder) is None
    assert_mended(folder, held, before)


def test_any_flipped_bit_is_harmless_noticed_or_mended(folder: Path, held: dict[str, StoredBank]) -> None:
    """Wherever it is: what opens is what was written, or it does not open; and then it can be mended."""
    before, whole = rows(folder / MANIFEST), (folder / MANIFEST).read_bytes()
    texts = {name: {source: bank.text_of(source) for source in bank.sources} for name, bank in held.items()}
    noticed = 0
    places = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:60].tolist()
    for number, place in enumerate([*range(24), *places]):
        where = folder.with_name(f"flipped {number}")
        shutil.copytree(folder, where)
        data = bytearray(whole)
        data[place] ^= 1 << number % 8
        (where / MANIFEST).write_bytes(data)
        try:
            found = banks(where)
        except LongMemError:
            noticed += 1
            try:
                MemoryStore.rebuild(where)
            except StoreError as error:
                # Its marks say that it is another program's, or of another version: nothing is touched.
                assert 60 <= place < 72, error
                continue
            assert_mended(where, held, before)
        else:
            read = {name: {source: bank.text_of(source) for source in bank.sources} for name, bank in found.items()}
            assert read == texts
            with MemoryStore.open(where) as store:
                # Of records and scores, which have checksums of their own.
                assert {fault.kind for fault in store.verify().faults} <= {"record", "manifest"}
    assert noticed > 15


@pytest.mark.parametrize("left", [None, b"", b"not a database" * 1000, "half"])
def test_a_manifest_that_is_gone_or_cannot_be_read_is_made_anew(
    folder: Path, held: dict[str, StoredBank], left: bytes | str | None
) -> None:
    before, whole = rows(folder / MANIFEST), (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).unlink()
    if left is not None:
        (folder / MANIFEST).write_bytes(whole[: len(whole) // 2] if isinstance(left, str) else left)
    kept = files_of(folder)
    with pytest.raises(StoreCorruptError, match="longmem repair"):
        MemoryStore.open(folder)
    assert {name for name in files_of(folder) if name.startswith("segments")} == {
        name for name in kept if name.startswith("segments")
    }
    rebuilt = MemoryStore.rebuild(folder)
    assert rebuilt is not None and rebuilt.whole
    assert_mended(folder, held, before)
    with MemoryStore.open(folder) as store:
        assert store.is_genuine(store.receipts()[-1])
        store.bank("notes").append(make_entry("later", "on it goes"))


def test_without_a_twin_nothing_is_swept(folder: Path) -> None:
    (folder / TWIN).unlink()
    (folder / MANIFEST).unlink()
    before = files_of(folder)
    with pytest.raises(StoreCorruptError, match=r"is missing, and .* holds a store"):
        MemoryStore.open(folder)
    with pytest.raises(StoreError, match="No store in"):
        MemoryStore.rebuild(folder)
    (folder / MANIFEST).write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreCorruptError, match=r"second copy, .* Restore both"):
        MemoryStore.rebuild(folder)
    assert set(before) <= set(files_of(folder))


@pytest.mark.parametrize("left", [None, b"not a database" * 1000, "rows", "older"])
def test_a_twin_that_is_gone_or_damaged_is_made_again(
    folder: Path, held: dict[str, StoredBank], left: bytes | str | None
) -> None:
    before = rows(folder / MANIFEST)
    if left == "rows":
        execute(folder / TWIN, "UPDATE piece SET source = 'Source 0' WHERE id = 1")
        execute(folder / TWIN, "DELETE FROM held WHERE ordinal = 2")
    elif left == "older":
        execute(folder / TWIN, "UPDATE commits SET number = number - 5")
        execute(folder / TWIN, "DELETE FROM tag")
    else:
        (folder / TWIN).unlink()
        if isinstance(left, bytes):
            (folder / TWIN).write_bytes(left)
    assert_mended(folder, held, before)
    assert rows(folder / TWIN) == rows(folder / MANIFEST)


def test_a_twin_that_is_damaged_while_the_store_is_open_is_named(folder: Path, tiny_model_dir: Path) -> None:
    model = LongMem.from_pretrained(str(tiny_model_dir), device="cpu")
    with MemoryStore.open(folder) as store:
        execute(folder / TWIN, "UPDATE piece SET source = 'Source 0' WHERE id = 1")
        assert [(fault.kind, fault.file) for fault in store.verify().faults] == [("twin", TWIN)]
        store.repair(model)
        assert store.verify().ok


def test_damage_to_both_in_different_rows_is_mended(folder: Path, held: dict[str, StoredBank]) -> None:
    before = rows(folder / MANIFEST)
    execute(folder / MANIFEST, "UPDATE piece SET chars = 1 WHERE id = 1")
    execute(folder / TWIN, "UPDATE piece SET chars = 1 WHERE id = 2")
    assert MemoryStore.rebuild(folder) is not None
    assert_mended(folder, held, before)


def test_a_manifest_that_is_older_than_its_twin_is_noticed(folder: Path) -> None:
    shutil.copy(folder / MANIFEST, folder.with_name("old"))
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes")
        for number in range(3):
            bank.append(make_entry(f"later {number}", "text"))
    shutil.copy(folder.with_name("old"), folder / MANIFEST)
    with pytest.raises(StoreCorruptError, match="older than its twin"):
        MemoryStore.open(folder)
    rebuilt = MemoryStore.rebuild(folder)
    assert rebuilt is not None and rebuilt.whole
    assert "later 2" in banks(folder)["notes"].sources


def test_a_lost_manifest_and_a_damaged_segment_are_mended(tmp_path: Path, tiny_model_dir: Path) -> None:
    """A text whose record was readable in the damaged manifest is not lost with its segment."""
    model, folder = LongMem.from_pretrained(str(tiny_model_dir), device="cpu"), tmp_path / "memories"
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", model.bank_spec)
        model.write_text(bank, TINY_TEXT, source="a")
        expected = store.bank("notes")
    segment = next((folder / "segments").iterdir())
    segment.write_bytes(segment.read_bytes()[:-1])
    execute(folder / MANIFEST, "DROP TABLE tag")
    with pytest.raises(LongMemError):
        MemoryStore.open(folder)
    assert MemoryStore.rebuild(folder) is not None
    with MemoryStore.open(folder) as store:
        assert store.repair(model)[0].pieces == 1
        assert_same(store.bank("notes"), expected)


def test_what_is_forgotten_is_in_neither(folder: Path) -> None:
    with MemoryStore.open(folder) as store:
        store.bank("notes").append(make_entry("the s3cret source", "the s3cret text"))
        assert b"s3cret source" in (folder / f"{TWIN}-wal").read_bytes()
        store.forget("notes", [Stretch("the s3cret source")])
        assert b"s3cret" not in readable(folder)


def test_a_twin_that_cannot_be_written_writes_nothing(folder: Path) -> None:
    with MemoryStore.open(folder) as store:
        bank, before = store.bank("notes"), rows(folder / MANIFEST)
        with largest_file(4096), pytest.raises(StoreNotWritableError):
            bank.append(make_entry("later", "text"))
        assert rows(folder / MANIFEST) == before == rows(folder / TWIN)
        bank.append(make_entry("later", "text"))
        assert rows(folder / MANIFEST) == rows(folder / TWIN)


def append(folder: str, name: str) -> None:
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes")
        for _ in range(8):
            bank.append(make_entry(name, "again ", bank.length_of(name)))


def test_readers_beside_writers_see_no_damage(folder: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    writers = [processes.Process(target=append, args=(str(folder), f"writer {n}")) for n in range(1)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        MemoryStore.open(folder).close()
        assert not compare_in(folder, writable=True).damaged
    assert [writer.exitcode for writer in writers] == [0]
    assert rows(folder / MANIFEST) == rows(folder / TWIN)
