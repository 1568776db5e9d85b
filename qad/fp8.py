"""FP8 (E4M3) with one FP32 scale a tensor: the second format of mixed recipes, and that of a quantized KV cache.

    value = e4m3 * tensor_scale          (a scale always decodes)

Sources. Weights follow ModelOpt's exporter (nvidia-modelopt 0.47): E4M3(w / tensor_scale). Activations follow vLLM 0.32
(`QuantFP8.forward_native`): E4M3(clamp(x * (1/tensor_scale), -448, 448)). With a tensor scale that is a power of two both
are the same and every decoded value is exact in BF16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qad.nvfp4 import E4M3_MAX, require_finite


@dataclass(frozen=True)
class Fp8Packed:
    """One tensor in FP8, as it lies on disk.

    codes: (..., K) float8_e4m3fn.
    tensor_scale: () float32, positive.
    """

    codes: Tensor
    tensor_scale: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What identifies the encoding, as bytes and scales."""
        return self.codes.view(torch.uint8), self.tensor_scale


def quantize(x: Tensor, tensor_scale: Tensor, *, name: str = "tensor") -> Fp8Packed:
    """Encode a weight (any shape, any float type): E4M3(clamp(x / tensor_scale, -448, 448)), in FP32, ties to even.

    Raises NonFiniteError if `x` holds NaN or infinity.
    """
    require_finite(x, name)
    return Fp8Packed((x.float() / tensor_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), tensor_scale)


def dequantize(encoding: Fp8Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Decode: float(e4m3) * tensor_scale in FP32, then rounded to `dtype`."""
    return (encoding.codes.float() * encoding.tensor_scale).to(dtype)


def fake_quantize(x: Tensor, tensor_scale: Tensor, *, name: str = "activation") -> Tensor:
    """Quantize and decode an activation with a given scale; same shape and type as `x`. NonFiniteError names it."""
    require_finite(x, name)
    codes = (x.float() * (1.0 / tensor_scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * tensor_scale).to(x.dtype)
