"""Joint attention of memory heads over what they found, from queries to the difference it makes: one launch a layer.

A recorded step is many small launches; what a memory layer does beside its search was some thirty of them.

B batch, K memory heads of a layer, G query heads each, T query tokens, R retrieved, P pools of N keys and values,
E head size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem.ops.joint import FoundRows, JointHeads
from longmem.ops.triton.attention import attend_row
from longmem.ops.triton.rows import Source, pool_at


def joint_rows(
    query_BKGTE: Tensor,
    local_BKGTE: Tensor,
    local_logsumexp_BKGT: Tensor,
    found: FoundRows,
    heads: JointHeads,
    bias_BKGTR: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `longmem.ops.joint.joint_rows`."""
    batch, kv_heads, group, tokens, head_dim = query_BKGTE.shape
    slot_BKGTR, pool_BK = found.slot_BKGTR, found.pool_BK
    top_k, shape_BKGT, device = slot_BKGTR.shape[-1], query_BKGTE.shape[:-1], query_BKGTE.device
    keys, values = Source.of(found.keys_PNE), Source.of(found.values_PNE)
    assert keys[2:] == values[2:] and keys.rows.dtype == values.rows.dtype
    newest = heads.newest_KG is not None
    query_BKGTE, local_BKGTE = _dense_rows(query_BKGTE), _dense_rows(local_BKGTE)
    per_query = (slot_BKGTR, found.score_BKGTR, *((found.order_BKGTR,) if newest else ()))
    if len({rows.stride() for rows in per_query}) > 1 or slot_BKGTR.stride(-1) != 1:
        per_query = tuple(rows.contiguous() for rows in per_query)
    # Tokens first, as an output projection takes them.
    difference_BTKGE = torch.empty(batch, tokens, kv_heads, group, head_dim, dtype=local_BKGTE.dtype, device=device)
    mass_BKGT = torch.empty(shape_BKGT, device=device)
    log_weight_BKGTR = torch.empty(*shape_BKGT, top_k, device=device)
    if mass_BKGT.numel():
        _joint[(mass_BKGT.numel(),)](
            query_BKGTE, *query_BKGTE.stride()[:4], local_BKGTE, *local_BKGTE.stride()[:4],
            local_logsumexp_BKGT, *local_logsumexp_BKGT.stride(),
            *keys[:2], *values, pool_BK, *pool_BK.stride(),
            *per_query, *(() if newest else (None,)), *per_query[0].stride()[:4], found.bank_size_B,
            *heads.joining,
            difference_BTKGE, mass_BKGT, log_weight_BKGTR, None if bias_BKGTR is None else bias_BKGTR.contiguous(),
            kv_heads, group, tokens, top_k, head_dim, heads.scaling, float(heads.reference_size), -math.log(top_k),
            ALIGNED=Source(*values).aligned, R=triton.next_power_of_2(top_k), E=triton.next_power_of_2(head_dim),
            num_warps=4 if newest else 2,
        )  # fmt: skip
    return difference_BTKGE.permute(0, 2, 3, 1, 4), mass_BKGT, log_weight_BKGTR


def _dense_rows(rows: Tensor) -> Tensor:
    """Rows (…, E) without gaps inside a row."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton.jit
def _joint(
    query_ptr, query_b, query_k, query_g, query_t, local_ptr, local_b, local_k, local_g, local_t,
    local_logsumexp_ptr, logsumexp_b, logsumexp_k, logsumexp_g, logsumexp_t,
    keys_ptr, keys_address_ptr, values_ptr, values_address_ptr, stride_p, stride_n, pool_ptr, pool_b, pool_k,
    slot_ptr, score_ptr, order_ptr, slot_b, slot_k, slot_g, slot_t, size_ptr,
    scale_ptr, bias_ptr, size_bias_ptr, null_key_ptr, null_bias_ptr, newest_ptr, newest_query_ptr,
    difference_ptr, mass_ptr, log_weight_ptr, raised_ptr,
    kv_heads, group, tokens, found, head_dim, scaling, reference_size, even,
    ALIGNED: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One query."""
    row = tl.program_id(0).to(tl.int64)
    t, head, b = row % tokens, row // tokens % (kv_heads * group), row // (tokens * kv_heads * group)
    k, g = head // group, head % group
    r, e = tl.arange(0, R), tl.arange(0, E)
    real = e < head_dim
    query_E = tl.load(
        query_ptr + b * query_b + k * query_k + g * query_g + t * query_t + e, mask=real, other=0.0
    ).to(tl.float32)  # fmt: skip
    null_E = tl.load(null_key_ptr + head * head_dim + e, mask=real, other=0.0).to(tl.float32)
    null = tl.sum(query_E * null_E, axis=0) * scaling + tl.load(null_bias_ptr + head).to(tl.float32)
    size = tl.maximum(tl.load(size_ptr + b).to(tl.float32), 1.0)
    discount = 0.0
    if order_ptr is not None:
        asked_E = tl.load(newest_query_ptr + head * head_dim + e, mask=real, other=0.0).to(tl.float32)
        discount = tl.load(newest_ptr + head).to(tl.float32) + tl.sum(query_E * asked_E, axis=0) * scaling
    query_E *= tl.load(scale_ptr + head).to(tl.float32)

    pool = b * pool_b + k * pool_k
    keys = pool_at(keys_ptr, keys_address_ptr, pool_ptr, pool, stride_p, ALIGNED)
    values = pool_at(values_ptr, values_address_ptr, pool_ptr, pool, stride_p, ALIGNED)
    at = b * slot_b + k * slot_k + g * slot_g + t * slot_t
    slot_R = tl.load(slot_ptr + at + r, mask=r < found, other=0)
    valid_R = tl.load(score_ptr + at + r, mask=r < found, other=float("-inf")) > float("-inf")
    memory_E, memory, score_R = attend_row(
        query_E,
        keys,
        values,
        slot_R,
        valid_R,
        raised_ptr,
        row * found,
        order_ptr,
        at,
        discount,
        found,
        head_dim,
        stride_n,
        scaling,
        r,
        e,
    )

    # Of nothing, all have the same share.
    log_weight_R = tl.where(memory > float("-inf"), score_R - memory, even)
    tl.store(log_weight_ptr + row * found + r, log_weight_R, mask=r < found)
    memory += tl.load(bias_ptr + head).to(tl.float32)
    memory += tl.load(size_bias_ptr + head).to(tl.float32) * tl.log(size / reference_size)
    local = tl.load(
        local_logsumexp_ptr + b * logsumexp_b + k * logsumexp_k + g * logsumexp_g + t * logsumexp_t
    ).to(tl.float32)  # fmt: skip
    highest = tl.maximum(local, null)
    rest = highest + tl.log(tl.exp(local - highest) + tl.exp(null - highest))
    # Where nothing was found the log-sum-exp is −inf and the mass exactly 0.
    mass = tl.sigmoid(memory - rest)
    tl.store(mass_ptr + row, mass)
    local_E = tl.load(
        local_ptr + b * local_b + k * local_k + g * local_g + t * local_t + e, mask=real, other=0.0
    ).to(tl.float32)  # fmt: skip
    difference_E = mass * (memory_E - local_E)
    to = difference_ptr + ((b * tokens + t) * (kv_heads * group) + head) * head_dim
    tl.store(to + e, difference_E.to(difference_ptr.dtype.element_ty), mask=real)
