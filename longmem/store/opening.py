"""What has to be so before a store is opened: its folder, and where its segments are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longmem.errors import StoreCorruptError, StoreError, StoreNotWritableError
from longmem.store.files import sync_folder
from longmem.store.manifest import MANIFEST, Manifest
from longmem.store.remote import Remote
from longmem.store.segments import SEGMENTS
from longmem.store.twin import TWIN


def create_folder(folder: Path) -> None:
    """Make the folder of a new store, or of one that there is.

    Raises:
        StoreNotWritableError: that is not possible.
    """
    try:
        (folder / SEGMENTS).mkdir(parents=True, exist_ok=True)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise StoreNotWritableError(
            f"No store can be created in {folder}: {error}. Give a folder that can be written."
        ) from error
    if not can_write(folder):
        raise StoreNotWritableError(
            f"No store can be created in {folder}: the folder cannot be written. "
            "Change its permissions, or give another."
        )


def can_write(path: Path) -> bool:
    """Whether this process may write a file or folder."""
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def require_empty(folder: Path) -> None:
    """Raise `StoreCorruptError` if a folder without a manifest has had one: what it names must not be swept."""
    if (folder / TWIN).exists() or any((folder / SEGMENTS).glob("*.safetensors")):
        raise StoreCorruptError(
            f"{folder / MANIFEST} is missing, and {folder} holds a store. Nothing was changed. Mend it from its second "
            f"copy: `longmem repair --store {folder}`; or restore it from a backup."
        )


def remote_of(manifest: Manifest, given: str | None, options: Mapping[str, Any] | None) -> Remote | None:
    """Where the segments of a store are, if elsewhere; a new store remembers what is given.

    Raises:
        StoreError: they are elsewhere than given, or another store's are there.
    """
    known = next((Remote(*row) for row in _located(manifest, options)), None)
    if given is None or (known is not None and known.url == given.rstrip("/")):
        return known
    new = Remote(given, options)
    if known is None and not manifest.query("SELECT 1 FROM segment LIMIT 1"):
        with manifest.transaction() as database:
            # Another process may have been first; then it is looked up again.
            if not _located(manifest, options):
                database.execute("INSERT INTO location VALUES (1, ?, ?)", (new.url, new.claim()))
        return remote_of(manifest, given, options)
    raise StoreError(
        f"The segments of the store in {manifest.folder} are in {known.url if known else 'its folder'}, not in "
        f"{new.url}. Open it without a location; to move banks, export them and import them into a new store."
    )


def _located(manifest: Manifest, options: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any] | None, str]]:
    return [(url, options, mark) for url, mark in manifest.query("SELECT url, mark FROM location")]
