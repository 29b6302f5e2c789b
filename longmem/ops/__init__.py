"""Search and attention over memory.

`reference` is the plain PyTorch truth that every faster kernel is checked against.
"""

from longmem.ops.reference import gather_rows, linear_cross_entropy, linear_nll, topk_scan

__all__ = ["gather_rows", "linear_cross_entropy", "linear_nll", "topk_scan"]
