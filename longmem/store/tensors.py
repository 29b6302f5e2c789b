"""Safetensors files of a store: written from where their tensors lie; mapped as they are, or decrypted in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longmem.store.encryption import MAGIC, Keys

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@contextmanager
def open_tensors(path: Path, keys: Keys, name: str) -> Iterator[Any]:
    """A safetensors file, to be read as `safetensors.safe_open` gives it.

    Args:
        name: that it is sealed as, if it is.

    Raises:
        StoreKeyError: it is encrypted, and its key is missing.
        StoreCorruptError: it is encrypted, and has changed.
    """
    with open(path, "rb") as file:
        sealed = file.read(len(MAGIC)) == MAGIC
    if sealed:
        yield _Decrypted(bytearray(keys.opened(path.read_bytes(), name)))
    else:
        with safe_open(path, framework="pt") as tensors:
            yield tensors


def as_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """A safetensors file as `safetensors.torch.save` makes it, in parts one after the other: a header, then the memory
    of the tensors themselves, where that makes copies of all.

    Args:
        tensors: contiguous, on the CPU.
    """
    # Largest numbers first, as there: each then lies where its type may lie.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    said = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    said += b" " * (-len(said) % 8)
    return [len(said).to_bytes(8, "little") + said, *(_memory(tensors[name]) for name in names)]


def _memory(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


class _Slice:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, at: Any) -> Tensor:
        return self._tensor[at]


class _Decrypted:
    """What `safe_open` offers of a file, of bytes in memory. Its tensors share their memory."""

    def __init__(self, data: bytearray) -> None:
        size = int.from_bytes(data[:8], "little")
        self._header: dict[str, Mapping[str, Any]] = json.loads(data[8 : 8 + size])
        self._metadata = self._header.pop("__metadata__", None)
        self._data, self._start = data, 8 + size

    def metadata(self) -> Mapping[str, Any] | None:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._header)

    def get_tensor(self, name: str) -> Tensor:
        said = self._header[name]
        dtype, shape, start = _DTYPES[said["dtype"]], said["shape"], self._start + said["data_offsets"][0]
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._data, dtype=dtype, count=prod(shape), offset=start).reshape(shape)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.get_tensor(name))
