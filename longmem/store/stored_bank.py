"""StoredBank: a `MemoryBank` that is on disk as well. H memory heads, N tokens, E head size."""

from __future__ import annotations

import dataclasses
import os
import secrets
import sqlite3
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longmem.approximate import BankIndex
from longmem.bank import BankEntry, MemoryBank, packed, unpacked
from longmem.config import BankSpec
from longmem.errors import (
    BankError,
    BankIndexError,
    BankNotFoundError,
    StoreCorruptError,
    StoreError,
    StoreNotWritableError,
)
from longmem.retention import Cap
from longmem.store.files import new_file, sync_folder
from longmem.store.forgetting import Stretch
from longmem.store.indexes import read_index, write_index
from longmem.store.manifest import now
from longmem.store.rows import add_piece, add_version, hold
from longmem.store.segments import Piece, Record, check_text, named, read_segment
from longmem.store.thinning import keep_scores, scores_of, thin

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

    Attributes:
        name: of the bank.
        version: the past version that it shows, and which cannot be written; None is the newest, whichever that is.
    """

    name: str

    def __init__(
        self,
        store: MemoryStore,
        bank_id: int,
        name: str,
        spec: BankSpec,
        device: torch.device | str = "cpu",
        *,
        verify: bool = True,
        version: int | None = None,
    ) -> None:
        super().__init__(spec, device)
        self.name = name
        self.version = version
        self._store = store
        self._id = self.id = bank_id
        self._verify = verify
        self._revision = -1
        self._pieces: dict[int, Piece] = {}

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
        self._require_newest()
        self.refresh()
        self.check(entry)
        check_text(entry)
        kept = packed(entry, self.spec)
        on_host = dataclasses.replace(kept, keys_HNE=kept.keys_HNE.cpu(), values_HNE=kept.values_HNE.cpu())
        if self.device.type == "cpu":
            kept = on_host  # copied from a GPU once, for disk and memory
        new = None
        try:
            record = Record.of(entry).pack()
            new = store.write_segment([on_host], self.name, record)
            with store.manifest.transaction() as database:
                # Under the write lock nobody else extends the bank: what holds now holds until the commit.
                self.refresh()
                self.check(entry)
                self._reserve(len(self) + len(entry))
                segment, written = store.place(database, new), now()
                version = add_version(database, self._id, "append", written)
                row = (entry.source, entry.char_start, len(entry.text), len(entry), written, segment)
                piece = add_piece(database, store.seal(self.name), row, record, self._drawn(entry))
                hold(database, self._id, [(piece, version)])
                self._touch(database, written)
        except OSError as error:
            if new is not None:
                store.discard(new.file)
            raise StoreNotWritableError(
                f"Nothing was written to bank {self.name!r}: {error}. "
                f"Check the space and the permissions of {store.folder}, then append again."
            ) from error
        except BaseException:
            if new is not None:
                store.discard(new.file)
            raise
        self._remember(unpacked(kept, self.spec))
        self._pieces[piece] = Piece(piece, *row, new.file, new.sha256, 0, 0, len(entry), version)
        self._revision += 1

    def forget(self, source: str) -> int:
        """Forget a whole source, what of it is in quarantine too, and its bytes; returns how many tokens went.

        It is forgotten by all banks of the namespace, in all versions. `MemoryStore.forget` forgets parts of a source,
        and gives a receipt.

        Raises:
            SourceError: if the bank remembers no such source.
            StoreCorruptError: if a segment to be written anew is damaged.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        return self.forget_all([source])

    def forget_all(self, sources: Collection[str]) -> int:
        """Forget whole sources at once, in one transaction; as `forget`."""
        self._require_newest()
        self._stored_revision()  # raises if the bank is gone, and one of its name may be another
        if not sources:
            return 0
        receipt = self._store.forget(self.name, [Stretch(source) for source in sources])
        self.refresh()
        return receipt.tokens_of(self.name)

    def thin(self, keep_N: Tensor) -> None:
        """Drop the rows where `keep_N` (bool) is False, and their bytes. Texts and token ids stay.

        Raises:
            BankError: the bank has changed since `keep_N` was made.
            StoreCorruptError: a segment to be written anew is damaged.
            StoreNotWritableError: the store is read-only or the disk is full.
        """
        pieces, revision, old = thin(self._store, self, keep_N)
        self._keep_rows(keep_N)
        self._pieces = {piece.id: piece for piece in pieces}
        self._revision = revision
        self._store.unlink(old)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What it holds, in order."""
        return tuple(self._pieces.values())

    @property
    def cap(self) -> Cap | None:
        """What it is kept to after writes; None lets it grow."""
        rows = self._store.manifest.query("SELECT settings FROM cap WHERE bank = ?", self._id)
        return next((Cap.from_json(self._store.keys.text(settings, f"cap {self._id}")) for (settings,) in rows), None)

    def set_cap(self, cap: Cap | None) -> None:
        """Keep the bank to a cap after every write of a model from now on; None lets it grow."""
        with self._store.manifest.transaction() as database:
            database.execute("DELETE FROM cap WHERE bank = ?", (self._id,))
            if cap is not None:
                settings = self._store.seal(self.name).text(cap.to_json(), f"cap {self._id}")
                database.execute("INSERT INTO cap (bank, settings) VALUES (?, ?)", (self._id, settings))

    def written_last(self) -> dict[str, datetime]:
        """When each source was last written, UTC."""
        return {piece.source: datetime.fromisoformat(piece.created) for piece in self._pieces.values()}

    @property
    def writable(self) -> bool:
        return self._store.writable

    def save_attention(self) -> None:
        """Keep what `attend` has counted with the bank. Where nothing can be written it is dropped: reading should not
        fail for a statistic."""
        taken, ends, scores = self.take_attention(), {}, {}
        for piece in self._pieces.values():
            if piece.source not in taken:
                continue
            start = ends.get(piece.source, 0)
            ends[piece.source] = start + piece.tokens
            some_M = taken[piece.source][start : start + piece.tokens]
            if bool(some_M.any()):
                scores[piece.id] = torch.zeros(piece.tokens)
                scores[piece.id][: len(some_M)] = some_M
        if scores and self.writable:
            with suppress(StoreError):
                self.keep_scores("attention", scores, add=True)

    def scores(self, name: str) -> dict[int, Tensor]:
        """Numbers that were kept for the tokens of pieces (M,), float32, by the piece's id."""
        return scores_of(self._store, self._id, name)

    def keep_scores(self, name: str, scores: dict[int, Tensor], *, add: bool = False) -> None:
        """Keep numbers for the tokens of pieces, in place of earlier ones or added to them."""
        keep_scores(self._store, self._id, name, scores, add=add)

    def save_index(self, index: BankIndex) -> None:
        """Search with an index from now on, and keep it beside the bank, in place of any that was there.

        Raises:
            BankIndexError: the index was not made from this bank's tokens, or some were forgotten meanwhile.
            StoreNotWritableError: the store is read-only or the disk is full.
        """
        store = self._store
        store.manifest.require_writable()
        self.use_index(index)
        used = self.index
        path = store.index_path(self._id)
        temporary = path.with_name(f"{secrets.token_hex(16)}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            seal = store.seal(self.name)
            with new_file(temporary) as file:
                write_index(file, index, self._id, seal)
                with store.manifest.transaction():
                    self.refresh()
                    store.require_same_key(self.name, seal.key_id)
                    if self.index is not used:
                        raise BankIndexError(
                            f"A source of bank {self.name!r} was forgotten while its index was made, so the index was "
                            "not kept. Make it again."
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
            ConfigError: the bank is not on the CPU, and the index has inverted files.
        """
        path = self._store.index_path(self._id)
        again = f"Make one: `longmem index --store {self._store.folder} --bank {self.name}`; or search exactly."
        if not path.exists():
            raise BankIndexError(f"Bank {self.name!r} has no index. {again}")
        index = read_index(path, again, self._store.keys, verify=self._verify)
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
            pieces = {piece.id: piece for piece in self._store.pieces(self._id, self.version)}
            gone = {known.source for known in self._pieces.values() if known.id not in pieces}
            left = [known.id for known in self._pieces.values() if known.source not in gone]
            # Sources that were forgotten whole go, and all else stays where it is. Where more has changed (a part was
            # forgotten, a repair cut the end of a source, a cap thinned it), all is read again, so that memory and disk
            # keep one order.
            thinned = any(key in pieces and pieces[key].rows != known.rows for key, known in self._pieces.items())
            if left == list(pieces)[: len(left)] and not thinned:
                super().forget_all(gone)
            else:
                self._drop_all()
            # A piece is what it was, but may have been moved.
            self._pieces = {key: pieces[key] for key, known in self._pieces.items() if known.source not in gone}
            new = [piece for piece in pieces.values() if piece.id not in self._pieces]
            self._reserve(len(self) + sum(piece.rows for piece in new))
            checked: set[str] = set()
            try:
                for _, together in groupby(new, key=lambda piece: piece.segment):
                    self._load(list(together), checked)
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
        for piece in self._pieces.values():
            chars, known = piece.char_start + piece.chars, infos.get(piece.source)
            if known is None:
                created = datetime.fromisoformat(piece.created)
                infos[piece.source] = SourceInfo(piece.source, piece.tokens, chars, created)
            else:
                infos[piece.source] = dataclasses.replace(known, tokens=known.tokens + piece.tokens, chars=chars)
        return list(infos.values())

    def _load(self, pieces: Sequence[Piece], checked: set[str]) -> None:
        """Remember pieces of one segment. `checked` are the files whose checksums were compared already."""
        store, file = self._store, pieces[0].file
        what, verify = named(pieces, self.name), self._verify and file not in checked
        entries = read_segment(store.segment_path(file), pieces, what, store.mend(self.name), store.keys, verify=verify)
        checked.add(file)
        for piece, kept in zip(pieces, entries, strict=True):
            try:
                entry = unpacked(kept, self.spec)
                self.check(entry)
            except BankError as error:
                raise StoreCorruptError(
                    f"{self._store.segment_path(piece.file)} holds {named([piece], self.name)}, but does not fit "
                    f"there: {error} {self._store.mend(self.name)}"
                ) from error
            self._remember(entry)
            self._pieces[piece.id] = piece

    def _drop_all(self) -> None:
        """Forget everything in memory only."""
        MemoryBank.__init__(self, self.spec, self.device)
        self._pieces = {}

    def _drawn(self, entry: BankEntry) -> list[tuple[str, str | bytes, int, int, float]]:
        """Rows of what an entry drew on."""
        rows = []
        for on in entry.drew_on:
            # As the bank that it drew on names its sources: one that is encrypted is named in no other in the clear.
            bank = on.bank or self.name
            rows.append((bank, self._store.seal(bank).name(on.source), on.start, on.end, on.weight))
        return rows

    def _require_newest(self) -> None:
        if self.version is not None:
            raise StoreNotWritableError(
                f"This is version {self.version} of bank {self.name!r}, which is past and cannot be changed. Fork it "
                f"(`longmem fork --bank {self.name} --version {self.version} --to NAME`) and write to the fork, or "
                "open the bank without a version."
            )

    def _stored_revision(self) -> int:
        revision = self._store.revision(self._id)
        if revision is not None:
            return revision
        raise BankNotFoundError(
            f"Bank {self.name!r} has been deleted from {self._store.folder}. Open it again to begin a new one."
        )

    def _touch(self, database: sqlite3.Connection, now: str) -> None:
        database.execute("UPDATE bank SET revision = revision + 1, updated = ? WHERE id = ?", (now, self._id))
