"""Calibration: the largest input magnitude of every fused group over given batches, and the check that it suffices.

What calibration has not seen, serving saturates: batches should hold first tokens, the chat template and the longest
contexts that will be served. Tensor scales are derived from the record by `qad.modules`, with the recipe's headroom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qad.errors import CalibrationError, NonFiniteError
from qad.modules import BlockCounts, input_quantizers
from qad.recipe import Recipe, match


@torch.no_grad()
def calibrate(model: Any, recipe: Recipe, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """The largest input magnitude by fused group of a BF16 model.

    Args:
        model: a transformers model; called through its base model, so that the output head costs nothing.
        batches: dictionaries with input_ids and attention_mask, (batch, tokens). Padding must be on the right: its
            positions are left out of the record.
    Raises:
        CalibrationError: no batch, or a group that no batch reached.  NonFiniteError: an activation is NaN or infinite.
    """
    groups = match(model, recipe).groups
    amax: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if seen.get(name) is x:
                return
            seen[name] = x
            valid = x if mask is None or x.shape[:2] != mask.shape else x[mask]
            largest = torch.maximum(valid.max(), -valid.min()).float()
            amax[name] = torch.maximum(amax.get(name, largest), largest)

        return hook

    handles = [
        model.get_submodule(member).register_forward_pre_hook(record(group.name))
        for group in groups
        for member in group.members
    ]
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool()
            model.base_model(**batch, use_cache=False)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    missed = [group.name for group in groups if group.name not in amax]
    if missed:
        raise CalibrationError(
            f"calibration reached {len(amax)} of {len(groups)} fused groups; never seen: {', '.join(missed[:5])}; "
            "calibrate with text that reaches them, or exclude them"
        )
    for name, value in amax.items():
        if not math.isfinite(float(value)):
            raise NonFiniteError(f"input of {name}: {float(value)} during calibration; the BF16 model itself overflows there")
    return {group.name: float(amax[group.name]) for group in groups}


@contextmanager
def counting_blocks(model: Any) -> Iterator[BlockCounts]:
    """While it lasts, every activation block that `model` quantizes is counted, padding included."""
    counts = BlockCounts()
    quantizers = input_quantizers(model)
    for quantizer in quantizers:
        quantizer.counts = counts
    try:
        yield counts
    finally:
        for quantizer in quantizers:
            quantizer.counts = None


def require_unsaturated(counts: BlockCounts, limit: float) -> None:
    """CalibrationError if the share of saturated blocks is above `limit`."""
    if counts.total and counts.saturated > limit * counts.total:
        raise CalibrationError(
            f"{counts.saturated} of {counts.total} activation blocks saturate ({counts.saturated / counts.total:.2e}), more "
            f"than calibration.max_saturated = {limit:g}: raise calibration.headroom, or calibrate with text like what is "
            "served (first tokens, the chat template, long contexts)"
        )
