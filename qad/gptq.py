"""GPTQ: codes on given block scales that minimise the error of a layer's output, not of its weight.

Column by column the weight is rounded, and what the rounding did to the output is undone as far as the columns that are still to
come can do it. The Hessian of a fused group is H = sum x x^T over the inputs that serving multiplies by: quantized ones in
W4A4, plain ones in W4A16. Source: GPTQ (arXiv 2210.17323), algorithm 1, in natural column order; damping 0.01 of the mean
diagonal; the inverse and its Cholesky factor in FP64. Departure: the scales are chosen before and stay, so that the result is
plain NVFP4 whatever the rule that chose them.

An expert that no batch is routed to has no Hessian and keeps its codes, each weight rounded to the nearest on its scales.

Groups are done in the model's order, as many at a time as Hessians fit in a stated memory, each time with a forward pass of
the model as it is by then: the groups before are quantized already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qad import kernels
from qad.errors import CalibrationError, NonFiniteError
from qad.nvfp4 import Packed, encode_e2m1, pack
from qad.observe import observe_inputs
from qad.recipe import FusedGroup
from qad.scales import nearest_e2m1

if TYPE_CHECKING:
    from qad.modules import QuantizedLinear

DAMPING = 0.01
BLOCK_COLUMNS = 128
"""Columns whose errors are propagated one by one; later columns get theirs in one product a block."""
HESSIAN_BYTES = 64 << 20
MOST_PASSES = 500
"""Passes over the calibration batches, above which nothing is begun: every expert has a Hessian of its own."""


def refine(
    model: Any,
    groups: Sequence[FusedGroup],
    modules: Mapping[str, QuantizedLinear],
    batches: Sequence[dict[str, Tensor]],
    *,
    hessian_bytes: int = HESSIAN_BYTES,
) -> None:
    """Replace the codes of a quantized model by those of GPTQ, in place; its scales stay.

    Args:
        modules: the quantized layers by name, with `original` and `encoding`.
        batches: as for `qad.calibrate.calibrate`; read once for each batch of groups.
        hessian_bytes: how many groups are done at a time; at least one is.
    Raises:
        CalibrationError: it would take more than MOST_PASSES passes, of which none is begun; no batch reaches a group that is of no
            expert.  NonFiniteError: an input of it is NaN or infinite.
    """
    for together in require_few_passes(model, groups, hessian_bytes=hessian_bytes):
        hessians = _hessians(model, together, modules, batches)
        for group in together:
            members = [modules[name] for name in group.members]
            if group.name in hessians:
                _refine_group(group, members, hessians.pop(group.name))


def require_few_passes(
    model: Any, groups: Sequence[FusedGroup], *, hessian_bytes: int = HESSIAN_BYTES
) -> list[list[FusedGroup]]:
    """The groups of each pass over the calibration batches, in order; CalibrationError where there are more than MOST_PASSES.

    Of `model` shapes alone are read: its weights may be on the meta device, its layers quantized or not yet.
    """
    portions = list(_portions(model, groups, hessian_bytes))
    if len(portions) > MOST_PASSES:
        n_experts = sum(group.experts is not None for group in groups)
        raise CalibrationError(
            f'scale_rule "gptq" would take {len(portions)} passes over the calibration batches, {hessian_bytes >> 20} MiB of Hessians '
            f"each, for {len(groups)} groups of layers of which {n_experts} are of experts; at most {MOST_PASSES} are allowed: choose "
            'another scale_rule ("mse" with scale_weighting = "second_moment" weighs errors by inputs too), or exclude the experts '
            '("*.experts.*")'
        )
    return portions


def _portions(model: Any, groups: Sequence[FusedGroup], hessian_bytes: int) -> Iterator[list[FusedGroup]]:
    portion: list[FusedGroup] = []
    used = 0
    for group in groups:
        size = 4 * model.get_submodule(group.members[0]).in_features ** 2
        if portion and used + size > hessian_bytes:
            yield portion
            portion, used = [], 0
        portion.append(group)
        used += size
    yield portion


def _hessians(
    model: Any, groups: Sequence[FusedGroup], modules: Mapping[str, QuantizedLinear], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """H (K, K) float32 by group."""
    found: dict[str, Tensor] = {}

    def add(group: FusedGroup, x: Tensor) -> None:
        quantizer = modules[group.members[0]].input_quantizer
        if quantizer is not None:
            x = kernels.fake_quantize(x, quantizer.tensor_scale, name=f"input of {group.name}")
        rows = x.reshape(-1, x.shape[-1]).float()
        if group.name not in found:
            found[group.name] = rows.new_zeros(rows.shape[-1], rows.shape[-1])
        found[group.name].addmm_(rows.T, rows)

    observe_inputs(model, groups, batches, add, stop_when_all_seen=True)
    missed = [group.name for group in groups if group.name not in found and group.experts is None]
    if missed:
        raise CalibrationError(
            f"GPTQ: no calibration batch reached {', '.join(missed[:5])}; calibrate with text that reaches them, or exclude them"
        )
    return found


def _refine_group(group: FusedGroup, members: Sequence[QuantizedLinear], hessian: Tensor) -> None:
    """The members share the input and so the Hessian: they are done as one weight, row under row."""
    encodings = [module.encoding for module in members if isinstance(module.encoding, Packed)]
    originals = [module.original for module in members]
    weight = torch.cat([original.float() for original in originals if original is not None])
    scale = torch.cat([e.block_scale.float() * e.tensor_scale for e in encodings])
    codes = gptq_codes(weight, scale, hessian, name=group.name)
    for module, encoding, code in zip(members, encodings, codes.split([m.out_features for m in members]), strict=True):
        module.set_encoding(Packed(pack(code), encoding.block_scale, encoding.tensor_scale))


@torch.no_grad()
def gptq_codes(weight: Tensor, scale: Tensor, hessian: Tensor, *, damping: float = DAMPING, name: str = "weight") -> Tensor:
    """Codes (N, K) uint8 of `weight` on the grid of `scale`.

    A column that calibration never saw other than zero has no Hessian: it is rounded to the nearest and moves no other.

    Args:
        weight: (N, K) float32.
        scale: (N, K/16) float32, block scale times tensor scale.
        hessian: (K, K) float32, the sum of x x^T.
    Raises:
        NonFiniteError: the Hessian holds NaN or infinity.
        CalibrationError: it cannot be inverted in FP64 in spite of the damping.
    """
    inverse = _inverse_factor(hessian, damping, name)
    remaining, scaled = weight.clone(), torch.empty_like(weight)
    width = weight.shape[1]
    propagate = _propagate_compiled if kernels.backend(weight.device) == "numba" else _propagate
    for start in range(0, width, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, width)
        factor = inverse[start:end, start:end].contiguous()
        columns, column_scale = remaining[:, start:end].contiguous(), scale[:, start // 16 : -(-end // 16)].contiguous()
        scaled[:, start:end], errors = propagate(columns, column_scale, factor)
        remaining[:, end:].addmm_(errors, inverse[start:end, end:], alpha=-1)
    return encode_e2m1(scaled)


def _propagate(columns: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Within a block of columns (N, B): what was rounded, in units of the scale, and what it cost (both (N, B))."""
    rest, errors, scaled = columns.T.contiguous(), torch.empty_like(columns.T), torch.empty_like(columns.T)
    for i in range(len(rest)):
        column_scale = scale[:, i // 16]
        scaled[i] = rest[i] / column_scale
        rounded = nearest_e2m1(scaled[i].abs()).copysign_(scaled[i])
        errors[i] = (rest[i] - rounded * column_scale) / factor[i, i]
        rest[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return scaled.T, errors.T


def _propagate_compiled(columns: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The same but for the rounding of FP32 sums, which a column near a midpoint can notice."""
    from qad import _numba_scales as compiled

    scaled, errors = torch.empty_like(columns), torch.empty_like(columns)
    compiled.gptq_columns(*(tensor.numpy() for tensor in (columns, scale, factor, scaled, errors)))
    return scaled, errors


def _inverse_factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """The upper Cholesky factor U (K, K) float32 of the damped inverse: H^-1 = U^T U."""
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()):
        raise NonFiniteError(f"GPTQ: the Hessian of {name} holds NaN or infinity: an input of it overflows during calibration")
    damped = hessian.double()
    is_dead = diagonal == 0
    damped.diagonal()[is_dead] = 1.0
    damped.diagonal().add_(damping * float(diagonal.double().mean()))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise CalibrationError(f"GPTQ: the Hessian of {name} cannot be inverted; calibrate with more text")
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed):
        raise CalibrationError(f"GPTQ: the inverse Hessian of {name} has no Cholesky factor; calibrate with more text")
    return upper.float()
