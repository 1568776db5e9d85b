"""A sampled evaluation that is killed goes on as if nothing had been; the long form is bench/evaluation_kills.py."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "evaluation_kills.py"


@pytest.fixture(scope="module")
def kills():
    spec = importlib.util.spec_from_file_location("evaluation_kills", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(kills):
    started = kills.Runs()
    yield started
    started.close()


@pytest.mark.parametrize("engine", ["scripted", "hf"])
def test_killed_at_two_random_moments_it_ends_with_the_same_table_and_samples(kills, runs, tmp_path, engine, capsys):
    found = kills.campaign(runs, tmp_path, engine, kills=2, seed=1)
    assert (found.kills, found.lines_lost, found.asked_again, found.responses_missing) == (2, 0, 0, 0)
    assert found.equal == found.evaluations and found.holds
    assert "the same table and samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("journal", "asked", "lost", "again"),
    [
        (["p", "a", "b"], ["c"], 0, 0),
        (["p", "a"], ["c"], 1, 0),
        (["p", "a", "x"], ["c"], 1, 0),
        (["p", "a", "b"], ["b", "c"], 0, 1),
    ],
)
def test_a_lost_line_and_a_request_that_is_asked_again_are_counted(kills, tmp_path, journal, asked, lost, again):
    def lines(names):
        return "".join(json.dumps({"id": name}) + "\n" for name in names)

    work = kills.Evaluation("hf", tmp_path / "suite", tmp_path / "work")
    path = work.root / "results" / "journals" / "w" / "t"
    path.mkdir(parents=True)
    (path / "p.jsonl").write_text(lines(journal) + '{"torn')
    (work.root / "asked").write_text("a\nb\n" + "".join(f"{name}\n" for name in asked))
    work.n_asked_before = 2
    found = kills.Found("hf", evaluations=1, equal=1)
    kills._hold(work, lines("pab").encode(), found)
    assert (found.lines_lost, found.asked_again, found.holds) == (lost, again, not lost + again)
