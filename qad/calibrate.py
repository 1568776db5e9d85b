"""Calibration: the largest input magnitude of every fused group over given batches, and the check that it suffices;
the second moments of inputs, with which a scale rule may weigh its errors.

What calibration has not seen, serving saturates: batches should hold first tokens, the chat template and the longest
contexts that will be served. Tensor scales are derived from the record by `qad.quantize`, with the recipe's headroom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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


@torch.no_grad()
def calibrate(
    model: Any, recipe: Recipe, batches: Iterable[dict[str, Tensor]], *, skip_first_token: bool = False
) -> dict[str, float]:
    """The largest input magnitude by fused group of a BF16 model.

    With an FP8 KV cache also those of the keys and values of each attention layer, as `<layer>.k_cache` and `.v_cache`.

    Args:
        model: a transformers model; called through its base model, so that the output head costs nothing.
        batches: dictionaries with input_ids and attention_mask, (batch, tokens), and what an image-text model is called with besides,
            such as pixel_values. Padding must be on the right: its positions are left out of the record, those of images are not.
        skip_first_token: leave the first position of every sequence out of the record too: an experiment that shows what a
            calibration without it costs, since a model can put its largest activations there.
    Raises:
        CalibrationError: no batch, or a group that no batch reached.  NonFiniteError: an activation is NaN or infinite.
    """
    targets = match(model, recipe)
    amax: dict[str, Tensor] = {}

    def record(group: FusedGroup, x: Tensor) -> None:
        largest = torch.maximum(x.max(), -x.min()).float()
        amax[group.name] = torch.maximum(amax.get(group.name, largest), largest)

    with kv_cache.recording(model, targets.kv_cache) as recorders:

        def set_mask(mask: Tensor) -> None:
            for recorder in recorders.values():
                recorder.mask = mask

        observe_inputs(model, targets.groups, batches, record, skip_first_token=skip_first_token, on_mask=set_mask)
    _require_all(targets.groups, amax)
    for name, recorder in recorders.items():
        if not recorder.seen:
            raise CalibrationError(
                f'{name}: calibration never saw its keys and values, so kv_cache = "fp8" has no scales; remove it'
            )
        amax |= {f"{name}.k_cache": recorder.k_amax, f"{name}.v_cache": recorder.v_amax}
    for name, value in amax.items():
        if not math.isfinite(float(value)):
            raise NonFiniteError(f"input of {name}: {float(value)} during calibration; the BF16 model itself overflows there")
    return {name: float(value) for name, value in amax.items()}


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
    _require_all(groups, sums)
    moments = {name: (total / counts[name]).float() for name, total in sums.items()}
    for name, moment in moments.items():
        require_finite(moment, f"second moment of the input of {name}")
    return {group.name: moments[group.name] for group in groups}


def _require_all(groups: Iterable[FusedGroup], found: Mapping[str, Any]) -> None:
    names = [group.name for group in groups]
    missed = [name for name in names if name not in found]
    if missed:
        raise CalibrationError(
            f"calibration reached {len(found)} of {len(names)} fused groups; never seen: {', '.join(missed[:5])}; "
            "calibrate with text that reaches them, or exclude them"
        )


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
