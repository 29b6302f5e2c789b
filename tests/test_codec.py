"""Packed rows: what rounding may cost at most, and what it must not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longmem.codec import pack_rows, unpack_rows
from longmem.errors import ConfigError

SIZES = st.tuples(st.integers(1, 3), st.integers(0, 20), st.sampled_from([2, 20, 64, 80, 128]))


def rows(heads: int, tokens: int, head_dim: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Keys like a model's: a centre of their own, and a few coordinates that are much larger than the rest."""
    random = torch.Generator().manual_seed(seed)
    rows_HNE = torch.randn(heads, tokens, head_dim, generator=random)
    rows_HNE[..., : head_dim // 16] *= 10 * spread
    return rows_HNE + 5 * torch.randn(heads, 1, head_dim, generator=random)


@given(SIZES, st.sampled_from([8, 4]), st.integers(0, 99))
def test_rounding_costs_no_more_than_half_a_step_a_number(sizes, bits, seed):
    rows_HNE = rows(*sizes, seed=seed)
    packed = pack_rows(rows_HNE, bits)
    found_HNE = unpack_rows(packed, torch.float32)
    assert found_HNE.shape == rows_HNE.shape
    # A stretched scale is taken only where the sum of squares gains: at most what the plain one would cost.
    widest_HN = (rows_HNE - packed.centre_HE[:, None]).norm(dim=-1)
    limit_HN = 0.51 * widest_HN / (2 ** (bits - 1) - 1) * sizes[2] ** 0.5 + 1e-4
    assert ((found_HNE - rows_HNE).norm(dim=-1) <= limit_HN).all()


@given(SIZES, st.integers(0, 99))
def test_more_bits_are_nearer(sizes, seed):
    rows_HNE = rows(*sizes, seed=seed)
    fine, coarse = (unpack_rows(pack_rows(rows_HNE, bits), torch.float32) for bits in (8, 4))
    assert float((fine - rows_HNE).norm()) <= float((coarse - rows_HNE).norm()) + 1e-6


def test_turning_keeps_what_large_coordinates_would_cost():
    rows_HNE = rows(2, 400, 64, spread=3.0)
    centred_HNE = rows_HNE - rows_HNE.mean(1, keepdim=True)
    step_HN1 = centred_HNE.abs().amax(-1, keepdim=True) / 7
    plain = float(((centred_HNE / step_HN1).round() * step_HN1 - centred_HNE).norm())
    assert float((unpack_rows(pack_rows(rows_HNE, 4), torch.float32) - rows_HNE).norm()) < 0.8 * plain


def test_bytes_of_a_token():
    for bits, expected in ((8, 66), (4, 34)):
        packed = pack_rows(rows(3, 5, 64).bfloat16(), bits)
        assert packed.bytes_per_row == expected
        assert packed.codes_HNC.numel() + 2 * packed.scale_HN.numel() == 3 * 5 * expected
        assert unpack_rows(packed).dtype == torch.bfloat16


def test_rows_packed_one_by_one_are_those_packed_together():
    rows_HNE = rows(2, 9, 64)
    whole = pack_rows(rows_HNE, 4)
    for n in range(9):
        one = pack_rows(rows_HNE[:, n : n + 1], 4, whole.centre_HE)
        assert torch.equal(one.codes_HNC[:, 0], whole.codes_HNC[:, n])
        assert torch.equal(unpack_rows(one)[:, 0], unpack_rows(whole)[:, n])


@pytest.mark.parametrize("value", [0.0, 1e-9, 3.0, 6e4, 1e8])
def test_numbers_of_any_size(value):
    rows_HNE = torch.full((1, 3, 8), value)
    rows_HNE[0, 1] = -value
    found_HNE = unpack_rows(pack_rows(rows_HNE, 8, torch.zeros(1, 8)), torch.float32)
    assert torch.isfinite(found_HNE).all()
    assert (found_HNE - rows_HNE).abs().max() <= 0.01 * value + 1e-6 or value > 1e6


def test_what_cannot_be_packed_is_named():
    with pytest.raises(ConfigError, match="8 or 4 bits; got 3"):
        pack_rows(rows(1, 2, 8), 3)
    with pytest.raises(ConfigError, match="a head has 7"):
        pack_rows(torch.zeros(1, 2, 7), 4)
    with pytest.raises(ConfigError, match="not finite"):
        pack_rows(torch.full((1, 2, 8), torch.nan), 4)
