"""Power loss: after every step, what was not synced is dropped, and the store opens with all that was acknowledged.

Every fsync, rename, link and unlink under the store's folder is recorded while it happens. Before each one the machine
"loses power": of files there is what the last fsync of each saw (nothing, without one), of folders what the last fsync
of the folder saw; or, as a disk may also do, names as they are now. SQLite's own files are not taken apart: of the
manifest there is what was committed, which SQLite promises with synchronous = FULL.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from conftest import TINY_TEXT
from test_store import SPEC, make_entry, make_index, readable

from longmem.bank import BankEntry
from longmem.config import EncodeConfig
from longmem.errors import StoreKeyError
from longmem.model import LongMem
from longmem.store import MemoryStore, Stretch
from longmem.store.twin import Twin

KEYS = "keys"
FOLDERS = ("segments", "indexes", "quarantine", KEYS)


def inside(store: Path, folder: str) -> Path:
    """Where one of its folders is: keys lie beside the store."""
    return store.with_name(f"{store.name}.keys") if folder == KEYS else store / folder


@dataclass(frozen=True)
class Crash:
    """A disk after power loss: the manifest and its twin, and the files of each folder."""

    manifest: bytes
    twin: bytes
    files: dict[str, bytes]
    acknowledged: frozenset[tuple[str, str]]  # source and text

    def write(self, folder: Path) -> None:
        (folder / "segments").mkdir(parents=True)
        (folder / "manifest.sqlite").write_bytes(self.manifest)
        (folder / "twin.sqlite").write_bytes(self.twin)
        for name, data in self.files.items():
            part, file = name.split("/")
            inside(folder, part).mkdir(exist_ok=True)
            (inside(folder, part) / file).write_bytes(data)


def different(crashes: Iterable[tuple[str, Crash, Any]]) -> list[tuple[str, Crash, Any]]:
    """Each disk once."""
    found: list[tuple[str, Crash, Any]] = []
    for one in crashes:
        if one not in found[-4:]:
            found.append(one)
    return found


class Disk:
    """What of a store's folder would survive now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.synced: dict[int, bytes] = {}  # by inode
        self.open: list[IO[bytes]] = []  # so that no inode is used twice
        self.names: dict[str, dict[str, int]] = {}  # inodes by name, as each folder's last fsync saw them
        self.acknowledged: frozenset[tuple[str, str]] = frozenset()
        self.crashes: list[Crash] = []

    def fsync(self, path: Path) -> None:
        for folder in FOLDERS:
            if path == inside(self.folder, folder):
                self.names[folder] = self._now(folder)
            elif path.parent == inside(self.folder, folder):
                if path.stat().st_ino not in self.synced:
                    self.open.append(path.open("rb"))
                self.synced[path.stat().st_ino] = path.read_bytes()

    def crash(self) -> None:
        """Remember the disks that a loss of power at this instant can leave."""
        manifest, twin = (_committed(self.folder / name) for name in ("manifest.sqlite", "twin.sqlite"))
        for names in (self.names, {folder: self._now(folder) for folder in FOLDERS}):
            files = {
                f"{folder}/{name}": self.synced.get(inode, b"")
                for folder, inodes in names.items()
                for name, inode in inodes.items()
            }
            self.crashes.append(Crash(manifest, twin, files, self.acknowledged))

    def _now(self, folder: str) -> dict[str, int]:
        path = inside(self.folder, folder)
        return {entry.name: entry.inode() for entry in os.scandir(path)} if path.exists() else {}


def _committed(path: Path) -> bytes:
    copy = sqlite3.connect(":memory:")
    source = sqlite3.connect(path)
    source.backup(copy)
    source.close()
    data = copy.serialize()
    copy.close()
    return data


@contextmanager
def recorded(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real calls, with a loss of power before and after each."""
    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "link", "unlink"):
            patch.setattr(os, name, _watched(disk, name, getattr(os, name)))
        # Between the two commits of a transaction.
        patch.setattr(Twin, "take", _watched(disk, "take", Twin.take))
        yield
    disk.crash()


def _watched(disk: Disk, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def watched(first: Any, *others: Any, **named: Any) -> Any:
        disk.crash()
        made = call(first, *others, **named)
        if name == "fsync":
            disk.fsync(Path(os.readlink(f"/proc/self/fd/{first}")))
        disk.crash()
        return made

    return watched


def check(crash: Crash, folder: Path) -> None:
    crash.write(folder)
    with MemoryStore.open(folder) as store:
        report = store.verify()
        assert report.faults == ()
        bank = store.bank("notes", SPEC)
        for source, text in crash.acknowledged:
            assert bank.text_of(source) == text


def test_nothing_acknowledged_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "memories"
    disk = Disk(folder)
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        with recorded(disk, monkeypatch):
            for seed in range(3):
                for source in ("a", "b"):
                    bank.append(make_entry(source, f"{seed} " * 40, bank.length_of(source), seed))
                    disk.acknowledged = frozenset((name, bank.text_of(name)) for name in bank.sources)
                    disk.crash()
            bank.save_index(make_index(bank))
            store.consolidate("notes")
            bank.append(make_entry("a", "more", bank.length_of("a"), 9))
            disk.acknowledged = frozenset({("a", bank.text_of("a"))})  # b is being forgotten
            bank.forget("b")
            bank.thin(torch.arange(len(bank)) % 3 > 0)
            store.consolidate("notes")
    assert len(disk.crashes) > 100
    for number, (_, crash, _) in enumerate(different(("", crash, None) for crash in disk.crashes)):
        check(crash, tmp_path / str(number))


def test_a_forgotten_source_stays_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "memories"
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        disk = Disk(folder)
        with recorded(disk, monkeypatch):
            bank.append(make_entry("a", "kept"))
            bank.append(make_entry("b", "s3cret"))
            bank.forget("b")
        disk.crash()
    crash = disk.crashes[-1]
    crash.write(tmp_path / "after")
    assert b"kept" in readable(tmp_path / "after") and b"s3cret" not in readable(tmp_path / "after")
    with_files = [data for name, data in crash.files.items() if name.endswith(".safetensors")]
    assert len(with_files) == 1


def test_a_repair_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    """Between a repair's steps the bank is damaged or mended; a second repair always mends, and loses nothing more."""
    model = LongMem.from_pretrained(str(tiny_model_dir), device="cpu")
    folder = tmp_path / "memories"
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", model.bank_spec)
        disk = Disk(folder)
        with recorded(disk, monkeypatch):
            model.write_text(bank, TINY_TEXT, source="a")
            model.write_text(bank, "The harbour is quiet. ", source="b")
        for path in sorted((folder / "segments").iterdir()):
            data = bytearray(path.read_bytes())
            data[-5] ^= 1  # the text comes last
            path.write_bytes(data)
            disk.synced[path.stat().st_ino] = bytes(data)
        with sqlite3.connect(folder / "manifest.sqlite") as database:
            database.execute("DELETE FROM record WHERE piece = 2")
        disk.crashes.clear()
        with recorded(disk, monkeypatch):
            assert len(store.repair(model)[0].quarantined) == 1
    assert len(disk.crashes) > 10
    for number, crash in enumerate(disk.crashes):
        crash.write(tmp_path / str(number))
        with MemoryStore.open(tmp_path / str(number)) as again:
            again.repair(model)
            report = again.verify()
            assert report.ok and report.quarantined == 1
            mended = again.bank("notes")
            assert mended.text_of("a") == TINY_TEXT
            tokens = len(mended.tokens_of("a"))
            assert torch.equal(mended.keys_HNE[:, :tokens], bank.keys_HNE[:, :tokens])
            # What could not be mended was moved, not deleted, whenever the power went.
            assert len(list((tmp_path / str(number) / "quarantine").iterdir())) == 1


class Model:
    """Encodes without a backbone: keys and values follow from the token ids before and at each place."""

    bank_spec = SPEC

    def encode(
        self, token_ids_N: torch.Tensor, start: int = 0, *, windows: EncodeConfig | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen_N = token_ids_N.cumsum(0)[start:] % 251
        keys_HNE = seen_N.bfloat16().expand(2, 8, -1).transpose(1, 2).contiguous()
        return keys_HNE, -keys_HNE

    def tokenizer(self, text: str, **_: Any) -> dict[str, list]:
        return {"input_ids": [ord(c) for c in text], "offset_mapping": [(n, n + 1) for n in range(len(text))]}

    def entry(self, source: str, text: str, char_start: int = 0, before: str = "") -> BankEntry:
        ids_N = torch.tensor([ord(c) for c in text])
        places_N = torch.arange(char_start, char_start + len(text))
        before_N = torch.tensor([ord(c) for c in before], dtype=torch.int64)
        keys_values = self.encode(torch.cat((before_N, ids_N)), len(before_N))
        return BankEntry(source, text, char_start, ids_N, torch.stack([places_N, places_N + 1], 1), *keys_values)


def held(store: MemoryStore) -> dict[str, dict[str, str]]:
    """Texts of all banks whose keys are there; every file is read and compared with its checksum."""
    banks = {}
    for info in store.banks():
        with suppress(StoreKeyError):
            banks[info.name] = store.bank(info.name)
    return {name: {source: bank.text_of(source) for source in bank.sources} for name, bank in banks.items()}


def crashes_of(
    store: MemoryStore, disk: Disk, steps: dict[str, Callable[[MemoryStore], Any]], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, Crash, list[dict[str, dict[str, str]]]]]:
    """Losses of power at any instant of steps taken one after another: of which step, what is on disk then, and what a
    store may hold that is opened on it."""
    crashes = []
    for name, step in steps.items():
        before = held(store)
        disk.crashes.clear()
        with recorded(disk, monkeypatch):
            step(store)
        disk.crash()
        # The last ones are after it returned: then it is done.
        *during, after_synced, after_now = disk.crashes
        states = [before, held(store)]
        crashes += [(name, crash, states) for crash in during]
        crashes += [(name, crash, states[1:]) for crash in (after_synced, after_now)]
    return crashes


def test_every_operation_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of power at any step of any operation, the store is what it was before it or after it."""
    folder, model, secret = tmp_path / "memories", Model(), "the s3cret stone"
    steps: dict[str, Callable[[MemoryStore], Any]] = {
        "tag": lambda store: store.tag("notes", "first", 2),
        "fork": lambda store: store.fork("notes", "notes/draft"),
        "copy": lambda store: store.fork("notes", "copy", version=2),
        "append": lambda store: store.bank("notes/draft").append(model.entry("c", "only the fork")),
        "consolidate": lambda store: store.consolidate("notes/draft"),
        "merge": lambda store: store.merge("copy", "notes/draft"),
        "export": lambda store: store.export("copy", tmp_path / "file"),
        "import": lambda store: store.import_(tmp_path / "file", "again"),
        "forget a part": lambda store: store.forget("notes", [Stretch("b", 4, 4 + len(secret))], model),
        "forget": lambda store: store.forget("notes/draft", [Stretch("a")], model),
        "delete": lambda store: store.delete("notes"),
    }
    disk = Disk(folder)
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        with recorded(disk, monkeypatch):
            bank.append(model.entry("a", "one two three "))
            bank.append(model.entry("b", f"and {secret} here"))
            bank.append(model.entry("a", "four", 14, "one two three "))
        crashes = crashes_of(store, disk, steps, monkeypatch)
    assert {name for name, _, _ in crashes} == set(steps) and len(crashes) > 100
    for number, (name, crash, states) in enumerate(different(crashes)):
        crash.write(tmp_path / str(number))
        with MemoryStore.open(tmp_path / str(number)) as again:
            assert again.verify().ok, name
            assert held(again) in states, name
            assert again.orphans() == [], name
        if name == "delete" and len(states) == 1:
            # It lives on where it was copied to other namespaces, and nowhere else.
            holders = [bank for bank, sources in states[0].items() if any(secret in text for text in sources.values())]
            assert len(holders) == 2 and secret.encode() in readable(tmp_path / str(number))
            with MemoryStore.open(tmp_path / str(number)) as again:
                for bank in holders:
                    again.delete(bank)
            assert secret.encode() not in readable(tmp_path / str(number))


def test_encryption_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of power a namespace is as readable as before, or encrypted, and then nothing of it can be read."""
    pytest.importorskip("cryptography")
    folder, model, secret = tmp_path / "memories", Model(), "the s3cret stone"
    steps: dict[str, Callable[[MemoryStore], Any]] = {
        "encrypt": lambda store: store.encrypt("notes"),
        "append": lambda store: store.bank("notes").append(model.entry("c", "more")),
        "fork": lambda store: store.fork("notes", "notes/draft"),
        "copy": lambda store: store.fork("notes", "copy"),
        "forget": lambda store: store.forget("notes", [Stretch("a")]),
        "destroy": lambda store: store.destroy_key("notes"),
        "delete": lambda store: store.delete("notes"),
        "encrypt a new one": lambda store: store.encrypt("later"),
    }
    disk = Disk(folder)
    with MemoryStore.open(folder) as store:
        bank = store.bank("notes", SPEC)
        with recorded(disk, monkeypatch):
            bank.append(model.entry("a", "one two three "))
            bank.append(model.entry(f"named {secret}", f"and {secret} here, where nobody looks, behind the boathouse"))
            bank.append(model.entry("a", "four", 14, "one two three "))
            bank.keep_scores("surprise", {piece.id: torch.ones(piece.tokens) for piece in bank.pieces})
            bank.save_index(make_index(bank))
        crashes = crashes_of(store, disk, steps, monkeypatch)
    assert {name for name, _, _ in crashes} == set(steps) and len(crashes) > 100
    for number, (name, crash, states) in enumerate(different(crashes)):
        where = tmp_path / str(number)
        crash.write(where)
        with MemoryStore.open(where) as again:
            assert {fault.kind for fault in again.verify().faults} <= {"key"}, name
            assert held(again) in states, name
            assert again.orphans() == [], name
            encrypted = {row[0] for row in again.manifest.query("SELECT namespace FROM encryption")}
            if encrypted:
                assert secret.encode() not in readable(where), name
            # Whatever the power took, each step can be done again.
            if name == "encrypt" and not encrypted:
                assert secret.encode() in readable(where)  # the scan can see
                again.encrypt("notes")
                assert secret.encode() not in readable(where) and held(again) == states[-1]
            if name == "destroy":
                again.destroy_key("notes")
                assert set(held(again)) == {"copy"}
                assert len(list(inside(where, KEYS).iterdir())) == 1
