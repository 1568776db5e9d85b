"""Looking at the inputs of fused groups while a model reads batches: what calibration and GPTQ are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from qad.backbone import last_hidden
from qad.recipe import FusedGroup


class _AllSeen(Exception):
    """Every observed group has had its input: the rest of the forward pass would be computed for nothing."""


@torch.no_grad()
def observe_inputs(
    model: Any,
    groups: Sequence[FusedGroup],
    batches: Iterable[dict[str, Tensor]],
    observe: Callable[[FusedGroup, Tensor], None],
    *,
    skip_first_token: bool = False,
    stop_when_all_seen: bool = False,
    on_mask: Callable[[Tensor], None] = lambda mask: None,
) -> None:
    """Call `observe(group, x)` with each input of `groups`, once for all members that share it, padding left out.

    Args:
        model: a transformers model; called through its base model, so that the output head costs nothing.
        batches: dictionaries with input_ids and attention_mask, (batch, tokens), padding on the right; and what an image-text model is
            called with besides. Positions that stand for an image are real inputs, in serving as here: they count.
        observe: gets x as (tokens, K), or as the module got it where its shape is neither (batch, tokens, K) nor (batch * tokens, K). An
            expert that no token was routed to, or padding alone, is not seen.
        skip_first_token: leave the first position of every sequence out as well.
        on_mask: called before each batch with the positions that count, (batch, tokens) bool.
        stop_when_all_seen: end a forward pass as soon as every group has had an input.
    """
    seen: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def watch(group: FusedGroup) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if seen.get(group.name) is x:
                return
            seen[group.name] = x
            rows = x if mask is None else _unpadded(x, mask, experts.get(group.name))
            if len(rows):
                observe(group, rows)
            if stop_when_all_seen and len(seen) == len(groups):
                raise _AllSeen

        return hook

    experts = {
        group.name: model.get_submodule(group.members[0].rpartition(".")[0]) for group in groups if group.experts is not None
    }
    handles = [
        model.get_submodule(member).register_forward_pre_hook(watch(group)) for group in groups for member in group.members
    ]
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool()
            if skip_first_token:
                mask = mask.clone()
                mask[:, 0] = False
            on_mask(mask)
            with suppress(_AllSeen):
                last_hidden(model, {**batch, "use_cache": False})
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()


def _unpadded(x: Tensor, mask: Tensor, expert: nn.Module | None) -> Tensor:
    """The rows of an input that are no padding. expert: the one that the layer is of."""
    tokens = getattr(expert, "tokens", None)
    if tokens is not None:
        return x[mask.flatten()[tokens]]
    if x.ndim > 2 and x.shape[:2] == mask.shape:
        return x[mask]
    return x[mask.flatten()] if x.ndim == 2 and len(x) == mask.numel() else x
