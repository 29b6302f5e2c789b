"""Clusters of points: k-means in plain PyTorch, on whatever device the points are.

N points (n of a block), S numbers each, L centroids.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Distances of a block are kept below this many.
_DISTANCES = {"cpu": 1 << 24, "cuda": 1 << 28}


def centroids(points_NS: Tensor, count: int, *, rounds: int = 8, seed: int = 0) -> Tensor:
    """Centroids (L, S) of clusters that points are near to, float32.

    Args:
        points_NS: at least `count`, float32. Some dozens for each centroid are enough.
        rounds: how often points are put to their nearest centroid, and centroids into the middle of their points.
    """
    random = torch.Generator().manual_seed(seed)
    centroid_LS = points_NS[torch.randperm(len(points_NS), generator=random)[:count].to(points_NS.device)]
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
    found = [torch.addmm(-norm_L, points_nS, centroid_LS.T).argmax(-1) for points_nS in points_NS.split(block)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=points_NS.device)


__all__ = ["centroids", "nearest"]
