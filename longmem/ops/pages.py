"""Memory for rows that are read at random places, as those that a search has found are.

The processor finds an address by walking the tables of its page, unless it has been to that page of 4 kB lately. A bank
of a million tokens has some hundred thousand such pages; in pages of 2 MB it has some hundred.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE = 1 << 21
# Smaller tensors are not worth rounding up to whole pages.
_LEAST = 2 * _PAGE


def empty_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`torch.empty`; a large tensor on a CPU asks for large pages, which Linux gives where it can."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel that has none
        return torch.empty(shape, dtype=dtype)
    # The tensor keeps the memory.
    bytes_B = torch.frombuffer(memory, dtype=torch.uint8)
    first = -bytes_B.data_ptr() % _PAGE
    return bytes_B[first : first + size].view(dtype).view(shape)


def in_large_pages(rows: Tensor) -> Tensor:
    """A tensor's numbers in memory of `empty_rows`."""
    return empty_rows(rows.shape, rows.dtype, rows.device).copy_(rows)


__all__ = ["empty_rows", "in_large_pages"]
