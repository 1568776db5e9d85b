"""Variants that differ in their training seed alone, as one: means, errors over questions, and the spread over seeds. No torch.

Two errors that are not to be confused. Over questions (or sequences): how far the figure of these very checkpoints may be off, had other
questions been asked; taken of the means over seeds, question by question. Over seeds: how far another training of the same settings
would land elsewhere; the standard deviation of the figures, n - 1 below.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from harness.errors import StoreError
from harness.pairs import IDENTITY, cluster_of, same_sequence
from harness.samples import question_key
from harness.stats import mean_with_stderr
from qad.clustered import ratio_over_clusters, ratio_with_stderr

Samples = Callable[[str, str], list[dict[str, Any]] | None]
"""The sample rows of (variant, task), or None where they are not kept."""


def seed_groups(rows: list[dict[str, Any]], sequences: list[dict[str, Any]], samples: Samples) -> list[dict[str, Any]]:
    """A summary of each variant that was trained with declared seeds, in the order of `rows` of the table.

    Each figure has n (seeds that have it), mean, its standard error over questions or sequences, and sd_over_seeds (None below two seeds).
    Where a task's samples are gone or its seeds scored different questions, the error is the mean of the seeds' errors, which is never
    smaller than that of the mean; `error_is_mean_of_seeds` says so of the metric that stands in the table.
    """
    members: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["group"] != row["variant"]:
            members.setdefault(row["group"], []).append(row)
    return [
        {
            "group": group,
            "label": label_of(group, len(found)),
            "method": found[0]["method"],
            "variants": [row["variant"] for row in found],
            "seeds": [row["seed"] for row in found],
            "tasks": {
                name: _task(name, found, samples) for name in dict.fromkeys(name for row in found for name in row["tasks"])
            },
            "diagnostics": _diagnostics([row for row in found if row["diagnostics"]], sequences),
            **{key: _common(found, key) for key in ("checkpoint_bytes", "bits_per_weight")},
            "tokens_trained": _mean([row["budget"]["tokens"] for row in found if row["budget"]]),
        }
        for group, found in members.items()
    ]


def label_of(group: str, n: int) -> str:
    """The name of a group of `n` seeds in tables."""
    return f"{group} ({n} seed{'s' if n != 1 else ''})"


def merge_seeds(
    variants: list[dict[str, Any]], sequences: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Variants and sequence rows with each group of seeds as one variant: for differences, of which there would be too many.

    The one variant is named by the label of its group, has the settings of its first seed but for the seed, the means over seeds of every
    sequence, and `kl_by_seed`. Seeds that are not measured yet are left out of the means.
    """
    measured = {row["variant"] for row in sequences}
    group_of = {group["variants"][0]: group for group in groups}
    merged_variants: list[dict[str, Any]] = []
    merged_rows: list[dict[str, Any]] = []
    for variant in variants:
        if variant.get("group", variant["name"]) == variant["name"]:
            merged_variants.append(variant)
            merged_rows += [row for row in sequences if row["variant"] == variant["name"]]
        elif variant["name"] in group_of:
            group = group_of[variant["name"]]
            names = [name for name in group["variants"] if name in measured]
            training = {key: value for key, value in (variant.get("training") or {}).items() if key not in ("seed", "seeds")}
            by_seed = [_mean_kl([row for row in sequences if row["variant"] == name]) for name in names]
            merged_variants.append({**variant, "name": group["label"], "training": training, "kl_by_seed": by_seed})
            merged_rows += [{**row, "variant": group["label"]} for row in _sequence_means(names, sequences, ("kl_sum",))]
    return merged_variants, merged_rows


def summary(values: Sequence[float | None], stderr: float | None, error: str) -> dict[str, Any]:
    """Mean and spread of one figure over seeds; `error` names what its standard error is over."""
    found = [value for value in values if value is not None]
    return {
        "n": len(found),
        "mean": math.fsum(found) / len(found) if found else None,
        f"stderr_over_{error}": stderr,
        "sd_over_seeds": statistics.stdev(found) if len(found) > 1 else None,
    }


def _task(name: str, rows: list[dict[str, Any]], samples: Samples) -> dict[str, Any]:
    tasks = {row["variant"]: row["tasks"][name] for row in rows if name in row["tasks"]}
    first = next(iter(tasks.values()))
    kept = [samples(variant, name) for variant in tasks]
    metrics, is_mean = {}, False
    for metric in first["metrics"]:
        found = [task["metrics"][metric] for task in tasks.values() if metric in task["metrics"]]
        stderr = _question_stderr(metric, kept)
        if stderr is None:
            errors = [each["stderr"] for each in found if each["stderr"] is not None]
            stderr = math.fsum(errors) / len(errors) if errors else None
            is_mean = is_mean or (metric == first["primary"] and stderr is not None and len(found) > 1)
        over_seeds = summary([each["value"] for each in found], stderr, "questions")
        metrics[metric] = over_seeds | {"unit": found[0].get("unit", "share")}
    return {
        "primary": first["primary"],
        "is_partial": first["is_partial"],
        "chose_checkpoint": any(task["chose_checkpoint"] for task in tasks.values()),
        "flags": sorted({flag for task in tasks.values() for flag in task["flags"] or ()}),
        "error_is_mean_of_seeds": is_mean,
        "metrics": metrics,
    }


def _question_stderr(metric: str, kept: list[list[dict[str, Any]] | None]) -> float | None:
    """The error over (clusters of) questions of the means over seeds; None unless all seeds scored the same ones."""
    scored = []
    for rows in kept:
        if rows is None:
            return None
        scored.append({(*question_key(r), r["repeat"]): r for r in rows if r["metrics"].get(metric) is not None})
    if any(each.keys() != scored[0].keys() for each in scored):
        return None
    means = [math.fsum(each[key]["metrics"][metric] for each in scored) / len(scored) for key in scored[0]]
    return mean_with_stderr(means, [row["cluster"] for row in scored[0].values()])[1]


def _diagnostics(rows: list[dict[str, Any]], sequences: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    found: dict[str, Any] = {}
    for part in ("response", "all"):
        if any(row["diagnostics"][part] is None for row in rows):
            continue
        measured = [row["diagnostics"][part] for row in rows]
        errors = [each["kl_stderr"] for each in measured if each["kl_stderr"] is not None]
        stderrs: dict[str, float | None] = {"kl": math.fsum(errors) / len(errors) if errors else None}
        if part == "response":
            stderrs = _sequence_stderrs([row["variant"] for row in rows], sequences) or stderrs
        found[part] = {
            figure: summary([each[figure] for each in measured], stderrs.get(figure), "sequences")
            for figure in ("kl", "ce", "ppl", "top1")
        }
    return found


def _sequence_stderrs(names: list[str], sequences: list[dict[str, Any]]) -> dict[str, float | None]:
    """Errors over sequences of the means over seeds, by figure; empty where the rows of sequences are gone."""
    rows = _sequence_means(names, sequences, ("kl_sum", "ce_sum", "top1_sum"))
    figures = [figure for figure in ("kl", "ce", "top1") if rows and f"{figure}_sum" in rows[0]]
    counts = [row["n_tokens"] for row in rows]
    clusters = [cluster_of(row) for row in rows]
    return {figure: ratio_over_clusters([row[f"{figure}_sum"] for row in rows], counts, clusters)[1] for figure in figures}


def _sequence_means(names: list[str], sequences: list[dict[str, Any]], sums: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each sequence, the means over variants of its sums; empty where a variant has no rows."""
    by_variant = [[row for row in sequences if row["variant"] == name] for name in names]
    if not by_variant or not all(by_variant):
        return []
    first = by_variant[0]
    for name, rows in zip(names, by_variant, strict=True):
        if list(map(same_sequence, rows)) != list(map(same_sequence, first)):
            raise StoreError(
                f"diagnostics_sequences.jsonl: {names[0]} and {name} were measured on different sequences and have no common mean; "
                "run the suite again"
            )
    return [
        {
            **{key: same[0][key] for key in IDENTITY if key in same[0]},
            **{part: math.fsum(row[part] for row in same) / len(same) for part in sums if all(part in row for row in same)},
        }
        for same in zip(*by_variant, strict=True)
    ]


def _mean_kl(rows: list[dict[str, Any]]) -> float:
    return ratio_with_stderr([row["kl_sum"] for row in rows], [row["n_tokens"] for row in rows])[0]


def _mean(counts: list[int]) -> int | None:
    return round(sum(counts) / len(counts)) if counts else None


def _common(rows: list[dict[str, Any]], key: str) -> Any:
    """What all seeds have in common, else None."""
    values = {row.get(key) for row in rows}
    return values.pop() if len(values) == 1 else None
