"""A namespace becomes encrypted, or loses its key: then all that it ever held is forgotten, wherever copies lie."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING

from longmem.errors import BankError, StoreCorruptError, StoreError, StoreKeyError, StoreNotWritableError
from longmem.store.encryption import Seal
from longmem.store.files import write_bytes
from longmem.store.manifest import now
from longmem.store.receipts import Receipt, add_receipt, new_salt, receipts
from longmem.store.rows import record_name
from longmem.store.segments import segment_name
from longmem.store.thinning import score_name

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore

# Pieces that banks of a namespace hold; a piece is held in one namespace only.
_PIECES = "SELECT DISTINCT piece FROM held JOIN bank ON bank.id = held.bank WHERE namespace = ?"


def encrypt(store: MemoryStore, namespace: str) -> None:
    """See `MemoryStore.encrypt`."""
    store.manifest.require_writable()
    key_id, written, old = store.keys.new(), list[str](), list[str]()
    try:
        with store.manifest.transaction() as database:
            _require_encryptable(store, database, namespace)
            seal = Seal(store.keys, key_id)
            old = _seal_segments(store, database, namespace, seal, written)
            _seal_rows(database, namespace, seal)
            database.execute("INSERT OR REPLACE INTO encryption VALUES (?, ?, ?, NULL)", (namespace, key_id, now()))
            banks = database.execute("SELECT id FROM bank WHERE namespace = ?", (namespace,)).fetchall()
            for (bank_id,) in banks:
                database.execute("UPDATE bank SET revision = revision + 1 WHERE id = ?", (bank_id,))
                # Before the commit: its codes are made of keys, and nobody would write it anew.
                store.remove_index(bank_id)
    except BaseException as error:
        for file in written:
            store.discard(file)
        # An interrupt can arrive after the commit: then the key is in use.
        with suppress(StoreError):
            if not store.manifest.query("SELECT 1 FROM encryption WHERE key = ?", key_id):
                store.keys.discard(key_id)
        if isinstance(error, OSError):
            raise StoreNotWritableError(
                f"Namespace {namespace!r} was not encrypted: {error}. "
                f"Check the space and the permissions of {store.folder}, then try again. Nothing was changed."
            ) from error
        raise
    store.erase(old)


def destroy_key(store: MemoryStore, namespace: str) -> Receipt:
    """See `MemoryStore.destroy_key`."""
    store.manifest.require_writable()
    with store.manifest.transaction() as database:
        rows = database.execute("SELECT key, destroyed FROM encryption WHERE namespace = ?", (namespace,)).fetchall()
        if not rows:
            raise _not_encrypted(store, namespace)
        ((key_id, begun),) = rows
        # From here on nobody writes with this key, whoever still has it. Whatever happens now, it can be done again.
        _note(database, namespace, begun or now())
    try:
        found = store.keys.destroy(key_id)
    except BaseException:
        if begun is None and store.keys.has(key_id):
            with store.manifest.transaction() as database:
                _note(database, namespace, None)
        raise
    if not found and begun is None:
        with store.manifest.transaction() as database:
            _note(database, namespace, None)
        raise StoreKeyError(
            f"The key of {namespace!r}, {key_id}, is not in {store.keys.provider}, so it was not destroyed. Say where "
            "it is (--keys, `MemoryStore.open(…, keys=…)`). If it is gone for good, delete the banks."
        )
    with store.manifest.transaction() as database:
        for given in receipts(store.manifest, namespace):
            if given.destroyed_key == key_id:
                return given
        return _sign(database, namespace, key_id)


def _note(database: sqlite3.Connection, namespace: str, destroyed: str | None) -> None:
    database.execute("UPDATE encryption SET destroyed = ? WHERE namespace = ?", (destroyed, namespace))


def _not_encrypted(store: MemoryStore, namespace: str) -> StoreError:
    known = store.manifest.query("SELECT namespace FROM encryption WHERE destroyed IS NULL ORDER BY namespace")
    listed = ", ".join(name for (name,) in known) or "none"
    return StoreError(f"Namespace {namespace!r} is not encrypted, so it has no key. Those that have one: {listed}.")


def _sign(database: sqlite3.Connection, namespace: str, key_id: str) -> Receipt:
    """A receipt for a key, and so for all that the namespace held."""
    banks = database.execute(
        "SELECT name, COALESCE(SUM(tokens), 0), MIN(held.version), bank.id FROM bank "
        "LEFT JOIN held ON held.bank = bank.id LEFT JOIN piece ON piece.id = held.piece "
        "WHERE namespace = ? GROUP BY bank.id ORDER BY name",
        (namespace,),
    ).fetchall()
    tags = database.execute("SELECT bank, name FROM tag ORDER BY name").fetchall()
    facts = {
        "time": now(),
        "namespace": namespace,
        "bank": namespace,
        "salt": new_salt(),
        "destroyed_key": key_id,
        "removed": [],
        "banks": [
            {
                "bank": name,
                "tokens": tokens,
                "encoded_again": 0,
                "from_version": first,
                "tags": [tag for bank, tag in tags if bank == bank_id],
            }
            for name, tokens, first, bank_id in banks
        ],
        "files": [],
    }
    return add_receipt(database, namespace, facts)


def _require_encryptable(store: MemoryStore, database: sqlite3.Connection, namespace: str) -> None:
    for (of,) in database.execute("SELECT namespace FROM bank WHERE name = ?", (namespace,)).fetchall():
        if of != namespace:
            raise BankError(
                f"Bank {namespace!r} is a fork in namespace {of!r}, which is encrypted as a whole: `longmem encrypt "
                f"{of}`."
            )
    banks = database.execute("SELECT name FROM bank WHERE namespace = ?", (namespace,)).fetchall()
    for (destroyed,) in database.execute("SELECT destroyed FROM encryption WHERE namespace = ?", (namespace,)):
        if destroyed is None:
            raise StoreError(f"Namespace {namespace!r} is encrypted already.")
        if banks:
            raise StoreError(
                f"The key of namespace {namespace!r} was destroyed on {destroyed}. Delete its banks "
                f"({', '.join(name for (name,) in banks)}) before it gets another."
            )
    aside = "SELECT 1 FROM quarantine JOIN bank ON bank.id = quarantine.bank WHERE namespace = ? LIMIT 1"
    if database.execute(aside, (namespace,)).fetchone():
        raise StoreError(
            f"Namespace {namespace!r} holds something in quarantine, which would stay readable; nothing was changed. "
            "`longmem verify` names it. Forget its sources first, or fork the bank to another name and encrypt that."
        )


def _seal_segments(
    store: MemoryStore, database: sqlite3.Connection, namespace: str, seal: Seal, written: list[str]
) -> list[str]:
    """Write the segments of a namespace anew; returns the old files. `written` is extended by the new ones."""
    rows = database.execute(
        "SELECT DISTINCT segment.id, file, sha256 FROM segment JOIN piece ON piece.segment = segment.id "
        "JOIN held ON held.piece = piece.id JOIN bank ON bank.id = held.bank WHERE namespace = ?",
        (namespace,),
    ).fetchall()
    old = []
    for segment, file, sha256 in rows:
        path = store.segment_path(file)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreCorruptError(f"{path} is missing. {store.mend(namespace)}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreCorruptError(f"{path} is damaged: its sha256 is not {sha256}. {store.mend(namespace)}")
        new = secrets.token_hex(16) + ".safetensors"
        written.append(new)
        said = write_bytes(store.files.draft(new), seal.data(data, segment_name(new)))
        store.files.finish(new)
        store.files.place(new, said[1])
        # A row of its own: whoever reads the old one meanwhile sees that its pieces have moved.
        row = database.execute("INSERT INTO segment (file, sha256, bytes) VALUES (?, ?, ?)", (new, *said)).lastrowid
        database.execute("UPDATE piece SET segment = ? WHERE segment = ?", (row, segment))
        database.execute("DELETE FROM segment WHERE id = ?", (segment,))
        old.append(file)
    return old


def _seal_rows(database: sqlite3.Connection, namespace: str, seal: Seal) -> None:
    """All of a namespace's rows that say something of a text."""

    def rows(sql: str) -> list[tuple]:
        return database.execute(sql, (namespace,)).fetchall()

    for piece, source in rows(f"SELECT id, source FROM piece WHERE id IN ({_PIECES})"):
        database.execute("UPDATE piece SET source = ? WHERE id = ?", (seal.name(source), piece))
    for piece, data in rows(f"SELECT piece, data FROM record WHERE piece IN ({_PIECES})"):
        database.execute("UPDATE record SET data = ? WHERE piece = ?", (seal.data(data, record_name(piece)), piece))
    for piece, name, data in rows(f"SELECT piece, name, data FROM score WHERE piece IN ({_PIECES})"):
        sealed = seal.data(data, score_name(piece, name))
        database.execute("UPDATE score SET data = ? WHERE piece = ? AND name = ?", (sealed, piece, name))
    for bank, settings in rows("SELECT bank, settings FROM cap JOIN bank ON bank.id = cap.bank WHERE namespace = ?"):
        sealed = seal.text(settings, f"cap {bank}")
        database.execute("UPDATE cap SET settings = ? WHERE bank = ?", (sealed, bank))
    # Whoever drew on it, in other namespaces as well.
    for row, source in rows(
        "SELECT drew.rowid, source FROM drew JOIN bank ON bank.name = drew.bank WHERE namespace = ?"
    ):
        database.execute("UPDATE drew SET source = ? WHERE rowid = ?", (seal.name(source), row))
