"""Where the keys of encrypted namespaces are kept: a folder, or whatever a program gives in its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from longmem.errors import StoreKeyError, StoreNotWritableError
from longmem.store.files import sync_folder


class KeyProvider(Protocol):
    """A keeper of keys: a folder (`KeyFolder`), an operating system's keyring, a key service.

    A key is 32 random bytes, named by its id, 32 hexadecimal digits. What it raises is passed on; `str` of it says in
    errors where it keeps them.
    """

    def get(self, key_id: str) -> bytes | None:
        """A key; None if there is none of that id."""
        ...

    def put(self, key_id: str, key: bytes) -> None:
        """Keep a new key: for good when this returns, since data is written with it then."""
        ...

    def destroy(self, key_id: str) -> bool:
        """Remove a key so that nobody can get it any more; False if there is none of that id."""
        ...


class KeyFolder:
    """A folder with a file for each key, which its owner alone can read. It is made with the first key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def path(self, key_id: str) -> Path:
        return self.folder / f"{key_id}.key"

    def get(self, key_id: str) -> bytes | None:
        """Raises `StoreKeyError` if its file cannot be read."""
        path = self.path(key_id)
        try:
            return bytes.fromhex(path.read_text("ascii").strip())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreKeyError(f"{path} cannot be read as a key: {error}. Restore it from a backup.") from error

    def put(self, key_id: str, key: bytes) -> None:
        """Raises `StoreNotWritableError` if the folder cannot be written."""
        try:
            made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path(key_id), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(key.hex().encode())
                file.flush()
                os.fsync(file.fileno())
            for folder in {self.folder, self.folder.parent, *(folder.parent for folder in made)}:
                sync_folder(folder)
        except OSError as error:
            raise StoreNotWritableError(
                f"No key can be kept in {self.folder}: {error}. Check its permissions, or give another folder for keys."
            ) from error

    def destroy(self, key_id: str) -> bool:
        """Overwrite and remove a key's file; raises `StoreNotWritableError` if that is not possible."""
        path = self.path(key_id)
        try:
            with open(path, "r+b") as file:
                file.write(bytes(path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()
            sync_folder(self.folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreNotWritableError(f"{path} cannot be removed: {error}. Check its permissions.") from error
        return True
