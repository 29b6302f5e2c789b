"""What no bank holds any more goes: its rows, and the bytes of its segments."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from typing import TYPE_CHECKING

from longmem.store.segments import NewSegment, named, read_segment
from longmem.store.thinning import PIECE_TABLES

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore


def release(store: MemoryStore, database: sqlite3.Connection, bank: str, written: list[NewSegment]) -> list[str]:
    """Delete the pieces that no bank holds, inside a transaction.

    A segment that holds others beside them is written anew without them.

    Args:
        bank: that is asked for this, for errors.
        written: extended by the segments that are written, for whoever has to discard them.

    Returns:
        Files to be unlinked after the commit.

    Raises:
        StoreCorruptError: a segment to be written anew is damaged.
        OSError: the disk is full or cannot be written.
    """
    gone: dict[int, set[int]] = defaultdict(set)
    query = "SELECT segment, id FROM piece WHERE id NOT IN (SELECT piece FROM held)"
    for segment, piece in database.execute(query).fetchall():
        gone[segment].add(piece)
    files = []
    for segment, pieces in gone.items():
        files += [file for (file,) in database.execute("SELECT file FROM segment WHERE id = ?", (segment,))]
        held = {piece for (piece,) in database.execute("SELECT id FROM piece WHERE segment = ?", (segment,))}
        # Only then is it read, and its key needed: without one a bank can still be deleted.
        if held - pieces:
            stay = [piece for piece in store.in_segment(segment) if piece.id not in pieces]
            path = store.segment_path(files[-1])
            what, mend = named(stay, bank), store.mend(bank)
            new = store.write_segment(read_segment(path, stay, what, mend, store.keys, verify=True), bank)
            written.append(new)
            store.move(database, new, stay)
    ids = [(piece,) for pieces in gone.values() for piece in pieces]
    for table in PIECE_TABLES:
        database.executemany(f"DELETE FROM {table} WHERE piece = ?", ids)
    database.executemany("DELETE FROM piece WHERE id = ?", ids)
    database.executemany("DELETE FROM segment WHERE id = ?", [(segment,) for segment in gone])
    return files
