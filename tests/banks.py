"""Small banks of random rows, and what their readers are told."""

from __future__ import annotations

import torch
from torch import Tensor

from longmem.bank import BankEntry, MemoryBank
from longmem.config import BankSpec, MemoryHead, SideNetConfig

HEADS = (MemoryHead(1, 0), MemoryHead(1, 1), MemoryHead(2, 1))
SPEC = BankSpec("tiny", "0" * 64, HEADS, 4, "float32")


def config(top_k: int = 4, chunk_size: int = 1) -> SideNetConfig:
    return SideNetConfig(((1, 2), (2, 4)), HEADS, top_k=top_k, chunk_size=chunk_size)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_bank(size: int, seed: int = 0) -> MemoryBank:
    bank = MemoryBank(SPEC)
    if size:
        offsets_N2 = torch.stack([torch.arange(size), torch.arange(size) + 1], dim=1)
        keys, values = normal(3, size, 4, seed=seed), normal(3, size, 4, seed=seed + 100)
        bank.append(BankEntry("source", "x" * size, 0, torch.arange(size), offsets_N2, keys, values))
    return bank


def naive_search(query_E: Tensor, keys_NE: Tensor, top_k: int, chunk_size: int) -> list[int]:
    """Positions of the best tokens; with chunks, of all tokens of the chunks with the best mean key."""
    chunks = [keys_NE[i : i + chunk_size].mean(0) for i in range(0, len(keys_NE) - chunk_size + 1, chunk_size)]
    ranked = sorted(range(len(chunks)), key=lambda i: -float(chunks[i] @ query_E))[: top_k // chunk_size]
    return [chunk * chunk_size + i for chunk in ranked for i in range(chunk_size)]
