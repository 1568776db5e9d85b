"""What is quantized: a recipe, matched against a model to a list of fused groups.

A *fused group* is a set of linear layers that serving engines merge into one product (q/k/v; gate/up): its members read
the same input and share one weight scale and one input scale a tensor. A recipe that would split one is refused, as is a
pattern that matches nothing: both are silent accuracy losses elsewhere.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from qad.errors import RecipeError
from qad.nvfp4 import BLOCK_SIZE

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Name of the fused layer and its members, as siblings under one parent (vLLM's names)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized to NVFP4.

    activations: True quantizes the inputs too (W4A4), False leaves them in BF16 (W4A16).
    exclude: shell-style patterns of module names that stay in BF16; each must match a linear layer.
    power_of_two: tensor scales are rounded up to powers of two, which makes every decoded value exact in BF16.
    headroom: the input amax seen in calibration is multiplied by this before its tensor scale is derived.
    """

    activations: bool = True
    exclude: tuple[str, ...] = ("lm_head",)
    power_of_two: bool = True
    headroom: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.headroom < float("inf"):
            raise RecipeError(f"headroom must be a positive number, found {self.headroom!r}")


@dataclass(frozen=True)
class FusedGroup:
    """Linear layers that share tensor scales; a layer of its own is a group of one. Names are full module names."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Targets:
    """What a recipe quantizes in a model, and what it leaves."""

    groups: tuple[FusedGroup, ...]
    excluded: tuple[str, ...]

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(member for group in self.groups for member in group.members)


def match(model: nn.Module, recipe: Recipe) -> Targets:
    """The fused groups that `recipe` quantizes in `model`, in the model's order.

    Raises:
        RecipeError: a pattern matches no linear layer, a fused group is excluded in part, an input width is not a
            multiple of 16, the output head shares its weight with the embedding, the model holds experts as 3-D
            parameters, or nothing is left to quantize.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    _refuse_expert_stacks(model)
    excluded = _excluded(tuple(linears), recipe.exclude)
    chosen = [name for name in linears if name not in excluded]
    if not chosen:
        raise RecipeError(f"exclude = {list(recipe.exclude)} leaves no linear layer to quantize; narrow the patterns")
    for name in chosen:
        if linears[name].in_features % BLOCK_SIZE:
            raise RecipeError(
                f"{name}: input width {linears[name].in_features} is not a multiple of {BLOCK_SIZE}, the NVFP4 block; "
                f'add "{name}" to exclude'
            )
    tables: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for name in chosen:
        if any(linears[name].weight is table.weight for table in tables):
            raise RecipeError(f'{name}: shares its weight with the embedding, which stays BF16; add "{name}" to exclude')
    return Targets(groups_of(chosen, tuple(linears)), tuple(excluded))


def groups_of(chosen: list[str], linears: tuple[str, ...]) -> tuple[FusedGroup, ...]:
    """`chosen` layer names as fused groups; RecipeError where a group of the model's `linears` is chosen in part."""
    groups: dict[str, list[str]] = {}
    for name in chosen:
        groups.setdefault(_group_name(name, linears), []).append(name)
    for group, members in groups.items():
        siblings = [name for name in linears if _group_name(name, linears) == group]
        left_out = sorted(set(siblings) - set(members))
        if left_out:
            raise RecipeError(
                f"{group}: the recipe splits a fused group: {', '.join(members)} would be quantized and "
                f"{', '.join(left_out)} not, but they share one tensor scale when served; exclude all of them or none"
            )
    return tuple(FusedGroup(group, tuple(members)) for group, members in groups.items())


def _group_name(name: str, linears: tuple[str, ...]) -> str:
    parent, _, leaf = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for fused, leaves in FUSED.items():
        if leaf in leaves and sum(prefix + other in linears for other in leaves) > 1:
            return prefix + fused
    return name


def _excluded(linears: tuple[str, ...], patterns: tuple[str, ...]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            near = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.3) or list(linears[:3])
            raise RecipeError(
                f'exclude pattern "{pattern}" matches no linear layer of the model; near names: {", ".join(near)}'
            )
    return [name for name in linears if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _refuse_expert_stacks(model: nn.Module) -> None:
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                raise RecipeError(
                    f"{module_name}.{name}: experts held as a 3-D parameter {tuple(parameter.shape)} are not available in "
                    "this version, and skipping them would call a mostly unquantized model NVFP4"
                )
