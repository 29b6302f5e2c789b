"""Whether everything in a store is what it was when it was written. Nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError

from longmem.bank import DTYPES
from longmem.config import BankSpec
from longmem.errors import StoreCorruptError, StoreKeyError
from longmem.store.files import digest
from longmem.store.indexes import read_index
from longmem.store.manifest import MANIFEST, compare_in, explained
from longmem.store.receipts import is_genuine, receipts
from longmem.store.rows import record_name
from longmem.store.segments import Piece, Record, by_segment, header_of, segment_name
from longmem.store.tensors import open_tensors
from longmem.store.thinning import damaged_scores
from longmem.store.twin import TWIN

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore

Kind = Literal[
    "missing",
    "size",
    "checksum",
    "unreadable",
    "header",
    "gap",
    "record",
    "score",
    "index",
    "receipt",
    "manifest",
    "twin",
    "key",
]


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was written.

    Attributes:
        bank: name; None if the fault is the manifest's, or its twin's.
        sources: names of the sources that it concerns.
        file: name inside the store; None for what is in the manifest beside rows that have a second copy.
        kind: what is wrong.
        meaning: the same in words: what was found, what was expected, and what it means.
    """

    bank: str | None
    sources: tuple[str, ...]
    file: str | None
    kind: Kind
    meaning: str


@dataclass(frozen=True)
class Report:
    """What `MemoryStore.verify` found.

    Attributes:
        banks, segments, tokens, bytes: what was checked.
        faults: empty if all is well.
        orphans: files that no row names. They mean nothing and go when the store is next opened and can be written.
        without_record: pieces whose text is in their segment alone. `repair` and `consolidate` copy it.
        quarantined: pieces that an earlier repair took out of their banks.
    """

    banks: int
    segments: int
    tokens: int
    bytes: int
    faults: tuple[Fault, ...]
    orphans: tuple[str, ...]
    without_record: int
    quarantined: int

    @property
    def ok(self) -> bool:
        return not self.faults


def verify(store: MemoryStore, name: str | None, on_bytes: Callable[[int], None] | None) -> Report:
    """See `MemoryStore.verify`."""
    query = store.manifest.query
    faults = [
        Fault(None, (), MANIFEST, "manifest", f"SQLite finds the manifest damaged: {row}.")
        for (row,) in query("PRAGMA integrity_check(20)")
        if row != "ok"
    ]
    with explained(store.folder):
        compared = compare_in(store.folder, writable=store.writable)
    if compared.damaged:
        faults.append(Fault(None, (), MANIFEST, "manifest", f"In the manifest {compared.meaning}."))
    elif compared.renew and (store.folder / TWIN).exists():
        faults.append(Fault(None, (), TWIN, "twin", "The manifest's second copy is damaged. Nothing is lost."))
    given = receipts(store.manifest)
    if given and not is_genuine(store.manifest, given[-1]):
        altered = "A receipt was altered or taken out: what they say was forgotten cannot be trusted."
        faults.append(Fault(None, (), None, "receipt", f"{altered} No bank is concerned."))
    if name is not None and store.find(name) is None:
        raise store.not_found(name)
    banks = [row for row in query("SELECT id, name, spec FROM bank ORDER BY name") if name in (None, row[1])]
    sizes: dict[int, int] = {}
    tokens = bare = quarantined = 0
    known: dict[str, Fault | None] = {}
    for bank_id, bank, spec in banks:
        # A bank that changes while it is read is read again: what was forgotten meanwhile is no fault.
        while True:
            revision = store.revision(bank_id)
            if revision is None:
                break
            try:
                pieces, read = store.pieces(bank_id), store.segment_sizes(bank_id)
                found = list(bank_faults(store, bank_id, bank, BankSpec.from_json(spec), on_bytes, known))
            except StoreKeyError as error:
                faults.append(Fault(bank, (), None, "key", f"Its files cannot be checked. {error}"))
                break
            if store.revision(bank_id) == revision:
                faults += found
                sizes |= read
                tokens += sum(piece.tokens for piece in pieces)
                recorded = "SELECT COUNT(*) FROM record JOIN held ON held.piece = record.piece WHERE bank = ?"
                bare += len(pieces) - query(recorded, bank_id)[0][0]
                quarantined += query("SELECT COUNT(reason) FROM quarantine WHERE bank = ?", bank_id)[0][0]
                break
    away = [f"{store.files.remote.url}/{file}" for file in store.orphans_elsewhere()] if store.files.remote else []
    orphans = tuple(sorted([*(str(path.relative_to(store.folder)) for path in store.orphans()), *away]))
    return Report(len(banks), len(sizes), tokens, sum(sizes.values()), tuple(faults), orphans, bare, quarantined)


def bank_faults(
    store: MemoryStore,
    bank_id: int,
    name: str,
    spec: BankSpec,
    on_bytes: Callable[[int], None] | None,
    known: dict[str, Fault | None],
) -> Iterator[Fault]:
    """The faults of one bank: of its segments, of the order of its pieces, of their records and of its index.

    Args:
        known: what was found in files that were read for another bank; extended.
    """
    pieces, sizes = store.pieces(bank_id), store.segment_sizes(bank_id)
    for segment, mine in by_segment(pieces).items():
        file, size = mine[0].file, sizes.get(segment, 0)
        if file not in known:
            known[file] = segment_fault(store, name, spec, store.in_segment(segment), size)
        fault = known[file]
        if fault is not None:
            yield replace(fault, bank=name)
        if on_bytes is not None:
            on_bytes(size)
    ends: dict[str, int] = {}
    for piece in pieces:
        end = ends.get(piece.source, 0)
        if piece.char_start != end:
            yield Fault(
                name,
                (piece.source,),
                None,
                "gap",
                f"Source {piece.source!r} goes up to character {end}, its next piece begins at {piece.char_start}: "
                "what lies between is lost.",
            )
        ends[piece.source] = piece.char_start + piece.chars
    for piece in pieces:
        try:
            record_of(store, piece)
        except StoreCorruptError as error:
            meaning = f"{error} It is a copy; as long as the segment is whole, nothing is lost."
            yield Fault(name, (piece.source,), None, "record", meaning)
    sources = {piece.id: piece.source for piece in pieces}
    for piece, kind in damaged_scores(store, bank_id):
        meaning = f"Numbers that caps go by ({kind}) have changed. They count as none; nothing else is lost."
        yield Fault(name, (sources[piece],), None, "score", meaning)
    fault = index_fault(store, bank_id, name, sum(piece.rows for piece in pieces))
    if fault is not None:
        yield fault


def index_fault(store: MemoryStore, bank_id: int, name: str, tokens: int) -> Fault | None:
    """What is wrong with the index of a bank of so many tokens, if anything."""
    path = store.index_path(bank_id)
    if not path.exists():
        return None
    try:
        index = read_index(path, "Make it again: `longmem index`; or search exactly.", store.keys, verify=True)
        if len(index) > tokens:
            raise StoreCorruptError(f"{path} knows {len(index):,} tokens, the bank holds {tokens:,}.")
    except StoreCorruptError as error:
        return Fault(name, (), _inside(store, path), "index", f"{error} An index is a cache: nothing is lost.")
    return None


def segment_fault(store: MemoryStore, bank: str, spec: BankSpec, pieces: Sequence[Piece], size: int) -> Fault | None:
    """What is wrong with the file that holds these pieces, all that lies in it, if anything."""
    file, remote = pieces[0].file, store.files.remote
    path = store.segment_path(file)

    def fault(kind: Kind, meaning: str) -> Fault:
        sources = tuple(dict.fromkeys(piece.source for piece in pieces))
        tokens = sum(piece.tokens for piece in pieces)
        lost = f"It holds {tokens:,} tokens; until it is mended the bank cannot be opened."
        return Fault(bank, sources, _inside(store, path), kind, f"{meaning} {lost}")

    try:
        if remote is not None and remote.size(file) is not None and digest(path) != pieces[0].sha256:
            # It is the copy that is damaged, or both are.
            path.unlink()
            path = store.segment_path(file)
        length = os.stat(path).st_size if remote is None else remote.size(file)
        if length is None:
            return fault("missing", f"The file is gone from {remote.url if remote else ''}.")
        if length != size:
            return fault("size", f"The file has {length:,} bytes, the manifest says {size:,}.")
        sha256 = digest(path) if remote is None else remote.digest(file)
        if sha256 != pieces[0].sha256:
            return fault("checksum", f"Its bytes have changed: sha256 {sha256}, the manifest says {pieces[0].sha256}.")
        header = [(source, start, chars, tokens) for source, start, chars, tokens in header_of(path, store.keys)]
        said = [(piece.source, piece.char_start, piece.chars, piece.tokens) for piece in pieces]
        if sorted(header) != sorted(said):
            return fault("header", f"The file names the pieces {header}, the manifest {said}.")
        rows = sum(piece.rows for piece in pieces)
        kept = DTYPES[spec.dtype] if spec.precision == "full" else torch.uint8
        numbers = spec.row_bytes // kept.itemsize
        with open_tensors(path, store.keys, segment_name(path.name)) as tensors:
            for name in ("keys", "values"):
                part = tensors.get_slice(name)
                shape, dtype = tuple(part.get_shape()), tensors.get_slice(name)[:, :0].dtype
                if shape != (len(spec.memory_heads), rows, numbers) or dtype != kept:
                    expected = f"({len(spec.memory_heads)}, {rows}, {numbers}) of {kept}"
                    return fault("header", f"Its {name} have shape {shape} of {dtype}, the manifest says {expected}.")
    except FileNotFoundError:
        return fault("missing", "The file is gone.")
    except (OSError, RuntimeError, SafetensorError, ValueError, TypeError, StoreCorruptError) as error:
        return fault("unreadable", f"The file cannot be read: {error}.")
    return None


def record_of(store: MemoryStore, piece: Piece) -> Record | None:
    """The manifest's copy of what a piece was made from; None if it has none.

    Raises:
        StoreCorruptError: its bytes have changed.
    """
    for (data,) in store.manifest.query("SELECT data FROM record WHERE piece = ?", piece.id):
        record = Record.unpack(store.keys.opened(data, record_name(piece.id)))
        if (len(record.text), record.token_ids_N.numel()) != (piece.chars, piece.tokens):
            raise StoreCorruptError(
                f"The manifest's copy of a text has {len(record.text)} characters and {record.token_ids_N.numel()} "
                f"tokens; {piece.chars} and {piece.tokens} were expected."
            )
        return record
    return None


def _inside(store: MemoryStore, path: Path) -> str:
    return str(path.relative_to(store.folder))
