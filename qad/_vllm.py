"""NVFP4 linear kernels for vLLM on machines without FP4 units; `qad.vllm_plugin` installs them where they are asked for.

A weight is decoded once, when it is loaded, and its packed form is released: *the model takes the memory of BF16*. In W4A4 the
input is quantized and decoded in every forward by `qad.kernels.fake_quantize` with the served tensor scale; the product is
that of vLLM's own BF16 layers. vLLM's emulation decodes every weight in every forward, hundreds of times slower, to the same
numbers but for one case: compressed-tensors stores g, the reciprocal of a tensor scale, and vLLM quantizes with g where this
kernel, like our own engine, uses 1/(1/g); the two are equal for powers of two.

Written against vLLM 0.32: `vllm.model_executor.kernels.linear` (a table of kernel classes by platform, the first that fits is
taken; weight-only layers are chosen by name instead). Both layouts arrive here with the same parameters of a layer:
    weight (out, in/2) uint8, weight_scale (out, in/16) float8_e4m3fn, weight_global_scale () float32 (decodes),
    and in W4A4 input_global_scale () float32 (decodes).
Experts are chosen by another table and are not served here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import PlatformEnum, current_platform

from qad import kernels, nvfp4
from qad.nvfp4 import Packed

_PLATFORMS = (PlatformEnum.CPU, PlatformEnum.CUDA)


class WeightOnlyNvFp4LinearKernel(NvFp4LinearKernel):
    """W4A16: the weight decoded once, the input as it comes, a BF16 product."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return current_platform._enum in _PLATFORMS, "runs on CPU and CUDA"

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed: Any = layer
        encoding = Packed(packed.weight.data, packed.weight_scale.data, packed.weight_global_scale.data)
        layer.weight = Parameter(nvfp4.dequantize(encoding, torch.bfloat16), requires_grad=False)
        del layer.weight_scale
        if layer.weight.device.type == "cpu":
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        served: Any = layer
        if x.device.type == "cpu":
            return served.cpu_linear(x, served.weight, bias)
        return functional.linear(x, served.weight, bias)


class FakeQuantizedNvFp4LinearKernel(WeightOnlyNvFp4LinearKernel):
    """W4A4: the weight decoded once, the input quantized and decoded in every forward, a BF16 product."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        served: Any = layer
        served.input_scale_value = served.input_global_scale.data.cpu().clone()

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        served: Any = layer
        scale = served.input_scale_value if x.device.type == "cpu" else served.input_global_scale
        return super().apply_weights(layer, kernels.fake_quantize(x, scale, name="input of a linear layer"), bias)


def install(asked: str) -> None:
    """Put the kernel that is asked for ("w4a4_emulation" or "w4a16") before all others, on a CPU and on CUDA.

    On CUDA "w4a16" is left to vLLM's Marlin, which the engine selects by vLLM's own option. On a CPU, vLLM's choice for
    weight-only layers is a fixed class, which is replaced by ours.
    """
    chosen = FakeQuantizedNvFp4LinearKernel if asked == "w4a4_emulation" else WeightOnlyNvFp4LinearKernel
    platforms = _PLATFORMS if asked == "w4a4_emulation" else (PlatformEnum.CPU,)
    for platform in platforms:
        table = linear._POSSIBLE_NVFP4_KERNELS.setdefault(platform, [])
        if chosen not in table:
            table.insert(0, chosen)
    if current_platform.is_cpu():
        linear.MarlinNvFp4LinearKernel = WeightOnlyNvFp4LinearKernel
