"""StoredBank: a `MemoryBank` that is on disk as well. H memory heads, N tokens, E head size."""

from __future__ import annotations

import dataclasses
import os
import secrets
import sqlite3
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import torch

from longmem.approximate import BankIndex
from longmem.bank import BankEntry, MemoryBank, require_cpu
from longmem.config import BankSpec
from longmem.errors import (
    BankError,
    BankIndexError,
    BankNotFoundError,
    StoreCorruptError,
    StoreNotWritableError,
)
from longmem.store.indexes import read_index, write_index
from longmem.store.manifest import now
from longmem.store.segments import SEGMENT_COLUMNS, Segment, encode_text, read_segment, sync_folder, write_segment

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore


@dataclass(frozen=True)
class SourceInfo:
    """A remembered source: its size in tokens and characters, and when its first piece was written (UTC)."""

    source: str
    tokens: int
    chars: int
    created: datetime


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
        self._segments: dict[int, Segment] = {}

    def append(self, entry: BankEntry) -> None:
        """Remember `entry` durably, after what other processes have appended in the meantime.

        When it raises, neither the store nor any reader has the entry. (A `KeyboardInterrupt` may come too late to
        undo it; `refresh` shows.)

        Raises:
            BankError: as `MemoryBank.append`; also if another process has extended the source first.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        store = self._store
        store.manifest.require_writable()
        self.refresh()
        self.check(entry)
        text = encode_text(entry)
        file = secrets.token_hex(16) + ".safetensors"
        path = store.segment_path(file)
        temporary = path.with_suffix(".tmp")
        try:
            sha256, size = write_segment(temporary, entry, text)
            with store.manifest.transaction() as database:
                # Under the write lock nobody else extends the bank: what holds now holds until the commit.
                self.refresh()
                self.check(entry)
                self._reserve(len(self) + len(entry))
                os.rename(temporary, path)
                sync_folder(path.parent)
                written = now()
                row = (entry.source, entry.char_start, len(entry.text), len(entry), file, sha256, written)
                (ordinal,) = database.execute(
                    "SELECT COALESCE(MAX(ordinal) + 1, 0) FROM segment WHERE bank = ?", (self._id,)
                ).fetchone()
                segment_id = database.execute(
                    "INSERT INTO segment "
                    "(source, char_start, chars, tokens, file, sha256, created, bank, ordinal, bytes) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*row, self._id, ordinal, size),
                ).lastrowid
                self._touch(database, written)
        except OSError as error:
            store.discard(file)
            raise StoreNotWritableError(
                f"Nothing was written to bank {self.name!r}: {error}. "
                f"Check the space and the permissions of {store.folder}, then append again."
            ) from error
        except BaseException:
            store.discard(file)
            raise
        assert segment_id is not None
        self._remember(entry)
        self._segments[segment_id] = Segment(segment_id, *row)
        self._revision += 1

    def forget(self, source: str) -> int:
        """Forget a whole source and unlink its files; returns how many tokens went.

        Raises:
            SourceError: if the bank remembers no such source.
        """
        with self._store.manifest.transaction() as database:
            self.refresh()
            files = [segment.file for segment in self._segments.values() if segment.source == source]
            if not files:
                return super().forget(source)  # raises the error that names the sources there are
            database.execute("DELETE FROM segment WHERE bank = ? AND source = ?", (self._id, source))
            self._touch(database, now())
            # Before the commit: no index ever knows what its bank has forgotten.
            self._store.remove_index(self._id)
        try:
            self._store.erase(files)
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
        store.manifest.require_writable()
        self.use_index(index)
        path = store.index_path(self._id)
        temporary = path.with_name(f"{secrets.token_hex(16)}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            write_index(temporary, index)
            with store.manifest.transaction():
                self.refresh()
                if self.index is not index:
                    raise BankIndexError(
                        f"A source of bank {self.name!r} was forgotten while its index was made, so the index was not "
                        "kept. Make it again."
                    )
                os.rename(temporary, path)
                sync_folder(path.parent)
                sync_folder(store.folder)
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
        path = self._store.index_path(self._id)
        again = f"Make one: `longmem index --store {self._store.folder} --bank {self.name}`; or search exactly."
        if not path.exists():
            raise BankIndexError(f"Bank {self.name!r} has no index. {again}")
        index = read_index(path, again, verify=self._verify)
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
        with self._store.manifest.transaction():
            return self._store.remove_index(self._id)

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
            rows = self._store.manifest.query(
                f"SELECT {SEGMENT_COLUMNS} FROM segment WHERE bank = ? ORDER BY ordinal", self._id
            )
            segments = {segment.id: segment for segment in (Segment(*row) for row in rows)}
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

    def _load(self, segment: Segment) -> None:
        path = self._store.segment_path(segment.file)
        what = f"a part of source {segment.source!r} of bank {self.name!r}"
        entry = read_segment(path, segment, what, verify=self._verify)
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
        for (revision,) in self._store.manifest.query("SELECT revision FROM bank WHERE id = ?", self._id):
            return revision
        raise BankNotFoundError(
            f"Bank {self.name!r} has been deleted from {self._store.folder}. Open it again to begin a new one."
        )

    def _touch(self, database: sqlite3.Connection, now: str) -> None:
        database.execute("UPDATE bank SET revision = revision + 1, updated = ? WHERE id = ?", (now, self._id))
