"""Search and attention over memory, and the loss.

`reference` is the plain PyTorch truth that every faster kernel (`triton`) is checked against; `dispatch` chooses.
"""

from longmem.ops.dispatch import (
    attend_rows,
    causal_logsumexp,
    code_queries,
    gather_rows,
    reads_apart,
    topk_coded,
    topk_listed,
    topk_scan,
)
from longmem.ops.joint import FoundRows, JointHeads, joins_at_once, joint_rows
from longmem.ops.lists import Lists
from longmem.ops.loss import linear_cross_entropy, linear_divergence, linear_nll
from longmem.ops.native import NativeOps
from longmem.ops.pages import empty_rows, in_large_pages
from longmem.ops.passages import FADING, PASSAGE, PLACES, UNIT, PassageTables, raise_rows
from longmem.ops.pools import Pools
from longmem.ops.reference import causal_mask, row_scores

__all__ = [
    "FADING",
    "PASSAGE",
    "PLACES",
    "UNIT",
    "FoundRows",
    "JointHeads",
    "Lists",
    "NativeOps",
    "PassageTables",
    "Pools",
    "attend_rows",
    "causal_logsumexp",
    "causal_mask",
    "code_queries",
    "empty_rows",
    "gather_rows",
    "in_large_pages",
    "joins_at_once",
    "joint_rows",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_nll",
    "raise_rows",
    "reads_apart",
    "row_scores",
    "topk_coded",
    "topk_listed",
    "topk_scan",
]
