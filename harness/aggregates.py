"""What a task's rows come to: figures with errors over questions, and how many answers are missing, incomplete, cut. No lm_eval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from harness.stats import INVALID, Estimate, is_binary, question_maj_at_k, question_means, question_pass_at_k

_RESAMPLES = 200
_Aggregation = Callable[[list[Any]], Any] | None


def aggregate(
    rows: Sequence[dict[str, Any]],
    *,
    primary: str,
    aggregations: dict[str, _Aggregation],
    repeats: int,
    higher_is_better: Mapping[str, bool | None] | None = None,
) -> dict[str, Any]:
    """Figures of a task from its sample rows, one a (question, repeat).

    A value is the mean over questions of the mean over their repeats, its error over clusters of questions. Where the task has another
    aggregation, that makes the value of all samples, and its error is from resampling clusters with a fixed seed.

    Args:
        primary: the metric that stands for the task; with several repeats it also gets pass@k and maj@k, where its values are 0 and 1.
        aggregations: by metric, None for the mean.
        higher_is_better: by metric; what it does not name is None, not known.
    """
    better = higher_is_better or {}
    names = sorted({name for row in rows for name in row["metrics"]})
    metrics = {}
    for name in names:
        mine = [row for row in rows if name in row["metrics"]]
        function = aggregations.get(name)
        estimate = _mean(mine, name) if function is None else _resampled(mine, name, function)
        unit = "share" if function is None and _are_shares(mine, name) else "plain"
        metrics[name] = _figure(estimate, mine, name) | {"unit": unit, "higher_is_better": better.get(name)}
    if primary not in metrics and metrics:  # of ruler, the first length that was asked
        primary = next((name for name in metrics if aggregations.get(name) is not None), primary)
    if repeats > 1 and primary in metrics:
        over = _over_repeats([row for row in rows if primary in row["metrics"]], primary, repeats)
        metrics |= {name: figure | {"higher_is_better": better.get(primary)} for name, figure in over.items()}
    tokens = [row["n_tokens"] for row in rows if row["n_tokens"] is not None]
    return {
        "primary": primary,
        "metrics": metrics,
        "repeats": repeats,
        "n_questions": len({row["doc"] for row in rows}),
        "n_missing": sum(row["missing"] is not None for row in rows),
        "incomplete_rate": _share(rows, "is_incomplete"),
        "truncated_rate": _share(rows, "is_truncated"),
        "mean_tokens": float(np.mean(tokens)) if tokens else None,
        "p95_tokens": float(np.percentile(tokens, 95)) if tokens else None,
    }


def _figure(estimate: Estimate, rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    scored = sum(row["metrics"][name] is not None for row in rows)
    return {"value": estimate.value, "stderr": estimate.stderr, "n_scored": scored, "n_total": len(rows)}


def _are_shares(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return all(0 <= row["metrics"][name] <= 1 for row in rows if row["metrics"][name] is not None)


def _questions(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["doc"], []).append(row)
    return list(found.values())


def _mean(rows: Sequence[dict[str, Any]], name: str) -> Estimate:
    questions = _questions(rows)
    return question_means(
        [[row["metrics"][name] for row in each] for each in questions], [each[0]["cluster"] for each in questions]
    )


def _over_repeats(rows: Sequence[dict[str, Any]], primary: str, repeats: int) -> dict[str, Any]:
    questions = _questions(rows)
    values = [[row["metrics"][primary] for row in each] for each in questions]
    clusters = [each[0]["cluster"] for each in questions]
    if not is_binary(values):
        return {}
    found = {f"pass@{repeats}": _figure(question_pass_at_k(values, clusters, repeats), rows, primary) | {"unit": "share"}}
    answers = [[_answer(row, primary) for row in each] for each in questions]
    if any(answer is not None for each in answers for answer in each):
        figure = _figure(question_maj_at_k(answers, values, clusters, repeats), rows, primary)
        found[f"maj@{repeats}"] = figure | {"unit": "share"}
    return found


def _answer(row: dict[str, Any], primary: str) -> str | None:
    """The extracted answer that the primary metric judged; incomplete ones have no vote."""
    if row["is_incomplete"]:
        return INVALID
    wanted = primary.partition(",")[2]
    answer = row["answer"].get(wanted) if wanted else next(iter(row["answer"].values()), None)
    return answer if isinstance(answer, str) else None


def _resampled(rows: Sequence[dict[str, Any]], name: str, function: Callable[[list[Any]], Any]) -> Estimate:
    clusters: dict[str, list[Any]] = {}
    for row in rows:
        if row["metrics"][name] is not None:
            clusters.setdefault(row["cluster"], []).append(row["metrics"][name])
    groups = list(clusters.values())
    if not groups:
        return Estimate(None, None, 0)
    value = float(function([each for group in groups for each in group]))
    draws = np.random.default_rng(0)
    drawn = [
        float(function([each for i in draws.integers(len(groups), size=len(groups)) for each in groups[i]]))
        for _ in range(_RESAMPLES if len(groups) > 1 else 0)
    ]
    is_known = bool(drawn) and all(map(math.isfinite, drawn))
    return Estimate(value, float(np.std(drawn, ddof=1)) if is_known else None, len(groups))


def _share(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    known = [row[key] for row in rows if row[key] is not None]
    return sum(known) / len(known) if known else None
