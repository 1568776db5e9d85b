"""Several processes with gloo against a single one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rank_worker
import torch
from rank_worker import CASES, VOCABULARY, rows_of, run_case

from qad.batch import Batch

TESTS = Path(__file__).parent
TOLERANCE = 1e-4


def torchrun(n_ranks: int, *arguments: object, timeout: float = 240, environment=None) -> subprocess.CompletedProcess:
    """Run under torchrun on this machine alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | (environment or {}),
    )


def cases_under(n_ranks: int, folder: Path, names: list[str]):
    """What rank 0 found, by case; every rank must have found the same."""
    done = torchrun(n_ranks, TESTS / "rank_worker.py", folder, *names)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for name in names:
        of_ranks = [json.loads((folder / f"{name}.rank{rank}.json").read_text()) for rank in range(n_ranks)]
        assert all(each == of_ranks[0] for each in of_ranks), name
        found[name] = of_ranks[0]
    return found


AT_TWO = [
    "quantized",
    "all",
    "learned",
    "scales",
    "w4a4",
    "fp8",
    "ce",
    "checkpointing",
    "head",
    "bf16",
    "bf16_all",
    "stopped",
    "resumed",
    "nan",
    "adafactor",
    "experts",
    "experts_all",
    "images",
    "images_all",
]
AT_THREE = ["quantized", "all", "learned", "fp8", "resumed"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a single process finds, by case."""
    found = {}

    def run(name, **changes):
        key = (name, *changes.items())
        if key not in found:
            found[key] = run_case(tmp_path_factory.mktemp("alone"), name, **(CASES[name] | changes))
        return found[key]

    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks find; they are handed the checkpoint of a single process that was stopped."""
    folder, one = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    stopped = run_case(one, "stopped", **CASES["stopped"])
    assert stopped["error"].startswith("Interrupted: stopped after step 4 of 10")
    shutil.copytree(one / "checkpoints", folder / "handed")
    return cases_under(2, folder, AT_TWO), folder


@pytest.fixture(scope="module")
def three(two, tmp_path_factory):
    """What three ranks find; they are handed the checkpoint of two."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(two[1] / "checkpoints", folder / "handed")
    return cases_under(3, folder, AT_THREE)


def require_same_run(found, expected, tolerance=TOLERANCE):
    assert len(found["losses"]) == len(expected["losses"]) >= 10
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert found["ce"] == pytest.approx(expected["ce"], rel=tolerance)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=100 * tolerance)
    assert found["validation"] == pytest.approx(expected["validation"], rel=tolerance)
    assert found["codes_changed"] == pytest.approx(expected["codes_changed"], rel=0.02)
    for key in ("trainable", "start", "shapes"):
        assert found[key] == expected[key]
    assert expected["losses"][-1] != pytest.approx(expected["losses"][0], rel=10 * tolerance)  # training did something


@pytest.mark.parametrize(
    "name",
    [
        "quantized",
        "all",
        "learned",
        "scales",
        "w4a4",
        "fp8",
        "ce",
        "checkpointing",
        "images",
        "images_all",
        "experts",
        "experts_all",
    ],
)
def test_two_ranks_find_the_losses_of_one(two, alone, name):
    require_same_run(two[0][name], alone(name))


@pytest.mark.parametrize("name", ["quantized", "all", "learned", "fp8"])
def test_three_ranks_with_uneven_rows_find_the_losses_of_one(three, alone, name):
    require_same_run(three[name], alone(name))
    assert VOCABULARY % 2 and rank_worker.SIZES["hidden_size"] * 2 % 9


def test_a_candidate_that_two_ranks_keep_after_a_validation_is_whole_where_a_layer_outside_the_blocks_is_quantized(two, alone):
    found, expected = two[0]["head"], alone("head")
    require_same_run(found, expected)
    assert found["kept"].keys() == expected["kept"].keys() == {"5", "10"}
    assert found["kept"] == expected["kept"]
    assert found["kept"]["5"] == found["shapes"] and found["shapes"]["lm_head.codes"][0] == VOCABULARY


def spread(runs: list[list[float]]) -> list[float]:
    """By step, the largest difference between two of some runs."""
    return [max(values) - min(values) for values in zip(*runs, strict=True)]


def pairs_of(batches):
    """Two batches, of one row and of two."""
    return [part for batch in batches for part in (rows_of([batch])[0], batch_of_rows(rows_of([batch])[1:]))]


def batch_of_rows(rows):
    return Batch(*(torch.cat([getattr(row, key) for row in rows]) for key in ("input_ids", "attention_mask", "loss_mask")))


@pytest.mark.parametrize("name", ["bf16", "bf16_all"])
def test_in_bf16_two_ranks_lie_within_the_spread_of_one_process_at_other_splits_of_its_steps(two, alone, name):
    """BF16 turns the order of sums into other codes, and so does a step that is split in another way."""
    runs = [alone(name, split=split)["losses"] for split in (rows_of, list, pairs_of)]
    found, allowed = two[0][name]["losses"], max(spread(runs))
    assert found[0] == pytest.approx(runs[0][0], rel=1e-3)
    assert 0 < allowed < 0.2 * runs[0][0]
    middle = [sorted(values)[1] for values in zip(*runs, strict=True)]
    assert max(abs(a - b) for a, b in zip(found, middle, strict=True)) <= allowed


def test_a_stop_asked_of_one_rank_stops_all_with_a_checkpoint_that_a_single_process_goes_on_from(two, alone, tmp_path):
    found, folder = two
    assert found["stopped"]["error"] == (
        "Interrupted: stopped after step 4 of 10; the checkpoint after step 4 is kept, and the same command goes on from it"
    )
    shutil.copytree(folder / "checkpoints", tmp_path / "handed")
    again = run_case(tmp_path, "resumed", **CASES["resumed"])
    assert again["resumed_at"] == 4
    require_same_run(again, alone("stopped", stop_after=None))


def test_a_checkpoint_of_a_single_process_is_gone_on_from_by_two_ranks_and_one_of_two_by_three(two, three, alone):
    expected = alone("stopped", stop_after=None)
    for again in (two[0]["resumed"], three["resumed"]):
        assert again["resumed_at"] == 4
        require_same_run(again, expected)


def test_a_nan_on_one_rank_ends_all_with_the_step_and_the_batch(two):
    assert two[0]["nan"]["error"].startswith(
        "TrainingError: step 4: the kl loss of batch 1 is nan; lower lr, or look at that batch"
    )


def test_adafactor_over_ranks_is_refused(two):
    assert 'optimizer = "adafactor" does not work over 2 ranks' in two[0]["adafactor"]["error"]


def only_training(suite: Path) -> None:
    """Leave nothing in the suite that takes time beside training."""
    text = suite.read_text()
    begin, end = text.index("[[task]]"), text.index("[engine]")
    suite.write_text(text[:begin] + text[end:])


def run_under_torchrun(suite: Path, root: Path, *, n_ranks: int = 2) -> subprocess.CompletedProcess:
    arguments = ("-m", "harness.cli", "run", suite, "--results", root / "results")
    return torchrun(n_ranks, *arguments, environment={"HARNESS_CACHE": str(root / "cache")}, timeout=120)


def test_a_suite_runs_under_torchrun_again_does_nothing_and_ends_at_once_where_the_first_rank_finds_a_mistake(
    tiny_suite, text_at_hand, tmp_path
):
    text_at_hand()
    only_training(tiny_suite)
    text = tiny_suite.read_text().replace("batch_size = 4", "batch_size = 4\nmicro_batch_size = 2")
    best = 'select = "best_of_k", candidates = 2, select_tasks = ["mini_choice"], validate_every = 2, validation_samples = 2'
    tiny_suite.write_text(text.replace('method = "qat"', f'method = "qat"\ntraining = {{ {best} }}'))

    done = run_under_torchrun(tiny_suite, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Results: ") == 1 and "it/s" not in done.stderr
    (table,) = (tmp_path / "results").glob("tiny/*/table.json")
    rows = {row["variant"]: row for row in json.loads(table.read_text())["rows"]}
    assert rows["qad"]["diagnostics"]["response"]["kl"] < rows["ptq"]["diagnostics"]["response"]["kl"]
    records = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "stages").glob("*/stage.json")]
    trained = [record["result"] for record in records if record["kind"] == "train"]
    assert [result["ranks"] for result in trained] == [2, 2]
    assert len({result["start_digest"] for result in trained}) == 1
    assert not list((tmp_path / "cache").glob("unfinished/*"))

    (selected,) = (record["result"] for record in records if record["kind"] == "select")
    scores = {row["step"]: row["scores"]["mini_choice"] for row in selected["selection"]["judged"]}
    assert len(scores) == 2 and scores[selected["selection"]["step"]] == max(scores.values())
    assert rows["qat"]["selection"] == selected["selection"] and rows["qat"]["diagnostics"]["response"]["kl"] > 0

    again = run_under_torchrun(tiny_suite, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "nothing to do, all" in again.stdout

    tiny_suite.write_text(tiny_suite.read_text().replace("micro_batch_size = 2", "micro_batch_size = 4"))
    failed = run_under_torchrun(tiny_suite, tmp_path)
    assert failed.returncode != 0
    assert failed.stderr.count("a step has 1 batches for 2 ranks") == 1
    assert "training.micro_batch_size to 2 or less" in failed.stderr
    assert "exitcode  : 2" in failed.stderr
    assert "[rank1]: Traceback" not in failed.stderr
