"""Which implementation runs: Triton kernels for tensors on a CUDA device, on a CPU what suits one token at a time,
plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from longmem.ops import reference
from longmem.ops.lists import Lists
from longmem.ops.pools import Pools

HAS_TRITON = importlib.util.find_spec("triton") is not None


def reads_apart(device: torch.device, top_k: int) -> bool:
    """Whether searches for so many keys on a device are kernels, which search all pools of `Pools` at once."""
    if not HAS_TRITON or device.type != "cuda":
        return False
    from longmem.ops.triton import search

    return top_k <= search.MOST


def topk_scan(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if reads_apart(query_XQE.device, top_k):
        from longmem.ops.triton import search

        return search.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X)
    if query_XQE.device.type == "cpu":
        from longmem.ops import cpu

        return cpu.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X)
    return reference.topk_scan(query_XQE, keys_PNE, top_k, length_X, pool_X)


def topk_coded(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    code_query_XQD: Tensor,
    codes_PND: Tensor | Pools,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = (query_XQE, keys_PNE, code_query_XQD, codes_PND, top_k, length_X, pool_X)
    if reads_apart(query_XQE.device, top_k):
        from longmem.ops.triton import search

        return search.topk_coded(*inputs)
    return reference.topk_coded(*inputs)


def topk_listed(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    lists: Lists,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if reads_apart(query_XQE.device, top_k):
        from longmem.ops.triton import listed

        return listed.topk_listed(query_XQE, keys_PNE, lists, top_k, length_X, pool_X)
    return reference.topk_listed(query_XQE, keys_PNE, lists, top_k, length_X, pool_X)


def code_queries(query_XQE: Tensor, coder_XES: Tensor) -> tuple[Tensor, Tensor]:
    if HAS_TRITON and query_XQE.is_cuda:
        from longmem.ops.triton import coding

        return coding.code_queries(query_XQE, coder_XES)
    return reference.code_queries(query_XQE, coder_XES)


def gather_rows(rows_PNE: Tensor | Pools, index_XQR: Tensor, pool_X: Tensor | None = None) -> Tensor:
    if HAS_TRITON and index_XQR.is_cuda and isinstance(rows_PNE, Pools):
        from longmem.ops.triton import rows

        return rows.gather_rows(rows_PNE, index_XQR, pool_X)
    return reference.gather_rows(rows_PNE, index_XQR, pool_X)


def attend_rows(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    values_PNE: Tensor | Pools,
    pool_X: Tensor,
    slot_XQR: Tensor,
    valid_XQR: Tensor,
    scaling: float,
    order_XQR: Tensor | None = None,
    discount_XQ: Tensor | None = None,
    bias_XQR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = (query_XQE, keys_PNE, values_PNE, pool_X, slot_XQR, valid_XQR, scaling, order_XQR, discount_XQ, bias_XQR)
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


for _function in (
    topk_scan,
    topk_coded,
    topk_listed,
    code_queries,
    gather_rows,
    attend_rows,
    causal_logsumexp,
    cross_entropy_slope,
):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__
