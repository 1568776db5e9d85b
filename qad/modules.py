"""The quantized linear layer, and its installation in a model.

The live weight is an ordinary BF16 parameter that already holds `decode(encoding)`: forward and backward see a plain
linear layer. The input is quantized once per fused group: the first consumer computes it, the last one releases it.
The gradient passes the input quantization unchanged (straight through), also where a block saturates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qad import kernels
from qad.errors import CalibrationError
from qad.nvfp4 import E2M1_MAX, E4M3_MAX, E4M3_SMALLEST, Packed, blocks, require_finite
from qad.recipe import FusedGroup, Recipe, match
from qad.scales import tensor_scale_for


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor_scale: Tensor, name: str) -> Tensor:
        return kernels.fake_quantize(x, tensor_scale, name=name)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


@dataclass
class BlockCounts:
    """Activation blocks seen while counting: how many saturate (amax above 2688 tensor scales), how many have a
    subnormal block scale, how many there were."""

    total: int = 0
    saturated: int = 0
    subnormal: int = 0

    def add(self, x: Tensor, tensor_scale: Tensor) -> None:
        scale = blocks(x.detach()).abs().amax(dim=-1).float() / (E2M1_MAX * tensor_scale)
        self.total += scale.numel()
        self.saturated += int((scale > E4M3_MAX).sum())
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
                self.counts.add(x, self.tensor_scale)
            if x.is_inference():  # such tensors keep no count of writes in place, so sharing could go stale
                return _FakeQuantize.apply(x, self.tensor_scale, f"input of {self.group.name}")
            self._source = (x, x._version, torch.is_grad_enabled())
            self._result = _FakeQuantize.apply(x, self.tensor_scale, f"input of {self.group.name}")
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
    """

    tensor_scale: Tensor

    def __init__(self, source: nn.Linear, tensor_scale: Tensor, input_quantizer: InputQuantizer | None) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        self.weight, self.bias = source.weight, source.bias
        self.input_quantizer = input_quantizer
        self.encoding: Packed | None = None
        self.original: Tensor | None = None
        self.register_buffer("tensor_scale", tensor_scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return functional.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def project(self, master: Tensor, *, name: str) -> int:
        """Encode `master` (out, in), make the live weight its decoded value; returns how many blocks saturate."""
        self.encoding, saturated = kernels.project(master, self.tensor_scale, self.weight, name=name)
        return saturated


def quantize_model(model: nn.Module, recipe: Recipe, input_amax: dict[str, float] | None) -> dict[str, QuantizedLinear]:
    """Quantize the linear layers of a BF16 model in place; returns them by name: exactly what changed.

    Args:
        input_amax: largest input magnitude by fused group, from `qad.calibrate`; None for W4A16.
    Raises:
        RecipeError: see `qad.recipe.match`.  CalibrationError: a group was never calibrated, or never saw an input but 0.
        NonFiniteError: a weight holds NaN or infinity.
    """
    changed: dict[str, QuantizedLinear] = {}
    for group in match(model, recipe).groups:
        weights = {name: model.get_parameter(f"{name}.weight").detach() for name in group.members}
        for name, weight in weights.items():
            require_finite(weight, f"{name}.weight")
        weight_amax = max(float(weight.abs().amax()) for weight in weights.values())
        weight_scale = tensor_scale_for(weight_amax, power_of_two=recipe.power_of_two)
        input_scale = None
        if recipe.activations:
            input_scale = tensor_scale_for(_input_amax(group, input_amax) * recipe.headroom, power_of_two=recipe.power_of_two)
        for name, module in install(model, group, dict.fromkeys(group.members, weight_scale), input_scale).items():
            module.original = module.weight.detach().clone()
            module.project(module.original, name=f"{name}.weight")
            changed[name] = module
    return changed


def install(
    model: nn.Module, group: FusedGroup, weight_scales: dict[str, Tensor], input_scale: Tensor | None
) -> dict[str, QuantizedLinear]:
    """Swap the members of `group` for quantized linear layers that keep their weights as they are."""
    quantizer = None if input_scale is None else InputQuantizer(group, input_scale)
    installed = {}
    for name in group.members:
        module = QuantizedLinear(model.get_submodule(name), weight_scales[name], quantizer)  # type: ignore[arg-type]
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
    """sha256 over every name, code, block scale, tensor scale and input scale: equal digests are equal checkpoints."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        module = modules[name]
        if module.encoding is None:
            raise ValueError(f"{name}: holds no encoding; only a model that was quantized in memory has one")
        quantizer = module.input_quantizer
        scales = [module.encoding.tensor_scale] + ([] if quantizer is None else [quantizer.tensor_scale])
        digest.update(name.encode())
        for tensor in (module.encoding.packed, module.encoding.block_scale.view(torch.uint8), *scales):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _input_amax(group: FusedGroup, input_amax: dict[str, float] | None) -> float:
    amax = (input_amax or {}).get(group.name)
    if not amax:
        found = "no record of it" if amax is None else "an amax of 0"
        raise CalibrationError(
            f"{group.name}: activations are quantized but calibration has {found}; calibrate with text that reaches it"
        )
    return amax
