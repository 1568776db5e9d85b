"""What the page of one run shows beside its summary: figures of every task, flips, training curves, verdict, configuration, provenance.

Only fields that are known to hold no text of questions or answers are taken over; prompts, targets, answers, and what a server said, are
not among them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from harness.leaderboard.flips import flips_of
from harness.leaderboard.reading import rows_of

MOST_POINTS = 400
"""Of a curve; of longer ones each point is a mean over neighbouring steps, and the page says over how many."""
_OF_A_METRIC = ("metric", "value", "stderr", "n_scored", "n_total", "unit")
_OF_A_TASK = (
    "repeats",
    "n_missing",
    "incomplete_rate",
    "truncated_rate",
    "mean_tokens",
    "version",
    "scorer",
    "kernels",
    "flags",
)
_OF_A_VARIANT = ("method", "seed", "sampling_seed", "data", "objective", "quantization", "training", "selection", "budget")
_OF_A_SIZE = ("n_weights", "checkpoint_bytes", "bits_per_weight", "codes_changed", "load_back")
_OF_DIAGNOSTICS = ("kl", "kl_stderr", "kl_p99", "ce", "ppl", "top1", "n_tokens", "n_sequences")
_OF_A_CHECK = ("name", "kind", "tier", "verdict", "reasons")


def details_of(
    folder: Path,
    about: dict[str, Any],
    tasks: list[dict[str, Any]],
    diagnostics: list[dict[str, Any]],
    verdict: dict[str, Any] | None,
    summary: dict[str, Any],
) -> dict[str, Any]:
    """The page of a run as plain data. Raises StoreError where a training or scores file is damaged, KeyError for other shapes."""
    names = [variant["name"] for variant in summary["variants"]]
    return {
        "tasks": [_task(row) for row in tasks],
        "diagnostics": [
            {"variant": row["variant"], "kernels": row.get("kernels"), **_some(row.get("response") or {}, _OF_DIAGNOSTICS)}
            | _some(row, ("saturated_share", "subnormal_share", "overshoot"))
            for row in diagnostics
        ],
        "variants": [
            {"name": variant["name"], "size": _some(variant, _OF_A_SIZE), "settings": _some(variant, _OF_A_VARIANT)}
            for variant in about["variants"]
        ],
        "flips": flips_of(folder, summary["baseline"], names, summary["tasks"]),
        "training": _trainings(folder, names),
        "verdicts": None if verdict is None else [_judged(each) for each in verdict["candidates"]],
        "configuration": {"model": about["model"], **about["resolved"]},
        "data": about.get("data") or {},
        "stages": [_stage(stage) for stage in about.get("stages", ())],
        "provenance": {**(about.get("provenance") or {}), "plan": about.get("plan")},
    }


def _task(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "variant": row["variant"],
        "task": row["task"],
        "is_primary": row["metric"] == row["primary"],
        **_some(row, _OF_A_METRIC),
        **_some(row, _OF_A_TASK),
    }


def _judged(candidate: dict[str, Any]) -> dict[str, Any]:
    return {
        **_some(candidate, ("candidate", "baseline", "verdict", "reasons")),
        "checks": [_some(check, _OF_A_CHECK) for check in candidate.get("checks", ())],
    }


def _stage(stage: dict[str, Any]) -> list[Any]:
    device = (stage.get("provenance") or {}).get("device")
    return [stage["label"], stage["kind"], stage["key"][:12], stage.get("seconds"), device, bool(stage.get("imported_from"))]


def _trainings(folder: Path, variants: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in variants:
        path = folder / "training" / f"{name}.jsonl"
        if "/" not in name and "\0" not in name and path.is_file():
            rows = rows_of(path)
            steps, validations = [row for row in rows if "loss" in row], [row for row in rows if "loss" not in row]
            width = max(1, math.ceil(len(steps) / MOST_POINTS))
            curves = {key: _curve(steps, key, width, 1) for key in ("loss", "kl", "ce", "lr")}
            curves |= {key: _curve(validations, key, 1, 0) for key in ("validation_kl", "validation_ce")}
            found.append({"variant": name, "mean_over_steps": width, "curves": {k: c for k, c in curves.items() if c["steps"]}})
    return found


def _curve(rows: list[dict[str, Any]], key: str, width: int, offset: int) -> dict[str, list[float]]:
    """Steps done (`step` + offset) and values there; each point the mean of `width` ones, at the step of the last of them."""
    points = [(row["step"] + offset, row[key]) for row in rows if row.get(key) is not None]
    if width > 1:
        parts = [points[start : start + width] for start in range(0, len(points), width)]
        points = [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]
    return {"steps": [step for step, _ in points], "values": [_rounded(value) for _, value in points]}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _some(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: record[key] for key in keys if record.get(key) is not None}
