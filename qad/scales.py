"""How scales are chosen: one function for tensor scales, one signature for the rules of block scales.

A rule maps (x, tensor_scale) to block scales (..., K/16) in E4M3, none of them zero:
- `amax`: the largest magnitude of the block becomes 6.
- `mse`: of all E4M3 numbers the one under which the block's squared error is smallest, optionally weighted by column.
- `four_over_six`: the largest magnitude becomes 6 or 4, whichever has the smaller squared error.
All of them are plain NVFP4 when decoded. Rules other than `amax` are for weights: activations are quantized while serving.

Sources. Corners of `amax`: ModelOpt 0.47 (`NVFP4QTensor.get_weights_scaling_factor`): the scale is amax / (6 * tensor_scale),
exactly zero becomes 1, the rest is clamped to [2^-9, 448] before the cast. `four_over_six`: arXiv 2512.02010; its tensor scale
is amax / (6 * 256), so that 1.5 times the largest block scale, 384, is still an E4M3 number. Errors are those of the rounding
of `nvfp4.quantize`, bit for bit, summed in FP32 in units of the tensor scale.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from qad.nvfp4 import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, E4M3_SMALLEST, blocks

BlockScaleRule = Literal["amax", "mse", "four_over_six"]
LARGEST_BLOCK_SCALE = {"amax": E4M3_MAX, "mse": E4M3_MAX, "four_over_six": 256.0}
"""The block scale that the largest magnitude of a tensor gets, by rule: what its tensor scale is derived with."""

NVFP4_MAX = E2M1_MAX * E4M3_MAX
"""The largest NVFP4 number at a tensor scale of 1: 2688."""
_SMALLEST_NORMAL = 2.0**-126
_LARGEST_CODE = 126
"""Bits of 448, the largest E4M3 number; codes 1..126 are the positive numbers in ascending order."""
_STEPS_UP = 7
"""Candidates above the amax scale: a scale s of 8 codes or more above it is at least twice as large, and the grid of s / 2
holds every point of the grid of s that a block without saturation can round to."""
_CHUNK = 1 << 18
"""Elements searched at a time, so that they stay in a core's cache."""


def tensor_scale_for(amax: float, *, power_of_two: bool, largest: float = NVFP4_MAX, multiplier: float = 1.0) -> Tensor:
    """The FP32 tensor scale () under which `amax` becomes `largest`: amax / largest, rounded up to a power of two.

    Zero gives 1 (every code is zero, any scale decodes it). The result is never subnormal.

    Args:
        largest: 2688 for NVFP4 (less for rules that leave room, see `LARGEST_BLOCK_SCALE`), 448 for FP8.
        multiplier: applied last, so that one other than a power of two makes a scale that is no power of two.
    """
    if not math.isfinite(amax) or amax < 0:
        raise ValueError(f"amax must be finite and not negative, found {amax!r}")
    if amax == 0:
        return torch.tensor(1.0)
    scale = float(torch.tensor(amax, dtype=torch.float32) / largest)
    if power_of_two and math.isfinite(scale):
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
    scale *= multiplier
    if not math.isfinite(scale):
        raise ValueError(f"amax {amax!r} is beyond FP32")
    return torch.tensor(max(scale, _SMALLEST_NORMAL), dtype=torch.float32)


def block_scales(x: Tensor, tensor_scale: Tensor, *, rule: BlockScaleRule, importance: Tensor | None = None) -> Tensor:
    """Block scales (..., K/16) E4M3 of `x` under `rule`.

    Args:
        x: (..., K) of any float type, finite, K a multiple of 16.
        tensor_scale: () float32, positive.
        importance: (K,) float32, finite, not negative: the weight of each column's squared error; for `mse` only.
    Raises:
        ValueError: K is not a multiple of 16, or `importance` does not fit.
    """
    if importance is not None:
        _require_fitting(importance, x, rule)
    if rule == "amax":
        return amax_block_scales(x, tensor_scale)
    rows = x.detach().reshape(-1, x.shape[-1])
    compiled = x.device.type == "cpu" and find_spec("numba") is not None
    choose = _choose_compiled if compiled else _choose
    step = max(1, _CHUNK // max(1, x.shape[-1]))
    found = []
    for start in range(0, len(rows), step):
        magnitude = rows[start : start + step].float().abs().contiguous()
        found.append(choose(magnitude, tensor_scale, rule, importance))
    codes = torch.cat(found) if found else torch.empty(0, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)


def amax_block_scales(x: Tensor, tensor_scale: Tensor) -> Tensor:
    """Block scales (..., K/16) E4M3 that map each block's largest magnitude to 6, clamped to [2^-9, 448]."""
    return _as_block_scales(blocks(x).abs().amax(dim=-1).float() / (E2M1_MAX * tensor_scale))


def _as_block_scales(scale: Tensor) -> Tensor:
    scale = torch.where(scale == 0, 1.0, scale)
    return scale.clamp(E4M3_SMALLEST, E4M3_MAX).to(torch.float8_e4m3fn)


def _choose(magnitude: Tensor, tensor_scale: Tensor, rule: BlockScaleRule, importance: Tensor | None) -> Tensor:
    """Codes (N * K/16,) uint8 of the block scales of magnitudes (N, K): the reference."""
    first, by_block = _amax_codes(magnitude, tensor_scale), blocks(magnitude).reshape(-1, BLOCK_SIZE)
    if rule == "four_over_six":
        second = _four_codes(magnitude, tensor_scale)
        errors = [_squared_error(by_block, code, tensor_scale, None) for code in (first, second)]
        return torch.where(errors[1] < errors[0], second, first)
    weights = None if importance is None else blocks(importance.expand_as(magnitude)).reshape(-1, BLOCK_SIZE)
    return _search(by_block, first, tensor_scale, weights)


def _choose_compiled(magnitude: Tensor, tensor_scale: Tensor, rule: BlockScaleRule, importance: Tensor | None) -> Tensor:
    """The same bits as `_choose`."""
    from qad import _numba_scales as compiled

    first = _amax_codes(magnitude, tensor_scale)
    out = torch.empty_like(first)
    values, scale = magnitude.view(-1).numpy(), float(tensor_scale)
    if rule == "four_over_six":
        compiled.better_of(values, first.numpy(), _four_codes(magnitude, tensor_scale).numpy(), scale, out.numpy())
    else:
        weights = torch.empty(0) if importance is None else importance.float().contiguous()
        compiled.search(values, first.numpy(), weights.numpy(), scale, _STEPS_UP, out.numpy())
    return out


def _amax_codes(magnitude: Tensor, tensor_scale: Tensor) -> Tensor:
    return amax_block_scales(magnitude, tensor_scale).view(torch.uint8).view(-1)


def _four_codes(magnitude: Tensor, tensor_scale: Tensor) -> Tensor:
    wanted = blocks(magnitude).amax(dim=-1) / (E2M1_MAX * tensor_scale)
    return _as_block_scales(1.5 * wanted).view(torch.uint8).view(-1)


def _search(magnitude: Tensor, start: Tensor, tensor_scale: Tensor, weights: Tensor | None) -> Tensor:
    """Codes (B,) with the smallest error for magnitudes (B, 16), weights (B, 16), from those of the amax rule, which win ties.

    Upwards seven candidates suffice (see `_STEPS_UP`; exact where the amax scale is a normal E4M3 number, 2^-6 or more).
    Downwards a block stays in the search while the error of its largest value alone, saturated, is below the best error.
    """
    best, best_error = start.clone(), _squared_error(magnitude, start, tensor_scale, weights)
    for step in range(1, _STEPS_UP + 1):
        code = (start.int() + step).clamp(max=_LARGEST_CODE).to(torch.uint8)
        error = _squared_error(magnitude, code, tensor_scale, weights)
        better = error < best_error
        best, best_error = torch.where(better, code, best), torch.where(better, error, best_error)
    largest, index = magnitude.max(dim=-1, keepdim=True)
    largest = (largest / tensor_scale).squeeze(-1)
    weight = torch.ones_like(largest) if weights is None else weights.gather(-1, index).squeeze(-1)
    active, code = torch.arange(len(magnitude), device=magnitude.device), start
    while len(active):
        code = code - 1
        bound = (largest[active] - E2M1_MAX * _value(code)).clamp(min=0).square() * weight[active]
        kept = (code > 0) & (bound < best_error[active])
        active, code = active[kept], code[kept]
        error = _squared_error(magnitude[active], code, tensor_scale, None if weights is None else weights[active])
        better = error < best_error[active]
        best[active[better]], best_error[active[better]] = code[better], error[better]
    return best


def _squared_error(magnitude: Tensor, code: Tensor, tensor_scale: Tensor, weights: Tensor | None) -> Tensor:
    """Squared error (B,) of blocks (B, 16) under the block scales with these codes, in units of the squared tensor scale.

    The sum is a tree of halves, so that every way of computing it gives the same bits.
    """
    scale = _value(code)
    scaled = magnitude / (scale * tensor_scale).unsqueeze(-1)
    terms = (nearest_e2m1(scaled) - scaled).square()
    terms = terms if weights is None else terms * weights
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms.squeeze(-1) * scale.square()


def nearest_e2m1(magnitude: Tensor) -> Tensor:
    """The E2M1 values nearest to magnitudes (float32, not negative), ties to the even code: as `nvfp4.encode_e2m1` rounds.

    Adding and subtracting 1.5 * 2^23 * step rounds to a multiple of step.
    """
    clamped = magnitude.clamp(max=E2M1_MAX)
    magic = torch.where(clamped < 2.0, 6291456.0, torch.where(clamped < 4.0, 12582912.0, 25165824.0))
    return (clamped + magic) - magic


def _value(code: Tensor) -> Tensor:
    return code.view(torch.float8_e4m3fn).float()


def _require_fitting(importance: Tensor, x: Tensor, rule: str) -> None:
    if rule != "mse":
        raise ValueError(f'importance has no effect with the rule "{rule}"; only "mse" weighs errors')
    if importance.shape != x.shape[-1:]:
        raise ValueError(f"importance has shape {tuple(importance.shape)}, the columns are {x.shape[-1]}")
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ValueError("importance must be finite and not negative")
