"""[quantization] of a suite as a recipe of the core, and what its calibration says about experts."""

from __future__ import annotations

from typing import Any

from harness.schema import Quantization
from harness.store import StoredStage
from qad.exceptions import LayerExceptions, excluded_by_position
from qad.recipe import Recipe


def recipe_of(quantization: Quantization, model: Any) -> Recipe:
    """The recipe that a section describes for a model, whose layers that stay by position are named in it; RecipeError where there are none."""
    layers = quantization.exclude_layers
    by_position = () if layers is None else excluded_by_position(model, LayerExceptions(**layers.model_dump()))
    return Recipe(
        activations=quantization.activations,
        exclude=(*quantization.exclude, *by_position),
        power_of_two=quantization.tensor_scale == "power_of_two",
        headroom=quantization.calibration.headroom,
        scale_rule=quantization.scale_rule,
        scale_weighting=quantization.scale_weighting,
        scale_multiplier=quantization.scale_multiplier,
        block_scales=quantization.block_scales,
        fp8=quantization.fp8,
        kv_cache=quantization.kv_cache,
    )


def unrouted_experts(calibration: StoredStage | None) -> dict[str, dict[str, int]]:
    """How many experts a stored calibration never reached, by layer, under the key that records have; nothing of a model without experts."""
    result = {} if calibration is None else calibration.record["result"]
    return {"unrouted_experts": result["unrouted_experts"]} if "unrouted_experts" in result else {}


def what_was_unrouted(record: dict[str, dict[str, int]]) -> str | None:
    """A line on the experts that calibration never reached; None where it reached all."""
    missed = {layer: n for layer, n in record.get("unrouted_experts", {}).items() if n}
    if not missed:
        return None
    return (
        f"{sum(missed.values())} experts of {len(missed)} layers were never routed to, and take the scales of the others (most in "
        f"{max(missed, key=lambda layer: missed[layer])}); more calibration text reaches more"
    )
