"""Search and attention over memory, and the loss.

`reference` is the plain PyTorch truth that every faster kernel (`triton`) is checked against; `dispatch` chooses.
"""

from longmem.ops.dispatch import attend_rows, causal_logsumexp, topk_scan
from longmem.ops.loss import linear_cross_entropy, linear_nll
from longmem.ops.reference import causal_mask, gather_rows, row_scores

__all__ = [
    "attend_rows",
    "causal_logsumexp",
    "causal_mask",
    "gather_rows",
    "linear_cross_entropy",
    "linear_nll",
    "row_scores",
    "topk_scan",
]
