"""Encryption at rest: a random key for each namespace, kept outside of the store, so that to destroy it is to forget.

What is sealed says so itself: it names the key that opens it. Data (segments, indexes, records) is AES-256-GCM by
blocks, under a key of its own that is derived from the namespace's; names of sources are AES-SIV, where equal names
stay equal, so that the manifest can look them up. docs/format.md describes every byte.
"""

from __future__ import annotations

import importlib
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from longmem.errors import MissingExtraError, StoreCorruptError, StoreError, StoreKeyError
from longmem.store.keys import KeyProvider

MAGIC = b"LMSEALED"
BLOCK_BYTES = 1 << 20
KEY_BYTES = 32
_ID_BYTES = _SALT_BYTES = _TAG_BYTES = 16
_HEADER_BYTES = len(MAGIC) + _ID_BYTES + _SALT_BYTES + 8


class Keys:
    """The keys of a store's namespaces, from whoever keeps them; each is asked for once.

    A key's id is derived from it, so that another key in its place is noticed.
    """

    def __init__(self, provider: KeyProvider) -> None:
        self.provider = provider
        self._known: dict[str, bytes] = {}

    def new(self) -> str:
        """Make a key and have it kept; returns its id.

        Raises:
            StoreNotWritableError: it cannot be kept.
            MissingExtraError: `cryptography` is not installed.
        """
        key = secrets.token_bytes(KEY_BYTES)
        key_id = _id_of(key)
        self.provider.put(key_id, key)
        self._known[key_id] = key
        return key_id

    def key(self, key_id: str) -> bytes:
        """Raises `StoreKeyError` if there is no such key, or another in its place."""
        if key_id not in self._known:
            key = self.provider.get(key_id)
            if key is None:
                raise StoreKeyError(
                    f"This is encrypted with key {key_id}, which is not in {self.provider}. Put it back, or say where "
                    "it is (--keys, LONGMEM_KEYS, `MemoryStore.open(…, keys=…)`). If it was destroyed, what it "
                    "encrypted is forgotten: delete the bank; `longmem encrypt` gives its name a new key."
                )
            if len(key) != KEY_BYTES or _id_of(key) != key_id:
                raise StoreKeyError(
                    f"{self.provider} holds another key than {key_id} under that name: what is encrypted cannot be "
                    "opened with it. Restore the right one. Nothing is lost in the store."
                )
            self._known[key_id] = key
        return self._known[key_id]

    def destroy(self, key_id: str) -> bool:
        """Remove a key for good; False if there is none. Processes that have read it can use it until they end."""
        self._known.pop(key_id, None)
        return self.provider.destroy(key_id)

    def has(self, key_id: str) -> bool:
        """Whether there is such a key."""
        try:
            return key_id in self._known or self.provider.get(key_id) is not None
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
