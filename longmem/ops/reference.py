"""Plain PyTorch kernels: the truth that faster ones are tested against.

X independent searches (a memory head of a bank each), Q queries, N keys, E head size, R retrieved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A block of scores is kept below this many elements, so that a search needs bounded memory however large the bank.
MAX_SCORES = {"cpu": 1 << 25, "cuda": 1 << 30}
# Keys are first ranked by the best of this many neighbours: the R best keys lie in the R best groups.
GROUP = 16
# Score of a key that does not exist; far below any real one, and finite in bfloat16.
BEYOND = -1e30


def topk_scan(query_XQE: Tensor, keys_XNE: Tensor, top_k: int, length_X: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `top_k` keys of largest dot product for each query, exactly.

    Args:
        query_XQE: queries.
        keys_XNE: keys, any strides.
        top_k: R; may exceed N.
        length_X: only the first `length_X[x]` keys of each search count; all by default.

    Returns:
        index_XQR (int64, best first) and score_XQR (float32). Where fewer than R keys exist the
        score is −inf and the index 0.
    """
    searches, queries, _ = query_XQE.shape
    num_keys = keys_XNE.shape[1]
    kept = min(top_k, num_keys)
    index_XQR = torch.zeros(searches, queries, top_k, dtype=torch.int64, device=query_XQE.device)
    score_XQR = torch.full((searches, queries, top_k), -torch.inf, device=query_XQE.device)
    if kept == 0 or queries == 0:
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


def gather_rows(rows_XNE: Tensor, index_XQR: Tensor) -> Tensor:
    """Rows of each search's matrix by index: (X, N, E) and (X, Q, R) → (X, Q, R, E)."""
    searches, num_rows, _ = rows_XNE.shape
    start_X11 = torch.arange(searches, device=rows_XNE.device)[:, None, None] * num_rows
    return rows_XNE.flatten(0, 1)[(index_XQR + start_X11).flatten()].unflatten(0, index_XQR.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ cross-entropy of hidden @ weight.T, never holding logits of more than `chunk` rows.

    The gradient is made in the forward pass, chunk by chunk, since softmax − one-hot is at hand there.
    """

    @staticmethod
    def forward(
        ctx, hidden_XD: Tensor, weight_VD: Tensor, target_X: Tensor, row_weight_X: Tensor, chunk: int
    ) -> Tensor:
        gradient_XD = torch.empty_like(hidden_XD)
        loss_X = torch.empty(len(target_X), dtype=torch.float32, device=hidden_XD.device)
        for first in range(0, len(target_X), chunk):
            rows = slice(first, first + chunk)
            log_probability_CV = (hidden_XD[rows].to(weight_VD.dtype) @ weight_VD.T).float().log_softmax(-1)
            loss_X[rows] = -log_probability_CV.gather(-1, target_X[rows, None]).squeeze(-1)
            slope_CV = log_probability_CV.exp_()
            slope_CV.scatter_add_(-1, target_X[rows, None], torch.full_like(slope_CV[:, :1], -1.0))
            slope_CV *= row_weight_X[rows, None]
            gradient_XD[rows] = (slope_CV.to(weight_VD.dtype) @ weight_VD).to(gradient_XD.dtype)
        ctx.save_for_backward(gradient_XD)
        return (loss_X * row_weight_X).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient_XD,) = ctx.saved_tensors
        return gradient_XD * grad.to(gradient_XD.dtype), None, None, None, None


def linear_cross_entropy(
    hidden_XD: Tensor, weight_VD: Tensor, target_X: Tensor, row_weight_X: Tensor, chunk: int = 4096
) -> Tensor:
    """Weighted sum of next-token losses under a frozen output matrix, without keeping the logits of a whole vocabulary.

    Args:
        hidden_XD: normed hidden states; the only input that gets a gradient.
        weight_VD: output embeddings.
        target_X: int64 token ids.
        row_weight_X: float32 weight of each row.
        chunk: rows whose logits are held at once.
    """
    return _LinearCrossEntropy.apply(hidden_XD, weight_VD, target_X, row_weight_X, chunk)


@torch.no_grad()
def linear_nll(hidden_XD: Tensor, weight_VD: Tensor, target_X: Tensor, chunk: int = 2048) -> Tensor:
    """Next-token losses (X,) in nats, float32, without keeping the logits of a whole vocabulary."""
    losses = []
    for first in range(0, len(target_X), chunk):
        rows = slice(first, first + chunk)
        logits_CV = (hidden_XD[rows].to(weight_VD.dtype) @ weight_VD.T).float()
        losses.append(torch.nn.functional.cross_entropy(logits_CV, target_X[rows], reduction="none"))
    return torch.cat(losses)
