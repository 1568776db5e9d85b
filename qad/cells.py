"""Rounding cells: where the master of a weight starts, so that it encodes to codes that were chosen by another rule.

With block scales that stay as they are, a code stands for a cell of numbers: between two midpoints of the grid, times the scale.
The cells of codes 7 and 15 (6 and -6) have no outer border. Ties belong to the even code, so its cell is closed; that
of code 8 (-0) holds negative numbers only and that of code 0 none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qad.nvfp4 import Packed, blocks, encode_e2m1, unpack

_LOWER = (0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_UPPER = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, float("inf"))
"""Borders of the cells of the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
_TINY = 2.0**-24
"""Of the scale: the size of the number nearest to zero that a master with code 8 is moved to."""
_LONGEST_WALK = 4
"""Steps from a border, as FP32 computes it, to the first number that FP32 division puts inside the cell."""


def nearest_in_cell(x: Tensor, encoding: Packed, *, name: str = "weight") -> Tensor:
    """`x` moved to the nearest number that encodes to the codes of `encoding` with its scales; float32, shape (..., K).

    What is in its cell already stays bit for bit. The result is exact: `nvfp4.quantize` of it gives these codes (ValueError,
    which names the tensor, if that cannot be had in FP32).
    """
    code = blocks(unpack(encoding.packed))
    scale = (encoding.block_scale.float() * encoding.tensor_scale).unsqueeze(-1)
    magnitude = (code & 7).long()
    negative = code >= 8
    sign = torch.where(negative, -1.0, 1.0)
    lower, upper = (torch.tensor(bounds, device=x.device)[magnitude] * scale for bounds in (_LOWER, _UPPER))
    lower = torch.where(code == 8, _TINY * scale, lower)
    values = blocks(x.detach().float())
    found = torch.where(encode_e2m1(values / scale) == code, values, sign * (values * sign).clamp(lower, upper))
    middle = sign * torch.where(magnitude == 7, torch.full_like(upper, float("inf")), (lower + upper) / 2)
    for _ in range(_LONGEST_WALK + 1):
        wrong = encode_e2m1(found / scale) != code
        if not bool(wrong.any()):
            return found.reshape(x.shape)
        found = torch.where(wrong, torch.nextafter(found, middle), found)
    index = tuple(int(i) for i in wrong.reshape(x.shape).nonzero()[0])
    raise ValueError(
        f"{name}: {int(wrong.sum())} values cannot be moved into the rounding cells of their codes in FP32, the first at index "
        f"{index}; its scale is too small: give the tensor a larger tensor scale"
    )
