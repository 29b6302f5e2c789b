"""Attention over retrieved rows, read where they lie; and the log-sum-exp of causal attention.

X independent attentions (heads, rows of a batch), Q queries, P pools of N keys and values, R retrieved, E head size;
T query tokens, S local keys, K key-value heads, G query heads each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem.ops.pools import Pools
from longmem.ops.triton.rows import Source, pool_at


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
    """As `longmem.ops.reference.attend_rows`: outputs (X, Q, E) and log-sum-exps (X, Q).

    The gradient reaches queries, discounts and biases alone: what is remembered is frozen.
    """
    if order_XQR is None:
        discount_XQ = None
    keys, values = Source.of(keys_PNE), Source.of(values_PNE)
    assert keys[2:] == values[2:] and keys.rows.dtype == values.rows.dtype
    return _AttendRows.apply(
        query_XQE, *keys[:2], *values, pool_X, slot_XQR, valid_XQR, scaling, order_XQR, discount_XQ, bias_XQR
    )


class _AttendRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query_XQE, keys, keys_address_P, values, values_address_P, stride_p, stride_n,
        pool_X, slot_XQR, valid_XQR, scaling, order_XQR, discount_XQ, bias_XQR,
    ):  # fmt: skip
        searches, queries, head_dim = query_XQE.shape
        found = slot_XQR.shape[-1]
        query_XQE, slot_XQR, valid_XQR = query_XQE.contiguous(), slot_XQR.contiguous(), valid_XQR.contiguous()
        newest = discount_XQ is not None
        inputs = (
            query_XQE, keys, keys_address_P, values, values_address_P, pool_X.contiguous(), slot_XQR, valid_XQR,
            order_XQR.contiguous() if newest else None, discount_XQ.float().contiguous() if newest else None,
            None if bias_XQR is None else bias_XQR.float().contiguous(),
        )  # fmt: skip
        output_XQE = torch.empty_like(query_XQE)
        logsumexp_XQ = torch.empty(searches, queries, dtype=torch.float32, device=query_XQE.device)
        ctx.sizes = (queries, found, head_dim, stride_p, stride_n, scaling)
        ctx.blocks = {
            "ALIGNED": Source(values, values_address_P, stride_p, stride_n).aligned,
            "R": triton.next_power_of_2(found),
            "E": triton.next_power_of_2(head_dim),
        }
        ctx.warps = 4 if newest else 2
        if logsumexp_XQ.numel():
            _attend_forward[(searches * queries,)](
                *inputs, output_XQE, logsumexp_XQ, *ctx.sizes, **ctx.blocks, num_warps=ctx.warps
            )
        ctx.save_for_backward(*inputs, output_XQE, logsumexp_XQ)
        return output_XQE, logsumexp_XQ

    @staticmethod
    def backward(ctx, grad_output_XQE, grad_logsumexp_XQ):  # type: ignore[override]
        query_XQE, *_, discount_XQ, bias_XQR, _, _ = ctx.saved_tensors
        grad_query_XQE = torch.empty_like(query_XQE)
        grad_discount_XQ = None if discount_XQ is None else torch.empty_like(discount_XQ)
        grad_bias_XQR = None if bias_XQR is None else torch.empty_like(bias_XQR)
        programs = grad_logsumexp_XQ.numel()
        if programs:
            _attend_backward[(programs,)](
                *ctx.saved_tensors, grad_output_XQE.contiguous(), grad_logsumexp_XQ.contiguous(), grad_query_XQE,
                grad_discount_XQ, grad_bias_XQR, *ctx.sizes, **ctx.blocks, num_warps=ctx.warps,
            )  # fmt: skip
        return grad_query_XQE, *[None] * 11, grad_discount_XQ, grad_bias_XQR


@triton.jit
def _gather(begin, slot_R, valid_R, stride_n, head_dim, e):
    """Rows (R, E) of a pool, in float32."""
    at = begin + slot_R[:, None] * stride_n + e[None, :]
    return tl.load(at, mask=valid_R[:, None] & (e < head_dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _normalised(score_R):
    """Softmax of scores, and their log-sum-exp; 0 and −inf where all are −inf."""
    highest = tl.max(score_R, axis=0)
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    weight_R = tl.exp(score_R - highest)
    total = tl.sum(weight_R, axis=0)
    logsumexp = tl.where(total > 0.0, highest + tl.log(tl.maximum(total, 1e-30)), float("-inf"))
    return weight_R / tl.maximum(total, 1e-30), logsumexp


@triton.jit
def _newer(order_R, r):
    """(R, R) bool: whether the row of the second dimension is newer than that of the first."""
    same = order_R[None, :] == order_R[:, None]
    return (order_R[None, :] > order_R[:, None]) | (same & (r[None, :] < r[:, None]))


@triton.jit
def attend_row(
    query_E, keys, values, slot_R, valid_R, bias_ptr, bias_at, order_ptr, at, discount, found, head_dim, stride_n,
    scaling, r, e
):  # fmt: skip
    """Attention of one query over rows of its pools: output (E,), log-sum-exp and scores (R,). Scores are raised if
    there are biases (which begin at `bias_at`), and discounted if there are orders (which begin at `at`)."""
    key_RE = _gather(keys, slot_R, valid_R, stride_n, head_dim, e)
    value_RE = _gather(values, slot_R, valid_R, stride_n, head_dim, e)
    score_R = tl.where(valid_R, tl.sum(key_RE * query_E[None, :], axis=1) * scaling, float("-inf"))
    if bias_ptr is not None:
        score_R += tl.load(bias_ptr + bias_at + r, mask=r < found, other=0.0)
    weight_R, logsumexp = _normalised(score_R)
    if order_ptr is not None:
        order_R = tl.load(order_ptr + at + r, mask=r < found, other=0)
        newer_R = tl.sum(tl.where(_newer(order_R, r), weight_R[None, :], 0.0), axis=1)
        score_R -= discount * newer_R
        weight_R, logsumexp = _normalised(score_R)
    return tl.sum(weight_R[:, None] * value_RE, axis=0), logsumexp, score_R


@triton.jit
def _attend_forward(
    query_ptr, keys_ptr, keys_address_ptr, values_ptr, values_address_ptr, pool_ptr, slot_ptr, valid_ptr,
    order_ptr, discount_ptr, bias_ptr, output_ptr, logsumexp_ptr, queries, found, head_dim, stride_p, stride_n, scaling,
    ALIGNED: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    xq = tl.program_id(0).to(tl.int64)
    r, e = tl.arange(0, R), tl.arange(0, E)
    keys = pool_at(keys_ptr, keys_address_ptr, pool_ptr, xq // queries, stride_p, ALIGNED)
    values = pool_at(values_ptr, values_address_ptr, pool_ptr, xq // queries, stride_p, ALIGNED)
    slot_R = tl.load(slot_ptr + xq * found + r, mask=r < found, other=0)
    valid_R = tl.load(valid_ptr + xq * found + r, mask=r < found, other=0) != 0
    query_E = tl.load(query_ptr + xq * head_dim + e, mask=e < head_dim, other=0.0).to(tl.float32)
    discount = 0.0
    if discount_ptr is not None:
        discount = tl.load(discount_ptr + xq)
    output_E, logsumexp, _ = attend_row(
        query_E,
        keys,
        values,
        slot_R,
        valid_R,
        bias_ptr,
        xq * found,
        order_ptr,
        xq * found,
        discount,
        found,
        head_dim,
        stride_n,
        scaling,
        r,
        e,
    )
    tl.store(output_ptr + xq * head_dim + e, output_E.to(output_ptr.dtype.element_ty), mask=e < head_dim)
    tl.store(logsumexp_ptr + xq, logsumexp)


@triton.jit
def _attend_backward(
    query_ptr, keys_ptr, keys_address_ptr, values_ptr, values_address_ptr, pool_ptr, slot_ptr, valid_ptr,
    order_ptr, discount_ptr, bias_ptr, output_ptr, logsumexp_ptr,
    grad_output_ptr, grad_logsumexp_ptr, grad_query_ptr, grad_discount_ptr, grad_bias_ptr,
    queries, found, head_dim, stride_p, stride_n, scaling, ALIGNED: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    xq = tl.program_id(0).to(tl.int64)
    r, e = tl.arange(0, R), tl.arange(0, E)
    keys = pool_at(keys_ptr, keys_address_ptr, pool_ptr, xq // queries, stride_p, ALIGNED)
    values = pool_at(values_ptr, values_address_ptr, pool_ptr, xq // queries, stride_p, ALIGNED)
    slot_R = tl.load(slot_ptr + xq * found + r, mask=r < found, other=0)
    valid_R = tl.load(valid_ptr + xq * found + r, mask=r < found, other=0) != 0
    query_E = tl.load(query_ptr + xq * head_dim + e, mask=e < head_dim, other=0.0).to(tl.float32)
    output_E = tl.load(output_ptr + xq * head_dim + e, mask=e < head_dim, other=0.0).to(tl.float32)
    grad_E = tl.load(grad_output_ptr + xq * head_dim + e, mask=e < head_dim, other=0.0).to(tl.float32)
    key_RE = _gather(keys, slot_R, valid_R, stride_n, head_dim, e)
    value_RE = _gather(values, slot_R, valid_R, stride_n, head_dim, e)
    logsumexp = tl.load(logsumexp_ptr + xq)
    logsumexp = tl.where(logsumexp > float("-inf"), logsumexp, 0.0)
    score_R = tl.where(valid_R, tl.sum(key_RE * query_E[None, :], axis=1) * scaling, float("-inf"))
    if bias_ptr is not None:
        score_R += tl.load(bias_ptr + xq * found + r, mask=r < found, other=0.0)
    # d output / d score_r = w_r (v_r − output), d logsumexp / d score_r = w_r
    slope_R = tl.sum(value_RE * grad_E[None, :], axis=1) - tl.sum(output_E * grad_E) + tl.load(grad_logsumexp_ptr + xq)
    if discount_ptr is not None:
        # With c the discount, a the weights before it, n_r = Σ a_s over the newer s:
        # dn_r / d score_s = a_s ([s newer] − n_r)
        discount = tl.load(discount_ptr + xq)
        before_R, _ = _normalised(score_R)
        newer_RR = _newer(tl.load(order_ptr + xq * found + r, mask=r < found, other=0), r)
        newer_R = tl.sum(tl.where(newer_RR, before_R[None, :], 0.0), axis=1)
        grad_R = tl.exp(score_R - discount * newer_R - logsumexp) * slope_R
        grad_discount = -tl.sum(grad_R * newer_R, axis=0)
        tl.store(grad_discount_ptr + xq, grad_discount)
        older_R = tl.sum(tl.where(newer_RR, grad_R[:, None], 0.0), axis=0)
        grad_R = grad_R - discount * before_R * (older_R + grad_discount)
    else:
        grad_R = tl.exp(score_R - logsumexp) * slope_R
    if bias_ptr is not None:
        tl.store(grad_bias_ptr + xq * found + r, grad_R, mask=r < found)
    grad_query_E = tl.sum(grad_R[:, None] * key_RE, axis=0) * scaling
    tl.store(grad_query_ptr + xq * head_dim + e, grad_query_E.to(grad_query_ptr.dtype.element_ty), mask=e < head_dim)


def causal_logsumexp(query_BKGTE: Tensor, key_BKSE: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """As `longmem.ops.reference.causal_logsumexp`: (B, K, G, T) float32, never holding the scores."""
    return _CausalLogsumexp.apply(query_BKGTE, key_BKSE, scaling, window)


class _CausalLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_BKGTE, key_BKSE, scaling, window):
        group, tokens, head_dim = query_BKGTE.shape[2:]
        keys = key_BKSE.shape[2]
        query_BKGTE, key_BKSE = query_BKGTE.contiguous(), key_BKSE.contiguous()
        logsumexp_BKGT = torch.empty(query_BKGTE.shape[:4], dtype=torch.float32, device=query_BKGTE.device)
        ctx.sizes = (group, tokens, keys, keys + 1 if window is None else window, head_dim, scaling)
        ctx.blocks = {
            "E": max(16, triton.next_power_of_2(head_dim)),
            "BT": 64,
            "BS": 64,
            "PRECISION": "ieee" if query_BKGTE.dtype == torch.float32 else "tf32",
        }
        grid = (triton.cdiv(tokens, 64), logsumexp_BKGT[..., 0].numel())
        if logsumexp_BKGT.numel():
            _logsumexp[grid](query_BKGTE, key_BKSE, logsumexp_BKGT, *ctx.sizes, **ctx.blocks, num_warps=4)
        ctx.save_for_backward(query_BKGTE, key_BKSE, logsumexp_BKGT)
        return logsumexp_BKGT

    @staticmethod
    def backward(ctx, grad_BKGT):  # type: ignore[override]
        query_BKGTE, key_BKSE, logsumexp_BKGT = ctx.saved_tensors
        grad_query_BKGTE, grad_key_BKSE = torch.empty_like(query_BKGTE), torch.empty_like(key_BKSE)
        inputs = (query_BKGTE, key_BKSE, logsumexp_BKGT, grad_BKGT.contiguous())
        group, tokens, keys = ctx.sizes[:3]
        heads = key_BKSE.shape[0] * key_BKSE.shape[1]
        if grad_BKGT.numel():
            _logsumexp_grad_query[(triton.cdiv(tokens, 64), heads * group)](
                *inputs, grad_query_BKGTE, *ctx.sizes, **ctx.blocks, num_warps=4
            )
            _logsumexp_grad_key[(triton.cdiv(keys, 64), heads)](
                *inputs, grad_key_BKSE, *ctx.sizes, **ctx.blocks, num_warps=4
            )
        else:
            grad_key_BKSE.zero_()
        return grad_query_BKGTE, grad_key_BKSE, None, None


@triton.jit
def _rows(ptr, head, index, count, head_dim, e):
    """Rows (len(index), E) of a head's matrix of `count` rows."""
    at = ptr + (head.to(tl.int64) * count + index)[:, None] * head_dim + e[None, :]
    return tl.load(at, mask=(index < count)[:, None] & (e < head_dim)[None, :], other=0.0)


@triton.jit
def _causal_scores(query, key, t, s, tokens, keys, window, scaling, PRECISION: tl.constexpr):
    """(BT, BS) scaled scores, −inf where a query must not look. The last query stands at the last key."""
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
    distance = (t + keys - tokens)[:, None] - s[None, :]
    seen = (distance >= 0) & (distance < window) & (s < keys)[None, :] & (t < tokens)[:, None]
    return tl.where(seen, score, float("-inf"))


@triton.jit
def _logsumexp(
    query_ptr, key_ptr, out_ptr, group, tokens, keys, window, head_dim, scaling,
    E: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    t, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, E)
    query = _rows(query_ptr, head, t, tokens, head_dim, e)
    highest = tl.full((BT,), -1e30, tl.float32)
    total = tl.zeros((BT,), tl.float32)
    shift = keys - tokens
    first = tl.maximum(0, tl.program_id(0) * BT + shift - window + 1) // BS * BS
    last = tl.minimum(keys, (tl.program_id(0) + 1) * BT + shift)
    for start in range(first, last, BS):
        s = start + tl.arange(0, BS)
        key = _rows(key_ptr, head // group, s, keys, head_dim, e)
        score = _causal_scores(query, key, t, s, tokens, keys, window, scaling, PRECISION)
        higher = tl.maximum(highest, tl.max(score, axis=1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(score - higher[:, None]), axis=1)
        highest = higher
    tl.store(out_ptr + head.to(tl.int64) * tokens + t, highest + tl.log(total), mask=t < tokens)


@triton.jit
def _logsumexp_grad_query(
    query_ptr, key_ptr, logsumexp_ptr, grad_ptr, out_ptr, group, tokens, keys, window, head_dim, scaling,
    E: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    t, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, E)
    query = _rows(query_ptr, head, t, tokens, head_dim, e)
    logsumexp = tl.load(logsumexp_ptr + head.to(tl.int64) * tokens + t, mask=t < tokens, other=0.0)
    grad = tl.load(grad_ptr + head.to(tl.int64) * tokens + t, mask=t < tokens, other=0.0)
    out = tl.zeros((BT, E), tl.float32)
    shift = keys - tokens
    first = tl.maximum(0, tl.program_id(0) * BT + shift - window + 1) // BS * BS
    last = tl.minimum(keys, (tl.program_id(0) + 1) * BT + shift)
    for start in range(first, last, BS):
        s = start + tl.arange(0, BS)
        key = _rows(key_ptr, head // group, s, keys, head_dim, e)
        score = _causal_scores(query, key, t, s, tokens, keys, window, scaling, PRECISION)
        slope = tl.exp(score - logsumexp[:, None]) * grad[:, None]
        out += tl.dot(slope.to(key.dtype), key, input_precision=PRECISION)
    at = out_ptr + (head.to(tl.int64) * tokens + t)[:, None] * head_dim + e[None, :]
    keep = (t < tokens)[:, None] & (e < head_dim)[None, :]
    tl.store(at, (out * scaling).to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _logsumexp_grad_key(
    query_ptr, key_ptr, logsumexp_ptr, grad_ptr, out_ptr, group, tokens, keys, window, head_dim, scaling,
    E: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    s, e = tl.program_id(0) * BS + tl.arange(0, BS), tl.arange(0, E)
    key = _rows(key_ptr, kv_head, s, keys, head_dim, e)
    out = tl.zeros((BS, E), tl.float32)
    shift = keys - tokens
    first = tl.maximum(0, tl.program_id(0) * BS - shift) // BT * BT
    last = tl.minimum(tokens, (tl.program_id(0) + 1) * BS - shift + window)
    for g in range(0, group):
        head = kv_head * group + g
        for start in range(first, last, BT):
            t = start + tl.arange(0, BT)
            query = _rows(query_ptr, head, t, tokens, head_dim, e)
            logsumexp = tl.load(logsumexp_ptr + head.to(tl.int64) * tokens + t, mask=t < tokens, other=0.0)
            grad = tl.load(grad_ptr + head.to(tl.int64) * tokens + t, mask=t < tokens, other=0.0)
            score = _causal_scores(query, key, t, s, tokens, keys, window, scaling, PRECISION)
            slope = tl.exp(score - logsumexp[:, None]) * grad[:, None]
            out += tl.dot(tl.trans(slope).to(query.dtype), query, input_precision=PRECISION)
    at = out_ptr + (kv_head.to(tl.int64) * keys + s)[:, None] * head_dim + e[None, :]
    keep = (s < keys)[:, None] & (e < head_dim)[None, :]
    tl.store(at, (out * scaling).to(out_ptr.dtype.element_ty), mask=keep)
