"""Two variants on the same questions: closed forms, exact error rates, and what a difference must never claim."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import gammaln, xlogy

from harness.intervals import Moments, p_below, upper_bound
from harness.paired import (
    QuestionPair,
    damage_bound,
    holm,
    mcnemar,
    p_inferior,
    paired_difference,
    pooled_damage_bound,
    pooled_difference,
    pooled_p_inferior,
)

BASELINE = [1, 1, 0, 1, 0.5, 1, 0, 0.25, 1, 1]
CANDIDATE = [1, 0, 0, 0.5, 0.5, 1, 0.25, 0, 1, 0.75]
GROUPS = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


def pairs_of(baseline, candidate, clusters=None):
    clusters = clusters if clusters is not None else range(len(baseline))
    return [QuestionPair(b, c, cluster) for b, c, cluster in zip(baseline, candidate, clusters, strict=True)]


def flips(same, worse, better):
    return pairs_of([1] * (same + worse) + [0] * better, [1] * same + [0] * worse + [1] * better)


SCORES = st.sampled_from([0.0, 0.125, 0.5, 1.0])
PAIRS = st.lists(st.builds(QuestionPair, SCORES, SCORES, st.integers(0, 20)), min_size=1, max_size=60)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_plain_interval_is_the_paired_t_interval(confidence):
    found = paired_difference(pairs_of(BASELINE, CANDIDATE), confidence=confidence)
    theirs = stats.ttest_rel(CANDIDATE, BASELINE).confidence_interval(confidence)
    assert found.t == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert found.stderr == pytest.approx(stats.sem(np.subtract(CANDIDATE, BASELINE)), abs=1e-9)
    assert found.delta == pytest.approx(-0.175, abs=1e-9)


def test_the_clustered_error_is_that_of_a_clustered_regression():
    found = paired_difference(pairs_of(BASELINE, CANDIDATE, GROUPS))
    sums = [sum(c - b + 0.175 for b, c, g in zip(BASELINE, CANDIDATE, GROUPS, strict=True) if g == k) for k in range(4)]
    sandwich = math.sqrt(sum(s**2 for s in sums)) / 10
    assert sandwich == pytest.approx(
        0.0730582, abs=1e-7
    )  # OLS on a constant, cov_type="cluster" without correction, statsmodels 0.15
    assert found.stderr == pytest.approx(sandwich * math.sqrt(4 / 3), abs=1e-9)
    half = stats.t.ppf(0.975, 3) * found.stderr
    assert found.t == pytest.approx((-0.175 - half, -0.175 + half), abs=1e-9)
    assert (found.n_questions, found.n_clusters) == (10, 4)


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (9, 3), (3, 9), (5, 5), (200, 150)])
def test_mcnemars_test_is_the_exact_one(worse, better):
    found = mcnemar(worse, better)
    flipped = worse + better
    if flipped:
        assert found.p_two_sided == pytest.approx(stats.binomtest(worse, flipped, 0.5).pvalue, abs=1e-9)
        assert found.p_worse == pytest.approx(stats.binomtest(worse, flipped, 0.5, alternative="greater").pvalue, abs=1e-9)
    else:
        assert found.p_two_sided == found.p_worse == 1


def test_mcnemar_and_holm_are_those_recorded_from_statsmodels():
    assert mcnemar(9, 3).p_two_sided == pytest.approx(0.14599609375, abs=1e-9)
    assert holm([0.01, 0.04, 0.03, 0.005, 0.6]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.6], abs=1e-9)


def test_mcnemar_and_holm_are_those_of_an_installed_statsmodels():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    assert mcnemar(9, 3).p_two_sided == pytest.approx(tables.mcnemar([[50, 9], [3, 38]], exact=True).pvalue, abs=1e-9)
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    given_p = [0.01, 0.04, 0.03, 0.005, 0.6]
    assert holm(given_p) == pytest.approx(multitest.multipletests(given_p, method="holm")[1], abs=1e-9)


def test_mcnemars_test_is_for_single_right_or_wrong_answers_that_stand_alone():
    assert paired_difference(flips(20, 4, 1)).mcnemar == mcnemar(4, 1)
    assert paired_difference([QuestionPair(1, 0, i, n_baseline=8) for i in range(5)]).mcnemar is None
    assert paired_difference(pairs_of([1, 0.5], [0, 0.5])).mcnemar is None
    assert paired_difference(pairs_of([1, 1, 0], [0, 1, 0], ["a", "a", "b"])).mcnemar is None


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.5))
def test_holms_adjustment_rejects_what_stepping_down_rejects(p_values, alpha):
    rejected, order = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        if p_values[index] * (len(p_values) - rank) > alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def test_a_p_value_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"nan.*in \[0, 1\]"):
        holm([0.1, math.nan])


def test_the_permutation_test_is_exact_on_few_questions():
    found = paired_difference(pairs_of(BASELINE, CANDIDATE))
    theirs = stats.permutation_test(
        (CANDIDATE, BASELINE), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True
    )
    assert found.p_permutation == pytest.approx(theirs.pvalue, abs=1e-9)


def test_on_many_questions_permutation_and_bootstrap_agree_with_the_normal_limit_and_with_themselves():
    pairs = flips(400, 60, 40)
    found, again = paired_difference(pairs), paired_difference(pairs)
    assert found == again
    z = 20 / math.sqrt(100)
    assert found.p_permutation == pytest.approx(2 * stats.norm.sf(z - 0.1), abs=0.01)
    assert found.bootstrap == pytest.approx(found.t, abs=0.003)


def exchanged(pairs):
    return [QuestionPair(p.candidate, p.baseline, p.cluster, p.n_candidate, p.n_baseline) for p in pairs]


def test_two_equal_variants_differ_by_nothing_and_that_is_not_certain():
    found = paired_difference(flips(30, 0, 0))
    assert (found.delta, found.worse, found.better, found.p_permutation) == (0, 0, 0, 1)
    assert found.low < -0.1 and found.high > 0.1
    assert found.t == found.bootstrap == (0, 0)  # why neither decides
    assert damage_bound(flips(30, 0, 0), alpha=0.05)[1] > 1 - 0.05 ** (1 / 30)
    assert p_inferior(flips(30, 0, 0), margin=-0.03) > 0.3


def test_one_question_or_one_cluster_bounds_nothing():
    for pairs in (pairs_of([1], [0]), pairs_of([1, 0.5, 1], [0, 0.5, 1], ["a"] * 3)):
        found = paired_difference(pairs)
        assert (found.low, found.high, found.stderr, found.t, found.bootstrap, found.p_permutation) == (-1, 1, *[None] * 4)
        assert "one cluster" in found.method
        assert damage_bound(pairs, alpha=0.05) == (-1, 1)
        assert p_inferior(pairs, margin=-0.5) == p_inferior(pairs, margin=0.5) == 1


def test_flips_are_of_question_means():
    found = paired_difference(pairs_of([0.1 + 0.2, 0.5, 1, 0], [0.3, 0.25, 0.5, 0.125]))
    assert (found.worse, found.better) == (2, 1)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "no pair.*at least one question"),
        (pairs_of([math.nan], [0]), "baseline.*nan"),
        (pairs_of([1], [math.inf]), "candidate.*inf"),
        (pairs_of([1], [71.2]), r"candidate.*71\.2.*in \[0, 1\]"),
    ],
)
def test_what_is_no_pair_of_scores_is_refused(pairs, said):
    for call in (paired_difference, lambda p: damage_bound(p, alpha=0.05), lambda p: p_inferior(p, margin=0.1)):
        with pytest.raises(ValueError, match=said):
            call(pairs)


@pytest.mark.parametrize("alpha", [0, 0.5, 1, -1])
def test_an_error_rate_that_is_none_is_refused(alpha):
    with pytest.raises(ValueError, match=f"alpha = {alpha}"):
        damage_bound(flips(3, 1, 1), alpha=alpha)


@given(PAIRS, st.floats(0.001, 0.49), st.floats(-0.9, 0.9))
def test_p_values_are_at_most_alpha_exactly_where_the_bounds_clear_the_margin(pairs, alpha, margin):
    lower, upper = damage_bound(pairs, alpha=alpha)
    for bound, p, clears in (
        (upper, p_inferior(exchanged(pairs), margin=-margin), upper <= margin),
        (lower, p_inferior(pairs, margin=margin), lower >= margin),
    ):
        if abs(bound - margin) > 1e-9:
            assert (p <= alpha) == clears


def test_damage_of_the_whole_score_is_the_most_there_can_be():
    lost = flips(0, 40, 0)
    assert damage_bound(lost, alpha=0.05)[1] == 1 and p_inferior(exchanged(lost), margin=-1.0) == 0
    assert p_inferior(exchanged(lost), margin=-0.9) > 0.5 and p_inferior(lost, margin=0.5) < 0.001


@given(PAIRS)
def test_exchanging_the_variants_negates_the_difference(pairs):
    found = paired_difference(pairs)
    mirror = paired_difference(exchanged(pairs))
    assert mirror.delta == pytest.approx(-found.delta, abs=1e-12)
    assert (mirror.low, mirror.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    assert (mirror.worse, mirror.better) == (found.better, found.worse)
    assert -1 <= found.low <= found.delta <= found.high <= 1 and found.low < found.high


@given(st.integers(0, 6), st.integers(0, 6))
def test_more_damage_never_passes_more_easily(worse, better):
    assert damage_bound(flips(100, worse + 1, better), alpha=0.05)[1] > damage_bound(flips(101, worse, better), alpha=0.05)[1]


@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.025])
@pytest.mark.parametrize("n", [30, 100, 198, 300])
def test_single_answers_at_the_margin_pass_in_at_most_alpha_by_exact_enumeration(n, alpha):
    """Every way to lose and win questions, each with its exact chance: no sampling error, and no luck with a seed."""
    lost, won = (axis.ravel().astype(float) for axis in np.meshgrid(range(n + 1), range(n + 1), indexing="ij"))
    likely = (lost + won <= n) & (np.maximum(lost, won) <= 0.3 * n + 12)
    lost, won = lost[likely], won[likely]
    mean = (lost - won) / n
    same = n - lost - won
    square = (lost + won - n * mean**2) / (n - 1) / n
    cube = (lost * (1 - mean) ** 3 - won * (1 + mean) ** 3 - same * mean**3) / n**3
    of = Moments(mean, square, cube, np.full(mean.shape, 1 / n), np.full(mean.shape, n - 1.0))
    upper, lower = upper_bound(of, alpha), -upper_bound(of.mirrored(), alpha)
    for discordance in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2):
        for share in (0.0, 0.25, 0.4, 0.5, 0.75, 1.0):
            margin = discordance * share
            each = (discordance + margin) / 2, (discordance - margin) / 2, 1 - discordance
            chance = np.exp(
                gammaln(n + 1) + sum(xlogy(x, p) - gammaln(x + 1) for x, p in zip((lost, won, same), each, strict=True))
            )
            assert chance.sum() == pytest.approx(1, abs=1e-6)
            assert chance[upper <= margin + 1e-12].sum() < 1.04 * alpha, (discordance, share)
            assert chance[lower >= margin - 1e-12].sum() < 1.04 * alpha, (discordance, share)
    assert np.array_equal(p_below(of, 0.05) <= alpha, upper <= 0.05)


def test_one_task_pooled_is_that_task():
    pairs = pairs_of(BASELINE, CANDIDATE, GROUPS)
    one, found = paired_difference(pairs), pooled_difference([pairs])
    assert (found.delta, found.stderr, found.low, found.high) == pytest.approx(
        (one.delta, one.stderr, one.low, one.high), abs=1e-12
    )
    assert (found.n_tasks, found.n_questions, found.n_clusters) == (1, 10, 4)


def test_a_pool_weighs_tasks_alike_and_sums_their_variances():
    first, second = flips(20, 4, 2), flips(400, 50, 50)
    found = pooled_difference([first, second])
    alone = [paired_difference(task) for task in (first, second)]
    assert found.delta == pytest.approx(sum(one.delta for one in alone) / 2)
    assert found.stderr == pytest.approx(math.hypot(*(one.stderr for one in alone)) / 2)
    assert found.high - found.low < alone[0].high - alone[0].low


def test_a_pool_of_tasks_without_a_difference_is_as_sure_as_all_their_questions_together():
    five = pooled_damage_bound([flips(30, 0, 0)] * 5, alpha=0.05)[1]
    assert damage_bound(flips(150, 0, 0), alpha=0.05)[1] == pytest.approx(five, rel=0.02)


def test_a_pool_with_a_task_of_one_cluster_bounds_nothing():
    found = pooled_difference([flips(30, 1, 1), pairs_of([1], [1])])
    assert (found.stderr, found.low, found.high) == (None, -1, 1) and "one cluster" in found.method


def test_an_empty_pool_and_an_empty_task_are_refused():
    with pytest.raises(ValueError, match="no task.*at least one"):
        pooled_difference([])
    with pytest.raises(ValueError, match="no pair"):
        pooled_difference([flips(3, 1, 1), []])


@given(st.lists(PAIRS, min_size=1, max_size=4), st.floats(0.001, 0.49), st.floats(-0.9, 0.9))
def test_pooled_p_values_agree_with_pooled_bounds(tasks, alpha, margin):
    lower, upper = pooled_damage_bound(tasks, alpha=alpha)
    if abs(upper - margin) > 1e-9:
        assert (pooled_p_inferior([exchanged(task) for task in tasks], margin=-margin) <= alpha) == (upper <= margin)
    if abs(lower - margin) > 1e-9:
        assert (pooled_p_inferior(tasks, margin=margin) <= alpha) == (lower >= margin)


def test_the_verdicts_statistics_start_without_torch_and_without_the_slow_half_of_scipy():
    code = (
        "import sys, harness.paired, harness.recovery, harness.power\n"
        "slow = {'torch', 'scipy.stats', 'scipy.optimize', 'lm_eval'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent, timeout=60)
