"""What a gate can decide before it runs: the margins that a task, or a mean over tasks, decides with a wanted power. One planner for all.

The spread of a paired difference comes from two sources: what one answer varies by (`within`, which repeats average out) and what
questions differ in (`effect`, which only more questions do):

    standard error = sqrt((effect + 2 within / repeats) / n)          of sampled answers
    standard error = sqrt(discordance / n)                            of greedy ones: the share of questions whose score differs

With many questions the smallest margin is (z_alpha + z_power) standard errors (Miller 2024, arXiv 2411.00640, section 5). With n of them the
deciding rule takes Student's quantiles and imagines one more question lost (`harness.intervals`), which no number of repeats buys back: the
planner asks that rule for the bound of a candidate as good as the baseline, and adds an eighth (docs/design/statistics.md has what that was
simulated to be worth).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr, stdtrit

from harness.intervals import Moments, check_alpha, imagined_jump, upper_bound
from harness.paired import pooled_moments

INTRACLUSTER = 0.2
"""Assumed correlation of the true differences of two questions of one cluster."""
POWER = 0.8
_CAUTION = 1.13
"""On the bound and its error: what simulated candidates need beyond normal differences."""


@dataclass(frozen=True)
class Spread:
    """within: E[p(1 - p)] of one answer. effect: variance between questions of the true difference. source: where they come from."""

    within: float
    effect: float
    source: str


def assumed_spread() -> Spread:
    """What is taken where nothing was measured: answers right two times in three or less surely, effects of about 4 points a question."""
    return Spread(0.10, 0.002, "assumed: 0.10 within a question, 0.002 between questions")


def spread_from(
    baseline: Sequence[Sequence[float | None]], candidate: Sequence[Sequence[float | None]] | None = None
) -> Spread | None:
    """The spread that repeats show: scores of each question's repeats, of the baseline and, if there is one, of another variant.

    within: the mean over questions of the unbiased variance over repeats. effect: the variance of the questions' differences less what their
    repeats explain, not below zero; assumed without another variant. None where fewer than two questions have two scored repeats.
    ValueError for other than as many questions of both.
    """
    if candidate is not None and len(baseline) != len(candidate):
        raise ValueError(f"{len(baseline)} questions of the baseline and {len(candidate)} of the candidate: pair them first")
    rows = [_scored(row) for row in baseline]
    others = [_scored(row) for row in candidate] if candidate is not None else []
    variances = [_variance(row) for row in (*rows, *others) if len(row) > 1]
    repeated = [(a, b) for a, b in zip(rows, others, strict=False) if len(a) > 1 and len(b) > 1]
    if sum(len(row) > 1 for row in rows) < 2:
        return None
    within = math.fsum(variances) / len(variances)
    if len(repeated) < 2:
        assumed = assumed_spread()
        return Spread(within, assumed.effect, f"{len(variances)} questions with repeats; effect between questions assumed")
    differences = [_mean(b) - _mean(a) for a, b in repeated]
    noise = math.fsum(_variance(a) / len(a) + _variance(b) / len(b) for a, b in repeated) / len(repeated)
    return Spread(within, max(0.0, _variance(differences) - noise), f"repeats of {len(repeated)} paired questions")


def standard_error(
    n_questions: int,
    repeats: int,
    spread: Spread,
    *,
    n_clusters: int | None = None,
    is_greedy: bool,
    discordance: float | None = None,
) -> float:
    """The expected standard error of a paired difference, as a share. Greedy answers need the discordance, a share of the questions.

    Clusters multiply the variance between questions by 1 + (questions a cluster - 1) * 0.2. ValueError for impossible numbers.
    """
    if n_questions < 1 or repeats < 1 or not 1 <= (n_clusters or n_questions) <= n_questions:
        raise ValueError(f"{n_questions} questions in {n_clusters} clusters with {repeats} repeats: needs at least one of each")
    inflation = _inflation(n_questions / (n_clusters or n_questions))
    if not is_greedy:
        return math.sqrt((spread.effect * inflation + 2 * spread.within / repeats) / n_questions)
    if discordance is None or not 0 <= discordance <= 1:
        raise ValueError(f"discordance = {discordance!r}: greedy answers need the share of questions whose score differs")
    return math.sqrt(discordance * inflation / n_questions)


def expected(
    n_questions: int,
    repeats: int,
    spread: Spread,
    *,
    n_clusters: int | None = None,
    is_greedy: bool,
    discordance: float | None = None,
) -> Moments:
    """What the rule will find in a task without damage. Arguments as for `standard_error`."""
    clusters = n_clusters or n_questions
    together, alone = (
        standard_error(n_questions, repeats, spread, n_clusters=n, is_greedy=is_greedy, discordance=discordance) ** 2
        for n in (clusters, n_questions)
    )
    size = n_questions / clusters
    jump = imagined_jump(np.array(together / alone if alone else size), size) / n_questions
    return Moments(np.array(0.0), np.array(together), np.array(0.0), jump, np.array(clusters - 1.0))


@dataclass(frozen=True)
class Planned:
    """The bound of the damage of a candidate that is as good as the baseline: `width` above the mean, which varies by `se`."""

    width: float
    se: float
    degrees: float

    def smallest(self, power: float = POWER) -> float:
        """The smallest margin, as a share, that it PASSes with this power; infinite for one cluster."""
        return self.width + float(stdtrit(self.degrees, power)) * self.se if self.degrees > 0 else math.inf

    def passes(self, margin: float) -> float:
        """The chance of PASS, a share."""
        return self._below(margin - self.width)

    def does_not_fail(self, margin: float) -> float:
        """The chance of anything but FAIL: the lower bound lies as far below the mean as the upper one above."""
        return self._below(margin + self.width)

    def _below(self, room: float) -> float:
        if self.degrees <= 0:
            return float(room > 0)
        return float(stdtr(self.degrees, room / self.se)) if self.se else float(room >= 0)


def planned(tasks: Sequence[Moments], alpha: float) -> Planned:
    """The mean over tasks, or one of them, by the rule that decides. ValueError for an impossible alpha."""
    return planned_with(pooled_moments(tasks), alpha)


def planned_with(of: Moments, alpha: float) -> Planned:
    """As `planned`, with moments of one benchmark; their mean is set aside."""
    check_alpha(alpha)
    bound = upper_bound(replace(of, mean=np.zeros_like(of.mean)), alpha)
    return Planned(_CAUTION * bound.item(), _CAUTION * math.sqrt(of.square.item()), of.degrees.item())


def joint_power(powers: Sequence[float]) -> float:
    """The chance that all PASS, as if they were independent: tasks that err together PASS together more often than this."""
    return math.prod(powers)


def _inflation(size: float) -> float:
    """The design effect of clusters of `size` questions."""
    return 1 + (size - 1) * INTRACLUSTER


def _scored(row: Sequence[float | None]) -> list[float]:
    return [value for value in row if value is not None]


def _mean(row: Sequence[float]) -> float:
    return math.fsum(row) / len(row)


def _variance(row: Sequence[float]) -> float:
    mean = _mean(row)
    return math.fsum((value - mean) ** 2 for value in row) / (len(row) - 1)
