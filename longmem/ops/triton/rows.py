"""Where kernels find rows: in pools of one tensor, or in pools that lie apart and are known by their addresses.

X searches, Q queries, P pools of N rows, R rows of each query, E head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem.ops.pools import Pools


class Source(NamedTuple):
    """Rows as kernels take them.

    Attributes:
        rows: a tensor that begins where the pools do; of addresses, only its dtype means something.
        address_P: where each pool begins, or None.
        stride_p, stride_n: from pool to pool (0 for addresses) and from row to row.
    """

    rows: Tensor
    address_P: Tensor | None
    stride_p: int
    stride_n: int

    @classmethod
    def of(cls, rows_PNE: Tensor | Pools) -> Source:
        if isinstance(rows_PNE, Pools):
            return cls(rows_PNE.address_P.view(rows_PNE.dtype), rows_PNE.address_P, 0, rows_PNE.head_dim)
        if rows_PNE.stride(2) != 1:
            rows_PNE = rows_PNE.contiguous()
        return cls(rows_PNE, None, rows_PNE.stride(0), rows_PNE.stride(1))

    @property
    def aligned(self) -> bool:
        """Whether every row begins at a multiple of 16 bytes: memory does, wherever it is taken."""
        return self.stride_n * self.rows.element_size() % 16 == 0


@triton.jit
def pool_of(pool_ptr, x):
    """Which pool search x reads: its own where `pool_ptr` is None."""
    return x if pool_ptr is None else tl.load(pool_ptr + x)


@triton.jit
def pool_at(rows_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED: tl.constexpr):
    """Where the pool of search x begins."""
    pool = pool_of(pool_ptr, x)
    if address_ptr is None:
        begin = rows_ptr + pool.to(tl.int64) * stride_p
    else:
        begin = tl.load(address_ptr + pool).to(tl.pointer_type(rows_ptr.dtype.element_ty))
        if ALIGNED:
            begin = tl.multiple_of(begin, 16)
    return begin


def gather_rows(rows_PNE: Tensor | Pools, index_XQR: Tensor, pool_X: Tensor | None = None) -> Tensor:
    """As `longmem.ops.reference.gather_rows`: (X, Q, R, E)."""
    searches, head_dim = len(index_XQR), rows_PNE.shape[2]
    out_XQRE = torch.empty(*index_XQR.shape, head_dim, dtype=rows_PNE.dtype, device=index_XQR.device)
    if index_XQR.numel():
        source, found = Source.of(rows_PNE), index_XQR[0].numel()
        _gather_rows[(triton.cdiv(found, 32), searches)](
            source.rows, source.address_P, None if pool_X is None else pool_X.contiguous(), index_XQR.contiguous(),
            out_XQRE, found, source.stride_p, source.stride_n, head_dim,
            ALIGNED=source.aligned, E=triton.next_power_of_2(head_dim), ROWS=32,
        )  # fmt: skip
    return out_XQRE


@triton.jit
def _gather_rows(
    rows_ptr, address_ptr, pool_ptr, index_ptr, out_ptr, found, stride_p, stride_n, head_dim,
    ALIGNED: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(1)
    r, e = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    begin = pool_at(rows_ptr, address_ptr, pool_ptr, x, stride_p, ALIGNED)
    index = tl.load(index_ptr + x.to(tl.int64) * found + r, mask=r < found, other=0)
    mask = (r < found)[:, None] & (e < head_dim)[None, :]
    there = found
    if address_ptr is not None:
        # What a query did not find is row 0, which an empty pool does not have.
        there = tl.where(tl.load(address_ptr + pool_of(pool_ptr, x)) != 0, found, 0)
    row = tl.load(begin + index[:, None] * stride_n + e[None, :], mask=mask & (r < there)[:, None], other=0.0)
    tl.store(out_ptr + (x.to(tl.int64) * found + r)[:, None] * head_dim + e[None, :], row, mask=mask)
