"""Encryption at rest: a random key for each namespace, kept outside of the store, so that to destroy it is to forget.

What is sealed says so itself: it names the key that opens it. Data (segments, indexes, records) is AES-256-GCM by
blocks, under a key of its own that is derived from the namespace's; names of sources are AES-SIV, where equal names
stay equal, so that the manifest can look them up. docs/format.md describes every byte.
"""

from __future__ import annotations

import importlib
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longmem.errors import MissingExtraError, StoreCorruptError, StoreError, StoreKeyError, StoreNotWritableError
from longmem.store.files import sync_folder

MAGIC = b"LMSEALED"
BLOCK_BYTES = 1 << 20
KEY_BYTES = 32
_ID_BYTES = _SALT_BYTES = _TAG_BYTES = 16
_HEADER_BYTES = len(MAGIC) + _ID_BYTES + _SALT_BYTES + 8


class Keys:
    """The folder in which the keys of a store's namespaces lie, a file each. It is made with the first key.

    A key is named by its id, 32 hexadecimal digits that are derived from it: a file that holds another key is noticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, bytes] = {}

    def path(self, key_id: str) -> Path:
        return self.folder / f"{key_id}.key"

    def new(self) -> str:
        """Make a key and keep it durably, readable by the owner alone; returns its id.

        Raises:
            StoreNotWritableError: the folder cannot be written.
            MissingExtraError: `cryptography` is not installed.
        """
        key = secrets.token_bytes(KEY_BYTES)
        key_id = _id_of(key)
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
        self._known[key_id] = key
        return key_id

    def key(self, key_id: str) -> bytes:
        """Raises `StoreKeyError` if there is no such key, or its file holds another."""
        if key_id not in self._known:
            path = self.path(key_id)
            try:
                key = bytes.fromhex(path.read_text("ascii").strip())
            except FileNotFoundError as error:
                raise StoreKeyError(
                    f"This is encrypted with key {key_id}, which is not in {self.folder}. Put its file back, or give "
                    "the folder that holds it (`MemoryStore.open(…, keys=…)`). If the key was destroyed, what it "
                    "encrypted is forgotten: delete the bank."
                ) from error
            except (OSError, ValueError) as error:
                raise StoreKeyError(f"{path} cannot be read as a key: {error}. Restore it from a backup.") from error
            if len(key) != KEY_BYTES or _id_of(key) != key_id:
                raise StoreKeyError(
                    f"{path} holds another key than {key_id}: what is encrypted cannot be opened with it. Restore the "
                    "right file. Nothing is lost in the store."
                )
            self._known[key_id] = key
        return self._known[key_id]

    def destroy(self, key_id: str) -> bool:
        """Overwrite and remove a key; False if there is none. Processes that have read it can use it until they end."""
        self._known.pop(key_id, None)
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

    def has(self, key_id: str) -> bool:
        """Whether there is such a key, and it can be used."""
        try:
            return bool(self.key(key_id))
        except StoreKeyError:
            return False

    def discard(self, key_id: str) -> None:
        """Remove a key with which nothing was encrypted."""
        with suppress(StoreError):
            self.destroy(key_id)

    def opened(self, data: bytes, name: str) -> bytes | bytearray:
        """What `Seal.data` has sealed under this name; data that is not sealed, as it is.

        Raises:
            StoreKeyError: its key is missing.
            StoreCorruptError: its bytes have changed, or were sealed under another name.
        """
        if not is_sealed(data):
            return data
        header, length = data[:_HEADER_BYTES], int.from_bytes(data[_HEADER_BYTES - 8 : _HEADER_BYTES], "little")
        blocks = max(1, -(-length // BLOCK_BYTES))
        if len(data) != _HEADER_BYTES + length + blocks * _TAG_BYTES:
            raise StoreCorruptError(
                f"{name} is damaged: {length:,} encrypted bytes were expected in {blocks:,} blocks, it has "
                f"{len(data):,} bytes in all."
            )
        start = len(MAGIC)
        key = self.key(header[start : start + _ID_BYTES].hex())
        cipher = _block_cipher(key, header[start + _ID_BYTES : start + _ID_BYTES + _SALT_BYTES])
        invalid_tag = _cryptography("exceptions").InvalidTag
        sealed, out = memoryview(data)[_HEADER_BYTES:], bytearray(length)
        for block in range(blocks):
            at, begin = block * (BLOCK_BYTES + _TAG_BYTES), block * BLOCK_BYTES
            try:
                plain = cipher.decrypt(
                    block.to_bytes(12, "little"),
                    sealed[at : at + BLOCK_BYTES + _TAG_BYTES],
                    _said(header, name, block),
                )
            except invalid_tag as error:
                raise StoreCorruptError(
                    f"{name} is damaged: its encrypted block {block} of {blocks} has changed, or belongs elsewhere."
                ) from error
            out[begin : begin + len(plain)] = plain
        return out

    def text(self, value: str | bytes, name: str) -> str:
        """What `Seal.text` has sealed under this name."""
        return value if isinstance(value, str) else self.opened(value, name).decode()

    def name(self, value: str | bytes) -> str:
        """The name of a source that `Seal.name` has sealed.

        Raises:
            StoreKeyError: its key is missing.
            StoreCorruptError: its bytes have changed.
        """
        if isinstance(value, str):
            return value
        cipher = _name_cipher(self.key(value[:_ID_BYTES].hex()))
        try:
            return cipher.decrypt(value[_ID_BYTES:], None)[1:].decode()
        except _cryptography("exceptions").InvalidTag as error:
            raise StoreCorruptError(
                "An encrypted name of a source in the manifest is damaged. Restore the manifest from a backup."
            ) from error


@dataclass(frozen=True)
class Seal:
    """How a namespace keeps what it writes: sealed with a key, or as it is without one.

    Attributes:
        key_id: None leaves all as it is.
    """

    keys: Keys
    key_id: str | None = None

    def data(self, data: bytes, name: str) -> bytes:
        """Data under the name by which it is opened: it cannot be opened under another."""
        if self.key_id is None:
            return data
        key, salt = self.keys.key(self.key_id), secrets.token_bytes(_SALT_BYTES)
        header = MAGIC + bytes.fromhex(self.key_id) + salt + len(data).to_bytes(8, "little")
        # Each has a key of its own, so that a counter is a nonce that is never used twice.
        cipher, parts = _block_cipher(key, salt), [header]
        for block, start in enumerate(range(0, max(len(data), 1), BLOCK_BYTES)):
            plain = memoryview(data)[start : start + BLOCK_BYTES]
            parts.append(cipher.encrypt(block.to_bytes(12, "little"), plain, _said(header, name, block)))
        return b"".join(parts)

    def text(self, text: str, name: str) -> str | bytes:
        return text if self.key_id is None else self.data(text.encode(), name)

    def name(self, source: str) -> str | bytes:
        """The name of a source as the manifest has it: equal names give equal bytes."""
        if self.key_id is None:
            return source
        # A byte before it: AES-SIV takes no empty text.
        sealed = _name_cipher(self.keys.key(self.key_id)).encrypt(b"\0" + source.encode(), None)
        return bytes.fromhex(self.key_id) + sealed


def is_sealed(data: bytes) -> bool:
    return len(data) >= _HEADER_BYTES and data[: len(MAGIC)] == MAGIC


def _said(header: bytes, name: str, block: int) -> bytes:
    """What a block is bound to: key, salt and length of the whole, the name, and its place."""
    return header + block.to_bytes(8, "little") + name.encode()


def _id_of(key: bytes) -> str:
    return _derived(key, b"", b"longmem key id", _ID_BYTES).hex()


def _block_cipher(key: bytes, salt: bytes) -> Any:
    aead = _cryptography("hazmat.primitives.ciphers.aead")
    return aead.AESGCM(_derived(key, salt, b"longmem blocks", KEY_BYTES))


def _name_cipher(key: bytes) -> Any:
    return _cryptography("hazmat.primitives.ciphers.aead").AESSIV(_derived(key, b"", b"longmem names", 64))


def _derived(key: bytes, salt: bytes, purpose: bytes, length: int) -> bytes:
    kdf, hashes = _cryptography("hazmat.primitives.kdf.hkdf"), _cryptography("hazmat.primitives.hashes")
    return kdf.HKDF(hashes.SHA256(), length, salt, purpose).derive(key)


def _cryptography(module: str) -> Any:
    try:
        return importlib.import_module(f"cryptography.{module}")
    except ImportError as error:
        raise MissingExtraError(
            "Encrypted namespaces need the package cryptography. Install it: pip install 'longmem[encryption]'."
        ) from error
