"""Two variants on the same questions: difference, bounds, tests. Pure functions; the rule behind every bound is in `harness.intervals`.

The unit is the question: repeats are averaged before they come here. Damage is baseline less candidate, delta its negative. What decides is
`damage_bound` (or the p-values, which agree with it); the plain t interval, the bootstrap, the permutation test and McNemar's stand
beside it for the reader and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import bdtr, stdtrit

from harness.intervals import Array, Moments, check_alpha, check_share, in_clusters, moments, p_below, upper_bound
from qad.clustered import ratio_over_clusters

METHOD = "paired t over clusters, skewness and edge corrected"
RESAMPLES = 10_000
_SEED = 20260101
_EXACT_SIGNS = 12
_FEW_KINDS = 50
_BLOCK = 200
_SAME = 1e-9
"""Question means closer than this are equal: no two means over fewer than 10,000 repeats are, unless they are the same."""


@dataclass(frozen=True)
class QuestionPair:
    """One question's means over its scored repeats, in [0, 1], and what it shares its error with (itself where it stands alone)."""

    baseline: float
    candidate: float
    cluster: Hashable
    n_baseline: int = 1
    n_candidate: int = 1


@dataclass(frozen=True)
class McNemar:
    """The exact test of flips: p_worse against "no more questions were lost than won", p_two_sided against "as many"."""

    worse: int
    better: int
    p_worse: float
    p_two_sided: float


@dataclass(frozen=True)
class PairedDifference:
    """Candidate less baseline: mean over questions, its clustered standard error (None for one cluster), its two-sided interval.

    worse, better: questions whose mean fell or rose. t: the plain clustered interval, clusters - 1 degrees of freedom; bootstrap: the
    seeded percentile interval over clusters; p_permutation: two-sided, signs of clusters flipped. These three are None for one cluster.
    mcnemar: where every question stands alone with one answer, right or wrong, on each side.
    """

    delta: float
    stderr: float | None
    low: float
    high: float
    confidence: float
    method: str
    n_questions: int
    n_clusters: int
    worse: int
    better: int
    t: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    p_permutation: float | None
    mcnemar: McNemar | None


@dataclass(frozen=True)
class PooledDifference:
    """The mean over tasks of their deltas, each task weighing the same; tasks are independent of each other."""

    delta: float
    stderr: float | None
    low: float
    high: float
    confidence: float
    method: str
    n_tasks: int
    n_questions: int
    n_clusters: int


def paired_difference(pairs: Sequence[QuestionPair], *, confidence: float = 0.95, resampled: bool = True) -> PairedDifference:
    """The difference of two variants with all that is said about it. ValueError for no pair, NaN, or a mean outside [0, 1].

    resampled: also what takes most of the time, the bootstrap and the permutation test; else they are None.
    """
    lower, upper = damage_bound(pairs, alpha=_tail(confidence))
    deltas = [pair.candidate - pair.baseline for pair in pairs]
    sums, sizes = _cluster_sums(deltas, [pair.cluster for pair in pairs])
    delta, stderr = ratio_over_clusters(deltas, [1] * len(deltas), [pair.cluster for pair in pairs])
    worse, better = sum(delta < -_SAME for delta in deltas), sum(delta > _SAME for delta in deltas)
    several = stderr is not None
    return PairedDifference(
        delta=delta,
        stderr=stderr,
        low=-upper,
        high=-lower,
        confidence=confidence,
        method=METHOD if several else "unbounded: one cluster",
        n_questions=len(pairs),
        n_clusters=len(sums),
        worse=worse,
        better=better,
        t=_plain_t(delta, stderr, len(sums), confidence) if stderr is not None else None,
        bootstrap=_bootstrap(sums, sizes, confidence) if several and resampled else None,
        p_permutation=_permutation(sums) if several and resampled else None,
        mcnemar=mcnemar(worse, better) if _is_single(pairs) else None,
    )


def damage_bound(pairs: Sequence[QuestionPair], *, alpha: float) -> tuple[float, float]:
    """One-sided lower and upper bounds of the damage, each at error alpha, within [-1, 1]. ValueError as for `paired_difference`."""
    return _bounds(_damage_moments(pairs), alpha)


def p_inferior(pairs: Sequence[QuestionPair], *, margin: float) -> float:
    """The p-value of "the damage is the margin or less": at most alpha exactly where the lower bound is at least the margin."""
    return _p_within(_damage_moments(pairs).mirrored(), -margin)


def pooled_difference(tasks: Sequence[Sequence[QuestionPair]], *, confidence: float = 0.95) -> PooledDifference:
    """The pooled difference over tasks, each weighing the same however many questions it has. ValueError for no task, or an empty one."""
    lower, upper = pooled_damage_bound(tasks, alpha=_tail(confidence))
    estimates = [
        ratio_over_clusters([p.candidate - p.baseline for p in task], [1] * len(task), [p.cluster for p in task])
        for task in tasks
    ]
    errors = [stderr for _, stderr in estimates if stderr is not None]
    n_clusters = [len({pair.cluster for pair in task}) for task in tasks]
    return PooledDifference(
        delta=math.fsum(delta for delta, _ in estimates) / len(tasks),
        stderr=math.sqrt(math.fsum(e**2 for e in errors)) / len(tasks) if len(errors) == len(tasks) else None,
        low=-upper,
        high=-lower,
        confidence=confidence,
        method=METHOD if len(errors) == len(tasks) else "unbounded: a task of one cluster",
        n_tasks=len(tasks),
        n_questions=sum(map(len, tasks)),
        n_clusters=sum(n_clusters),
    )


def pooled_damage_bound(tasks: Sequence[Sequence[QuestionPair]], *, alpha: float) -> tuple[float, float]:
    """As `damage_bound`, of the mean damage over tasks."""
    return _bounds(pooled_damage_moments(tasks), alpha)


def pooled_p_inferior(tasks: Sequence[Sequence[QuestionPair]], *, margin: float) -> float:
    """As `p_inferior`, of the mean damage over tasks."""
    return _p_within(pooled_damage_moments(tasks).mirrored(), -margin)


def pooled_damage_moments(tasks: Sequence[Sequence[QuestionPair]]) -> Moments:
    """The moments of the mean damage over tasks, arrays of one number. ValueError as for `pooled_difference`."""
    if not tasks:
        raise ValueError("no task: a pooled difference needs at least one")
    return pooled_moments([_damage_moments(task) for task in tasks])


def pooled_moments(tasks: Sequence[Moments]) -> Moments:
    """The moments of the mean over independent tasks, each weighing the same.

    One question is imagined lost in all, where it moves the mean most. Degrees of freedom are Welch's, each task's variance taken with its own
    imagined question, and none where a task has none.
    """
    n = len(tasks)
    square, jump, degrees = (np.stack([getattr(task, name) for task in tasks]) for name in ("square", "jump", "degrees"))
    spread = square + jump**2
    with np.errstate(divide="ignore", invalid="ignore"):
        welch = spread.sum(axis=0) ** 2 / (spread**2 / degrees).sum(axis=0)
    return Moments(
        mean=np.stack([task.mean for task in tasks]).sum(axis=0) / n,
        square=square.sum(axis=0) / n**2,
        cube=np.stack([task.cube for task in tasks]).sum(axis=0) / n**3,
        jump=jump.max(axis=0) / n,
        degrees=np.where(degrees.min(axis=0) > 0, welch, 0.0),
    )


def mcnemar(worse: int, better: int) -> McNemar:
    """McNemar's exact test: flips are fair coins where nothing changed; without any flip both p-values are 1."""
    flips = worse + better
    p_worse = float(bdtr(better, flips, 0.5))
    return McNemar(worse, better, p_worse, min(1.0, 2 * float(bdtr(min(worse, better), flips, 0.5))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: the i-th smallest times those left, never falling, at most 1. ValueError outside [0, 1]."""
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"p = {p!r}: a p-value lies in [0, 1]")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _damage_moments(pairs: Sequence[QuestionPair]) -> Moments:
    if not pairs:
        raise ValueError("no pair: a difference needs at least one question that both variants answered")
    for pair in pairs:
        check_share(pair.baseline, "a baseline mean")
        check_share(pair.candidate, "a candidate mean")
    return moments(*in_clusters([[pair.baseline - pair.candidate for pair in pairs]], [pair.cluster for pair in pairs]))


def _bounds(damage: Moments, alpha: float) -> tuple[float, float]:
    check_alpha(alpha)
    return max(-1.0, -float(upper_bound(damage.mirrored(), alpha)[0])), min(1.0, float(upper_bound(damage, alpha)[0]))


def _p_within(damage: Moments, limit: float) -> float:
    return 0.0 if limit >= 1 else float(p_below(damage, limit)[0])


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence!r}: has to lie between 0 and 1, such as 0.95")
    return (1 - confidence) / 2


def _is_single(pairs: Sequence[QuestionPair]) -> bool:
    alone = len({pair.cluster for pair in pairs}) == len(pairs)
    once = all(pair.n_baseline == pair.n_candidate == 1 for pair in pairs)
    return alone and once and all(pair.baseline in (0, 1) and pair.candidate in (0, 1) for pair in pairs)


def _cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[Array, Array]:
    rows, starts = in_clusters([values], clusters)
    return np.add.reduceat(rows[0], starts), np.diff(np.append(starts, len(values))).astype(float)


def _plain_t(delta: float, stderr: float, n_clusters: int, confidence: float) -> tuple[float, float]:
    half = -float(stdtrit(n_clusters - 1, _tail(confidence))) * stderr
    return delta - half, delta + half


def _bootstrap(sums: Array, sizes: Array, confidence: float) -> tuple[float, float]:
    """Clusters drawn with replacement; where there are few kinds of them, 10,000 times instead of 2,000, since kinds are drawn at once."""
    rng = np.random.default_rng(_SEED)
    kinds, counts = np.unique(np.stack([np.round(sums, 12), sizes]), axis=1, return_counts=True)
    if kinds.shape[1] <= _FEW_KINDS:
        drawn = rng.multinomial(len(sums), counts / len(sums), size=RESAMPLES)
        means = (drawn @ kinds[0]) / (drawn @ kinds[1])
    else:
        blocks = (rng.integers(len(sums), size=(_BLOCK, len(sums))) for _ in range(RESAMPLES // 5 // _BLOCK))
        means = np.concatenate([sums.take(block).sum(axis=1) / sizes.take(block).sum(axis=1) for block in blocks])
    low, high = np.quantile(means, [_tail(confidence), 1 - _tail(confidence)])
    return float(low), float(high)


def _permutation(sums: Array) -> float:
    """Two-sided, over all signs of the clusters that differ, or over seeded draws of them where these are too many."""
    values = np.abs(sums[np.abs(sums) > _SAME])
    observed = abs(float(sums.sum())) - _SAME
    if len(values) <= _EXACT_SIGNS:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(values))))
        return float(np.mean(np.abs(signs @ values) >= observed))
    rng = np.random.default_rng(_SEED)
    extreme = 0
    for _ in range(RESAMPLES // _BLOCK):
        plus = np.unpackbits(np.frombuffer(rng.bytes(_BLOCK * _bytes(len(values))), np.uint8).reshape(_BLOCK, -1), axis=1)
        extreme += int(np.sum(np.abs(2 * (plus[:, : len(values)] @ values) - values.sum()) >= observed))
    return (1 + extreme) / (1 + RESAMPLES)


def _bytes(bits: int) -> int:
    return -(-bits // 8)
