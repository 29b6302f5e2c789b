"""Clusters of points: k-means in plain PyTorch, on whatever device the points are.

N points (n of a block), S numbers each, L centroids.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Distances of a block are kept below this many: on a CPU, so that they stay in its cache.
_DISTANCES = {"cpu": 1 << 21, "cuda": 1 << 28}


def centroids(points_NS: Tensor, count: int, *, rounds: int = 8, seed: int = 0) -> Tensor:
    """Centroids (L, S) of clusters that points are near to, float32.

    Args:
        points_NS: at least `count`, float32. Some dozens for each centroid are enough.
        rounds: how often points are put to their nearest centroid, and centroids into the middle of their points.
    """
    random = torch.Generator().manual_seed(seed)
    begin_LS = points_NS[torch.randperm(len(points_NS), generator=random)[:count].to(points_NS.device)]
    return moved(points_NS, begin_LS, rounds, random)


def moved(points_NS: Tensor, centroid_LS: Tensor, rounds: int, random: torch.Generator) -> Tensor:
    """Centroids (L, S) after so many rounds of k-means.

    Args:
        random: on the CPU; where those that are nearest to nothing begin anew.
    """
    count = len(centroid_LS)
    for _ in range(rounds):
        nearest_N = nearest(points_NS, centroid_LS)
        sum_LS = torch.zeros_like(centroid_LS).index_add_(0, nearest_N, points_NS)
        number_L = torch.bincount(nearest_N, minlength=count)
        # One that is nearest to nothing begins anew at some point.
        anywhere_L = torch.randint(len(points_NS), (count,), generator=random).to(points_NS.device)
        mean_LS = sum_LS / number_L.clamp(min=1)[:, None]
        centroid_LS = torch.where(number_L[:, None] > 0, mean_LS, points_NS[anywhere_L])
    return centroid_LS


def nearest(points_NS: Tensor, centroid_LS: Tensor) -> Tensor:
    """The nearest centroid of each point, (N,) int64."""
    # |p − c|² is |p|², which is the same for all centroids, less twice p·c − |c|² / 2.
    norm_L = centroid_LS.square().sum(-1) / 2
    block = max(1, _DISTANCES.get(points_NS.device.type, 1 << 24) // len(centroid_LS))
    scores = (torch.addmm(-norm_L, points_nS, centroid_LS.T) for points_nS in points_NS.split(block))
    found = [_largest(score_nL) for score_nL in scores]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=points_NS.device)


def _largest(score_nL: Tensor) -> Tensor:
    # NumPy looks for it with vector instructions.
    return torch.from_numpy(score_nL.numpy().argmax(-1)) if score_nL.device.type == "cpu" else score_nL.argmax(-1)


__all__ = ["centroids", "moved", "nearest"]
