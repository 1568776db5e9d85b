"""Experts that transformers holds as 3-D parameters, opened into ordinary linear layers, one submodule an expert.

Everything else in this library then sees plain layers: `experts.<i>.gate_proj`, `.up_proj`, `.down_proj`, or `w1`, `w3`, `w2` where files
call them so; without a gate `up_proj` and `down_proj` alone. The opened weights are the slices of the stacks, which are not copied.

The forward pass is that of transformers' own eager experts (5.17, `integrations/moe.py` and the classes that it decorates), expert by
expert over those that a token was routed to: y[t] = sum over the experts e of t of p[t, e] * down_e(act(gate_e(x[t])) * up_e(x[t])), or of
p[t, e] * down_e(act(up_e(x[t]))). Classes with a gate add up in the type of x, those without (nemotron_h) in that of p. What is not
understood (biases, transposed or interleaved stacks, another gate), and what files hold as stacks too, stays as it is, and `unopened` says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

EXPERT = re.compile(r"^(?P<layer>.+\.experts)\.(?P<index>\d+)\.(?P<projection>[^.]+)$")
"""The full name of a linear layer of one expert."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OpenExpert(nn.Module):
    """One expert. names: of its linear layers, the gate's first where it has one.

    tokens: while it computes, which rows of the layer's input (tokens, width) its own are; None at other times.
    """

    def __init__(self, weights: dict[str, Tensor], activation: Any) -> None:
        super().__init__()
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight)
            self.add_module(name, linear)
        self.names = tuple(weights)
        self.act_fn = activation
        self.tokens: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        first, *up, down = (self.get_submodule(name) for name in self.names)
        hidden = self.act_fn(first(x))
        return down(hidden * up[0](x) if up else hidden)


class OpenExperts(nn.Module):
    """All experts of a layer, in place of the module that held their stacks. Children are called "0", "1", …"""

    def __init__(self, source: Any, names: Mapping[str, str]) -> None:
        """source: the module with the stacks. names: what files call the "gate", "up" and "down" projection of one expert."""
        super().__init__()
        self.has_gate: bool = source.has_gate
        self.num_experts: int = source.num_experts
        for index in range(source.num_experts):
            weights = {}
            if source.has_gate:
                weights[names["gate"]], weights[names["up"]] = (part.data for part in source.gate_up_proj.data[index].chunk(2))
            else:
                weights[names["up"]] = source.up_proj[index].data
            weights[names["down"]] = source.down_proj[index].data
            self.add_module(str(index), OpenExpert(weights, source.act_fn))
        self.requires_grad_(source.down_proj.requires_grad)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, width); top_k_index int64, top_k_weights (tokens, k): experts of each token and their shares."""
        total = torch.zeros_like(hidden_states, dtype=hidden_states.dtype if self.has_gate else top_k_weights.dtype)
        with torch.no_grad():
            takes = functional.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
            hit = takes.sum(dim=(-1, -2)).nonzero().flatten().tolist()
        for index in hit:
            expert: Any = self.get_submodule(str(index))
            position, token = torch.where(takes[index])
            expert.tokens = token
            try:
                found = expert(hidden_states[token]) * top_k_weights[token, position, None]
            finally:
                expert.tokens = None
            total.index_add_(0, token, found.to(total.dtype))
        idle = [p for index in set(range(self.num_experts)) - set(hit) for p in self.get_submodule(str(index)).parameters()]
        trained = [parameter for parameter in idle if parameter.requires_grad] if torch.is_grad_enabled() else []
        total = total.to(hidden_states.dtype)
        return _WithIdle.apply(total, *trained) if trained else total


class _WithIdle(torch.autograd.Function):
    """The identity of its first input; the others, weights of experts that no token was routed to, get a gradient of 0.

    So they have in transformers' stacks: the optimizer moves on as for any other weight, and ranks that route differently reduce the
    same gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *idle: Tensor) -> Tensor:
        ctx.shapes = [(weight.shape, weight.dtype, weight.device) for weight in idle]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.shapes)
        return gradients[0], *zeros


def open_experts(model: nn.Module) -> None:
    """Replace, in place, every module of `model` that holds experts as stacks and is understood."""
    stacks = [(name, module) for name, module in model.named_modules() if _is_stack(module)]
    names = _names_in_files(model) if stacks else {}
    for name in [name for name, module in stacks if _reason(module, names) is None]:
        opened = OpenExperts(model.get_submodule(name), names)
        model.set_submodule(name, opened.train(model.training))


def unopened(model: nn.Module) -> dict[str, str]:
    """Modules of `model` that hold 3-D parameters and are no convolutions, with what is not understood about them."""
    stacks = [(name, module) for name, module in model.named_modules() if _is_stack(module)]
    names = _names_in_files(model) if stacks else {}
    return {name: f"{type(module).__name__}: {_reason(module, names) or 'not opened'}" for name, module in stacks}


def opened_experts(model: nn.Module) -> dict[str, OpenExperts]:
    """The opened layers of experts by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OpenExperts)}


def expert_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Of the full names of linear layers, those that are of experts, by the layer of experts that they belong to."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = EXPERT.match(name)
        if match:
            found.setdefault(match["layer"], []).append(name)
    return found


def _is_stack(module: nn.Module) -> bool:
    return not isinstance(module, _CONVOLUTIONS) and any(p.ndim == 3 for p in module.parameters(recurse=False))


def _reason(module: Any, names: Mapping[str, str]) -> str | None:
    """Why a module that holds stacks is not opened; None where it can be. names: of projections in files, as far as they have some."""
    from transformers.integrations.moe import _default_apply_gate

    needed = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
    if not all(hasattr(module, key) for key in needed):
        return "holds 3-D parameters and is no experts module of transformers 5"
    if module.has_bias:
        return "its experts have biases"
    if module.is_transposed:
        return "its stacks are transposed"
    if module.has_gate and not module.is_concatenated:
        return "its gates and ups are interleaved"
    if not hasattr(module, "act_fn") or (module.has_gate and type(module)._apply_gate is not _default_apply_gate):
        return "its gate is one of its own, not act(gate) * up"
    expected = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    found = {name for name, _ in module.named_parameters()}
    if found != expected:
        return f"its parameters are {', '.join(sorted(found))}, not {', '.join(sorted(expected))}"
    if not {"up", "down", *(("gate",) if module.has_gate else ())} <= names.keys():
        return "its files hold stacks, whose export is not available"
    return None


def _names_in_files(model: Any) -> dict[str, str]:
    """What files call the "gate", "up" and "down" projection of one expert, by the conversions that transformers loads them with.

    A projection that files hold no single ones of is left out, so are all of a model that is none of transformers'.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    names: dict[str, str] = {}
    for each in get_model_conversion_mapping(model):
        leaves = [re.search(r"experts\.\*\.(\w+)\.weight$", source) for source in getattr(each, "source_patterns", ())]
        if not isinstance(each, WeightConverter) or not leaves or not all(leaves):
            continue
        (target,) = each.target_patterns
        parts = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}.get(target.rpartition(".")[2], ())
        names |= {part: leaf[1] for part, leaf in zip(parts, leaves, strict=False) if leaf is not None}
    return names
