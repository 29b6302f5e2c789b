"""Remembered keys and values in few bits.

    rows − centre of their head → signs and Hadamard → one scale a row → codes of 4 or 8 bits

Attention is indifferent to a rotation of keys and queries together, but rounding is not: keys have a few coordinates
far larger than the rest, which would take the whole range of a code. Turned, all coordinates are alike. What all
keys of a head share, its centre, is kept once. (Rotations before rounding: QuaRot, arXiv 2404.00456.)

Everything is done a row at a time in a fixed order of sums, so that a row's codes do not depend on what is packed
beside it, nor what they say on the machine.

H memory heads, N tokens, E head size, C bytes of codes a row, P = C + 2 bytes with the scale.
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
# Tokens at a time: what they are on the way fits into a processor's cache.
BLOCK = 1024


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

    def to_bytes(self) -> Tensor:
        """Codes and behind them the scale of each row as one tensor (H, N, P), uint8, as segment files hold it."""
        scale_HN2 = self.scale_HN.contiguous().unsqueeze(-1).view(torch.uint8)
        return torch.cat((self.codes_HNC, scale_HN2), dim=-1)

    @classmethod
    def from_bytes(cls, bytes_HNP: Tensor, bits: int, centre_HE: Tensor) -> PackedRows:
        """What `to_bytes` gave."""
        scale_HN = bytes_HNP[..., -2:].contiguous().view(torch.float16).squeeze(-1)
        return cls(bytes_HNP[..., :-2], scale_HN, centre_HE, bits)


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
    finite_rows(rows_HNE)
    if centre_HE is None:
        centre_HE = rows_HNE.float().mean(1) if tokens else rows_HNE.new_zeros(heads, head_dim, dtype=torch.float32)
    centre_HE = centre_HE.to(rows_HNE.device)
    parts = [_pack(rows_HnE.float() - centre_HE[:, None], bits) for rows_HnE in rows_HNE.split(BLOCK, dim=1)]
    codes_HNC, scale_HN = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return PackedRows(codes_HNC, scale_HN, centre_HE, bits)


def finite_rows(rows_HNE: Tensor) -> None:
    """Refuse what cannot be packed.

    Raises:
        ConfigError: an odd head size, or numbers that are not finite.
    """
    if rows_HNE.shape[2] % 2:
        raise ConfigError(f"Rows of an even number of numbers can be packed; a head has {rows_HNE.shape[2]}.")
    if not torch.isfinite(rows_HNE).all():
        raise ConfigError("Keys or values hold numbers that are not finite, which no code can say. Were they encoded?")


def _pack(rows_HNE: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (H, N, C) and scales (H, N) of centred rows."""
    turned_HNE = _turn(rows_HNE * _signs(rows_HNE.shape[-1]).to(rows_HNE))
    top = 2 ** (bits - 1) - 1
    widest_HN = turned_HNE.abs().amax(-1) / top
    # float16 holds scales up to 65,504, and none below 6e-8: rows nearer than that to their centre become it.
    best_HN, scale_HN = torch.full_like(widest_HN, torch.inf), torch.zeros_like(widest_HN)
    for stretch in _STRETCHES:
        tried_HN = (widest_HN * stretch).clamp(max=6e4).half().float()
        error_HN = sum_in_order((_round(turned_HNE, tried_HN, top) * tried_HN[..., None] - turned_HNE).square())
        better_HN = error_HN < best_HN
        best_HN, scale_HN = torch.where(better_HN, error_HN, best_HN), torch.where(better_HN, tried_HN, scale_HN)
    code_HNE = _round(turned_HNE, scale_HN, top).to(torch.int16)
    if bits == 4:
        code_HNE = (code_HNE & 15).to(torch.uint8)
        codes_HNC = code_HNE[..., ::2] | (code_HNE[..., 1::2] << 4)
    else:
        codes_HNC = (code_HNE & 255).to(torch.uint8)
    return codes_HNC, scale_HN.half()


def unpack_rows(packed: PackedRows, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows (H, N, E), as near to what was packed as its bits allow."""
    heads, tokens, _ = packed.codes_HNC.shape
    rows_HNE = torch.empty(heads, tokens, packed.centre_HE.shape[-1], dtype=dtype, device=packed.codes_HNC.device)
    for first in range(0, tokens, BLOCK):
        some = slice(first, first + BLOCK)
        rows_HNE[:, some] = _unpack(packed.codes_HNC[:, some], packed.scale_HN[:, some], packed.bits, packed.centre_HE)
    return rows_HNE


def _unpack(codes_HNC: Tensor, scale_HN: Tensor, bits: int, centre_HE: Tensor) -> Tensor:
    """Rows (H, N, E), float32."""
    if bits == 4:
        # A code in the low and the high half of a signed byte: shifts bring its sign along.
        signed_HNC = codes_HNC.view(torch.int8)
        codes_HNC = torch.stack((signed_HNC << 4 >> 4, signed_HNC >> 4), dim=-1).flatten(-2)
    else:
        codes_HNC = codes_HNC.view(torch.int8)
    rows_HNE = _turn(codes_HNC.float() * scale_HN.float()[..., None])
    return rows_HNE * _signs(rows_HNE.shape[-1]).to(rows_HNE) + centre_HE.to(rows_HNE)[:, None]


def _round(turned_HNE: Tensor, scale_HN: Tensor, top: int) -> Tensor:
    return (turned_HNE / scale_HN.clamp(min=1e-8)[..., None]).round().clamp(-top - 1, top)


def _turn(rows_HNE: Tensor) -> Tensor:
    """Times the Hadamard matrix (Sylvester's order, its own inverse) in blocks as large as divide E.

    Sums and differences of halves instead of a product of matrices, whose order of sums depends on the shape.
    """
    head_dim = rows_HNE.shape[-1]
    block = head_dim & -head_dim
    half = 1
    while half < block:
        pair_HNX2Y = rows_HNE.unflatten(-1, (-1, 2, half))
        one, other = pair_HNX2Y.unbind(-2)
        rows_HNE = torch.stack((one + other, one - other), dim=-2).flatten(-3)
        half *= 2
    return rows_HNE / block**0.5


def sum_in_order(rows_HNE: Tensor) -> Tensor:
    """Sums over the last dimension, always in the same order."""
    while rows_HNE.shape[-1] % 2 == 0:
        one, other = rows_HNE.chunk(2, dim=-1)
        rows_HNE = one + other
    total_HN = rows_HNE[..., 0]
    for place in range(1, rows_HNE.shape[-1]):
        total_HN = total_HN + rows_HNE[..., place]
    return total_HN


@cache
def _signs(head_dim: int) -> Tensor:
    """Signs (E,) that rows are multiplied with before they are turned. Part of the format: never change them."""
    # A linear congruential sequence: any signs would do, as long as they stay.
    state, signs = 1, []
    for _ in range(head_dim):
        state = (25173 * state + 13849) % 65536
        signs.append(1.0 if state < 32768 else -1.0)
    return torch.tensor(signs)
