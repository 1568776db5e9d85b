"""The quantized linear layers, NVFP4 and FP8, and their installation in a model.

The live weight is an ordinary BF16 parameter that already holds `decode(encoding)`: forward and backward see a plain
linear layer. The input is quantized once per fused group: the first consumer computes it, the last one releases it.
The gradient passes the input quantization unchanged (straight through), also where a block saturates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from qad import fp8, kernels
from qad.fp8 import Fp8Packed
from qad.nvfp4 import E2M1_MAX, E4M3_MAX, E4M3_SMALLEST, Packed, blocks
from qad.ranks import local
from qad.recipe import Format, FusedGroup
from qad.straight_through import FakeQuantize


@dataclass
class BlockCounts:
    """Activation blocks of 16 seen while counting: how many saturate (amax above 2688 tensor scales in NVFP4, 448 in
    FP8), how many have a subnormal block scale (NVFP4), how many there were.

    overshoot: the largest magnitude over what the tensor scale of its group can hold; above 1 it saturates. overshoot_in:
        where that was. A share over all blocks is blind to one token that is thirty times too large; this is not.
    """

    total: int = 0
    saturated: int = 0
    subnormal: int = 0
    overshoot: float = 0.0
    overshoot_in: str = ""

    def add(self, x: Tensor, tensor_scale: Tensor, format: Format, name: str) -> None:
        largest = E2M1_MAX if format == "nvfp4" else 1.0
        scale = blocks(x.detach()).abs().amax(dim=-1).float() / (largest * tensor_scale)
        self.total += scale.numel()
        self.saturated += int((scale > E4M3_MAX).sum())
        overshoot = float(scale.max()) / E4M3_MAX
        if overshoot > self.overshoot:
            self.overshoot, self.overshoot_in = overshoot, name
        if format == "nvfp4":
            self.subnormal += int(((scale > 0) & (scale < 8 * E4M3_SMALLEST)).sum())


class InputQuantizer(nn.Module):
    """Quantizes the input of one fused group, once, for all its members."""

    tensor_scale: Tensor

    def __init__(self, group: FusedGroup, tensor_scale: Tensor) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("tensor_scale", tensor_scale, persistent=False)
        self.counts: BlockCounts | None = None
        self.quantizations = 0
        self._source: tuple[Tensor, int, bool] | None = None
        self._result: Tensor | None = None
        self._consumers_left = 0

    def forward(self, x: Tensor) -> Tensor:
        """The quantized `x` (..., K); the same tensor for the members of the group that follow with the same input."""
        if self._result is None or not self._holds(x):
            self.quantizations += 1
            if self.counts is not None:
                self.counts.add(x, self.tensor_scale, self.group.format, self.group.name)
            quantized = FakeQuantize.apply(x, self.tensor_scale, self.group.format, f"input of {self.group.name}")
            if x.is_inference():  # such tensors keep no count of writes in place, so sharing could go stale
                return quantized
            self._source = (x, x._version, torch.is_grad_enabled())
            self._result = quantized
            self._consumers_left = len(self.group.members)
        result = self._result
        self._consumers_left -= 1
        if self._consumers_left == 0:
            self._source = self._result = None
        return result

    def _holds(self, x: Tensor) -> bool:
        if self._source is None:
            return False
        source, version, with_gradient = self._source
        return source is x and version == x._version and with_gradient == torch.is_grad_enabled()


class QuantizedLinear(nn.Linear):
    """A linear layer whose BF16 weight is a decoded NVFP4 tensor; its input is quantized too unless it is W4A16.

    encoding: the codes and scales that the live weight decodes; what export writes. None after loading.
    original: the weight before quantization, from which training starts its master. None after loading.
    frozen_block_scale: the block scales of the next projection, frozen or learned; None where each projection derives them by amax.
    """

    format: Format = "nvfp4"
    tensor_scale: Tensor

    def __init__(self, source: nn.Linear, tensor_scale: Tensor, input_quantizer: InputQuantizer | None) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        self.weight, self.bias = source.weight, source.bias
        self.input_quantizer = input_quantizer
        self.encoding: Packed | Fp8Packed | None = None
        self.original: Tensor | None = None
        self.frozen_block_scale: Tensor | None = None
        self.register_buffer("tensor_scale", tensor_scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return functional.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def project(self, master: Tensor, *, name: str) -> int:
        """Encode `master` (out, in), make the live weight its decoded value; returns how many blocks saturate.

        Where the weight is sharded, `master` is this rank's rows of it.
        """
        self.encoding, saturated = kernels.project(
            master, self.tensor_scale, local(self.weight), block_scale=self.frozen_block_scale, name=name
        )
        return saturated

    @torch.no_grad()
    def set_encoding(self, encoding: Packed | Fp8Packed) -> None:
        """Take codes and scales that were chosen elsewhere, and make the live weight their decoded value."""
        self.encoding = encoding
        dtype = self.weight.dtype
        decoded = kernels.dequantize(encoding, dtype) if isinstance(encoding, Packed) else fp8.dequantize(encoding, dtype)
        local(self.weight).copy_(decoded)


class Fp8Linear(QuantizedLinear):
    """The same with an FP8 weight (E4M3, one scale a tensor) and an FP8 input."""

    format: Format = "fp8"

    @torch.no_grad()
    def project(self, master: Tensor, *, name: str) -> int:
        """As for NVFP4; returns how many weights lie beyond 448 tensor scales."""
        self.encoding = fp8.quantize(master, self.tensor_scale, name=name)
        local(self.weight).copy_(fp8.dequantize(self.encoding, self.weight.dtype))
        return int((master.abs() > E4M3_MAX * self.tensor_scale).sum())


def install(
    model: nn.Module, group: FusedGroup, weight_scales: dict[str, Tensor], input_scale: Tensor | None
) -> dict[str, QuantizedLinear]:
    """Swap the members of `group` for quantized linear layers that keep their weights as they are."""
    quantizer = None if input_scale is None else InputQuantizer(group, input_scale)
    linear = {"nvfp4": QuantizedLinear, "fp8": Fp8Linear}[group.format]
    installed = {}
    for name in group.members:
        module = linear(model.get_submodule(name), weight_scales[name], quantizer)  # type: ignore[arg-type]
        model.set_submodule(name, module.train(model.training))
        installed[name] = module
    return installed


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized linear layers of `model` by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def input_quantizers(model: nn.Module) -> list[InputQuantizer]:
    """The input quantizers of `model`, one a fused group."""
    return [module for module in model.modules() if isinstance(module, InputQuantizer)]


def encoding_digest(modules: dict[str, QuantizedLinear]) -> str:
    """sha256 over every name, code and scale of weights and inputs: equal digests are equal checkpoints."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        module = modules[name]
        if module.encoding is None:
            raise ValueError(f"{name}: holds no encoding; only a model that was quantized in memory has one")
        quantizer = module.input_quantizer
        scales = [] if quantizer is None else [quantizer.tensor_scale]
        digest.update(name.encode())
        for tensor in (*module.encoding.tensors(), *scales):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
