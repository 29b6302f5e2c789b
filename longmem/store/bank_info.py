"""What a store knows of its banks without opening them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from longmem.config import BankSpec, Precision
from longmem.errors import BankError

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore

_NAME_PART = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+"
_NAME = re.compile(rf"{_NAME_PART}(?:/{_NAME_PART})*")


@dataclass(frozen=True)
class BankInfo:
    """What the manifest knows of a bank.

    Attributes:
        tokens, sources: how many are remembered.
        rows: how many of the tokens have keys and values: all, unless the bank was thinned.
        bytes: size of its segment files.
        backbone: name of the backbone that wrote it.
        precision: how keys and values are kept: "full", "int8" or "int4".
        created, updated: UTC; `updated` is the last append or forget.
        namespace: the bank that it is a fork of, or its own name: banks of one namespace share segment files, and what
            one of them forgets is forgotten by all.
        version: the latest; 0 if nothing was ever written.
        key: "none" if it is not encrypted; whether the key of its namespace is "there", "missing", or was "destroyed".
    """

    name: str
    tokens: int
    rows: int
    sources: int
    bytes: int
    backbone: str
    precision: Precision
    created: datetime
    updated: datetime
    namespace: str
    version: int
    key: Literal["none", "there", "missing", "destroyed"]

    @property
    def bytes_per_token(self) -> float:
        """Of segment files, for each row; 0 if there are none."""
        return self.bytes / self.rows if self.rows else 0.0


def bank_infos(store: MemoryStore) -> list[BankInfo]:
    """See `MemoryStore.banks`."""
    found = store.manifest.query(
        """
        SELECT name, COALESCE(SUM(tokens), 0), COALESCE(SUM(COALESCE(rows, tokens)), 0), COUNT(DISTINCT source),
               (SELECT COALESCE(SUM(bytes), 0) FROM segment WHERE id IN
                (SELECT segment FROM held JOIN piece ON piece.id = held.piece WHERE held.bank = bank.id)),
               spec, bank.created, updated, namespace,
               (SELECT COALESCE(MAX(number), 0) FROM version WHERE version.bank = bank.id)
        FROM bank LEFT JOIN held ON held.bank = bank.id LEFT JOIN piece ON piece.id = held.piece
        LEFT JOIN thinned ON thinned.piece = piece.id
        GROUP BY bank.id ORDER BY name
        """
    )
    return [
        BankInfo(
            name,
            tokens,
            rows,
            sources,
            size,
            BankSpec.from_json(spec).backbone,
            BankSpec.from_json(spec).precision,
            datetime.fromisoformat(created),
            datetime.fromisoformat(updated),
            namespace,
            version,
            _key_of(store, namespace),
        )
        for name, tokens, rows, sources, size, spec, created, updated, namespace, version in found
    ]


def _key_of(store: MemoryStore, namespace: str) -> Literal["none", "there", "missing", "destroyed"]:
    rows = store.manifest.query("SELECT key, destroyed FROM encryption WHERE namespace = ?", namespace)
    if not rows:
        return "none"
    ((key_id, destroyed),) = rows
    if destroyed is not None:
        return "destroyed"
    return "there" if store.keys.has(key_id) else "missing"


def check_bank_name(name: str) -> None:
    """Raise `BankError` unless `name` can name a bank."""
    if _NAME.fullmatch(name) is None:
        raise BankError(
            f"{name!r} cannot name a bank. Use letters, digits, '.', '_' and '-', in parts joined by '/', "
            "such as 'notes' or 'user/1234'."
        )


def mismatch(name: str, *, stored: BankSpec, given: BankSpec) -> str:
    """How the spec of a bank differs from one that was given, for errors."""
    different = [
        f"{field.name}: given {getattr(given, field.name)!r}, expected {getattr(stored, field.name)!r}"
        for field in dataclasses.fields(BankSpec)
        if getattr(given, field.name) != getattr(stored, field.name)
    ]
    return (
        f"Bank {name!r} was written by another model ({'; '.join(different)}). "
        f"Open it with the model that wrote it (backbone {stored.backbone!r}), or use another bank name."
    )
