"""Differences in KL between variants on the same sequences, and the noise floor of scale rules. Pure functions, no torch.

Another draw of roundings changes KL even if it is no better or worse in itself: multiplying all tensor scales of weights by an arbitrary
number is such a draw. The spread over several is what a difference between scale rules has to exceed.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from harness.errors import StoreError
from qad.clustered import ratio_over_clusters

_SCALE_KEYS = ("scale_rule", "scale_weighting", "scale_multiplier", "tensor_scale", "block_scales")
"""Keys of [quantization] that choose scales: a comparison of scale rules is one of variants that differ in these alone."""

IDENTITY = ("sequence", "n_tokens", "task", "cluster", "repeat", "answer")
"""What identifies a row of figures of one sequence, beside its variant."""


def paired_kl(sequences: list[dict[str, Any]], variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences in mean KL over response tokens, candidate minus baseline, with errors over sequences.

    Every trained variant against every PTQ, and every QAD against every QAT. Where the PTQ that a trained variant starts from is there,
    those that differ from it in the choice of scales alone are left out.
    """
    by_variant = _by_variant(sequences)
    against = {"qad": ("ptq", "qat"), "qat": ("ptq",)}
    found = []
    for candidate in variants:
        baselines = [variant for variant in variants if variant["method"] in against.get(candidate["method"], ())]
        starts = [
            v for v in baselines if v["method"] == "ptq" and _without(v, "block_scales") == _without(candidate, "block_scales")
        ]
        for baseline in baselines:
            if (
                starts
                and baseline not in starts
                and baseline["method"] == "ptq"
                and _differ_in_scales_alone(candidate, baseline)
            ):
                continue
            found += _difference(by_variant, candidate, baseline)
    return found


def scale_rules(sequences: list[dict[str, Any]], variants: list[dict[str, Any]], kl: dict[str, float]) -> dict[str, Any] | None:
    """What a run says of scale rules: comparisons and noise floors; None where its variants do not differ in scales alone.

    A comparison is between two variants of one method and one training that differ in the choice of scales alone, the baseline having
    the rule amax. A noise floor is over PTQ variants that differ in scale_multiplier alone.

    Args:
        kl: mean KL over response tokens by variant, of those that were measured.
    """
    by_variant = _by_variant(sequences)
    comparisons = []
    for candidate in variants:
        if _is_baseline(candidate) or _multiplier(candidate) != 1:
            continue
        alike = [v for v in variants if _is_baseline(v) and _made_alike(candidate, v) and _differ_in_scales_alone(candidate, v)]
        for baseline in alike[:1]:
            comparisons += _difference(by_variant, candidate, baseline)
    floors = _noise_floors(variants, kl)
    return {"comparisons": comparisons, "noise_floors": floors} if comparisons or floors else None


def same_sequence(row: dict[str, Any]) -> tuple[Any, ...]:
    """What two rows have in common that are figures of the same tokens; `answer` is a digest of them, which text has none of."""
    return tuple(row.get(key) for key in IDENTITY)


def are_same_sequences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    """Whether two variants were measured on the same tokens, in the same order."""
    return list(map(same_sequence, ours)) == list(map(same_sequence, theirs))


def mean_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], figure: str) -> tuple[float, float | None]:
    """Ours less theirs, a mean over tokens of "kl", "ce" or "top1" on the same sequences, and its error over what errs together."""
    differences = [a[f"{figure}_sum"] - b[f"{figure}_sum"] for a, b in zip(ours, theirs, strict=True)]
    return ratio_over_clusters(differences, [row["n_tokens"] for row in ours], [cluster_of(row) for row in ours])


def cluster_of(row: dict[str, Any]) -> tuple[Any, Any]:
    """What errs together: the answers to one question, or to related ones; of text each sequence by itself."""
    return row.get("task"), row.get("cluster", row["sequence"])


def scale_notes(found: dict[str, Any] | None, kl: dict[str, float]) -> list[str]:
    """`scale_rules` in words: the noise floor, then each comparison beside it."""
    if found is None:
        return []
    notes = [
        f"Noise floor of scale rules ({floor['scale_rule']}): KL {floor['min']:.3f} to {floor['max']:.3f}, standard deviation "
        f"{floor['stddev']:.3f}, over n = {floor['n']} PTQ variants that differ in quantization.scale_multiplier only."
        for floor in found["noise_floors"]
    ]
    if not notes:
        notes = ["Noise floor of scale rules: not measured (add variants with quantization.scale_multiplier)."]
    for pair in found["comparisons"]:
        stderr = "" if pair["stderr"] is None else f" ± {pair['stderr']:.3f}"
        floor = next((f for f in found["noise_floors"] if pair["baseline"] in f["variants"]), None)
        notes.append(
            f"Scale rules, KL {pair['candidate']} − {pair['baseline']}: {pair['difference']:+.3f}{stderr} (paired over "
            f"{pair['n_sequences']} {pair['unit']}); {_beside(pair, floor, kl)}."
        )
    return notes


def _beside(pair: dict[str, Any], floor: dict[str, Any] | None, kl: dict[str, float]) -> str:
    if floor is None:
        return "its noise floor: not measured"
    value = kl[pair["candidate"]]
    place = "below" if value < floor["min"] else "above" if value > floor["max"] else "inside"
    return f"{place} the range of the noise floor, standard deviation {floor['stddev']:.3f}, n = {floor['n']}"


def _noise_floors(variants: list[dict[str, Any]], kl: dict[str, float]) -> list[dict[str, Any]]:
    groups: list[list[dict[str, Any]]] = []
    for variant in variants:
        if variant["method"] != "ptq" or variant["name"] not in kl or not variant.get("quantization"):
            continue
        same = next((g for g in groups if _without(g[0], "scale_multiplier") == _without(variant, "scale_multiplier")), None)
        if same is None:
            groups.append([variant])
        elif all(_multiplier(other) != _multiplier(variant) for other in same):
            same.append(variant)
    return [
        {
            "scale_rule": group[0]["quantization"]["scale_rule"],
            "variants": [variant["name"] for variant in group],
            "min": min(kl[variant["name"]] for variant in group),
            "max": max(kl[variant["name"]] for variant in group),
            "stddev": statistics.stdev(kl[variant["name"]] for variant in group),
            "n": len(group),
        }
        for group in groups
        if len(group) > 1
    ]


def _difference(
    by_variant: dict[str, list[dict[str, Any]]], candidate: dict[str, Any], baseline: dict[str, Any]
) -> list[dict[str, Any]]:
    """One paired difference, or none where one of the two is not measured yet."""
    ours, theirs = by_variant.get(candidate["name"]), by_variant.get(baseline["name"])
    if not ours or not theirs:
        return []
    if not are_same_sequences(ours, theirs):
        raise StoreError(
            f"diagnostics_sequences.jsonl: {candidate['name']} and {baseline['name']} were measured on different sequences "
            "and cannot be paired; run the suite again"
        )
    value, stderr = mean_difference(ours, theirs, "kl")
    return [
        {
            "candidate": candidate["name"],
            "baseline": baseline["name"],
            "difference": value,
            "stderr": stderr,
            "stderr_over_seeds": _stderr_over_seeds(candidate, baseline),
            "n_sequences": len(ours),
            "unit": "answers" if "answer" in ours[0] else "sequences",
        }
    ]


def _stderr_over_seeds(candidate: dict[str, Any], baseline: dict[str, Any]) -> float | None:
    """The standard error of the difference by the spread over seeds of either side; None where neither has several."""
    sides = [side for side in (candidate.get("kl_by_seed", ()), baseline.get("kl_by_seed", ())) if len(side) > 1]
    return math.sqrt(sum(statistics.variance(side) / len(side) for side in sides)) if sides else None


def _by_variant(sequences: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sequences:
        found.setdefault(row["variant"], []).append(row)
    return found


def _without(variant: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in (variant.get("quantization") or {}).items() if key not in keys}


def _multiplier(variant: dict[str, Any]) -> Any:
    return (variant.get("quantization") or {}).get("scale_multiplier", 1)


def _is_baseline(variant: dict[str, Any]) -> bool:
    """Whether it chooses scales as the defaults do."""
    plain = {"scale_rule": "amax", "block_scales": "recomputed", "tensor_scale": "power_of_two"}
    quantization = variant.get("quantization") or {}
    return _multiplier(variant) == 1 and all(quantization.get(key) == value for key, value in plain.items())


def _differ_in_scales_alone(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two quantizations differ in the choice of scales and in nothing else."""
    same_rest = _without(one, *_SCALE_KEYS) == _without(other, *_SCALE_KEYS)
    return same_rest and (one.get("quantization") or {}) != (other.get("quantization") or {})


def _made_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two variants have one method and one training."""
    return all(one.get(key) == other.get(key) for key in ("method", "training", "data"))
