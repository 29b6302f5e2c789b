"""MemoryStore: named banks in a folder. What `append` has acknowledged survives a crash; what it has not is invisible.

    memories/manifest.sqlite             which banks there are, and which segments each holds
    memories/segments/<hex>.safetensors  immutable: keys, values, tokens and text of one `BankEntry`
    memories/indexes/<id>.safetensors    a cache: the index of a bank, of the bank's id in the manifest

A segment is committed by a single manifest transaction, after its file is complete and synced. Files that no
manifest row names are left-overs of a crash and mean nothing. docs/format.md describes every byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from longmem.approximate import BankIndex
from longmem.bank import BankEntry, MemoryBank, require_cpu
from longmem.config import BankSpec
from longmem.errors import (
    BankError,
    BankIndexError,
    BankMismatchError,
    BankNotFoundError,
    SourceError,
    StoreCorruptError,
    StoreError,
    StoreNotWritableError,
)

MANIFEST = "manifest.sqlite"
SEGMENTS = "segments"
INDEXES = "indexes"
FORMAT_VERSION = 1
INDEX_VERSION = 1
APPLICATION_ID = 0x4C4D454D  # "LMEM"

SCHEMA = """
CREATE TABLE bank (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    name     TEXT    NOT NULL UNIQUE,
    spec     TEXT    NOT NULL,
    revision INTEGER NOT NULL,
    created  TEXT    NOT NULL,
    updated  TEXT    NOT NULL
);
CREATE TABLE segment (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    bank       INTEGER NOT NULL REFERENCES bank (id),
    ordinal    INTEGER NOT NULL,
    source     TEXT    NOT NULL,
    char_start INTEGER NOT NULL,
    chars      INTEGER NOT NULL,
    tokens     INTEGER NOT NULL,
    file       TEXT    NOT NULL UNIQUE,
    sha256     TEXT    NOT NULL,
    bytes      INTEGER NOT NULL,
    created    TEXT    NOT NULL,
    UNIQUE (bank, ordinal)
);
"""

_NAME_PART = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+"
_NAME = re.compile(rf"{_NAME_PART}(?:/{_NAME_PART})*")
# A temporary file this old belongs to no append that still runs. Were it one after all (a suspended machine),
# its rename fails and nothing is committed.
_STALE_SECONDS = 3600
_BUSY_SECONDS = 30.0


@dataclass(frozen=True)
class BankInfo:
    """What the manifest knows of a bank.

    Attributes:
        tokens, sources: how many are remembered.
        bytes: size of its segment files.
        backbone: name of the backbone that wrote it.
        created, updated: UTC; `updated` is the last append or forget.
    """

    name: str
    tokens: int
    sources: int
    bytes: int
    backbone: str
    created: datetime
    updated: datetime


@dataclass(frozen=True)
class SourceInfo:
    """A remembered source: its size in tokens and characters, and when its first piece was written (UTC)."""

    source: str
    tokens: int
    chars: int
    created: datetime


@dataclass(frozen=True)
class _Segment:
    """The columns of a manifest row that a bank keeps in memory."""

    id: int
    source: str
    char_start: int
    chars: int
    tokens: int
    file: str
    sha256: str
    created: str


_SEGMENT_COLUMNS = ", ".join(field.name for field in dataclasses.fields(_Segment))


def check_bank_name(name: str) -> None:
    """Raise `BankError` unless `name` can name a bank."""
    if _NAME.fullmatch(name) is None:
        raise BankError(
            f"{name!r} cannot name a bank. Use letters, digits, '.', '_' and '-', in parts joined by '/', "
            "such as 'notes' or 'user/1234'."
        )


class MemoryStore:
    """Named memory banks in one folder. Several processes may read and write it at once.

    Use `MemoryStore.open`; it is a context manager, or call `close`.
    """

    def __init__(self, folder: Path, database: sqlite3.Connection, *, writable: bool) -> None:
        self.folder = folder
        self.writable = writable
        self._db = database
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = True) -> MemoryStore:
        """Open the store in a folder. Without one, create folder and store, or fail if `create` is False.

        A store that cannot be written is opened for reading; `append` and `forget` then raise.

        Raises:
            StoreNotWritableError: if there is no store and none can be created.
            StoreError: if there is no store and `create` is False, or the folder holds something else.
        """
        folder = Path(path)
        manifest = folder / MANIFEST
        if not os.path.exists(manifest):
            if not create:
                raise StoreError(
                    f"No store in {folder}: it has no {MANIFEST}. "
                    "Give the folder of an existing store, or write to this one first."
                )
            writable = True
        else:
            writable = _can_write(folder) and _can_write(manifest)
        if writable:
            _create_folder(folder)
        with _explained(folder):
            database = _connect(manifest) if writable else _connect_read_only(manifest)
            try:
                _check_format(database, folder, writable=writable)
            except BaseException:
                database.close()
                raise
        store = cls(folder, database, writable=writable)
        if writable:
            store._sweep()
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"MemoryStore({str(self.folder)!r}{'' if self.writable else ', read-only'})"

    def close(self) -> None:
        """Close the manifest. Banks that are open can still be read from memory, not written."""
        with self._lock:
            self._db.close()

    def banks(self) -> list[BankInfo]:
        """Every bank of the store, by name."""
        rows = self._query(
            """
            SELECT bank.name, COALESCE(SUM(tokens), 0), COUNT(DISTINCT source), COALESCE(SUM(bytes), 0), spec,
                   bank.created, updated
            FROM bank LEFT JOIN segment ON segment.bank = bank.id GROUP BY bank.id ORDER BY bank.name
            """
        )
        return [
            BankInfo(
                name,
                tokens,
                sources,
                size,
                BankSpec.from_json(spec).backbone,
                datetime.fromisoformat(created),
                datetime.fromisoformat(updated),
            )
            for name, tokens, sources, size, spec, created, updated in rows
        ]

    def bank(
        self,
        name: str,
        spec: BankSpec | None = None,
        *,
        device: torch.device | str = "cpu",
        verify: bool = True,
        search: Literal["exact", "index"] = "exact",
    ) -> StoredBank:
        """Open a bank and load it onto a device; with a spec, create it if there is none.

        Args:
            name: letters, digits and `._-`, in parts joined by `/`: "notes", "user/1234".
            spec: what the bank's tensors mean (`LongMem.bank_spec`). None opens an existing bank only.
            verify: compare every segment file with its checksum.
            search: "index" searches with the index that the bank has (`StoredBank.load_index`).

        Raises:
            BankNotFoundError: if there is no such bank and no spec.
            BankIndexError: if an index is asked for, and there is none or it does not fit.
            BankMismatchError: if the bank was written with another spec.
            StoreCorruptError: if a segment file is missing or damaged.
            StoreNotWritableError: if the bank would have to be created in a read-only store.
        """
        check_bank_name(name)
        row = self._find(name)
        if row is None:
            # A bank that is new has no index.
            if spec is None or search == "index":
                raise self._not_found(name)
            row = self._create_bank(name, spec)
        bank_id, stored = row
        if spec is not None and spec != stored:
            raise BankMismatchError(_mismatch(name, stored=stored, given=spec))
        bank = StoredBank(self, bank_id, name, stored, device, verify=verify)
        bank.refresh()
        if search == "index":
            bank.load_index()
        return bank

    def delete(self, name: str) -> None:
        """Drop a bank and the bytes of everything it remembers.

        Raises:
            BankNotFoundError: if there is no such bank.
        """
        with self._transaction() as database:
            row = self._find(name)
            if row is None:
                raise self._not_found(name)
            files = [file for (file,) in database.execute("SELECT file FROM segment WHERE bank = ?", row[:1])]
            database.execute("DELETE FROM segment WHERE bank = ?", row[:1])
            database.execute("DELETE FROM bank WHERE id = ?", row[:1])
            self._drop_index(row[0])
        self._erase(files)

    def _find(self, name: str) -> tuple[int, BankSpec] | None:
        for bank_id, spec in self._query("SELECT id, spec FROM bank WHERE name = ?", name):
            return bank_id, BankSpec.from_json(spec)
        return None

    def _create_bank(self, name: str, spec: BankSpec) -> tuple[int, BankSpec]:
        with self._transaction() as database:
            now = _now()
            database.execute(
                "INSERT OR IGNORE INTO bank (name, spec, revision, created, updated) VALUES (?, ?, 0, ?, ?)",
                (name, spec.to_json(), now, now),
            )
            # Another process may have been first, with another spec.
            row = self._find(name)
        assert row is not None
        return row

    def _not_found(self, name: str) -> BankNotFoundError:
        names = ", ".join(name for (name,) in self._query("SELECT name FROM bank ORDER BY name"))
        return BankNotFoundError(
            f"No bank {name!r} in {self.folder}. It has: {names or 'no banks yet'}. "
            "Check the name, or write to the bank to create it."
        )

    def _segment_path(self, file: str) -> Path:
        return self.folder / SEGMENTS / file

    def _index_path(self, bank_id: int) -> Path:
        return self.folder / INDEXES / f"{bank_id}.safetensors"

    def _drop_index(self, bank_id: int) -> bool:
        """Remove a bank's index, if it has one, and its bytes."""
        path = self._index_path(bank_id)
        try:
            path.unlink()
            _sync_folder(path.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreNotWritableError(
                f"{path} cannot be removed: {error}. Check the permissions of {path.parent}."
            ) from error
        return True

    def _query(self, sql: str, *values: object) -> list[tuple]:
        with self._lock, _explained(self.folder):
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The write lock of the store, held until everything inside is committed or, on any exception, undone."""
        self._require_writable()
        with self._lock, _explained(self.folder):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreNotWritableError(
                f"The store in {self.folder} is open for reading only: its folder or manifest cannot be written. "
                "Change their permissions and open it again, or copy the store."
            )

    def _is_committed(self, file: str) -> bool:
        return bool(self._query("SELECT 1 FROM segment WHERE file = ?", file))

    def _discard(self, file: str) -> None:
        """Remove what a failed append may have left."""
        # An interrupt can arrive after the commit: then the file is part of the store. A manifest that cannot be
        # read decides nothing; the next writable open sweeps.
        with suppress(StoreError, OSError):
            if not self._is_committed(file):
                self._segment_path(file).with_suffix(".tmp").unlink(missing_ok=True)
                self._segment_path(file).unlink(missing_ok=True)

    def _erase(self, files: list[str]) -> None:
        """Unlink segment files that no row names any more."""
        try:
            for file in files:
                self._segment_path(file).unlink(missing_ok=True)
            _sync_folder(self.folder / SEGMENTS)
        except OSError as error:
            raise StoreNotWritableError(
                f"Forgotten, but a file is still in {self.folder / SEGMENTS}: {error}. "
                "It goes when the store is next opened and can be written."
            ) from error
        # The log holds the deleted rows, names of sources among them, until it is written back. While another
        # process reads, this does nothing; the last process to close the store does it then.
        with suppress(StoreError):
            self._query("PRAGMA wal_checkpoint(TRUNCATE)")

    def _sweep(self) -> None:
        """Remove files that crashed processes left behind."""
        stale = time.time() - _STALE_SECONDS
        try:
            if not self._orphans(stale):
                return
            # Files get their final name under the write lock only: one without a row, seen under that lock, has no
            # owner that could still commit it.
            with self._transaction():
                for path in self._orphans(stale):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreNotWritableError(f"{self.folder / SEGMENTS} cannot be written: {error}.") from error

    def _orphans(self, stale: float) -> list[Path]:
        paths = [path for part in (SEGMENTS, INDEXES) for path in (self.folder / part).glob("*")]
        known = {file for (file,) in self._query("SELECT file FROM segment")}
        known |= {self._index_path(bank_id).name for (bank_id,) in self._query("SELECT id FROM bank")}
        orphans = [path for path in paths if path.suffix == ".safetensors" and path.name not in known]
        for path in paths:
            with suppress(FileNotFoundError):
                if path.suffix == ".tmp" and path.stat().st_mtime < stale:
                    orphans.append(path)
        return orphans


class StoredBank(MemoryBank):
    """A `MemoryBank` whose tokens are on disk as well: `append` and `forget` are durable when they return.

    Made by `MemoryStore.bank`. Its memory is what the store held at the last `append`, `forget` or `refresh`.
    """

    def __init__(
        self,
        store: MemoryStore,
        bank_id: int,
        name: str,
        spec: BankSpec,
        device: torch.device | str = "cpu",
        *,
        verify: bool = True,
    ) -> None:
        super().__init__(spec, device)
        self.name = name
        self._store = store
        self._id = bank_id
        self._verify = verify
        self._revision = -1
        self._segments: dict[int, _Segment] = {}

    def append(self, entry: BankEntry) -> None:
        """Remember `entry` durably, after what other processes have appended in the meantime.

        When it raises, neither the store nor any reader has the entry. (A `KeyboardInterrupt` may come too late to
        undo it; `refresh` shows.)

        Raises:
            BankError: as `MemoryBank.append`; also if another process has extended the source first.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        store = self._store
        store._require_writable()
        self.refresh()
        self.check(entry)
        text = _encode_text(entry)
        file = secrets.token_hex(16) + ".safetensors"
        path = store._segment_path(file)
        temporary = path.with_suffix(".tmp")
        try:
            sha256, size = _write_segment(temporary, entry, text)
            with store._transaction() as database:
                # Under the write lock nobody else extends the bank: what holds now holds until the commit.
                self.refresh()
                self.check(entry)
                self._reserve(len(self) + len(entry))
                os.rename(temporary, path)
                _sync_folder(path.parent)
                now = _now()
                row = (entry.source, entry.char_start, len(entry.text), len(entry), file, sha256, now)
                (ordinal,) = database.execute(
                    "SELECT COALESCE(MAX(ordinal) + 1, 0) FROM segment WHERE bank = ?", (self._id,)
                ).fetchone()
                segment_id = database.execute(
                    "INSERT INTO segment "
                    "(source, char_start, chars, tokens, file, sha256, created, bank, ordinal, bytes) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*row, self._id, ordinal, size),
                ).lastrowid
                self._touch(database, now)
        except OSError as error:
            store._discard(file)
            raise StoreNotWritableError(
                f"Nothing was written to bank {self.name!r}: {error}. "
                f"Check the space and the permissions of {store.folder}, then append again."
            ) from error
        except BaseException:
            store._discard(file)
            raise
        assert segment_id is not None
        self._remember(entry)
        self._segments[segment_id] = _Segment(segment_id, *row)
        self._revision += 1

    def forget(self, source: str) -> int:
        """Forget a whole source and unlink its files; returns how many tokens went.

        Raises:
            SourceError: if the bank remembers no such source.
        """
        with self._store._transaction() as database:
            self.refresh()
            files = [segment.file for segment in self._segments.values() if segment.source == source]
            if not files:
                return super().forget(source)  # raises the error that names the sources there are
            database.execute("DELETE FROM segment WHERE bank = ? AND source = ?", (self._id, source))
            self._touch(database, _now())
            # Before the commit: no index ever knows what its bank has forgotten.
            self._store._drop_index(self._id)
        try:
            self._store._erase(files)
        finally:
            forgotten = self._drop(source)
            self._revision += 1
        return forgotten

    def save_index(self, index: BankIndex) -> None:
        """Search with an index from now on, and keep it beside the bank, in place of any that was there.

        Raises:
            BankIndexError: the index was not made from this bank's tokens, or some were forgotten meanwhile.
            StoreNotWritableError: the store is read-only or the disk is full.
        """
        store = self._store
        store._require_writable()
        self.use_index(index)
        path = store._index_path(self._id)
        temporary = path.with_name(f"{secrets.token_hex(16)}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            _write_index(temporary, index)
            with store._transaction():
                self.refresh()
                if self.index is not index:
                    raise BankIndexError(
                        f"A source of bank {self.name!r} was forgotten while its index was made, so the index was not "
                        "kept. Make it again."
                    )
                os.rename(temporary, path)
                _sync_folder(path.parent)
                _sync_folder(store.folder)
        except OSError as error:
            raise StoreNotWritableError(
                f"The index of bank {self.name!r} was not kept: {error}. "
                f"Check the space and the permissions of {path.parent}, then make it again."
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def load_index(self) -> BankIndex:
        """Search with the index that was kept beside the bank. Warns if the bank has outgrown it.

        Raises:
            BankIndexError: there is none, or it was made for other tokens.
            StoreCorruptError: its file is damaged.
            MissingExtraError: it needs faiss, which is not installed.
            ConfigError: the bank is not on the CPU.
        """
        require_cpu(self)
        path = self._store._index_path(self._id)
        again = f"Make one: `longmem index --store {self._store.folder} --bank {self.name}`; or search exactly."
        if not path.exists():
            raise BankIndexError(f"Bank {self.name!r} has no index. {again}")
        index = _read_index(path, again, verify=self._verify)
        try:
            self.use_index(index)
        except BankIndexError as error:
            raise BankIndexError(
                f"The index of bank {self.name!r} does not fit: it was made for {len(index):,} tokens that are not "
                f"the first of the {len(self):,} remembered now. {again}"
            ) from error
        if index.outgrown(len(self)):
            warnings.warn(
                f"The index of bank {self.name!r} knows {len(index):,} of {len(self):,} tokens; the others are read "
                "whole at every search. Make it again: `longmem index`.",
                stacklevel=2,
            )
        return index

    def drop_index(self) -> bool:
        """Search exactly from now on, and remove the index that was kept; False if there was none."""
        self.use_index(None)
        with self._store._transaction():
            return self._store._drop_index(self._id)

    def refresh(self) -> None:
        """Take over what other processes have appended and forgotten since.

        Raises:
            BankNotFoundError: if the bank has been deleted.
            StoreCorruptError: if a segment file is missing or damaged.
        """
        while True:
            revision = self._stored_revision()
            if revision == self._revision:
                return
            rows = self._store._query(
                f"SELECT {_SEGMENT_COLUMNS} FROM segment WHERE bank = ? ORDER BY ordinal", self._id
            )
            segments = {segment.id: segment for segment in (_Segment(*row) for row in rows)}
            # Sources are forgotten whole, so a segment that is gone takes its source along.
            for source in {known.source for known in self._segments.values() if known.id not in segments}:
                self._drop(source)
            new = [segment for segment in segments.values() if segment.id not in self._segments]
            self._reserve(len(self) + sum(segment.tokens for segment in new))
            try:
                for segment in new:
                    self._load(segment)
            except StoreCorruptError:
                # Forgotten by another process between the query and the reading of the file? Then look again.
                if self._stored_revision() == revision:
                    raise
            else:
                # Rows committed since the revision was read are loaded already; the next refresh finds no more to do.
                self._revision = revision
                return

    def source_infos(self) -> list[SourceInfo]:
        """The remembered sources, in the order they were first written."""
        infos: dict[str, SourceInfo] = {}
        for segment in self._segments.values():
            chars, known = segment.char_start + segment.chars, infos.get(segment.source)
            if known is None:
                created = datetime.fromisoformat(segment.created)
                infos[segment.source] = SourceInfo(segment.source, segment.tokens, chars, created)
            else:
                infos[segment.source] = dataclasses.replace(known, tokens=known.tokens + segment.tokens, chars=chars)
        return list(infos.values())

    def _load(self, segment: _Segment) -> None:
        path = self._store._segment_path(segment.file)
        what = f"a part of source {segment.source!r} of bank {self.name!r}"
        entry = _read_segment(path, segment, what, verify=self._verify)
        try:
            self.check(entry)
        except BankError as error:
            raise StoreCorruptError(
                f"{path} holds {what}, but does not fit there: {error} Restore it from a backup, or delete the bank."
            ) from error
        self._remember(entry)
        self._segments[segment.id] = segment

    def _drop(self, source: str) -> int:
        """Forget a source in memory only."""
        forgotten = super().forget(source)
        self._segments = {key: segment for key, segment in self._segments.items() if segment.source != source}
        return forgotten

    def _stored_revision(self) -> int:
        for (revision,) in self._store._query("SELECT revision FROM bank WHERE id = ?", self._id):
            return revision
        raise BankNotFoundError(
            f"Bank {self.name!r} has been deleted from {self._store.folder}. Open it again to begin a new one."
        )

    def _touch(self, database: sqlite3.Connection, now: str) -> None:
        database.execute("UPDATE bank SET revision = revision + 1, updated = ? WHERE id = ?", (now, self._id))


def _encode_text(entry: BankEntry) -> bytes:
    try:
        entry.source.encode()
        return entry.text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"Source {entry.source!r} cannot be stored as UTF-8: {error}. Decode the text with errors='replace' first."
        ) from error


def _write_segment(path: Path, entry: BankEntry, text: bytes) -> tuple[str, int]:
    """Write and sync a segment file; returns its sha256 and its size in bytes."""

    def owned(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        # safetensors takes neither strided tensors nor two views of the same memory.
        return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)

    data = save(
        {
            "keys": owned(entry.keys_HNE),
            "values": owned(entry.values_HNE),
            "token_ids": owned(entry.token_ids_N, torch.int64),
            "offsets": owned(entry.offsets_N2, torch.int64),
            "text": torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8),
        },
        metadata={"longmem_segment": str(FORMAT_VERSION), "source": entry.source, "char_start": str(entry.char_start)},
    )
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest(), len(data)


def _read_segment(path: Path, segment: _Segment, what: str, *, verify: bool) -> BankEntry:
    """A segment as an entry, its tensors mapped from the file. `what` says in errors what would be lost."""
    try:
        if verify:
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != segment.sha256:
                raise StoreCorruptError(
                    f"{path} is damaged: its sha256 is {sha256}, the manifest says {segment.sha256}. It holds {what}. "
                    "Restore it from a backup, or delete the bank."
                )
        with safe_open(path, framework="pt") as tensors:
            version = (tensors.metadata() or {}).get("longmem_segment")
            if version != str(FORMAT_VERSION):
                raise StoreError(
                    f"{path} has segment format {version}; this longmem reads format {FORMAT_VERSION}. Update longmem."
                )
            return BankEntry(
                source=segment.source,
                text=bytes(tensors.get_tensor("text").numpy()).decode(),
                char_start=segment.char_start,
                token_ids_N=tensors.get_tensor("token_ids"),
                offsets_N2=tensors.get_tensor("offsets"),
                keys_HNE=tensors.get_tensor("keys"),
                values_HNE=tensors.get_tensor("values"),
            )
    except FileNotFoundError as error:
        raise StoreCorruptError(
            f"{path} is missing. It held {what}. Restore it from a backup, or delete the bank."
        ) from error
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise StoreCorruptError(
            f"{path} cannot be read: {error}. It holds {what}. Restore it from a backup, or delete the bank."
        ) from error


def _write_index(path: Path, index: BankIndex) -> None:
    """Write and sync an index file."""
    tensors, settings = index.state()
    tensors = {name: part.contiguous() for name, part in tensors.items()}
    settings["sha256"] = _digest(tensors)
    data = save(tensors, metadata={"longmem_index": str(INDEX_VERSION), "settings": json.dumps(settings)})
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_index(path: Path, again: str, *, verify: bool) -> BankIndex:
    """An index from its file. `again` says in errors how it is made again."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            version = metadata.get("longmem_index")
            if version != str(INDEX_VERSION):
                raise StoreCorruptError(
                    f"{path} has index format {version}; this longmem reads format {INDEX_VERSION}. {again}"
                )
            settings: dict[str, Any] = json.loads(metadata["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if verify and _digest(tensors) != settings["sha256"]:
            raise StoreCorruptError(f"{path} is damaged: its tensors do not match its checksum. {again}")
        return BankIndex.from_state(tensors, settings)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StoreCorruptError(f"{path} cannot be read as the index of a bank: {error}. {again}") from error


def _digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of tensors, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _mismatch(name: str, *, stored: BankSpec, given: BankSpec) -> str:
    different = [
        f"{field.name}: given {getattr(given, field.name)!r}, expected {getattr(stored, field.name)!r}"
        for field in dataclasses.fields(BankSpec)
        if getattr(given, field.name) != getattr(stored, field.name)
    ]
    return (
        f"Bank {name!r} was written by another model ({'; '.join(different)}). "
        f"Open it with the model that wrote it (backbone {stored.backbone!r}), or use another bank name."
    )


def _create_folder(folder: Path) -> None:
    try:
        (folder / SEGMENTS).mkdir(parents=True, exist_ok=True)
        _sync_folder(folder)
        _sync_folder(folder.parent)
    except OSError as error:
        raise StoreNotWritableError(
            f"No store can be created in {folder}: {error}. Give a folder that can be written."
        ) from error
    if not _can_write(folder):
        raise StoreNotWritableError(
            f"No store can be created in {folder}: the folder cannot be written. "
            "Change its permissions, or give another."
        )


def _can_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _sync_folder(folder: Path) -> None:
    """Make renames and unlinks in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _connect(manifest: Path) -> sqlite3.Connection:
    # isolation_level=None: transactions begin where the code says so. Threads share the connection under a lock.
    database = sqlite3.connect(manifest, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("PRAGMA secure_delete = ON")
    except BaseException:
        database.close()
        raise
    return database


def _connect_read_only(manifest: Path) -> sqlite3.Connection:
    # SQLite reads a log with the help of a file that it cannot create here. Without a log (the last writer closed
    # it) the manifest is complete in itself; with one it must not be ignored.
    log = manifest.with_name(manifest.name + "-wal")
    has_log = os.path.exists(log)
    uri = manifest.absolute().as_uri() + ("?mode=ro" if has_log else "?mode=ro&immutable=1")
    database = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        database.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        database.close()
        if not has_log:
            raise
        raise StoreError(
            f"The store has an unfinished log, {log}, and cannot be written, so the log cannot be read: {error}. "
            "Open the store once where it can be written, for example a copy."
        ) from error
    return database


def _check_format(database: sqlite3.Connection, folder: Path, *, writable: bool) -> None:
    """Create the tables of a new manifest, or make sure that this version can read them."""

    def number(sql: str) -> int:
        return database.execute(sql).fetchone()[0]

    def is_new() -> bool:
        return number("PRAGMA user_version") == 0 and number("SELECT COUNT(*) FROM sqlite_master") == 0

    if writable and is_new():
        database.execute("BEGIN EXCLUSIVE")
        if is_new():
            for statement in SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        database.execute("COMMIT")
    if number("PRAGMA application_id") != APPLICATION_ID:
        raise StoreError(
            f"{folder / MANIFEST} belongs to another program. Give the folder of a store, or a new folder."
        )
    version = number("PRAGMA user_version")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"The store in {folder} has format {version}; this longmem reads format {FORMAT_VERSION}. Update longmem."
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors into errors that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        manifest = folder / MANIFEST
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise StoreCorruptError(f"{manifest} is damaged: {error}. Restore it from a backup.") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreError(
                f"Another process has kept {manifest} locked for {_BUSY_SECONDS:.0f} seconds. "
                "Wait for it, then try again."
            ) from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            raise StoreNotWritableError(
                f"{manifest} cannot be opened or written: {error}. Check the space and the permissions of {folder}."
            ) from error
        raise StoreError(f"{manifest}: {error}. Open the store again.") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
