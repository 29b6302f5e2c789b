"""A manifest that is damaged or missing is mended from its twin, and from the segments."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longmem.errors import StoreCorruptError, StoreError
from longmem.store.files import new_file, sync_folder, write_bytes
from longmem.store.manifest import MANIFEST, blank, compare_in, explained
from longmem.store.rows import put_record
from longmem.store.segments import Record, by_segment, named, read_segment
from longmem.store.twin import TABLES, TWIN, Comparison, columns_of, connect, is_damage, rows_of

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore


@dataclass(frozen=True)
class Rebuilt:
    """What was done to a manifest.

    Attributes:
        meaning: what was wrong with it, in words.
        whole: whether it was made anew; otherwise rows of it were put right.
        rows: how many were put right, or are in the new one.
    """

    meaning: str
    whole: bool
    rows: int


def rebuild(folder: Path) -> Rebuilt | None:
    """See `MemoryStore.rebuild`."""
    with explained(folder):
        wrong = _what_is_wrong(folder)
        if isinstance(wrong, Comparison):
            if not wrong.damaged:
                return None
            if wrong.wrong is None:
                return _put_right(folder, wrong)
            wrong = wrong.meaning
        return _make_anew(folder, wrong)


def _what_is_wrong(folder: Path) -> Comparison | str:
    """What a manifest and its twin do not agree on; in words, if the manifest cannot be read."""
    if not (folder / MANIFEST).exists():
        return "it was missing"
    try:
        with closing(connect(folder / MANIFEST)) as database:
            for (fault,) in database.execute("PRAGMA integrity_check(1)"):
                if fault != "ok":
                    return fault
        return compare_in(folder, writable=True)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return str(error)


def _put_right(folder: Path, wrong: Comparison) -> Rebuilt:
    """Others may have the store open: they see one row or the other."""
    with closing(connect(folder / MANIFEST)) as database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute("BEGIN IMMEDIATE")
        wrong = compare_in(folder, writable=True)
        for table in TABLES:
            columns = columns_of(database, table)
            same = " AND ".join(f"{name} IS ?" for name in columns)
            database.executemany(f"DELETE FROM {table} WHERE {same}", wrong.extra.get(table, []))
            marks = ", ".join("?" * len(columns))
            database.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", wrong.lost.get(table, []))
        database.execute("COMMIT")
    return Rebuilt(wrong.meaning, False, sum(map(len, wrong.lost.values())))


def _make_anew(folder: Path, meaning: str) -> Rebuilt:
    """A manifest of the twin's rows, and of what can still be read of what the twin has not."""
    manifest, rows = folder / MANIFEST, 0
    with closing(blank()) as database, closing(_twin(folder, meaning)) as twin:
        database.execute("BEGIN")
        database.execute("DELETE FROM commits")
        database.execute("DELETE FROM secret")
        for table in TABLES:
            intact, damaged = rows_of(twin, table, columns_of(database, table))
            if damaged:
                raise StoreCorruptError(
                    f"{manifest} cannot be mended: {meaning}, and {damaged} rows of table {table} in {TWIN} are "
                    "damaged as well. Restore both from a backup."
                )
            marks = ", ".join("?" * len(columns_of(database, table)))
            database.executemany(f"INSERT INTO {table} VALUES ({marks})", intact)
            rows += len(intact)
        for table in ("record", "score"):
            marks = ", ".join("?" * len(columns_of(database, table)))
            database.executemany(f"INSERT INTO {table} VALUES ({marks})", _salvaged(manifest, table, database))
        database.execute("COMMIT")
        data = database.serialize()
    # Complete before the old one goes; and its log goes before another file could be taken for the one it belongs to.
    ready = manifest.with_name(f"{MANIFEST}.tmp")
    ready.unlink(missing_ok=True)
    with new_file(ready) as file:
        write_bytes(file, data)
    for name in ("", "-wal", "-shm"):
        manifest.with_name(MANIFEST + name).unlink(missing_ok=True)
    sync_folder(folder)
    ready.rename(manifest)
    sync_folder(folder)
    return Rebuilt(meaning, True, rows)


def _twin(folder: Path, meaning: str) -> sqlite3.Connection:
    if (folder / TWIN).exists():
        twin = connect(folder / TWIN)
        with suppress(sqlite3.DatabaseError):
            if twin.execute("SELECT number FROM commits").fetchall():
                return twin
        twin.close()
    raise StoreCorruptError(
        f"{folder / MANIFEST} cannot be mended: {meaning}, and its second copy, {TWIN}, is missing or damaged as well. "
        "Restore both from a backup."
    )


def _salvaged(manifest: Path, table: str, pieces: sqlite3.Connection) -> Iterator[tuple]:
    """Rows of a table that can be read in a damaged manifest, of pieces that there are."""
    ids = [piece for (piece,) in pieces.execute("SELECT id FROM piece").fetchall()]
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{manifest.absolute().as_uri()}?mode=rw", uri=True)) as old:
        for piece in ids:
            with suppress(sqlite3.Error):
                yield from old.execute(f"SELECT * FROM {table} WHERE piece = ?", (piece,)).fetchall()


def restore_records(store: MemoryStore) -> int:
    """Give pieces without a record the one that their segment holds, if that is whole; returns how many got one.

    Those that are left are named by `verify`; a segment that is damaged as well has lost its text.
    """
    restored = 0
    for bank in store.banks():
        bank_id, _ = store.require(bank.name)
        bare = "SELECT piece FROM held WHERE bank = ? AND piece NOT IN (SELECT piece FROM record)"
        wanted = {piece for (piece,) in store.manifest.query(bare, bank_id)}
        with suppress(StoreError):
            pieces = [piece for piece in store.pieces(bank_id) if piece.id in wanted]
            for mine in by_segment(pieces).values():
                with suppress(StoreError):
                    path, what = store.segment_path(mine[0].file), named(mine, bank.name)
                    entries = read_segment(path, mine, what, store.mend(bank.name), store.keys, verify=True)
                    with store.manifest.transaction() as database:
                        for piece, entry in zip(mine, entries, strict=True):
                            put_record(database, store.seal(bank.name), piece.id, Record.of(entry).pack())
                    restored += len(mine)
    return restored
