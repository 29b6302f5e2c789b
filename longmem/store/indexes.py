"""Index files: caches for searching a large bank, which may be missing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from longmem.approximate import BankIndex
from longmem.errors import StoreCorruptError
from longmem.store.encryption import Keys, Seal
from longmem.store.files import write_bytes
from longmem.store.tensors import open_tensors

INDEXES = "indexes"
INDEX_VERSION = 2


def index_name(bank_id: int | str) -> str:
    """What the index of a bank is sealed as."""
    return f"index {bank_id}"


def write_index(file: IO[bytes], index: BankIndex, bank_id: int, seal: Seal) -> None:
    """Write and sync an index file."""
    tensors, settings = index.state()
    tensors = {name: part.contiguous() for name, part in tensors.items()}
    settings["sha256"] = _digest(tensors)
    data = save(tensors, metadata={"longmem_index": str(INDEX_VERSION), "settings": json.dumps(settings)})
    write_bytes(file, seal.data(data, index_name(bank_id)))


def read_index(path: Path, again: str, keys: Keys, *, verify: bool) -> BankIndex:
    """An index from its file. `again` says in errors how it is made again."""
    try:
        with open_tensors(path, keys, index_name(path.stem)) as file:
            metadata = file.metadata() or {}
            version = metadata.get("longmem_index")
            if version != str(INDEX_VERSION):
                raise StoreCorruptError(
                    f"{path} has index format {version}; this longmem reads format {INDEX_VERSION}. {again}"
                )
            settings: dict[str, Any] = json.loads(metadata["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if verify and _digest(tensors) != settings["sha256"]:
            raise StoreCorruptError(f"{path} is damaged: its tensors do not match its checksum. {again}")
        return BankIndex.from_state(tensors, settings)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StoreCorruptError(f"{path} cannot be read as the index of a bank: {error}. {again}") from error


def _digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of tensors, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
