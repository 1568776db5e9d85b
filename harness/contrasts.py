"""Sums and differences of cells of an experiment, with intervals over questions and over training seeds. Pure functions.

A cell is what one recipe made: several trainings that differ in their seed alone, each asked the same questions; or one model that nothing was
trained of. A contrast is a sum of cells with weights: candidate less baseline is (+1, -1), a difference of two differences (+1, -1, -1, +1).

    d_i   = sum over cells of weight * mean over seeds of the cell's figure in question i
    S^2   = variance of the mean of d_i over clusters of questions + sum over draws of (variance over seeds of the draw's mean) / seeds
    f     = Welch and Satterthwaite's degrees of freedom of that sum
    bound = mean + t(f) S + (t(f)^2 + 2) / 3 R             the rule of `harness.intervals`, with S^2 and f from here

Cells whose trainings with one seed saw the same data in the same order share a draw: what that order did is in both, so they are subtracted seed by
seed. Other trainings are independent, and their variances add. Without a trained cell this is the rule of every paired difference here, unchanged.

Figures over tokens (KL, CE, top-1) are ratios of sums over sequences: their variance is the linearised one, and no question is imagined lost.

docs/design/findings.md has the reasons and what the intervals were measured to cover. Source of the degrees of freedom: Welch 1947, Satterthwaite 1946.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from harness.intervals import Array, Moments, in_clusters, moments, p_below, upper_bound
from harness.paired import pooled_moments
from qad.clustered import ratio_over_clusters

METHOD = "t over clusters of questions and over training seeds, Welch-Satterthwaite, skewness and edge corrected"


@dataclass(frozen=True)
class Cell:
    """One cell in several tasks, or in one figure over sequences.

    name: for messages. seeds: of its trainings; empty: nothing was trained, and `figures` has the one model.
    draw: what a seed stands for; cells with one draw saw the same data in the same order at the same seed.
    figures: an array (seeds, units) a task: means over repeats, or sums over the tokens of sequences.
    """

    name: str
    seeds: tuple[int, ...]
    draw: Hashable
    figures: tuple[Array, ...]

    @property
    def n_trainings(self) -> int:
        return max(1, len(self.seeds))

    def means(self, units: Sequence[Units]) -> Array:
        """The figure of each training, each task weighing the same."""
        parts = [rows.sum(axis=-1) / each.total for rows, each in zip(self.figures, units, strict=True)]
        return np.asarray(np.mean(parts, axis=0))


@dataclass(frozen=True)
class Units:
    """What figures of one task are of: questions, or sequences with so many tokens. clusters: what errs together."""

    clusters: tuple[Hashable, ...]
    n_tokens: tuple[int, ...] | None = None

    @property
    def total(self) -> int:
        return len(self.clusters) if self.n_tokens is None else sum(self.n_tokens)

    def moments(self, values: Array) -> Moments:
        """The moments of the mean of these values of each unit."""
        if self.n_tokens is None:
            return moments(*in_clusters([list(values)], self.clusters))
        mean, stderr = ratio_over_clusters(list(values), self.n_tokens, self.clusters)
        square = math.inf if stderr is None else stderr**2
        n_clusters = len(set(self.clusters))
        return Moments(*(np.array([value], dtype=float) for value in (mean, square, 0.0, 0.0, n_clusters - 1)))


@dataclass(frozen=True)
class Contrast:
    """The estimate of a contrast, in the unit of its figures. stderr_questions, stderr_seeds: its two parts; the latter None without a training.

    low, high: the two-sided interval at `confidence`. degrees: of freedom. of: what every bound and p-value is made of.
    """

    value: float
    low: float
    high: float
    confidence: float
    stderr_questions: float
    stderr_seeds: float | None
    degrees: float
    n_units: int
    n_clusters: int
    of: Moments

    def p_decided(self, limits: tuple[float, ...]) -> float:
        """The smallest error at which the interval would hold none of the limits: the two-sided p-value of one, and of two an interval that
        lies wholly between them or wholly beyond one."""
        below = [_p_below(self.of, limit) for limit in limits]
        above = [_p_below(self.of.mirrored(), -limit) for limit in limits]
        return min(1.0, 2 * max(min(pair) for pair in zip(below, above, strict=True)))


class OneTraining(ValueError):
    """A cell was trained once: how far another training would land is not known. `cell` is its name."""

    def __init__(self, cell: str) -> None:
        super().__init__(f"{cell}: one training has no spread over seeds")
        self.cell = cell


class MixedSeeds(ValueError):
    """Two cells share a draw and some seeds, but not all of them: they are neither paired nor independent. `cells` are their names."""

    def __init__(self, first: Cell, second: Cell) -> None:
        super().__init__(f"{first.name} has the seeds {_listed(first.seeds)}, {second.name} {_listed(second.seeds)}")
        self.cells = (first.name, second.name)


def contrast(
    weighted: Sequence[tuple[int, Cell]],
    units: Sequence[Units],
    *,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Contrast:
    """The weighted sum of cells, a mean over tasks, with its interval within `bounds`.

    Raises OneTraining for a trained cell with one seed, MixedSeeds for two that share a draw and only some of their seeds.
    """
    parts = seed_parts(weighted, units)
    tasks = []
    for number, each in enumerate(units):
        values = sum(weight * cell.figures[number].mean(axis=0) for weight, cell in weighted)
        tasks.append(each.moments(np.asarray(values)))
    questions = tasks[0] if len(tasks) == 1 else pooled_moments(tasks)
    of = with_seeds(questions, parts)
    low, high = two_sided(of, confidence)
    return Contrast(
        value=float(of.mean[0]),
        low=max(bounds[0], float(low[0])),
        high=min(bounds[1], float(high[0])),
        confidence=confidence,
        stderr_questions=math.sqrt(questions.square[0]),
        stderr_seeds=math.sqrt(sum(square[0] for square, _ in parts)) if parts else None,
        degrees=float(of.degrees[0]),
        n_units=sum(len(each.clusters) for each in units),
        n_clusters=sum(len(set(each.clusters)) for each in units),
        of=of,
    )


def seed_parts(weighted: Sequence[tuple[int, Cell]], units: Sequence[Units]) -> list[tuple[Array, int]]:
    """The variance of the mean over seeds of each independent draw, with its degrees of freedom."""
    draws: dict[Hashable, list[tuple[int, Cell]]] = {}
    for weight, cell in weighted:
        if not cell.seeds:
            continue
        if len(cell.seeds) < 2:
            raise OneTraining(cell.name)
        for key, ((_, other), *_) in draws.items():
            if other.draw == cell.draw and key != (cell.draw, cell.seeds) and set(other.seeds) & set(cell.seeds):
                raise MixedSeeds(other, cell)
        draws.setdefault((cell.draw, cell.seeds), []).append((weight, cell))
    found = []
    for members in draws.values():
        means = np.asarray(sum(weight * cell.means(units) for weight, cell in members))
        found.append((np.array([means.var(ddof=1) / len(means)]), len(means) - 1))
    return found


def with_seeds(questions: Moments, parts: Sequence[tuple[Array, int]]) -> Moments:
    """The moments of a mean over questions with the variances of its seeds added: (variance, degrees of freedom) of each independent draw."""
    if not parts:
        return questions
    spread = questions.square + 2 * questions.jump**2
    total = spread + sum(square for square, _ in parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (spread / total) ** 2 / questions.degrees + sum((square / total) ** 2 / n for square, n in parts)
        degrees = np.where(total > 0, 1 / shares, questions.degrees)
    return Moments(
        mean=questions.mean,
        square=questions.square + sum(square for square, _ in parts),
        cube=questions.cube,
        jump=questions.jump,
        degrees=np.where(questions.degrees > 0, degrees, 0.0),
    )


def two_sided(of: Moments, confidence: float) -> tuple[Array, Array]:
    """Lower and upper bounds, each at half the error. Where nothing varies at all both are the mean."""
    alpha = (1 - confidence) / 2
    is_exact = _is_exact(of)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = -upper_bound(of.mirrored(), alpha), upper_bound(of, alpha)
    return np.where(is_exact, of.mean, low), np.where(is_exact, of.mean, high)


def quantile(degrees: float, confidence: float = 0.95) -> float:
    """Student's two-sided quantile."""
    return -float(stdtrit(degrees, (1 - confidence) / 2))


def _is_exact(of: Moments) -> Array:
    return np.asarray((of.square == 0) & (of.jump == 0))


def _p_below(of: Moments, limit: float) -> float:
    if _is_exact(of)[0]:
        return 0.0 if of.mean[0] < limit else 1.0
    return float(p_below(of, limit)[0])


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
