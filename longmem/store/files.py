"""Files that are written under a temporary name and get their own when they are complete.

Whoever writes one holds a lock on it until it has its name or is dropped, and the kernel lets go of the locks of those
that die: so others can tell what is being written from what was left behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

# Where nobody can tell whether its writer lives, a temporary file this old belongs to no write that still runs. Were it
# one after all (a suspended machine), its rename fails and nothing is committed.
_STALE_SECONDS = 3600


def new_file(path: Path) -> IO[bytes]:
    """A new file, to be written; locked until it is closed.

    Raises:
        OSError: there is one already, or none can be made.
    """
    file = open(path, "xb")  # noqa: SIM115
    # Where the file system knows no locks, its age decides.
    with suppress(OSError):
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    return file


def write_bytes(file: IO[bytes], data: bytes) -> tuple[str, int]:
    """Write and sync a new file; returns its sha256 and its size."""
    return write_parts(file, [data])


def write_parts(file: IO[bytes], parts: Sequence[bytes | memoryview]) -> tuple[str, int]:
    """Write and sync a new file that consists of these one after the other; returns its sha256 and its size."""

    def digest_of_all() -> str:
        sha256 = hashlib.sha256()
        for part in parts:
            sha256.update(part)
        return sha256.hexdigest()

    # Neither waits for the other: the one takes a processor, the other a disk.
    with ThreadPoolExecutor(1) as beside:
        sha256 = beside.submit(digest_of_all)
        for part in parts:
            file.write(part)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
        return sha256.result(), size


def is_abandoned(path: Path) -> bool:
    """Whether nobody writes a temporary file any more."""
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            if state.st_mtime < time.time() - _STALE_SECONDS:
                return True
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Nothing is written before the file is locked: one that is empty may have been made at this instant.
            return state.st_size > 0
    except OSError:
        return False


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames and unlinks in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
