"""Small files for trained layers: what is stored is the difference to the backbone layer they were copied from.

Training moves a layer's weights little, so the difference survives coarse rounding that the weights themselves would
not.

O output rows, I input columns, G groups of columns that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longmem.errors import CheckpointError

GROUP = 64


def quantize(weight_OI: Tensor, bits: int) -> dict[str, Tensor]:
    """Symmetric rounding with a float16 scale for each group of 64 columns.

    Returns:
        "packed", int8 or two 4-bit codes a uint8; and "scale", (O, G).
    """
    columns = weight_OI.shape[1]
    padded = -(-columns // GROUP) * GROUP
    grouped_OGg = torch.nn.functional.pad(weight_OI.float(), (0, padded - columns)).unflatten(1, (-1, GROUP))
    limit = 2 ** (bits - 1) - 1
    scale_OG = (grouped_OGg.abs().amax(-1) / limit).to(torch.float16)
    step_OG1 = scale_OG.float().clamp(min=torch.finfo(torch.float16).tiny)[..., None]
    code_OI = (grouped_OGg / step_OG1).round().clamp(-limit, limit).flatten(1).to(torch.int8)
    if bits == 8:
        return {"packed": code_OI, "scale": scale_OG}
    if bits == 4:
        nibble_OI = (code_OI + 8).to(torch.uint8)
        return {"packed": nibble_OI[:, ::2] | (nibble_OI[:, 1::2] << 4), "scale": scale_OG}
    raise ValueError(f"weights are rounded to 8 or 4 bits, not {bits}")


def dequantize(packed: Tensor, scale_OG: Tensor, columns: int) -> Tensor:
    """The float32 (O, I) matrix that `quantize` was given, up to rounding.

    Raises:
        CheckpointError: the two tensors do not belong together.
    """
    if packed.dtype == torch.int8:
        code_OI = packed.float()
    else:
        code_OI = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).float() - 8
    if code_OI.shape != (scale_OG.shape[0], scale_OG.shape[1] * GROUP):
        raise CheckpointError(
            f"Packed weights of shape {tuple(packed.shape)} do not fit scales of shape {tuple(scale_OG.shape)}: the "
            "file is damaged."
        )
    step_OG1 = scale_OG.float().clamp(min=torch.finfo(torch.float16).tiny)[..., None]
    return (code_OI.unflatten(1, (-1, GROUP)) * step_OG1).flatten(1)[:, :columns]
