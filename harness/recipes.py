"""[quantization] of a suite as a recipe of the core."""

from __future__ import annotations

from harness.schema import Quantization
from qad.recipe import Recipe


def recipe_of(quantization: Quantization) -> Recipe:
    """The recipe that a section describes."""
    return Recipe(
        activations=quantization.activations,
        exclude=quantization.exclude,
        power_of_two=quantization.tensor_scale == "power_of_two",
        headroom=quantization.calibration.headroom,
        scale_rule=quantization.scale_rule,
        scale_weighting=quantization.scale_weighting,
        scale_multiplier=quantization.scale_multiplier,
        block_scales=quantization.block_scales,
        fp8=quantization.fp8,
        kv_cache=quantization.kv_cache,
    )
