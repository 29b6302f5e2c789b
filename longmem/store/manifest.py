"""The manifest of a store: which banks there are, and which segments each holds. SQLite, and nothing but SQLite.

docs/format.md describes every table.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from longmem.errors import StoreCorruptError, StoreError, StoreNotWritableError

MANIFEST = "manifest.sqlite"
FORMAT_VERSION = 2
APPLICATION_ID = 0x4C4D454D  # "LMEM"

SCHEMA = """
CREATE TABLE bank (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    name     TEXT    NOT NULL UNIQUE,
    spec     TEXT    NOT NULL,
    revision INTEGER NOT NULL,
    created  TEXT    NOT NULL,
    updated  TEXT    NOT NULL
);
CREATE TABLE segment (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    bank   INTEGER NOT NULL REFERENCES bank (id),
    file   TEXT    NOT NULL UNIQUE,
    sha256 TEXT    NOT NULL,
    bytes  INTEGER NOT NULL
);
CREATE TABLE piece (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    bank        INTEGER NOT NULL REFERENCES bank (id),
    ordinal     INTEGER NOT NULL,
    source      TEXT    NOT NULL,
    char_start  INTEGER NOT NULL,
    chars       INTEGER NOT NULL,
    tokens      INTEGER NOT NULL,
    segment     INTEGER NOT NULL REFERENCES segment (id),
    first_token INTEGER NOT NULL,
    first_char  INTEGER NOT NULL,
    created     TEXT    NOT NULL,
    UNIQUE (bank, ordinal)
);
CREATE INDEX piece_segment ON piece (segment);
CREATE TABLE record (
    piece INTEGER PRIMARY KEY REFERENCES piece (id),
    data  BLOB    NOT NULL
);
CREATE TABLE quarantine (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    bank       INTEGER NOT NULL REFERENCES bank (id),
    source     TEXT    NOT NULL,
    char_start INTEGER NOT NULL,
    chars      INTEGER NOT NULL,
    file       TEXT,
    record     BLOB,
    reason     TEXT,
    created    TEXT    NOT NULL
);
"""
# Added since: a manifest of version 2 without them has banks that were never thinned.
RETENTION = """
CREATE TABLE IF NOT EXISTS thinned (
    piece INTEGER PRIMARY KEY REFERENCES piece (id),
    rows  INTEGER NOT NULL,
    kept  BLOB    NOT NULL
);
CREATE TABLE IF NOT EXISTS score (
    piece INTEGER NOT NULL REFERENCES piece (id),
    name  TEXT    NOT NULL,
    data  BLOB    NOT NULL,
    PRIMARY KEY (piece, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cap (
    bank     INTEGER PRIMARY KEY REFERENCES bank (id),
    settings TEXT    NOT NULL
);
"""
# Format 1 had one row for a piece and its file, and no copy of the text outside of that file.
_MIGRATION = f"""
ALTER TABLE segment RENAME TO segment_1;
{SCHEMA[SCHEMA.index("CREATE TABLE segment") :]}
INSERT INTO segment SELECT id, bank, file, sha256, bytes FROM segment_1;
INSERT INTO piece
SELECT id, bank, ordinal, source, char_start, chars, tokens, id, 0, 0, created FROM segment_1;
DROP TABLE segment_1;
"""
# What cannot be migrated is read through views: a temporary one hides a table of the same name.
_VIEWS = """
CREATE TEMP VIEW piece AS
SELECT id, bank, ordinal, source, char_start, chars, tokens, id AS segment, 0 AS first_token, 0 AS first_char, created
FROM main.segment;
CREATE TEMP VIEW segment AS SELECT id, bank, file, sha256, bytes FROM main.segment;
CREATE TEMP TABLE record (piece INTEGER PRIMARY KEY, data BLOB);
CREATE TEMP TABLE quarantine (
    bank INTEGER, source TEXT, char_start INTEGER, chars INTEGER, file TEXT, record BLOB, reason TEXT
);
"""
_BUSY_SECONDS = 30.0


class Manifest:
    """The database of one store. Threads share its connection under a lock; SQLite keeps processes apart."""

    def __init__(self, folder: Path, database: sqlite3.Connection, *, writable: bool) -> None:
        self.folder = folder
        self.writable = writable
        self._db = database
        self._lock = threading.RLock()

    @classmethod
    def open(cls, folder: Path, *, writable: bool) -> Manifest:
        """Open the manifest of a folder; if it can be written and there is none, make one.

        Raises:
            StoreError: it belongs to another program or to another version.
            StoreCorruptError: it is damaged.
        """
        path = folder / MANIFEST
        with _explained(folder):
            database = _connect(path) if writable else _connect_read_only(path)
            try:
                _check_format(database, folder, writable=writable)
            except BaseException:
                database.close()
                raise
        return cls(folder, database, writable=writable)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def query(self, sql: str, *values: object) -> list[tuple]:
        """All rows of a statement."""
        with self._lock, _explained(self.folder):
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The write lock of the store, held until everything inside is committed or, on any exception, undone."""
        self.require_writable()
        with self._lock, _explained(self.folder):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def require_writable(self) -> None:
        """Raise `StoreNotWritableError` if the store is open for reading only."""
        if not self.writable:
            raise StoreNotWritableError(
                f"The store in {self.folder} is open for reading only: its folder or manifest cannot be written. "
                "Change their permissions and open it again, or copy the store."
            )


def _connect(manifest: Path) -> sqlite3.Connection:
    # isolation_level=None: transactions begin where the code says so. Threads share the connection under a lock.
    database = sqlite3.connect(manifest, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("PRAGMA secure_delete = ON")
    except BaseException:
        database.close()
        raise
    return database


def _connect_read_only(manifest: Path) -> sqlite3.Connection:
    # SQLite reads a log with the help of a file that it cannot create here. Without a log (the last writer closed
    # it) the manifest is complete in itself; with one it must not be ignored.
    log = manifest.with_name(manifest.name + "-wal")
    has_log = os.path.exists(log)
    uri = manifest.absolute().as_uri() + ("?mode=ro" if has_log else "?mode=ro&immutable=1")
    database = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        database.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        database.close()
        if not has_log:
            raise
        raise StoreError(
            f"The store has an unfinished log, {log}, and cannot be written, so the log cannot be read: {error}. "
            "Open the store once where it can be written, for example a copy."
        ) from error
    return database


def _check_format(database: sqlite3.Connection, folder: Path, *, writable: bool) -> None:
    """Create the tables of a new manifest, or make sure that this version can read them."""

    def number(sql: str) -> int:
        return database.execute(sql).fetchone()[0]

    def is_new() -> bool:
        return number("PRAGMA user_version") == 0 and number("SELECT COUNT(*) FROM sqlite_master") == 0

    def run(script: str) -> None:
        for statement in script.split(";"):
            database.execute(statement)

    if writable and is_new():
        database.execute("BEGIN EXCLUSIVE")
        if is_new():
            run(SCHEMA)
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        database.execute("COMMIT")
    if number("PRAGMA application_id") != APPLICATION_ID:
        raise StoreError(
            f"{folder / MANIFEST} belongs to another program. Give the folder of a store, or a new folder."
        )
    if number("PRAGMA user_version") == 1 and writable:
        database.execute("BEGIN EXCLUSIVE")
        # Another process may have been first.
        if number("PRAGMA user_version") == 1:
            run(_MIGRATION)
            database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        database.execute("COMMIT")
    has_retention = number("SELECT COUNT(*) FROM sqlite_master WHERE name = 'thinned'")
    if not has_retention and writable:
        database.execute("BEGIN EXCLUSIVE")
        run(RETENTION)
        database.execute("COMMIT")
    elif not has_retention:
        database.execute("PRAGMA temp_store = MEMORY")
        run(RETENTION.replace("CREATE TABLE IF NOT EXISTS", "CREATE TEMP TABLE"))
    version = number("PRAGMA user_version")
    if version == 1:
        run(_VIEWS)
    elif version != FORMAT_VERSION:
        raise StoreError(
            f"The store in {folder} has format {version}; this longmem reads formats 1 and {FORMAT_VERSION}. "
            "Update longmem."
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors into errors that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        manifest = folder / MANIFEST
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise StoreCorruptError(f"{manifest} is damaged: {error}. Restore it from a backup.") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreError(
                f"Another process has kept {manifest} locked for {_BUSY_SECONDS:.0f} seconds. "
                "Wait for it, then try again."
            ) from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            raise StoreNotWritableError(
                f"{manifest} cannot be opened or written: {error}. Check the space and the permissions of {folder}."
            ) from error
        raise StoreError(f"{manifest}: {error}. Open the store again.") from error


def now() -> str:
    """The time as the manifest writes it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
