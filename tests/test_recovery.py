"""Ratios of paired means: worked cases, Fieller's closed form, and when there is no ratio."""

import math

import numpy as np
import pytest
from scipy import stats

from harness.paired import QuestionPair
from harness.recovery import gap_recovered, recovery


def answers(rng, n, *shares):
    """Paired answers of several variants: each right where a common draw is below its share, but one in ten drawn anew."""
    common = rng.random(n)
    return [np.where(rng.random(n) < 0.1, rng.random(n), common) < share for share in shares]


def pairs_of(baseline, candidate):
    return [QuestionPair(float(b), float(c), i) for i, (b, c) in enumerate(zip(baseline, candidate, strict=True))]


def test_recovery_is_candidate_over_baseline():
    found = recovery(pairs_of([1] * 80 + [0] * 20, [1] * 72 + [0] * 28))
    assert found.value == pytest.approx(0.9) and found.low < 0.9 < found.high and found.reason is None


def test_equal_variants_recover_all_and_that_is_not_certain():
    found = recovery(pairs_of([1] * 24 + [0] * 6, [1] * 24 + [0] * 6))
    assert found.value == 1 and found.low < 0.9 and found.high > 1.1


def test_with_many_questions_the_interval_is_fiellers():
    baseline, candidate = answers(np.random.default_rng(1), 20_000, 0.7, 0.6)
    found = recovery(pairs_of(baseline, candidate))
    t, c = stats.t.ppf(0.975, 19_999), np.cov(candidate, baseline) / 20_000
    x, y = candidate.mean(), baseline.mean()
    roots = np.roots([y**2 - t**2 * c[1, 1], -2 * (x * y - t**2 * c[0, 1]), x**2 - t**2 * c[0, 0]])
    assert (found.low, found.high) == pytest.approx(sorted(roots), abs=2e-4)


def test_the_interval_of_recovery_covers():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        found = recovery(pairs_of(*answers(rng, 60, 0.8, 0.7)))
        hits += found.low <= 0.7 / 0.8 <= found.high
    assert hits >= 88  # 95 less three standard errors


def test_a_baseline_that_may_be_zero_has_no_recovery():
    found = recovery(pairs_of([0] * 29 + [1], [0] * 30))
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.reason == "undefined: the baseline's score is not distinguishable from zero"
    assert "no question" in recovery([]).reason
    assert "one cluster" in recovery([QuestionPair(1, 1, "a"), QuestionPair(1, 0, "a")]).reason


def test_the_gap_recovered_is_the_share_of_what_ptq_lost():
    rows = (
        [(1.0, 0.0, 1.0, i) for i in range(30)]
        + [(1.0, 0.0, 0.0, 30 + i) for i in range(10)]
        + [(1.0, 1.0, 1.0, 40 + i) for i in range(60)]
    )
    found = gap_recovered(rows)
    assert found.value == pytest.approx(0.75) and 0.4 < found.low < 0.75 < found.high < 1


def test_a_gap_that_may_be_none_has_no_share():
    equal = gap_recovered([(1.0, 1.0, 1.0, i) for i in range(100)])
    noisy = gap_recovered([(1.0, float(i > 2), 1.0, i) for i in range(50)])
    negative = gap_recovered([(0.0, 1.0, 1.0, i) for i in range(50)])
    for found in (equal, noisy, negative):
        assert (found.value, found.low, found.high) == (None, None, None)
        assert found.reason == "undefined: the gap between BF16 and PTQ is not distinguishable from zero"
    assert "no question" in gap_recovered([]).reason


def test_a_candidate_below_ptq_recovers_less_than_nothing():
    found = gap_recovered([(1.0, float(i % 2), 0.0, i) for i in range(200)])
    assert found.value == pytest.approx(-1) and found.low < -1 < found.high < 0


@pytest.mark.parametrize("value", [math.nan, -0.1, 71.2])
def test_what_is_no_score_is_refused(value):
    with pytest.raises(ValueError, match=f"{value}.*in \\[0, 1\\]"):
        recovery([QuestionPair(1, value, 0)])
    with pytest.raises(ValueError, match=f"{value}.*in \\[0, 1\\]"):
        gap_recovered([(1.0, 0.5, value, 0)])
