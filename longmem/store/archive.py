"""A bank as one file: a tar of a store that holds this bank and nothing else, with the checksum of each file in it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
import secrets
import tarfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from longmem.errors import BankError, StoreCorruptError, StoreError, StoreNotWritableError
from longmem.store.algebra import not_writable
from longmem.store.copying import Contents, contents, put, still_held
from longmem.store.encryption import Keys, Seal
from longmem.store.files import new_file, sync_folder, write_bytes
from longmem.store.manifest import MANIFEST, Manifest, blank, now
from longmem.store.rows import add_version
from longmem.store.segments import (
    SEGMENTS,
    NewSegment,
    Piece,
    Record,
    by_segment,
    named,
    read_segment,
    segment_name,
    write_segment,
)
from longmem.store.versions import resolve

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore

SUMS = "SHA256SUMS"
_SEGMENT = re.compile(rf"{SEGMENTS}/[0-9a-f]{{32}}\.safetensors")


# ---- out -----------------------------------------------------------------------------------------------------


def export(
    store: MemoryStore,
    name: str,
    path: Path,
    version: int | str | None,
    plain: bool,
    on_bytes: Callable[[int], None] | None,
) -> int:
    """See `MemoryStore.export`."""
    if store.seal(name).key_id is not None and not plain:
        raise StoreError(
            f"Bank {name!r} is encrypted, and an exported file is not: who has it can read it, and destroying the key "
            "does not forget it. If that is what you want, say so: `export(…, plain=True)`, --plain."
        )
    if path.exists():
        raise BankError(f"{path} exists already; give the name of a new file.")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    while True:
        bank_id, _ = store.require(name)
        held = contents(store.manifest, store.keys, bank_id, resolve(store, name, version))
        with ExitStack() as stack:
            stack.callback(_remove, temporary)
            try:
                size = _pack(store, held, temporary, stack, on_bytes)
                # What was forgotten meanwhile must not live on in the file.
                if still_held(store, bank_id, held.pieces):
                    os.rename(temporary, path)
                    sync_folder(path.parent)
                    return size
            except StoreCorruptError:
                # A segment that is gone was forgotten or moved meanwhile, if the bank has changed: then look again.
                if store.revision(bank_id) == held.revision:
                    raise
            except OSError as error:
                raise StoreNotWritableError(
                    f"Bank {name!r} was not exported: {error}. Check the space and the permissions of {path.parent}."
                ) from error


def _pack(
    store: MemoryStore, held: Contents, path: Path, stack: ExitStack, on_bytes: Callable[[int], None] | None
) -> int:
    """Write the file; returns its size."""
    records, placed, files = dict(held.records), list[Piece](), list[tuple[NewSegment, Path]]()
    for segment, mine in by_segment(held.pieces).items():
        file = store.segment_path(mine[0].file)
        what, mend = named(mine, held.name), store.mend(held.name)
        entries = read_segment(file, mine, what, mend, store.keys, verify=True)
        for piece, entry in zip(mine, entries, strict=True):
            if piece.id not in records:
                records[piece.id] = Record.of(entry).pack()
        if len(store.in_segment(segment)) == len(mine) and store.seal(held.name).key_id is None:
            new = NewSegment(mine[0].file, mine[0].sha256, file.stat().st_size, held.name, None)
            places = [(piece.first_token, piece.first_char) for piece in mine]
        else:
            # It holds what is not this bank's, or not yet in this version; or is encrypted.
            file = path.with_name(f"{path.name}.{len(files)}")
            stack.callback(_remove, file)
            with new_file(file) as out:
                said = write_segment(out, file.name, entries, Seal(store.keys))
            new = NewSegment(f"{secrets.token_hex(16)}.safetensors", *said, held.name, None)
            places, token, char = [], 0, 0
            for piece in mine:
                places.append((token, char))
                token, char = token + piece.tokens, char + piece.chars
        for piece, (token, char) in zip(mine, places, strict=True):
            placed.append(dataclasses.replace(piece, segment=len(files) + 1, first_token=token, first_char=char))
        files.append((new, file))
    order = {piece.id: n for n, piece in enumerate(held.pieces)}
    placed.sort(key=lambda piece: order[piece.id])
    manifest = _manifest(
        dataclasses.replace(held, pieces=placed, records=records), [new for new, _ in files], Seal(store.keys)
    )
    sums = {MANIFEST: hashlib.sha256(manifest).hexdigest()}
    sums |= {f"{SEGMENTS}/{new.file}": new.sha256 for new, _ in files}
    text = "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()).encode()
    with open(path, "xb") as out:
        with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as archive:
            for name, data in ((SUMS, text), (MANIFEST, manifest)):
                archive.addfile(_member(name, len(data)), io.BytesIO(data))
            for new, file in files:
                with open(file, "rb") as source:
                    archive.addfile(_member(f"{SEGMENTS}/{new.file}", new.bytes), source)
                if on_bytes is not None:
                    on_bytes(new.bytes)
        out.flush()
        os.fsync(out.fileno())
        return out.tell()


def _manifest(held: Contents, segments: list[NewSegment], seal: Seal) -> bytes:
    """A manifest of this bank alone."""
    database = blank()
    for number, new in enumerate(segments, start=1):
        database.execute("INSERT INTO segment VALUES (?, ?, ?, ?)", (number, new.file, new.sha256, new.bytes))
    put(database, seal, held, held.name, held.name, {number: number for number in range(1, len(segments) + 1)})
    data = database.serialize()
    database.close()
    return data


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


# ---- in ------------------------------------------------------------------------------------------------------


def import_(store: MemoryStore, path: Path, name: str | None, on_bytes: Callable[[int], None] | None) -> str:
    """See `MemoryStore.import_`."""
    store.manifest.require_writable()
    copied: dict[str, NewSegment] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            sums = _sums(path, _read(path, archive, SUMS))
            manifest = _read(path, archive, MANIFEST)
            _check(path, MANIFEST, hashlib.sha256(manifest).hexdigest(), sums)
            held = _contents(path, manifest, store.keys)
            to = name or held.name
            store.require_free(to)
            # Checked as they are copied; nothing is part of the store before all are.
            for member in archive:
                source = archive.extractfile(member) if _SEGMENT.fullmatch(member.name) else None
                if source is not None:
                    new, sha256 = _copy(store, source, to)
                    copied[Path(member.name).name] = new
                    _check(path, member.name, sha256, sums)
                    if on_bytes is not None:
                        on_bytes(new.bytes)
        missing = [file for file in {piece.file for piece in held.pieces} if file not in copied]
        if missing:
            raise StoreCorruptError(f"{path} is damaged: {SEGMENTS}/{missing[0]} is missing. Export the bank again.")
        for piece in held.pieces:
            _check(path, f"{SEGMENTS}/{piece.file}", piece.sha256, sums)
        with store.manifest.transaction() as database:
            store.require_free(to)
            ids = {file: store.place(database, new) for file, new in copied.items()}
            bank_id = put(
                database, store.seal(to), held, to, to, {piece.segment: ids[piece.file] for piece in held.pieces}
            )
            add_version(database, bank_id, "import", now(), f"of {held.name}")
    except BaseException as error:
        for new in copied.values():
            store.discard(new.file)
        if isinstance(error, tarfile.TarError):
            raise StoreCorruptError(
                f"{path} cannot be read as an exported bank: {error}. Give a file that `longmem export` wrote; if this "
                "is one, it is damaged or not complete."
            ) from error
        if isinstance(error, FileNotFoundError) and error.filename == str(path):
            raise
        if isinstance(error, OSError):
            raise not_writable(store, error, f"Nothing was imported from {path}") from error
        raise
    return to


def _read(path: Path, archive: tarfile.TarFile, name: str) -> bytes:
    """The next file of an archive, which must be this one."""
    member = archive.next()
    source = None if member is None or member.name != name else archive.extractfile(member)
    if source is None:
        raise StoreCorruptError(
            f"{path} is no exported bank, or damaged: {name} was expected, "
            f"{'nothing' if member is None else member.name} was found. Give a file that `longmem export` wrote."
        )
    return source.read()


def _sums(path: Path, data: bytes) -> dict[str, str]:
    try:
        *lines, end = data.decode().split("\n")
        if end:
            raise ValueError("it does not end with its last line")
        return {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
    except (UnicodeDecodeError, ValueError) as error:
        raise StoreCorruptError(f"{path} is damaged: its {SUMS} cannot be read. Export the bank again.") from error


def _check(path: Path, name: str, sha256: str, sums: dict[str, str]) -> None:
    if sums.get(name) != sha256:
        raise StoreCorruptError(
            f"{path} is damaged: the sha256 of {name} is {sha256}, {SUMS} says {sums.get(name)}. Export the bank again."
        )


def _contents(path: Path, manifest: bytes, keys: Keys) -> Contents:
    opened = Manifest.from_bytes(manifest, path)
    try:
        banks = opened.query("SELECT id FROM bank")
        if len(banks) != 1:
            raise StoreCorruptError(f"{path} holds {len(banks)} banks; one was expected. Export the bank again.")
        return contents(opened, keys, banks[0][0], 2**62)
    finally:
        opened.close()


def _copy(store: MemoryStore, source: IO[bytes], bank: str) -> tuple[NewSegment, str]:
    """Copy a segment into the store, under a temporary name; returns its sha256 as it came, too."""
    seal = store.seal(bank)
    file = secrets.token_hex(16) + ".safetensors"
    try:
        data = source.read()
        said = write_bytes(store.files.draft(file), seal.data(data, segment_name(file)))
        store.files.finish(file)
        return NewSegment(file, *said, bank, seal.key_id), hashlib.sha256(data).hexdigest()
    except BaseException:
        store.discard(file)
        raise
