"""Rounding: never off by more than half a step, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longmem.errors import CheckpointError
from longmem.quantize import GROUP, dequantize, quantize


@given(
    st.integers(1, 5),
    st.integers(1, 3 * GROUP),
    st.sampled_from([8, 4]),
    st.sampled_from([1e-4, 0.02, 1.0, 50.0]),
    st.integers(0, 99),
)
def test_rounding_is_off_by_half_a_step_at_most(rows: int, columns: int, bits: int, size: float, seed: int) -> None:
    weight_OI = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    stored = quantize(weight_OI, bits)
    again_OI = dequantize(stored["packed"], stored["scale"], columns)
    assert again_OI.shape == weight_OI.shape and again_OI.dtype == torch.float32
    step_OI = stored["scale"].float().clamp(min=torch.finfo(torch.float16).tiny).repeat_interleave(GROUP, 1)
    # The scale is itself rounded to float16, so that a group's largest weight may lie a little beyond its last code.
    limit = 2 ** (bits - 1) - 1
    assert ((again_OI - weight_OI).abs() <= step_OI[:, :columns] * (0.5 + limit * 2**-10)).all()


@given(st.integers(1, 4), st.integers(1, 150))
def test_four_bits_take_half_the_bytes_of_eight(rows: int, columns: int) -> None:
    weight_OI = torch.randn(rows, columns)
    eight, four = quantize(weight_OI, 8), quantize(weight_OI, 4)
    padded = -(-columns // GROUP) * GROUP
    assert eight["packed"].shape == (rows, padded) and eight["packed"].dtype == torch.int8
    assert four["packed"].shape == (rows, padded // 2) and four["packed"].dtype == torch.uint8
    assert eight["scale"].shape == four["scale"].shape == (rows, padded // GROUP)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_survives(bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    codes = torch.arange(-limit, limit + 1).float()
    weight_OI = 0.5 * torch.nn.functional.pad(codes, (0, -len(codes) % GROUP))[None]
    if bits == 8:  # each group needs its own largest weight for its scale to be the same
        weight_OI[:, ::GROUP] = -0.5 * limit
    stored = quantize(weight_OI, bits)
    assert torch.equal(dequantize(stored["packed"], stored["scale"], weight_OI.shape[1]), weight_OI)


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_stays_nothing(bits: int) -> None:
    stored = quantize(torch.zeros(2, 70), bits)
    assert torch.equal(dequantize(stored["packed"], stored["scale"], 70), torch.zeros(2, 70))


@given(st.integers(1, 200))
def test_one_group_does_not_coarsen_another(columns: int) -> None:
    weight_OI = torch.full((1, GROUP + columns), 0.02)
    weight_OI[0, 0] = 1000.0
    stored = quantize(weight_OI, 8)
    again_OI = dequantize(stored["packed"], stored["scale"], GROUP + columns)
    torch.testing.assert_close(again_OI[:, GROUP:], weight_OI[:, GROUP:], rtol=0.01, atol=0)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    stored = quantize(torch.randn(3, 70), 4)
    with pytest.raises(CheckpointError, match="the file is damaged"):
        dequantize(stored["packed"], stored["scale"][:, :1], 70)
    with pytest.raises(CheckpointError, match="the file is damaged"):
        dequantize(stored["packed"][:2], stored["scale"], 70)


def test_other_numbers_of_bits_are_not_offered() -> None:
    with pytest.raises(ValueError, match="8 or 4 bits, not 5"):
        quantize(torch.randn(2, 2), 5)
