"""What a bank holds, taken out of one manifest and put into another, or under another name."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from longmem.bank import BankEntry
from longmem.store.consolidate import SEGMENT_BYTES
from longmem.store.encryption import Keys, Seal
from longmem.store.manifest import Manifest, now
from longmem.store.rows import add_piece, record_name
from longmem.store.segments import PIECES, NewSegment, Piece, Record, named, pieces_of, read_segment

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore

_DREW = """
SELECT drew.piece, bank, source, char_start, char_end, weight FROM drew
WHERE drew.piece IN (SELECT piece FROM held WHERE held.bank = ?)
"""
_THINNED = """
SELECT thinned.piece, rows, kept FROM thinned WHERE piece IN (SELECT piece FROM held WHERE held.bank = ?)
"""


@dataclass(frozen=True)
class Contents:
    """All rows of a bank up to a version.

    Attributes:
        name, spec: of the bank; the spec as JSON.
        pieces: in order.
        records: by piece; those of the first version have none.
        drew: what each piece drew on: bank, source, char_start, char_end, weight; sources of other banks as their
            namespaces name them.
        thinned: of pieces that keep some rows only: how many, and which, as the manifest has them.
        versions: number, operation, note, forgotten, created.
        tags: name, version.
        revision: of the bank, when this was read.
    """

    name: str
    spec: str
    pieces: list[Piece]
    records: dict[int, bytes]
    drew: dict[int, list[tuple]]
    thinned: dict[int, tuple[int, bytes]]
    versions: list[tuple]
    tags: list[tuple]
    revision: int


def contents(manifest: Manifest, keys: Keys, bank_id: int, version: int) -> Contents:
    """What a bank holds in a version, with the versions before it."""
    ((name, spec, revision),) = manifest.query("SELECT name, spec, revision FROM bank WHERE id = ?", bank_id)
    pieces = pieces_of(manifest.query(PIECES, bank_id, version), keys)
    found = manifest.query(
        "SELECT record.piece, data FROM record JOIN held ON held.piece = record.piece "
        "WHERE held.bank = ? AND version <= ?",
        bank_id,
        version,
    )
    records = {piece: bytes(keys.opened(data, record_name(piece))) for piece, data in found}
    drew: defaultdict[int, list[tuple]] = defaultdict(list)
    for piece, bank, source, *rest in manifest.query(_DREW, bank_id):
        drew[piece].append((bank, keys.name(source) if bank == name else source, *rest))
    thinned = {piece: (rows, kept) for piece, rows, kept in manifest.query(_THINNED, bank_id)}
    columns = "number, operation, note, forgotten, created"
    versions = manifest.query(f"SELECT {columns} FROM version WHERE bank = ? AND number <= ?", bank_id, version)
    tags = manifest.query("SELECT name, version FROM tag WHERE bank = ? AND version <= ?", bank_id, version)
    return Contents(name, spec, pieces, records, drew, thinned, versions, tags, revision)


def put(
    database: sqlite3.Connection, seal: Seal, held: Contents, name: str, namespace: str, segments: dict[int, int]
) -> int:
    """A new bank with these contents, inside a transaction.

    Args:
        seal: of the namespace.
        segments: ids of segments here by `Piece.segment`.

    Returns:
        Its id.
    """
    created = now()
    bank_id = database.execute(
        "INSERT INTO bank (name, namespace, spec, revision, created, updated) VALUES (?, ?, ?, 1, ?, ?)",
        (name, namespace, held.spec, created, created),
    ).lastrowid
    assert bank_id is not None
    for number, operation, note, forgotten, at in held.versions:
        row = (bank_id, number, operation, note, forgotten, at)
        database.execute("INSERT INTO version VALUES (?, ?, ?, ?, ?, ?)", row)
    database.executemany("INSERT INTO tag VALUES (?, ?, ?)", [(bank_id, *tag) for tag in held.tags])
    ids = [put_piece(database, seal, held, piece, name, segments) for piece in held.pieces]
    rows = [(bank_id, n, new, piece.version) for n, (new, piece) in enumerate(zip(ids, held.pieces, strict=True))]
    database.executemany("INSERT INTO held VALUES (?, ?, ?, ?)", rows)
    return bank_id


def put_piece(
    database: sqlite3.Connection, seal: Seal, held: Contents, piece: Piece, name: str, segments: dict[int, int]
) -> int:
    """One of these pieces for a bank of this name, which does not hold it yet, inside a transaction; returns its id."""
    # What it drew on in its own bank is now in this one.
    drew = [
        (name, seal.name(source), *place) if bank == held.name else (bank, source, *place)
        for bank, source, *place in held.drew.get(piece.id, [])
    ]
    what = (piece.source, piece.char_start, piece.chars, piece.tokens, piece.created, segments[piece.segment])
    new = add_piece(database, seal, what, held.records[piece.id], drew, (piece.first_token, piece.first_char))
    if piece.id in held.thinned:
        database.execute("INSERT INTO thinned (piece, rows, kept) VALUES (?, ?, ?)", (new, *held.thinned[piece.id]))
    return new


def still_held(store: MemoryStore, bank_id: int, pieces: Sequence[Piece]) -> bool:
    """Whether a bank holds all of these pieces still, and all of their rows; what was appended does not matter."""
    rows = {piece.id: piece.rows for piece in store.pieces(bank_id)}
    return all(rows.get(piece.id) == piece.rows for piece in pieces)


class Writer:
    """Writes entries to new segments, none much larger than consolidation makes them, for a transaction that follows.

    They are written for a bank, and sealed as its namespace is.

    Attributes:
        written: complete under temporary names; `discard` them if there is no such transaction.
        placed: the pieces, where they will lie: `segment` is a place in `written`.
    """

    def __init__(self, store: MemoryStore, bank: str) -> None:
        self.written: list[NewSegment] = []
        self.placed: list[Piece] = []
        self._store, self._bank = store, bank
        self._entries: list[BankEntry] = []
        self._tokens = self._chars = 0

    def add(self, piece: Piece, entry: BankEntry) -> None:
        """Write a piece as this entry; only its version and its time are kept."""
        self.placed.append(
            replace(
                piece,
                char_start=entry.char_start,
                chars=len(entry.text),
                tokens=len(entry),
                segment=len(self.written),
                first_token=self._tokens,
                first_char=self._chars,
            )
        )
        self._entries.append(entry)
        self._tokens, self._chars = self._tokens + len(entry), self._chars + len(entry.text)
        if self._tokens and self._tokens * _token_bytes(entry) > SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._entries:
            self.written.append(self._store.write_segment(self._entries, self._bank))
            self._entries, self._tokens, self._chars = [], 0, 0

    def place(self, database: sqlite3.Connection) -> dict[int, int]:
        """Give all segments their names and rows, inside a transaction; returns row ids by place in `written`."""
        return {place: self._store.place(database, new) for place, new in enumerate(self.written)}

    def discard(self) -> None:
        for new in self.written:
            self._store.discard(new.file)


def _token_bytes(entry: BankEntry) -> int:
    parts = (entry.keys_HNE, entry.values_HNE)
    return sum(part.shape[0] * part.shape[2] * part.element_size() for part in parts)


def rewrite(store: MemoryStore, held: Contents, pieces: Iterable[Piece], writer: Writer) -> Contents:
    """Copy pieces of a bank to new segments; returns the contents with these pieces, in their new places.

    Raises:
        StoreCorruptError: a segment is missing or damaged.
        OSError: the disk is full or cannot be written.
    """
    records = dict(held.records)
    checked: set[str] = set()
    for together in _runs(pieces):
        file = together[0].file
        what = named(together, held.name)
        path, mend = store.segment_path(file), store.mend(held.name)
        for piece, entry in zip(
            together, read_segment(path, together, what, mend, store.keys, verify=file not in checked), strict=True
        ):
            writer.add(piece, entry)
            if piece.id not in records:
                records[piece.id] = Record.of(entry).pack()
        checked.add(file)
    writer.flush()
    return replace(held, pieces=writer.placed, records=records)


def _runs(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Neighbours of one segment together."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if runs and runs[-1][-1].segment == piece.segment:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs
