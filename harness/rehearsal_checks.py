"""What a suite's recipes do to the real architecture, found without its weights: patterns, positions, fused groups, GPTQ's passes.

The model of the real configuration is built on the meta device, which holds shapes alone, its experts opened as in a run, and the ordinary
rules match each recipe of the suite against it. A pattern that is wrong there is wrong at hour nine; on a twin, which has fewer layers, it
might pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from harness.models import has_vision
from harness.recipes import recipe_of
from harness.schema import Quantization
from harness.suite import Suite
from qad.building import native_class
from qad.errors import QadError
from qad.experts import EXPERT, open_experts
from qad.gptq import require_few_passes
from qad.recipe import Targets, match

_NOT_BUILT = (
    *(KeyError, ValueError, TypeError, AttributeError, ImportError, QadError),
    *(StrictDataclassError, ArithmeticError, RuntimeError),
)
"""What transformers and torch raise for a configuration that is no model: the last three for fields of wrong types or that do not fit each other,
for no heads, and for negative sizes."""


@dataclass(frozen=True)
class Share:
    """Of the linear layers of one name (`q_proj`, `experts.*.up_proj`): how many are quantized and how many stay."""

    name: str
    quantized: int
    left: int


@dataclass(frozen=True)
class RecipeCheck:
    """What one recipe does. variants: that share it. formats: quantized layers by format. left: linear layers that stay in BF16.

    kv_cache: attention layers whose cache is quantized. shares: by name, in the model's order. problem: what would end the run; then all
    figures are 0.
    """

    variants: tuple[str, ...]
    formats: dict[str, int]
    left: int
    kv_cache: int
    shares: tuple[Share, ...]
    problem: str | None = None

    @property
    def quantized(self) -> int:
        """Linear layers that are quantized, in any format."""
        return sum(self.formats.values())


@dataclass(frozen=True)
class ArchitectureCheck:
    """The real architecture. model_class: its class; None where it is not built, for the reason `unchecked`."""

    model_class: str | None
    recipes: tuple[RecipeCheck, ...]
    unchecked: str | None = None

    @property
    def problems(self) -> list[str]:
        """What would end the run, a line each."""
        return [f"{' and '.join(each.variants)}: {each.problem}" for each in self.recipes if each.problem is not None]


def check_recipes(suite: Suite, config: Mapping[str, Any]) -> ArchitectureCheck:
    """Hold every recipe of `suite` against the architecture that `config`, the content of the model's config.json, describes.

    Where transformers has no class for it, `unchecked` says so; a configuration of the language model alone checks that alone.
    """
    recipes = _recipes(suite)
    if not recipes:
        return ArchitectureCheck(None, (), "no variant of the suite is quantized here")
    given = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        model = _shapes(given)
    except _NOT_BUILT as error:
        reason = " ".join(str(error).split()) or "nothing is said"
        return ArchitectureCheck(None, (), f"model_type {config.get('model_type')!r} cannot be built here ({reason})")
    checked = tuple(_check(model, names, quantization) for quantization, names in recipes)
    lacks_vision = suite.model.kind == "image-text" and not has_vision(given)
    note = "the language model alone: its configuration has no part that sees" if lacks_vision else None
    return ArchitectureCheck(type(model).__name__, checked, note)


def _recipes(suite: Suite) -> list[tuple[Quantization, tuple[str, ...]]]:
    """The quantizations of the suite that match layers in different ways, or would end for another reason, with the variants that share them."""
    found: dict[str, tuple[Quantization, list[str]]] = {}
    keys = {"activations", "exclude", "exclude_layers", "fp8", "kv_cache"}
    for variant in suite.variants:
        if variant.quantization is not None:
            is_gptq = variant.quantization.scale_rule == "gptq"
            key = f"{is_gptq} {variant.quantization.model_dump_json(include=keys)}"
            found.setdefault(key, (variant.quantization, []))[1].append(variant.name)
    return [(quantization, tuple(names)) for quantization, names in found.values()]


def _shapes(config: dict[str, Any]) -> Any:
    """The model without weights, its experts opened."""
    model_config, architecture = native_class(config)
    with torch.device("meta"):
        model = architecture._from_config(model_config)
    open_experts(model)  # of slices of what is there, so on the same device
    return model


def _check(model: Any, variants: tuple[str, ...], quantization: Quantization) -> RecipeCheck:
    try:
        recipe = recipe_of(quantization, model)
        targets = match(model, recipe)
        if recipe.scale_rule == "gptq":
            require_few_passes(model, [group for group in targets.groups if group.format == "nvfp4"])
    except QadError as error:
        return RecipeCheck(variants, {}, 0, 0, (), str(error))
    formats: Counter[str] = Counter(group.format for group in targets.groups for _ in group.members)
    shares = _shares(model, targets)
    return RecipeCheck(variants, dict(formats), len(targets.excluded), len(targets.kv_cache), shares)


def _shares(model: nn.Module, targets: Targets) -> tuple[Share, ...]:
    quantized, left = (Counter(map(_short, names)) for names in (targets.members, targets.excluded))
    names = [_short(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(Share(name, quantized[name], left[name]) for name in dict.fromkeys(names))


def _short(name: str) -> str:
    """What a layer is called in its block: the last part of its name, with that of the experts around it."""
    found = EXPERT.match(name)
    return name.rpartition(".")[2] if found is None else f"experts.*.{found['projection']}"
