"""Exact search on a CPU: keys are ranked in bfloat16, the best are scored again in float32, a bound proves the rest.
And attention, over what was found and among the tokens of a window.

A search of one token is bound by how fast keys can be read, so they are read once and as they are stored.

X searches, Q queries, P pools of N keys, n of a block, E head size, M members of the best groups, C candidates,
R retrieved. In a window: B batch, T tokens, t of a block, S that the block sees, H query heads, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from longmem.ops import reference
from longmem.ops.pools import Pools

# Up to so many queries of a search (those of one token), reading the keys is what costs; beyond, the products are.
FEW = 16
# Of many queries so many at a time: enough for the products, and their scores of 65,536 keys still lie in the cache.
MANY = 64
# Candidates for each retrieved key. With keys of real text three prove every query to be exact.
SPARE = 4
# bfloat16 has eight significant bits: rounding to it changes a number by at most this share.
ROUNDING = 2.0**-8
# Keys are first ranked by the best of this many: the C best keys lie in the C best groups.
GROUP = 16
# Keys scored at a time: their scores are still in the cache when they are ranked, and memory stays bounded.
BLOCK = 1 << 18
# Tokens of a window that attend at a time: fewer compute less above the diagonal, more make larger products.
ROWS = 64


def topk_scan(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `top_k` keys of largest dot product for each query: `reference.topk_scan`, faster for bfloat16 keys.

    Exact: it finds what float32 scores of the keys and queries as given would find. Where that cannot be proved (many
    equal keys, say) the query is searched again by the reference.

    Args:
        query_XQE: queries, on the CPU.
        keys_PNE: pools of keys, on the CPU, any strides; none is copied. Keys in float32, and all keys on a processor
            that has no bfloat16 products, are left to the reference.
        top_k: R; may exceed N.
        length_X: only the first `length_X[x]` keys of each search count; all by default.
        pool_X: which pool each search reads; its own by default (P = X).

    Returns:
        index_XQR (int64, best first) and score_XQR (float32). Where fewer than R keys exist the
        score is −inf and the index 0.
    """
    searches, queries, _ = query_XQE.shape
    plainly = keys_PNE.dtype != torch.bfloat16 or queries == 0 or not has_bfloat16_products()
    search = _search_plainly if plainly else _scan if queries <= FEW else _scan_many
    lengths = [keys_PNE.shape[1]] * searches if length_X is None else length_X.tolist()
    pools = range(searches) if pool_X is None else pool_X.tolist()
    index_XQR = torch.empty(searches, queries, top_k, dtype=torch.int64)
    score_XQR = torch.empty(searches, queries, top_k)
    for x, (pool, length) in enumerate(zip(pools, lengths, strict=True)):
        query_QE = query_XQE[x] if plainly else query_XQE[x].float()
        index_XQR[x], score_XQR[x] = search(query_QE, keys_PNE[pool][:length], top_k)
    return index_XQR, score_XQR


def has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 itself; where it does not, float32 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _scan(query_QE: Tensor, keys_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if len(keys_NE) <= SPARE * top_k:
        return _search_plainly(query_QE, keys_NE, top_k)
    parts = [query_QE.bfloat16()]
    left_QE = query_QE - parts[0].float()
    while left_QE.any() and len(parts) < 3:
        # Three bfloat16 numbers add up to a float32 one. Their products cost little beside reading the keys.
        parts.append(left_QE.bfloat16())
        left_QE = left_QE - parts[-1].float()
    stacked = torch.cat(parts)
    most_of_smaller_Q = torch.full((len(parts) - 1, len(query_QE)), -torch.inf)

    def score(keys: slice) -> Tensor:
        score_Qn, *smaller_Qn = (stacked @ keys_NE[keys].T).split(len(query_QE))
        for most_Q, part_Qn in zip(most_of_smaller_Q, smaller_Qn, strict=True):
            torch.maximum(most_Q, part_Qn.amax(-1), out=most_Q)
        return score_Qn

    candidate_QC, least_Q = best_of(score, len(keys_NE), SPARE * top_k)
    # No other key scores more: its first part is at most `least_Q` before rounding, its others at most their maxima.
    most_Q = least_Q + ROUNDING * least_Q.abs()
    most_Q += (most_of_smaller_Q + ROUNDING * most_of_smaller_Q.abs()).sum(0)
    return _proved(query_QE, keys_NE, candidate_QC, most_Q, top_k)


def _scan_many(query_QE: Tensor, keys_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As `_scan`, where a product more costs more than a look at every key does."""
    if len(keys_NE) <= SPARE * top_k:
        return _search_plainly(query_QE, keys_NE, top_k)
    longest = max(
        torch.linalg.vector_norm(part_nE, dim=-1, dtype=torch.float32).amax() for part_nE in keys_NE.split(BLOCK)
    )
    found = []
    for part_qE in query_QE.split(MANY):
        rough_qE = part_qE.bfloat16()

        def score(keys: slice, rough_qE: Tensor = rough_qE) -> Tensor:
            return rough_qE @ keys_NE[keys].T

        candidate_qC, least_q = best_of(score, len(keys_NE), SPARE * top_k)
        # No other key scores more: what rounding took from a query meets no key longer than the longest.
        most_q = least_q + ROUNDING * least_q.abs() + (part_qE - rough_qE.float()).norm(dim=-1) * longest
        found.append(_proved(part_qE, keys_NE, candidate_qC, most_q, top_k))
    index_QR, score_QR = (torch.cat(parts) for parts in zip(*found, strict=True))
    return index_QR, score_QR


def _proved(
    query_QE: Tensor, keys_NE: Tensor, candidate_QC: Tensor, most_Q: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The best of each query's candidates, or of all keys where one that is no candidate, scoring up to `most_Q`, could
    be among them."""
    index_QR, score_QR = rescore(query_QE, keys_NE, candidate_QC, top_k)
    unproved_Q = score_QR[:, -1] < most_Q
    if unproved_Q.any():
        index_QR[unproved_Q], score_QR[unproved_Q] = _search_plainly(query_QE[unproved_Q], keys_NE, top_k)
    return index_QR, score_QR


def _search_plainly(query_QE: Tensor, keys_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`reference.topk_scan` of a single search."""
    index_1QR, score_1QR = reference.topk_scan(query_QE[None], keys_NE[None], top_k)
    return index_1QR[0], score_1QR[0]


def rescore(
    query_QE: Tensor, keys_NE: Tensor, candidate_QC: Tensor, top_k: int, valid_QC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best `top_k` (at most C) of each query's candidates by float32 scores: index_QR, best first, and score_QR.

    Candidates that are not valid score −inf.
    """
    keys_QCE = keys_NE.index_select(0, candidate_QC.flatten()).unflatten(0, candidate_QC.shape).float()
    score_QC = torch.bmm(query_QE[:, None], keys_QCE.transpose(1, 2)).squeeze(1)
    if valid_QC is not None:
        score_QC.masked_fill_(~valid_QC, -torch.inf)
    score_QR, among_QR = score_QC.topk(top_k, dim=-1)
    return candidate_QC.gather(-1, among_QR), score_QR


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
    """`reference.attend_rows`, for the few queries of one token in fewer operations: each costs more than its numbers.

    More than `FEW` queries a search, and searches that found too little, are left to the reference.
    """
    if not 0 < query_XQE.shape[1] <= FEW or not valid_XQR.numel():
        return reference.attend_rows(
            query_XQE, keys_PNE, values_PNE, pool_X, slot_XQR, valid_XQR, scaling, order_XQR, discount_XQ, bias_XQR
        )
    outputs, logsumexps = [], []
    # Each search by itself: what one found changes nothing for the others.
    for x, (query_QE, pool, slot_QR, valid_QR) in enumerate(
        zip(query_XQE, pool_X.tolist(), slot_XQR, valid_XQR, strict=True)
    ):
        pools = keys_PNE[pool], values_PNE[pool]
        extra = (None if part is None else part[x] for part in (order_XQR, discount_XQ, bias_XQR))
        output_QE, logsumexp_Q = _attend(query_QE, *pools, slot_QR, valid_QR, scaling, *extra)
        outputs.append(output_QE)
        logsumexps.append(logsumexp_Q)
    return torch.stack(outputs), torch.stack(logsumexps)


def _attend(
    query_QE: Tensor,
    keys_NE: Tensor,
    values_NE: Tensor,
    slot_QR: Tensor,
    valid_QR: Tensor,
    scaling: float,
    order_QR: Tensor | None,
    discount_Q: Tensor | None,
    bias_QR: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not valid_QR.all():
        one_1 = torch.zeros(1, dtype=torch.int64)
        pools = keys_NE[None], values_NE[None], one_1
        extra = (None if part is None else part[None] for part in (order_QR, discount_Q, bias_QR))
        output_1QE, logsumexp_1Q = reference.attend_rows(
            query_QE[None], *pools, slot_QR[None], valid_QR[None], scaling, *extra
        )
        return output_1QE[0], logsumexp_1Q[0]
    key_QRE, value_QRE = (
        rows_NE.index_select(0, slot_QR.flatten()).to(query_QE.dtype).unflatten(0, slot_QR.shape)
        for rows_NE in (keys_NE, values_NE)
    )
    score_QR = torch.bmm(key_QRE, query_QE[..., None]).squeeze(-1).float() * scaling
    if bias_QR is not None:
        score_QR = score_QR + bias_QR
    if order_QR is not None and discount_Q is not None:
        score_QR = reference.discounted(score_QR, order_QR, discount_Q)
    logsumexp_Q1 = score_QR.logsumexp(-1, keepdim=True)
    weight_QR = (score_QR - logsumexp_Q1).exp().to(value_QRE.dtype)
    return torch.bmm(weight_QR[:, None], value_QRE).squeeze(1), logsumexp_Q1.squeeze(-1)


def causal_attention(
    query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, scaling: float, window: int | None = None
) -> Tensor:
    """What each token of a window takes from itself and those before it: (B, H, T, E), in the dtype of the values.

    PyTorch's own attention on a CPU takes twice as long in bfloat16, whose products it does not make as products of
    matrices where there is no AMX.

    Args:
        query_BHTE, key_BKTE: after rotary; taken in the dtype of the values.
        window: tokens that each one sees, itself included; None is all.
    """
    batch, heads, tokens, head_dim = query_BHTE.shape
    kv_heads, dtype = key_BKTE.shape[1], value_BKTE.dtype
    query_XGTE = (query_BHTE * scaling).to(dtype).reshape(batch * kv_heads, -1, tokens, head_dim)
    key_XTE, value_XTE = (part_BKTE.to(dtype).flatten(0, 1) for part_BKTE in (key_BKTE, value_BKTE))
    output_XGTE = torch.empty_like(query_XGTE)
    for first in range(0, tokens, ROWS):
        last = min(first + ROWS, tokens)
        begin = 0 if window is None else max(0, first - window + 1)
        score_XRS = torch.bmm(query_XGTE[:, :, first:last].flatten(1, 2), key_XTE[:, begin:last].transpose(1, 2))
        score_XGtS = score_XRS.unflatten(1, (-1, last - first))
        past_tS = torch.arange(first, last)[:, None] - torch.arange(begin, last)
        if window is None:  # all but the block's own tokens are seen
            score_XGtS[..., first:].masked_fill_(past_tS[:, first:] < 0, -torch.inf)
        else:
            score_XGtS.masked_fill_((past_tS < 0) | (past_tS >= window), -torch.inf)
        block_XRE = torch.bmm(score_XRS.softmax(-1), value_XTE[:, begin:last])
        output_XGTE[:, :, first:last] = block_XRE.unflatten(1, (-1, last - first))
    return output_XGTE.view(batch, heads, tokens, head_dim)


def int8_products(query_QE: Tensor, keys_NE: Tensor) -> Tensor:
    """Dot products (Q, N) of int8 vectors, int32."""
    return torch._int_mm(query_QE, keys_NE.T)  # pyright: ignore[reportPrivateImportUsage]


def best_of(score: Callable[[slice], Tensor], num_keys: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` keys that score best, in any order, and (float32) the least of their scores: (Q, C) and (Q,).

    Args:
        score: scores (Q, n), of any dtype, of a slice of the keys.
        count: C, at most `num_keys`.
    """
    candidates, scores = [], []
    for first in range(0, num_keys, BLOCK):
        score_Qn = score(slice(first, min(first + BLOCK, num_keys)))
        candidate_QC, best_QC = _best_of_block(score_Qn, min(count, score_Qn.shape[-1]))
        candidates.append(candidate_QC + first if first else candidate_QC)
        scores.append(best_QC)
    if len(scores) == 1:
        return candidates[0], scores[0].amin(-1).float()
    score_QM = torch.cat(scores, dim=-1)
    among_QC = _largest(score_QM, count)
    return torch.cat(candidates, dim=-1).gather(-1, among_QC), score_QM.gather(-1, among_QC).amin(-1).float()


def _best_of_block(score_QN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which keys score best, and their scores."""
    num_keys = score_QN.shape[-1]
    if num_keys < 4 * GROUP * count:
        candidate_QC = _largest(score_QN, count)
        return candidate_QC, score_QN.gather(-1, candidate_QC)
    # Group g holds keys g, g + groups, g + 2 · groups, …: a maximum over the outer dimension reads memory in order.
    groups = num_keys // GROUP
    whole = groups * GROUP
    group_QC = _largest(score_QN[:, :whole].unflatten(-1, (GROUP, groups)).amax(-2), count)
    member_QM = (group_QC[..., None] + groups * torch.arange(GROUP)).flatten(-2)
    if whole < num_keys:
        member_QM = torch.cat((member_QM, torch.arange(whole, num_keys).expand(len(member_QM), -1)), dim=-1)
    score_QM = score_QN.gather(-1, member_QM)
    among_QC = _largest(score_QM, count)
    return member_QM.gather(-1, among_QC), score_QM.gather(-1, among_QC)


def _largest(score_QN: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row are, in any order: `topk`, in a third of the time.

    (NumPy partitions with vector instructions; PyTorch guesses branches wrong.)
    """
    if count == score_QN.shape[-1]:
        return torch.arange(count).expand(len(score_QN), -1)
    comparable_QN = score_QN.float() if score_QN.dtype == torch.bfloat16 else score_QN
    order_QN = np.argpartition(comparable_QN.numpy(), -count, axis=-1)
    return torch.from_numpy(order_QN[:, -count:])
