"""Segments at a location that fsspec knows: S3, a web server, another machine. The manifest stays where it is."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longmem.errors import ConfigError, MissingExtraError, StoreError, StoreUnreachableError

_BLOCK = 1 << 20
_MARK = "longmem-store"


class Remote:
    """The folder of a location, with objects that are written once, read whole, and removed.

    It holds the segments of one store, and says so by a mark: so that a disk that is not mounted, or another's bucket,
    is not taken for one from which everything was lost, and no store removes what is another's.

    Args:
        url: of the folder, as fsspec writes it: s3://bucket/folder.
        mark: of the store; None if it is to get one (`claim`).
        options: what fsspec's file system of that kind takes; what is missing comes from the environment.

    Raises:
        MissingExtraError: the package for this kind of location is not installed.
        ConfigError: there is no such kind.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, mark: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.mark = mark
        try:
            import fsspec.core

            self._fs, self._folder = fsspec.core.url_to_fs(self.url, **(options or {}))
        except ImportError as error:
            extra = "pip install 'longmem[s3]'" if url.startswith("s3") else "install the package that it names"
            raise MissingExtraError(
                f"Segments at {url} need a package that is not installed: {error}. Do so: {extra}."
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"{url} is no location that fsspec knows: {error}. Give one such as s3://bucket/folder."
            ) from error

    def claim(self) -> str:
        """Take the folder for a new store; returns its mark.

        Raises:
            StoreError: it is another's.
        """
        self.require_free()
        self.mark = secrets.token_hex(16)
        with self._explained("Nothing can be written"):
            self._fs.makedirs(self._folder, exist_ok=True)
            self._fs.pipe_file(self._at(_MARK), self.mark.encode())
        return self.mark

    def require_free(self) -> None:
        """Raise `StoreError` if the folder is a store's already."""
        if self._mark() is not None:
            raise StoreError(
                f"{self.url} holds the segments of another store. Give a location of its own, such as another folder."
            )

    def require_mark(self) -> None:
        """Raise `StoreUnreachableError` unless this is the store's folder."""
        found = self._mark()
        if found != self.mark:
            what = "is another store's" if found else f"is not there, or has lost its file {_MARK}"
            raise StoreUnreachableError(
                f"The folder of segments, {self.url}, {what}. Nothing is taken for lost: mount it, or restore it."
            )

    def _mark(self) -> str | None:
        with self._explained("Nothing can be read"):
            self._fs.invalidate_cache()
            try:
                return self._fs.cat_file(self._at(_MARK)).decode()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, local: Path, file: str) -> None:
        """Upload a file whole.

        Raises:
            StoreUnreachableError: as all of these.
        """
        with self._explained(f"{file} was not uploaded"):
            self._fs.put_file(str(local), self._at(file))

    def get(self, file: str, local: Path) -> None:
        """Download a file.

        Raises:
            FileNotFoundError: it is not there.
        """
        with self._explained(f"{file} was not downloaded"):
            try:
                self._fs.get_file(self._at(file), str(local))
            except FileNotFoundError:
                self.require_mark()
                raise

    def size(self, file: str) -> int | None:
        """In bytes, as it is now; None if it is not there."""
        with self._explained(f"{file} was not found out about"):
            self._fs.invalidate_cache()
            try:
                return self._fs.info(self._at(file))["size"]
            except FileNotFoundError:
                self.require_mark()
                return None

    def digest(self, file: str) -> str:
        """sha256, hexadecimal, of what is there.

        Raises:
            FileNotFoundError: it is not there.
        """
        sha256 = hashlib.sha256()
        with self._explained(f"{file} was not read"), self._fs.open(self._at(file), "rb") as source:
            while block := source.read(_BLOCK):
                sha256.update(block)
        return sha256.hexdigest()

    def remove(self, file: str) -> None:
        """Remove a file, if it is there."""
        with self._explained(f"{file} was not removed"):
            try:
                self._fs.rm_file(self._at(file))
            except FileNotFoundError:
                return

    def names(self) -> list[str]:
        """Of all files that are there now."""
        self.require_mark()
        with self._explained("Nothing could be listed"):
            names = [path.rsplit("/", 1)[-1] for path in self._fs.ls(self._folder, detail=False)]
        return sorted(name for name in names if name != _MARK)

    def _at(self, file: str) -> str:
        return f"{self._folder}/{file}"

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        # Each kind of location raises errors of its own.
        except Exception as error:
            raise StoreUnreachableError(
                f"{what} ({self.url}): {type(error).__name__}: {error}. Check the network, the address and what you "
                "may do there, then try again. Nothing is lost."
            ) from error
