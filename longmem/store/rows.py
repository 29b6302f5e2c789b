"""Rows of the manifest that several operations write, each inside a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

from longmem.store.encryption import Seal


def add_version(
    database: sqlite3.Connection, bank_id: int, operation: str, created: str, note: str | None = None
) -> int:
    """Begin the next version of a bank; returns its number."""
    (number,) = database.execute(
        "SELECT COALESCE(MAX(number) + 1, 1) FROM version WHERE bank = ?", (bank_id,)
    ).fetchone()
    database.execute("INSERT INTO version VALUES (?, ?, ?, ?, 0, ?)", (bank_id, number, operation, note, created))
    return number


def add_piece(
    database: sqlite3.Connection,
    seal: Seal,
    row: tuple[str, int, int, int, str, int],
    record: bytes,
    drew: Sequence[tuple[str, str | bytes, int, int, float]] = (),
    place: tuple[int, int] = (0, 0),
) -> int:
    """A piece that nobody holds yet, with its record; returns its id.

    Args:
        seal: of the namespace that it belongs to.
        row: source, char_start, chars, tokens, created, segment.
        drew: bank, source, char_start, char_end and weight of what it drew on, the source as that bank's namespace
            names it.
        place: first_token and first_char in its segment.
    """
    piece = database.execute(
        "INSERT INTO piece (source, char_start, chars, tokens, created, segment, first_token, first_char) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (seal.name(row[0]), *row[1:], *place),
    ).lastrowid
    assert piece is not None
    put_record(database, seal, piece, record)
    database.executemany("INSERT INTO drew VALUES (?, ?, ?, ?, ?, ?)", [(piece, *on) for on in drew])
    return piece


def put_record(database: sqlite3.Connection, seal: Seal, piece: int, record: bytes) -> None:
    """What a piece was made from, in place of any that was there."""
    data = seal.data(record, record_name(piece))
    database.execute("INSERT OR REPLACE INTO record (piece, data) VALUES (?, ?)", (piece, data))


def record_name(piece: int) -> str:
    """What the record of a piece is sealed as."""
    return f"record {piece}"


def hold(database: sqlite3.Connection, bank_id: int, pieces: Iterable[tuple[int, int]]) -> None:
    """Let a bank hold pieces, given with the versions in which they come, behind all that it holds."""
    (ordinal,) = database.execute(
        "SELECT COALESCE(MAX(ordinal) + 1, 0) FROM held WHERE bank = ?", (bank_id,)
    ).fetchone()
    rows = [(bank_id, ordinal + n, piece, version) for n, (piece, version) in enumerate(pieces)]
    database.executemany("INSERT INTO held VALUES (?, ?, ?, ?)", rows)
