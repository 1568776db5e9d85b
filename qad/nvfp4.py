"""The NVFP4 format: E2M1 codes in blocks of 16 along the last dimension, an E4M3 scale a block, an FP32 scale a tensor.

    value = code_value * block_scale * tensor_scale          (a scale always decodes)

This module is the reference, in plain torch; `qad.kernels` holds fast paths that are bit-equal to it.
How block scales are chosen lives in `qad.scales`.

Sources. Weights follow ModelOpt's exporter (`NVFP4QTensor.quantize`, nvidia-modelopt 0.47): a true division by
`float(block_scale) * tensor_scale`, ties to the even code, the sign bit set for every `x < 0` and for no zero. Activations
follow vLLM's emulation (`ref_nvfp4_quant`, 0.32): reciprocals instead of divisions, an underflowing block becomes zero.
Decoding is `code * (block_scale * tensor_scale)` in FP32, then rounded to the wanted type; with a tensor scale that is a
power of two the result is exact in BF16, whatever the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qad.errors import NonFiniteError

BLOCK_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_SMALLEST = 2.0**-9
"""The smallest positive E4M3 number, a subnormal."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of codes 0..7; codes 8..15 are their negatives."""
_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_INV_E2M1_MAX = torch.tensor(1.0 / 6.0, dtype=torch.float32)


@dataclass(frozen=True)
class Packed:
    """One tensor in NVFP4, as it lies on disk.

    packed: (..., K/2) uint8, two codes a byte, the even index of K in the low nibble.
    block_scale: (..., K/16) float8_e4m3fn, row-major.
    tensor_scale: () float32, positive.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What identifies the encoding, as bytes and scales."""
        return self.packed, self.block_scale.view(torch.uint8), self.tensor_scale


def require_finite(x: Tensor, name: str) -> None:
    """Raise NonFiniteError with the tensor's name and the first bad index if `x` holds NaN or infinity."""
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        index = tuple(int(i) for i in (~finite).nonzero()[0])
        raise NonFiniteError(
            f"{name}: holds {int((~finite).sum())} values that are NaN or infinite, the first at index {index}; "
            "NVFP4 encodes finite numbers only: look for the step that produced them"
        )


def blocks(x: Tensor) -> Tensor:
    """View `x` (..., K) as (..., K/16, 16); K must be a multiple of 16 (ValueError)."""
    if x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"the last dimension is {x.shape[-1]}, not a multiple of {BLOCK_SIZE}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)


def encode_e2m1(x: Tensor) -> Tensor:
    """Round `x` (any shape, float32) to E2M1 codes 0..15 (uint8); ties to even, magnitudes above 6 saturate.

    The midpoints 0.25 0.75 1.25 1.75 2.5 3.5 5 go to 0 1 1 2 2 4 4. A negative number that rounds to zero has code 8.
    """
    magnitude = x.abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for index, bound in enumerate(_BOUNDS):
        rounds_up = magnitude >= bound if index % 2 else magnitude > bound
        code += rounds_up.to(torch.uint8)
    return code + (x < 0).to(torch.uint8) * 8


def decode_e2m1(code: Tensor) -> Tensor:
    """Values (float32) of codes 0..15."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=torch.float32, device=code.device)
    return table[code.long()]


def pack(code: Tensor) -> Tensor:
    """Two codes a byte: (..., K) uint8 to (..., K/2) uint8, low nibble first."""
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def quantize(x: Tensor, block_scale: Tensor, tensor_scale: Tensor, *, name: str = "tensor") -> Packed:
    """Encode a weight with given scales: code = E2M1(x / (float(block_scale) * tensor_scale)), all in FP32.

    Args:
        x: (..., K) of any float type, finite, K a multiple of 16.
        block_scale: (..., K/16) float8_e4m3fn, never zero (`qad.scales` sees to it).
        tensor_scale: () float32, positive.
    Raises:
        NonFiniteError: `x` holds NaN or infinity.
        ValueError: K is not a multiple of 16.
    Source: ModelOpt 0.47, `NVFP4QTensor.quantize`: equal in every packed byte.
    """
    require_finite(x, name)
    scaled = blocks(x).float() / (block_scale.float() * tensor_scale).unsqueeze(-1)
    return Packed(pack(encode_e2m1(scaled).reshape(x.shape)), block_scale, tensor_scale)


def dequantize(encoding: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Decode: code * (float(block_scale) * tensor_scale) in FP32, then rounded to `dtype`; shape (..., K)."""
    values = blocks(decode_e2m1(unpack(encoding.packed)))
    scale = (encoding.block_scale.float() * encoding.tensor_scale).unsqueeze(-1)
    return (values * scale).flatten(-2).to(dtype)


def fake_quantize(x: Tensor, tensor_scale: Tensor, *, name: str = "activation") -> Tensor:
    """Quantize and decode an activation with block scales of its own; same shape and type as `x`.

    inv = 1 / tensor_scale; block_scale = E4M3(min(448, inv * (amax * fp32(1/6))));
    code = E2M1(clamp(x * 1/(block_scale * (1/inv)), -6, 6)); result = code * (block_scale / inv).
    A block whose scale underflows to zero becomes zero. A block with amax > 2688 * tensor_scale saturates.

    Raises:
        NonFiniteError: `x` holds NaN or infinity.
    Source: vLLM 0.32, `ref_nvfp4_quant_dequant` (its eager path): equal in every value.
    """
    require_finite(x, name)
    x_blocks = blocks(x)
    inv_tensor_scale = 1.0 / tensor_scale
    amax = x_blocks.abs().amax(dim=-1, keepdim=True).float()
    block_scale = (inv_tensor_scale * (amax * _INV_E2M1_MAX.to(x.device))).clamp(max=E4M3_MAX)
    block_scale = block_scale.to(torch.float8_e4m3fn).float()
    combined = block_scale * (1.0 / inv_tensor_scale)
    inv_scale = torch.where(combined == 0, 0.0, 1.0 / combined)
    scaled = (x_blocks.float() * inv_scale).clamp(-E2M1_MAX, E2M1_MAX)
    values = decode_e2m1(encode_e2m1(scaled)) * (block_scale / inv_tensor_scale)
    return values.reshape(x.shape).to(x.dtype)
