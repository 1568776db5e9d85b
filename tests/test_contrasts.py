"""Contrasts of cells: closed forms, what pairs and what does not, and a seeded simulation of coverage with a rule that fails it."""

import importlib.util
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import stdtrit

from harness import contrasts
from harness.contrasts import Cell, MixedSeeds, OneTraining, Units, contrast
from harness.paired import QuestionPair, paired_difference

spec = importlib.util.spec_from_file_location(
    "findings_simulation", Path(__file__).parent.parent / "bench" / "findings_simulation.py"
)
simulation = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = simulation  # dataclasses look their module up
spec.loader.exec_module(simulation)

N = 40
ALONE = Units(tuple(range(N)))


def cell(name, *rows, seeds=None, draw="data"):
    """A cell of one task; a row a training."""
    return Cell(name, tuple(range(len(rows))) if seeds is None else seeds, draw, (np.array(rows, dtype=float),))


def untrained(name, row):
    return cell(name, row, seeds=())


def answers(rng, share, n=N):
    return (rng.random(n) < share).astype(float)


def test_without_a_training_the_interval_is_that_of_every_paired_difference():
    rng = np.random.default_rng(1)
    clusters = [i // 3 for i in range(N)]
    ours, theirs = answers(rng, 0.6), answers(rng, 0.5)
    found = contrast([(1, untrained("ptq", ours)), (-1, untrained("bf16", theirs))], [Units(tuple(clusters))])
    pairs = [QuestionPair(b, a, c) for a, b, c in zip(ours, theirs, clusters, strict=True)]
    same = paired_difference(pairs, resampled=False)
    assert (found.value, found.low, found.high) == pytest.approx((same.delta, same.low, same.high), abs=1e-12)
    assert found.stderr_seeds is None and found.n_clusters == same.n_clusters


def test_of_figures_over_tokens_the_interval_is_students_over_questions_and_seeds():
    """By hand: two independent cells whose sequences all have as many tokens, so that the ratio is a plain mean."""
    rng = np.random.default_rng(2)
    ours, theirs = rng.normal(1.0, 0.5, (4, N)), rng.normal(0.5, 0.2, (3, N))
    tokens = Units(tuple(range(N)), (10,) * N)
    found = contrast([(1, cell("qat", *10 * ours, draw="a")), (-1, cell("qad", *10 * theirs, draw="b"))], [tokens])
    d = ours.mean(axis=0) - theirs.mean(axis=0)
    v_questions = statistics.variance(d) / N
    v_ours, v_theirs = statistics.variance(ours.mean(axis=1)) / 4, statistics.variance(theirs.mean(axis=1)) / 3
    total = v_questions + v_ours + v_theirs
    degrees = total**2 / (v_questions**2 / (N - 1) + v_ours**2 / 3 + v_theirs**2 / 2)
    half = -stdtrit(degrees, 0.025) * math.sqrt(total)
    assert found.value == pytest.approx(d.mean())
    assert found.degrees == pytest.approx(degrees)
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half))
    assert found.stderr_questions == pytest.approx(math.sqrt(v_questions))
    assert found.stderr_seeds == pytest.approx(math.sqrt(v_ours + v_theirs))


def test_longer_sequences_weigh_more():
    tokens = Units(("a", "b"), (30, 10))
    found = contrast([(1, untrained("ptq", [3.0, 5.0]))], [tokens])
    assert found.value == pytest.approx(8 / 40)


def test_cells_that_share_a_draw_are_subtracted_seed_by_seed():
    base = np.zeros(N)
    ours = [base + shift for shift in (0.1, 0.3, 0.5)]
    theirs = [base + shift for shift in (0.0, 0.2, 0.4)]
    paired = contrast([(1, cell("qad", *ours)), (-1, cell("qat", *theirs))], [ALONE])
    apart = contrast([(1, cell("qad", *ours)), (-1, cell("qat", *theirs, draw="other"))], [ALONE])
    assert paired.stderr_seeds == pytest.approx(0, abs=1e-12)
    assert apart.stderr_seeds == pytest.approx(math.sqrt(2 * 0.04 / 3))
    assert apart.high - apart.low > paired.high - paired.low


def test_a_difference_of_differences_pairs_all_four_cells_of_one_draw():
    base = np.zeros(N)
    cells = [cell(name, *(base + step * seed for seed in range(3))) for name, step in zip("abcd", (4, 3, 2, 1), strict=True)]
    found = contrast(list(zip((1, -1, -1, 1), cells, strict=True)), [ALONE])
    assert found.value == pytest.approx(0) and found.stderr_seeds == pytest.approx(0)
    off = [*cells[:3], cell("d", *(base + 2.0 * seed for seed in range(3)))]
    assert contrast(list(zip((1, -1, -1, 1), off, strict=True)), [ALONE]).stderr_seeds == pytest.approx(math.sqrt(1 / 3))


def test_a_trained_cell_with_one_seed_has_no_interval():
    with pytest.raises(OneTraining) as raised:
        contrast([(1, cell("qad", np.zeros(N))), (-1, untrained("ptq", np.zeros(N)))], [ALONE])
    assert raised.value.cell == "qad"


def test_cells_of_one_draw_with_some_seeds_in_common_are_refused_and_with_none_they_are_independent():
    rows = [np.zeros(N), np.ones(N), np.ones(N)]
    first = cell("qad", *rows, seeds=(0, 1, 2))
    with pytest.raises(MixedSeeds, match=r"qad has the seeds 0, 1, 2, qat 1, 2, 3"):
        contrast([(1, first), (-1, cell("qat", *rows, seeds=(1, 2, 3)))], [ALONE])
    found = contrast([(1, first), (-1, cell("qat", *rows, seeds=(3, 4, 5)))], [ALONE])
    assert found.stderr_seeds == pytest.approx(math.sqrt(2 * statistics.variance([0, 1, 1]) / 3))
    other = contrast([(1, first), (-1, cell("qat", *rows, seeds=(1, 2, 3), draw="other"))], [ALONE])
    assert other.stderr_seeds == pytest.approx(found.stderr_seeds)


def test_several_tasks_weigh_the_same_and_a_seed_is_one_model_in_all_of_them():
    few, many = Units(tuple(range(10))), Units(tuple(range(90)))
    rows = (np.array([[0.0] * 10, [1.0] * 10]), np.array([[1.0] * 90, [0.0] * 90]))
    found = contrast([(1, Cell("qad", (0, 1), "data", rows))], [few, many])
    assert found.value == pytest.approx(0.5) and found.n_units == 100
    assert found.stderr_seeds == 0, "what one seed gains in a task it loses in the other"


def test_p_agrees_with_the_interval_at_every_error():
    rng = np.random.default_rng(3)
    ours = cell("qad", *(answers(rng, 0.7) for _ in range(3)))
    theirs = cell("qat", *(answers(rng, 0.5) for _ in range(3)))
    for limits in ((0.0,), (0.3,), (-0.02, 0.02), (-0.6, 0.6)):
        p = contrast([(1, ours), (-1, theirs)], [ALONE]).p_decided(limits)
        for error, is_decided in ((p * 1.001, True), (p * 0.999, False)):
            if 0 < error < 0.9:
                found = contrast([(1, ours), (-1, theirs)], [ALONE], confidence=1 - error)
                assert all(not found.low <= limit <= found.high for limit in limits) == is_decided


def test_what_never_differs_has_an_interval_all_the_same_and_a_constant_of_tokens_has_none():
    same = contrast([(1, untrained("ptq", np.ones(N))), (-1, untrained("bf16", np.ones(N)))], [ALONE])
    assert same.value == 0 and same.low < 0 < same.high and same.p_decided((0.0,)) == 1
    exact = contrast([(1, untrained("ptq", np.ones(N)))], [Units(tuple(range(N)), (10,) * N)])
    assert exact.low == exact.value == exact.high == 0.1
    assert exact.p_decided((0.0,)) == 0 and exact.p_decided((0.1,)) == 1


def test_one_cluster_bounds_nothing():
    found = contrast([(1, untrained("ptq", np.ones(N)))], [Units(("one",) * N)], bounds=(-1.0, 1.0))
    assert (found.low, found.high) == (-1.0, 1.0)


KINDS = [
    kind
    for kind in simulation.experiments()
    if kind.questions == 50 and kind.repeats == 4 and kind.score == 0.3 and kind.correlation >= 0
]
EXPERIMENTS = 500


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_intervals_cover(kind):
    outcome = simulation.simulate(kind, EXPERIMENTS, np.random.default_rng(7))
    assert simulation.broken(kind, outcome, EXPERIMENTS) == []


def test_an_interval_that_forgets_the_seeds_is_found_out(monkeypatch):
    monkeypatch.setattr(simulation, "with_seeds", lambda questions, parts: questions)
    kind = next(kind for kind in KINDS if kind.seeds == (3, 3) and kind.spread == 0.4)
    outcome = simulation.simulate(kind, EXPERIMENTS, np.random.default_rng(7))
    assert simulation.broken(kind, outcome, EXPERIMENTS)
    assert contrasts.with_seeds is not simulation.with_seeds


def test_the_truth_of_an_experiment_is_what_many_questions_and_seeds_show():
    kind = simulation.Experiment(400, 4, (5, 5, 5, 5), 0.4, paired=True, correlation=0.8, score=0.3)
    rng = np.random.default_rng(5)
    shown = [sum(w * c.mean() for w, c in zip(kind.weights, simulation._scores(kind, 200, rng), strict=True)) for _ in range(3)]
    assert statistics.mean(shown) == pytest.approx(kind.truth(), abs=0.01)
