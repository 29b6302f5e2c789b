"""Damage to a store is named, blocks no other bank, and is mended with the very bits of a fresh write."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch
from conftest import TINY_TEXT
from test_store import assert_same, largest_file, write_version_1

from longmem.bank import MemoryBank
from longmem.config import Precision
from longmem.errors import BankMismatchError, BankNotFoundError, StoreCorruptError, StoreNotWritableError
from longmem.model import LongMem
from longmem.store import MemoryStore

MORE = "The lighthouse of Brest was lit in March.\n"


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    return LongMem.from_pretrained(str(tiny_model_dir), device="cpu")


@pytest.fixture
def folder(tmp_path: Path, model: LongMem) -> Path:
    """Bank `notes`: source a in two pieces around source b; bank `other`."""
    folder = tmp_path / "memories"
    with MemoryStore.open(folder) as store:
        for name in ("notes", "other"):
            write(store.bank(name, model.bank_spec), model)
    return folder


def write(bank: MemoryBank, model: LongMem) -> MemoryBank:
    model.write_text(bank, TINY_TEXT, source="a")
    model.write_text(bank, "Bees dream of the sea. " * 3, source="b")
    model.write_text(bank, MORE, source="a", append=True)
    return bank


@pytest.fixture
def fresh(model: LongMem) -> MemoryBank:
    return write(model.new_bank(), model)


def files(folder: Path, bank: str = "notes") -> list[Path]:
    """Segment files of a bank, in order."""
    database = sqlite3.connect(folder / "manifest.sqlite")
    rows = database.execute(
        "SELECT DISTINCT segment, file FROM held JOIN piece ON piece.id = piece JOIN segment ON segment.id = segment "
        "WHERE held.bank = (SELECT id FROM bank WHERE name = ?) ORDER BY ordinal",
        (bank,),
    ).fetchall()
    database.close()
    return [folder / "segments" / file for _, file in rows]


def execute(folder: Path, sql: str) -> None:
    """Change the manifest, as if it had always been so."""
    database = sqlite3.connect(folder / "manifest.sqlite")
    database.execute(sql)
    database.commit()
    database.close()
    (folder / "twin.sqlite").unlink(missing_ok=True)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "-" not in path.name}


def test_a_whole_store_has_no_faults(folder: Path) -> None:
    with MemoryStore.open(folder) as store:
        before, read = snapshot(folder), []
        report = store.verify(on_bytes=read.append)
        assert report.ok and (report.banks, report.segments, report.without_record) == (2, 6, 0)
        assert sum(read) == report.bytes == sum(path.stat().st_size for path in (folder / "segments").iterdir())
        assert store.verify("notes").tokens * 2 == report.tokens
        with pytest.raises(BankNotFoundError, match="It has: notes, other"):
            store.verify("x")
        assert snapshot(folder) == before


@pytest.mark.parametrize("kind", ["missing", "size", "checksum"])
def test_damage_is_named_blocks_one_bank_and_is_mended(
    folder: Path, model: LongMem, fresh: MemoryBank, kind: str
) -> None:
    damaged = files(folder)[0]
    if kind == "missing":
        damaged.unlink()
    elif kind == "size":
        damaged.write_bytes(damaged.read_bytes()[:-1])
    else:
        flip(damaged, damaged.stat().st_size // 2)
    with MemoryStore.open(folder) as store:
        (fault,) = store.verify().faults
        assert (fault.bank, fault.sources, fault.kind) == ("notes", ("a",), kind)
        assert fault.file == f"segments/{damaged.name}" and "cannot be opened" in fault.meaning
        assert store.verify("other").ok
        with pytest.raises(StoreCorruptError, match=r"longmem verify --store .*longmem repair --store .* --bank notes"):
            store.bank("notes")
        assert_same(store.bank("other"), fresh)
        seen = []
        mended, other = store.repair(model, on_tokens=seen.append)
        assert (mended.bank, mended.pieces, mended.quarantined) == ("notes", 1, ())
        assert (other.bank, other.pieces) == ("other", 0) and sum(seen) == mended.tokens
        assert store.verify().ok and not damaged.exists() and not (folder / "quarantine").exists()
        assert_same(store.bank("notes"), fresh)
        assert store.repair(model, "notes")[0].pieces == 0


def test_a_consolidated_bank_is_mended(folder: Path, model: LongMem, fresh: MemoryBank) -> None:
    with MemoryStore.open(folder) as store:
        store.consolidate("notes")
        (damaged,) = files(folder)
        flip(damaged, 9000)
        assert store.verify().faults[0].sources == ("a", "b")
        assert store.repair(model, "notes")[0].pieces == 3
        assert_same(store.bank("notes"), fresh)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_bank_in_few_bits_is_mended(tmp_path: Path, model: LongMem, precision: Precision) -> None:
    spec = model.bank_spec_in(precision)
    expected = write(MemoryBank(spec), model)
    with MemoryStore.open(tmp_path / "few") as store:
        write(store.bank("notes", spec), model)
        damaged = files(tmp_path / "few")[0]
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        assert not store.verify().ok
        (made,) = store.repair(model)
        assert (made.pieces, made.quarantined) == (1, ())
        assert store.verify().ok
        assert_same(store.bank("notes", model.bank_spec), expected)


def test_every_segment_may_be_gone(folder: Path, model: LongMem, fresh: MemoryBank) -> None:
    for path in files(folder):
        path.unlink()
    with MemoryStore.open(folder) as store:
        assert len(store.verify().faults) == 3
        assert store.repair(model, "notes")[0].pieces == 3
        assert_same(store.bank("notes"), fresh)


def test_another_model_mends_nothing(folder: Path, other_tiny_model_dir: Path) -> None:
    flip(files(folder)[0], 5000)
    other = LongMem.from_pretrained(str(other_tiny_model_dir), device="cpu")
    with MemoryStore.open(folder) as store:
        before = snapshot(folder)
        with pytest.raises(BankMismatchError, match="'notes' can be mended only by the model that wrote it"):
            store.repair(other)
        assert snapshot(folder) == before
        assert store.repair(other, "other")[0].pieces == 0


def test_a_damaged_record_is_written_again(folder: Path, model: LongMem) -> None:
    execute(
        folder,
        "UPDATE record SET data = CAST(substr(data, 1, 40) || x'00' || substr(data, 42) AS BLOB) WHERE piece = 1",
    )
    with MemoryStore.open(folder) as store:
        (fault,) = store.verify().faults
        assert (fault.kind, fault.sources) == ("record", ("a",)) and "nothing is lost" in fault.meaning
        store.bank("notes")
        assert store.repair(model, "notes")[0].records == 1
        assert store.verify().ok


def test_damaged_numbers_count_as_none(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes")
        bank.keep_scores("surprise", {piece.id: torch.ones(piece.tokens) for piece in bank.pieces})
        kept = bank.scores("surprise")
    cut = "CAST(substr(data, 1, 6) || x'00' || substr(data, 8) AS BLOB)"
    execute(folder, f"UPDATE score SET data = {cut} WHERE piece = 1")
    with MemoryStore.open(folder) as store:
        assert [(fault.kind, fault.sources) for fault in store.verify().faults] == [("score", ("a",))]
        assert set(kept) - set(store.bank("notes").scores("surprise")) == {1}
        store.repair(model)
        assert store.verify().ok and len(store.manifest.query("SELECT * FROM score")) == len(kept) - 1


def test_lost_text_ends_its_source_and_is_moved_aside(folder: Path, model: LongMem, fresh: MemoryBank) -> None:
    damaged = files(folder)[2]
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[: len(kept) // 2])
    execute(folder, "DELETE FROM record WHERE piece = 3")
    with MemoryStore.open(folder) as store:
        (repair,) = store.repair(model, "notes")
        (lost,) = repair.quarantined
        assert (lost.source, lost.char_start, lost.chars, lost.text_kept) == ("a", len(TINY_TEXT), len(MORE), False)
        assert "text is lost" in lost.reason and lost.file == f"quarantine/{damaged.name}"
        assert (folder / "quarantine" / damaged.name).read_bytes() == kept[: len(kept) // 2]
        report = store.verify()
        assert report.ok and report.quarantined == 1
        bank = store.bank("notes")
        assert bank.sources == ("a", "b") and bank.text_of("a") == TINY_TEXT
        assert torch.equal(bank.keys_HNE, fresh.keys_HNE[:, : len(bank)])
        model.write_text(bank, MORE, source="a", append=True)  # the user still has it
        assert_same(bank, fresh)
        bank.forget("a")
        assert list((folder / "quarantine").iterdir()) == [] and store.verify().quarantined == 0


def test_what_follows_lost_text_is_kept_aside_whole(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        reader = store.bank("notes")
        files(folder)[0].unlink()
        execute(folder, "DELETE FROM record WHERE piece = 1")
        later = files(folder)[2]
        kept = later.read_bytes()
        first, second = store.repair(model, "notes")[0].quarantined
        assert (first.file, first.text_kept) == (None, False)
        assert (second.file, second.text_kept) == (f"quarantine/{later.name}", True)
        assert "lost before it" in second.reason
        assert (folder / "quarantine" / later.name).read_bytes() == kept
        assert store.bank("notes").sources == ("b",) and store.verify().ok
        reader.refresh()
        assert_same(reader, store.bank("notes"))
        reader.forget("a")  # what is in quarantine of it
        assert list((folder / "quarantine").iterdir()) == []
        store.delete("notes")


def test_a_file_aside_goes_with_any_source_that_it_holds(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        store.consolidate("notes")
        execute(folder, "DELETE FROM record WHERE piece = 3")
        (damaged,) = files(folder)
        flip(damaged, damaged.stat().st_size - len(MORE))  # the text itself
        (repair,) = store.repair(model, "notes")
        assert len(repair.quarantined) == 1 and repair.pieces == 2
        assert len(list((folder / "quarantine").iterdir())) == 1
        store.bank("notes").forget("b")
        assert list((folder / "quarantine").iterdir()) == []
        assert store.verify().ok and store.verify().quarantined == 1


def test_a_gap_in_a_source_is_named_and_cut(folder: Path, model: LongMem) -> None:
    execute(folder, "UPDATE piece SET char_start = char_start + 1 WHERE id = 3")
    with MemoryStore.open(folder) as store:
        assert {fault.kind for fault in store.verify().faults} == {"gap", "header"}
        assert len(store.repair(model, "notes")[0].quarantined) == 1
        assert store.verify().ok and store.bank("notes").text_of("a") == TINY_TEXT


def test_a_store_of_the_first_version_is_mended(tmp_path: Path, model: LongMem) -> None:
    """It has the text in one place; if keys or values alone are damaged, that can be proved."""
    folder = tmp_path / "old"
    entry = model.encode_text(TINY_TEXT, source="a")
    write_version_1(folder, [entry, model.encode_text(MORE, source="b")], model.bank_spec)
    with MemoryStore.open(folder) as store:
        report = store.verify()
        assert report.ok and report.without_record == 2
        first, second = files(folder)
        size = first.stat().st_size
        flip(first, size - len(TINY_TEXT) - 5)  # values are the last tensor but the text
        flip(second, second.stat().st_size - 3)
        (repair,) = store.repair(model)
        (lost,) = repair.quarantined
        assert (repair.pieces, lost.source) == (1, "b") and "text is lost" in lost.reason
        assert torch.equal(store.bank("notes").values_HNE, entry.values_HNE)
        assert store.verify().ok and store.verify().without_record == 0


def test_a_damaged_index_is_named_and_removed(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        (folder / "indexes").mkdir()
        (folder / "indexes" / "1.safetensors").write_bytes(b"x" * 100)
        (fault,) = store.verify().faults
        assert (fault.kind, fault.bank, fault.file) == ("index", "notes", "indexes/1.safetensors")
        assert store.repair(model, "notes")[0].index_removed
        assert store.verify().ok


def test_orphans_are_listed_and_are_no_fault(folder: Path) -> None:
    with MemoryStore.open(folder) as store:
        (folder / "segments" / "0.safetensors").write_bytes(b"x")
        assert store.verify().ok and store.verify().orphans == ("segments/0.safetensors",)


def test_a_forgotten_file_that_a_crash_left_in_quarantine_goes(folder: Path) -> None:
    (folder / "quarantine").mkdir()
    (folder / "quarantine" / "0.safetensors").write_bytes(b"forgotten")
    with MemoryStore.open(folder) as store:
        assert list((folder / "quarantine").iterdir()) == [] and store.verify().orphans == ()


def test_a_repair_that_cannot_write_changes_nothing(folder: Path, model: LongMem) -> None:
    damaged, *_ = files(folder)
    flip(damaged, 5000)
    with MemoryStore.open(folder) as store:
        before = snapshot(folder)
        with largest_file(4096), pytest.raises(StoreNotWritableError, match="was not mended"):
            store.repair(model)
        assert snapshot(folder) == before
    # Nothing to encode, so that it is the manifest's log that does not fit.
    for path in files(folder)[1:]:
        path.write_bytes(b"lost")
    damaged.write_bytes(b"lost")
    execute(folder, "DELETE FROM record")
    with MemoryStore.open(folder) as store:
        before = snapshot(folder)
        with largest_file(4096), pytest.raises(StoreNotWritableError):
            store.repair(model, "notes")
        assert snapshot(folder) == before
        assert len(store.repair(model, "notes")[0].quarantined) == 3
        assert store.bank("notes").sources == () and store.verify().ok


def test_a_bank_in_use_can_go_on_after_a_repair(folder: Path, model: LongMem) -> None:
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes")
        flip(files(folder)[0], 5000)
        store.repair(model, "notes")
        model.write_text(bank, "One more. ", source="c")
        assert_same(store.bank("notes"), bank)
