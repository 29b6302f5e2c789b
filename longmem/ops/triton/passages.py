"""Passage evidence of single tokens: sums are read and added to in one launch, and fade in another.

B batch, K memory heads of a layer, G query heads each, R retrieved, P places of the sums, E head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem.ops.joint import FoundRows, JointHeads
from longmem.ops.passages import FADING, PASSAGE, PLACES, UNIT, PassageTables

_BLOCK = 1024


def raise_rows(
    query_BKG1E: Tensor,
    local_logsumexp_BKG1: Tensor,
    found: FoundRows,
    heads: JointHeads,
    tables: PassageTables,
) -> Tensor:
    """See `longmem.ops.passages.raise_rows`."""
    batch, kv_heads, group, _, head_dim = query_BKG1E.shape
    score_BKG1R, index_BKG1R = found.score_BKGTR, found.index_BKGTR
    top_k = score_BKG1R.shape[-1]
    query_BKG1E = query_BKG1E if query_BKG1E.stride(-1) == 1 else query_BKG1E.contiguous()
    if score_BKG1R.stride() != index_BKG1R.stride() or score_BKG1R.stride(-1) != 1:
        score_BKG1R, index_BKG1R = score_BKG1R.contiguous(), index_BKG1R.contiguous()
    raised_BKG1R = torch.empty(batch, kv_heads, group, 1, top_k, device=query_BKG1E.device)
    _raise[(batch * kv_heads * group,)](
        query_BKG1E, *query_BKG1E.stride()[:3], local_logsumexp_BKG1, *local_logsumexp_BKG1.stride()[:3],
        score_BKG1R, index_BKG1R, *score_BKG1R.stride()[:3], found.bank_size_B,
        *heads.raising,
        tables.kept_BP, tables.below_BP, tables.drawn_BP, raised_BKG1R,
        kv_heads, group, top_k, head_dim, heads.scaling, float(heads.reference_size),
        PASSAGE=PASSAGE, PLACES=PLACES, FADING=FADING, UNIT=UNIT, LOWEST=tables.lowest,
        R=triton.next_power_of_2(top_k), E=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
    _fade[(batch, triton.cdiv(PLACES, _BLOCK))](
        tables.kept_BP, tables.below_BP, tables.drawn_BP, tables.takes_B,
        PLACES=PLACES, FADING=FADING, UNIT=UNIT, LOWEST=tables.lowest, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return raised_BKG1R


@triton.jit
def _raise(
    query_ptr, query_b, query_k, query_g, logsumexp_ptr, logsumexp_b, logsumexp_k, logsumexp_g,
    score_ptr, index_ptr, found_b, found_k, found_g, size_ptr,
    scale_ptr, bias_ptr, size_bias_ptr, null_key_ptr, null_bias_ptr, gain_ptr, gain_query_ptr, from_ptr,
    kept_ptr, below_ptr, drawn_ptr, raised_ptr,
    kv_heads, group, found, head_dim, scaling, reference_size,
    PASSAGE: tl.constexpr, PLACES: tl.constexpr, FADING: tl.constexpr, UNIT: tl.constexpr, LOWEST: tl.constexpr,
    R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One query."""
    row = tl.program_id(0).to(tl.int64)
    head, b = row % (kv_heads * group), row // (kv_heads * group)
    k, g = head // group, head % group
    r, e = tl.arange(0, R), tl.arange(0, E)
    real = e < head_dim
    query_E = tl.load(query_ptr + b * query_b + k * query_k + g * query_g + e, mask=real, other=0.0).to(tl.float32)
    null_E = tl.load(null_key_ptr + head * head_dim + e, mask=real, other=0.0).to(tl.float32)
    gain_E = tl.load(gain_query_ptr + head * head_dim + e, mask=real, other=0.0).to(tl.float32)
    null = tl.sum(query_E * null_E, axis=0) * scaling + tl.load(null_bias_ptr + head).to(tl.float32)
    gain = tl.sum(query_E * gain_E, axis=0) * scaling + tl.load(gain_ptr + head).to(tl.float32)
    gain = tl.maximum(gain, 0.0)
    at = b * found_b + k * found_k + g * found_g + r
    score_R = tl.load(score_ptr + at, mask=r < found, other=float("-inf"))
    passage_R = tl.load(index_ptr + at, mask=r < found, other=0) // PASSAGE
    valid_R = score_R > float("-inf")
    match_R = tl.where(valid_R, score_R * (tl.load(scale_ptr + head).to(tl.float32) * scaling), float("-inf"))

    # What each would get by its match alone.
    size = tl.maximum(tl.load(size_ptr + b).to(tl.float32), 1.0)
    bias = tl.load(bias_ptr + head).to(tl.float32)
    bias += tl.load(size_bias_ptr + head).to(tl.float32) * tl.log(size / reference_size)
    local = tl.load(logsumexp_ptr + b * logsumexp_b + k * logsumexp_k + g * logsumexp_g).to(tl.float32)
    highest = tl.maximum(local, null)
    rest = highest + tl.log(tl.exp(local - highest) + tl.exp(null - highest)) - bias
    highest = tl.maximum(tl.max(match_R, axis=0), rest)
    weight_R = tl.exp(match_R - highest)
    weight_R /= tl.sum(weight_R, axis=0) + tl.exp(rest - highest)

    sum_R = tl.zeros((R,), tl.float32)
    for beside in tl.static_range(3):
        place_R = b * PLACES + (passage_R + (PLACES + beside - 1)) % PLACES
        sum_R += FADING * tl.load(kept_ptr + place_R)
        if not LOWEST:
            sum_R += tl.load(below_ptr + place_R)
    raised_R = gain * tl.log(1.0 + sum_R * tl.exp(-tl.load(from_ptr + head).to(tl.float32)))
    tl.store(raised_ptr + row * found + r, raised_R, mask=r < found)
    unit_R = tl.floor(weight_R / UNIT + 0.5).to(tl.int32)
    tl.atomic_add(drawn_ptr + b * PLACES + passage_R % PLACES, unit_R, mask=valid_R)


@triton.jit
def _fade(
    kept_ptr, below_ptr, drawn_ptr, takes_ptr,
    PLACES: tl.constexpr, FADING: tl.constexpr, UNIT: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token has passed: some places of one row."""
    b, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, real = b * PLACES + place, place < PLACES
    kept = tl.load(kept_ptr + at, mask=real, other=0.0)
    with_own = FADING * kept + tl.load(drawn_ptr + at, mask=real, other=0).to(tl.float32) * UNIT
    tl.store(drawn_ptr + at, tl.zeros((BLOCK,), tl.int32), mask=real)
    tl.store(kept_ptr + at, tl.where(tl.load(takes_ptr + b) != 0, with_own, kept), mask=real)
    if not LOWEST:
        with_own += tl.load(below_ptr + at, mask=real, other=0.0)
    tl.store(below_ptr + at, with_own, mask=real)
