"""The softmax of a cross-entropy and its slope, over logits in place.

X rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def cross_entropy_slope(logits_XV: Tensor, target_X: Tensor, row_weight_X: Tensor) -> Tensor:
    """Losses (X,) float32; `logits_XV` is overwritten by the gradient of Σ row_weight · loss with respect to it."""
    loss_X = torch.empty(len(logits_XV), dtype=torch.float32, device=logits_XV.device)
    assert logits_XV.stride(1) == 1
    if len(loss_X):
        _slope[(len(loss_X),)](
            logits_XV, target_X, row_weight_X, loss_X, logits_XV.shape[1], logits_XV.stride(0), BV=4096, num_warps=8
        )
    return loss_X


@triton.jit
def _slope(logits_ptr, target_ptr, weight_ptr, loss_ptr, words, stride_x, BV: tl.constexpr):
    x = tl.program_id(0).to(tl.int64)
    row = logits_ptr + x * stride_x
    highest = -float("inf")
    total = 0.0
    for start in range(0, words, BV):
        v = start + tl.arange(0, BV)
        logit = tl.load(row + v, mask=v < words, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logit, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logit - higher), axis=0)
        highest = higher
    logsumexp = highest + tl.log(total)
    target, weight = tl.load(target_ptr + x), tl.load(weight_ptr + x)
    tl.store(loss_ptr + x, logsumexp - tl.load(row + target).to(tl.float32))
    # The target's logit must have been read before the row is overwritten.
    tl.debug_barrier()
    for start in range(0, words, BV):
        v = start + tl.arange(0, BV)
        logit = tl.load(row + v, mask=v < words, other=float("-inf")).to(tl.float32)
        slope = tl.exp(logit - logsumexp) - tl.where(v == target, 1.0, 0.0)
        tl.store(row + v, (slope * weight).to(logits_ptr.dtype.element_ty), mask=v < words)
