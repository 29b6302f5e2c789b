"""Forgetting: text, and everything that was ever made from it, goes from all versions, tags and forks of a namespace.

A source is a chain of pieces, each read behind those before it. When characters are taken out of a piece, what is left
of it, and all that follow it in its source, are encoded again as if they had been written so; what stands before it
never saw them. Sources never see each other.

N tokens.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longmem.bank import BankEntry, SourceSpan, packed
from longmem.config import BankSpec
from longmem.errors import BankMismatchError, ConfigError, SourceError, StoreKeyError, StoreNotWritableError
from longmem.store.manifest import now
from longmem.store.receipts import Receipt, add_receipt, hash_name, new_salt
from longmem.store.release import release
from longmem.store.repair import Encoder
from longmem.store.rows import add_piece, add_version, record_name
from longmem.store.segments import NewSegment, Piece, Record, named, read_segment
from longmem.store.thinning import keep_rows, kept_tokens
from longmem.store.verify import record_of

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore


@dataclass(frozen=True)
class Stretch:
    """Characters [start, end) of a source; all of it by default, and to its end if `end` is None."""

    source: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Generated:
    """A stretch of generated text that drew on remembered text.

    Attributes:
        bank, source, start, end, text: where it is, and what it says. It is forgotten by `forget(bank, [stretch])`.
        weight: the largest share of the memory heads' attention that one of its tokens paid, 0 … 1.
    """

    bank: str
    source: str
    start: int
    end: int
    text: str
    weight: float

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.source, self.start, self.end)


@dataclass(frozen=True)
class Preview:
    """What a `forget` would do.

    Attributes:
        bank: that is asked.
        text: what would be forgotten, in order.
        whole: sources of which nothing would be left.
        tokens: how many of the bank's tokens lie in that text, in part at least.
        encode: tokens that would have to be encoded again, about.
        banks: banks of the namespace that would change.
        generated: text that drew on it, or on text that did, as far as that was recorded. It stays unless it is
            forgotten as well.
        unreadable: banks with more of that, which cannot be shown, nor forgotten with it: their key is missing.
    """

    bank: str
    text: tuple[SourceSpan, ...]
    whole: tuple[str, ...]
    tokens: int
    encode: int
    banks: tuple[str, ...]
    generated: tuple[Generated, ...]
    unreadable: tuple[str, ...]


_Span = tuple[int, int]


@dataclass
class _Plan:
    """What becomes of the pieces of a namespace.

    Attributes:
        spans: what goes of each source, merged and in order.
        whole: sources that go altogether.
        rows: bank, ordinal, piece and version of all that is held of these sources: the plan is for these.
        cuts: what is cut out of each piece, in characters of the source.
        before: the piece that each follows in its source; whichever banks hold it, it is the same.
    """

    bank: str
    namespace: str
    spans: dict[str, list[_Span]]
    whole: set[str]
    names: dict[int, str]
    rows: list[tuple[int, int, int, int]]
    pieces: dict[int, Piece] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    cuts: dict[int, list[_Span]] = field(default_factory=dict)
    before: dict[int, int | None] = field(default_factory=dict)

    @cached_property
    def changed(self) -> list[int]:
        """Pieces that become others, or nothing, in the order of their sources."""
        changed: dict[int, None] = {}
        for piece, before in self.before.items():
            if piece in self.cuts or before in changed:
                changed[piece] = None
        return list(changed)

    def left(self, piece: int) -> list[_Span]:
        """What is left of a piece's text, in characters of that text."""
        start, place, left = self.pieces[piece].char_start, 0, []
        for first, last in self.cuts.get(piece, []):
            left.append((place, first - start))
            place = last - start
        left.append((place, self.pieces[piece].chars))
        return [(first, last) for first, last in left if first < last]


def preview(store: MemoryStore, name: str, stretches: Sequence[Stretch]) -> Preview:
    """See `MemoryStore.preview_forget`."""
    plan = _plan(store, name, stretches)
    mine = {piece for bank, _, piece, _ in plan.rows if plan.names[bank] == name}
    tokens = sum(
        int(sum(_overlaps((start, end), plan.cuts[piece]) for start, end in plan.records[piece].offsets_N2.tolist()))
        for piece in mine & set(plan.cuts)
    )
    encode = sum(plan.pieces[piece].tokens for piece in plan.changed if plan.left(piece))
    changed = set(plan.changed)
    banks = {plan.names[bank] for bank, _, piece, _ in plan.rows if piece in changed}
    generated, unreadable = _generated(store, plan)
    return Preview(
        name,
        tuple(_texts(plan, mine)),
        tuple(sorted(plan.whole)),
        tokens,
        encode,
        tuple(sorted(banks)),
        tuple(generated),
        tuple(sorted(unreadable)),
    )


def written(store: MemoryStore, name: str, after: datetime | None, before: datetime | None) -> list[Stretch]:
    """See `MemoryStore.written`."""
    found = store.find(name)
    if found is None:
        raise store.not_found(name)
    stretches = []
    for piece in store.pieces(found[0]):
        created = datetime.fromisoformat(piece.created)
        if (after is None or created >= after) and (before is None or created < before):
            stretches.append(Stretch(piece.source, piece.char_start, piece.char_start + piece.chars))
    return stretches


def forget(
    store: MemoryStore,
    name: str,
    stretches: Sequence[Stretch],
    model: Encoder | None,
    on_tokens: Callable[[int], None] | None,
) -> Receipt:
    """See `MemoryStore.forget`."""
    store.manifest.require_writable()
    while True:
        plan = _plan(store, name, stretches)
        receipt = _carry_out(store, plan, model, on_tokens)
        if receipt is not None:
            return receipt


# ---- what becomes of what ------------------------------------------------------------------------------------


def _plan(store: MemoryStore, name: str, stretches: Sequence[Stretch]) -> _Plan:
    found = store.find(name)
    if found is None:
        raise store.not_found(name)
    ((namespace,),) = store.manifest.query("SELECT namespace FROM bank WHERE id = ?", found[0])
    names = dict(store.manifest.query("SELECT id, name FROM bank WHERE namespace = ? ORDER BY name", namespace))
    # The bank itself comes first: what it holds is what is meant.
    names = {found[0]: name, **names}
    sources = {stretch.source for stretch in stretches}
    plan = _Plan(name, namespace, {}, set(), names, [])
    chains: dict[int, dict[str, list[int]]] = {bank: {source: [] for source in sources} for bank in names}
    plan.rows = _rows(store, name, namespace, sources)
    for bank in names:
        for piece in store.pieces(bank):
            if piece.source in sources:
                chain = chains[bank][piece.source]
                plan.pieces.setdefault(piece.id, piece)
                plan.before.setdefault(piece.id, chain[-1] if chain else None)
                chain.append(piece.id)
    mine = chains[found[0]]
    asked: dict[str, list[Stretch]] = {source: [] for source in sources}
    for stretch in stretches:
        asked[stretch.source].append(stretch)
    for source in sources:
        _check(store, name, found[0], source, [plan.pieces[piece] for piece in mine[source]], asked[source])
        length = sum(plan.pieces[piece].chars for piece in mine[source])
        plan.spans[source] = _merged([(s.start, length if s.end is None else s.end) for s in asked[source]], length)
        if not length or plan.spans[source] == [(0, length)]:
            plan.whole.add(source)
    for piece in plan.pieces:
        plan.records[piece] = _record(store, name, plan.pieces[piece])
    texts = {source: "".join(plan.records[piece].text for piece in mine[source]) for source in sources}
    for bank in names:
        for source in sources:
            for piece in chains[bank][source]:
                cuts = _cuts(plan, piece, shared=piece in mine[source], text=texts[source])
                if cuts:
                    plan.cuts[piece] = cuts
    return plan


def _check(
    store: MemoryStore, name: str, bank_id: int, source: str, pieces: Sequence[Piece], stretches: Sequence[Stretch]
) -> None:
    """Raise `SourceError` for stretches that are not there.

    Args:
        pieces: of the source.
    """
    if not pieces and not _is_aside(store, name, bank_id, source):
        known = list(dict.fromkeys(piece.source for piece in store.pieces(bank_id)))
        listed = ", ".join(known[:20]) or "nothing yet"
        more = f" and {len(known) - 20} more" if len(known) > 20 else ""
        raise SourceError(f"No source {source!r} to forget. Bank {name!r} remembers: {listed}{more}.")
    length = sum(piece.chars for piece in pieces)
    for stretch in stretches:
        end = length if stretch.end is None else stretch.end
        if pieces and length and not 0 <= stretch.start < end <= length:
            raise SourceError(
                f"Source {source!r} has characters 0 to {length}; [{stretch.start}, {stretch.end}) is no part of it. "
                "Give a start and an end (exclusive) inside it."
            )


def _is_aside(store: MemoryStore, name: str, bank_id: int, source: str) -> bool:
    """Whether something of a source is in quarantine."""
    sealed = store.seal(name).name(source)
    return bool(store.manifest.query("SELECT 1 FROM quarantine WHERE bank = ? AND source = ? LIMIT 1", bank_id, sealed))


def _rows(store: MemoryStore, name: str, namespace: str, sources: set[str]) -> list[tuple[int, int, int, int]]:
    """Bank, ordinal, piece and version of all that a namespace holds of some sources."""
    rows = store.manifest.query(
        "SELECT held.bank, ordinal, piece, version, source FROM held JOIN piece ON piece.id = held.piece "
        "JOIN bank ON bank.id = held.bank WHERE namespace = ? ORDER BY held.bank, ordinal",
        namespace,
    )
    seal = store.seal(name)
    wanted = {seal.name(source) for source in sources}
    return [(bank, ordinal, piece, version) for bank, ordinal, piece, version, source in rows if source in wanted]


def _record(store: MemoryStore, name: str, piece: Piece) -> Record:
    record = record_of(store, piece)
    if record is not None:
        return record
    # A piece of the first version: its text is in its segment alone.
    path = store.segment_path(piece.file)
    return Record.of(read_segment(path, [piece], named([piece], name), store.mend(name), store.keys, verify=True)[0])


def _merged(spans: Sequence[_Span], length: int) -> list[_Span]:
    merged: list[_Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif start < end:
            merged.append((start, end))
    return [(start, min(end, length)) for start, end in merged]


def _cuts(plan: _Plan, piece: int, *, shared: bool, text: str) -> list[_Span]:
    """What is cut out of a piece, in characters of the source.

    Args:
        shared: whether the bank that was asked holds this very piece.
        text: of the source in that bank.
    """
    held, record = plan.pieces[piece], plan.records[piece]
    first, last = held.char_start, held.char_start + held.chars
    if held.source in plan.whole:
        return [(first, last)]
    cuts = [(max(first, start), min(last, end)) for start, end in plan.spans[held.source]]
    cuts = [(start, end) for start, end in cuts if start < end]
    if shared:
        return cuts
    # A fork that went its own way: only where it says the same.
    return [(start, end) for start, end in cuts if record.text[start - first : end - first] == text[start:end]]


def _overlaps(span: _Span, cuts: Sequence[_Span]) -> bool:
    """Whether a token lies in what is cut, in part at least; one without characters, inside."""
    start, end = span
    return any(max(start, first) < min(end, last) or first < start == end < last for first, last in cuts)


def _texts(plan: _Plan, mine: set[int]) -> Iterator[SourceSpan]:
    for source, spans in plan.spans.items():
        text = "".join(plan.records[p].text for p, piece in plan.pieces.items() if p in mine and piece.source == source)
        for start, end in spans:
            yield SourceSpan(source, start, end, text[start:end])


# ---- what drew on it -----------------------------------------------------------------------------------------

_DREW = """
SELECT drew.bank, drew.source, drew.char_start, drew.char_end, weight, drew.piece, bank.name, bank.namespace,
       piece.source, piece.char_start, piece.chars
FROM drew JOIN piece ON piece.id = drew.piece JOIN held ON held.piece = piece.id JOIN bank ON bank.id = held.bank
ORDER BY bank.name, piece.source, piece.char_start
"""


def _generated(store: MemoryStore, plan: _Plan) -> tuple[list[Generated], set[str]]:
    """Text that drew on what goes, or on text that did, and would stay: pieces whole, as they were written; and banks
    with more of it, whose key is missing.
    """
    # Where several banks hold it, the one that is asked is named.
    rows = sorted(store.manifest.query(_DREW), key=lambda row: row[6] != plan.bank)
    namespaces = dict(store.manifest.query("SELECT name, namespace FROM bank"))
    # What is forgotten, or drew on it: namespace, source, and spans.
    # Sources are compared as the manifest names them: equal names are equal when they are encrypted, too.
    seal = store.seal(plan.bank)
    touched = [(plan.namespace, seal.name(source), spans) for source, spans in plan.spans.items()]
    touched += [(plan.namespace, seal.name(source), [(0, 2**62)]) for source in plan.whole]
    found: dict[int, Generated] = {}
    unreadable: dict[int, str] = {}
    gone = {piece for piece in plan.pieces if not plan.left(piece)}
    grown = True
    while grown:
        grown = False
        for bank, source, start, end, weight, piece, holder, namespace, of, first, chars in rows:
            drawn = any(
                namespaces.get(bank) == where and source == what and any(max(start, a) < min(end, b) for a, b in spans)
                for where, what, spans in touched
            )
            if not drawn or piece in gone or piece in unreadable:
                continue
            if piece not in found:
                try:
                    for (data,) in store.manifest.query("SELECT data FROM record WHERE piece = ?", piece):
                        text = Record.unpack(store.keys.opened(data, record_name(piece))).text
                        found[piece] = Generated(holder, store.keys.name(of), first, first + chars, text, weight)
                except StoreKeyError:
                    unreadable[piece] = holder
                touched.append((namespace, of, [(first, first + chars)]))
                grown = True
            elif weight > found[piece].weight:
                found[piece] = dataclasses.replace(found[piece], weight=weight)
    return list(found.values()), set(unreadable.values())


# ---- doing it ------------------------------------------------------------------------------------------------


def _carry_out(
    store: MemoryStore, plan: _Plan, model: Encoder | None, on_tokens: Callable[[int], None] | None
) -> Receipt | None:
    """Forget; None if what is held of the sources changed meanwhile."""
    written: list[NewSegment] = []
    changed = set(plan.changed)
    bank_ids = sorted({bank for bank, _, piece, _ in plan.rows if piece in changed} | {next(iter(plan.names))})
    try:
        entries = _entries(store, plan, model, on_tokens)
        if entries:
            written.append(store.write_segment(list(entries.values()), plan.bank))
        with store.manifest.transaction() as database:
            if _rows(store, plan.bank, plan.namespace, set(plan.spans)) != plan.rows:
                for new in written:
                    store.discard(new.file)
                return None
            time = now()
            new_ids = _place(store, database, plan, entries, written[0]) if entries else {}
            lost = _hold(database, plan, entries, new_ids)
            aside = _clear_quarantine(store, database, plan)
            _clear_drew(store, database, plan)
            files = release(store, database, plan.bank, written)
            receipt = _sign(database, plan, time, bank_ids, lost, entries, files)
            for bank_id in bank_ids:
                add_version(database, bank_id, "forget", time, f"receipt {receipt.number}")
                database.execute("UPDATE bank SET revision = revision + 1, updated = ? WHERE id = ?", (time, bank_id))
                # Before the commit: no index ever knows what its bank has forgotten.
                store.remove_index(bank_id)
    except BaseException as error:
        for new in written:
            store.discard(new.file)
        if isinstance(error, OSError):
            raise StoreNotWritableError(
                f"Nothing was forgotten of bank {plan.bank!r}: {error}. "
                f"Check the space and the permissions of {store.folder}, then try again."
            ) from error
        raise
    store.erase([*files, *aside])
    return receipt


def _entries(
    store: MemoryStore, plan: _Plan, model: Encoder | None, on_tokens: Callable[[int], None] | None
) -> dict[int, BankEntry]:
    """What takes the place of each piece that changes and of which something is left."""
    changed = [piece for piece in plan.changed if plan.left(piece)]
    if not changed:
        return {}
    ((spec,),) = store.manifest.query("SELECT spec FROM bank WHERE name = ?", plan.bank)
    if model is None:
        raise ConfigError(
            f"A part of source {plan.pieces[changed[0]].source!r} is to be forgotten, and the rest of it encoded "
            "again: give the model that wrote the bank (`forget(…, model=model)`, --model), or forget the whole source."
        )
    written = BankSpec.from_json(spec)
    if model.bank_spec != written:
        raise BankMismatchError(
            f"Bank {plan.bank!r} was written by backbone {written.backbone!r} (weights {written.weights[:12]}…); the "
            f"model given is {model.bank_spec.backbone!r} (weights {model.bank_spec.weights[:12]}…). Give its own, "
            "with --model, or forget whole sources, which needs none."
        )
    made: dict[int, BankEntry] = {}
    for piece in changed:
        held, record, start = plan.pieces[piece], plan.records[piece], 0
        past: list[Tensor] = []
        earlier = plan.before[piece]
        while earlier is not None:
            if earlier in made:
                past.append(made[earlier].token_ids_N)
                start += len(made[earlier].text)
            elif earlier not in plan.cuts:
                past.append(plan.records[earlier].token_ids_N)
                start += plan.pieces[earlier].chars
            earlier = plan.before[earlier]
        text, ids_N, offsets_N2 = _without(model, plan, piece)
        before_N = torch.cat([record.token_ids_N[:0], *reversed(past)])
        whole_N = torch.cat((before_N, ids_N))
        keys_HNE, values_HNE = model.encode(whole_N, len(before_N), windows=written.encode)
        entry = packed(BankEntry(held.source, text, start, ids_N, offsets_N2 + start, keys_HNE, values_HNE), written)
        made[piece] = _thinned(store, plan, piece, entry)
        if on_tokens is not None:
            on_tokens(len(ids_N))
    return made


def _without(model: Encoder, plan: _Plan, piece: int) -> tuple[str, Tensor, Tensor]:
    """Text, token ids (N,) and offsets in that text (N, 2) of what is left of a piece."""
    held, record = plan.pieces[piece], plan.records[piece]
    offsets_N2 = record.offsets_N2 - held.char_start
    if piece not in plan.cuts:
        return record.text, record.token_ids_N, offsets_N2
    left = plan.left(piece)
    text = "".join(record.text[start:end] for start, end in left)
    ids, offsets = _tokenized(model, record.text)
    if ids == record.token_ids_N.tolist() and offsets == offsets_N2.tolist():
        # Its tokens follow from its text: so they do from what is left of it.
        ids, offsets = _tokenized(model, text)
    else:
        ids, offsets = _kept_tokens(model, record, offsets_N2, left)
    return text, torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64).reshape(-1, 2)


def _thinned(store: MemoryStore, plan: _Plan, piece: int, entry: BankEntry) -> BankEntry:
    """What takes the place of a thinned piece: a token has a row if the one that said its first character had."""
    held = plan.pieces[piece]
    kept_M = kept_tokens(store, held)
    if kept_M is None:
        return entry
    if piece not in plan.cuts:
        return entry.thinned(kept_M)
    said = torch.zeros(held.chars + 1, dtype=torch.bool)
    for (start, end), kept in zip((plan.records[piece].offsets_N2 - held.char_start).tolist(), kept_M, strict=True):
        said[start : max(end, start + 1)] = kept
    said = torch.cat([said[start:end] for start, end in plan.left(piece)] + [said[-1:]])
    return entry.thinned(said[entry.offsets_N2[:, 0] - entry.char_start])


def _tokenized(model: Encoder, text: str) -> tuple[list[int], list[list[int]]]:
    found = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [list(pair) for pair in found["offset_mapping"]]


def _kept_tokens(
    model: Encoder, record: Record, offsets_N2: Tensor, left: Sequence[_Span]
) -> tuple[list[int], list[list[int]]]:
    """Ids and offsets where tokens were chosen by the model, as in a conversation: those of what is left stay as they
    are, special ones without characters among them, and what is left of others is tokenised by itself."""
    ids: list[int] = []
    offsets: list[list[int]] = []
    shift = 0  # characters that are left before the stretch
    for first, last in left:
        inside = [
            (token, start, end)
            for token, (start, end) in zip(record.token_ids_N.tolist(), offsets_N2.tolist(), strict=True)
            if first <= start and end <= last
        ]
        whole = [(start, end) for _, start, end in inside if start < end]
        begin, finish = (whole[0][0], whole[-1][1]) if whole else (last, last)
        for text_start, text_end, tokens in ((first, begin, []), (begin, finish, inside), (finish, last, [])):
            if tokens:
                ids += [token for token, _, _ in tokens]
                offsets += [[start - first + shift, end - first + shift] for _, start, end in tokens]
            elif text_start < text_end:
                new_ids, new_offsets = _tokenized(model, record.text[text_start:text_end])
                ids += new_ids
                offsets += [[a + text_start - first + shift, b + text_start - first + shift] for a, b in new_offsets]
        shift += last - first
    return ids, offsets


def _place(
    store: MemoryStore,
    database: sqlite3.Connection,
    plan: _Plan,
    entries: dict[int, BankEntry],
    new: NewSegment,
) -> dict[int, int]:
    """Rows for new pieces; returns their ids by the ids of those whose place they take."""
    segment, token, char, ids = store.place(database, new), 0, 0, {}
    for piece, entry in entries.items():
        row = (entry.source, entry.char_start, len(entry.text), len(entry), plan.pieces[piece].created, segment)
        drew = database.execute(
            "SELECT bank, source, char_start, char_end, weight FROM drew WHERE piece = ?", (piece,)
        ).fetchall()
        ids[piece] = add_piece(database, store.seal(plan.bank), row, Record.of(entry).pack(), drew, (token, char))
        keep_rows(database, ids[piece], entry)
        token, char = token + len(entry), char + len(entry.text)
    return ids


def _hold(
    database: sqlite3.Connection, plan: _Plan, entries: dict[int, BankEntry], new_ids: dict[int, int]
) -> dict[int, dict[int, int]]:
    """Let banks hold the new pieces in place of the old ones; returns tokens that each version of each bank lost."""
    changed, lost = set(plan.changed), {bank: dict[int, int]() for bank in plan.names}
    for bank, ordinal, piece, version in plan.rows:
        if piece not in changed:
            continue
        if piece in new_ids:
            database.execute(
                "UPDATE held SET piece = ? WHERE bank = ? AND ordinal = ?", (new_ids[piece], bank, ordinal)
            )
        else:
            database.execute("DELETE FROM held WHERE bank = ? AND ordinal = ?", (bank, ordinal))
        gone = plan.pieces[piece].tokens - (len(entries[piece]) if piece in entries else 0)
        lost[bank][version] = lost[bank].get(version, 0) + gone
        database.execute(
            "UPDATE version SET forgotten = forgotten + ? WHERE bank = ? AND number = ?", (gone, bank, version)
        )
    return lost


def _clear_quarantine(store: MemoryStore, database: sqlite3.Connection, plan: _Plan) -> list[str]:
    """Delete what lies in quarantine of the text that goes; returns files that go with it."""
    files, seal = set(), store.seal(plan.bank)
    for bank in plan.names:
        for source, spans in plan.spans.items():
            rows = database.execute(
                "SELECT id, char_start, chars, file FROM quarantine WHERE bank = ? AND source = ?",
                (bank, seal.name(source)),
            ).fetchall()
            for row, start, chars, file in rows:
                if source in plan.whole or any(max(start, a) < min(start + chars, b) for a, b in spans):
                    database.execute("DELETE FROM quarantine WHERE id = ?", (row,))
                    files.add(file)
    files.discard(None)
    # A file in quarantine that held several sources goes with the first that is forgotten.
    database.executemany("UPDATE quarantine SET file = NULL WHERE file = ?", [(file,) for file in files])
    database.execute("DELETE FROM quarantine WHERE file IS NULL AND reason IS NULL")
    return sorted(files)


def _clear_drew(store: MemoryStore, database: sqlite3.Connection, plan: _Plan) -> None:
    """Nothing says any more that something drew on the text that goes; places behind it move."""
    seal = store.seal(plan.bank)
    marks = ", ".join("?" * len(plan.names))
    for source, spans in plan.spans.items():
        rows = database.execute(
            f"SELECT rowid, char_start, char_end FROM drew WHERE source = ? AND bank IN ({marks})",
            (seal.name(source), *plan.names.values()),
        ).fetchall()
        for row, start, end in rows:
            if source in plan.whole or any(max(start, a) < min(end, b) for a, b in spans):
                database.execute("DELETE FROM drew WHERE rowid = ?", (row,))
            else:
                shift = sum(b - a for a, b in spans if b <= start)
                database.execute(
                    "UPDATE drew SET char_start = ?, char_end = ? WHERE rowid = ?", (start - shift, end - shift, row)
                )


def _sign(
    database: sqlite3.Connection,
    plan: _Plan,
    time: str,
    bank_ids: Sequence[int],
    lost: dict[int, dict[int, int]],
    entries: dict[int, BankEntry],
    files: Sequence[str],
) -> Receipt:
    banks: list[dict[str, Any]] = []
    for bank in bank_ids:
        versions = lost[bank]
        tags = database.execute(
            "SELECT name FROM tag WHERE bank = ? AND version >= ? ORDER BY name",
            (bank, min(versions, default=2**62)),
        ).fetchall()
        again = {piece for of, _, piece, _ in plan.rows if of == bank and piece in entries}
        banks.append(
            {
                "bank": plan.names[bank],
                "tokens": sum(versions.values()),
                "encoded_again": sum(len(entries[piece]) for piece in again),
                "from_version": min(versions, default=None),
                "tags": [tag for (tag,) in tags],
            }
        )
    salt = new_salt()
    removed = [
        {
            "source": hash_name(salt, source),
            "whole": source in plan.whole,
            "spans": [list(span) for span in spans],
            "characters": sum(end - start for start, end in spans),
        }
        for source, spans in sorted(plan.spans.items())
    ]
    facts = {
        "time": time,
        "namespace": plan.namespace,
        "bank": plan.bank,
        "salt": salt,
        "removed": removed,
        "banks": banks,
        "files": list(files),
    }
    return add_receipt(database, plan.namespace, facts)
