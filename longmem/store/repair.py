"""Mending a store: the backbone makes keys and values again from the token ids that are kept beside them.

N tokens, H memory heads, E head size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longmem.bank import BankEntry, packed
from longmem.config import BankSpec
from longmem.errors import BankMismatchError, StoreCorruptError, StoreError, StoreNotWritableError
from longmem.store.manifest import now
from longmem.store.segments import QUARANTINE, NewSegment, Piece, Record, named, read_segment, record_in, sync_folder
from longmem.store.thinning import PIECE_TABLES, as_thinned
from longmem.store.verify import Fault, by_segment, index_fault, record_of, segment_fault, segment_sizes

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore


class Encoder(Protocol):
    """What a repair needs of a model: `LongMem` is one."""

    @property
    def bank_spec(self) -> BankSpec: ...

    @property
    def tokenizer(self) -> Any: ...

    def encode(self, token_ids_N: Tensor, start: int = 0) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Quarantined:
    """A piece that was taken out of its bank.

    Attributes:
        char_start, chars: its place in the source.
        file: of the segment that held it, inside the store; None if there is none any more.
        text_kept: whether its text is in the manifest's table `quarantine`.
        reason: in words.
    """

    source: str
    char_start: int
    chars: int
    file: str | None
    text_kept: bool
    reason: str


@dataclass(frozen=True)
class Repair:
    """What was done to one bank.

    Attributes:
        pieces, tokens: how many were encoded again.
        records: pieces whose text had one copy and has two now, or whose second was damaged.
        index_removed: the bank had an index that is damaged, or does not fit any more.
        quarantined: what could not be mended.
    """

    bank: str
    pieces: int
    tokens: int
    records: int
    index_removed: bool
    quarantined: tuple[Quarantined, ...]


@dataclass
class _Plan:
    """What is to become of a bank's pieces."""

    damaged: dict[int, Fault]
    known: dict[int, Record] = field(default_factory=dict)
    fresh: dict[int, bytes] = field(default_factory=dict)  # records to be added, by piece
    out: dict[int, str] = field(default_factory=dict)  # reason for quarantine, by piece


def repair(
    store: MemoryStore, model: Encoder, name: str | None, on_tokens: Callable[[int], None] | None
) -> tuple[Repair, ...]:
    """See `MemoryStore.repair`."""
    store.manifest.require_writable()
    if name is not None and store.find(name) is None:
        raise store.not_found(name)
    done = []
    for bank_id, bank, spec in store.manifest.query("SELECT id, name, spec FROM bank ORDER BY name"):
        if name in (None, bank):
            made = None
            while made is None and store.revision(bank_id) is not None:
                made = _repair_bank(store, model, bank_id, bank, BankSpec.from_json(spec), on_tokens)
            if made is not None:
                done.append(made)
    return tuple(done)


def _repair_bank(
    store: MemoryStore,
    model: Encoder,
    bank_id: int,
    name: str,
    spec: BankSpec,
    on_tokens: Callable[[int], None] | None,
) -> Repair | None:
    """Mend one bank; None if it changed meanwhile."""
    revision, pieces, sizes = store.revision(bank_id), store.pieces(bank_id), segment_sizes(store, bank_id)
    segments = by_segment(pieces)
    faults = {key: segment_fault(store, name, spec, held, sizes.get(key, 0)) for key, held in segments.items()}
    plan = _Plan({key: fault for key, fault in faults.items() if fault is not None})
    if plan.damaged and model.bank_spec != spec:
        raise BankMismatchError(
            f"Bank {name!r} can be mended only by the model that wrote it, backbone {spec.backbone!r} (weights "
            f"{spec.weights[:12]}…); the model given is {model.bank_spec.backbone!r} (weights "
            f"{model.bank_spec.weights[:12]}…). Give its own with --model, or mend other banks by name."
        )
    for key, held in segments.items():
        _collect(store, name, model, plan, held, damaged=key in plan.damaged)
    _cut(pieces, plan)
    bad_index = index_fault(store, bank_id, name, sum(piece.rows for piece in pieces)) is not None
    if not (plan.damaged or plan.out or plan.fresh or bad_index):
        return Repair(name, 0, 0, 0, False, ()) if store.revision(bank_id) == revision else None
    written: list[NewSegment] = []
    kept: set[str] = set()
    try:
        moves: list[tuple[NewSegment, list[Piece]]] = []
        encoded: list[Piece] = []
        aside: dict[int, str] = {}  # file in quarantine, by piece
        for key, held in segments.items():
            stay, leave = [p for p in held if p.id not in plan.out], [p for p in held if p.id in plan.out]
            if key in plan.damaged:
                entries = [packed(entry, spec) for entry in _encoded(model, pieces, stay, plan, on_tokens)]
                entries = [as_thinned(store, *both) for both in zip(stay, entries, strict=True)]
                encoded += stay
            elif leave and stay:
                entries = _read(store, name, stay)
            else:
                entries = []
            if entries:
                written.append(store.write_segment(entries))
                moves.append((written[-1], stay))
            aside |= {piece.id: piece.file for piece in leave}
        with store.manifest.transaction() as database:
            if store.revision(bank_id) != revision:
                for new in written:
                    store.discard(new.file)
                return None
            # A second name before the commit, so that at no instant a file could be taken for a left-over.
            _set_aside(store, set(aside.values()), kept)
            quarantined = []
            for piece in pieces:
                file = piece.file if piece.file in kept else None
                if piece.id in plan.out:
                    record = plan.known.get(piece.id)
                    data = None if record is None else record.pack()
                    row = (piece.source, piece.char_start, piece.chars)
                    database.execute(
                        "INSERT INTO quarantine (bank, source, char_start, chars, file, record, reason, created) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (bank_id, *row, file, data, plan.out[piece.id], now()),
                    )
                    at = None if file is None else f"{QUARANTINE}/{file}"
                    quarantined.append(Quarantined(*row, at, data is not None, plan.out[piece.id]))
                elif file is not None:
                    # It stays in the bank, but whoever forgets it must find this file.
                    database.execute(
                        "INSERT INTO quarantine (bank, source, char_start, chars, file, created) "
                        "VALUES (?, ?, ?, ?, ?, ?)",
                        (bank_id, piece.source, piece.char_start, piece.chars, file, now()),
                    )
            gone = [(piece,) for piece in plan.out]
            for table in PIECE_TABLES:
                database.executemany(f"DELETE FROM {table} WHERE piece = ?", gone)
            database.executemany("DELETE FROM piece WHERE id = ?", gone)
            for new, stay in moves:
                store.move(database, bank_id, new, stay)
            fresh = [(piece, data) for piece, data in plan.fresh.items() if piece not in plan.out]
            database.executemany("INSERT OR REPLACE INTO record (piece, data) VALUES (?, ?)", fresh)
            empty = database.execute(
                "SELECT id, file FROM segment WHERE bank = ? AND id NOT IN (SELECT segment FROM piece WHERE bank = ?)",
                (bank_id, bank_id),
            ).fetchall()
            database.executemany("DELETE FROM segment WHERE id = ?", [row[:1] for row in empty])
            database.execute("UPDATE bank SET revision = revision + 1 WHERE id = ?", (bank_id,))
            index_removed = bool(bad_index or plan.out) and store.remove_index(bank_id)
    except BaseException as error:
        for new in written:
            store.discard(new.file)
        _put_back(store, kept)
        if isinstance(error, OSError):
            raise StoreNotWritableError(
                f"Bank {name!r} was not mended: {error}. Check the space and the permissions of {store.folder}, then "
                "try again. Nothing was changed."
            ) from error
        raise
    store.unlink([file for _, file in empty])
    return Repair(
        name,
        len(encoded),
        sum(piece.tokens for piece in encoded),
        len(fresh),
        index_removed,
        tuple(quarantined),
    )


def _collect(
    store: MemoryStore, name: str, model: Encoder, plan: _Plan, held: Sequence[Piece], *, damaged: bool
) -> None:
    """What each piece of a segment was made from, from the manifest or from the segment itself."""
    bare = []
    for piece in held:
        record = None
        with suppress(StoreCorruptError):
            record = record_of(store, piece)
        if record is None:
            bare.append(piece)
        else:
            plan.known[piece.id] = record
    if not bare:
        return
    if not damaged:
        found = dict(zip([p.id for p in bare], map(Record.of, _read(store, name, bare)), strict=True))
    else:
        found = {piece.id: record for piece in bare if (record := _salvaged(store, model, piece)) is not None}
    plan.known |= found
    plan.fresh |= {piece: record.pack() for piece, record in found.items()}


def _salvaged(store: MemoryStore, model: Encoder, piece: Piece) -> Record | None:
    """A piece's record from its damaged segment, if it can be told to be intact.

    The file's checksum cannot tell which tensor changed. But text and token ids vouch for each other: a text that
    gives exactly the ids and offsets that lie beside it is the text that they were made from.
    """
    try:
        with safe_open(store.segment_path(piece.file), framework="pt") as tensors:
            whole = record_in(tensors)
        text = whole.text[piece.first_char :][: piece.chars]
        rows = slice(piece.first_token, piece.first_token + piece.tokens)
        token_ids_N, offsets_N2 = whole.token_ids_N[rows], whole.offsets_N2[rows]
    except (OSError, RuntimeError, SafetensorError, UnicodeDecodeError, StoreCorruptError):
        return None
    again = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    same_ids = again["input_ids"] == token_ids_N.tolist()
    if len(text) != piece.chars or not same_ids or not len(token_ids_N):
        return None
    if (torch.tensor(again["offset_mapping"]).reshape(-1, 2) + piece.char_start).tolist() != offsets_N2.tolist():
        return None
    return Record(text, token_ids_N.clone(), offsets_N2.clone())


def _cut(pieces: Sequence[Piece], plan: _Plan) -> None:
    """End each source before the first piece that is lost: what follows was read behind text that is gone."""
    ends: dict[str, int] = {}
    broken: dict[str, int] = {}
    for piece in pieces:
        end = ends.get(piece.source, 0)
        if piece.source in broken:
            plan.out[piece.id] = (
                f"Characters from {broken[piece.source]} on are lost before it, so it cannot continue its source."
            )
        elif piece.char_start != end:
            broken[piece.source] = end
            plan.out[piece.id] = f"It begins at character {piece.char_start}; the source goes up to {end}."
        elif piece.id not in plan.known:
            broken[piece.source] = end
            plan.out[piece.id] = f"Its text is lost. {plan.damaged[piece.segment].meaning}"
        ends[piece.source] = piece.char_start + piece.chars


def _encoded(
    model: Encoder,
    pieces: Sequence[Piece],
    wanted: Sequence[Piece],
    plan: _Plan,
    on_tokens: Callable[[int], None] | None,
) -> list[BankEntry]:
    """Pieces as a fresh write of the same token ids would give them, each behind those before it in its source."""
    entries, past = [], {piece.source: [torch.empty(0, dtype=torch.int64)] for piece in wanted}
    chosen = {piece.id for piece in wanted}
    for piece in pieces:
        if piece.source not in past or piece.id in plan.out:
            continue
        record = plan.known[piece.id]
        if piece.id in chosen:
            before_N = torch.cat(past[piece.source])
            keys_HNE, values_HNE = model.encode(torch.cat((before_N, record.token_ids_N)), len(before_N))
            place = (piece.source, record.text, piece.char_start, record.token_ids_N, record.offsets_N2)
            entries.append(BankEntry(*place, keys_HNE, values_HNE))
            if on_tokens is not None:
                on_tokens(piece.tokens)
        past[piece.source].append(record.token_ids_N)
    return entries


def _read(store: MemoryStore, name: str, pieces: Sequence[Piece]) -> list[BankEntry]:
    path = store.segment_path(pieces[0].file)
    return read_segment(path, pieces, named(pieces, name), store.mend(name), verify=False)


def _set_aside(store: MemoryStore, files: set[str], kept: set[str]) -> None:
    """Give files a second name in quarantine; those that exist are added to `kept`."""
    folder = store.folder / QUARANTINE
    for file in files:
        folder.mkdir(exist_ok=True)
        # The second name may be there already, from a repair that died before its commit.
        with suppress(FileNotFoundError, FileExistsError):
            os.link(store.segment_path(file), folder / file)
        if (folder / file).exists():
            kept.add(file)
    if kept:
        sync_folder(folder)
        sync_folder(store.folder)


def _put_back(store: MemoryStore, kept: set[str]) -> None:
    """Take the second names away after a repair that failed: its files are in the bank still."""
    # An interrupt can arrive after the commit; then they are not.
    with suppress(StoreError, OSError):
        for file in kept:
            if store.is_committed(file):
                (store.folder / QUARANTINE / file).unlink(missing_ok=True)
