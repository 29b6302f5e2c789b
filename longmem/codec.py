"""Remembered keys and values in few bits.

    rows − centre of their head → signs and Hadamard → one scale a row → codes of 4 or 8 bits

Attention is indifferent to a rotation of keys and queries together, but rounding is not: keys have a few coordinates
far larger than the rest, which would take the whole range of a code. Turned, all coordinates are alike. What all
keys of a head share, its centre, is kept once. (Rotations before rounding: QuaRot, arXiv 2404.00456.)

H memory heads, N tokens, E head size, C bytes of codes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from longmem.errors import ConfigError

BITS = (8, 4)
# Parts of the largest number that a scale may stretch the codes over: some numbers cut off cost less than coarse steps.
_STRETCHES = (1.0, 0.9, 0.8, 0.7, 0.6)


@dataclass(frozen=True)
class PackedRows:
    """Rows (H, N, E) in few bits.

    Attributes:
        codes_HNC: uint8; with 4 bits the low half of byte c is number 2c, the high half 2c + 1.
        scale_HN: float16, what a code is multiplied by.
        centre_HE: float32, what is added in the end.
        bits: of a code.
    """

    codes_HNC: Tensor
    scale_HN: Tensor
    centre_HE: Tensor
    bits: int

    @property
    def bytes_per_row(self) -> int:
        """Of one token and head."""
        return self.codes_HNC.shape[2] + self.scale_HN.element_size()


def pack_rows(rows_HNE: Tensor, bits: int, centre_HE: Tensor | None = None) -> PackedRows:
    """Round rows to codes.

    Args:
        rows_HNE: keys or values, finite.
        bits: 8 or 4.
        centre_HE: of the bank that the rows join; by default their own mean.

    Raises:
        ConfigError: another number of bits, an odd head size, or numbers that are not finite.
    """
    heads, tokens, head_dim = rows_HNE.shape
    if bits not in BITS:
        raise ConfigError(f"Rows can be packed in {' or '.join(map(str, BITS))} bits; got {bits}.")
    if head_dim % 2:
        raise ConfigError(f"Rows of an even number of numbers can be packed; a head has {head_dim}.")
    rows_HNE = rows_HNE.float()
    if not torch.isfinite(rows_HNE).all():
        raise ConfigError("Keys or values hold numbers that are not finite, which no code can say. Were they encoded?")
    if centre_HE is None:
        centre_HE = rows_HNE.mean(1) if tokens else rows_HNE.new_zeros(heads, head_dim)
    turned_HNE = _turn(rows_HNE - centre_HE[:, None])
    top = 2 ** (bits - 1) - 1
    widest_HN = turned_HNE.abs().amax(-1) / top
    # float16 holds scales up to 65,504, and none below 6e-8: rows nearer than that to their centre become it.
    best_HN, scale_HN = torch.full_like(widest_HN, torch.inf), torch.zeros_like(widest_HN)
    for stretch in _STRETCHES:
        tried_HN = (widest_HN * stretch).clamp(max=6e4).half().float()
        error_HN = (_round(turned_HNE, tried_HN, top) * tried_HN[..., None] - turned_HNE).square().sum(-1)
        better_HN = error_HN < best_HN
        best_HN, scale_HN = torch.where(better_HN, error_HN, best_HN), torch.where(better_HN, tried_HN, scale_HN)
    code_HNE = _round(turned_HNE, scale_HN, top).to(torch.int16)
    if bits == 4:
        code_HNE = (code_HNE & 15).to(torch.uint8)
        codes_HNC = code_HNE[..., ::2] | (code_HNE[..., 1::2] << 4)
    else:
        codes_HNC = (code_HNE & 255).to(torch.uint8)
    return PackedRows(codes_HNC, scale_HN.half(), centre_HE, bits)


def unpack_rows(packed: PackedRows, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows (H, N, E), as near to what was packed as its bits allow."""
    codes_HNC = packed.codes_HNC.to(torch.int16)
    if packed.bits == 4:
        codes_HNC = torch.stack((codes_HNC & 15, codes_HNC >> 4), dim=-1).flatten(-2)
    half = 2 ** (packed.bits - 1)
    code_HNE = torch.where(codes_HNC >= half, codes_HNC - 2 * half, codes_HNC)
    turned_HNE = code_HNE.float() * packed.scale_HN.float()[..., None]
    return (_turn_back(turned_HNE) + packed.centre_HE[:, None]).to(dtype)


def _round(turned_HNE: Tensor, scale_HN: Tensor, top: int) -> Tensor:
    return (turned_HNE / scale_HN.clamp(min=1e-8)[..., None]).round().clamp(-top - 1, top)


def _turn(rows_HNE: Tensor) -> Tensor:
    sign_E, hadamard_BB = _rotation(rows_HNE.shape[-1])
    return ((rows_HNE * sign_E.to(rows_HNE)).unflatten(-1, (-1, len(hadamard_BB))) @ hadamard_BB.to(rows_HNE)).flatten(
        -2
    )


def _turn_back(turned_HNE: Tensor) -> Tensor:
    sign_E, hadamard_BB = _rotation(turned_HNE.shape[-1])
    # The matrix is its own inverse.
    rows_HNE = (turned_HNE.unflatten(-1, (-1, len(hadamard_BB))) @ hadamard_BB.to(turned_HNE)).flatten(-2)
    return rows_HNE * sign_E.to(turned_HNE)


@cache
def _rotation(head_dim: int) -> tuple[Tensor, Tensor]:
    """Signs (E,), and the Hadamard matrix of blocks as large as divide E. Part of the format: never change it."""
    matrix_BB = torch.ones(1, 1)
    while head_dim % (2 * len(matrix_BB)) == 0:
        matrix_BB = torch.cat((torch.cat((matrix_BB, matrix_BB), 1), torch.cat((matrix_BB, -matrix_BB), 1)))
    # A linear congruential sequence: any signs would do, as long as they stay.
    state, signs = 1, []
    for _ in range(head_dim):
        state = (25173 * state + 13849) % 65536
        signs.append(1.0 if state < 32768 else -1.0)
    return torch.tensor(signs), matrix_BB / len(matrix_BB) ** 0.5
