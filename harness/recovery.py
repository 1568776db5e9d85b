"""Ratios of paired means: the recovery of a candidate, and the share of a gap that training closed.

An interval holds each ratio that the paired data do not reject (Fieller's way), tested by the rule of `harness.intervals`: ratio r is rejected
where the mean of numerator - r * denominator is bounded away from zero. A ratio whose denominator may be zero is undefined, and says so.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from harness.intervals import Array, check_share, in_clusters, moments, upper_bound
from harness.paired import QuestionPair

_TAIL = 0.025
_AT_ONCE = 16


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval; or None three times and why."""

    value: float | None
    low: float | None
    high: float | None
    reason: str | None


def recovery(pairs: Sequence[QuestionPair]) -> Ratio:
    """Candidate over baseline, paired. Undefined where the baseline is not distinguishable from zero. ValueError as for a difference."""
    if not pairs:
        return _undefined("no question was answered by both variants")
    for pair in pairs:
        check_share(pair.baseline, "a baseline mean")
        check_share(pair.candidate, "a candidate mean")
    rows, starts = in_clusters([[p.candidate for p in pairs], [p.baseline for p in pairs]], [p.cluster for p in pairs])
    return _ratio(rows, starts, "the baseline's score")


def gap_recovered(questions: Sequence[tuple[float, float, float, Hashable]]) -> Ratio:
    """(x - PTQ) / (BF16 - PTQ) over questions (BF16, PTQ, x, cluster): 0 at PTQ, 1 at BF16, outside where x is worse or better than both.

    Undefined where PTQ is not distinguishably worse than BF16: there is no gap to recover. ValueError as for a difference.
    """
    if not questions:
        return _undefined("no question was answered by all three variants")
    for question in questions:
        for value in question[:3]:
            check_share(value, "a question's mean")
    gained = [x - ptq for _, ptq, x, _ in questions]
    gap = [bf16 - ptq for bf16, ptq, _, _ in questions]
    rows, starts = in_clusters([gained, gap], [cluster for *_, cluster in questions])
    return _ratio(rows, starts, "the gap between BF16 and PTQ")


def _ratio(rows: Array, starts: NDArray[np.intp], denominator: str) -> Ratio:
    """rows: (2, n), numerators and denominators."""
    if len(starts) < 2:
        return _undefined("one cluster of questions says nothing about the error")
    if _bound(-rows[1:], starts, 1.0)[0] >= 0:
        return _undefined(f"{denominator} is not distinguishable from zero")
    value = float(rows[0].mean() / rows[1].mean())
    return Ratio(value, _edge(rows, starts, value, -1.0), _edge(rows, starts, value, 1.0), None)


def _edge(rows: Array, starts: NDArray[np.intp], value: float, side: float) -> float:
    """The first ratio above (side 1) or below (side -1) `value` that the data reject, to 1e-9 of its distance; many are tried at once.

    The imagined question is as bad for the ratio as one can be: 1, or more where the ratio lies outside [0, 1]. There is such an edge
    because the denominator itself is bounded away from zero.
    """

    def are_rejected(ratios: Array) -> NDArray[np.bool_]:
        values = side * (rows[0] - ratios[:, None] * rows[1])
        return _bound(values, starts, np.maximum(1.0, np.maximum(ratios, 1.0 - ratios))) < 0

    inside, outside = 0.0, 1.0
    while not are_rejected(np.array([value + side * outside]))[0]:
        inside, outside = outside, 2 * outside
    while outside - inside > 1e-9 * outside:
        steps = np.linspace(inside, outside, _AT_ONCE + 1)
        first = 1 + int(np.argmax(are_rejected(value + side * steps[1:])))
        inside, outside = float(steps[first - 1]), float(steps[first])
    return value + side * outside


def _bound(values: Array, starts: NDArray[np.intp], largest: Array | float) -> Array:
    """The upper bounds of the means of (k, n) values of which none can be above `largest`."""
    of = moments(values, starts)
    return upper_bound(replace(of, jump=of.jump * largest), _TAIL)


def _undefined(why: str) -> Ratio:
    return Ratio(None, None, None, f"undefined: {why}")
