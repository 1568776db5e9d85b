"""Null calibration: a variant whose answers differ from those of another by chance alone, since weights and settings are the same.

A variant with `sampling_seed` draws its sampled answers with seeds of its own, and has those that draw nothing computed in batches
planned otherwise. Of the BF16 model a suite may hold several; the one without `sampling_seed` is what everything is measured against.
No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.suite import ResolvedVariant
    from harness.task_settings import ResolvedTask

_OF_THE_WEIGHTS = ("method", "quantization", "training", "data", "path", "objective", "teacher", "seed")
"""What of a variant's record decides its weights."""


def null_mistakes(variants: Sequence[ResolvedVariant], tasks: Sequence[ResolvedTask]) -> Iterator[tuple[str, str]]:
    """Pairs of a key and what is wrong with it: not one BF16 baseline, or a `sampling_seed` that changes no answer."""
    bf16 = {variant.name: variant.sampling_seed for variant in variants if variant.method == "bf16"}
    if not bf16:
        yield "variant", 'no variant has method = "bf16"; the others are measured against it'
    elif None not in bf16.values():
        only = ", ".join(bf16)
        yield (
            "variant",
            f"with sampling_seed, {only} shows what chance does, and nothing is left to measure against; add BF16 without",
        )
    for seed in dict.fromkeys(bf16.values()):
        alike = [name for name in bf16 if bf16[name] == seed]
        if len(alike) > 1:
            message = "remove all but one or, for the noise floor, give the others sampling_seed, each another number"
            yield "variant", f"{' and '.join(alike)} are one BF16 model, asked alike; {message}"
    for group, seed in dict.fromkeys((v.group, v.sampling_seed) for v in variants if v.sampling_seed is not None):
        where, same = f'variant "{group}": sampling_seed', [task.name for task in tasks if task.seed == seed]
        if not tasks:
            yield where, "has no effect: no task is asked; remove it"
        elif same:
            drawn = f"found {seed}, the seed that answers to {', '.join(same)} are drawn with anyway (sampling.seed)"
            yield where, f"{drawn}; give it another number"


def baseline_of(variants: Iterable[dict[str, Any]]) -> str | None:
    """The BF16 variant that others are measured against, by the variants of a run.json; None where there is none."""
    return next((v["name"] for v in variants if v["method"] == "bf16" and v.get("sampling_seed") is None), None)


def twin_of(variant: dict[str, Any], variants: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the variants of a run.json, the one with the same weights as a null variant; None for a variant that is none, or has none."""
    if variant.get("sampling_seed") is None:
        return None
    same = (v for v in variants if have_same_weights(v, variant))
    return next((v for v in same if v.get("sampling_seed") is None), None)


def have_same_weights(variant: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two variants of a run.json have the same weights, so that their answers differ by chance alone."""
    return all(variant.get(key) == other.get(key) for key in _OF_THE_WEIGHTS)


def without_nulls(variants: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The variants of a run.json but for those with a twin: what is measured of weights alone is told once."""
    return [variant for variant in variants if twin_of(variant, variants) is None]
