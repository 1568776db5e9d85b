"""How scales are chosen: one function for tensor scales, one signature for rules of block scales.

A rule maps (x, tensor_scale) to block scales (..., K/16) in E4M3, none of them zero. So far the one rule is `amax`.
Source of its corners: ModelOpt 0.47 (`NVFP4QTensor.get_weights_scaling_factor`): the scale is amax / (6 * tensor_scale),
exactly zero becomes 1, the rest is clamped to [2^-9, 448] before the cast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qad.nvfp4 import E2M1_MAX, E4M3_MAX, E4M3_SMALLEST, blocks

_SMALLEST_NORMAL = 2.0**-126


def tensor_scale_for(amax: float, *, power_of_two: bool) -> Tensor:
    """The FP32 tensor scale () under which `amax` is the largest number: amax / 2688, rounded up to a power of two.

    Zero gives 1 (every code is zero, any scale decodes it). The result is never subnormal.
    """
    if not math.isfinite(amax) or amax < 0:
        raise ValueError(f"amax must be finite and not negative, found {amax!r}")
    if amax == 0:
        return torch.tensor(1.0)
    scale = float(torch.tensor(amax, dtype=torch.float32) / (E2M1_MAX * E4M3_MAX))
    if power_of_two and math.isfinite(scale):
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
    if not math.isfinite(scale):
        raise ValueError(f"amax {amax!r} is beyond FP32")
    return torch.tensor(max(scale, _SMALLEST_NORMAL), dtype=torch.float32)


def amax_block_scales(x: Tensor, tensor_scale: Tensor) -> Tensor:
    """Block scales (..., K/16) E4M3 that map each block's largest magnitude to 6, clamped to [2^-9, 448]."""
    scale = blocks(x).abs().amax(dim=-1).float() / (E2M1_MAX * tensor_scale)
    scale = torch.where(scale == 0, 1.0, scale)
    return scale.clamp(E4M3_SMALLEST, E4M3_MAX).to(torch.float8_e4m3fn)
