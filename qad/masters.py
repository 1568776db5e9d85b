"""FP32 masters of what is trained, the way of gradients to them and of values back to the live parameters.

Three kinds, by `train` and the recipe's `block_scales`:
- the weight of a quantized layer: encoded after each step; the live weight becomes the decoded value (projection);
- the block scales of a quantized layer, "learned": a master in units of the weight (block scale times tensor scale), rounded to
  E4M3 at projection. Its gradient is that of code times scale with the rounding passed straight through: for a number x,
  q - x / s inside the range and q beyond it (LSQ, arXiv 1902.08153); with `train = "scales"` the codes stay, and it is q;
- any other parameter, with `train = "all"`: the live one is the master in its own type. That is how the vision tower and the
  projector of an image-text model are trained; with the other choices they are frozen, and stay bit for bit.

The gradient of a live weight passes to its master unchanged, also where a block saturates. It is added up in FP32. Under FSDP2 live parameters
are FP32 shards (gathered in BF16, reduced in FP32) and masters are DTensors of the same placement: whole rows, so that no
block of 16 is cut. Tensor scales never move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from qad import nvfp4, ranks
from qad.cells import nearest_in_cell
from qad.errors import TrainingError
from qad.fp8 import Fp8Packed
from qad.modules import QuantizedLinear, quantized_linears
from qad.nvfp4 import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, E4M3_SMALLEST, Packed, blocks
from qad.ranks import local
from qad.recipe import Targets

Train = Literal["quantized", "all", "scales"]


@dataclass(frozen=True)
class Projection:
    """What a projection found: blocks of 16 weights (FP8: weights) beyond their frozen tensor scale, of how many, and the layer
    with most."""

    saturated: int
    n_blocks: int
    worst: str


class Masters:
    """The masters of a model after `quantize_model`. `named` are the parameters that the optimizer owns, in model order.

    Args:
        train: "quantized" weights only, "all" parameters, or the block "scales" alone.
        learned_scales: whether block scales have masters; True with `train = "scales"`.
    Raises:
        TrainingError: there is nothing to train.  ValueError: a layer has lost the weight before its quantization.
    """

    def __init__(self, model: nn.Module, *, train: Train = "quantized", learned_scales: bool = False) -> None:
        self.model = model
        self.modules: dict[str, QuantizedLinear] = quantized_linears(model)
        self.named: dict[str, nn.Parameter] = {}
        self._plain: dict[str, nn.Parameter] = {}
        self._live_gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._train = train
        model.requires_grad_(False)
        for name, module in self.modules.items():
            self._add_layer(name, module, learned_scales or train == "scales")
        if train == "all":
            own = {id(module.weight) for module in self.modules.values()}
            for name, parameter in model.named_parameters():
                if id(parameter) not in own and parameter.is_floating_point():
                    self.named[name] = nn.Parameter(parameter.detach().float().clone())
                    self._plain[name] = parameter
                    self._follow(parameter, _pass_on(self.named[name]))
        if not self.named:
            raise TrainingError(f'train = "{train}": the model has nothing of that kind; no NVFP4 layer is left to train')

    @torch.no_grad()
    def collect(self) -> None:
        """After the last backward of a step: turn the gradients of live weights into those of learned block scales."""
        for name, gradient in self._live_gradients.items():
            module, scale = self.modules[name], self.named[f"{name}.block_scale"]
            weight = self.named.get(f"{name}.weight")
            found = _scale_gradient(local(gradient), module, None if weight is None else local(weight))
            scale.grad = _as_shard(found, scale)
            if weight is not None:
                weight.grad = gradient
        self._live_gradients.clear()

    @torch.no_grad()
    def project(self) -> Projection:
        """Encode the masters and set the live parameters; counts are of this rank's rows."""
        counts = {}
        n_blocks = 0
        for name, module in self.modules.items():
            master, scale = self.named.get(f"{name}.weight"), self.named.get(f"{name}.block_scale")
            if scale is not None:
                module.frozen_block_scale = _rounded(local(scale), module.tensor_scale)
            if master is not None:
                counts[name] = module.project(local(master), name=f"{name}.weight")
                n_blocks += local(master).numel() // (BLOCK_SIZE if module.format == "nvfp4" else 1)
            elif scale is not None:
                assert isinstance(module.encoding, Packed) and module.frozen_block_scale is not None
                module.set_encoding(Packed(module.encoding.packed, module.frozen_block_scale, module.tensor_scale))
        for name, parameter in self._plain.items():
            local(parameter).copy_(local(self.named[name]))
        return Projection(sum(counts.values()), n_blocks, max(counts, key=lambda name: counts[name], default=""))

    def encodings(self) -> dict[str, Tensor]:
        """Codes (uint8) and block scales (as bytes) by name, of this rank's rows."""
        found = {}
        for name, module in self.modules.items():
            assert module.encoding is not None
            found[f"{name}.codes"], *block_scale = module.encoding.tensors()[:-1]
            if block_scale:
                found[f"{name}.block_scale"] = block_scale[0]
        return found

    def snapshot(self) -> dict[str, Tensor]:
        """What a checkpoint of this moment holds beside the fixed scales, whole and on the CPU: `encodings`, and with
        train = "all" the other parameters. Under FSDP2 every rank must call it."""
        found = {name: _gathered(rows, self.modules[name.rpartition(".")[0]].weight) for name, rows in self.encodings().items()}
        return found | {name: _gathered(local(parameter), parameter) for name, parameter in self._plain.items()}

    def changed_since(self, start: dict[str, Tensor]) -> tuple[float, float]:
        """Shares of codes and of block scales that differ from earlier `encodings()`; FP8 layers have no block scales."""
        counts = torch.zeros(4, dtype=torch.float64)
        for name, now in self.encodings().items():
            difference = now ^ start[name]
            if name.endswith(".block_scale"):
                counts[2:] += torch.tensor([int((difference != 0).sum()), now.numel()])
            elif f"{name.removesuffix('.codes')}.block_scale" in start:
                counts[:2] += torch.tensor(
                    [int(((difference & 0xF) != 0).sum() + ((difference >> 4) != 0).sum()), now.numel() * 2]
                )
            else:
                counts[:2] += torch.tensor([int((difference != 0).sum()), now.numel()])
        codes, n_codes, scales, n_scales = ranks.total(counts).tolist()
        return codes / max(1, n_codes), scales / max(1, n_scales)

    def close(self) -> None:
        """Let the model go: no gradient, no hook, no weight before quantization is kept."""
        for handle in self._handles:
            handle.remove()
        self.model.requires_grad_(False)

    def _add_layer(self, name: str, module: QuantizedLinear, learned_scales: bool) -> None:
        has_scales = learned_scales and module.format == "nvfp4"
        if self._train != "scales":
            self.named[f"{name}.weight"] = nn.Parameter(_shard(_original(name, module), module.weight))
        module.original = None
        _keep_own_rows(module)
        if has_scales:
            assert isinstance(module.encoding, Packed)
            scale = module.encoding.block_scale.float() * module.tensor_scale
            self.named[f"{name}.block_scale"] = nn.Parameter(_as_shard(scale, module.weight))
            self._follow(module.weight, self._keep(name))
        elif self._train != "scales":
            self._follow(module.weight, _pass_on(self.named[f"{name}.weight"]))

    def _follow(self, live: Tensor, hook: Callable[[Tensor], None]) -> None:
        live.requires_grad_(True)
        self._handles.append(live.register_post_accumulate_grad_hook(hook))

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        def hook(live: Tensor) -> None:
            assert live.grad is not None
            kept = self._live_gradients.get(name)
            self._live_gradients[name] = live.grad.float() if kept is None else kept.add_(live.grad)
            live.grad = None

        return hook


def names_of(model: nn.Module, targets: Targets, *, train: Train, learned_scales: bool) -> list[str]:
    """The names that `Masters` will have for a model before its quantization."""
    members = [(name, group.format) for group in targets.groups for name in group.members]
    weights = [] if train == "scales" else [f"{name}.weight" for name, _ in members]
    has_scales = learned_scales or train == "scales"
    scales = [f"{name}.block_scale" for name, format in members if has_scales and format == "nvfp4"]
    others = [name for name, _ in model.named_parameters() if name not in weights] if train == "all" else []
    return [*weights, *scales, *others]


def restore(modules: dict[str, QuantizedLinear], model: nn.Module, snapshot: dict[str, Tensor]) -> None:
    """Give an unsharded model on the CPU, quantized by the same recipe, the values of a `Masters.snapshot`."""
    others = dict(snapshot)
    for name, module in modules.items():
        codes, block_scale = others.pop(f"{name}.codes"), others.pop(f"{name}.block_scale", None)
        if block_scale is None:
            module.set_encoding(Fp8Packed(codes.view(torch.float8_e4m3fn), module.tensor_scale))
        else:
            module.set_encoding(Packed(codes, block_scale.view(torch.float8_e4m3fn), module.tensor_scale))
    with torch.no_grad():
        for name, value in others.items():
            model.get_parameter(name).copy_(value)


def _original(name: str, module: QuantizedLinear) -> Tensor:
    if module.original is None:
        raise ValueError(f"{name}: its weight before quantization is gone; train only what quantize_model made in memory")
    if module.frozen_block_scale is None:
        return module.original.float()
    assert isinstance(module.encoding, Packed)
    return nearest_in_cell(module.original, module.encoding, name=f"{name}.weight")


def _pass_on(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Move the gradient of a live parameter to its master, added up in FP32."""

    def hook(live: Tensor) -> None:
        assert live.grad is not None
        master.grad = live.grad.float() if master.grad is None else master.grad.add_(live.grad)
        live.grad = None

    return hook


def _rounded(scale: Tensor, tensor_scale: Tensor) -> Tensor:
    return (scale / tensor_scale).clamp(E4M3_SMALLEST, E4M3_MAX).to(torch.float8_e4m3fn)


def _scale_gradient(gradient: Tensor, module: QuantizedLinear, weight: Tensor | None) -> Tensor:
    """Sum over each block of the weight's gradient times d(code * scale)/d(scale); (rows, K/16) float32."""
    assert isinstance(module.encoding, Packed)
    slope = blocks(nvfp4.decode_e2m1(nvfp4.unpack(module.encoding.packed)))
    if weight is not None:
        ratio = blocks(weight) / (module.encoding.block_scale.float() * module.tensor_scale).unsqueeze(-1)
        slope = torch.where(ratio.abs() <= E2M1_MAX, slope - ratio, slope)
    return (blocks(gradient) * slope).sum(dim=-1)


def _shard(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank holds whole, placed as `like` is: each rank keeps its own rows, nothing is sent."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _as_shard(rows: Tensor, like: Tensor) -> Tensor:
    """This rank's `rows` (rows, columns) as a tensor placed as `like` is."""
    if not isinstance(like, DTensor):
        return rows
    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, like.device_mesh, like.placements, shape=shape, stride=stride)


def _gathered(rows: Tensor, like: Tensor) -> Tensor:
    whole = _as_shard(rows.detach(), like)
    return (whole.full_tensor() if isinstance(whole, DTensor) else whole.clone()).cpu()


def _keep_own_rows(module: QuantizedLinear) -> None:
    """Codes and block scales where the weight is: on its device, and of this rank's rows where it is sharded."""

    def own(tensor: Tensor) -> Tensor:
        return local(_shard(tensor.view(torch.uint8), module.weight)).view(tensor.dtype)

    encoding = module.encoding
    assert encoding is not None
    if isinstance(encoding, Packed):
        module.encoding = Packed(own(encoding.packed), own(encoding.block_scale), module.tensor_scale)
        if module.frozen_block_scale is not None:
            module.frozen_block_scale = module.encoding.block_scale
    else:
        module.encoding = Fp8Packed(own(encoding.codes), module.tensor_scale)
