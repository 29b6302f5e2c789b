"""Segment files: immutable tensors, with the text that they remember, of one or more pieces of a bank.

H memory heads, N tokens of all pieces in a file one after the other, E head size.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import Tensor

from longmem.bank import BankEntry
from longmem.errors import SourceError, StoreCorruptError, StoreError
from longmem.store.encryption import Keys, Seal
from longmem.store.files import digest, write_parts
from longmem.store.tensors import as_parts, open_tensors

SEGMENTS = "segments"
QUARANTINE = "quarantine"
SEGMENT_VERSION = 3
READABLE = ("1", "2", "3")


@dataclass(frozen=True)
class Piece:
    """One append, as the manifest describes it: what it is, and where its tensors lie. Only the place ever changes.

    Attributes:
        char_start, chars: its place in the source.
        segment, file, sha256: the segment that holds it, its file and that file's checksum.
        first_token, first_char: where its tokens and its text begin in the segment.
        rows: how many of its tokens have keys and values; all, unless it was thinned. Only ever becomes less.
        version: of the bank, in which it came; 0 where no bank is asked.
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
    rows: int
    version: int = 0


_COLUMNS = """
piece.id, source, char_start, chars, tokens, created, segment, file, sha256, first_token, first_char,
COALESCE(thinned.rows, tokens)
"""
_PLACES = "JOIN segment ON segment.id = piece.segment LEFT JOIN thinned ON thinned.piece = piece.id"
PIECES = f"""
SELECT {_COLUMNS}, version FROM held JOIN piece ON piece.id = held.piece {_PLACES}
WHERE held.bank = ? AND version <= ? ORDER BY ordinal
"""


def pieces_of(rows: Iterable[tuple], keys: Keys) -> list[Piece]:
    """Pieces from their rows, names of sources opened."""
    return [Piece(piece, keys.name(source), *rest) for piece, source, *rest in rows]


# All that lies in one segment, whoever holds it.
IN_SEGMENT = f"""
SELECT {_COLUMNS} FROM piece {_PLACES} WHERE segment = ? ORDER BY first_token, first_char, tokens, chars
"""


@dataclass(frozen=True)
class NewSegment:
    """A segment file that is complete and synced under its temporary name.

    Attributes:
        bank: that it was written for.
        key_id: with which it is sealed; None if it is not.
    """

    file: str
    sha256: str
    bytes: int
    bank: str
    key_id: str | None


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

    @classmethod
    def of_all(cls, entries: Sequence[BankEntry]) -> Record:
        """One record for entries one after the other."""
        text = "".join(entry.text for entry in entries)
        token_ids_N, offsets_N2 = (
            torch.cat([part.cpu().long() for part in parts])
            for parts in zip(*((entry.token_ids_N, entry.offsets_N2) for entry in entries), strict=True)
        )
        return cls(text, token_ids_N, offsets_N2)

    def pack(self) -> bytes:
        """The record as manifest and segments keep it: zlib (whose checksum shows damage) over safetensors."""
        # Most tokens begin where the one before ends, and are short: both numbers fit into a byte, and compress well.
        start_N, end_N = self.offsets_N2.numpy().T
        gap_N = start_N - np.concatenate((np.zeros(1, np.int64), end_N[:-1]))[: len(start_N)]
        arrays = {
            "text": np.frombuffer(self.text.encode(), np.uint8),
            "token_ids": _narrow(self.token_ids_N.numpy()),
            "gaps": _narrow(gap_N),
            "lengths": _narrow(end_N - start_N),
        }
        return zlib.compress(save_arrays(arrays))

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Record:
        """Raises `StoreCorruptError` if the bytes have changed."""
        try:
            arrays = load_arrays(zlib.decompress(data))
            text, token_ids_N = arrays["text"].tobytes().decode(), arrays["token_ids"].astype(np.int64)
            if "offsets" in arrays:  # written before segments of version 3
                offsets_N2 = arrays["offsets"]
            else:
                length_N, gap_N = arrays["lengths"].astype(np.int64), arrays["gaps"].astype(np.int64)
                end_N = np.cumsum(gap_N + length_N)
                offsets_N2 = np.stack((end_N - length_N, end_N), axis=1)
        except (zlib.error, SafetensorError, UnicodeDecodeError, KeyError, ValueError) as error:
            raise StoreCorruptError(f"The manifest's copy of a text is damaged: {error}.") from error
        return cls(text, torch.from_numpy(token_ids_N), torch.from_numpy(offsets_N2))


def _narrow(numbers_N: np.ndarray) -> np.ndarray:
    """The same integers in the smallest type that holds them."""
    for dtype in (np.uint8, np.uint16, np.int32):
        limits = np.iinfo(dtype)
        if not numbers_N.size or (numbers_N.min() >= limits.min and numbers_N.max() <= limits.max):
            return numbers_N.astype(dtype)
    return numbers_N.astype(np.int64)


def check_text(entry: BankEntry) -> None:
    """Raise `SourceError` if text or name of the source have no UTF-8."""
    try:
        entry.source.encode()
        entry.text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"Source {entry.source!r} cannot be stored as UTF-8: {error}. Decode the text with errors='replace' first."
        ) from error


def segment_name(file: str) -> str:
    """What a segment file is sealed as, whichever folder it is in and while its name is temporary."""
    return f"segment {file.split('.')[0]}"


def write_segment(
    file: IO[bytes], name: str, entries: Sequence[BankEntry], seal: Seal, record: bytes | None = None
) -> tuple[str, int]:
    """Write and sync a segment file; returns its sha256 and its size in bytes.

    Args:
        name: of the file, by which it is sealed.
        entries: keys and values as the bank keeps them (`longmem.bank.packed`).
        seal: of the namespace that it belongs to.
        record: of all entries, packed, where that has been done.
    """

    def joined(tensors: list[Tensor]) -> Tensor:
        # Of a single piece as it is: nothing is copied that can be written from where it lies.
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)).detach().cpu().contiguous()

    pieces = [[entry.source, entry.char_start, len(entry.text), len(entry)] for entry in entries]
    tensors = {
        "keys": joined([entry.keys_HNE for entry in entries]),
        "values": joined([entry.values_HNE for entry in entries]),
        "record": torch.frombuffer(bytearray(record or Record.of_all(entries).pack()), dtype=torch.uint8),
    }
    if any(entry.kept_K is not None for entry in entries):
        first, kept = 0, []
        for entry in entries:
            kept.append(first + (torch.arange(len(entry)) if entry.kept_K is None else entry.kept_K))
            first += len(entry)
        tensors["kept"] = torch.cat(kept).to(torch.int32)
    parts = as_parts(tensors, {"longmem_segment": str(SEGMENT_VERSION), "pieces": json.dumps(pieces)})
    if seal.key_id is not None:
        parts = [seal.data(b"".join(parts), segment_name(name))]
    return write_parts(file, parts)


def read_segment(
    path: Path, pieces: Sequence[Piece], what: str, mend: str, keys: Keys, *, verify: bool
) -> list[BankEntry]:
    """Pieces of one segment as entries, as the bank keeps them, keys and values mapped from the file (or decrypted in
    memory).

    Args:
        what: what the file holds, for errors.
        mend: what to do about damage, for errors.
        verify: compare the file with its checksum.

    Raises:
        StoreCorruptError: the file is missing or damaged.
        StoreKeyError: it is encrypted, and its key is missing.
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
        with open_tensors(path, keys, segment_name(path.name)) as tensors:
            version = (tensors.metadata() or {}).get("longmem_segment")
            if version not in READABLE:
                raise StoreError(
                    f"{path} has segment format {version}; this longmem reads formats {' and '.join(READABLE)}. "
                    "Update longmem."
                )
            record = record_in(tensors)
            keys_HRE, values_HRE = tensors.get_tensor("keys"), tensors.get_tensor("values")
            kept_R = tensors.get_tensor("kept").long() if "kept" in tensors.keys() else None  # noqa: SIM118
    except FileNotFoundError as error:
        raise StoreCorruptError(f"{path} is missing. It held {what}. {mend}") from error
    except (OSError, RuntimeError, SafetensorError, UnicodeDecodeError) as error:
        # RuntimeError: torch maps the file, and says so if that has been unlinked since its checksum was compared.
        raise StoreCorruptError(f"{path} cannot be read: {error}. It holds {what}. {mend}") from error
    entries = []
    for piece in pieces:
        at = rows = slice(piece.first_token, piece.first_token + piece.tokens)
        kept_K = None
        if kept_R is not None:
            rows = slice(*torch.searchsorted(kept_R, torch.tensor([at.start, at.stop])).tolist())
            kept_K = kept_R[rows] - at.start if rows.stop - rows.start < piece.tokens else None
        entries.append(
            BankEntry(
                source=piece.source,
                text=record.text[piece.first_char : piece.first_char + piece.chars],
                char_start=piece.char_start,
                token_ids_N=record.token_ids_N[at],
                offsets_N2=record.offsets_N2[at],
                keys_HNE=keys_HRE[:, rows],
                values_HNE=values_HRE[:, rows],
                kept_K=kept_K,
            )
        )
    return entries


def record_in(tensors: Any) -> Record:
    """What the pieces of an open segment file were made from, all in one.

    Raises:
        StoreCorruptError, RuntimeError, SafetensorError, UnicodeDecodeError: it is damaged.
    """
    if "record" in tensors.keys():  # noqa: SIM118 (a safetensors file is no dictionary)
        return Record.unpack(tensors.get_tensor("record").numpy().tobytes())
    text = bytes(tensors.get_tensor("text").numpy()).decode()
    return Record(text, tensors.get_tensor("token_ids"), tensors.get_tensor("offsets"))


def header_of(path: Path, keys: Keys) -> list[list]:
    """Source, char_start, chars and tokens of each piece, as the file itself names them.

    Raises:
        OSError, RuntimeError, SafetensorError, ValueError: the file is missing, or has no such header.
    """
    with open_tensors(path, keys, segment_name(path.name)) as tensors:
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


def by_segment(pieces: Sequence[Piece]) -> dict[int, list[Piece]]:
    """Pieces of each segment; segments and pieces in the order given."""
    segments: dict[int, list[Piece]] = {}
    for piece in pieces:
        segments.setdefault(piece.segment, []).append(piece)
    return segments
