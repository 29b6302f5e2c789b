"""Memory in large pages is memory like any other."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import re
from pathlib import Path

import pytest
import torch

from longmem.ops import empty_rows, in_large_pages

SHAPES = [(0, 64), (3, 5), (1 << 15, 64), (3, 1 << 15, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_tensors_hold_what_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    copies = [in_large_pages(rows) for _ in range(3)]
    copies[0].zero_()
    del copies[1]
    gc.collect()
    empty = empty_rows(shape, dtype)
    assert empty.shape == rows.shape and empty.dtype == dtype and empty.is_contiguous()
    assert torch.equal(copies[1], rows) and not copies[0].any()


def test_a_system_without_large_pages_has_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert empty_rows((1 << 22,), torch.int8).shape == (1 << 22,)


def asks_for_large_pages(rows: torch.Tensor) -> bool | None:
    """Whether the memory that a tensor lies in does; None if the kernel does not tell."""
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(end, 16) for end in area.split(" ", 1)[0].split("-"))
        if first <= rows.data_ptr() < last:
            return " hg" in area.split("VmFlags:")[1] if "VmFlags:" in area else None
    raise AssertionError("a tensor lies in no memory")


def fresh_tensors_ask() -> tuple[list[bool | None], int]:
    """Whether a large and a small tensor do, and how far from the beginning of a page the large one lies."""
    large, small = empty_rows((1 << 23,), torch.int8), empty_rows((1 << 10,), torch.int8)
    return [asks_for_large_pages(rows) for rows in (large, small)], large.data_ptr() % (1 << 21)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells of Linux's memory")
def test_large_tensors_ask_for_large_pages() -> None:
    # In a process of its own: NumPy asks for its large arrays, and what they leave behind others get.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        asks, place = pool.apply(fresh_tensors_ask)
    if None in asks:
        pytest.skip("this kernel does not tell")
    assert asks == [True, False] and place == 0
