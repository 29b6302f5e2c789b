"""Traces: whether bytes of what was forgotten are anywhere in the folder of a store.

For tests and for whoever does not take our word for it: nothing here knows how a store is laid out, except that texts
are compressed by zlib. What was written is cut into needles, and every byte of every file is compared.

H memory heads, N tokens, E head size.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from longmem.bank import BankEntry

Kind = Literal["text", "token ids", "keys", "values"]
# Bytes of text, and ids in a row, that are one needle. Shorter ones are in any text.
TEXT_BYTES = 24
IDS = 6
_HEAD = 8  # bytes by which needles are first told apart


def needles(entry: BankEntry) -> dict[bytes, Kind]:
    """What of an entry could be found again: its text, its token ids as numbers of 2, 4 and 8 bytes, and the keys and
    values of every token and head, byte for byte.

    A remainder of two needles' length contains one of them whole, wherever it begins.
    """
    found: dict[bytes, Kind] = {}
    text = entry.text.encode()
    for start in range(0, max(len(text) - TEXT_BYTES, 0) + 1, TEXT_BYTES // 2):
        found[text[start : start + TEXT_BYTES]] = "text"
    ids_N = entry.token_ids_N.cpu().numpy()
    for width in ("<u2", "<u4", "<u8"):
        for start in range(0, max(len(ids_N) - IDS, 0) + 1, IDS // 2):
            found[ids_N[start : start + IDS].astype(width).tobytes()] = "token ids"
    rows: tuple[tuple[torch.Tensor, Kind], ...] = ((entry.keys_HNE, "keys"), (entry.values_HNE, "values"))
    for rows_HNE, kind in rows:
        for row_E in rows_HNE.detach().cpu().contiguous().view(torch.uint8).flatten(0, 1).numpy():
            found[row_E.tobytes()] = kind
    return {needle: kind for needle, kind in found.items() if len(needle) >= _HEAD}


def traces(folder: Path, sought: Iterable[bytes]) -> dict[bytes, str]:
    """Which needles are somewhere in a folder, and in which file: in its bytes, or in what it holds compressed.

    Args:
        sought: of at least 8 bytes each.
    """
    by_head: dict[int, list[bytes]] = {}
    for needle in sought:
        by_head.setdefault(int.from_bytes(needle[:_HEAD], "little"), []).append(needle)
    heads = np.array(sorted(by_head), dtype=np.uint64)
    found: dict[bytes, str] = {}
    if not len(heads):
        return found
    for name, data in _contents(folder):
        for shift in range(_HEAD):
            if len(data) < shift + _HEAD:
                break
            words = np.frombuffer(data, "<u8", (len(data) - shift) // _HEAD, shift)
            place = np.searchsorted(heads, words).clip(max=len(heads) - 1)
            for word in np.flatnonzero(heads[place] == words).tolist():
                start = word * _HEAD + shift
                for needle in by_head[int(words[word])]:
                    if needle not in found and data.startswith(needle, start):
                        found[needle] = name
    return found


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a folder, and what is compressed in its databases and segments."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(folder))
        yield name, path.read_bytes()
        if path.suffix == ".safetensors":
            with suppress(SafetensorError):
                for tensor in load_file(path).values():
                    if tensor.dtype == torch.uint8:
                        yield from _inside(name, tensor.numpy().tobytes())
        if path.suffix == ".sqlite":
            # Read beside whoever has it open; what only its log knows is seen as well.
            with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True) as database:
                tables = [table for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
                for table in tables:
                    for row in database.execute(f"SELECT * FROM {table}"):
                        for value in row:
                            if isinstance(value, bytes):
                                yield from _inside(f"{name}: {table}", value)
            database.close()


def _inside(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """What is compressed."""
    with suppress(zlib.error):
        yield name, zlib.decompress(data)
