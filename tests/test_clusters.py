"""Clusters: points go to what is nearest, and centroids into the middle of their points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem import clusters
from longmem.clusters import centroids, nearest


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 5), st.integers(1, 400), st.integers(0, 99))
def test_the_nearest_centroid_is_nearest(points: int, count: int, size: int, at_once: int, seed: int) -> None:
    """However many distances are known at a time."""
    points_NS, centroid_LS = normal(points, size, seed=seed), normal(count, size, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clusters._DISTANCES, "cpu", at_once)
        nearest_N = nearest(points_NS, centroid_LS)
    assert nearest_N.shape == (points,) and nearest_N.dtype == torch.int64
    distance_NL = (points_NS[:, None] - centroid_LS).square().sum(-1)
    found_N = distance_NL.gather(1, nearest_N[:, None])[:, 0]
    torch.testing.assert_close(found_N, distance_NL.amin(1), atol=1e-5, rtol=1e-5)


def test_clumps_are_found() -> None:
    clump_LS = 20 * normal(8, 3)
    points_NS = clump_LS[torch.arange(400) % 8] + 0.1 * normal(400, 3, seed=1)
    centroid_LS = centroids(points_NS, 16, rounds=20)
    assert centroid_LS.shape == (16, 3)
    spread = (points_NS - centroid_LS[nearest(points_NS, centroid_LS)]).square().sum(-1).mean()
    assert spread < 0.05  # three numbers of variance .01 each, and more centroids than clumps


def test_each_round_brings_points_nearer() -> None:
    points_NS = normal(500, 4)
    spreads = []
    for rounds in (0, 1, 8):
        centroid_LS = centroids(points_NS, 20, rounds=rounds, seed=3)
        spreads.append(float((points_NS - centroid_LS[nearest(points_NS, centroid_LS)]).square().sum()))
    assert spreads[0] > spreads[1] > spreads[2]


def test_a_centroid_of_no_points_begins_anew() -> None:
    points_NS = torch.cat((torch.zeros(50, 2), torch.ones(1, 2)))
    centroid_LS = centroids(points_NS, 20, rounds=5)
    assert torch.isfinite(centroid_LS).all()
    assert {tuple(row) for row in centroid_LS.tolist()} <= {(0.0, 0.0), (1.0, 1.0)}
