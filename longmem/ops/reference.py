"""Plain PyTorch kernels: the truth that faster ones are tested against.

X independent searches (a memory head and a batch row each), Q queries, P pools of N keys and values, E head size,
R retrieved, D or S numbers of a code, M groups of keys, C candidates; B batch, K key-value heads, G query heads each,
T query tokens, S local keys; V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longmem.ops.lists import AT_ONCE, TILE, Lists
from longmem.ops.pools import Pools

# A block of scores is kept below this many elements, so that a search needs bounded memory however large the bank.
MAX_SCORES = {"cpu": 1 << 25, "cuda": 1 << 30}
# Keys are first ranked by the best of this many neighbours: the R best keys lie in the R best groups.
GROUP = 16
# Score of a key that does not exist; far below any real one, and finite in bfloat16.
BEYOND = -1e30


def topk_scan(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `top_k` keys of largest dot product for each query, exactly.

    Args:
        query_XQE: queries.
        keys_PNE: pools of keys, any strides.
        top_k: R; may exceed N.
        length_X: only the first `length_X[x]` keys of each search count; all by default. Of `Pools`, which may differ
            in size, it has to be given.
        pool_X: which pool each search reads; its own by default (P = X).

    Returns:
        index_XQR (int64, best first) and score_XQR (float32). Where fewer than R keys exist the
        score is −inf and the index 0.
    """
    searches, queries, _ = query_XQE.shape
    if isinstance(keys_PNE, Pools):
        assert length_X is not None
        return _topk_scan_apart(query_XQE, keys_PNE, top_k, length_X, pool_X)
    keys_XNE = keys_PNE if pool_X is None else keys_PNE[pool_X]
    num_keys = keys_XNE.shape[1]
    kept = min(top_k, num_keys)
    index_XQR = torch.zeros(searches, queries, top_k, dtype=torch.int64, device=query_XQE.device)
    score_XQR = torch.full((searches, queries, top_k), -torch.inf, device=query_XQE.device)
    if kept == 0 or queries == 0 or searches == 0:
        return index_XQR, score_XQR

    # bfloat16 products on the CPU would round scores to 8 bits; accelerators accumulate in float32 and round once.
    dtype = torch.float32 if query_XQE.device.type == "cpu" else keys_XNE.dtype
    query_XQE, keys_XNE = query_XQE.to(dtype), keys_XNE.to(dtype)
    if length_X is not None:
        beyond_XN1 = (torch.arange(num_keys, device=keys_XNE.device) >= length_X[:, None])[..., None]
        # The mask rides along in the product, as one more (padded to eight) column: no pass over the scores for it.
        penalty_XN8 = F.pad(beyond_XN1.to(dtype) * BEYOND, (0, 7))
        keys_XNE = torch.cat((keys_XNE.masked_fill(beyond_XN1, 0.0), penalty_XN8), dim=-1)
        query_XQE = F.pad(F.pad(query_XQE, (0, 1), value=1.0), (0, 7))
    keys_XEN = keys_XNE.transpose(1, 2)
    rows = max(1, MAX_SCORES.get(query_XQE.device.type, 1 << 25) // (searches * num_keys))
    for first in range(0, queries, rows):
        part = slice(first, first + rows)
        best_XQR, where_XQR = _topk(query_XQE[:, part] @ keys_XEN, kept)
        score_XQR[:, part, :kept] = best_XQR.float()
        index_XQR[:, part, :kept] = where_XQR
    nothing_XQR = score_XQR < BEYOND / 2
    return index_XQR.masked_fill_(nothing_XQR, 0), score_XQR.masked_fill_(nothing_XQR, -torch.inf)


def _topk_scan_apart(
    query_XQE: Tensor, keys: Pools, top_k: int, length_X: Tensor, pool_X: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`topk_scan`, one search after another."""
    pools = range(len(query_XQE)) if pool_X is None else pool_X.tolist()
    found = [
        topk_scan(query_XQE[x : x + 1], keys[pool][None, :length], top_k)
        for x, (pool, length) in enumerate(zip(pools, length_X.tolist(), strict=True))
    ]
    index_XQR, score_XQR = (torch.cat(parts) for parts in zip(*found, strict=True))
    return index_XQR, score_XQR


def topk_coded(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    code_query_XQD: Tensor,
    codes_PND: Tensor | Pools,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
    *,
    group: int = GROUP,
) -> tuple[Tensor, Tensor]:
    """The `top_k` keys of largest dot product among those of the 2 · R groups whose codes score best.

    Scores are those of the keys; what a code's rounding can hide is a key in a group of none but worse looking ones.

    Args:
        query_XQE, keys_PNE, top_k, length_X, pool_X: as for `topk_scan`.
        code_query_XQD, codes_PND: int8; what stands for a query and for each of the keys. Products of the two rank
            keys nearly as their scores do.
        group: keys of a group; of each 128 keys the first group holds every (128 / `group`)-th.

    Returns:
        index_XQR and score_XQR as `topk_scan` returns them.
    """
    searches, queries, _ = query_XQE.shape
    index_XQR = torch.zeros(searches, queries, top_k, dtype=torch.int64, device=query_XQE.device)
    score_XQR = torch.full(index_XQR.shape, -torch.inf, device=query_XQE.device)
    for x in range(searches if queries else 0):
        pool = x if pool_X is None else int(pool_X[x])
        length = keys_PNE.shape[1] if length_X is None else int(length_X[x])
        keys_NE, codes_ND = keys_PNE[pool][:length].float(), codes_PND[pool][:length]
        if length == 0:
            continue
        # int8 products are exact in float32 as long as rows are shorter than a thousand numbers.
        rough_QN = code_query_XQD[x].float() @ codes_ND.float().T
        candidate_QC = _keys_of_best_groups(F.pad(rough_QN, (0, -length % TILE), value=-torch.inf), top_k, group)
        score_QN = query_XQE[x].float() @ keys_NE.T
        score_QC = score_QN.gather(-1, candidate_QC.clamp(max=length - 1))
        score_QC = score_QC.masked_fill(candidate_QC >= length, -torch.inf)
        kept = min(top_k, score_QC.shape[-1])
        score_XQR[x, :, :kept], among_QR = score_QC.topk(kept, dim=-1)
        index_XQR[x, :, :kept] = candidate_QC.gather(-1, among_QR)
    return index_XQR.masked_fill_(score_XQR == -torch.inf, 0), score_XQR


def _keys_of_best_groups(rough_QN: Tensor, top_k: int, group: int) -> Tensor:
    """Keys (Q, C) of the 2 · R groups whose best is best; N is whole tiles."""
    best_QM = rough_QN.unflatten(-1, (-1, group, TILE // group)).amax(-2).flatten(1)
    group_QM = best_QM.topk(min(2 * top_k, best_QM.shape[-1]), dim=-1).indices
    first_QM = group_QM // (TILE // group) * TILE + group_QM % (TILE // group)
    return (first_QM[..., None] + TILE // group * torch.arange(group, device=first_QM.device)).flatten(1)


def topk_listed(
    query_XQE: Tensor,
    keys_PNE: Tensor | Pools,
    lists: Lists,
    top_k: int,
    length_X: Tensor | None = None,
    pool_X: Tensor | None = None,
    *,
    group: int = GROUP,
) -> tuple[Tensor, Tensor]:
    """The `top_k` keys of largest dot product among those in the lists that look best, and all that are in none.

    A query chooses lists by the scores of their centroids; all queries of a search read what any of them has chosen.
    Codes rank groups of what is read beside true scores of keys that came later than the lists, and all keys of the
    2 · R best groups are scored. What can be missed are keys of lists not read, and what a code's rounding can hide.

    Args:
        query_XQE: at most `AT_ONCE` queries of each search.
        keys_PNE, top_k, length_X, pool_X: as for `topk_scan`; lengths are no less than the keys that are in lists.
        lists: of the pools' first keys.
        group: keys of a group; of each 128 keys the first group holds every (128 / `group`)-th.

    Returns:
        index_XQR and score_XQR as `topk_scan` returns them.

    Raises:
        ValueError: more queries than may be asked at once.
    """
    searches, queries, _ = query_XQE.shape
    if queries > AT_ONCE:
        raise ValueError(f"{queries} queries were given; at most {AT_ONCE} are asked at once")
    index_XQR = torch.zeros(searches, queries, top_k, dtype=torch.int64, device=query_XQE.device)
    score_XQR = torch.full(index_XQR.shape, -torch.inf, device=query_XQE.device)
    for x in range(searches if queries else 0):
        pool = x if pool_X is None else int(pool_X[x])
        query_QE, keys_NE = query_XQE[x].float(), keys_PNE[pool]
        keys_NE = keys_NE[: keys_PNE.shape[1] if length_X is None else int(length_X[x])]
        code_1QS, unit_1Q = code_queries(query_QE[None], lists.coder_PES[pool : pool + 1])
        place_M = _places_read(lists, pool, code_1QS[0])
        late_N = torch.arange(lists.known, len(keys_NE), device=place_M.device)
        late_N = F.pad(late_N, (0, -len(late_N) % TILE), value=-1)
        row_N = torch.cat((lists.rows[pool][place_M, 0], late_N))
        if not len(row_N):
            continue
        # int8 products are exact in float32 as long as rows are shorter than a thousand numbers.
        listed_QM = unit_1Q.mT * (code_1QS[0].float() @ lists.codes[pool][place_M].float().T)
        listed_QM = listed_QM + (query_QE @ lists.centre_PE[pool])[:, None]
        rough_QN = torch.cat((listed_QM, query_QE @ keys_NE[late_N].float().T), dim=1)
        candidate_QC = _keys_of_best_groups(rough_QN.masked_fill(row_N < 0, -torch.inf), top_k, group)
        row_QC = row_N[candidate_QC]
        score_QC = torch.einsum("qe,qce->qc", query_QE, keys_NE[row_QC].float())
        score_QC = score_QC.masked_fill(row_QC < 0, -torch.inf)
        kept = min(top_k, score_QC.shape[-1])
        score_XQR[x, :, :kept], among_QR = score_QC.topk(kept, dim=-1)
        index_XQR[x, :, :kept] = row_QC.gather(-1, among_QR)
    return index_XQR.masked_fill_(score_XQR == -torch.inf, 0), score_XQR


def _places_read(lists: Lists, pool: int, code_QS: Tensor) -> Tensor:
    """Places (M,) of the lists that any of a search's queries reads, in whole tiles."""
    first_L, tiles_L = lists.first_PL1[pool, :-1], lists.first_PL1[pool].diff()
    read_L = lists_read(lists, pool, code_QS)
    tile_M = torch.arange(TILE, device=first_L.device)
    runs = [
        (torch.arange(first, first + tiles, device=first_L.device)[:, None] * TILE + tile_M).flatten()
        for first, tiles in zip(first_L[read_L].tolist(), tiles_L[read_L].tolist(), strict=True)
    ]
    return torch.cat([tile_M[:0], *runs])


def lists_read(lists: Lists, pool: int, code_QS: Tensor) -> Tensor:
    """Which lists (L,) queries that are asked at once read, given their codes: bool."""
    tiles_L = lists.first_PL1[pool].diff()
    score_QL = code_QS.float() @ lists.centroid_PLS[pool].float().T
    sorted_QL, order_QL = score_QL.sort(dim=-1, descending=True)
    wanted = tiles_L.sum().minimum(lists.reads_P[pool])
    # The list that makes the tiles enough, and all others that score as much.
    last_Q1 = (tiles_L[order_QL].cumsum(-1) < wanted).sum(-1, keepdim=True)
    return (score_QL >= sorted_QL.gather(-1, last_Q1)).any(0)


def code_queries(query_XQE: Tensor, coder_XES: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for queries where keys are codes, (X, Q, S) int8: coordinates in units of each query's largest.

    Args:
        coder_XES: a query times its matrix is the query's coordinates.

    Returns:
        The codes, and the unit of each query (X, Q), float32.
    """
    coordinate_XQS = query_XQE.float() @ coder_XES
    unit_XQ1 = coordinate_XQS.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (coordinate_XQS / unit_XQ1).round().to(torch.int8), unit_XQ1[..., 0]


def _topk(score_XQN: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`score_XQN.topk(top_k)`, several times cheaper for long rows: groups of keys are ranked first."""
    num_keys = score_XQN.shape[-1]
    if num_keys < 4 * GROUP * top_k:
        return score_XQN.topk(top_k, dim=-1)
    # Group g holds keys g, g + groups, g + 2 · groups, …: a maximum over the outer dimension reads memory in order.
    groups = num_keys // GROUP
    whole = groups * GROUP
    best_XQg = score_XQN[..., :whole].unflatten(-1, (GROUP, groups)).amax(-2)
    group_XQR = best_XQg.topk(top_k, dim=-1, sorted=False).indices
    candidate_XQC = (group_XQR[..., None] + groups * torch.arange(GROUP, device=score_XQN.device)).flatten(-2)
    if whole < num_keys:
        rest = torch.arange(whole, num_keys, device=score_XQN.device).expand(*candidate_XQC.shape[:-1], -1)
        candidate_XQC = torch.cat((candidate_XQC, rest), dim=-1)
    best_XQR, among_XQR = score_XQN.gather(-1, candidate_XQC).topk(top_k, dim=-1)
    return best_XQR, candidate_XQC.gather(-1, among_XQR)


def gather_rows(rows_PNE: Tensor | Pools, index_XQR: Tensor, pool_X: Tensor | None = None) -> Tensor:
    """Rows of pools by index, (X, Q, R, E); x reads pool `pool_X[x]`, its own by default (P = X)."""
    if isinstance(rows_PNE, Pools):
        pools = range(len(index_XQR)) if pool_X is None else pool_X.tolist()
        return torch.stack([rows_PNE[pool][index_QR] for pool, index_QR in zip(pools, index_XQR, strict=True)])
    pool_X = torch.arange(len(rows_PNE), device=rows_PNE.device) if pool_X is None else pool_X
    # Not by flattening pools: those of a bank that has room to grow are a view, and would be copied whole.
    return rows_PNE[pool_X[:, None, None], index_XQR]


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
    """Attention of each query over its own R rows of a pool.

    Args:
        query_XQE: queries; they, `discount_XQ` and `bias_XQR` are the only inputs that get a gradient.
        keys_PNE, values_PNE: pools.
        pool_X: which pool the queries of x draw on.
        slot_XQR: rows of that pool, int64.
        valid_XQR: False where there is no such row.
        scaling: what q·k is multiplied by.
        order_XQR, discount_XQ: as in `discounted`; without them nothing is discounted.
        bias_XQR: added to scores, before what is newer is told from what is older; None is nothing.

    Returns:
        Outputs (X, Q, E) in the queries' dtype and log-sum-exps of the scores (X, Q) in float32; 0 and −inf where no
        row is valid.
    """
    value_XQRE = gather_rows(values_PNE, slot_XQR, pool_X).to(query_XQE.dtype)
    key_XQRE = gather_rows(keys_PNE, slot_XQR, pool_X)
    score_XQR = row_scores(query_XQE, key_XQRE, valid_XQR, scaling, order_XQR, discount_XQ, bias_XQR)
    nothing_XQ1 = ~valid_XQR.any(-1, keepdim=True)
    # An all −inf row has no softmax; any finite stand-in will do, since its weights are set to 0.
    weight_XQR = score_XQR.masked_fill(nothing_XQ1, 0.0).softmax(-1).masked_fill(nothing_XQ1, 0.0)
    output_XQE = torch.matmul(weight_XQR.to(value_XQRE.dtype)[..., None, :], value_XQRE).squeeze(-2)
    logsumexp_XQ = score_XQR.masked_fill(nothing_XQ1, 0.0).logsumexp(-1).masked_fill(nothing_XQ1[..., 0], -torch.inf)
    return output_XQE, logsumexp_XQ


def row_scores(
    query_XQE: Tensor,
    key_XQRE: Tensor,
    valid_XQR: Tensor,
    scaling: float,
    order_XQR: Tensor | None = None,
    discount_XQ: Tensor | None = None,
    bias_XQR: Tensor | None = None,
) -> Tensor:
    """Scaled scores (X, Q, R) of each query's own keys, float32, raised and discounted if asked; −inf where there is
    none."""
    score_XQR = torch.matmul(key_XQRE.to(query_XQE.dtype), query_XQE[..., None]).squeeze(-1).float() * scaling
    score_XQR = score_XQR if bias_XQR is None else score_XQR + bias_XQR
    score_XQR = score_XQR.masked_fill(~valid_XQR, -torch.inf)
    if order_XQR is None or discount_XQ is None:
        return score_XQR
    return discounted(score_XQR, order_XQR, discount_XQ)


def discounted(score_XQR: Tensor, order_XQR: Tensor, discount_XQ: Tensor) -> Tensor:
    """Scores (X, Q, R) less `discount_XQ` times the share of the attention that goes to what is newer.

    With c the discount and w = softmax(score):  score_r − c · Σ w_s over all s newer than r. Of two rows that match
    equally well the older loses c/2, whenever they were remembered; a row that nothing newer rivals loses nothing.

    Args:
        order_XQR: int64, larger is newer; of equal ones the first counts as newer.
    """
    nothing_XQ1 = (score_XQR == -torch.inf).all(-1, keepdim=True)
    weight_XQR = score_XQR.masked_fill(nothing_XQ1, 0.0).softmax(-1)
    newest_first_XQR = order_XQR.argsort(dim=-1, descending=True, stable=True)
    sorted_XQR = weight_XQR.gather(-1, newest_first_XQR)
    newer_XQR = torch.zeros_like(weight_XQR).scatter(-1, newest_first_XQR, sorted_XQR.cumsum(-1) - sorted_XQR)
    return score_XQR - discount_XQ[..., None] * newer_XQR


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S) bool, True where a query may look. The last query stands at the last key."""
    distance_TS = (
        torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    )
    allowed_TS = distance_TS >= 0
    return allowed_TS if window is None else allowed_TS & (distance_TS < window)


def causal_logsumexp(query_BKGTE: Tensor, key_BKSE: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """log Σ exp of the scores of causal attention, (B, K, G, T) float32: what memory competes with."""
    group, queries = query_BKGTE.shape[2:4]
    score_BKGTS = torch.matmul(query_BKGTE.flatten(2, 3), key_BKSE.transpose(2, 3)).unflatten(2, (group, queries))
    mask_TS = causal_mask(queries, key_BKSE.shape[2], window, query_BKGTE.device)
    return (score_BKGTS.float() * scaling).masked_fill(~mask_TS, -torch.inf).logsumexp(-1)


def cross_entropy_slope(logits_XV: Tensor, target_X: Tensor, row_weight_X: Tensor) -> Tensor:
    """Losses (X,) float32; `logits_XV` is overwritten by the gradient of Σ row_weight · loss with respect to it."""
    log_probability_XV = logits_XV.float().log_softmax(-1)
    loss_X = -log_probability_XV.gather(-1, target_X[:, None]).squeeze(-1)
    slope_XV = log_probability_XV.exp_()
    slope_XV.scatter_add_(-1, target_X[:, None], torch.full_like(slope_XV[:, :1], -1.0))
    logits_XV.copy_(slope_XV.mul_(row_weight_X[:, None]))
    return loss_X
