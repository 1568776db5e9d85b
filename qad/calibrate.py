"""Calibration: the largest input magnitude of every fused group over given batches, and the check that it suffices;
the second moments of inputs, with which a scale rule may weigh its errors.

All experts of a layer share one record a projection, so one that no token was routed to takes the largest magnitude that the others saw; of
second moments, which every expert has of its own, it takes the mean over the others. How many there were is counted, by layer. A layer none
of whose experts was reached is an error.

What calibration has not seen, serving saturates: batches should hold first tokens, the chat template and the longest
contexts that will be served. Tensor scales are derived from the record by `qad.quantize`, with the recipe's headroom.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qad import kv_cache
from qad.errors import CalibrationError, NonFiniteError
from qad.modules import BlockCounts, input_quantizers
from qad.nvfp4 import require_finite
from qad.observe import observe_inputs
from qad.recipe import FusedGroup, Recipe, match


class InputAmax(dict[str, float]):
    """Largest input magnitudes by `FusedGroup.input_name`. unrouted_experts: how many experts calibration never reached, by layer of
    experts; 0 is a layer all of whose experts were."""

    def __init__(self, amax: Mapping[str, float], unrouted_experts: dict[str, int]) -> None:
        super().__init__(amax)
        self.unrouted_experts = unrouted_experts


@torch.no_grad()
def calibrate(model: Any, recipe: Recipe, batches: Iterable[dict[str, Tensor]], *, skip_first_token: bool = False) -> InputAmax:
    """The largest input magnitude by fused group of a BF16 model, of experts by projection of a layer.

    With an FP8 KV cache also those of the keys and values of each attention layer, as `<layer>.k_cache` and `.v_cache`.

    Args:
        model: a transformers model; called through its base model, so that the output head costs nothing.
        batches: dictionaries with input_ids and attention_mask, (batch, tokens), and what an image-text model is called with besides,
            such as pixel_values. Padding must be on the right: its positions are left out of the record, those of images are not.
        skip_first_token: leave the first position of every sequence out of the record too: an experiment that shows what a
            calibration without it costs, since a model can put its largest activations there.
    Raises:
        CalibrationError: no batch, or a group, or all experts of a layer, that no batch reached.  NonFiniteError: an activation is NaN or infinite.
    """
    targets = match(model, recipe)
    amax: dict[str, Tensor] = {}
    reached: set[str] = set()

    def record(group: FusedGroup, x: Tensor) -> None:
        largest = torch.maximum(x.max(), -x.min()).float()
        amax[group.input_name] = torch.maximum(amax.get(group.input_name, largest), largest)
        reached.add(group.name)

    with kv_cache.recording(model, targets.kv_cache) as recorders:

        def set_mask(mask: Tensor) -> None:
            for recorder in recorders.values():
                recorder.mask = mask

        observe_inputs(model, targets.groups, batches, record, skip_first_token=skip_first_token, on_mask=set_mask)
    unrouted = _unrouted(targets.groups, reached)
    for name, recorder in recorders.items():
        if not recorder.seen:
            raise CalibrationError(
                f'{name}: calibration never saw its keys and values, so kv_cache = "fp8" has no scales; remove it'
            )
        amax |= {f"{name}.k_cache": recorder.k_amax, f"{name}.v_cache": recorder.v_amax}
    for name, value in amax.items():
        if not math.isfinite(float(value)):
            raise NonFiniteError(f"input of {name}: {float(value)} during calibration; the BF16 model itself overflows there")
    return InputAmax({name: float(value) for name, value in amax.items()}, unrouted)


@torch.no_grad()
def second_moments(
    model: Any, recipe: Recipe, batches: Iterable[dict[str, Tensor]], *, skip_first_token: bool = False
) -> dict[str, Tensor]:
    """The mean square of every input column by fused group of a BF16 model: (K,) float32, summed in FP64.

    Arguments and errors: as those of `calibrate`.
    """
    groups = match(model, recipe).groups
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys((group.name for group in groups), 0)

    def record(group: FusedGroup, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        squares = rows.float().square().sum(dim=0, dtype=torch.float64)
        sums[group.name] = squares + sums.get(group.name, 0.0)
        counts[group.name] += len(rows)

    observe_inputs(model, groups, batches, record, skip_first_token=skip_first_token)
    _unrouted(groups, sums)
    pooled: dict[str, tuple[Tensor, int]] = {}
    for group in groups:
        if group.experts is not None and group.name in sums:
            total, count = pooled.get(group.input_name, (torch.zeros_like(sums[group.name]), 0))
            pooled[group.input_name] = total + sums[group.name], count + counts[group.name]
    for group in groups:
        if group.name not in sums:
            sums[group.name], counts[group.name] = pooled[group.input_name]
    moments = {name: (total / counts[name]).float() for name, total in sums.items()}
    for name, moment in moments.items():
        require_finite(moment, f"second moment of the input of {name}")
    return {group.name: moments[group.name] for group in groups}


def _unrouted(groups: Iterable[FusedGroup], reached: Container[str]) -> dict[str, int]:
    """How many experts of each layer of experts were not reached; CalibrationError where another group, or all of a layer, was not."""
    missed: list[str] = []
    total = 0
    experts: dict[str, dict[str, bool]] = {}
    for group in groups:
        total += 1
        if group.experts is None:
            missed += [] if group.name in reached else [group.name]
        else:
            expert = group.name.rpartition(".")[0]
            known = experts.setdefault(group.experts, {})
            known[expert] = known.get(expert, True) and group.name in reached
    if missed:
        raise CalibrationError(
            f"calibration never reached {len(missed)} of {total} fused groups: {', '.join(missed[:5])}; "
            "calibrate with text that reaches them, or exclude them"
        )
    for layer, found in experts.items():
        if not any(found.values()):
            raise CalibrationError(
                f'{layer}: calibration reached none of its {len(found)} experts; calibrate with more text, or exclude "{layer}.*"'
            )
    return {layer: sum(not is_reached for is_reached in found.values()) for layer, found in experts.items()}


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


def require_unsaturated(counts: BlockCounts, *, max_saturated: float, max_overshoot: float) -> None:
    """CalibrationError if the share of saturated blocks, or the largest overshoot of one, is above its limit."""
    advice = "raise calibration.headroom, or calibrate with text like what is served (first tokens, the chat template, long contexts)"
    if counts.total and counts.saturated > max_saturated * counts.total:
        raise CalibrationError(
            f"{counts.saturated} of {counts.total} activation blocks saturate ({counts.saturated / counts.total:.2e}), more "
            f"than calibration.max_saturated = {max_saturated:g}: {advice}"
        )
    if counts.overshoot > max_overshoot:
        raise CalibrationError(
            f"the input of {counts.overshoot_in} reaches {counts.overshoot:.3g} times what its scale can hold, more than "
            f"calibration.max_overshoot = {max_overshoot:g}: {advice}"
        )
