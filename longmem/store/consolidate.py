"""Many small segments of a bank become few large ones. What the bank holds, and in which order, stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from longmem.errors import StoreCorruptError, StoreNotWritableError
from longmem.store.rows import put_record
from longmem.store.segments import Piece, Record, by_segment, named, read_segment

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore

# Two copies of a segment are in memory while it is written, and a forget rewrites those that it shares.
SEGMENT_BYTES = 256 << 20


@dataclass(frozen=True)
class Consolidation:
    """How many segments a bank had and has, and the size of its segment files in bytes."""

    bank: str
    segments_before: int
    segments: int
    bytes: int


def consolidate(
    store: MemoryStore,
    name: str,
    *,
    segment_bytes: int = SEGMENT_BYTES,
    on_segments: Callable[[int], None] | None = None,
) -> Consolidation:
    """See `MemoryStore.consolidate`."""
    store.manifest.require_writable()
    found = store.find(name)
    if found is None:
        raise store.not_found(name)
    bank_id, _ = found
    before = len({piece.segment for piece in store.pieces(bank_id)})
    # What was forgotten or moved meanwhile ends a pass early; then look again.
    while not all(_merge(store, name, run, on_segments) for run in _runs(store, bank_id, segment_bytes)):
        pass
    sizes = store.segment_sizes(bank_id)
    return Consolidation(name, before, len(sizes), sum(sizes.values()))


def _runs(store: MemoryStore, bank_id: int, segment_bytes: int) -> list[list[Piece]]:
    """Pieces of neighbouring segments that become one, in the order of the bank; last, what only its forks hold.

    A segment of half the size is left alone, so that a bank that is consolidated often is not copied each time.
    """
    sizes, segments = store.segment_sizes(bank_id), by_segment(store.pieces(bank_id))
    runs: list[list[Piece]] = [[]]
    room = segment_bytes
    for segment, held in segments.items():
        # A segment that was committed between the two queries has no size yet; the next consolidation takes it.
        size = sizes.get(segment, segment_bytes)
        large = size > segment_bytes // 2
        if large or size > room:
            runs.append([])
            room = segment_bytes
        if not large:
            mine = {piece.id for piece in held}
            runs[-1] += [*held, *(piece for piece in store.in_segment(segment) if piece.id not in mine)]
            room -= size
    return [run for run in runs if len({piece.segment for piece in run}) > 1]


def _merge(store: MemoryStore, name: str, run: list[Piece], on_segments: Callable[[int], None] | None) -> bool:
    """Copy all that lies in some segments into a new one; False if it changed meanwhile."""
    old = {piece.segment: piece.file for piece in run}
    new = None

    def still() -> bool:
        """Whether in these segments lies what lay there."""
        now = {piece.id: segment for segment in old for piece in store.in_segment(segment)}
        return now == {piece.id: piece.segment for piece in run}

    try:
        entries = []
        for _, group in groupby(run, key=lambda piece: piece.segment):
            pieces = list(group)
            path, what = store.segment_path(pieces[0].file), named(pieces, name)
            try:
                entries += read_segment(path, pieces, what, store.mend(name), store.keys, verify=True)
            except StoreCorruptError:
                if not still():
                    return False
                raise
        new = store.write_segment(entries, name)
        with store.manifest.transaction() as database:
            if not still():
                store.discard(new.file)
                return False
            store.move(database, new, run)
            # Pieces of the first version have no record; now that their checksums held, they get one.
            for piece, entry in zip(run, entries, strict=True):
                if not database.execute("SELECT 1 FROM record WHERE piece = ?", (piece.id,)).fetchone():
                    put_record(database, store.seal(name), piece.id, Record.of(entry).pack())
            database.executemany("DELETE FROM segment WHERE id = ?", [(segment,) for segment in old])
    except BaseException as error:
        if new is not None:
            store.discard(new.file)
        if isinstance(error, OSError):
            raise StoreNotWritableError(
                f"Bank {name!r} was not consolidated any further: {error}. "
                f"Check the space and the permissions of {store.folder}, then try again. Nothing is lost."
            ) from error
        raise
    store.unlink(list(old.values()))
    if on_segments is not None:
        on_segments(len(old))
    return True
