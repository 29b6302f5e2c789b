"""Next-token losses that never hold the logits of a whole vocabulary for all rows.

X rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longmem.ops.dispatch import cross_entropy_slope


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ cross-entropy of hidden @ weight.T.

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
            logits_CV = hidden_XD[rows].to(weight_VD.dtype) @ weight_VD.T
            loss_X[rows] = cross_entropy_slope(logits_CV, target_X[rows], row_weight_X[rows])
            gradient_XD[rows] = (logits_CV @ weight_VD).to(gradient_XD.dtype)
        ctx.save_for_backward(gradient_XD)
        return (loss_X * row_weight_X).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient_XD,) = ctx.saved_tensors
        return gradient_XD * grad.to(gradient_XD.dtype), None, None, None, None


def linear_cross_entropy(
    hidden_XD: Tensor, weight_VD: Tensor, target_X: Tensor, row_weight_X: Tensor, chunk: int = 4096
) -> Tensor:
    """Weighted sum of next-token losses under a frozen output matrix.

    Args:
        hidden_XD: normed hidden states; the only input that gets a gradient.
        weight_VD: output embeddings.
        target_X: int64 token ids.
        row_weight_X: float32 weight of each row.
        chunk: rows whose logits are held at once.
    """
    return _LinearCrossEntropy.apply(hidden_XD, weight_VD, target_X, row_weight_X, chunk)


class _LinearDivergence(torch.autograd.Function):
    """Σ KL(told ‖ heard) of the words that follow, chunk by chunk; softmax(heard) − softmax(told) is the slope."""

    @staticmethod
    def forward(ctx, heard_XD: Tensor, told_XD: Tensor, weight_VD: Tensor, row_weight: float, chunk: int) -> Tensor:
        gradient_XD = torch.empty_like(heard_XD)
        total = torch.zeros((), dtype=torch.float32, device=heard_XD.device)
        for first in range(0, len(heard_XD), chunk):
            rows = slice(first, first + chunk)
            heard_CV, told_CV = (
                (hidden_XD[rows].to(weight_VD.dtype) @ weight_VD.T).float().log_softmax(-1)
                for hidden_XD in (heard_XD, told_XD)
            )
            share_CV = told_CV.exp()
            total += (share_CV * (told_CV - heard_CV)).sum()
            slope_CV = heard_CV.exp_().sub_(share_CV).mul_(row_weight)
            gradient_XD[rows] = (slope_CV.to(weight_VD.dtype) @ weight_VD).to(gradient_XD.dtype)
        ctx.save_for_backward(gradient_XD)
        return total * row_weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient_XD,) = ctx.saved_tensors
        return gradient_XD * grad.to(gradient_XD.dtype), None, None, None, None


def linear_divergence(
    heard_XD: Tensor, told_XD: Tensor, weight_VD: Tensor, row_weight: float, chunk: int = 2048
) -> Tensor:
    """Sum of KL(told ‖ heard) between next-token distributions under a frozen output matrix, in nats.

    Args:
        heard_XD: normed hidden states; the only input that gets a gradient.
        told_XD: normed hidden states of what should be said.
        weight_VD: output embeddings.
        row_weight: of each row.
        chunk: rows whose logits are held at once.
    """
    return _LinearDivergence.apply(heard_XD, told_XD, weight_VD, row_weight, chunk)


@torch.no_grad()
def linear_nll(hidden_XD: Tensor, weight_VD: Tensor, target_X: Tensor, chunk: int = 2048) -> Tensor:
    """Next-token losses (X,) in nats, float32."""
    losses = []
    for first in range(0, len(target_X), chunk):
        rows = slice(first, first + chunk)
        logits_CV = (hidden_XD[rows].to(weight_VD.dtype) @ weight_VD.T).float()
        losses.append(torch.nn.functional.cross_entropy(logits_CV, target_X[rows], reduction="none"))
    return torch.cat(losses)
