"""What is no part of a store any more goes: what was forgotten, and what crashed processes left behind."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from longmem.errors import StoreNotWritableError, StoreUnreachableError
from longmem.store.files import is_abandoned, sync_folder
from longmem.store.indexes import INDEXES
from longmem.store.manifest import FORMAT_VERSION, MANIFEST
from longmem.store.segments import QUARANTINE, SEGMENTS
from longmem.store.twin import TWIN

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore


def erase(store: MemoryStore, files: list[str]) -> None:
    """Unlink segment files of something forgotten, those in quarantine too, and what deleted rows have left."""
    # First: as long as the files are there, the next to open the store knows that this is to be done. On a full
    # disk it is possible only afterwards.
    scrubbed = store.manifest.scrub()
    store.unlink(files)
    folder = store.folder / QUARANTINE
    try:
        for file in files:
            (folder / file).unlink(missing_ok=True)
        if folder.exists():
            sync_folder(folder)
    except OSError as error:
        raise StoreNotWritableError(
            f"Forgotten, but a file is still in {folder}: {error}. Remove it by hand."
        ) from error
    # Those who were killed while they wrote something else may have left it as well.
    sweep(store)
    if not (scrubbed or store.manifest.scrub()):
        warnings.warn(
            f"Forgotten, but deleted rows are still in {store.folder / MANIFEST}-wal or {TWIN}-wal, since another "
            "process reads the store or the disk is full. They go when the last process closes it.",
            stacklevel=4,
        )


def sweep(store: MemoryStore) -> None:
    """Remove files that crashed processes left behind."""
    try:
        if not orphans(store):
            return
        # Files get their final name under the write lock only: one without a row, seen under that lock, has no
        # owner that could still commit it.
        with store.manifest.transaction() as database:
            left, known = orphans(store), known_files(store)
            # A process that dies inside COMMIT can leave a whole transaction in SQLite's log that nobody sees until
            # the log is next recovered. Its file looks like a left-over: write over the transaction first.
            database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        # Whoever died after it had forgotten something had not come to this. A file that is left says so.
        if any(path.suffix == ".safetensors" for path in left):
            store.manifest.scrub()
        there = [path for path in left if path.parent == store.files.folder]
        gone = [path.with_suffix(".safetensors").name for path in there]
        # What cannot be reached now goes another time. With a file goes what was uploaded of it.
        with suppress(StoreUnreachableError):
            store.files.unlink([file for file in gone if file not in known])
        for path in left:
            if path not in there:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreNotWritableError(f"{store.folder / SEGMENTS} cannot be written: {error}.") from error


def orphans(store: MemoryStore) -> list[Path]:
    """Files that crashed processes left behind, of which nothing is part of the store."""
    paths = [path for part in (SEGMENTS, INDEXES, QUARANTINE) for path in (store.folder / part).glob("*")]
    known = known_files(store)
    known |= {store.index_path(bank_id).name for (bank_id,) in store.manifest.query("SELECT id FROM bank")}
    left = [path for path in paths if path.suffix == ".safetensors" and path.name not in known]
    return left + [path for path in paths if path.suffix == ".tmp" and is_abandoned(path)]


def known_files(store: MemoryStore) -> set[str]:
    """Files of segments that are part of the store, or in quarantine."""
    return {file for (file,) in store.manifest.query("SELECT file FROM segment UNION SELECT file FROM quarantine")}
