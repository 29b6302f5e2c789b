"""Remembered keys in few bits, and more of them in the coordinates that decide scores.

    (row − centre of its head) / unit of each coordinate → one scale a row → codes of 2 to 8 bits, 4 on average

A key is there to be multiplied by queries. Keys vary in some coordinates far more than in others, and queries ask for
some far more than for others; what rounding a coordinate costs a score is the product of both. Bits go where they save
most of that. To turn rows first (`longmem.codec`) makes all coordinates alike, and gives that away.

As there, a row's codes and what they say depend on nothing but the row, to the bit.

H memory heads, N tokens, Q queries, E head size, C bytes of codes a row, P = C + 2 bytes with the scale.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longmem.codec import BLOCK, finite_rows, sum_in_order
from longmem.errors import BankError

# Bits of a coordinate on average, at least and at most. None goes without: other texts may need what one did not.
_MEAN, _LEAST, _MOST = 4, 2, 8
# A normal number of variance 1 in 0 to 8 bits of equal steps: half of the best step, and the mean squared error that is
# left (J. Max, Quantizing for minimum distortion, 1960).
_UNITS = (1.0, 0.798, 0.49785, 0.293, 0.1676, 0.09405, 0.05205, 0.02845, 0.0154)
_ERRORS = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104, 0.000304, 0.0000877)
# Scales that are tried, as parts of what the row's spread suggests.
_STRETCHES = (1.0, 0.8, 0.9, 1.15, 1.35)


@dataclass(frozen=True)
class Grid:
    """How the coordinates of keys are coded. It must not depend on what the bank will remember (see `BankSpec.centre`).

    Code c of a coordinate with b bits says (2 c + 1 − 2ᵇ) · unit · scale of the row.

    Attributes:
        bits_HE: int64, 2 … 8, 4 on average in each head.
        unit_HE: float32, half of a step.
    """

    bits_HE: Tensor
    unit_HE: Tensor

    @classmethod
    def fit(cls, keys_HNE: Tensor, query_HQE: Tensor, centre_HE: Tensor) -> Grid:
        """The grid that costs the scores of these queries least.

        Args:
            keys_HNE, query_HQE: some hundreds of each, of a fixed text.
            centre_HE: what will be subtracted from keys.
        """
        spread_HE = _floored((keys_HNE.double() - centre_HE[:, None]).square().mean(1).sqrt())
        asked_HE = _floored(query_HQE.double().square().mean(1).sqrt())
        share_HE = (spread_HE * asked_HE).square()
        error = torch.tensor((*_ERRORS, _ERRORS[-1]), dtype=torch.float64)
        bits_HE = torch.full(share_HE.shape, _LEAST)
        for _ in range((_MEAN - _LEAST) * share_HE.shape[1]):
            saved_HE = share_HE * (error[bits_HE] - error[bits_HE + 1])
            bits_HE.scatter_add_(1, saved_HE.argmax(1, keepdim=True), torch.ones_like(bits_HE[:, :1]))
        return cls(bits_HE, (spread_HE * torch.tensor(_UNITS, dtype=torch.float64)[bits_HE]).float())

    def to_text(self) -> str:
        """`BankSpec.grid`."""
        units, bits = self.unit_HE.numpy().astype("<f4"), self.bits_HE.numpy().astype(np.uint8)
        return base64.b64encode(units.tobytes() + bits.tobytes()).decode()

    @classmethod
    def from_text(cls, text: str, heads: int, head_dim: int) -> Grid:
        """What `to_text` gave.

        Raises:
            BankError: it is no grid of so many heads of this size.
        """
        count = heads * head_dim
        try:
            data = base64.b64decode(text, validate=True)
            if len(data) != 5 * count:
                raise ValueError(f"{len(data)} bytes instead of {5 * count}")
            bits_HE = torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 * count).astype(np.int64))
            bits_HE = bits_HE.view(heads, head_dim)
            if bool((bits_HE > _MOST).any()) or bool((bits_HE.sum(1) != _MEAN * head_dim).any()):
                raise ValueError(f"bits of a head are not {_MEAN} on average and {_MOST} at most")
        except ValueError as error:
            raise BankError(
                f"The grid in a bank's spec is not that of {heads} heads of size {head_dim}: {error}. "
                "Take the spec from `LongMem.bank_spec_in`."
            ) from error
        unit_HE = torch.from_numpy(np.frombuffer(data, "<f4", count).astype(np.float32)).view(heads, head_dim)
        return cls(bits_HE, unit_HE)

    def to(self, device: torch.device) -> Grid:
        """The grid on a device."""
        return Grid(self.bits_HE.to(device), self.unit_HE.to(device))

    # ---- rows ------------------------------------------------------------------------------------------------

    def pack(self, rows_HNE: Tensor, centre_HE: Tensor) -> Tensor:
        """Codes and behind them the scale (float16) of each row: (H, N, P), uint8.

        Raises:
            ConfigError: an odd head size, or numbers that are not finite.
        """
        finite_rows(rows_HNE)
        grid, centre_HE = self.to(rows_HNE.device), centre_HE.to(rows_HNE.device)
        parts = [grid._pack(part_HNE.float() - centre_HE[:, None]) for part_HNE in rows_HNE.split(BLOCK, dim=1)]
        return torch.cat(parts, dim=1)

    def _pack(self, rows_HNE: Tensor) -> Tensor:
        rows_HNE = rows_HNE / self.unit_HE[:, None]
        levels_H1E = self._levels
        units_H1E = torch.tensor(_UNITS, device=rows_HNE.device)[self.bits_HE][:, None]
        spread_HN = (sum_in_order((rows_HNE * units_H1E).square()) / rows_HNE.shape[-1]).sqrt()
        best_HN, scale_HN = torch.full_like(spread_HN, torch.inf), torch.zeros_like(spread_HN)
        for stretch in _STRETCHES:
            tried_HN = (spread_HN * stretch).clamp(max=6e4).half().float()
            said_HNE = (2 * _codes(rows_HNE, tried_HN, levels_H1E) + 1 - levels_H1E) * tried_HN[..., None]
            error_HN = sum_in_order((said_HNE - rows_HNE).square())
            better_HN = error_HN < best_HN
            best_HN, scale_HN = torch.where(better_HN, error_HN, best_HN), torch.where(better_HN, tried_HN, scale_HN)
        code_HNE = _codes(rows_HNE, scale_HN, levels_H1E).int()
        # A code begins anywhere in a byte and reaches into the next one at most.
        byte_HNE, shift_H1E = self._places(rows_HNE)
        word_HNE = code_HNE << shift_H1E
        codes_HNC = torch.zeros(*scale_HN.shape, self._bytes + 1, dtype=torch.int32, device=rows_HNE.device)
        codes_HNC.scatter_add_(2, byte_HNE, word_HNE & 255).scatter_add_(2, byte_HNE + 1, word_HNE >> 8)
        scale_HN2 = scale_HN.half().contiguous().unsqueeze(-1).view(torch.uint8)
        return torch.cat((codes_HNC[..., :-1].to(torch.uint8), scale_HN2), dim=-1)

    def unpack(self, bytes_HNP: Tensor, centre_HE: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows (H, N, E), as near to what was packed as the bits allow."""
        grid, centre_HE = self.to(bytes_HNP.device), centre_HE.to(bytes_HNP.device)
        rows_HNE = torch.empty(*bytes_HNP.shape[:2], self.bits_HE.shape[1], dtype=dtype, device=bytes_HNP.device)
        for first in range(0, bytes_HNP.shape[1], BLOCK):
            some = slice(first, first + BLOCK)
            rows_HNE[:, some] = grid._unpack(bytes_HNP[:, some]) + centre_HE[:, None]
        return rows_HNE

    def _unpack(self, bytes_HNP: Tensor) -> Tensor:
        scale_HN1 = bytes_HNP[..., -2:].contiguous().view(torch.float16).float()
        codes_HNC = F.pad(bytes_HNP[..., :-2], (0, 1)).int()
        byte_HNE, shift_H1E = self._places(bytes_HNP)
        word_HNE = codes_HNC.gather(2, byte_HNE) | codes_HNC.gather(2, byte_HNE + 1) << 8
        levels_H1E = self._levels
        code_HNE = word_HNE >> shift_H1E & (levels_H1E - 1)
        return (2 * code_HNE + 1 - levels_H1E).float() * self.unit_HE[:, None] * scale_HN1

    @property
    def _bytes(self) -> int:
        return _MEAN * self.bits_HE.shape[1] // 8

    @property
    def _levels(self) -> Tensor:
        """How many codes each coordinate has, (H, 1, E), int32."""
        return (2 ** self.bits_HE[:, None]).int()

    def _places(self, rows_HNX: Tensor) -> tuple[Tensor, Tensor]:
        """The byte of a row that each coordinate begins in, (H, N, E), and the bit of it, (H, 1, E)."""
        first_H1E = (self.bits_HE.cumsum(1) - self.bits_HE)[:, None]
        return (first_H1E // 8).expand(-1, rows_HNX.shape[1], -1), (first_H1E % 8).int()


def _codes(rows_HNE: Tensor, scale_HN: Tensor, levels_H1E: Tensor) -> Tensor:
    steps_HNE = rows_HNE / (2 * scale_HN.clamp(min=1e-8))[..., None]
    return (steps_HNE + levels_H1E / 2).floor().clamp(min=0).minimum(levels_H1E - 1.0)


def _floored(spread_HE: Tensor) -> Tensor:
    """Coordinates that hardly ever vary still have a unit."""
    return spread_HE.clamp(min=1e-6).maximum(1e-3 * spread_HE.mean(1, keepdim=True))
