"""What [quantization] of a suite quantizes of an architecture, and where a run would end with it: on names alone. No torch.

The rules are those of `qad.recipe` and `qad.exceptions`, on the names that `harness.architecture_sizes` gives; a test holds both together. A
*layer* is a block of the decoder, counted from 0.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from harness.architecture import Architecture, Attention, Weight
from harness.schema import ExcludeLayers, Quantization

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "w13": ("w1", "w3")}
"""`qad.recipe.FUSED`; a test holds both."""


def quantized_by(model: Architecture, quantization: Quantization | None) -> frozenset[str]:
    """Names of the weights that the section gives codes; none of a variant that is not quantized."""
    if quantization is None:
        return frozenset()
    stays = _by_position(model, quantization.exclude_layers)
    return frozenset(
        weight.name
        for weight in _candidates(model)
        if weight.name not in stays and not any(_fits(weight.module, pattern, model) for pattern in quantization.exclude)
    )


def fp8_by(model: Architecture, quantization: Quantization | None) -> frozenset[str]:
    """Of the weights that the section quantizes, the names of those that become FP8; the others become NVFP4."""
    if quantization is None or not quantization.fp8:
        return frozenset()
    quantized = quantized_by(model, quantization)
    return frozenset(
        weight.name
        for weight in _candidates(model)
        if weight.name in quantized and any(_fits(weight.module, pattern, model) for pattern in quantization.fp8)
    )


def mistakes_of(model: Architecture, quantization: Quantization) -> list[str]:
    """What would end a run with this section: patterns and positions that name nothing or everything, and fused groups that are split."""
    found = []
    names = [weight.module for weight in _candidates(model)]
    if not any(weight.kind == "head" for weight in model.outside):
        names.append("lm_head")  # tied: no weight of its own, and a linear layer all the same
        if not any(fnmatchcase("lm_head", pattern) for pattern in quantization.exclude):
            found.append("quantization.exclude: lm_head shares its weight with the embedding, and has to stay")
    for key, patterns in (("exclude", quantization.exclude), ("fp8", quantization.fp8)):
        for pattern in patterns:
            if not any(_fits(name, pattern, model) for name in names):
                found.append(f'quantization.{key}: "{pattern}" matches nothing of this model')
    found += _mistaken_positions(model, quantization.exclude_layers)
    quantized = quantized_by(model, quantization)
    fp8 = fp8_by(model, quantization)
    if not quantized:
        found.append("quantization.exclude: leaves nothing to quantize")
    elif quantized == fp8:
        found.append("quantization.fp8: leaves nothing for NVFP4")
    for weight in _candidates(model):
        if weight.name not in quantized and any(_fits(weight.module, pattern, model) for pattern in quantization.fp8):
            found.append(f"quantization.fp8: matches {weight.module}, which stays in BF16")
            break
    return [f"{each}: the run would end with it" for each in (*found, *_split(model, quantized, fp8))]


def _candidates(model: Architecture) -> list[Weight]:
    """What a recipe could quantize."""
    return [weight for weight in model.weights if weight.kind in ("linear", "experts", "head")]


def _fits(module: str, pattern: str, model: Architecture) -> bool:
    """Whether a pattern matches a name, or the name as the language model inside calls it."""
    return fnmatchcase(module, pattern) or fnmatchcase(module.removeprefix(model.speaker), pattern)


def _stays(model: Architecture, layers: ExcludeLayers) -> set[int]:
    """The layers that stay by position."""
    n = len(model.layers)
    before = _before_attention(model) if layers.before_attention else set()
    return {*range(min(layers.first, n)), *range(max(0, n - layers.last), n), *before}


def _before_attention(model: Architecture) -> set[int]:
    """The layers right before one with attention that have none themselves."""
    has = [any(isinstance(part, Attention) for part in layer.parts) for layer in model.layers]
    return {index - 1 for index in range(1, len(has)) if has[index] and not has[index - 1]}


def _by_position(model: Architecture, layers: ExcludeLayers | None) -> set[str]:
    if layers is None:
        return set()
    return {weight.name for index in _stays(model, layers) for weight in model.layers[index].weights}


def _mistaken_positions(model: Architecture, layers: ExcludeLayers | None) -> list[str]:
    if layers is None:
        return []
    found, stays = [], _stays(model, layers)
    if layers.before_attention and not _before_attention(model):
        found.append("quantization.exclude_layers.before_attention: no layer without attention is before one with it")
    if len(stays) == len(model.layers):
        found.append(f"quantization.exclude_layers: all {len(stays)} layers would stay in BF16")
    elif not any(weight.kind in ("linear", "experts") for index in stays for weight in model.layers[index].weights):
        found.append("quantization.exclude_layers: nothing in the layers that it names could be quantized")
    return found


def _split(model: Architecture, quantized: frozenset[str], fp8: frozenset[str]) -> list[str]:
    """A line for the first fused group of which a part alone is quantized, or that would have two formats."""
    parents: dict[str, dict[str, str]] = {}
    for weight in _candidates(model):
        parent, _, leaf = weight.module.rpartition(".")
        form = "FP8" if weight.name in fp8 else "NVFP4" if weight.name in quantized else "BF16"
        parents.setdefault(parent, {})[leaf] = form
    for parent, leaves in parents.items():
        for fused, members in _FUSED.items():
            there = {leaf: leaves[leaf] for leaf in members if leaf in leaves}
            left = ", ".join(leaf for leaf, form in there.items() if form == "BF16")
            if len(set(there.values())) > 1 and left:
                return [f"quantization.exclude: splits {parent}.{fused}, of which {left} would stay"]
            if len(set(there.values())) > 1:
                listed = ", ".join(f"{leaf} {form}" for leaf, form in there.items())
                return [f"quantization.fp8: splits {parent}.{fused} over two formats: {listed}"]
    return []
