"""Mending a store: the backbone makes keys and values again from the token ids that are kept beside them.

N tokens, H memory heads, E head size.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from longmem.bank import BankEntry, packed
from longmem.config import BankSpec, EncodeConfig
from longmem.errors import BankMismatchError, StoreCorruptError, StoreError, StoreNotWritableError
from longmem.store.encryption import Seal
from longmem.store.files import sync_folder
from longmem.store.manifest import compare_in, explained, now
from longmem.store.rows import put_record
from longmem.store.segments import (
    QUARANTINE,
    NewSegment,
    Piece,
    Record,
    by_segment,
    named,
    read_segment,
    record_in,
    segment_name,
)
from longmem.store.tensors import open_tensors
from longmem.store.thinning import PIECE_TABLES, as_thinned, damaged_scores
from longmem.store.verify import Fault, index_fault, record_of, segment_fault

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore


class Encoder(Protocol):
    """What a repair needs of a model: `LongMem` is one."""

    @property
    def bank_spec(self) -> BankSpec: ...

    @property
    def tokenizer(self) -> Any: ...

    def encode(
        self, token_ids_N: Tensor, start: int = 0, *, windows: EncodeConfig | None = None
    ) -> tuple[Tensor, Tensor]: ...


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
    """What is to become of the pieces of a namespace.

    Attributes:
        held: the pieces of each bank, by its id.
        pieces: all of them, each once.
        before: the piece of the same source that each follows, by id.
    """

    held: dict[int, list[Piece]]
    damaged: dict[int, Fault]
    pieces: dict[int, Piece] = field(default_factory=dict)
    before: dict[int, int | None] = field(default_factory=dict)
    known: dict[int, Record] = field(default_factory=dict)
    fresh: dict[int, bytes] = field(default_factory=dict)  # records to be added, by piece
    out: dict[int, str] = field(default_factory=dict)  # reason for quarantine, by piece

    def __post_init__(self) -> None:
        for pieces in self.held.values():
            last: dict[str, int] = {}
            for piece in pieces:
                self.pieces.setdefault(piece.id, piece)
                self.before.setdefault(piece.id, last.get(piece.source))
                last[piece.source] = piece.id


def repair(
    store: MemoryStore,
    model: Encoder,
    name: str | None,
    on_tokens: Callable[[int], None] | None,
    on_bytes: Callable[[int], None] | None,
) -> tuple[Repair, ...]:
    """See `MemoryStore.repair`."""
    store.manifest.require_writable()
    with explained(store.folder):
        compared = compare_in(store.folder, writable=True)
    if compared.damaged:
        raise StoreCorruptError(
            f"The manifest of {store.folder} is damaged: {compared.meaning}. Close the store and mend that first: "
            f"`MemoryStore.rebuild`, `longmem repair --store {store.folder}`."
        )
    if compared.renew:
        store.manifest.renew_twin()
    with store.manifest.transaction():
        # Under the lock: nobody is about to make them part of the store.
        left = store.orphans_elsewhere()
    store.unlink(left)
    if name is not None and store.find(name) is None:
        raise store.not_found(name)
    for bank_id, bank in store.manifest.query("SELECT id, name FROM bank"):
        if name in (None, bank) and (bad := damaged_scores(store, bank_id)):
            with store.manifest.transaction() as database:
                database.executemany("DELETE FROM score WHERE piece = ? AND name = ?", bad)
    done = []
    for (namespace,) in store.manifest.query("SELECT DISTINCT namespace FROM bank ORDER BY namespace"):
        # A namespace is mended as a whole: its banks share segments.
        wanted = "SELECT 1 FROM bank WHERE namespace = ? AND name = ?"
        if name is None or store.manifest.query(wanted, namespace, name):
            made = None
            while made is None:
                made = _repair_namespace(store, model, namespace, on_tokens, on_bytes)
            done += made
    return tuple(sorted(done, key=lambda made: made.bank))


def _banks(store: MemoryStore, namespace: str) -> list[tuple[int, str, str, int]]:
    """Id, name, spec and revision of the banks of a namespace."""
    return store.manifest.query(
        "SELECT id, name, spec, revision FROM bank WHERE namespace = ? ORDER BY name", namespace
    )


def _repair_namespace(
    store: MemoryStore,
    model: Encoder,
    namespace: str,
    on_tokens: Callable[[int], None] | None,
    on_bytes: Callable[[int], None] | None,
) -> list[Repair] | None:
    """Mend the banks of a namespace; None if one changed meanwhile."""
    banks = _banks(store, namespace)
    if not banks:
        return []
    spec, names = BankSpec.from_json(banks[0][2]), {bank_id: name for bank_id, name, _, _ in banks}
    held, sizes = {bank_id: store.pieces(bank_id) for bank_id in names}, dict[int, int]()
    for bank_id in names:
        sizes |= store.segment_sizes(bank_id)
    plan = _Plan(held, {})
    name = banks[0][1]
    segments = by_segment(sorted(plan.pieces.values(), key=lambda p: (p.first_token, p.first_char, p.tokens, p.chars)))
    for segment, pieces in segments.items():
        fault = segment_fault(store, name, spec, pieces, sizes.get(segment, 0))
        if fault is not None:
            plan.damaged[segment] = fault
        if on_bytes is not None:
            on_bytes(sizes.get(segment, 0))
    if plan.damaged and model.bank_spec != spec:
        raise BankMismatchError(
            f"Bank {name!r} can be mended only by the model that wrote it, backbone {spec.backbone!r} (weights "
            f"{spec.weights[:12]}…); the model given is {model.bank_spec.backbone!r} (weights "
            f"{model.bank_spec.weights[:12]}…). Give its own with --model, or mend other banks by name."
        )
    for segment, pieces in segments.items():
        _collect(store, name, model, plan, pieces, damaged=segment in plan.damaged)
    for pieces in held.values():
        _cut(pieces, plan)
    bad_indexes = {
        bank_id
        for bank_id, bank in names.items()
        if index_fault(store, bank_id, bank, sum(piece.rows for piece in held[bank_id])) is not None
    }
    if not (plan.damaged or plan.out or plan.fresh or bad_indexes):
        nothing = [Repair(bank, 0, 0, 0, False, ()) for bank in names.values()]
        return nothing if _banks(store, namespace) == banks else None
    written: list[NewSegment] = []
    kept: set[str] = set()
    try:
        moves: list[tuple[NewSegment, list[Piece]]] = []
        encoded: set[int] = set()
        aside: set[str] = set()
        for segment, pieces in segments.items():
            stay, leave = [p for p in pieces if p.id not in plan.out], [p for p in pieces if p.id in plan.out]
            if segment in plan.damaged:
                entries = [packed(entry, spec) for entry in _encoded(model, spec.encode, stay, plan, on_tokens)]
                entries = [as_thinned(store, *both) for both in zip(stay, entries, strict=True)]
                encoded |= {piece.id for piece in stay}
            elif leave and stay:
                entries = _read(store, name, stay)
            else:
                entries = []
            if entries:
                written.append(store.write_segment(entries, name))
                moves.append((written[-1], stay))
            aside |= {piece.file for piece in leave}
        with store.manifest.transaction() as database:
            if _banks(store, namespace) != banks:
                for new in written:
                    store.discard(new.file)
                return None
            # A second name before the commit, so that at no instant a file could be taken for a left-over.
            _set_aside(store, aside, kept)
            quarantined = {bank_id: _quarantine(database, store.seal(name), plan, bank_id, kept) for bank_id in names}
            gone = [(piece,) for piece in plan.out]
            for table in (*PIECE_TABLES, "held"):
                database.executemany(f"DELETE FROM {table} WHERE piece = ?", gone)
            database.executemany("DELETE FROM piece WHERE id = ?", gone)
            for new, stay in moves:
                store.move(database, new, stay)
            fresh = {piece: data for piece, data in plan.fresh.items() if piece not in plan.out}
            for piece, data in fresh.items():
                put_record(database, store.seal(name), piece, data)
            empty = database.execute(
                "SELECT id, file FROM segment WHERE id NOT IN (SELECT segment FROM piece)"
            ).fetchall()
            database.executemany("DELETE FROM segment WHERE id = ?", [row[:1] for row in empty])
            database.execute("UPDATE bank SET revision = revision + 1 WHERE namespace = ?", (namespace,))
            removed = {
                bank_id
                for bank_id in names
                if (bank_id in bad_indexes or quarantined[bank_id]) and store.remove_index(bank_id)
            }
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
    repairs = []
    for bank_id, bank in names.items():
        again = [piece.tokens for piece in held[bank_id] if piece.id in encoded]
        records = sum(piece.id in fresh for piece in held[bank_id])
        repairs.append(Repair(bank, len(again), sum(again), records, bank_id in removed, tuple(quarantined[bank_id])))
    return repairs


def _quarantine(
    database: sqlite3.Connection, seal: Seal, plan: _Plan, bank_id: int, kept: set[str]
) -> list[Quarantined]:
    """Rows for what a bank loses, and for what stays in it while its file is kept."""
    found = []
    for piece in plan.held[bank_id]:
        file, row = piece.file if piece.file in kept else None, (piece.source, piece.char_start, piece.chars)
        if piece.id in plan.out:
            record = plan.known.get(piece.id)
            data = None if record is None else seal.data(record.pack(), f"quarantine {bank_id}")
            reason = plan.out[piece.id]
            at = None if file is None else f"{QUARANTINE}/{file}"
            found.append(Quarantined(*row, at, data is not None, reason))
        elif file is not None:
            # It stays in the bank, but whoever forgets it must find this file.
            data = reason = None
        else:
            continue
        database.execute(
            "INSERT INTO quarantine (bank, source, char_start, chars, file, record, reason, created) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (bank_id, seal.name(row[0]), *row[1:], file, data, reason, now()),
        )
    return found


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
        with open_tensors(store.segment_path(piece.file), store.keys, segment_name(piece.file)) as tensors:
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
    windows: EncodeConfig,
    wanted: Sequence[Piece],
    plan: _Plan,
    on_tokens: Callable[[int], None] | None,
) -> list[BankEntry]:
    """Pieces as a fresh write of the same token ids would give them, each behind those before it in its source."""
    entries = []
    for piece in wanted:
        record, past = plan.known[piece.id], []
        earlier = plan.before[piece.id]
        while earlier is not None:
            past.append(plan.known[earlier].token_ids_N)
            earlier = plan.before[earlier]
        before_N = torch.cat([record.token_ids_N[:0], *reversed(past)])
        ids_N = torch.cat((before_N, record.token_ids_N))
        keys_HNE, values_HNE = model.encode(ids_N, len(before_N), windows=windows)
        place = (piece.source, record.text, piece.char_start, record.token_ids_N, record.offsets_N2)
        entries.append(BankEntry(*place, keys_HNE, values_HNE))
        if on_tokens is not None:
            on_tokens(piece.tokens)
    return entries


def _read(store: MemoryStore, name: str, pieces: Sequence[Piece]) -> list[BankEntry]:
    path = store.segment_path(pieces[0].file)
    return read_segment(path, pieces, named(pieces, name), store.mend(name), store.keys, verify=False)


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
