"""Fork, merge and diff: operations on which pieces a bank holds; and a copy by another backbone.

N tokens.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longmem.bank import BankEntry, packed
from longmem.config import BankSpec, Precision
from longmem.errors import BankError, BankMismatchError, StoreCorruptError, StoreError, StoreNotWritableError
from longmem.store.copying import Contents, Writer, contents, put, put_piece, rewrite, still_held
from longmem.store.manifest import now
from longmem.store.repair import Encoder
from longmem.store.rows import add_version, hold
from longmem.store.segments import Piece, Record, named, read_segment
from longmem.store.versions import resolve

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore


class TextEncoder(Encoder, Protocol):
    """What a copy by another backbone needs of a model: `LongMem` is one."""

    def bank_spec_in(self, precision: Precision) -> BankSpec: ...

    def encode_text(
        self, text: str, *, source: str, before_N: Tensor | None = None, char_start: int = 0
    ) -> BankEntry: ...


@dataclass(frozen=True)
class ChangedSource:
    """A source that two banks hold differently: up to which character they agree, and how long it is in each."""

    source: str
    common: int
    ours: int
    theirs: int


@dataclass(frozen=True)
class Diff:
    """What two banks hold.

    Attributes:
        ours, theirs: sources that only the first, or only the second, holds.
        changed: sources that both hold, but not the same text, or not by the same tokens.
        same: sources that both hold alike.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    changed: tuple[ChangedSource, ...]
    same: tuple[str, ...]


def fork(store: MemoryStore, name: str, to: str, version: int | str | None) -> None:
    """See `MemoryStore.fork`."""
    store.manifest.require_writable()
    bank_id, _ = store.require(name)
    number = resolve(store, name, version)
    ((namespace,),) = store.manifest.query("SELECT namespace FROM bank WHERE id = ?", bank_id)
    note = f"of {name}, version {number}"
    if not to.startswith(f"{namespace}/"):
        _copy(store, name, to, number, "fork", note)
        return
    with store.manifest.transaction() as database:
        # It may have been deleted since.
        bank_id, _ = store.require(name)
        store.require_free(to)
        if database.execute("SELECT 1 FROM encryption WHERE namespace = ?", (to,)).fetchone():
            raise StoreError(
                f"{to!r} was made an encrypted namespace of its own; a fork there shares the files of {namespace!r}, "
                "and their key, if any. Choose another name."
            )
        created = now()
        fork_id = database.execute(
            "INSERT INTO bank (name, namespace, spec, revision, created, updated) "
            "SELECT ?, namespace, spec, 1, ?, ? FROM bank WHERE id = ?",
            (to, created, created, bank_id),
        ).lastrowid
        assert fork_id is not None
        for columns, table, number_column in (
            ("number, operation, note, forgotten, created", "version", "number"),
            ("ordinal, piece, version", "held", "version"),
        ):
            database.execute(
                f"INSERT INTO {table} (bank, {columns}) SELECT ?, {columns} FROM {table} "
                f"WHERE bank = ? AND {number_column} <= ?",
                (fork_id, bank_id, number),
            )
        add_version(database, fork_id, "fork", created, note)


def _copy(store: MemoryStore, name: str, to: str, version: int, operation: str, note: str) -> None:
    """A bank of its own namespace, with files of its own."""
    while True:
        bank_id, _ = store.require(name)
        store.require_free(to)
        held = contents(store.manifest, store.keys, bank_id, version)
        store.encrypt_like(name, to)
        writer = Writer(store, to)
        with _attempt(store, writer, bank_id, held, f"Bank {to!r} was not made"):
            copied = dataclasses.replace(rewrite(store, held, held.pieces, writer), tags=[])
            with store.manifest.transaction() as database:
                store.require_free(to)
                # What was forgotten meanwhile must not live on in the copy.
                if still_held(store, bank_id, held.pieces):
                    new_id = put(database, store.seal(to), copied, to, to, writer.place(database))
                    add_version(database, new_id, operation, now(), note)
                    return
            writer.discard()


@contextmanager
def _attempt(store: MemoryStore, writer: Writer, bank_id: int, held: Contents, failed: str) -> Iterator[None]:
    """A try at writing what a bank holds elsewhere: if it does not succeed, nothing that was written stays.

    It ends quietly where what it reads is gone since the bank has changed meanwhile, and may then be tried again.
    """
    try:
        yield
    except StoreCorruptError:
        writer.discard()
        if store.revision(bank_id) == held.revision:
            raise
    except OSError as error:
        writer.discard()
        raise not_writable(store, error, failed) from error
    except BaseException:
        writer.discard()
        raise


def not_writable(store: MemoryStore, error: OSError, what: str) -> StoreNotWritableError:
    return StoreNotWritableError(
        f"{what}: {error}. Check the space and the permissions of {store.folder}, then try again."
    )


# ---- merge and diff ------------------------------------------------------------------------------------------


def merge(store: MemoryStore, name: str, other: str, version: int | str | None) -> int:
    """See `MemoryStore.merge`."""
    store.manifest.require_writable()
    while True:
        bank_id, spec = store.require(name)
        other_id, other_spec = store.require(other)
        if spec != other_spec:
            raise BankMismatchError(
                f"Banks {name!r} (backbone {spec.backbone!r}) and {other!r} (backbone {other_spec.backbone!r}) were "
                f"written by different models. Copy one with the other's model first: `longmem copy --bank {other} …`."
            )
        number = resolve(store, other, version)
        theirs = contents(store.manifest, store.keys, other_id, number)
        if _rounding(spec) != _rounding(other_spec):
            otherwise = " rounded otherwise" if spec.precision == other_spec.precision else ""
            raise BankMismatchError(
                f"Bank {name!r} keeps keys and values in {spec.precision}, {other!r} in "
                f"{other_spec.precision}{otherwise}: rows of one mean nothing in the other. Write the texts of "
                f"{other!r} to {name!r} instead."
            )
        if spec.encode != other_spec.encode:
            raise BankMismatchError(
                f"Bank {name!r} is written in windows of {spec.encode}, {other!r} in {other_spec.encode}: what is left "
                f"after forgetting could not be encoded again as it was. Write the texts of {other!r} to {name!r} "
                "instead."
            )
        if store.seal(other).key_id is not None and store.seal(name).key_id is None:
            raise StoreError(
                f"Bank {other!r} is encrypted and {name!r} is not: nothing was merged. Encrypt it first: "
                f"`longmem encrypt {name}`."
            )
        new = _missing(store, _contents_now(store, bank_id), theirs)
        if not new:
            return 0
        spaces = dict(store.manifest.query("SELECT id, namespace FROM bank WHERE id IN (?, ?)", bank_id, other_id))
        writer = Writer(store, name)
        with _attempt(store, writer, other_id, theirs, f"Nothing was merged into bank {name!r}"):
            shared = spaces[bank_id] == spaces[other_id]
            copied = theirs if shared else rewrite(store, theirs, new, writer)
            with store.manifest.transaction() as database:
                # Others may have written to both meanwhile, or forgotten.
                same = _missing(store, _contents_now(store, bank_id), theirs) == new
                if same and still_held(store, other_id, theirs.pieces):
                    segments, time = writer.place(database), now()
                    came = add_version(database, bank_id, "merge", time, f"of {other}, version {number}")
                    ids = [piece.id for piece in new]
                    if not shared:
                        seal = store.seal(name)
                        ids = [put_piece(database, seal, copied, piece, name, segments) for piece in copied.pieces]
                    hold(database, bank_id, [(piece, came) for piece in ids])
                    database.execute(
                        "UPDATE bank SET revision = revision + 1, updated = ? WHERE id = ?", (time, bank_id)
                    )
                    return sum(piece.tokens for piece in new)
            writer.discard()


def _contents_now(store: MemoryStore, bank_id: int) -> Contents:
    return contents(store.manifest, store.keys, bank_id, 2**62)


def _rounding(spec: BankSpec) -> tuple[str, str | None, str | None]:
    """What decides what the bytes of a row say."""
    return spec.precision, spec.centre, spec.grid


def _missing(store: MemoryStore, ours: Contents, theirs: Contents) -> list[Piece]:
    """Pieces of theirs that ours lacks, in order.

    Raises:
        BankError: a source went on differently in the two.
    """
    mine, other = _chains(ours), _chains(theirs)
    new, conflicts = set(), []
    for source, pieces in other.items():
        known = mine.get(source, [])
        common = 0
        for one, two in zip(known, pieces, strict=False):
            if not _same(store, ours, one, theirs, two):
                break
            common += 1
        if common < len(known) and common < len(pieces):
            conflicts.append(source)
        new |= {piece.id for piece in pieces[common:]}
    if conflicts:
        listed = ", ".join(map(repr, conflicts[:10])) + (f" and {len(conflicts) - 10} more" if conflicts[10:] else "")
        raise BankError(
            f"Sources {listed} went on differently in {ours.name!r} and {theirs.name!r}; nothing was merged. "
            f"`longmem diff --bank {ours.name} {theirs.name}` shows where. Forget them in one of the two first."
        )
    return [piece for piece in theirs.pieces if piece.id in new]


def diff(store: MemoryStore, name: str, other: str, version: int | str | None, other_version: int | str | None) -> Diff:
    """See `MemoryStore.diff`."""
    pair = [
        contents(store.manifest, store.keys, store.require(one)[0], resolve(store, one, number))
        for one, number in ((name, version), (other, other_version))
    ]
    mine, theirs = _chains(pair[0]), _chains(pair[1])
    changed, same = [], []
    for source in mine:
        if source not in theirs:
            continue
        texts = [
            "".join(_record(store, held, piece).text for piece in chain[source])
            for held, chain in zip(pair, (mine, theirs), strict=True)
        ]
        tokens = [
            torch.cat([_record(store, held, piece).token_ids_N for piece in chain[source]])
            for held, chain in zip(pair, (mine, theirs), strict=True)
        ]
        if texts[0] == texts[1] and torch.equal(*tokens):
            same.append(source)
        else:
            agree = (n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
            common = next(agree, min(map(len, texts)))
            changed.append(ChangedSource(source, common, len(texts[0]), len(texts[1])))
    return Diff(
        tuple(source for source in mine if source not in theirs),
        tuple(source for source in theirs if source not in mine),
        tuple(changed),
        tuple(same),
    )


def _chains(held: Contents) -> dict[str, list[Piece]]:
    chains: defaultdict[str, list[Piece]] = defaultdict(list)
    for piece in held.pieces:
        chains[piece.source].append(piece)
    return dict(chains)


def _record(store: MemoryStore, held: Contents, piece: Piece) -> Record:
    if piece.id in held.records:
        return Record.unpack(held.records[piece.id])
    path, what = store.segment_path(piece.file), named([piece], held.name)
    return Record.of(read_segment(path, [piece], what, store.mend(held.name), store.keys, verify=True)[0])


def _same(store: MemoryStore, ours: Contents, one: Piece, theirs: Contents, two: Piece) -> bool:
    """Whether two pieces say the same by the same tokens."""
    if one.id == two.id:
        return True
    if (one.char_start, one.chars, one.tokens) != (two.char_start, two.chars, two.tokens):
        return False
    records = _record(store, ours, one), _record(store, theirs, two)
    return records[0].text == records[1].text and torch.equal(records[0].token_ids_N, records[1].token_ids_N)


# ---- another backbone ------------------------------------------------------------------------------------------


def copy_by(
    store: MemoryStore,
    name: str,
    to: str,
    model: TextEncoder,
    version: int | str | None,
    on_tokens: Callable[[int], None] | None,
) -> None:
    """See `MemoryStore.copy`."""
    store.manifest.require_writable()
    while True:
        bank_id, spec = store.require(name)
        store.require_free(to)
        number = resolve(store, name, version)
        held = contents(store.manifest, store.keys, bank_id, number)
        new_spec = model.bank_spec_in(spec.precision)
        store.encrypt_like(name, to)
        writer = Writer(store, to)
        with _attempt(store, writer, bank_id, held, f"Bank {to!r} was not made"):
            records: dict[int, bytes] = {}
            past: defaultdict[str, list[Tensor]] = defaultdict(lambda: [torch.empty(0, dtype=torch.int64)])
            for piece in held.pieces:
                entry = _by(model, piece, _record(store, held, piece), torch.cat(past[piece.source]))
                past[piece.source].append(entry.token_ids_N)
                records[piece.id] = Record.of(entry).pack()
                writer.add(piece, packed(entry, new_spec))
                if on_tokens is not None:
                    on_tokens(piece.tokens)
            writer.flush()
            note = f"of {name}, version {number}, from backbone {spec.backbone}"
            copied = dataclasses.replace(held, pieces=writer.placed, records=records, spec=new_spec.to_json())
            copied = dataclasses.replace(copied, thinned={}, tags=[])
            with store.manifest.transaction() as database:
                store.require_free(to)
                if still_held(store, bank_id, held.pieces):
                    new_id = put(database, store.seal(to), copied, to, to, writer.place(database))
                    add_version(database, new_id, "copy", now(), note)
                    return
            writer.discard()


def _by(model: TextEncoder, piece: Piece, record: Record, before_N: Tensor) -> BankEntry:
    """A piece as another backbone writes it: by its tokens where they say the same to it, else by its text."""
    size = len(model.tokenizer)
    ids = record.token_ids_N.tolist()
    decoded = None
    if all(token < size for token in ids):
        decoded = model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if decoded != record.text:
        return model.encode_text(record.text, source=piece.source, before_N=before_N, char_start=piece.char_start)
    keys_HNE, values_HNE = model.encode(torch.cat((before_N, record.token_ids_N)), len(before_N))
    place = (piece.source, record.text, piece.char_start, record.token_ids_N, record.offsets_N2)
    return BankEntry(*place, keys_HNE, values_HNE)
