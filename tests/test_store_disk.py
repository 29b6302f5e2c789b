"""Disks that are full, cannot be written, or lie: real ones. What is damaged is named and never served."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_TEXT
from test_store import assert_same, files_of, lock, locked, segment_files, unprivileged  # noqa: F401 (a fixture)

from longmem.bank import MemoryBank
from longmem.errors import LongMemError, StoreCorruptError, StoreNotWritableError
from longmem.model import LongMem
from longmem.store import MemoryStore, Stretch


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LongMem:
    return LongMem.from_pretrained(str(tiny_model_dir), device="cpu")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


Operation = Callable[[MemoryStore, LongMem, Path], Any]

# Everything that writes. What it needs is there: banks `notes` (sources a and b), `copy`, and a file of one.
OPERATIONS: dict[str, Operation] = {
    "write": lambda store, model, _: model.write_text(store.bank("notes"), TINY_TEXT, source="new"),
    "create": lambda store, model, _: store.bank("new", model.bank_spec),
    "forget": lambda store, model, _: store.bank("notes").forget("a"),
    "forget a part": lambda store, model, _: store.forget("notes", [Stretch("a", 3, 9)], model),
    "consolidate": lambda store, model, _: store.consolidate("notes"),
    "fork": lambda store, model, _: store.fork("notes", "notes/fork"),
    "copy": lambda store, model, _: store.fork("notes", "new"),
    "merge": lambda store, model, _: store.merge("copy", "notes"),
    "tag": lambda store, model, _: store.tag("notes", "label"),
    "import": lambda store, model, file: store.import_(file, "new"),
    "delete": lambda store, model, _: store.delete("notes"),
    "index": lambda store, model, _: index(store.bank("notes")),
}


def index(bank: Any) -> None:
    from longmem.approximate import BankIndex

    heads, _, size = bank.keys_HNE.shape
    query_HQE = torch.randn(heads, 100, size, generator=torch.Generator().manual_seed(7))
    bank.save_index(BankIndex.choose(bank.keys_HNE, query_HQE, top_k=4, lists=False))


def fill(store: MemoryStore, model: LongMem, file: Path) -> MemoryBank:
    bank = store.bank("notes", model.bank_spec)
    model.write_text(bank, TINY_TEXT, source="a")
    store.fork("notes", "copy")
    model.write_text(bank, TINY_TEXT[::-1], source="b")
    store.export("copy", file)
    return bank


def state(store: MemoryStore) -> dict[str, tuple]:
    """What all banks hold, every file compared with its checksum."""
    banks = {info.name: store.bank(info.name) for info in store.banks()}
    return {
        name: (bank.sources, [bank.text_of(s) for s in bank.sources], bank.keys_HNE.float().sum().item())
        for name, bank in banks.items()
    }


def stuff(folder: Path) -> None:
    """Leave no byte free."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        for block in (1 << 16, 1 << 10, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * block)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_full_disk_loses_nothing(small: Path, tmp_path: Path, model: LongMem, name: str) -> None:
    with MemoryStore.open(small / "memories") as store:
        fill(store, model, tmp_path / "file")
        before = state(store)
        # SQLite has room for its log again only if that is emptied: no operation may count on it.
        store.manifest.query("PRAGMA wal_checkpoint(TRUNCATE)")
        stuff(small)
        failed = None
        try:
            OPERATIONS[name](store, model, tmp_path / "file")
        except StoreNotWritableError as error:
            failed = error
            assert str(small) in str(error)
        # What can be done without a free byte (to forget whole files, say) may be done.
        assert failed is not None or name in ("delete", "forget")
        if failed is not None:
            assert state(store) == before
        (small / "ballast").unlink()
        assert store.verify().ok
        if failed is not None:
            OPERATIONS[name](store, model, tmp_path / "file")
            assert store.verify().ok
            assert state(store) != before or name in ("consolidate", "tag", "merge", "index")
    with MemoryStore.open(small / "memories") as again:
        assert again.verify().ok and again.orphans() == []


def test_a_full_disk_does_not_take_an_export(small: Path, tmp_path: Path, model: LongMem) -> None:
    with MemoryStore.open(tmp_path / "memories") as store:
        fill(store, model, tmp_path / "file")
        stuff(small)
        with pytest.raises(StoreNotWritableError, match="was not exported"):
            store.export("notes", small / "file")
        assert [path.name for path in small.iterdir()] == ["ballast"]


def test_a_full_disk_does_not_mend(small: Path, tmp_path: Path, model: LongMem) -> None:
    with MemoryStore.open(small / "memories") as store:
        bank = fill(store, model, tmp_path / "file")
        flip(segment_files(small / "memories")[0], -300)
        damaged = [fault.file for fault in store.verify().faults]
        assert len(damaged) == 1
        stuff(small)
        with pytest.raises(StoreNotWritableError, match="was not mended"):
            store.repair(model)
        assert [fault.file for fault in store.verify().faults] == damaged
        (small / "ballast").unlink()
        store.repair(model)
        assert store.verify().ok
        assert_same(store.bank("notes"), bank)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_read_only_store_is_left_alone(locked: Path, tmp_path: Path, model: LongMem, name: str) -> None:  # noqa: F811
    with MemoryStore.open(locked / "memories") as store:
        bank = fill(store, model, tmp_path / "file")
    os.chmod(tmp_path / "file", 0o644)
    shutil.move(tmp_path / "file", locked / "file")
    lock(locked)
    before = {path: (locked / path).read_bytes() for path in files_of(locked)}
    with unprivileged(), MemoryStore.open(locked / "memories") as store:
        with pytest.raises(StoreNotWritableError, match="open for reading only"):
            OPERATIONS[name](store, model, locked / "file")
        assert_same(store.bank("notes"), bank)
    assert {path: (locked / path).read_bytes() for path in files_of(locked)} == before


# ---- damage ----------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped bit": lambda path: flip(path, path.stat().st_size // 2),
    "half written": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "missing": lambda path: path.unlink(),
    "another's": lambda path: path.write_bytes(
        next(other for other in path.parent.iterdir() if other != path).read_bytes()
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_never_served_nor_copied(tmp_path: Path, model: LongMem, damage: str) -> None:
    """Not by opening the bank, and not by anything that would carry it to another place."""
    folder = tmp_path / "memories"
    with MemoryStore.open(folder) as store:
        bank = fill(store, model, tmp_path / "file")
        ((file,),) = store.manifest.query(
            "SELECT file FROM segment JOIN piece ON piece.segment = segment.id WHERE source = 'b'"
        )
        DAMAGE[damage](folder / "segments" / file)
        before = files_of(folder)
        attempts: list[Callable[[], Any]] = [
            lambda: store.bank("notes"),
            lambda: store.consolidate("notes"),
            lambda: store.fork("notes", "new"),
            lambda: store.merge("copy", "notes"),
            lambda: store.export("notes", tmp_path / "other"),
        ]
        for attempt in attempts:
            with pytest.raises(StoreCorruptError, match=file):
                attempt()
        assert files_of(folder) == before and not (tmp_path / "other").exists()
        assert {info.name for info in store.banks()} == {"notes", "copy"}
        (fault,) = store.verify().faults
        assert fault.file == f"segments/{file}" and fault.sources == ("b",) and fault.bank == "notes"
        # A fork in the namespace copies nothing: it is as damaged, and is mended with it.
        store.fork("notes", "notes/fork")
        with pytest.raises(LongMemError, match=file):
            store.bank("notes/fork")
        store.repair(model)
        for name in ("notes", "notes/fork"):
            assert_same(store.bank(name), bank)
        assert store.verify().ok


def test_a_damaged_manifest_is_named(tmp_path: Path, model: LongMem) -> None:
    folder = tmp_path / "memories"
    with MemoryStore.open(folder) as store:
        fill(store, model, tmp_path / "file")
        assert store.manifest.scrub()  # no page is free
    whole = (folder / "manifest.sqlite").read_bytes()
    for position in (20, 100, *range(0, len(whole), 4096)):
        damaged = bytearray(whole)
        damaged[position : position + 64] = b"\xff" * 64
        (folder / "manifest.sqlite").write_bytes(damaged)
        found = []
        try:
            with MemoryStore.open(folder) as store:
                found = [fault.kind for fault in store.verify().faults]
        except LongMemError as error:
            assert "manifest.sqlite" in str(error)
        else:
            # A page that holds records alone: their own checksums tell.
            assert found
