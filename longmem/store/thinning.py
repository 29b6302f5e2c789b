"""Banks on disk that lose rows, and the numbers that say which. N rows, M tokens of a piece."""

from __future__ import annotations

import sqlite3
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longmem.bank import BankEntry
from longmem.errors import BankError, StoreCorruptError, StoreNotWritableError
from longmem.store.manifest import now
from longmem.store.segments import Piece, by_segment, named, read_segment

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore
    from longmem.store.stored_bank import StoredBank

# Tables whose rows belong to a piece, and go with it.
PIECE_TABLES = ("record", "thinned", "score", "drew")


def thin(store: MemoryStore, bank: StoredBank, keep_N: Tensor) -> tuple[list[Piece], int, list[str]]:
    """See `StoredBank.thin`. Returns the bank's pieces, its revision, and the files that no row names any more."""
    written: list[str] = []
    try:
        with store.manifest.transaction() as database:
            before = [(piece.id, piece.rows) for piece in bank.pieces]
            # Where they lie may have changed: a consolidation moves pieces.
            held = store.pieces(bank.id)
            if before != [(piece.id, piece.rows) for piece in held] or len(keep_N) != len(bank):
                raise BankError(f"Bank {bank.name!r} has changed since it was decided what it keeps. Decide again.")
            keeps = dict(zip((piece.id for piece in held), keep_N.split([piece.rows for piece in held]), strict=True))
            old = {}
            for segment, mine in by_segment(held).items():
                if all(bool(keeps[piece.id].all()) for piece in mine):
                    continue
                # What forks hold beside them comes along; what they share is thinned for all.
                pieces = store.in_segment(segment)
                path, what = store.segment_path(pieces[0].file), named(pieces, bank.name)
                entries = read_segment(path, pieces, what, store.mend(bank.name), store.keys, verify=True)
                fewer = [
                    entry.thinned(keeps[piece.id]) if piece.id in keeps else entry
                    for piece, entry in zip(pieces, entries, strict=True)
                ]
                new = store.write_segment(fewer, bank.name)
                written.append(new.file)
                store.move(database, new, pieces)
                thinned = [both for both in zip(pieces, fewer, strict=True) if both[0].id in keeps]
                for piece, entry in thinned:
                    keep_rows(database, piece.id, entry)
                old[segment] = pieces[0].file
            database.executemany("DELETE FROM segment WHERE id = ?", [(segment,) for segment in old])
            database.execute("UPDATE bank SET revision = revision + 1, updated = ? WHERE id = ?", (now(), bank.id))
            # Before the commit: rows lie elsewhere than the index says.
            for (holder,) in database.execute(
                "SELECT DISTINCT bank FROM held WHERE piece IN (SELECT piece FROM held WHERE bank = ?) UNION SELECT ?",
                (bank.id, bank.id),
            ).fetchall():
                store.remove_index(holder)
            after, revision = store.pieces(bank.id), store.revision(bank.id)
    except BaseException as error:
        for file in written:
            store.discard(file)
        if isinstance(error, OSError):
            raise StoreNotWritableError(
                f"Bank {bank.name!r} was not thinned: {error}. Check the space and the permissions of {store.folder}, "
                "then try again. Nothing is lost."
            ) from error
        raise
    assert revision is not None
    return after, revision, list(old.values())


def as_thinned(store: MemoryStore, piece: Piece, entry: BankEntry) -> BankEntry:
    """A piece that was encoded again, with the rows that it had."""
    kept_M = kept_tokens(store, piece)
    return entry if kept_M is None else entry.thinned(kept_M)


def kept_tokens(store: MemoryStore, piece: Piece) -> Tensor | None:
    """Which tokens of a piece have rows (M,), bool; None if all do."""
    for (kept,) in store.manifest.query("SELECT kept FROM thinned WHERE piece = ?", piece.id):
        return _unpack_kept(kept, piece)
    return None


def keep_rows(database: sqlite3.Connection, piece: int, entry: BankEntry) -> None:
    """Note which rows a piece has, if not all, inside a transaction."""
    if entry.kept_K is not None:
        row = (piece, entry.rows, _pack_kept(entry))
        database.execute("INSERT OR REPLACE INTO thinned (piece, rows, kept) VALUES (?, ?, ?)", row)


def scores_of(store: MemoryStore, bank_id: int, name: str) -> dict[int, Tensor]:
    """See `StoredBank.scores`."""
    rows = store.manifest.query(
        "SELECT score.piece, data FROM score JOIN held ON held.piece = score.piece WHERE bank = ? AND name = ?",
        bank_id,
        name,
    )
    read = {piece: _unpack_score(store, piece, name, data) for piece, data in rows}
    # Damaged ones count as none: nothing should fail for a statistic.
    return {piece: score_M for piece, score_M in read.items() if score_M is not None}


def damaged_scores(store: MemoryStore, bank_id: int) -> list[tuple[int, str]]:
    """Pieces of a bank, and names of numbers kept for them, whose bytes have changed."""
    rows = store.manifest.query(
        "SELECT score.piece, name, data FROM score JOIN held ON held.piece = score.piece WHERE bank = ?", bank_id
    )
    return [(piece, name) for piece, name, data in rows if _unpack_score(store, piece, name, data) is None]


def _unpack_score(store: MemoryStore, piece: int, name: str, data: bytes) -> Tensor | None:
    """Numbers as they were kept; None if their bytes have changed."""
    try:
        numbers = zlib.decompress(store.keys.opened(data, score_name(piece, name)))
        return torch.from_numpy(np.frombuffer(numbers, "<f4").copy())
    except (zlib.error, ValueError, StoreCorruptError):
        return None


def score_name(piece: int, name: str) -> str:
    """What numbers of a piece are sealed as."""
    return f"score {piece} {name}"


def keep_scores(store: MemoryStore, bank_id: int, name: str, scores: dict[int, Tensor], *, add: bool) -> None:
    """See `StoredBank.keep_scores`."""
    with store.manifest.transaction() as database:
        # Pieces may have gone since.
        there = {piece for (piece,) in database.execute("SELECT piece FROM held WHERE bank = ?", (bank_id,))}
        names = database.execute("SELECT name FROM bank WHERE id = ?", (bank_id,)).fetchall()
        before = scores_of(store, bank_id, name) if add else {}
        for piece, score_M in scores.items():
            if piece in there:
                total_M = score_M.float() + before.get(piece, torch.zeros(()))
                data = zlib.compress(total_M.numpy().astype("<f4").tobytes())
                row = (piece, name, store.seal(names[0][0]).data(data, score_name(piece, name)))
                database.execute("INSERT OR REPLACE INTO score (piece, name, data) VALUES (?, ?, ?)", row)


def _pack_kept(entry: BankEntry) -> bytes:
    """A bit a token: whether it has a row."""
    kept_M = np.zeros(len(entry), bool)
    kept_M[slice(None) if entry.kept_K is None else entry.kept_K.numpy()] = True
    return zlib.compress(np.packbits(kept_M).tobytes())


def _unpack_kept(data: bytes, piece: Piece) -> Tensor:
    try:
        bits = np.unpackbits(np.frombuffer(zlib.decompress(data), np.uint8), count=piece.tokens)
    except (zlib.error, ValueError) as error:
        raise StoreCorruptError(f"The manifest's list of the rows of a piece is damaged: {error}.") from error
    return torch.from_numpy(bits.astype(bool))
