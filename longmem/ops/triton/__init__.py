"""Triton kernels; each does what its twin in `longmem.ops.reference` does."""

from longmem.ops.triton.attention import attend_rows, causal_logsumexp
from longmem.ops.triton.coding import code_queries
from longmem.ops.triton.joint import joint_rows
from longmem.ops.triton.listed import topk_listed
from longmem.ops.triton.loss import cross_entropy_slope
from longmem.ops.triton.passages import raise_rows
from longmem.ops.triton.rows import gather_rows
from longmem.ops.triton.search import topk_coded, topk_scan

__all__ = [
    "attend_rows",
    "causal_logsumexp",
    "code_queries",
    "cross_entropy_slope",
    "gather_rows",
    "joint_rows",
    "raise_rows",
    "topk_coded",
    "topk_listed",
    "topk_scan",
]
