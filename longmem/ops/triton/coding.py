"""Queries as codes of eight bits, in one launch.

X searches, Q queries, E head size, S numbers of a code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def code_queries(query_XQE: Tensor, coder_XES: Tensor) -> tuple[Tensor, Tensor]:
    """As `longmem.ops.reference.code_queries`, but that halves are rounded up."""
    searches, queries, head_dim = query_XQE.shape
    size = coder_XES.shape[-1]
    code_XQS = torch.empty(searches, queries, size, dtype=torch.int8, device=query_XQE.device)
    unit_XQ = torch.empty(searches, queries, device=query_XQE.device)
    if code_XQS.numel():
        _code_queries[(searches * queries,)](
            query_XQE.contiguous(), coder_XES.contiguous(), code_XQS, unit_XQ, queries, head_dim, size,
            E=triton.next_power_of_2(head_dim), S=triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip
    return code_XQS, unit_XQ


@triton.jit
def _code_queries(
    query_ptr, coder_ptr, code_ptr, unit_ptr, queries, head_dim, size, E: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """One query."""
    row = tl.program_id(0).to(tl.int64)
    e, s = tl.arange(0, E), tl.arange(0, S)
    query_E = tl.load(query_ptr + row * head_dim + e, mask=e < head_dim, other=0.0).to(tl.float32)
    coder_ES = tl.load(
        coder_ptr + (row // queries * head_dim + e)[:, None] * size + s[None, :],
        mask=(e < head_dim)[:, None] & (s < size)[None, :],
        other=0.0,
    )
    coordinate_S = tl.sum(query_E[:, None] * coder_ES, axis=0)
    unit = tl.maximum(tl.max(tl.abs(coordinate_S), axis=0), 1e-30) / 127
    tl.store(unit_ptr + row, unit)
    tl.store(code_ptr + row * size + s, tl.floor(coordinate_S / unit + 0.5).to(tl.int8), mask=s < size)
