"""Versions of a bank: every append, forget, fork and merge begins one, and each can be opened again.

A version is what came up to it and was not forgotten since: what is forgotten is forgotten in all of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from longmem.errors import BankError

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore

_TAG = re.compile(r"(?!\d+$)[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Version:
    """A version of a bank.

    Attributes:
        number: 1, 2, ….
        time: UTC.
        operation: "append", "forget", "fork", "merge", "copy" or "import".
        note: what it came from, or which receipt it has.
        tokens: what it holds.
        added: tokens that came with it and are still there.
        forgotten: tokens that came with it and were forgotten since.
        sources: what the added tokens belong to.
        tags: its names.
    """

    number: int
    time: datetime
    operation: str
    note: str | None
    tokens: int
    added: int
    forgotten: int
    sources: tuple[str, ...]
    tags: tuple[str, ...]


def log(store: MemoryStore, name: str) -> list[Version]:
    """See `MemoryStore.log`."""
    bank_id, _ = store.require(name)
    rows = store.manifest.query(
        "SELECT number, created, operation, note, forgotten FROM version WHERE bank = ? ORDER BY number", bank_id
    )
    came: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for piece in store.pieces(bank_id):
        came[piece.version][piece.source] = came[piece.version].get(piece.source, 0) + piece.tokens
    named: defaultdict[int, list[str]] = defaultdict(list)
    for tag, number in tags(store, name).items():
        named[number].append(tag)
    versions, tokens = [], 0
    for number, created, operation, note, forgotten in rows:
        added = sum(came[number].values())
        tokens += added
        time, sources = datetime.fromisoformat(created), tuple(came[number])
        versions.append(Version(number, time, operation, note, tokens, added, forgotten, sources, tuple(named[number])))
    return versions


def tags(store: MemoryStore, name: str) -> dict[str, int]:
    """See `MemoryStore.tags`."""
    bank_id, _ = store.require(name)
    return dict(store.manifest.query("SELECT name, version FROM tag WHERE bank = ? ORDER BY name", bank_id))


def tag(store: MemoryStore, name: str, label: str, version: int | str | None) -> int:
    """See `MemoryStore.tag`."""
    if _TAG.fullmatch(label) is None:
        raise BankError(
            f"{label!r} cannot name a version. Use letters, digits, '.', '_' and '-', and not digits alone."
        )
    with store.manifest.transaction() as database:
        bank_id, _ = store.require(name)
        number = resolve(store, name, version)
        taken = "INSERT OR IGNORE INTO tag (bank, name, version) VALUES (?, ?, ?)"
        if not database.execute(taken, (bank_id, label, number)).rowcount:
            raise BankError(
                f"Bank {name!r} has a tag {label!r} already, of version {tags(store, name)[label]}. Choose another, or "
                "remove that one first (`untag`, `longmem tag --remove`)."
            )
    return number


def untag(store: MemoryStore, name: str, label: str) -> None:
    """See `MemoryStore.untag`."""
    with store.manifest.transaction() as database:
        bank_id, _ = store.require(name)
        if not database.execute("DELETE FROM tag WHERE bank = ? AND name = ?", (bank_id, label)).rowcount:
            raise BankError(f"Bank {name!r} has no tag {label!r}; it has: {_listed(store, name)}.")


def newest(store: MemoryStore, bank_id: int) -> int:
    """Number of the newest version; 0 if nothing was ever written."""
    return store.manifest.query("SELECT COALESCE(MAX(number), 0) FROM version WHERE bank = ?", bank_id)[0][0]


def resolve(store: MemoryStore, name: str, version: int | str | None) -> int:
    """Number of a version, given by number or tag; None is the newest.

    Raises:
        BankError: there is no such version.
    """
    bank_id, _ = store.require(name)
    last = newest(store, bank_id)
    if version is None:
        return last
    number = tags(store, name).get(version, -1) if isinstance(version, str) else version
    if not 0 <= number <= last:
        what = f"tag {version!r}" if isinstance(version, str) else f"version {version}"
        raise BankError(
            f"Bank {name!r} has no {what}. It has versions 0 (empty) to {last}, and tags: {_listed(store, name)}. "
            f"`longmem log --bank {name}` lists them."
        )
    return number


def _listed(store: MemoryStore, name: str) -> str:
    return ", ".join(tags(store, name)) or "none"
