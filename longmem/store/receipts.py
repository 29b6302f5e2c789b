"""Receipts: what was forgotten, when, and from where, signed and chained.

A receipt is JSON that a store signs with HMAC-SHA256 and a key that it made for itself when it was created; each holds
the signature of the one before it. So a receipt proves, to whoever has the store, that the store gave it and that none
was altered or taken out since; who can read the manifest can read the key. Names of sources are hashed with a salt,
since they are to be forgotten as well: who knows a name can show that a receipt is about it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longmem.store.manifest import Manifest

SIGNED_WITH = "HMAC-SHA256"


@dataclass(frozen=True)
class Receipt:
    """What a `forget` has removed, or the destruction of a key.

    Attributes:
        said: JSON, as it was signed; `facts` reads it, docs/format.md describes its fields.
        signature: HMAC-SHA256 of `said`, hexadecimal.
    """

    said: str
    signature: str

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads(self.said)

    @property
    def number(self) -> int:
        return self.facts["number"]

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.facts["time"])

    @property
    def destroyed_key(self) -> str | None:
        """Id of the key that was destroyed, and with it all that its namespace held; None if text was forgotten."""
        return self.facts.get("destroyed_key")

    def is_about(self, source: str) -> bool:
        """Whether something of a source of this name was forgotten."""
        facts = self.facts
        return hash_name(facts["salt"], source) in [removed["source"] for removed in facts["removed"]]

    def tokens_of(self, bank: str) -> int:
        """How many tokens a bank has lost."""
        return next((one["tokens"] for one in self.facts["banks"] if one["bank"] == bank), 0)


def new_salt() -> str:
    return secrets.token_hex(16)


def hash_name(salt: str, source: str) -> str:
    return hashlib.sha256(f"{salt}:{source}".encode()).hexdigest()


def add_receipt(database: sqlite3.Connection, namespace: str, facts: dict[str, Any]) -> Receipt:
    """Sign what was removed and keep it, inside the transaction that removes it."""
    last = database.execute("SELECT id, signature FROM receipt ORDER BY id DESC LIMIT 1").fetchone()
    number, previous = (1, None) if last is None else (last[0] + 1, last[1])
    said = json.dumps({"number": number, "signed_with": SIGNED_WITH, **facts, "previous": previous}, sort_keys=True)
    ((key,),) = database.execute("SELECT key FROM secret").fetchall()
    receipt = Receipt(said, _sign(key, said))
    database.execute("INSERT INTO receipt VALUES (?, ?, ?, ?)", (number, namespace, said, receipt.signature))
    return receipt


def receipts(manifest: Manifest, namespace: str | None = None) -> list[Receipt]:
    """Receipts of a namespace, or of all, oldest first."""
    rows = manifest.query("SELECT namespace, said, signature FROM receipt ORDER BY id")
    return [Receipt(said, signature) for of, said, signature in rows if namespace in (None, of)]


def is_genuine(manifest: Manifest, receipt: Receipt) -> bool:
    """Whether this store has given a receipt, and every one before it is as it was given."""
    ((key,),) = manifest.query("SELECT key FROM secret")
    previous = None
    for number, one in enumerate(receipts(manifest), start=1):
        facts = one.facts
        signed = hmac.compare_digest(_sign(key, one.said), one.signature)
        if not signed or facts["number"] != number or facts["previous"] != previous:
            return False
        if one == receipt:
            return True
        previous = one.signature
    return False


def _sign(key: bytes, said: str) -> str:
    return hmac.new(key, said.encode(), hashlib.sha256).hexdigest()
