"""Intervals of means: closed forms, the edges, and what a bound must never do."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.intervals import exact_interval, in_clusters, mean_interval, moments, p_below, upper_bound
from qad.clustered import ratio_over_clusters

COUNTS = [(0, 1), (1, 1), (0, 30), (1, 30), (27, 30), (30, 30), (49, 100), (499, 500), (2500, 5000)]
STATSMODELS = {  # proportion_confint of statsmodels 0.15: beta
    (0, 30): (0.0, 0.1157033082220278),
    (1, 30): (0.0008435709266304788, 0.17216945563341268),
    (27, 30): (0.7347115495257919, 0.9788828629702774),
    (49, 100): (0.38864416516163774, 0.5919636708445463),
    (499, 500): (0.9889075231010312, 0.9999493656659926),
}


def of(values, clusters=None):
    return moments(*in_clusters([values], clusters if clusters is not None else range(len(values))))


def bound(values, alpha=0.05, clusters=None):
    return float(upper_bound(of(values, clusters), alpha)[0])


@pytest.mark.parametrize(("successes", "n"), COUNTS)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_intervals_of_a_share_are_those_of_scipy(successes, n, confidence):
    trial = stats.binomtest(successes, n)
    theirs = trial.proportion_ci(confidence, "exact")
    assert exact_interval(successes, n, confidence=confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize("counts", STATSMODELS)
def test_intervals_of_a_share_are_those_recorded_from_statsmodels(counts):
    assert exact_interval(*counts) == pytest.approx(STATSMODELS[counts], abs=1e-9)


def test_right_or_wrong_answers_have_the_exact_interval():
    found = mean_interval([1] * 27 + [0] * 3, range(30))
    assert (found.low, found.high) == exact_interval(27, 30)
    assert "exact" in found.method


def test_all_right_on_thirty_questions_is_no_proof_of_all_right():
    found = mean_interval([1.0] * 30, range(30))
    assert found.low == pytest.approx(0.025 ** (1 / 30)) and found.high == 1
    over_repeats = mean_interval([1.0] * 30, range(30), repeats=8)
    assert over_repeats.low < found.low and over_repeats.high == 1


def test_questions_that_err_together_are_fewer_than_they_look():
    values = [float(i % 3 > 0) for i in range(90)]
    alone = mean_interval(values, range(90))
    together = mean_interval(sorted(values), [i // 3 for i in range(90)])
    assert together.high - together.low > 1.4 * (alone.high - alone.low)


def test_without_a_value_there_is_no_interval_and_with_one_cluster_nothing_is_excluded():
    assert mean_interval([], []) is None
    found = mean_interval([0.5, 0.7], ["a", "a"])
    assert (found.low, found.high) == (0, 1) and "one cluster" in found.method
    assert (mean_interval([1], ["a"], repeats=4).low, mean_interval([1], ["a"]).high) == (0, 1)


def test_the_interval_stays_within_the_scores_that_there_are():
    found = mean_interval([1.0] * 29 + [0.875], range(30), repeats=8)
    assert 0 < found.low < found.high == 1


@pytest.mark.parametrize(
    ("values", "clusters", "options", "said"),
    [
        ([math.nan], ["a"], {}, "nan.*leave out what was not scored"),
        ([1.5], ["a"], {}, r"1\.5.*in \[0, 1\]"),
        ([1.0, 0.0], ["a"], {}, "2 values in 1 clusters.*each value needs its cluster"),
        ([1.0], ["a"], {"repeats": 0}, "repeats = 0.*at least 1"),
        ([1.0], ["a"], {"confidence": 95}, r"confidence = 95.*0\.95"),
    ],
)
def test_what_cannot_be_bounded_is_refused(values, clusters, options, said):
    with pytest.raises(ValueError, match=said):
        mean_interval(values, clusters, **options)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match=f"{successes} successes of {n}.*n >= 1"):
        exact_interval(successes, n)


@pytest.mark.parametrize("n", [30, 100, 500])
@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.025])
def test_without_any_difference_the_bound_is_no_tighter_than_the_rule_of_three(n, alpha):
    exact = 1 - alpha ** (1 / n)
    assert exact <= bound([0.0] * n, alpha) < 1.25 * exact


def test_with_many_differences_the_bound_is_the_t_bound():
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 1.0], size=20_000, p=[0.1, 0.8, 0.1])
    plain = values.mean() + stats.t.ppf(0.95, 19_999) * stats.sem(values)
    assert plain < bound(values) < plain + 0.01 * (plain - values.mean())


def test_moments_are_the_textbook_ones_where_clusters_are_equal():
    values, clusters = [0.1, 0.9, 0.4, 0.4, 0.0, 1.0, 0.3, 0.8], [0, 0, 1, 1, 2, 2, 3, 3]
    plain, grouped = of(values), of(values, clusters)
    assert plain.square[0] == pytest.approx(stats.sem(values) ** 2, abs=1e-12) and plain.degrees[0] == 7
    assert plain.cube[0] == pytest.approx(stats.moment(values, 3) / 8**2, abs=1e-12)
    _, stderr = ratio_over_clusters(values, [1] * 8, clusters)
    assert grouped.square[0] == pytest.approx(stderr**2, abs=1e-12) and grouped.degrees[0] == pytest.approx(3)


def test_a_cluster_that_holds_most_questions_leaves_few_degrees_of_freedom():
    rng = np.random.default_rng(1)
    values = rng.random(300)
    even, uneven = [i % 30 for i in range(300)], [max(0, i - 270) for i in range(300)]
    assert of(values, even).degrees[0] == pytest.approx(29) and of(values, uneven).degrees[0] < 0.5
    assert bound(values, clusters=uneven) > 1 > bound(values, clusters=even)


def test_clusters_that_never_differed_may_be_lost_whole():
    assert bound([0.0] * 300, clusters=[i // 10 for i in range(300)]) == pytest.approx(bound([0.0] * 30))


def test_clusters_that_differ_without_pattern_count_little():
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 1.0], size=600, p=[0.2, 0.6, 0.2])
    clusters = [i // 3 for i in range(600)]
    assert bound(values) < bound(values, clusters=clusters) < 1.15 * bound(values)


def test_many_benchmarks_at_once_are_each_as_if_alone():
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 0.5], size=(7, 40))
    starts = np.array([0, 3, 11, 20, 33])
    clusters = np.repeat(range(5), np.diff([*starts, 40]))
    together = moments(values, starts)
    assert upper_bound(together, 0.05) == pytest.approx([bound(row, clusters=clusters) for row in values], abs=1e-14)
    assert p_below(together, 0.3).shape == (7,)


@given(
    st.lists(st.tuples(st.sampled_from([-1.0, -0.25, 0.0, 0.5, 1.0]), st.integers(0, 5)), min_size=1, max_size=40), st.randoms()
)
def test_the_order_of_questions_changes_nothing(rows, order: random.Random):
    shuffled = order.sample(rows, len(rows))
    first, second = (bound([v for v, _ in r], clusters=[c for _, c in r]) for r in (rows, shuffled))
    assert first == pytest.approx(second, rel=1e-12, abs=1e-9) or first == second == math.inf


@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.125, 1.0]), st.integers(0, 12)), min_size=2, max_size=60))
def test_a_smaller_error_never_makes_a_tighter_bound_and_never_one_below_the_mean(rows):
    values, clusters = [v for v, _ in rows], [c for _, c in rows]
    bounds = [bound(values, alpha, clusters) for alpha in (0.49, 0.2, 0.05, 0.01, 0.001)]
    assert bounds == sorted(bounds) and bounds[0] >= np.mean(values)
