"""Segment files: immutable tensors with the text that they remember, in one safetensors file.

H memory heads, N tokens, E head size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from longmem.bank import BankEntry
from longmem.errors import SourceError, StoreCorruptError, StoreError

SEGMENTS = "segments"
SEGMENT_VERSION = 1


@dataclass(frozen=True)
class Segment:
    """The columns of a manifest row that a bank keeps in memory."""

    id: int
    source: str
    char_start: int
    chars: int
    tokens: int
    file: str
    sha256: str
    created: str


SEGMENT_COLUMNS = ", ".join(field.name for field in dataclasses.fields(Segment))


def encode_text(entry: BankEntry) -> bytes:
    """The text of an entry in UTF-8.

    Raises:
        SourceError: text or name of the source have no UTF-8.
    """
    try:
        entry.source.encode()
        return entry.text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"Source {entry.source!r} cannot be stored as UTF-8: {error}. Decode the text with errors='replace' first."
        ) from error


def write_segment(path: Path, entry: BankEntry, text: bytes) -> tuple[str, int]:
    """Write and sync a segment file; returns its sha256 and its size in bytes."""

    def owned(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        # safetensors takes neither strided tensors nor two views of the same memory.
        return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)

    data = save(
        {
            "keys": owned(entry.keys_HNE),
            "values": owned(entry.values_HNE),
            "token_ids": owned(entry.token_ids_N, torch.int64),
            "offsets": owned(entry.offsets_N2, torch.int64),
            "text": torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8),
        },
        metadata={"longmem_segment": str(SEGMENT_VERSION), "source": entry.source, "char_start": str(entry.char_start)},
    )
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest(), len(data)


def read_segment(path: Path, segment: Segment, what: str, *, verify: bool) -> BankEntry:
    """A segment as an entry, its tensors mapped from the file. `what` says in errors what would be lost."""
    try:
        if verify:
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != segment.sha256:
                raise StoreCorruptError(
                    f"{path} is damaged: its sha256 is {sha256}, the manifest says {segment.sha256}. It holds {what}. "
                    "Restore it from a backup, or delete the bank."
                )
        with safe_open(path, framework="pt") as tensors:
            version = (tensors.metadata() or {}).get("longmem_segment")
            if version != str(SEGMENT_VERSION):
                raise StoreError(
                    f"{path} has segment format {version}; this longmem reads format {SEGMENT_VERSION}. Update longmem."
                )
            return BankEntry(
                source=segment.source,
                text=bytes(tensors.get_tensor("text").numpy()).decode(),
                char_start=segment.char_start,
                token_ids_N=tensors.get_tensor("token_ids"),
                offsets_N2=tensors.get_tensor("offsets"),
                keys_HNE=tensors.get_tensor("keys"),
                values_HNE=tensors.get_tensor("values"),
            )
    except FileNotFoundError as error:
        raise StoreCorruptError(
            f"{path} is missing. It held {what}. Restore it from a backup, or delete the bank."
        ) from error
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise StoreCorruptError(
            f"{path} cannot be read: {error}. It holds {what}. Restore it from a backup, or delete the bank."
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames and unlinks in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
