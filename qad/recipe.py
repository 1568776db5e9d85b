"""What is quantized: a recipe, matched against a model to a list of fused groups.

A *fused group* is a set of linear layers that serving engines merge into one product (q/k/v; gate/up): its members read
the same input and share one weight scale and one input scale a tensor. A recipe that would split one is refused, as is a
pattern that matches nothing: both are silent accuracy losses elsewhere.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from qad import kv_cache
from qad.backbone import Backbone, backbone_of, is_in
from qad.errors import RecipeError, SplitError
from qad.experts import EXPERT, expert_layers, unopened
from qad.nvfp4 import BLOCK_SIZE
from qad.scales import BlockScaleRule

Format = Literal["nvfp4", "fp8"]
ScaleRule = Literal["amax", "mse", "four_over_six", "gptq"]
ScaleWeighting = Literal["none", "second_moment"]
BlockScales = Literal["recomputed", "frozen", "learned"]

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "w13": ("w1", "w3")}
"""Name of the fused layer and its members, as siblings under one parent (vLLM's names)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized to NVFP4.

    activations: True quantizes the inputs too (W4A4), False leaves them in BF16 (W4A16).
    exclude: shell-style patterns of module names that stay in BF16; each must match a linear layer of the language backbone. What is
        outside of it, such as a vision tower, stays in BF16 without being named.
    power_of_two: tensor scales are rounded up to powers of two, which makes every decoded value exact in BF16.
    headroom: the input amax seen in calibration is multiplied by this before its tensor scale is derived.
    scale_rule: how the block scales of weights are chosen (see `qad.scales`), or "gptq": codes by `qad.gptq` on the block
        scales of amax, or of "mse" where errors are weighted.
    scale_weighting: "second_moment" weighs the errors of "mse" by the mean square of each input column; with "gptq", those
        are the block scales that it keeps.
    scale_multiplier: on the tensor scales of weights, at least 1, after their rounding: no better or worse in itself, it draws the
        roundings anew, and the spread over several is the noise floor of any comparison of scale rules.
    block_scales: in training, "recomputed" by amax at each projection or "frozen" as PTQ left them, the only choice with rules
        other than amax.
    fp8: shell-style patterns of names that become FP8 (E4M3, one scale a tensor, inputs too) instead of NVFP4.
    kv_cache: "bf16" or "fp8": keys and values of attention in E4M3 with one calibrated scale a layer each.
    """

    activations: bool = True
    exclude: tuple[str, ...] = ("lm_head",)
    power_of_two: bool = True
    headroom: float = 4.0
    scale_rule: ScaleRule = "amax"
    scale_weighting: ScaleWeighting = "none"
    scale_multiplier: float = 1.0
    block_scales: BlockScales = "recomputed"
    fp8: tuple[str, ...] = ()
    kv_cache: Literal["bf16", "fp8"] = "bf16"

    @property
    def block_scale_rule(self) -> BlockScaleRule:
        """The rule that chooses the block scales."""
        if self.scale_rule != "gptq":
            return self.scale_rule
        return "amax" if self.scale_weighting == "none" else "mse"

    def __post_init__(self) -> None:
        if self.scale_rule not in get_args(ScaleRule):
            raise RecipeError(f"scale_rule {self.scale_rule!r}: allowed: {', '.join(get_args(ScaleRule))}")
        if self.scale_rule != "amax" and self.block_scales == "recomputed":
            raise RecipeError(
                f'scale_rule "{self.scale_rule}" takes block_scales = "frozen" or "learned": to recompute them is the amax rule'
            )
        if self.scale_weighting != "none" and self.scale_rule not in ("mse", "gptq"):
            raise RecipeError(
                f'scale_weighting has no effect with scale_rule "{self.scale_rule}"; only "mse" and "gptq" weigh errors'
            )
        if not 1 <= self.scale_multiplier < float("inf"):
            raise RecipeError(
                f"scale_multiplier must be 1 or more, found {self.scale_multiplier!r}: less would saturate weights"
            )
        if self.fp8 and not self.activations:
            raise RecipeError("fp8 layers quantize their inputs too; with activations = false leave fp8 empty or exclude them")
        if not 0 < self.headroom < float("inf"):
            raise RecipeError(f"headroom must be a positive number, found {self.headroom!r}")


@dataclass(frozen=True)
class FusedGroup:
    """Linear layers that share tensor scales; a layer of its own is a group of one. Names are full module names.

    experts: of a group inside an expert, the name of the layer of experts.
    """

    name: str
    members: tuple[str, ...]
    format: Format = "nvfp4"
    experts: str | None = None

    @property
    def input_name(self) -> str:
        """Under which its input is calibrated: all experts of a layer share one scale a projection, other groups have their own."""
        return self.name if self.experts is None else f"{self.experts}.{self.name.rpartition('.')[2]}"


@dataclass(frozen=True)
class Targets:
    """What a recipe quantizes in a model, and what it leaves. excluded: every linear layer that stays BF16, those outside the language
    backbone too. kv_cache: names of attention layers with an FP8 cache. never_linear: other modules of the backbone that hold a matrix
    (routers, convolutions) and serving engines may build as linear layers; they stay as they are, whatever the recipe says."""

    groups: tuple[FusedGroup, ...]
    excluded: tuple[str, ...]
    kv_cache: tuple[str, ...] = ()
    never_linear: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(member for group in self.groups for member in group.members)


def match(model: nn.Module, recipe: Recipe) -> Targets:
    """The fused groups that `recipe` quantizes in the language backbone of `model`, in the model's order.

    Raises:
        RecipeError: a pattern matches no linear layer of the backbone, a fused group is excluded in part, an input width is not a
            multiple of 16, the output head shares its weight with the embedding, the model holds experts as 3-D
            parameters that `qad.experts` could not open, or nothing is left to quantize.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    backbone = backbone_of(model)
    _refuse_unopened_experts(model, backbone)
    names = backbone.linears
    for key, patterns in (("exclude", recipe.exclude), ("fp8", recipe.fp8)):
        _require_effect(backbone, patterns, key)
    excluded = set(_matching(backbone, recipe.exclude, "exclude"))
    fp8 = set(_matching(backbone, recipe.fp8, "fp8"))
    both = sorted(excluded & fp8)
    if both:
        raise RecipeError(f"{both[0]}: matched by both exclude and fp8; a layer has one format: narrow one of the patterns")
    formats: dict[str, Format] = {name: "fp8" if name in fp8 else "nvfp4" for name in names if name not in excluded}
    if not formats:
        raise RecipeError(f"exclude = {list(recipe.exclude)} leaves no linear layer to quantize; narrow the patterns")
    if "nvfp4" not in formats.values():
        raise RecipeError(f"fp8 = {list(recipe.fp8)} leaves no layer for NVFP4; narrow the patterns")
    tables: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for name, found in formats.items():
        if found == "nvfp4" and linears[name].in_features % BLOCK_SIZE:
            raise RecipeError(
                f"{name}: input width {linears[name].in_features} is not a multiple of {BLOCK_SIZE}, the NVFP4 block; "
                f'add "{name}" to exclude'
            )
        if any(linears[name].weight is table.weight for table in tables):
            raise RecipeError(f'{name}: shares its weight with the embedding, which stays BF16; add "{name}" to exclude')
    attention = kv_cache.attention_modules(model) if recipe.kv_cache == "fp8" else ()
    stays = {*excluded, *backbone.outside}
    excluded_names = tuple(name for name in linears if name in stays)
    return Targets(groups_of(formats, names), excluded_names, attention, _never_linear(model, backbone))


def groups_of(formats: dict[str, Format], linears: tuple[str, ...]) -> tuple[FusedGroup, ...]:
    """Layers with their formats as fused groups; SplitError where a group, or the experts of a layer, of the model's `linears` are split."""
    groups: dict[str, list[str]] = {}
    siblings: dict[str, list[str]] = {}
    known = frozenset(linears)
    for name in linears:
        siblings.setdefault(_group_name(name, known), []).append(name)
    for name in formats:
        groups.setdefault(_group_name(name, known), []).append(name)
    for group, members in groups.items():
        left_out = sorted(set(siblings[group]) - set(members))
        if left_out:
            raise SplitError(
                group,
                f"a fused group: {', '.join(members)} quantized and {', '.join(left_out)} not, but they share one tensor scale when served",
                "exclude all of them or none",
            )
        if len({formats[name] for name in members}) > 1:
            listed = ", ".join(f"{name} {formats[name]}" for name in members)
            raise SplitError(group, f"a fused group over two formats: {listed}", "give all of them one")
    _require_whole_experts(formats, linears)
    experts = {name: match["layer"] for name in groups if (match := EXPERT.match(name))}
    return tuple(
        FusedGroup(group, tuple(members), formats[members[0]], experts.get(group)) for group, members in groups.items()
    )


def _require_whole_experts(formats: dict[str, Format], linears: tuple[str, ...]) -> None:
    for layer, members in expert_layers(linears).items():
        found = {formats.get(name) for name in members}
        if len(found) > 1:
            listed = "; ".join(
                f"{next(n for n in members if formats.get(n) == each)} {each or 'bf16'}" for each in sorted(found, key=str)
            )
            raise SplitError(
                layer,
                f"the experts of a layer: {listed}",
                f'engines serve them as one: give all of them one format, or exclude "{layer}.*"',
            )


def _never_linear(model: nn.Module, backbone: Backbone) -> tuple[str, ...]:
    """Modules of the decoder with a matrix of their own that are neither linear layers nor embeddings."""
    return tuple(
        name
        for name, module in model.named_modules()
        if is_in(name, backbone.decoder)
        and not isinstance(module, (nn.Linear, nn.Embedding))
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.ndim > 1
    )


def _group_name(name: str, linears: frozenset[str]) -> str:
    parent, _, leaf = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for fused, leaves in FUSED.items():
        if leaf in leaves and sum(prefix + other in linears for other in leaves) > 1:
            return prefix + fused
    return name


def _matching(backbone: Backbone, patterns: tuple[str, ...], key: str) -> list[str]:
    linears = backbone.linears
    for pattern in patterns:
        if not any(_fits(name, pattern, backbone) for name in linears):
            near = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.3) or list(linears[:3])
            raise RecipeError(f'{key} pattern "{pattern}" matches no linear layer of the model; near names: {", ".join(near)}')
    return [name for name in linears if any(_fits(name, pattern, backbone) for pattern in patterns)]


def _fits(name: str, pattern: str, backbone: Backbone) -> bool:
    """Whether a pattern matches a name, or the name as the language model inside calls it: "lm_head" is its output head."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.removeprefix(f"{backbone.speaker}."), pattern)


def _require_effect(backbone: Backbone, patterns: tuple[str, ...], key: str) -> None:
    for pattern in patterns:
        outside = [name for name in backbone.outside if fnmatchcase(name, pattern)]
        if outside and not any(_fits(name, pattern, backbone) for name in backbone.linears):
            raise RecipeError(
                f'{key} pattern "{pattern}" has no effect: it matches {outside[0]}, which is outside the language backbone '
                f"({backbone.decoder}) and stays BF16 whatever the recipe says; remove the pattern"
            )


def _refuse_unopened_experts(model: nn.Module, backbone: Backbone) -> None:
    for name, reason in unopened(model).items():
        if is_in(name, backbone.decoder):
            raise RecipeError(
                f"{name}: experts held as 3-D parameters of a kind that is not available in this version ({reason}), and skipping them "
                "would call a mostly unquantized model NVFP4; compare such a model as it is, or a checkpoint of it made elsewhere"
            )
