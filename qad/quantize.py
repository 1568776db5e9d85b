"""A BF16 model becomes a quantized one: scales are chosen by the recipe's rule, weights are encoded, modules swapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from qad import gptq, kv_cache, nvfp4
from qad.errors import CalibrationError, CheckpointError
from qad.modules import QuantizedLinear, install
from qad.nvfp4 import E2M1_MAX, E4M3_MAX, Packed, require_finite
from qad.recipe import FusedGroup, Recipe, match
from qad.scales import LARGEST_BLOCK_SCALE, NVFP4_MAX, block_scales, tensor_scale_for
from qad.stored_names import stored_layers


def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    input_amax: dict[str, float] | None,
    *,
    second_moments: Mapping[str, Tensor] | None = None,
    batches: Sequence[dict[str, Tensor]] | None = None,
    start: Mapping[str, Packed] | None = None,
    keep_originals: bool = True,
) -> dict[str, QuantizedLinear]:
    """Quantize the linear layers, and the KV cache, of a BF16 model in place; returns the layers by name.

    Args:
        input_amax: largest magnitudes by fused group and of keys and values, from `qad.calibrate`; None for W4A16.
        second_moments: mean square of the inputs by fused group, from `qad.calibrate`; needed where the recipe weighs errors by it.
        batches: calibration batches, needed by the rule "gptq".
        start: codes and block scales of a checkpoint of the same recipe, by NVFP4 layer as files name it: nothing is chosen again, which
            spares the search, and the rounding of other hardware. Tensor scales come from the weights all the same.
        keep_originals: keep the weights before quantization, which training starts from; without, a copy of the model is spared.
    Raises:
        RecipeError: see `qad.recipe.match`.  CalibrationError: a group was never calibrated, or never saw an input but 0;
        `second_moments` or `batches` are missing; GPTQ would take too many passes, of which none is begun.  NonFiniteError: a weight holds NaN or infinity.
    """
    if recipe.scale_rule == "gptq" and start is None and batches is None:
        raise CalibrationError('scale_rule "gptq" rounds by what calibration batches do to a layer: give batches')
    changed: dict[str, QuantizedLinear] = {}
    targets = match(model, recipe)
    nvfp4_groups = [group for group in targets.groups if group.format == "nvfp4"]
    if recipe.scale_rule == "gptq" and start is None:
        gptq.require_few_passes(model, nvfp4_groups)
    stored = {} if start is None else stored_layers(model)
    needs_original = keep_originals or recipe.scale_rule == "gptq"
    for group in targets.groups:
        weight_scale, input_scale = _tensor_scales(model, group, recipe, input_amax)
        importance = None if start is not None else _importance(group, recipe, second_moments)
        for name, module in install(model, group, dict.fromkeys(group.members, weight_scale), input_scale).items():
            original = module.weight.detach()
            module.original = original.clone() if needs_original else None
            if group.format == "nvfp4" and start is not None:
                module.set_encoding(_start(name, module, start.get(stored.get(name, name))))
            elif group.format == "fp8" or recipe.block_scale_rule == "amax":
                module.project(original, name=f"{name}.weight")
            else:
                scales = block_scales(original, weight_scale, rule=recipe.block_scale_rule, importance=importance)
                module.set_encoding(nvfp4.quantize(original, scales, weight_scale, name=f"{name}.weight"))
            changed[name] = module
    if recipe.scale_rule == "gptq" and start is None and batches is not None:
        gptq.refine(model, nvfp4_groups, changed, batches)
    for name in (name for group in nvfp4_groups for name in group.members):
        encoding = changed[name].encoding
        assert isinstance(encoding, Packed)
        changed[name].frozen_block_scale = None if recipe.block_scales == "recomputed" else encoding.block_scale
        changed[name].original = changed[name].original if keep_originals else None
    if targets.kv_cache:
        kv_cache.install(model, {name: _cache_scales(name, recipe, input_amax) for name in targets.kv_cache})
    return changed


def _tensor_scales(
    model: nn.Module, group: FusedGroup, recipe: Recipe, input_amax: dict[str, float] | None
) -> tuple[Tensor, Tensor | None]:
    """The scales that the members of a group share: of their weights and of their input."""
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in group.members}
    for name, weight in weights.items():
        require_finite(weight, f"{name}.weight")
    weight_amax = max(float(weight.abs().amax()) for weight in weights.values())
    is_nvfp4 = group.format == "nvfp4"
    weight_scale = tensor_scale_for(
        weight_amax,
        power_of_two=recipe.power_of_two,
        largest=E2M1_MAX * LARGEST_BLOCK_SCALE[recipe.block_scale_rule] if is_nvfp4 else E4M3_MAX,
        multiplier=recipe.scale_multiplier if is_nvfp4 else 1.0,
    )
    if not recipe.activations:
        return weight_scale, None
    amax = _calibrated(group.input_name, input_amax) * recipe.headroom
    return weight_scale, tensor_scale_for(amax, power_of_two=recipe.power_of_two, largest=NVFP4_MAX if is_nvfp4 else E4M3_MAX)


def _cache_scales(name: str, recipe: Recipe, input_amax: dict[str, float] | None) -> tuple[Tensor, Tensor]:
    k_scale, v_scale = (
        tensor_scale_for(
            _calibrated(f"{name}.{part}", input_amax) * recipe.headroom, power_of_two=recipe.power_of_two, largest=E4M3_MAX
        )
        for part in ("k_cache", "v_cache")
    )
    return k_scale, v_scale


def _start(name: str, module: QuantizedLinear, found: Packed | None) -> Packed:
    if found is None or found.packed.shape != (module.out_features, module.in_features // 2):
        what = "has no codes of it" if found is None else f"holds codes of shape {tuple(found.packed.shape)}"
        raise CheckpointError(f"{name}: the checkpoint to start from {what}; it was made with another recipe or model")
    return Packed(found.packed, found.block_scale, module.tensor_scale)


def _importance(group: FusedGroup, recipe: Recipe, second_moments: Mapping[str, Tensor] | None) -> Tensor | None:
    if recipe.scale_weighting == "none":
        return None
    if second_moments is None or group.name not in second_moments:
        raise CalibrationError(
            f'{group.name}: scale_weighting = "{recipe.scale_weighting}" needs the second moment of its inputs, and calibration '
            "has no record of it; collect it with qad.calibrate.second_moments"
        )
    return second_moments[group.name]


def _calibrated(name: str, input_amax: dict[str, float] | None) -> float:
    amax = (input_amax or {}).get(name)
    if not amax:
        found = "no record of it" if amax is None else "an amax of 0"
        raise CalibrationError(
            f"{name}: activations are quantized but calibration has {found}; calibrate with text that reaches it"
        )
    return amax
