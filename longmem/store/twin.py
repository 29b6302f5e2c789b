"""The twin of a manifest: a second copy of its rows in a file of its own, by which damage is noticed and mended.

It has the manifest's tables but for records, whose second copy is in the segments, and scores; and a checksum beside
each row. A transaction is committed here first: so the twin is never behind the manifest, and at most one transaction,
which nobody was told of, before it. As long as the manifest can be read, it is the truth.
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TWIN = "twin.sqlite"
# Tables that are copied, and the columns by which their rows are found.
TABLES = {
    "commits": ("id",),
    "bank": ("id",),
    "segment": ("id",),
    "piece": ("id",),
    "held": ("bank", "ordinal"),
    "drew": ("piece",),
    "version": ("bank", "number"),
    "tag": ("bank", "name"),
    "receipt": ("id",),
    "secret": ("id",),
    "thinned": ("piece",),
    "cap": ("bank",),
    "quarantine": ("id",),
    "encryption": ("namespace",),
    "location": ("id",),
}
_NUMBER = "SELECT number FROM {}commits"
# How often a reader looks that meets a writer between its two commits.
_TRIES = 20
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_CANNOT_BE_READ = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_ERROR)


class Twin:
    """The writing side: takes over what a transaction of the manifest has changed, before it is committed."""

    def __init__(self, path: Path, manifest: sqlite3.Connection) -> None:
        self.path = path
        self._manifest = manifest
        self._columns = {table: columns_of(manifest, table) for table in TABLES}
        try:
            self._db = self._connect()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self._db = self._begin_anew()
        _note_changes(manifest, TABLES)

    def close(self) -> None:
        self._db.close()

    def take(self) -> None:
        """Commit here what the manifest's transaction has changed, if anything."""
        manifest = self._manifest
        if not manifest.execute("SELECT 1 FROM temp.changed LIMIT 1").fetchone():
            return
        ((number,),) = manifest.execute(_NUMBER.format("")).fetchall()
        manifest.execute("UPDATE commits SET number = number + 1")
        try:
            self._write(number)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self._db.close()
            self._db = self._begin_anew()
            self._write(number)
        manifest.execute("DELETE FROM temp.changed")

    def renew(self) -> None:
        """Let the next transaction copy everything, whatever is here."""
        self._db.execute("DELETE FROM commits")

    def scrub(self) -> bool:
        """As `Manifest.scrub`."""
        return scrub(self._db)

    def _connect(self) -> sqlite3.Connection:
        database = connect(self.path)
        try:
            if not database.execute("SELECT 1 FROM sqlite_master").fetchall():
                database.execute("BEGIN IMMEDIATE")
                for table, columns in self._columns.items():
                    # Without types: what is put in comes out.
                    keys = ", ".join(TABLES[table])
                    database.execute(f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(columns)}, crc)")
                    database.execute(f"CREATE INDEX IF NOT EXISTS {table}_keys ON {table} ({keys})")
                database.execute("COMMIT")
        except BaseException:
            database.close()
            raise
        return database

    def _begin_anew(self) -> sqlite3.Connection:
        """The truth is elsewhere: nothing is lost."""
        for name in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + name).unlink(missing_ok=True)
        return self._connect()

    def _write(self, number: int) -> None:
        """One transaction; `number` is that of the manifest before its own."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self._db.execute(_NUMBER.format("")).fetchall() == [(number,)]:
                changed = self._manifest.execute("SELECT DISTINCT tab, one, two FROM temp.changed").fetchall()
                for table, *key in changed:
                    self._copy(table, key[: len(TABLES[table])])
            else:
                for table in TABLES:
                    self._copy(table)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _copy(self, table: str, key: list[object] | None = None) -> None:
        """The rows of a table that have a key, or all."""
        where = "" if key is None else " WHERE " + " AND ".join(f"{name} = ?" for name in TABLES[table])
        self._db.execute(f"DELETE FROM {table}{where}", key or [])
        rows = self._manifest.execute(f"{_select(table, self._columns[table])}{where}", key or [])
        marks = ", ".join("?" * (len(self._columns[table]) + 1))
        self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", ((*row, crc(said)) for *row, said in rows))


def connect(path: Path) -> sqlite3.Connection:
    """A database that is written durably, and in which nothing is left of deleted rows."""
    # isolation_level=None: transactions begin where the code says so. Threads share the connection under a lock.
    database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("PRAGMA secure_delete = ON")
        # Nothing that is to be forgotten goes to temporary files.
        database.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        database.close()
        raise
    return database


def scrub(database: sqlite3.Connection) -> bool:
    """Leave nothing of deleted rows, in a database and in its log; False if others read it just now."""
    database.execute("VACUUM")
    ((busy, _, _),) = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return not busy


def columns_of(database: sqlite3.Connection, table: str) -> list[str]:
    """Names of a manifest's columns."""
    return [name for _, name, *_ in database.execute(f"PRAGMA main.table_info({table})")]


def crc(said: str) -> int:
    """The checksum of a row: of its values as SQLite's `quote` says them, joined by commas."""
    return zlib.crc32(said.encode())


def is_damage(error: sqlite3.Error) -> bool:
    return ((getattr(error, "sqlite_errorcode", None) or 0) & 0xFF) in _DAMAGED


def _select(table: str, columns: list[str], schema: str = "main") -> str:
    """Each row, and behind it what its checksum is made of."""
    said = " || ',' || ".join(f"quote({name})" for name in columns)
    return f"SELECT {', '.join(columns)}, {said} FROM {schema}.{table}"


def _note_changes(database: sqlite3.Connection, tables: Iterable[str]) -> None:
    """From now on this connection notes which rows it changes."""
    database.execute("CREATE TEMP TABLE changed (tab, one, two)")
    for table in tables:
        for event, rows in (("INSERT", ("NEW",)), ("DELETE", ("OLD",)), ("UPDATE", ("OLD", "NEW"))):
            noted = "; ".join(
                f"INSERT INTO changed VALUES ('{table}', "
                + ", ".join([f"{row}.{name}" for name in TABLES[table]] + ["NULL"] * (2 - len(TABLES[table])))
                + ")"
                for row in rows
            )
            database.execute(f"CREATE TEMP TRIGGER {table}_{event} AFTER {event} ON main.{table} BEGIN {noted}; END")


# ---- comparing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What a manifest and its twin do not agree on.

    Attributes:
        lost: rows by table that the twin has, intact, and the manifest does not.
        extra: rows by table that the manifest has and the twin does not, or not intact.
        wrong: what else is wrong with the manifest, in words.
        renew: the twin is missing, of another time, or damaged.
    """

    lost: dict[str, list[tuple]]
    extra: dict[str, list[tuple]]
    wrong: str | None = None
    renew: bool = False

    @property
    def damaged(self) -> bool:
        """Whether the manifest is not what was written."""
        return self.wrong is not None or bool(self.lost)

    @property
    def meaning(self) -> str:
        """What is wrong with the manifest, in words."""
        if self.wrong is not None:
            return self.wrong
        counts = ", ".join(f"{len(rows)} in table {table}" for table, rows in self.lost.items())
        return f"rows are not what was written ({counts})"


def compare(manifest: str, twin: str, tables: dict[str, list[str]]) -> Comparison:
    """Compare a manifest with its twin, both given as SQLite's URIs; whatever is written meanwhile, at one instant.

    Args:
        tables: the columns that each table of a manifest has.

    Raises:
        sqlite3.Error: the manifest cannot be read.
    """
    database = sqlite3.connect(manifest, uri=True, timeout=30, isolation_level=None)
    renew = Comparison({}, {}, renew=True)
    try:
        # Its own errors come first: they are the manifest's.
        for table, columns in tables.items():
            if columns_of(database, table) != columns:
                return Comparison({}, {}, wrong=f"its table {table} is not what it should be")
        try:
            database.execute("ATTACH ? AS twin", (twin,))
            for _ in range(_TRIES):
                with _snapshot(database) as (ours, theirs):
                    if theirs is None:
                        return renew
                    if ours == theirs:
                        return _compared(database, tables)
                    if ours < theirs - 1:
                        return Comparison({}, {}, wrong="it is older than its twin")
                    ahead = ours < theirs
                time.sleep(0.01)
            # One that stays a transaction ahead is that of a writer that died; one that is behind is of another time.
            return Comparison({}, {}) if ahead else renew
        except sqlite3.DatabaseError as error:
            # Where nothing can be written, its log cannot be recovered.
            if error.sqlite_errorcode & 0xFF not in (*_DAMAGED, *_CANNOT_BE_READ):
                raise
            # Whose damage is it?
            for table in tables:
                database.execute(f"SELECT * FROM main.{table}").fetchall()
            return renew
    finally:
        database.close()


@contextmanager
def _snapshot(database: sqlite3.Connection) -> Iterator[tuple[int, int | None]]:
    """The numbers of both, which stay what they are inside. The twin's first: then no writer can put it far ahead."""
    database.execute("BEGIN")
    try:
        theirs = database.execute(_NUMBER.format("twin.")).fetchall()
        ((ours,),) = database.execute(_NUMBER.format("main.")).fetchall()
        yield ours, theirs[0][0] if theirs else None
    finally:
        database.execute("COMMIT")


def rows_of(
    database: sqlite3.Connection, table: str, columns: list[str], schema: str = "main"
) -> tuple[list[tuple], int]:
    """The rows of a twin's table that are intact, and how many are not."""
    rows = database.execute(_select(table, columns, schema).replace(" FROM", ", crc FROM", 1)).fetchall()
    intact = [tuple(row) for *row, said, check in rows if crc(said) == check]
    return intact, len(rows) - len(intact)


def _compared(database: sqlite3.Connection, tables: dict[str, list[str]]) -> Comparison:
    lost, extra, renew = dict[str, list[tuple]](), dict[str, list[tuple]](), False
    for table, columns in tables.items():
        if _same(database, table, columns):
            continue
        ours = Counter(tuple(row) for *row, _ in database.execute(_select(table, columns)))
        rows, damaged = rows_of(database, table, columns, "twin")
        intact = Counter(rows)
        renew |= damaged > 0
        missing = list((intact - ours).elements())
        if missing:
            lost[table] = missing
        more = (ours - intact).elements()
        if damaged:
            # What has no intact copy is no less true, unless something else is known to be.
            keys = [columns.index(name) for name in TABLES[table]]
            known = {tuple(row[key] for key in keys) for row in missing}
            more = (row for row in more if tuple(row[key] for key in keys) in known)
        if found := list(more):
            extra[table] = found
    return Comparison(lost, extra, renew=renew or bool(extra and not lost))


def _same(database: sqlite3.Connection, table: str, columns: list[str]) -> bool:
    counts = [database.execute(f"SELECT COUNT(*) FROM {schema}.{table}").fetchone() for schema in ("main", "twin")]
    if counts[0] != counts[1]:
        return False
    names = ", ".join(columns)
    if table == "drew":  # the one table in which a row may come twice
        sql = f"SELECT {names} FROM {{}}.drew ORDER BY {names}"
        return database.execute(sql.format("main")).fetchall() == database.execute(sql.format("twin")).fetchall()
    found = " AND ".join(f"a.{name} = b.{name}" for name in TABLES[table])
    same = " AND ".join(f"a.{name} IS b.{name}" for name in columns)
    joined = database.execute(
        f"SELECT COUNT(*) FROM main.{table} a JOIN twin.{table} b ON {found} WHERE {same}"
    ).fetchone()
    return joined == counts[0]
