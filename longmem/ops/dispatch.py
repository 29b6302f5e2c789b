"""Which implementation runs: Triton kernels for tensors on a CUDA device, on a CPU what suits one token at a time,
plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from longmem.ops import reference

HAS_TRITON = importlib.util.find_spec("triton") is not None


def topk_scan(
    query_XQE: Tensor,
    keys_PNE: Tensor,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if HAS_TRITON and query_XQE.is_cuda:
        from longmem.ops.triton import search

        if top_k <= search.MOST:
            return search.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X)
    if query_XQE.device.type == "cpu":
        from longmem.ops import cpu

        return cpu.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X)
    return reference.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X)


def attend_rows(
    query_XQE: Tensor,
    keys_PNE: Tensor,
    values_PNE: Tensor,
    pool_X: Tensor,
    slot_XQR: Tensor,
    valid_XQR: Tensor,
    scaling: float,
    order_XQR: Tensor | None = None,
    discount_XQ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = (query_XQE, keys_PNE, values_PNE, pool_X, slot_XQR, valid_XQR, scaling, order_XQR, discount_XQ)
    if HAS_TRITON and query_XQE.is_cuda:
        from longmem.ops.triton import attention

        return attention.attend_rows(*inputs)
    if query_XQE.device.type == "cpu":
        from longmem.ops import cpu

        return cpu.attend_rows(*inputs)
    return reference.attend_rows(*inputs)


def causal_logsumexp(query_BKGTE: Tensor, key_BKSE: Tensor, scaling: float, window: int | None = None) -> Tensor:
    if HAS_TRITON and query_BKGTE.is_cuda:
        from longmem.ops.triton import attention

        return attention.causal_logsumexp(query_BKGTE, key_BKSE, scaling, window)
    return reference.causal_logsumexp(query_BKGTE, key_BKSE, scaling, window)


def cross_entropy_slope(logits_XV: Tensor, target_X: Tensor, row_weight_X: Tensor) -> Tensor:
    if HAS_TRITON and logits_XV.is_cuda:
        from longmem.ops.triton import loss

        return loss.cross_entropy_slope(logits_XV, target_X, row_weight_X)
    return reference.cross_entropy_slope(logits_XV, target_X, row_weight_X)


for _function in (topk_scan, attend_rows, causal_logsumexp, cross_entropy_slope):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__
