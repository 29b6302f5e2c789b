"""MemoryStore: the folder that holds banks. What is committed survives a crash; left-overs of one are swept."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

from longmem.bank import BankEntry
from longmem.config import BankSpec
from longmem.errors import (
    BankError,
    BankMismatchError,
    BankNotFoundError,
    StoreError,
    StoreKeyError,
    StoreNotWritableError,
    StoreUnreachableError,
)
from longmem.store.algebra import Diff, TextEncoder, copy_by, diff, fork, merge
from longmem.store.archive import export, import_
from longmem.store.bank_info import BankInfo, bank_infos, check_bank_name, mismatch
from longmem.store.consolidate import SEGMENT_BYTES, Consolidation, consolidate
from longmem.store.encryption import Keys, Seal
from longmem.store.files import sync_folder
from longmem.store.forgetting import Preview, Stretch, forget, preview, written
from longmem.store.indexes import INDEXES
from longmem.store.keys import KeyFolder, KeyProvider
from longmem.store.manifest import MANIFEST, Manifest, now
from longmem.store.opening import can_write, create_folder, remote_of, require_empty
from longmem.store.rebuild import Rebuilt, rebuild, restore_records
from longmem.store.receipts import Receipt, is_genuine, receipts
from longmem.store.release import release
from longmem.store.remote import Remote
from longmem.store.repair import Encoder, Repair, repair
from longmem.store.sealing import destroy_key, encrypt
from longmem.store.segment_files import SegmentFiles
from longmem.store.segments import (
    IN_SEGMENT,
    PIECES,
    SEGMENTS,
    NewSegment,
    Piece,
    pieces_of,
    write_segment,
)
from longmem.store.stored_bank import StoredBank
from longmem.store.sweeping import erase, known_files, orphans, sweep
from longmem.store.twin import TWIN
from longmem.store.verify import Report, verify
from longmem.store.versions import Version, log, resolve, tag, tags, untag

# Later than any version.
_NEVER = 2**62
_REVISION = "SELECT revision FROM bank WHERE id = ?"


class MemoryStore:
    """Named memory banks in one folder. Several processes may read and write it at once.

    Use `MemoryStore.open`; it is a context manager, or call `close`.
    """

    def __init__(self, folder: Path, manifest: Manifest, keys: Keys, remote: Remote | None = None) -> None:
        self.folder = folder
        self.files = SegmentFiles(folder / SEGMENTS, remote)
        self.keys = keys
        self.manifest = manifest

    @property
    def writable(self) -> bool:
        return self.manifest.writable

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = True,
        keys: str | os.PathLike[str] | KeyProvider | None = None,
        segments: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> MemoryStore:
        """Open the store in a folder. Without one, create folder and store, or fail if `create` is False.

        A store that cannot be written is opened for reading; `append` and `forget` then raise.

        Args:
            keys: folder of the keys of encrypted namespaces, or who else keeps them; by default a folder beside the
                store, `<path>.keys`, so that a copy of the store is none of its keys.
            segments: where a new store keeps its segments, if not in the folder: a location that fsspec knows, such as
                s3://bucket/folder. The manifest remembers it.
            storage_options: what fsspec needs to get there (`endpoint_url`, `key`, …), in place of the environment's.

        Raises:
            StoreNotWritableError: if there is no store and none can be created.
            StoreError: if there is no store and `create` is False, or the folder holds something else; if its segments
                are elsewhere than `segments` says.
            StoreCorruptError: if the manifest is damaged, or missing where there was one; `rebuild` mends it.
            MissingExtraError: the package for a location of that kind is not installed.
        """
        folder = Path(path)
        manifest = folder / MANIFEST
        if not os.path.exists(manifest):
            require_empty(folder)
            if not create:
                raise StoreError(
                    f"No store in {folder}: it has no {MANIFEST}. "
                    "Give the folder of an existing store, or write to this one first."
                )
            if segments is not None:
                Remote(segments, storage_options).require_free()
            writable = True
        else:
            writable = can_write(folder) and can_write(manifest)
        if writable:
            create_folder(folder)
        if keys is None:
            keys = folder.resolve().with_name(f"{folder.resolve().name}.keys")
        provider = KeyFolder(Path(keys)) if isinstance(keys, str | os.PathLike) else keys
        opened = Manifest.open(folder, writable=writable)
        if writable:
            # The names of files that were made just now.
            sync_folder(folder)
        try:
            remote = remote_of(opened, segments, storage_options)
        except BaseException:
            opened.close()
            raise
        store = cls(folder, opened, Keys(provider), remote)
        if writable:
            sweep(store)
        return store

    @classmethod
    def rebuild(
        cls,
        path: str | os.PathLike[str],
        *,
        keys: str | os.PathLike[str] | KeyProvider | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Rebuilt | None:
        """Mend the manifest of a store that `open` finds damaged or missing, from its twin; None if nothing is wrong.

        Rows that are not what was written are put right where they stand. A manifest that cannot be read is made anew,
        with texts and token ids from the segments: end all other programs that have the store open first.

        Raises:
            StoreError: there is no store.
            StoreCorruptError: the twin is missing or damaged as well. Nothing was changed.
            StoreNotWritableError: the folder cannot be written.
        """
        folder = Path(path)
        if not any((folder / name).exists() for name in (MANIFEST, TWIN)):
            raise StoreError(f"No store in {folder}: it has no {MANIFEST}. Give the folder of an existing store.")
        try:
            done = rebuild(folder)
        except OSError as error:
            raise StoreNotWritableError(
                f"{folder / MANIFEST} was not mended: {error}. Check the space and the permissions of {folder}."
            ) from error
        if done is not None and done.whole:
            with cls.open(folder, keys=keys, storage_options=storage_options) as store:
                restore_records(store)
        return done

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
        self.manifest.close()

    def banks(self) -> list[BankInfo]:
        """Every bank of the store, by name."""
        return bank_infos(self)

    def bank(
        self,
        name: str,
        spec: BankSpec | None = None,
        *,
        device: torch.device | str = "cpu",
        verify: bool = True,
        search: Literal["exact", "index"] = "exact",
        version: int | str | None = None,
    ) -> StoredBank:
        """Open a bank and load it onto a device; with a spec, create it if there is none.

        Args:
            name: letters, digits and `._-`, in parts joined by `/`: "notes", "user/1234".
            spec: what the bank's tensors mean (`LongMem.bank_spec`; in few bits `LongMem.bank_spec_in`). None opens an
                existing bank only.
            verify: compare every segment file with its checksum.
            search: "index" searches with the index that the bank has (`StoredBank.load_index`).
            version: number or tag of a past version, which can be read and not written. It shows what it held, without
                what was forgotten since.

        Raises:
            BankNotFoundError: if there is no such bank and no spec.
            BankError: if there is no such version.
            BankIndexError: if an index is asked for, and there is none or it does not fit.
            BankMismatchError: if the bank was written with another spec.
            StoreCorruptError: if a segment file is missing or damaged; `verify` names all of them, `repair` mends.
            StoreNotWritableError: if the bank would have to be created in a read-only store.
        """
        check_bank_name(name)
        row = self.find(name)
        if row is None:
            # A bank that is new has no index.
            if spec is None or search == "index" or version is not None:
                raise self.not_found(name)
            row = self._create_bank(name, spec)
        bank_id, stored = row
        if spec is not None and spec != stored:
            raise BankMismatchError(mismatch(name, stored=stored, given=spec))
        if spec is not None and spec.precision not in ("full", stored.precision):
            raise BankMismatchError(
                f"Bank {name!r} keeps keys and values in {stored.precision}, and was to be opened in {spec.precision}. "
                "A bank's precision is chosen when it is made: open it without one, or use another bank name."
            )
        number = None if version is None else resolve(self, name, version)
        bank = StoredBank(self, bank_id, name, stored, device, verify=verify, version=number)
        bank.refresh()
        if search == "index":
            bank.load_index()
        return bank

    def delete(self, name: str) -> None:
        """Drop a bank and the bytes of everything it remembers.

        Raises:
            BankNotFoundError: if there is no such bank.
        """
        moved: list[NewSegment] = []
        try:
            with self.manifest.transaction() as database:
                row = self.find(name)
                if row is None:
                    raise self.not_found(name)
                aside = database.execute("SELECT DISTINCT file FROM quarantine WHERE bank = ?", row[:1]).fetchall()
                for table in ("held", "version", "tag", "quarantine", "cap"):
                    database.execute(f"DELETE FROM {table} WHERE bank = ?", row[:1])
                database.execute("DELETE FROM drew WHERE bank = ?", (name,))
                files = release(self, database, name, moved)
                database.execute("DELETE FROM bank WHERE id = ?", row[:1])
                self.remove_index(row[0])
        except BaseException as error:
            for new in moved:
                self.discard(new.file)
            if isinstance(error, OSError):
                raise StoreNotWritableError(
                    f"Bank {name!r} was not deleted: {error}. "
                    f"Check the space and the permissions of {self.folder}, then try again."
                ) from error
            raise
        self.erase([*files, *(file for (file,) in aside if file is not None)])

    def log(self, name: str) -> list[Version]:
        """The versions of a bank, oldest first: each append, forget, fork, merge, copy and import began one.

        Raises:
            BankNotFoundError: if there is no such bank.
        """
        return log(self, name)

    def tags(self, name: str) -> dict[str, int]:
        """The tags of a bank, with their versions."""
        return tags(self, name)

    def tag(self, name: str, label: str, version: int | str | None = None) -> int:
        """Name a version of a bank, the newest by default; returns its number.

        Raises:
            BankError: if the bank has such a tag already, or no such version, or the label is not made of letters,
                digits, `.`, `_` and `-` (and of digits alone).
        """
        return tag(self, name, label, version)

    def untag(self, name: str, label: str) -> None:
        """Remove a tag. The version stays.

        Raises:
            BankError: if there is no such tag.
        """
        untag(self, name, label)

    def fork(self, name: str, to: str, *, version: int | str | None = None) -> None:
        """A new bank that holds what a version of another holds, with its history, and goes its own way from there.

        Named below its namespace ("user/1234" → "user/1234/draft") it shares all files, which takes no time and no
        space; and what one forgets, the other forgets. By any other name it is of a namespace of its own, with copies
        of all files: neither forgets with the other.

        Raises:
            BankNotFoundError: if there is no such bank.
            BankError: if `to` is taken or cannot name a bank, or there is no such version.
            StoreCorruptError: if a segment that has to be copied is damaged.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        fork(self, name, to, version)

    def merge(self, name: str, other: str, *, version: int | str | None = None) -> int:
        """Add to a bank what another holds and it does not, behind all that it holds; returns how many tokens came.

        A source that both hold is continued, if one of them holds all that the other does, by the same pieces.

        Raises:
            BankNotFoundError: if there is no such bank.
            BankMismatchError: if they were written by different models.
            BankError: if a source went on differently in the two; nothing is merged then.
            StoreCorruptError: if a segment that has to be copied is damaged.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        return merge(self, name, other, version)

    def diff(
        self,
        name: str,
        other: str,
        *,
        version: int | str | None = None,
        other_version: int | str | None = None,
    ) -> Diff:
        """What two banks, or two versions of one, hold differently.

        Raises:
            BankNotFoundError: if there is no such bank.
            BankError: if there is no such version.
        """
        return diff(self, name, other, version, other_version)

    def copy(
        self,
        name: str,
        to: str,
        model: TextEncoder,
        *,
        version: int | str | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        """A new bank of a namespace of its own, written by another backbone from the texts that a bank keeps.

        Pieces, times and versions stay. Where the new tokenizer reads a piece's tokens as its text, they stay as well
        (a conversation's special tokens among them); otherwise the text is tokenised anew.

        Args:
            model: a `LongMem` of the new backbone.
            on_tokens: progress, called with the number of tokens of the bank that were just done.

        Raises:
            BankNotFoundError: if there is no such bank.
            BankError: if `to` is taken or cannot name a bank, or there is no such version.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        copy_by(self, name, to, model, version, on_tokens)

    def export(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        version: int | str | None = None,
        plain: bool = False,
        on_bytes: Callable[[int], None] | None = None,
    ) -> int:
        """Write a bank to one file, with its versions and tags; returns its size in bytes. docs/format.md describes it.

        What the bank forgets later, the file does not.

        Args:
            plain: must be True for a bank that is encrypted: the file is not.
            on_bytes: progress, called with the size of each segment that was written.

        Raises:
            BankNotFoundError: if there is no such bank.
            BankError: if the file exists, or there is no such version.
            StoreError: if the bank is encrypted and `plain` is False.
            StoreCorruptError: if a segment is missing or damaged.
            StoreNotWritableError: if the file cannot be written.
        """
        return export(self, name, Path(path), version, plain, on_bytes)

    def import_(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        on_bytes: Callable[[int], None] | None = None,
    ) -> str:
        """A new bank from a file that `export` wrote; returns its name, by default the one that it had.

        Args:
            on_bytes: progress, called with the size of each segment that was read.

        Raises:
            FileNotFoundError: if there is no such file.
            BankError: if the name is taken or cannot name a bank.
            StoreCorruptError: if the file is damaged, or no exported bank.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        return import_(self, Path(path), name, on_bytes)

    def preview_forget(self, name: str, stretches: Sequence[Stretch]) -> Preview:
        """What `forget` would do. Changes nothing.

        Raises:
            BankNotFoundError: if there is no such bank.
            SourceError: a source or a stretch is not there.
        """
        return preview(self, name, stretches)

    def forget(
        self,
        name: str,
        stretches: Sequence[Stretch],
        model: Encoder | None = None,
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Receipt:
        """Forget stretches of text for good: in every version, tag and fork of the bank's namespace, and on the disk.

        Characters of a part are taken out of their source as if each append had been made without them: what is left
        of the pieces that they lay in, and all pieces after them, are encoded again (`model.encode`) and get new files.
        Afterwards the bank holds, bit for bit, what it would hold had that text never been written. In a fork that has
        written its own text to the source, a part is forgotten where it says the same; a whole source always.

        All is done in one transaction; old files are unlinked after it. A signed receipt is kept (`receipts`).

        Args:
            name: of the bank.
            stretches: whole sources or parts (`Stretch`); what `written` or a search gives.
            model: a `LongMem` of the backbone that wrote the bank; needed for parts only.
            on_tokens: progress, called with the number of tokens just encoded.

        Raises:
            BankNotFoundError: if there is no such bank.
            SourceError: a source or a stretch is not there.
            ConfigError: a part is to be forgotten, and no model was given.
            BankMismatchError: the model did not write the bank.
            StoreCorruptError: a segment to be written anew is damaged.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        return forget(self, name, stretches, model, on_tokens)

    def encrypt(self, namespace: str) -> None:
        """Keep a namespace encrypted from now on, with a new key of its own; what it holds is written anew.

        Texts, token ids, keys, values, names of sources and indexes are ciphertext on the disk then. Names of banks,
        tags, times and sizes are not. The key goes to the folder of keys, or to who else keeps them: apart from copies
        of the store.

        Args:
            namespace: name of a bank that is no fork below another, whether there is one yet or not.

        Raises:
            BankError: it cannot name a bank, or the bank is a fork of another namespace.
            StoreError: it is encrypted already, or holds something in quarantine.
            StoreCorruptError: a segment is missing or damaged.
            StoreNotWritableError: the store is read-only or the disk is full.
            MissingExtraError: `cryptography` is not installed.
        """
        check_bank_name(namespace)
        encrypt(self, namespace)

    def destroy_key(self, namespace: str) -> Receipt:
        """Forget all that an encrypted namespace holds, in this store and in every copy and backup of it.

        Its banks stay, can be read by nobody, and can be deleted. Copies of the key are not known here; processes that
        have the bank open can read it until they close it, and write nothing more. A signed receipt is kept.

        Should it be interrupted, it can be done again; done twice, it gives the same receipt.

        Raises:
            StoreError: it is not encrypted.
            StoreKeyError: its key is not there.
            StoreNotWritableError: the store or the key's file cannot be written.
        """
        return destroy_key(self, namespace)

    def seal(self, name: str) -> Seal:
        """How the namespace of a bank keeps what it writes; of one that there is not yet, the namespace of its name."""
        rows = self.manifest.query(
            "SELECT key FROM encryption WHERE namespace = COALESCE((SELECT namespace FROM bank WHERE name = ?), ?)",
            name,
            name,
        )
        return Seal(self.keys, rows[0][0] if rows else None)

    def encrypt_like(self, name: str, to: str) -> None:
        """Make sure that a copy of an encrypted bank will be encrypted, with a key of its own."""
        if self.seal(name).key_id is not None and self.seal(to).key_id is None:
            self.encrypt(to)

    def written(self, name: str, *, after: datetime | None = None, before: datetime | None = None) -> list[Stretch]:
        """What was written to a bank at `after` or later, and before `before` (times with a zone): for `forget`.

        Raises:
            BankNotFoundError: if there is no such bank.
        """
        return written(self, name, after, before)

    def receipts(self, namespace: str | None = None) -> list[Receipt]:
        """What was forgotten in a namespace, or in all, oldest first."""
        return receipts(self.manifest, namespace)

    def is_genuine(self, receipt: Receipt) -> bool:
        """Whether this store has given a receipt, and neither it nor any before it was altered."""
        return is_genuine(self.manifest, receipt)

    def verify(self, name: str | None = None, *, on_bytes: Callable[[int], None] | None = None) -> Report:
        """Compare every file of the store, or of one bank, with the manifest. Changes nothing.

        Args:
            name: of a bank; None checks all.
            on_bytes: progress, called with the size of each segment that has been read.

        Raises:
            BankNotFoundError: if there is no such bank.
        """
        return verify(self, name, on_bytes)

    def repair(
        self,
        model: Encoder,
        name: str | None = None,
        *,
        on_tokens: Callable[[int], None] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> tuple[Repair, ...]:
        """Mend what `verify` finds, namespace by namespace, each in one transaction.

        A damaged or missing segment is encoded again by the backbone from the token ids that the manifest keeps, or, in
        a store of the first version, from the damaged file if its text proves to be intact: keys and values are then
        those of a fresh write, bit for bit on the device that wrote them. Where the text is lost, the source ends
        before it; what is taken out is moved to `quarantine/` and named. A damaged index is removed.

        Args:
            model: a `LongMem` of the backbone that wrote the bank.
            name: of a bank, which is mended with all banks of its namespace; None mends all.
            on_tokens: progress, called with the number of tokens just encoded.
            on_bytes: progress before that, called with the size of each segment whose checksum was compared.

        Raises:
            BankNotFoundError: if there is no such bank.
            BankMismatchError: if a damaged bank was written by another model.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        return repair(self, model, name, on_tokens, on_bytes)

    def consolidate(
        self,
        name: str,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        on_segments: Callable[[int], None] | None = None,
    ) -> Consolidation:
        """Merge the many small segments of a bank into few large ones. What it holds, and its order, stay the same.

        Others may read and write the bank meanwhile; a process that dies leaves the store as it was, or merged in part.

        Args:
            segment_bytes: how large a merged segment may become. One of half that size is left alone.
            on_segments: progress, called with the number of segments that have been merged into one.

        Raises:
            BankNotFoundError: if there is no such bank.
            StoreCorruptError: if a segment is missing or damaged; those that are whole may be merged already.
            StoreNotWritableError: if the store is read-only or the disk is full.
        """
        return consolidate(self, name, segment_bytes=segment_bytes, on_segments=on_segments)

    def find(self, name: str) -> tuple[int, BankSpec] | None:
        """Id and spec of a bank; None if there is none."""
        for bank_id, spec in self.manifest.query("SELECT id, spec FROM bank WHERE name = ?", name):
            return bank_id, BankSpec.from_json(spec)
        return None

    def require(self, name: str) -> tuple[int, BankSpec]:
        """Id and spec of a bank; raises `BankNotFoundError` if there is none."""
        found = self.find(name)
        if found is None:
            raise self.not_found(name)
        return found

    def require_free(self, name: str) -> None:
        """Raise `BankError` unless a new bank can have this name."""
        check_bank_name(name)
        if self.find(name) is not None:
            raise BankError(f"There is a bank {name!r} in {self.folder} already. Choose another name.")

    def _create_bank(self, name: str, spec: BankSpec) -> tuple[int, BankSpec]:
        with self.manifest.transaction() as database:
            created = now()
            database.execute(
                "INSERT OR IGNORE INTO bank (name, namespace, spec, revision, created, updated) "
                "VALUES (?, ?, ?, 0, ?, ?)",
                (name, name, spec.to_json(), created, created),
            )
            # Another process may have been first, with another spec.
            row = self.find(name)
        assert row is not None
        return row

    def not_found(self, name: str) -> BankNotFoundError:
        """The error that names the banks there are."""
        names = ", ".join(name for (name,) in self.manifest.query("SELECT name FROM bank ORDER BY name"))
        return BankNotFoundError(
            f"No bank {name!r} in {self.folder}. It has: {names or 'no banks yet'}. "
            "Check the name, or write to the bank to create it."
        )

    def segment_path(self, file: str) -> Path:
        """Where a segment can be read; there is nothing if it is missing.

        Raises:
            StoreUnreachableError: it is elsewhere, and cannot be read there.
        """
        path = self.files.path(file)
        try:
            if self.files.fetch(file) and not self.is_committed(file):
                # It was forgotten meanwhile.
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreNotWritableError(
                f"{path} cannot be written, and segments that lie elsewhere are read through copies there: {error}. "
                f"Check the space and the permissions of {path.parent}."
            ) from error
        return path

    def index_path(self, bank_id: int) -> Path:
        return self.folder / INDEXES / f"{bank_id}.safetensors"

    def pieces(self, bank_id: int, version: int | None = None) -> list[Piece]:
        """The pieces of a bank, in order; with a version, those that it held then and has not forgotten."""
        return pieces_of(self.manifest.query(PIECES, bank_id, _NEVER if version is None else version), self.keys)

    def in_segment(self, segment: int) -> list[Piece]:
        """All that lies in a segment, in order, whichever banks hold it."""
        return pieces_of(self.manifest.query(IN_SEGMENT, segment), self.keys)

    def segment_sizes(self, bank_id: int) -> dict[int, int]:
        """Bytes of each segment that a bank reads, by id."""
        return dict(
            self.manifest.query(
                "SELECT DISTINCT segment.id, bytes FROM held JOIN piece ON piece.id = held.piece "
                "JOIN segment ON segment.id = segment WHERE bank = ?",
                bank_id,
            )
        )

    def revision(self, bank_id: int) -> int | None:
        """Grows whenever the rows of a bank change; None if it has been deleted."""
        return next((revision for (revision,) in self.manifest.query(_REVISION, bank_id)), None)

    def mend(self, bank: str) -> str:
        """What to do about a damaged bank, for errors."""
        return (
            f"See what else is: `longmem verify --store {self.folder}`; mend it: `longmem repair --store {self.folder} "
            f"--bank {bank}`; or restore the file from a backup. Other banks can be used."
        )

    def write_segment(self, entries: Sequence[BankEntry], bank: str, record: bytes | None = None) -> NewSegment:
        """Write a segment of a bank under a temporary name, which means nothing until `place` has been committed.

        Args:
            record: of all entries, packed, where that has been done.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        file = secrets.token_hex(16) + ".safetensors"
        seal = self.seal(bank)
        try:
            said = write_segment(self.files.draft(file), file, entries, seal, record)
            self.files.finish(file)
            return NewSegment(file, *said, bank, seal.key_id)
        except BaseException:
            self.discard(file)
            raise

    def place(self, database: sqlite3.Connection, new: NewSegment) -> int:
        """Give a new segment its name and its row, inside a transaction; returns the row's id."""
        self.require_same_key(new.bank, new.key_id)
        self.files.place(new.file, new.bytes)
        row = database.execute(
            "INSERT INTO segment (file, sha256, bytes) VALUES (?, ?, ?)", (new.file, new.sha256, new.bytes)
        ).lastrowid
        assert row is not None
        return row

    def move(self, database: sqlite3.Connection, new: NewSegment, pieces: Sequence[Piece]) -> None:
        """Let pieces lie in a new segment, in this order, inside a transaction.

        Whoever finds an old file missing must see that the manifest has changed: revisions of the banks grow.
        """
        segment, token, char = self.place(database, new), 0, 0
        for piece in pieces:
            database.execute(
                "UPDATE piece SET segment = ?, first_token = ?, first_char = ? WHERE id = ?",
                (segment, token, char, piece.id),
            )
            token, char = token + piece.tokens, char + piece.chars
        database.execute(
            "UPDATE bank SET revision = revision + 1 WHERE id IN "
            "(SELECT bank FROM held JOIN piece ON piece.id = held.piece WHERE segment = ?)",
            (segment,),
        )

    def require_same_key(self, bank: str, key_id: str | None) -> None:
        """Raise `StoreError` if a bank's namespace got or lost its key since something was written for it."""
        if self.seal(bank).key_id != key_id:
            raise StoreError(f"Bank {bank!r} was encrypted meanwhile; nothing was changed. Try again.")
        for (time,) in self.manifest.query("SELECT destroyed FROM encryption WHERE key = ?", key_id):
            if time is not None:
                raise StoreKeyError(
                    f"The key of bank {bank!r} was destroyed on {time}: nothing can be written to it any more. Delete "
                    "it to begin a new one. (If its destruction was interrupted, `longmem destroy-key` completes it.)"
                )

    def remove_index(self, bank_id: int) -> bool:
        """Remove a bank's index, if it has one, and its bytes."""
        path = self.index_path(bank_id)
        try:
            path.unlink()
            sync_folder(path.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreNotWritableError(
                f"{path} cannot be removed: {error}. Check the permissions of {path.parent}."
            ) from error
        return True

    def is_committed(self, file: str) -> bool:
        """Whether a segment file is part of the store."""
        return bool(self.manifest.query("SELECT 1 FROM segment WHERE file = ?", file))

    def discard(self, file: str) -> None:
        """Remove what a failed append may have left."""
        # An interrupt can arrive after the commit: then the file is part of the store. A manifest that cannot be
        # read decides nothing; the next writable open sweeps.
        with suppress(StoreError, OSError):
            if not self.is_committed(file):
                self.files.drop(file)

    def unlink(self, files: list[str]) -> None:
        """Unlink segment files that no row names any more."""
        try:
            self.files.unlink(files)
        except (OSError, StoreUnreachableError) as error:
            raise StoreNotWritableError(
                f"Done, but a file that is no part of the store any more is still there: {error}. It goes when the "
                "store is next opened and can be written."
            ) from error

    def erase(self, files: list[str]) -> None:
        """Unlink segment files of something forgotten, those in quarantine too, and what deleted rows have left."""
        erase(self, files)

    def orphans(self) -> list[Path]:
        """Files that crashed processes left behind, of which nothing is part of the store."""
        return orphans(self)

    def orphans_elsewhere(self) -> list[str]:
        """Files at the location of the segments, if that is another, that are no part of the store.

        Raises:
            StoreUnreachableError: they cannot be listed.
        """
        return self.files.elsewhere(known_files(self))
