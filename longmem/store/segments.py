"""Segment files: immutable tensors, with the text that they remember, of one or more pieces of a bank.

H memory heads, N tokens of all pieces in a file one after the other, E head size.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from longmem.bank import BankEntry
from longmem.errors import SourceError, StoreCorruptError, StoreError

SEGMENTS = "segments"
QUARANTINE = "quarantine"
SEGMENT_VERSION = 2
READABLE = ("1", "2")


@dataclass(frozen=True)
class Piece:
    """One append, as the manifest describes it: what it is, and where its tensors lie. Only the place ever changes.

    Attributes:
        char_start, chars: its place in the source.
        segment, file, sha256: the segment that holds it, its file and that file's checksum.
        first_token, first_char: where its tokens and its text begin in the segment.
    """

    id: int
    source: str
    char_start: int
    chars: int
    tokens: int
    created: str
    segment: int
    file: str
    sha256: str
    first_token: int
    first_char: int


PIECES = """
SELECT piece.id, source, char_start, chars, tokens, created, segment, file, sha256, first_token, first_char
FROM piece JOIN segment ON segment.id = piece.segment WHERE piece.bank = ? ORDER BY ordinal
"""


@dataclass(frozen=True)
class NewSegment:
    """A segment file that is complete and synced under its temporary name."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Record:
    """What a piece is made from: everything but keys and values, which the backbone can make again.

    Attributes:
        token_ids_N: int64.
        offsets_N2: int64, [start, end) of each token in the source, in characters.
    """

    text: str
    token_ids_N: Tensor
    offsets_N2: Tensor

    @classmethod
    def of(cls, entry: BankEntry) -> Record:
        return cls(entry.text, entry.token_ids_N.cpu().long(), entry.offsets_N2.cpu().long())

    def pack(self) -> bytes:
        """The record as the manifest keeps it: zlib (whose checksum shows damage) over safetensors."""
        tensors = {
            "text": _bytes(self.text.encode()),
            "token_ids": self.token_ids_N.contiguous(),
            "offsets": self.offsets_N2.contiguous(),
        }
        return zlib.compress(save(tensors))

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """Raises `StoreCorruptError` if the bytes have changed."""
        try:
            tensors = load(zlib.decompress(data))
            return cls(bytes(tensors["text"].numpy()).decode(), tensors["token_ids"], tensors["offsets"])
        except (zlib.error, SafetensorError, UnicodeDecodeError, KeyError) as error:
            raise StoreCorruptError(f"The manifest's copy of a text is damaged: {error}.") from error


def check_text(entry: BankEntry) -> None:
    """Raise `SourceError` if text or name of the source have no UTF-8."""
    try:
        entry.source.encode()
        entry.text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"Source {entry.source!r} cannot be stored as UTF-8: {error}. Decode the text with errors='replace' first."
        ) from error


def write_segment(path: Path, entries: Sequence[BankEntry]) -> tuple[str, int]:
    """Write and sync a segment file; returns its sha256 and its size in bytes."""

    def joined(tensors: list[Tensor], dim: int, dtype: torch.dtype | None = None) -> Tensor:
        # safetensors takes neither strided tensors nor two views of the same memory.
        tensors = [tensor.detach().to("cpu", dtype) for tensor in tensors]
        return torch.cat(tensors, dim).clone(memory_format=torch.contiguous_format)

    pieces = [[entry.source, entry.char_start, len(entry.text), len(entry)] for entry in entries]
    data = save(
        {
            "keys": joined([entry.keys_HNE for entry in entries], 1),
            "values": joined([entry.values_HNE for entry in entries], 1),
            "token_ids": joined([entry.token_ids_N for entry in entries], 0, torch.int64),
            "offsets": joined([entry.offsets_N2 for entry in entries], 0, torch.int64),
            "text": _bytes("".join(entry.text for entry in entries).encode()),
        },
        metadata={"longmem_segment": str(SEGMENT_VERSION), "pieces": json.dumps(pieces)},
    )
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest(), len(data)


def read_segment(path: Path, pieces: Sequence[Piece], what: str, mend: str, *, verify: bool) -> list[BankEntry]:
    """Pieces of one segment as entries, their tensors mapped from the file.

    Args:
        what: what the file holds, for errors.
        mend: what to do about damage, for errors.
        verify: compare the file with its checksum.

    Raises:
        StoreCorruptError: the file is missing or damaged.
        StoreError: its format is of a later version.
    """
    try:
        if verify:
            sha256 = digest(path)
            if sha256 != pieces[0].sha256:
                raise StoreCorruptError(
                    f"{path} is damaged: its sha256 is {sha256}, the manifest says {pieces[0].sha256}. "
                    f"It holds {what}. {mend}"
                )
        with safe_open(path, framework="pt") as tensors:
            version = (tensors.metadata() or {}).get("longmem_segment")
            if version not in READABLE:
                raise StoreError(
                    f"{path} has segment format {version}; this longmem reads formats {' and '.join(READABLE)}. "
                    "Update longmem."
                )
            text = bytes(tensors.get_tensor("text").numpy()).decode()
            whole = {name: tensors.get_tensor(name) for name in ("token_ids", "offsets", "keys", "values")}
    except FileNotFoundError as error:
        raise StoreCorruptError(f"{path} is missing. It held {what}. {mend}") from error
    except (OSError, RuntimeError, SafetensorError, UnicodeDecodeError) as error:
        # RuntimeError: torch maps the file, and says so if that has been unlinked since its checksum was compared.
        raise StoreCorruptError(f"{path} cannot be read: {error}. It holds {what}. {mend}") from error
    entries = []
    for piece in pieces:
        rows = slice(piece.first_token, piece.first_token + piece.tokens)
        entries.append(
            BankEntry(
                source=piece.source,
                text=text[piece.first_char : piece.first_char + piece.chars],
                char_start=piece.char_start,
                token_ids_N=whole["token_ids"][rows],
                offsets_N2=whole["offsets"][rows],
                keys_HNE=whole["keys"][:, rows],
                values_HNE=whole["values"][:, rows],
            )
        )
    return entries


def header_of(path: Path) -> list[list]:
    """Source, char_start, chars and tokens of each piece, as the file itself names them.

    Raises:
        OSError, RuntimeError, SafetensorError, ValueError: the file is missing, or has no such header.
    """
    with safe_open(path, framework="pt") as tensors:
        metadata = tensors.metadata() or {}
        if metadata.get("longmem_segment") == "1":
            chars = len(bytes(tensors.get_tensor("text").numpy()).decode())
            tokens = tensors.get_slice("token_ids").get_shape()[0]
            return [[metadata.get("source"), int(metadata.get("char_start", -1)), chars, tokens]]
        return json.loads(metadata.get("pieces", "null"))


def named(pieces: Sequence[Piece], bank: str) -> str:
    """What a segment holds, in words."""
    sources = list(dict.fromkeys(piece.source for piece in pieces))
    if len(sources) == 1:
        return f"a part of source {sources[0]!r} of bank {bank!r}"
    more = f" and {len(sources) - 5} more" if len(sources) > 5 else ""
    return f"parts of sources {', '.join(map(repr, sources[:5]))}{more} of bank {bank!r}"


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


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
