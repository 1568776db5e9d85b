"""The simulation of verdicts, 200 benchmarks a cell: every promise holds, and a rule that breaks one is found out."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import intervals
from harness.intervals import mean_interval, moments, upper_bound
from harness.paired import QuestionPair, damage_bound

spec = importlib.util.spec_from_file_location(
    "verdict_simulation", Path(__file__).parent.parent / "bench" / "verdict_simulation.py"
)
simulation = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = simulation  # dataclasses look their module up
spec.loader.exec_module(simulation)

BENCHMARKS = 200
AGAIN = 4000
"""Among hundreds of cells some are three Monte Carlo errors off by chance; those are drawn again, anew and larger, and have to hold."""


@pytest.mark.parametrize("n", simulation.QUESTIONS)
@pytest.mark.parametrize("kind", simulation.KINDS)
def test_intervals_cover_and_gates_err_no_more_than_they_say(n, kind):
    cells = [cell for cell in simulation.cells() if cell.questions == n and cell.kind == kind]
    assert {cell.discordance for cell in cells} >= {0.02, 0.2} and {cell.mean for cell in cells} == set(simulation.MEANS)
    for i, cell in enumerate(cells):
        found = vars(simulation.simulate(cell, BENCHMARKS, np.random.default_rng(i)))
        if simulation.broken(found, BENCHMARKS):
            found = vars(simulation.simulate(cell, AGAIN, np.random.default_rng(1000 + i)))
            assert not simulation.broken(found, AGAIN), cell


def test_pools_cover_and_err_no_more_than_they_say():
    for i, pool in enumerate(pool for pool in simulation.pools() if pool.cells[0].discordance in (0.02, 0.1)):
        found = simulation.simulate_pool(pool, BENCHMARKS, np.random.default_rng(i))
        assert not simulation.broken(found, BENCHMARKS), pool


def test_a_candidate_that_loses_whole_clusters_passes_no_more_often_than_that():
    cells = [cell for cell in simulation.wholes() if cell.size > 1 and cell.clusters * cell.size <= 300 and cell.repeats == 8]
    assert {(30, 3), (60, 4)} <= {(cell.clusters, cell.size) for cell in cells} and {0.05} < {cell.damage for cell in cells}
    for i, cell in enumerate(cells):
        found = simulation.simulate_whole(cell, BENCHMARKS, np.random.default_rng(i))
        if simulation.broken(found, BENCHMARKS):
            found = simulation.simulate_whole(cell, AGAIN, np.random.default_rng(1000 + i))
            assert not simulation.broken(found, AGAIN), cell


def test_an_imagined_loss_of_what_clusters_show_alone_lets_whole_losses_pass(monkeypatch):
    cell = simulation.Whole(30, 10, 0.05, 0.2, 8)
    monkeypatch.setattr(intervals, "imagined_jump", lambda effect, size: np.clip(effect, 1, size))
    found = simulation.simulate_whole(cell, BENCHMARKS, np.random.default_rng(1))
    assert {said.split()[0] for said in simulation.broken(found, BENCHMARKS)} == {"delta_coverage", "pass_at_margin"}


@pytest.mark.parametrize("kind", simulation.KINDS)
@pytest.mark.parametrize("clusters", [None, 30])
def test_what_is_simulated_is_what_the_harness_says(kind, clusters):
    cell = simulation.Cell(100, 0.9, 0.1, 0.02, kind, clusters)
    baseline, candidate = simulation.draw(cell, 5, np.random.default_rng(1))
    starts = simulation.cluster_starts(cell)
    names = np.searchsorted(starts, np.arange(100), side="right").tolist()
    lows, highs = simulation.mean_bounds(cell, baseline, moments(baseline, starts))
    uppers = upper_bound(moments(baseline - candidate, starts), 0.05)
    for i in range(5):
        interval = mean_interval(baseline[i].tolist(), names, repeats=1 if kind == "single" else 8)
        assert (interval.low, interval.high) == pytest.approx((lows[i], highs[i]), abs=1e-9)
        pairs = [QuestionPair(b, c, name) for b, c, name in zip(baseline[i], candidate[i], names, strict=True)]
        assert damage_bound(pairs, alpha=0.05)[1] == pytest.approx(uppers[i], abs=1e-9)


def test_a_rule_that_does_not_hold_is_found_out():
    found = vars(
        simulation.simulate(simulation.Cell(30, 0.9, 0.02, 0.01, "single", None), BENCHMARKS, np.random.default_rng(1))
    )
    assert not simulation.broken(found, BENCHMARKS)
    plain = {**found, "delta_coverage": found["t_coverage"], "pass_at_margin": found["t_pass_at_margin"], "pass_identical": 0.6}
    assert [said.split()[0] for said in simulation.broken(plain, BENCHMARKS)] == [
        "delta_coverage",
        "pass_at_margin",
        "pass_identical",
    ]


def test_a_cell_is_what_it_says():
    rng = np.random.default_rng(1)
    for kind, repeats in (("single", 1), ("sampled", 8), ("mixed", 8)):
        for clusters in (None, 30):
            cell = simulation.Cell(100, 0.5, 0.1, 0.05, kind, clusters)
            baseline, candidate = simulation.draw(cell, 4000, rng)
            assert baseline.mean() == pytest.approx(0.5, abs=0.01)
            assert (baseline - candidate).mean() == pytest.approx(0.05, abs=0.005)
            assert np.all(baseline * repeats == np.round(baseline * repeats))
            answers = baseline * (1 - candidate) + candidate * (1 - baseline)
            assert answers.mean() == pytest.approx(0.1, abs=0.01)
    assert simulation.Cell(100, 0.98, 0.2, 0.0, "single", None).shares() is None


def test_the_campaign_prints_its_worst_cells_and_fails_when_one_breaks(capsys, monkeypatch, tmp_path):
    few, two = list(simulation.cells())[:3], list(simulation.pools())[:2]
    monkeypatch.setattr(simulation, "cells", lambda: iter(few))
    monkeypatch.setattr(simulation, "pools", lambda: iter(two))
    one = next(simulation.wholes())
    monkeypatch.setattr(simulation, "wholes", lambda: iter([one]))
    assert simulation.main(["--benchmarks", "50", "--csv", str(tmp_path / "cells.csv")]) == 0
    printed = capsys.readouterr().out
    assert (
        "3 cells, 2 pools and 1 that lose whole clusters, of 50 benchmarks: 0 break a promise" in printed
        and "most GO at the margin" in printed
    )
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 7
    monkeypatch.setattr(simulation, "broken", lambda row, benchmarks: ["too bad"])
    assert simulation.main(["--benchmarks", "50"]) == 1
    printed = capsys.readouterr().out
    assert "BROKEN n 30, mean 0.1" in printed and "BROKEN 30 clusters of 3, 2.3% lost whole, 0% of flips, 1 repeats" in printed
