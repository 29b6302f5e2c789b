"""Pools of rows that lie apart in memory, as the banks of different users do.

P pools of at most N rows each, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pools:
    """What a tensor of pools (P, N, E) is, without being one tensor.

    Kernels on a GPU read rows by address alone, and addresses lie on the device: a search that is recorded there reads
    whatever they say when it is replayed. So `rows` may be left out there.

    Attributes:
        address_P: int64, where the first row of each pool begins, 0 if it has none; rows follow each other without
            gaps.
        most: N, rows of the largest pool.
        head_dim: E.
        dtype: of the rows.
        rows: the pools as tensors (n, E), n at most N.
        held: keeps the memory where `rows` does not; changed with the addresses by whoever changes those.
    """

    address_P: Tensor
    most: int
    head_dim: int
    dtype: torch.dtype
    rows: tuple[Tensor, ...] = ()
    held: Sequence[object] = ()

    @classmethod
    def of(cls, rows: Sequence[Tensor], device: torch.device | None = None) -> Pools:
        """Pools of tensors (n, E) of one dtype, the rows of each without gaps between them.

        Args:
            device: where the addresses go; that of the rows by default. Pinned memory of the CPU can be read by a GPU.
        """
        head_dim, dtype = rows[0].shape[1], rows[0].dtype
        for part in rows:
            if part.shape[1] != head_dim or part.dtype != dtype or (len(part) > 1 and part.stride() != (head_dim, 1)):
                raise ValueError(
                    f"a pool of shape {tuple(part.shape)}, strides {part.stride()} and {part.dtype} beside one of "
                    f"{head_dim} numbers a row in {dtype}; expected rows that follow each other without gaps"
                )
        address_P = torch.tensor([part.data_ptr() for part in rows], device=device or rows[0].device)
        return cls(address_P, max(map(len, rows)), head_dim, dtype, tuple(rows))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, N, E)."""
        return len(self.address_P), self.most, self.head_dim

    def __getitem__(self, pool: int) -> Tensor:
        """The rows (n, E) of a pool."""
        return self.rows[pool]

    def some(self, pools: slice) -> Pools:
        """Some of the pools."""
        return replace(self, address_P=self.address_P[pools], rows=self.rows[pools])

    def between(self, first: int, last: int) -> Pools:
        """Rows [first, last) of each pool."""
        address_P = self.address_P + first * self.head_dim * self.dtype.itemsize if first else self.address_P
        return replace(self, address_P=address_P, most=last - first, rows=tuple(part[first:last] for part in self.rows))
