"""Figures over repeats, against cases worked by hand and against their slow definitions."""

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.stats import (
    Estimate,
    is_binary,
    maj_at_k,
    pass_at_k,
    question_maj_at_k,
    question_means,
    question_pass_at_k,
)


def test_avg_at_k_is_a_mean_of_question_means_with_the_error_over_questions():
    found = question_means([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], ["a", "b", "c"])
    assert found.value == pytest.approx(0.5)
    assert found.stderr == pytest.approx(statistics.stdev([0.5, 1.0, 0.0]) / math.sqrt(3))  # not over six answers: 0.22
    assert found.n == 3


def test_a_question_weighs_the_same_however_many_of_its_repeats_are_missing():
    found = question_means([[1.0, None, None, None], [0.0, 0.0, 0.0, 0.0]], ["a", "b"])
    assert found.value == pytest.approx(0.5)


def test_a_question_without_any_answer_is_left_out_and_counted_so():
    found = question_means([[1.0, 1.0], [None, None], [0.0, 1.0]], ["a", "b", "c"])
    assert (found.value, found.n) == (pytest.approx(0.75), 2)


def test_nothing_scored_is_no_number_and_one_question_has_no_error():
    assert question_means([], []) == question_means([[None]], ["a"]) == Estimate(None, None, 0)
    assert question_means([[1.0, 0.0]], ["a"]) == Estimate(0.5, None, 1)


def test_errors_are_over_clusters_of_questions():
    # clusters {q0, q1} and {q2, q3}: sums 2 and 0 of 2 questions each, mean 1/2, residuals +1 and -1:
    # se^2 = 2/1 * (1 + 1) / 4^2 = 1/4
    found = question_means([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], ["x", "x", "y", "y"])
    assert found == Estimate(0.5, 0.5, 4)
    assert question_means([[1.0], [1.0], [0.0], [0.0]], range(4)).stderr == pytest.approx(math.sqrt(1 / 12))


@pytest.mark.parametrize(
    ("n", "c", "k", "wanted"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 3 of the 6 pairs hold the one right answer
        (4, 2, 2, 5 / 6),
        (4, 3, 2, 1.0),  # every pair holds a right one
        (4, 0, 3, 0.0),
        (4, 4, 4, 1.0),
        (1, 0, 1, 0.0),
        (3, 2, 4, None),  # fewer repeats than k
        (0, 0, 1, None),
        (2000, 1, 1000, 0.5),  # binomials far beyond a float
    ],
)
def test_pass_at_k_by_hand(n, c, k, wanted):
    assert pass_at_k(n, c, k) == wanted


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(right, k):
    subsets = list(itertools.combinations(right, k))
    wanted = sum(map(any, subsets)) / len(subsets) if subsets else None
    assert pass_at_k(len(right), sum(right), k) == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_of_impossible_counts_is_an_error(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


def test_pass_at_k_over_questions_leaves_out_those_with_fewer_repeats_than_k():
    values = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, None, None, None]]
    found = question_pass_at_k(values, ["a", "b", "c"], 2)
    assert found.n == 2
    assert found.value == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert found.stderr == pytest.approx(statistics.stdev([1 / 2, 5 / 6]) / math.sqrt(2))
    assert question_pass_at_k(values, ["a", "b", "c"], 5) == Estimate(None, None, 0)


def test_pass_at_k_of_graded_scores_is_an_error():
    assert is_binary([[1.0, 0.0], [None, 1]])
    assert not is_binary([[1.0], [0.5]])
    with pytest.raises(ValueError, match="scores of 0 and 1"):
        question_pass_at_k([[0.5, 1.0]], ["a"], 2)


@pytest.mark.parametrize(
    ("answers", "correct", "wanted"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8"], [1, 0], 0.5),  # a tie: half of the fair draws are right
        (["7", "8", "9"], [1, 0, 0], 1 / 3),
        (["7", "7", "8", "8", "9"], [1, 1, 0, 0, 0], 0.5),  # only those with most votes tie
        (["[invalid]", "[invalid]", "7"], [0, 0, 1], 1.0),  # no answer never wins
        ([None, None, "8"], [0, 0, 0], 0.0),
        (["[invalid]", "[invalid]"], [0, 0], 0.0),
        (["yes", "yes", "no"], [1, 0, 0], 0.5),  # one answer, two verdicts: their mean
        (["7"], [1], 1.0),
        ([], [], None),
    ],
)
def test_maj_at_k_by_hand(answers, correct, wanted):
    assert maj_at_k(answers, correct) == (None if wanted is None else pytest.approx(wanted))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=6))
def test_the_order_of_repeats_does_not_change_a_majority(pairs):
    scores = {maj_at_k([a for a, _ in order], [c for _, c in order]) for order in itertools.permutations(pairs, len(pairs))}
    assert max(scores) - min(scores) < 1e-12


def test_maj_at_k_over_questions_lets_the_first_k_scored_repeats_vote():
    answers = [["7", None, "7", "8", "8"], ["1", "2", "2"], ["5", "5", None]]
    values = [[1.0, None, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, None]]
    found = question_maj_at_k(answers, values, ["a", "b", "c"], 3)
    assert (found.value, found.n) == (pytest.approx((1.0 + 0.0) / 2), 2)  # the third has two votes of three
