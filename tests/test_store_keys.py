"""Keys in a folder: theirs alone, durable, and gone when they are destroyed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longmem.errors import StoreKeyError, StoreNotWritableError
from longmem.store.keys import KeyFolder

ID, KEY = "ab" * 16, bytes(range(32))


def test_a_key_is_kept_and_destroyed(tmp_path: Path) -> None:
    keys = KeyFolder(tmp_path / "some" / "keys")
    assert keys.get(ID) is None and not keys.destroy(ID)
    keys.put(ID, KEY)
    assert keys.get(ID) == KEY == KeyFolder(keys.folder).get(ID)
    assert keys.path(ID).stat().st_mode & 0o777 == 0o600 and keys.folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(StoreNotWritableError, match="No key can be kept"):
        keys.put(ID, bytes(32))
    assert keys.get(ID) == KEY
    # A second name sees what becomes of the bytes.
    os.link(keys.path(ID), tmp_path / "second")
    assert keys.destroy(ID) and keys.get(ID) is None
    assert (tmp_path / "second").read_bytes() == bytes(64)


def test_a_file_that_is_no_key(tmp_path: Path) -> None:
    keys = KeyFolder(tmp_path)
    keys.path(ID).write_text("no key")
    with pytest.raises(StoreKeyError, match="cannot be read as a key"):
        keys.get(ID)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in its way")
    with pytest.raises(StoreNotWritableError, match="another folder for keys"):
        KeyFolder(tmp_path / "file" / "keys").put(ID, KEY)
