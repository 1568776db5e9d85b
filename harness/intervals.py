"""Bounds of a mean of bounded scores that stay honest near the edges and with few clusters: one rule on arrays, called for one
benchmark by the harness and for thousands at once by its simulation.

The rule (docs/design/statistics.md has the reasons and the simulated coverage). Questions i in clusters j; r_j is the cluster's sum less
its share of the mean; n questions, all divided by n. Two more questions are imagined, one lost and one won, so that no variance is ever zero and
what has not been seen yet counts; the lost one alone counts for the skewness, so that the other never offsets it:

    variance  S^2 = (m-1)/m sum_j (r_j / (1 - n_j/n))^2 + 2 g^2         the jackknife over m clusters, and the imagined questions
    skewness  R   = max(0, (sum_j r_j^3 + g^3) / S^2)                   how far a single loss throws the mean
    upper         = mean + t S + (t^2 + 2) / 3 R                        t: Student's 1 - alpha quantile

Degrees of freedom are (sum n_j^2)^2 / sum n_j^4 - 1: clusters - 1 where they are equal, few where a few hold most questions.

With no difference in n questions this is 3.2 / n at alpha = 0.05 (the rule of three), with many the paired t bound. g is 1 where questions
stand alone; with clusters it lies between the design effect and a whole cluster (`imagined_jump`). The lower bound is the mirror image.

Sources: Hall 1992, The Bootstrap and Edgeworth Expansion, 3.10 (one-sided bounds of a skewed mean); Bonett and Price 2012 (the two imagined questions,
there for the centre too); Bell and McCaffrey 2002 (jackknife over clusters);
Clopper and Pearson 1934. Only numpy and scipy.special: this is imported by verbs that have to start at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, stdtr, stdtrit

Array = NDArray[np.float64]
_SHOWN = 2
"""Questions that the estimated design effect weighs as: with more, candidates that lose whole clusters PASS too often."""


@dataclass(frozen=True)
class Interval:
    """A two-sided interval of a share, within [0, 1]; method: in words."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Moments:
    """What the rule needs of one benchmark, or of many at once (arrays of one shape). Units: of the mean.

    square: the clustered variance of the mean. cube: its third moment. jump: what one imagined question moves the mean by.
    degrees: of freedom; at or below zero nothing bounds the mean.
    """

    mean: Array
    square: Array
    cube: Array
    jump: Array
    degrees: Array

    def mirrored(self) -> Moments:
        """Those of the negated values."""
        return Moments(-self.mean, self.square, -self.cube, self.jump, self.degrees)


def moments(values: Array, starts: NDArray[np.intp]) -> Moments:
    """The moments of (..., n) values whose clusters stand together and begin at `starts`, rising from 0.

    The imagined question stands for `imagined_jump` of the n: for itself where questions stand alone, for a whole cluster where there are
    clusters and nothing differs.
    """
    n = values.shape[-1]
    sizes = np.diff(np.append(starts, n)).astype(float)
    share = sizes / n
    mean = values.mean(axis=-1)
    residuals = np.add.reduceat(values, starts, axis=-1) - mean[..., None] * sizes
    with np.errstate(divide="ignore", invalid="ignore"):
        jackknife = (1 - 1 / len(sizes)) * (residuals**2 / (1 - share) ** 2).sum(axis=-1)
    square = np.where(len(sizes) > 1, jackknife, math.inf)
    size = (sizes**2).sum() / n
    plain = ((values - mean[..., None]) ** 2).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        effect = np.where(plain > 0, square / plain, size)
    jump = imagined_jump(effect, size)
    degrees = np.full(mean.shape, (sizes**2).sum() ** 2 / (sizes**4).sum() - 1)
    return Moments(mean, square / n**2, (residuals**3).sum(axis=-1) / n**3, jump / n, degrees)


def imagined_jump(effect: Array, size: float) -> Array:
    """How many questions the imagined one stands for: the mean of what clusters showed and of one lost whole, weighing as 2 and `size` questions.

    However many questions differ without pattern, they tell little of whether a cluster will be lost whole: therefore 2, and not their number.
    effect: clustered variance over plain variance. size: questions of a cluster, each cluster weighing as much as it has; 1 gives 1.
    """
    return np.clip((_SHOWN * effect + size * size) / (_SHOWN + size), 1, size)


def upper_bound(of: Moments, alpha: float) -> Array:
    """The one-sided upper bound of the mean at error alpha < 0.5; infinite for one cluster."""
    spread, skew = _spread_and_skew(of)
    with np.errstate(invalid="ignore"):
        t = -stdtrit(of.degrees, alpha)
        bound = of.mean + t * spread + (t**2 + 2) / 3 * skew
    return np.where(of.degrees > 0, bound, math.inf)


def p_below(of: Moments, limit: float) -> Array:
    """The p-value of "the mean is at `limit` or above": at most alpha (below 0.5) exactly where `upper_bound` at alpha is at most `limit`."""
    spread, skew = _spread_and_skew(of)
    room = limit - of.mean - 2 / 3 * skew
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(spread**2 + 4 / 3 * skew * np.maximum(room, 0))
        t = np.where(room > 0, 2 * room / (spread + root), room / spread)
        p = stdtr(of.degrees, -t)
    return np.where(of.degrees > 0, p, 1.0)


def _spread_and_skew(of: Moments) -> tuple[Array, Array]:
    with np.errstate(invalid="ignore"):
        square = of.square + 2 * of.jump**2
        return np.sqrt(square), np.maximum(0, (of.cube + of.jump**3) / square)


def in_clusters(values: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> tuple[Array, NDArray[np.intp]]:
    """Rows of values (one row, or several over the same questions) with clusters brought together, and where each begins."""
    order: dict[Hashable, list[int]] = {}
    for index, cluster in enumerate(clusters):
        order.setdefault(cluster, []).append(index)
    lengths = [len(members) for members in order.values()]
    positions = [index for members in order.values() for index in members]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.intp)
    return np.asarray(values, dtype=float)[:, positions], starts


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable], *, confidence: float = 0.95, repeats: int = 1
) -> Interval | None:
    """The two-sided interval of a mean of question means in [0, 1]; None without a value, the whole [0, 1] for one cluster.

    Right or wrong answers to questions that stand alone have the exact interval; means over repeats and clustered questions the rule above.
    Raises ValueError for a value that is NaN or outside [0, 1], for other than as many clusters, and for repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: needs at least 1")
    _check_confidence(confidence)
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values in {len(clusters)} clusters: each value needs its cluster")
    for value in values:
        check_share(value, "a question's mean")
    if not values:
        return None
    n_clusters = len(set(clusters))
    if n_clusters == 1:
        return Interval(0.0, 1.0, "unbounded: one cluster")
    if repeats == 1 and n_clusters == len(values) and all(value in (0, 1) for value in values):
        return Interval(*exact_interval(round(sum(values)), len(values), confidence=confidence), "exact (Clopper-Pearson)")
    of = moments(*in_clusters([values], clusters))
    alpha = (1 - confidence) / 2
    low, high = -upper_bound(of.mirrored(), alpha)[0], upper_bound(of, alpha)[0]
    return Interval(max(0.0, float(low)), min(1.0, float(high)), "t, skewness and edge corrected")


def exact_interval(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share; at 0 or n successes the exact form of the rule of three. ValueError for n < 1."""
    _check_count(successes, n)
    _check_confidence(confidence)
    alpha = (1 - confidence) / 2
    low = betaincinv(successes, n - successes + 1, alpha) if successes else 0.0
    high = betaincinv(successes + 1, n - successes, 1 - alpha) if successes < n else 1.0
    return float(low), float(high)


def check_share(value: float, what: str) -> None:
    """ValueError unless `value` is a number in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{what} is {value!r}: a score has to be a number in [0, 1]; leave out what was not scored")


def check_alpha(alpha: float) -> None:
    """ValueError unless 0 < alpha < 0.5."""
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha = {alpha!r}: a one-sided error has to lie between 0 and 0.5")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence!r}: has to lie between 0 and 1, such as 0.95")


def _check_count(successes: float, n: float) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: needs n >= 1 and 0 <= successes <= n")
