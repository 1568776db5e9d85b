"""What [quantization] of a suite quantizes of an architecture, and where a run would end with it: on names alone. No torch.

The rules are those of `qad.recipe` and `qad.exceptions`, on the names that `harness.architecture_sizes` gives; a test holds both together. A
*layer* is a block of the decoder, counted from 0.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from harness.architecture import Architecture, Attention, Weight
from harness.schema import ExcludeLayers, Quantization

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "w13": ("w1", "w3")}
"""`qad.recipe.FUSED`; a test holds both."""
_BLOCK = 16
"""`qad.nvfp4.BLOCK_SIZE`; a test holds both."""
_HESSIAN_BYTES, _MOST_PASSES = 64 << 20, 500
"""Those of `qad.gptq`; a test holds both."""


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
    """What would end a run with this section: patterns and positions that name nothing or everything, fused groups that
    are split, and widths that blocks do not fill."""
    found = []
    names = [weight.module for weight in _candidates(model)]
    if not any(weight.kind == "head" for weight in model.outside):
        names.append("lm_head")  # tied: no weight of its own, and a linear layer all the same
        if not any(fnmatchcase("lm_head", pattern) for pattern in quantization.exclude):
            found.append("quantization.exclude: lm_head shares its weight with the embedding, and has to stay")
    for key, patterns in (("exclude", quantization.exclude), ("fp8", quantization.fp8)):
        for pattern in patterns:
            if not any(_fits(name, pattern, model) for name in names):
                found.append(f'quantization.{key}: "{pattern}" matches nothing of this model; {_near(pattern, names)}')
    found += _mistaken_positions(model, quantization.exclude_layers)
    quantized = quantized_by(model, quantization)
    fp8 = fp8_by(model, quantization)
    if not quantized and not _stay_all(model, quantization.exclude_layers):
        found.append("quantization.exclude: leaves nothing to quantize; narrow the patterns")
    elif quantized and quantized == fp8:
        found.append("quantization.fp8: leaves nothing for NVFP4")
    for weight in _candidates(model):
        if weight.name not in quantized and any(_fits(weight.module, pattern, model) for pattern in quantization.fp8):
            found.append(f"quantization.fp8: matches {weight.module}, which stays in BF16")
            break
    nvfp4 = quantized - fp8
    for weight in _candidates(model):
        if weight.name in nvfp4 and weight.shape[-1] % _BLOCK:
            found.append(
                f"quantization.exclude: {weight.module}: input width {weight.shape[-1]} is not a multiple of {_BLOCK}, the NVFP4 block; add it"
            )
            break
    found += _split(model, quantized, fp8)
    passes = gptq_passes(model, nvfp4)
    if quantization.scale_rule == "gptq" and passes > _MOST_PASSES:
        found.append(
            f'quantization.scale_rule: "gptq" would take {passes:,} passes over the calibration batches, and at most {_MOST_PASSES} are allowed; '
            'choose "mse" with scale_weighting = "second_moment", or exclude the experts ("*.experts.*")'
        )
    return [f"{each}: the run would end with it" for each in found]


def gptq_passes(model: Architecture, names: frozenset[str]) -> int:
    """Passes over the calibration batches that GPTQ would take for the NVFP4 weights `names`: each with as many Hessians as have room."""
    widths: dict[str, int] = {}
    for weight in sorted(_candidates(model), key=lambda weight: weight.kind == "head"):  # the head is the last of a model
        if weight.name in names:
            parent, _, leaf = weight.module.rpartition(".")
            fused = next((name for name, leaves in _FUSED.items() if leaf in leaves), leaf)
            widths[f"{parent}.{fused}"] = weight.shape[-1]
    passes = used = 0
    for width in widths.values():
        size = 4 * width**2
        if not passes or used + size > _HESSIAN_BYTES:
            passes, used = passes + 1, 0
        used += size
    return passes


def _near(pattern: str, names: list[str]) -> str:
    return f"near names: {', '.join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3])}"


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


def _stay_all(model: Architecture, layers: ExcludeLayers | None) -> bool:
    return layers is not None and len(_stays(model, layers)) == len(model.layers)


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
    n = len(model.layers)
    found, stays = [], _stays(model, layers)
    for key in ("first", "last"):
        if getattr(layers, key) > n:
            found.append(f"quantization.exclude_layers.{key}: found {getattr(layers, key):,}; the model has {n:,} layers")
    if layers.before_attention and not _before_attention(model):
        found.append("quantization.exclude_layers.before_attention: no layer without attention is before one with it")
    if _stay_all(model, layers):
        found.append(
            f"quantization.exclude_layers: all {n} layers would stay in BF16; lower first ({layers.first}) or last ({layers.last})"
        )
    elif not any(weight.kind in ("linear", "experts") for index in stays for weight in model.layers[index].weights):
        found.append("quantization.exclude_layers: nothing in the layers that it names could be quantized")
    return found


def _split(model: Architecture, quantized: frozenset[str], fp8: frozenset[str]) -> list[str]:
    """Lines for the first fused group, and the first layer of experts, of which a part alone is quantized, or that would have two formats."""
    parents: dict[str, dict[str, str]] = {}
    experts: dict[str, dict[str, str]] = {}
    for weight in _candidates(model):
        parent, _, leaf = weight.module.rpartition(".")
        form = "FP8" if weight.name in fp8 else "NVFP4" if weight.name in quantized else "BF16"
        parents.setdefault(parent, {})[leaf] = form
        if weight.kind == "experts":
            experts.setdefault(parent.rpartition(".")[0], {}).setdefault(form, weight.module)
    return [*_split_group(parents), *_split_experts(experts)]


def _split_group(parents: dict[str, dict[str, str]]) -> list[str]:
    for parent, leaves in parents.items():
        for fused, members in _FUSED.items():
            there = {leaf: leaves[leaf] for leaf in members if leaf in leaves}
            left = ", ".join(leaf for leaf, form in there.items() if form == "BF16")
            if len(set(there.values())) > 1 and left:
                return [
                    f"quantization.exclude: splits {parent}.{fused}, of which {left} would stay; exclude all of it or nothing"
                ]
            if len(set(there.values())) > 1:
                listed = ", ".join(f"{leaf} {form}" for leaf, form in there.items())
                return [f"quantization.fp8: splits {parent}.{fused} over two formats: {listed}; give all of them one"]
    return []


def _split_experts(experts: dict[str, dict[str, str]]) -> list[str]:
    """experts: of each layer of them, the first module that has each format."""
    for layer, forms in experts.items():
        if len(forms) > 1:
            key, listed = "exclude" if "BF16" in forms else "fp8", ", ".join(f"{name} {form}" for form, name in forms.items())
            return [f'quantization.{key}: splits the experts of {layer}: {listed}; name all of them, "{layer}.*", or none']
    return []
