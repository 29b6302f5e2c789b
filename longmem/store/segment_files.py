"""Where the files of segments are: in the store's folder or, with copies there, at another location."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO

from longmem.errors import StoreCorruptError, StoreUnreachableError
from longmem.store.files import is_abandoned, new_file, sync_folder
from longmem.store.remote import Remote


class SegmentFiles:
    """Files that are drafted, placed under their own name, read, and removed, all by name.

    A draft is nobody's until it is placed, inside the transaction that gives it a row. With a remote location it is
    uploaded before; the folder then keeps copies, of what was written and of what was read, which may be missing.

    Attributes:
        remote: where the files are; None if that is the folder.
    """

    def __init__(self, folder: Path, remote: Remote | None = None) -> None:
        self.folder = folder
        self.remote = remote
        self._drafts: dict[str, IO[bytes]] = {}

    def path(self, file: str) -> Path:
        """Where it is, or its copy."""
        return self.folder / file

    def draft(self, file: str) -> IO[bytes]:
        """A new file under a temporary name, to be written; then `finish` and `place` it, or `drop` it.

        Raises:
            OSError: none can be made.
        """
        self._drafts[file] = new_file(self._temporary(file))
        return self._drafts[file]

    def finish(self, file: str) -> None:
        """Bring a draft that is written and synced to where it will be read.

        Raises:
            StoreUnreachableError: that is not possible.
        """
        if self.remote is not None:
            self.remote.put(self._temporary(file), file)

    def place(self, file: str, size: int) -> None:
        """Give a draft its name durably, inside a transaction.

        Raises:
            StoreCorruptError: it is not where it was brought.
        """
        if self.remote is not None and (found := self.remote.size(file)) != size:
            raise StoreCorruptError(
                f"{self.remote.url}/{file} was uploaded with {size:,} bytes, and has {found} now. Nothing was written; "
                "try again."
            )
        with self._drafts.pop(file):
            os.rename(self._temporary(file), self.path(file))
        sync_folder(self.folder)

    def fetch(self, file: str) -> bool:
        """Make sure that there is a copy, if there is such a file; whether one had to be made.

        Raises:
            StoreUnreachableError: it is elsewhere, and cannot be read.
            OSError: the copy cannot be written.
        """
        path = self.path(file)
        if self.remote is None or path.exists():
            return False
        temporary = path.with_name(f"{secrets.token_hex(16)}.tmp")
        with new_file(temporary) as out:
            try:
                self.remote.get(file, temporary)
                os.fsync(out.fileno())
                os.rename(temporary, path)
            except FileNotFoundError:
                temporary.unlink()
                return False
            except BaseException:
                temporary.unlink()
                raise
        return True

    def drop(self, file: str) -> None:
        """Remove a file that has no row, or its draft.

        Raises:
            OSError: it cannot be removed.
            StoreUnreachableError: it cannot be removed elsewhere.
        """
        if file in self._drafts:
            # What did not fit on the disk does not now.
            with suppress(OSError):
                self._drafts.pop(file).close()
        self.unlink([file])

    def unlink(self, files: list[str]) -> None:
        """Remove files durably, and drafts of their names; raises as `drop`."""
        failed: StoreUnreachableError | None = None
        for file in files:
            # First: as long as there is something here, the next to open the store knows that it is to go.
            try:
                if self.remote is not None:
                    self.remote.remove(file)
            except StoreUnreachableError as error:
                self.path(file).touch()
                failed = error
            else:
                self._temporary(file).unlink(missing_ok=True)
                self.path(file).unlink(missing_ok=True)
        sync_folder(self.folder)
        if failed is not None:
            raise failed

    def elsewhere(self, known: set[str]) -> list[str]:
        """Files at the remote location that are none of these, and that nobody is about to place.

        Raises:
            StoreUnreachableError: they cannot be listed.
        """
        if self.remote is None:
            return []
        names = [name for name in self.remote.names() if name.endswith(".safetensors") and name not in known]
        # Asked afterwards: a draft is there before its upload begins, and is locked as long as its writer lives.
        return [name for name in names if not self._is_drafted(name)]

    def _is_drafted(self, file: str) -> bool:
        return self._temporary(file).exists() and not is_abandoned(self._temporary(file))

    def _temporary(self, file: str) -> Path:
        return self.path(file).with_suffix(".tmp")
