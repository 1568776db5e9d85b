"""Scores whose questions all came out alike: their standard error is 0, which is no certainty. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness.errors import StoreError
from harness.evidence import RunEvidence


def scored_alike(evidence: RunEvidence, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks of a table's rows that have a standard error of 0, with the 95 % interval of the mean, as a share.

    Left out: figures that are no share, and those whose scores of single questions are not kept.
    """
    found = []
    for row in rows:
        for name, task in row["tasks"].items():
            figures = task["metrics"].get(task["primary"])
            if figures is None or figures["stderr"] != 0 or figures["unit"] != "share":
                continue
            interval = _interval(evidence, row["variant"], name)
            if interval is not None:
                found.append({"variant": row["variant"], "task": name, **interval})
    return found


def _interval(evidence: RunEvidence, variant: str, task: str) -> dict[str, Any] | None:
    from harness.intervals import mean_interval  # scipy, which few tables need

    try:
        answers = evidence.answers(variant, task)
    except StoreError:  # the differences of the same scores say what is missing
        return None
    scored = [] if answers is None else [(q.mean, q.cluster) for q in answers.questions.values() if q.mean is not None]
    means, clusters = [mean for mean, _ in scored], [cluster for _, cluster in scored]
    if answers is None or not all(0 <= mean <= 1 for mean in means):
        return None
    interval = mean_interval(means, clusters, repeats=answers.repeats)
    return None if interval is None else {"n_questions": len(means), "low": interval.low, "high": interval.high}


def alike_notes(found: list[dict[str, Any]]) -> list[str]:
    """What stands below a table of them."""
    parts = [
        f"{each['task']} of {each['variant']}: all {each['n_questions']:,} questions scored alike; 95 % interval {100 * each['low']:.0f} to "
        f"{100 * each['high']:.0f}"
        for each in found
    ]
    return [f"±0.0 is no certainty. {'; '.join(parts)}."] if parts else []
