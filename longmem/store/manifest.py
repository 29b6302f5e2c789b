"""The manifest of a store: which banks there are, and which pieces each holds. SQLite, and nothing but SQLite.

docs/format.md describes every table.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from longmem.errors import StoreCorruptError, StoreError, StoreNotWritableError
from longmem.store.twin import TABLES, TWIN, Comparison, Twin, columns_of, compare, connect, is_damage, scrub

MANIFEST = "manifest.sqlite"
FORMAT_VERSION = 6
APPLICATION_ID = 0x4C4D454D  # "LMEM"

SCHEMA = """
CREATE TABLE bank (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    name      TEXT    NOT NULL UNIQUE,
    namespace TEXT    NOT NULL,
    spec      TEXT    NOT NULL,
    revision  INTEGER NOT NULL,
    created   TEXT    NOT NULL,
    updated   TEXT    NOT NULL
);
CREATE TABLE segment (
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    file   TEXT    NOT NULL UNIQUE,
    sha256 TEXT    NOT NULL,
    bytes  INTEGER NOT NULL
);
CREATE TABLE piece (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    source      TEXT    NOT NULL,
    char_start  INTEGER NOT NULL,
    chars       INTEGER NOT NULL,
    tokens      INTEGER NOT NULL,
    segment     INTEGER NOT NULL REFERENCES segment (id),
    first_token INTEGER NOT NULL,
    first_char  INTEGER NOT NULL,
    created     TEXT    NOT NULL
);
CREATE INDEX piece_segment ON piece (segment);
CREATE TABLE held (
    bank    INTEGER NOT NULL REFERENCES bank (id),
    ordinal INTEGER NOT NULL,
    piece   INTEGER NOT NULL REFERENCES piece (id),
    version INTEGER NOT NULL,
    PRIMARY KEY (bank, ordinal)
) WITHOUT ROWID;
CREATE INDEX held_piece ON held (piece);
CREATE TABLE record (
    piece INTEGER PRIMARY KEY REFERENCES piece (id),
    data  BLOB    NOT NULL
);
CREATE TABLE drew (
    piece      INTEGER NOT NULL REFERENCES piece (id),
    bank       TEXT    NOT NULL,
    source     TEXT    NOT NULL,
    char_start INTEGER NOT NULL,
    char_end   INTEGER NOT NULL,
    weight     REAL    NOT NULL
);
CREATE INDEX drew_piece ON drew (piece);
CREATE TABLE version (
    bank      INTEGER NOT NULL REFERENCES bank (id),
    number    INTEGER NOT NULL,
    operation TEXT    NOT NULL,
    note      TEXT,
    forgotten INTEGER NOT NULL,
    created   TEXT    NOT NULL,
    PRIMARY KEY (bank, number)
) WITHOUT ROWID;
CREATE TABLE tag (
    bank    INTEGER NOT NULL REFERENCES bank (id),
    name    TEXT    NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (bank, name)
) WITHOUT ROWID;
CREATE TABLE receipt (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT    NOT NULL,
    said      TEXT    NOT NULL,
    signature TEXT    NOT NULL
);
CREATE TABLE secret (
    id  INTEGER PRIMARY KEY CHECK (id = 1),
    key BLOB    NOT NULL
);
CREATE TABLE thinned (
    piece INTEGER PRIMARY KEY REFERENCES piece (id),
    rows  INTEGER NOT NULL,
    kept  BLOB    NOT NULL
);
CREATE TABLE score (
    piece INTEGER NOT NULL REFERENCES piece (id),
    name  TEXT    NOT NULL,
    data  BLOB    NOT NULL,
    PRIMARY KEY (piece, name)
) WITHOUT ROWID;
CREATE TABLE cap (
    bank     INTEGER PRIMARY KEY REFERENCES bank (id),
    settings TEXT    NOT NULL
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
ENCRYPTION = """
CREATE TABLE encryption (
    namespace TEXT PRIMARY KEY,
    key       TEXT NOT NULL,
    created   TEXT NOT NULL,
    destroyed TEXT
)
"""

COMMITS = """
CREATE TABLE commits (
    id     INTEGER PRIMARY KEY CHECK (id = 1),
    number INTEGER NOT NULL
)
"""

LOCATION = """
CREATE TABLE location (
    id   INTEGER PRIMARY KEY CHECK (id = 1),
    url  TEXT    NOT NULL,
    mark TEXT    NOT NULL
)
"""

# Format 4 had no other location of segments, and no twin, so no numbers of commits. Format 3 had no encrypted
# namespaces. Format 1 had one row, in `segment`, for a piece and its file, and no copy of the text outside of that
# file. Format 2 had pieces of one bank each, and no versions.
_PIECES_OF_1 = """
CREATE TABLE old_piece AS SELECT id, bank, ordinal, source, char_start, chars, tokens, id AS segment, 0 AS first_token,
    0 AS first_char, created FROM old_segment;
CREATE TABLE old_record (piece, data);
CREATE TABLE old_quarantine AS SELECT * FROM quarantine
"""
_MIGRATION = """
INSERT INTO bank SELECT id, name, name, spec, revision, created, updated FROM old_bank;
INSERT INTO segment SELECT id, file, sha256, bytes FROM old_segment;
INSERT INTO piece
SELECT id, source, char_start, chars, tokens, segment, first_token, first_char, created FROM old_piece;
INSERT INTO held SELECT bank, ordinal, id, ROW_NUMBER() OVER (PARTITION BY bank ORDER BY ordinal) FROM old_piece;
INSERT INTO version
SELECT bank, ROW_NUMBER() OVER (PARTITION BY bank ORDER BY ordinal), 'append', NULL, 0, created FROM old_piece;
INSERT INTO record SELECT piece, data FROM old_record;
INSERT INTO quarantine SELECT id, bank, source, char_start, chars, file, record, reason, created FROM old_quarantine;
DELETE FROM sqlite_sequence WHERE 'old_' || name IN (SELECT name FROM sqlite_sequence);
UPDATE sqlite_sequence SET name = substr(name, 5) WHERE name LIKE 'old#_%' ESCAPE '#'
"""
_BUSY_SECONDS = 30.0
_MEND = "Nothing of the store is used until it is mended: `longmem repair --store {folder}`."


class Manifest:
    """The database of one store. Threads share its connection under a lock; SQLite keeps processes apart."""

    def __init__(self, folder: Path, database: sqlite3.Connection, *, writable: bool, twin: Twin | None = None) -> None:
        self.folder = folder
        self.writable = writable
        self._db = database
        self._twin = twin
        self._lock = threading.RLock()

    @classmethod
    def open(cls, folder: Path, *, writable: bool) -> Manifest:
        """Open the manifest of a folder; if it can be written and there is none, make one.

        Raises:
            StoreError: it belongs to another program or to another version.
            StoreCorruptError: it is damaged, or its twin has other rows.
        """
        path, twin = folder / MANIFEST, None
        with explained(folder):
            database = connect(path) if writable else _connect_read_only(path)
            try:
                database = _check_format(database, folder, writable=writable)
                found = compare_in(folder, writable=writable)
                if found.damaged:
                    raise StoreCorruptError(f"{path} is damaged: {found.meaning}. {_MEND.format(folder=folder)}")
                if writable:
                    twin = Twin(folder / TWIN, database)
            except BaseException:
                database.close()
                raise
        manifest = cls(folder, database, writable=writable, twin=twin)
        if twin is not None and found.renew:
            manifest.renew_twin()
        return manifest

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Manifest:
        """A manifest in memory, to be read; `path` is where it came from, for errors. Raises as `open` does."""
        database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        with explained(path):
            try:
                database.deserialize(data)
                database = _check_format(database, path, writable=False)
            except BaseException:
                database.close()
                raise
        return cls(path, database, writable=False)

    def close(self) -> None:
        with self._lock:
            if self._twin is not None:
                self._twin.close()
            self._db.close()

    def query(self, sql: str, *values: object) -> list[tuple]:
        """All rows of a statement."""
        with self._lock, explained(self.folder):
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The write lock of the store, held until everything inside is committed or, on any exception, undone."""
        self.require_writable()
        with self._lock, explained(self.folder):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                if self._twin is not None:
                    self._twin.take()
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def renew_twin(self) -> None:
        """Make the second copy of all rows anew."""
        assert self._twin is not None
        with self.transaction() as database:
            self._twin.renew()
            # Otherwise nothing has changed that could be taken over.
            database.execute("UPDATE commits SET number = number")

    def scrub(self) -> bool:
        """Overwrite what is left of deleted rows, in both databases and their logs; False if that is not possible."""
        with self._lock:
            try:
                # Deleted rows are overwritten already (secure_delete); this leaves no free pages at all.
                return all([scrub(self._db), self._twin is None or self._twin.scrub()])
            except sqlite3.Error:
                return False

    def require_writable(self) -> None:
        """Raise `StoreNotWritableError` if the store is open for reading only."""
        if not self.writable:
            raise StoreNotWritableError(
                f"The store in {self.folder} is open for reading only: its folder or manifest cannot be written. "
                "Change their permissions and open it again, or copy the store."
            )


def blank() -> sqlite3.Connection:
    """A new manifest in memory."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    _create(database)
    return database


def compare_in(folder: Path, *, writable: bool) -> Comparison:
    """Compare the manifest of a folder with its twin.

    Raises:
        sqlite3.Error: the manifest cannot be read.
    """
    if not (folder / TWIN).exists():
        return Comparison({}, {}, renew=True)
    with closing(blank()) as new:
        tables = {table: columns_of(new, table) for table in TABLES}
    manifest, twin = (_uri(folder / name, writable=writable) for name in (MANIFEST, TWIN))
    return compare(manifest, twin, tables)


def _uri(path: Path, *, writable: bool) -> str:
    """How SQLite is told to open a file. Where nothing can be written, it can read a log only if it need not be
    recovered; without a log (the last writer closed it) the file is complete in itself."""
    log = path.with_name(path.name + "-wal")
    mode = "rw" if writable else "ro" if os.path.exists(log) else "ro&immutable=1"
    return f"{path.absolute().as_uri()}?mode={mode}"


def _connect_read_only(manifest: Path) -> sqlite3.Connection:
    # SQLite reads a log with the help of a file that it cannot create here, and a log must not be ignored.
    log = manifest.with_name(manifest.name + "-wal")
    has_log = os.path.exists(log)
    uri = _uri(manifest, writable=False)
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


def _check_format(database: sqlite3.Connection, folder: Path, *, writable: bool) -> sqlite3.Connection:
    """Create the tables of a new manifest, or make sure that this version can read them.

    Returns:
        The same connection; for one of an earlier format that cannot be written, a copy in memory.
    """
    if writable and _is_new(database):
        database.execute("BEGIN EXCLUSIVE")
        if _is_new(database):
            _create(database)
        database.execute("COMMIT")
    if _number(database, "PRAGMA application_id") != APPLICATION_ID:
        raise StoreError(
            f"{folder / MANIFEST} belongs to another program. Give the folder of a store, or a new folder."
        )
    version = _number(database, "PRAGMA user_version")
    if not 1 <= version <= FORMAT_VERSION:
        raise StoreError(
            f"The store in {folder} has format {version}; this longmem reads formats 1 to {FORMAT_VERSION}. "
            "Update longmem."
        )
    if version < FORMAT_VERSION and not writable:
        copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        database.backup(copy)
        database.close()
        database = copy
    if version < FORMAT_VERSION:
        _migrate(database)
    return database


def _create(database: sqlite3.Connection) -> None:
    _run(database, SCHEMA)
    database.execute(ENCRYPTION)
    database.execute(COMMITS)
    database.execute(LOCATION)
    database.execute("INSERT INTO commits VALUES (1, 0)")
    database.execute("INSERT INTO secret VALUES (1, randomblob(32))")
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def _migrate(database: sqlite3.Connection) -> None:
    """Bring a manifest of an earlier format to this one, in one transaction."""
    # Tables that others refer to are replaced; this cannot be changed inside a transaction.
    database.execute("PRAGMA foreign_keys = OFF")
    database.execute("BEGIN EXCLUSIVE")
    # Another process may have been first.
    version = _number(database, "PRAGMA user_version")
    if version < 3:
        # Not all manifests of version 2 have the tables of banks that were thinned.
        added = ("piece", "record", "quarantine", "thinned", "score", "cap")
        there = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        old = ["bank", "segment", *(table for table in added if table in there)]
        for table in old:
            database.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
        database.execute("DROP INDEX IF EXISTS piece_segment")
        _run(database, SCHEMA)
        database.execute("INSERT INTO secret VALUES (1, randomblob(32))")
        if version == 1:
            _run(database, _PIECES_OF_1)
        _run(database, _MIGRATION)
        for table in {"thinned", "score", "cap"} & there:
            database.execute(f"INSERT INTO {table} SELECT * FROM old_{table}")
        for table in {"quarantine", "record", "piece", *old}:
            database.execute(f"DROP TABLE old_{table}")
    if version < 4:
        database.execute(ENCRYPTION)
    if version < 5:
        database.execute(COMMITS)
        database.execute(LOCATION)
        database.execute("INSERT INTO commits VALUES (1, 0)")
    # Version 6 has the same tables; `grid` in a bank's spec, which earlier programs do not know.
    if version < FORMAT_VERSION:
        database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
    database.execute("COMMIT")
    database.execute("PRAGMA foreign_keys = ON")


def _number(database: sqlite3.Connection, sql: str) -> int:
    return database.execute(sql).fetchone()[0]


def _is_new(database: sqlite3.Connection) -> bool:
    empty = _number(database, "SELECT COUNT(*) FROM sqlite_master") == 0
    return _number(database, "PRAGMA user_version") == 0 and empty


def _run(database: sqlite3.Connection, script: str) -> None:
    for statement in script.split(";"):
        database.execute(statement)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn SQLite's errors into errors that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        manifest = folder / MANIFEST
        if is_damage(error):
            raise StoreCorruptError(f"{manifest} is damaged: {error}. {_MEND.format(folder=folder)}") from error
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
