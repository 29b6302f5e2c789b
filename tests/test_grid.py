"""Grids: what rounding keys costs the scores of queries, and what it must not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longmem.codec import pack_rows, unpack_rows
from longmem.errors import BankError, ConfigError
from longmem.grid import Grid

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.sampled_from([2, 6, 8, 20, 64]))


def uneven(heads: int, tokens: int, head_dim: int, seed: int = 0, offset: float = 3.0) -> Tensor:
    """Rows that vary 30 times as much in some coordinates as in others, and have a centre; more rows of one seed are
    distributed alike."""
    random = torch.Generator().manual_seed(seed)
    spread_H1E = 30 ** torch.rand(heads, 1, head_dim, generator=random)
    centre_H1E = offset * torch.randn(heads, 1, head_dim, generator=random)
    return centre_H1E + spread_H1E * torch.randn(heads, tokens, head_dim, generator=random)


def fitted(keys_HNE: Tensor, query_HQE: Tensor) -> tuple[Grid, Tensor]:
    centre_HE = keys_HNE.float().mean(1)
    return Grid.fit(keys_HNE, query_HQE, centre_HE), centre_HE


@given(SIZES, st.integers(0, 99), st.sampled_from([0.0, 1e-9, 1.0, 1e5]))
def test_bits_of_a_head_fill_its_bytes(sizes: tuple[int, int, int], seed: int, size: float) -> None:
    """Whatever keys and queries are like, constant ones and none at all included."""
    heads, _, head_dim = sizes
    for queries in (uneven(*sizes, seed=seed + 1), torch.zeros(*sizes)):
        grid, centre_HE = fitted(uneven(*sizes, seed=seed) * size, queries)
        assert grid.bits_HE.sum(1).tolist() == [4 * head_dim] * heads
        assert int(grid.bits_HE.min()) >= 2 and int(grid.bits_HE.max()) <= 8
        assert torch.isfinite(grid.unit_HE).all() and (grid.unit_HE > 0).all()
        packed_HNP = grid.pack(uneven(*sizes, seed=seed) * size, centre_HE)
        assert packed_HNP.shape == (*sizes[:2], head_dim // 2 + 2) and packed_HNP.dtype == torch.uint8


@given(st.integers(0, 99))
def test_scores_lose_less_than_by_turning_rows(seed: int) -> None:
    """Of other rows of the same distribution than those that the grid was made from."""
    keys_HNE, query_HQE = uneven(2, 600, 32, seed=seed), uneven(2, 600, 32, seed=seed + 100, offset=0.0)
    grid, centre_HE = fitted(keys_HNE[:, :300], query_HQE[:, :300])
    keys_HNE, query_HQE = keys_HNE[:, 300:], query_HQE[:, 300:]
    by_grid_HNE = grid.unpack(grid.pack(keys_HNE, centre_HE), centre_HE, torch.float32)
    turned_HNE = unpack_rows(pack_rows(keys_HNE, 4, centre_HE), torch.float32)
    cost, turned = (float((query_HQE @ (found_HNE - keys_HNE).mT).norm()) for found_HNE in (by_grid_HNE, turned_HNE))
    assert cost < 0.8 * turned


def test_finer_where_queries_ask() -> None:
    """All coordinates vary alike; half of them are hardly asked for."""
    keys_HNE, query_HQE = torch.randn(1, 500, 16), torch.randn(1, 500, 16)
    query_HQE[..., ::2] *= 0.01
    bits_E = fitted(keys_HNE, query_HQE)[0].bits_HE[0]
    assert bits_E[::2].tolist() == [2] * 8 and int(bits_E[1::2].min()) >= 5


def test_rows_packed_one_by_one_are_those_packed_together() -> None:
    keys_HNE = uneven(2, 9, 64)
    grid, centre_HE = fitted(keys_HNE, uneven(2, 9, 64, seed=1))
    whole_HNP = grid.pack(keys_HNE, centre_HE)
    for n in range(9):
        one_HNP = grid.pack(keys_HNE[:, n : n + 1], centre_HE)
        assert torch.equal(one_HNP[:, 0], whole_HNP[:, n])
        assert torch.equal(grid.unpack(one_HNP, centre_HE)[:, 0], grid.unpack(whole_HNP, centre_HE)[:, n])
    assert grid.pack(keys_HNE[:, :0], centre_HE).shape == (2, 0, 34)
    assert grid.unpack(whole_HNP[:, :0], centre_HE).shape == (2, 0, 64)


@pytest.mark.parametrize("value", [0.0, 1e-9, 3.0, 6e4, 1e30])
def test_numbers_of_any_size(value: float) -> None:
    """Text may be far from what the grid was made from: the scale of a row follows."""
    grid, centre_HE = fitted(uneven(1, 50, 64, offset=0.0), torch.ones(1, 50, 64))
    far_HNE = value * uneven(1, 3, 64, offset=0.0)
    found_HNE = grid.unpack(grid.pack(centre_HE + far_HNE, centre_HE), centre_HE, torch.float32)
    assert torch.isfinite(found_HNE).all()
    if value < 1e6:
        assert float((found_HNE - centre_HE - far_HNE).norm()) < 0.2 * float(far_HNE.norm()) + 1e-5


@given(SIZES, st.integers(0, 99))
def test_a_grid_is_the_text_it_gives(sizes: tuple[int, int, int], seed: int) -> None:
    grid, _ = fitted(uneven(*sizes, seed=seed), uneven(*sizes, seed=seed + 1))
    again = Grid.from_text(grid.to_text(), sizes[0], sizes[2])
    assert torch.equal(again.bits_HE, grid.bits_HE) and torch.equal(again.unit_HE, grid.unit_HE)


def test_what_is_no_grid_is_named() -> None:
    grid, centre_HE = fitted(uneven(2, 9, 8), uneven(2, 9, 8, seed=1))
    with pytest.raises(BankError, match="grid in a bank's spec is not that of 2 heads of size 10: 80 bytes"):
        Grid.from_text(grid.to_text(), 2, 10)
    with pytest.raises(BankError, match=r"not that of 2 heads.*bank_spec_in"):
        Grid.from_text("?", 2, 8)
    with pytest.raises(BankError, match="4 on average"):
        Grid.from_text(Grid(grid.bits_HE + 1, grid.unit_HE).to_text(), 2, 8)
    with pytest.raises(ConfigError, match="not finite"):
        grid.pack(torch.full((2, 1, 8), torch.inf), centre_HE)
