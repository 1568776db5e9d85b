"""The inputs of every comparison with another tool: named corners of the format, and random tensors.

A corner is a tensor (rows, K) whose every value BF16 holds exactly, and the tensor scale to quantize it with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qad.scales import tensor_scale_for

TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
MAGNITUDES = tuple(10.0**exponent for exponent in range(-6, 5))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WITHOUT_RECIPROCAL = "product of scales below the normal FP32 numbers"
"""Where vLLM's emulation has no numbers to compare with: the reciprocal of the product is infinite and its zeros become NaN."""
SCALES = ("power of two", "amax / 2688", "arbitrary")


@dataclass(frozen=True)
class Case:
    """x: (rows, K) of a float type; tensor_scale: () float32."""

    name: str
    x: Tensor
    tensor_scale: Tensor


def corners() -> list[Case]:
    """Every corner by name, in FP32."""
    return [
        *(_tie(value) for value in TIES),
        _case("all-zero block", [[0.0] * 16 + _spread(1.0)], 2.0**-11),
        _case("underflowing block", [_spread(size) for size in (2.0**-9, 2.0**-10, 2.0**-13, 2.0**-40)], 1.0),
        _case("plus and minus zero", [[6.0, *[0.0, -0.0] * 7, -6.0], [-0.0] * 16], 1.0),
        _case(
            "negative that rounds to zero", [[6.0, -(2.0**-100), *[-0.1015625, -0.25, 0.25, 2.0**-100] * 3, -6.0, -0.125]], 1.0
        ),
        _case("saturation", [_spread(size) for size in (2704.0, 2784.0, 2800.0, 2688.0 * 2, 2688.0 * 1024)], 1.0),
        _case("one huge outlier", [[9984.0, *_spread(2.0**-10)[1:]], [*_spread(1.0)[1:], -9984.0]], 4.0),
        _case("subnormal block scale", [_spread(6 * halves * 2.0**-10) for halves in range(2, 17)], 1.0),
        _case("block scale between two E4M3 numbers", [_spread(6 * (1 + odd / 16)) for odd in range(1, 16, 2)], 1.0),
        _case("single non-zero element", [[0.0] * i + [(-1.0) ** i] + [0.0] * (15 - i) for i in range(16)], 2.0**-11),
        _case(WITHOUT_RECIPROCAL, [_spread(2.0**e) for e in range(-136, -120, 3)], 2.0**-126),
    ]


def _case(name: str, rows: list[list[float]], tensor_scale: float) -> Case:
    return Case(name, torch.tensor(rows).bfloat16().float(), torch.tensor(tensor_scale))


def _spread(amax: float) -> list[float]:
    """Sixteen numbers of both signs; the first is the largest."""
    return [amax * n / 64 for n in (64, -1, 3, -5, 8, -11, 16, -21, 27, -32, 37, -43, 48, -53, 0, 59)]


def _tie(value: float) -> Case:
    """A midpoint and its neighbours in BF16, both signs, under four block scales, the smallest normal among them."""
    bits = torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)
    below, above = (float((bits + step).view(torch.bfloat16)) for step in (-1, 1))
    row = [6.0, value, -value, below, -below, above, -above, *[value, -value] * 4, -6.0]
    rows = [[x * block_scale for x in row] for block_scale in (1.0, 2.0**-6, 256.0, 2.0**-4)]
    return _case(f"tie at {value:g}", rows, 1.0)


def random_cases(elements: int, *, width: int = 512, seed: int = 0) -> Iterator[Case]:
    """At least `elements` in all: every type, magnitude and choice of tensor scale; normal and heavy-tailed.

    Of the arbitrary tensor scales some let blocks saturate and some let them underflow.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = [(d, m, s, h) for d in DTYPES for m in MAGNITUDES for s in SCALES for h in (False, True)]
    rows = -(-elements // (len(kinds) * width))
    for dtype, magnitude, scale, heavy in kinds:
        x = torch.randn(rows, width, generator=generator) * magnitude
        if heavy:
            x *= torch.exp(1.5 * torch.randn(rows, width, generator=generator))
            x *= torch.exp(2 * torch.randn(rows, 1, generator=generator))
        x = x.clamp(-6e4, 6e4).to(dtype)
        amax = float(x.abs().max())
        tensor_scale = tensor_scale_for(amax, power_of_two=scale == "power of two")
        if scale == "arbitrary":
            tensor_scale = tensor_scale * torch.exp(4 * torch.rand((), generator=generator) - 1)
        tail = "heavy tail" if heavy else "normal"
        yield Case(f"{str(dtype).removeprefix('torch.')}, {magnitude:g}, {scale}, {tail}", x, tensor_scale)
