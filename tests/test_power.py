"""What a gate can decide: the normal formula's table, and that no more is promised than the deciding rule gives."""

import math

import numpy as np
import pytest

from harness.intervals import moments, upper_bound
from harness.power import (
    Spread,
    assumed_spread,
    expected,
    joint_power,
    planned,
    spread_from,
    standard_error,
)

GREEDY = {  # questions: points at a discordance of 5, 10, 20 %
    30: (10.2, 14.4, 20.3),
    100: (5.6, 7.9, 11.1),
    198: (4.0, 5.6, 7.9),
    500: (2.5, 3.5, 5.0),
    1000: (1.8, 2.5, 3.5),
    2500: (1.1, 1.6, 2.2),
    5000: (0.8, 1.1, 1.6),
}
SAMPLED = {  # questions: points at 1, 4, 8, 16, 64 repeats
    30: (20.4, 10.4, 7.5, 5.5, 3.2),
    60: (14.4, 7.3, 5.3, 3.9, 2.3),
    100: (11.2, 5.7, 4.1, 3.0, 1.8),
    198: (7.9, 4.0, 2.9, 2.1, 1.3),
    500: (5.0, 2.5, 1.8, 1.3, 0.8),
}


def points(se):
    return round(100 * (1.6449 + 0.8416) * se, 1)


def sampled(n, repeats, spread=None, *, clusters=None):
    return planned([expected(n, repeats, spread or assumed_spread(), n_clusters=clusters, is_greedy=False)], 0.05)


def greedy(n, discordance, *, clusters=None):
    return planned([expected(n, 1, assumed_spread(), n_clusters=clusters, is_greedy=True, discordance=discordance)], 0.05)


@pytest.mark.parametrize("n", GREEDY)
def test_standard_errors_of_greedy_answers_give_the_margins_of_the_normal_formula(n):
    spread = assumed_spread()
    found = [points(standard_error(n, 1, spread, is_greedy=True, discordance=rho)) for rho in (0.05, 0.1, 0.2)]
    assert found == list(GREEDY[n])


@pytest.mark.parametrize("n", SAMPLED)
def test_standard_errors_of_sampled_answers_give_the_margins_of_the_normal_formula(n):
    found = [points(standard_error(n, k, assumed_spread(), is_greedy=False)) for k in (1, 4, 8, 16, 64)]
    assert found == list(SAMPLED[n])


@pytest.mark.parametrize(("n", "clusters"), [(30, None), (100, None), (100, 30), (500, None)])
def test_the_rule_that_decides_needs_more_than_the_formula_and_never_more_for_more_repeats(n, clusters):
    margins = [sampled(n, repeats, clusters=clusters).smallest() for repeats in (1, 8, 16, 64)]
    for repeats, margin in zip((1, 8, 16, 64), margins, strict=True):
        assert margin > 2.4865 * standard_error(n, repeats, assumed_spread(), n_clusters=clusters, is_greedy=False)
    assert margins == sorted(margins, reverse=True)


def test_for_many_questions_the_margin_is_the_formula_with_an_eighth_of_caution():
    formula = 2.4865 * math.sqrt(0.1 / 1_000_000)
    assert formula < greedy(1_000_000, 0.1).smallest() == pytest.approx(1.13 * formula, rel=0.01)


def test_no_number_of_repeats_buys_back_the_rule_of_three():
    assert sampled(30, 10_000, Spread(0.1, 0.0, "test")).smallest() > 1 - 0.05 ** (1 / 30)


@pytest.mark.parametrize(("n", "clusters"), [(30, 30), (100, 100), (500, 500), (100, 50)])
@pytest.mark.parametrize("discordance", [0.05, 0.1, 0.2])
def test_an_identical_greedy_candidate_passes_as_often_as_promised(n, clusters, discordance):
    rng = np.random.default_rng(1)
    starts = np.arange(clusters) * (n // clusters)
    place = rng.random((4000, n))
    shared = np.repeat(rng.random((4000, clusters)), n // clusters, axis=1)
    place = np.where(rng.random((4000, n)) < math.sqrt(0.2), shared, place)  # two of a cluster correlate by 0.2
    values = np.where(place < discordance / 2, 1.0, np.where(place > 1 - discordance / 2, -1.0, 0.0))
    margin = greedy(n, discordance, clusters=clusters).smallest()
    passed = (upper_bound(moments(values, starts), 0.05) <= margin).mean()
    assert 0.8 - 3 * math.sqrt(0.16 / 4000) <= passed < 0.95


def test_power_and_margin_are_each_others_inverse():
    for rule in (greedy(198, 0.1), greedy(100, 0.1, clusters=30), sampled(500, 4)):
        margin = rule.smallest(0.8)
        assert rule.passes(margin + 1e-9) >= 0.8 > rule.passes(0.9 * margin)
        assert rule.does_not_fail(margin) > 0.99 > 0.5 > rule.passes(0.5 * rule.width)


def test_without_any_spread_the_margin_is_the_rule_of_three_and_certain():
    rule = sampled(100, 1, Spread(0.0, 0.0, "test"))
    assert rule.smallest() == pytest.approx(0.033, abs=0.003)
    assert rule.passes(rule.smallest()) == 1 and rule.passes(0.02) == 0


def test_one_cluster_decides_nothing_and_fails_nothing():
    rule = greedy(50, 0.1, clusters=1)
    assert (rule.smallest(), rule.passes(0.5), rule.does_not_fail(0.5)) == (math.inf, 0, 1)


def test_a_mean_over_equal_tasks_decides_about_the_root_of_their_number_less():
    one = expected(500, 4, assumed_spread(), is_greedy=False)
    four = planned([one] * 4, 0.05).smallest() / planned([one], 0.05).smallest()
    assert 0.45 < four < 0.52


def test_clusters_cost_what_questions_of_one_share():
    alone = standard_error(100, 1, assumed_spread(), is_greedy=True, discordance=0.1)
    assert standard_error(100, 1, assumed_spread(), n_clusters=50, is_greedy=True, discordance=0.1) == pytest.approx(
        alone * math.sqrt(1.2)
    )


def test_joint_power_is_the_product():
    assert joint_power([0.9, 0.8, 0.5]) == pytest.approx(0.36) and joint_power([]) == 1


def test_the_spread_of_repeats_is_found_again():
    rng = np.random.default_rng(1)
    shares = rng.choice([0.0, 0.5, 1.0], size=8000, p=[0.3, 0.4, 0.3])
    shifted = np.clip(shares - rng.choice([0.0, 0.25], size=8000), 0, 1)
    first, second = (list(map(list, (rng.random((8000, 4)) < p[:, None]).astype(float))) for p in (shares, shifted))
    within = float(np.mean([shares * (1 - shares), shifted * (1 - shifted)]))
    found = spread_from(first, second)
    assert found.within == pytest.approx(within, rel=0.05)
    assert found.effect == pytest.approx(float(np.var(shares - shifted)), abs=0.006)
    assert "8000 paired questions" in found.source
    alone = spread_from(first)
    assert (
        alone.within == pytest.approx(0.1, rel=0.05) and alone.effect == assumed_spread().effect and "assumed" in alone.source
    )


def test_missing_repeats_are_no_answers_and_too_few_say_nothing():
    assert spread_from([[1, None, 0], [0, 1, None]]).within == pytest.approx(0.5)
    assert spread_from([[1], [0], [1]]) is None
    assert spread_from([[1, 0], [1, None]]) is None
    assert spread_from([]) is None
    assert spread_from([[1, 1], [0, 0]], [[1, 1], [0, 0]]).effect == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: standard_error(0, 1, assumed_spread(), is_greedy=False), "0 questions"),
        (lambda: standard_error(10, 1, assumed_spread(), n_clusters=11, is_greedy=False), "11 clusters"),
        (lambda: standard_error(10, 1, assumed_spread(), is_greedy=True), "discordance = None.*share of questions"),
        (lambda: planned([expected(10, 1, assumed_spread(), is_greedy=False)], 0.7), r"alpha = 0\.7.*between 0 and 0\.5"),
        (lambda: spread_from([[1, 0]], []), "1 questions.*pair them first"),
    ],
)
def test_an_impossible_protocol_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
