"""Several seeds of a variant in tables: means, two kinds of error kept apart, marks of tasks that chose a checkpoint."""

import csv
import io
import json
import shutil
import statistics
from pathlib import Path

import pytest
from sample_runs import sample

from harness.errors import StoreError
from harness.records import read_lines, write_samples
from harness.score_files import write_scores
from harness.seeds import seed_groups, summary
from harness.stats import mean_with_stderr
from harness.tables import build_grid, build_table, render
from qad.clustered import ratio_with_stderr

KL = {  # sums of two sequences with 10 and 30 tokens
    "ptq": (10.0, 24.0),
    "qad-seed0": (4.0, 10.0),
    "qad-seed1": (5.0, 11.0),
    "qad-seed2": (6.0, 15.0),
    "qat-seed0": (8.0, 30.0),
}
TOKENS = (10, 30)
RIGHT = {  # five questions, the first two one cluster
    "qad-seed0": (1, 1, 0, 0, 1),
    "qad-seed1": (1, 0, 0, 1, 1),
    "qad-seed2": (0, 0, 0, 1, 1),
}
CLUSTERS = ("a", "a", "b", "c", "d")


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps({"schema": 1, **row}) + "\n" for row in rows))


def variant(name: str, **more) -> dict:
    method = name.partition("-")[0]
    seed = int(name[-1]) if "seed" in name else None
    found = {
        "name": name,
        "method": method,
        "group": name.partition("-")[0],
        "seed": seed,
        "quantization": {"scale_rule": "amax"},
    }
    if seed is not None:
        found["training"] = {"tokens": 5900, "batch_size": 4, "lr": 1e-3, "seed": seed}
        budget = {"tokens": 6000 + 30 * seed, "steps": 10, "loss_tokens": 3000, "epochs_read": 1, "lr": 1e-3}
        found |= {"budget": budget, "codes_changed": 0.01 * (seed + 1), "checkpoint_bytes": 10**6, "bits_per_weight": 4.5}
    return found | more


def make_run(folder: Path, names: list[str], *, selection: dict | None = None, samples: bool = True) -> Path:
    """A run folder with one task and diagnostics of the variants named."""
    extra = {} if selection is None else {"selection": selection}
    variants = [variant(name, **(extra if name.startswith("qad") else {})) for name in names]
    about = {"schema": 1, "suite": "s", "run": "r", "status": "complete", "model": {"notes": []}, "variants": variants}
    (folder / "run.json").write_text(json.dumps(about))
    shared = {
        "primary": "acc",
        "incomplete_rate": None,
        "kernels": {"linear": "w4a4_emulation"},
        "is_partial": False,
        "version": 1,
        "n_questions": 5,
        "repeats": 1,
    }
    tasks, diagnostics, sequences = [], [], []
    (folder / "samples").mkdir()
    for name in names:
        if name in RIGHT:
            value, stderr = mean_with_stderr(RIGHT[name], CLUSTERS)
            figures = {"unit": "share", "value": value, "stderr": stderr, "n_scored": 5, "n_total": 5}
            tasks.append({"variant": name, "task": "t", "metric": "acc", **figures, **shared})
            rows = [
                sample(i, task="t", question="one text for all", cluster=cluster, metrics={"acc": float(right)})
                for i, (cluster, right) in enumerate(zip(CLUSTERS, RIGHT[name], strict=True))
            ]
            if samples:
                write_samples(folder / "samples" / f"{name}.t.jsonl.zst", rows)
        kl, stderr = ratio_with_stderr(KL[name], TOKENS)
        part = {"kl": kl, "kl_stderr": stderr, "kl_p50": 0, "kl_p99": 1, "ce": 2 + kl, "ppl": 9.0, "top1": 0.5}
        part |= {"n_tokens": 40, "n_sequences": 2}
        diagnostics.append(
            {"variant": name, "response": part, "all": part, "kernels": shared["kernels"], "saturated_share": None}
        )
        sequences += [
            {
                "variant": name,
                "sequence": i,
                "kl_sum": KL[name][i],
                "ce_sum": 2 * TOKENS[i] + KL[name][i],
                "top1_sum": 5,
                "n_tokens": n,
            }
            for i, n in enumerate(TOKENS)
        ]
    lines(folder / "tasks.jsonl", tasks)
    lines(folder / "diagnostics.jsonl", diagnostics)
    lines(folder / "diagnostics_sequences.jsonl", sequences)
    return folder


THREE = ["ptq", "qad-seed0", "qad-seed1", "qad-seed2"]


def test_a_group_has_the_mean_over_seeds_its_error_over_questions_and_the_spread_over_seeds(tmp_path):
    table = build_table(make_run(tmp_path, THREE))
    (group,) = table["seed_groups"]
    assert (group["group"], group["label"], group["seeds"]) == ("qad", "qad (3 seeds)", [0, 1, 2])
    score = group["tasks"]["t"]["metrics"]["acc"]
    per_seed = [sum(right) / 5 for right in RIGHT.values()]
    assert (score["n"], score["mean"]) == (3, pytest.approx(sum(per_seed) / 3))
    assert score["sd_over_seeds"] == pytest.approx(statistics.stdev(per_seed))
    questions = [sum(right) / 3 for right in zip(*RIGHT.values(), strict=True)]
    assert score["stderr_over_questions"] == pytest.approx(mean_with_stderr(questions, CLUSTERS)[1])
    kl = group["diagnostics"]["response"]["kl"]
    mean, stderr = ratio_with_stderr([5.0, 12.0], TOKENS)
    assert (kl["mean"], kl["stderr_over_sequences"]) == (pytest.approx(mean), pytest.approx(stderr))
    assert kl["sd_over_seeds"] == pytest.approx(statistics.stdev([14 / 40, 16 / 40, 21 / 40]))


def test_the_row_of_a_group_stands_below_its_seeds(tmp_path):
    table = build_table(make_run(tmp_path, [*THREE, "qat-seed0"]))
    grid = build_grid(table)
    assert [row[0] for row in grid.rows] == ["ptq", "qat-seed0", "qat (1 seed)", *THREE[1:], "qad (3 seeds)"]
    columns = list(grid.columns)
    cells = dict(zip(columns, grid.rows[6], strict=True))
    assert cells["t"] == "53.3 ±16.7 (seeds 11.5)"
    assert cells["KL"] == "0.425 ±0.037 (seeds 0.090)"
    ce, error = ratio_with_stderr([2 * n + kl for n, kl in zip(TOKENS, (5.0, 12.0), strict=True)], TOKENS)
    assert cells["CE"] == f"{ce:.3f} ±{error:.3f} (seeds 0.090)" == "2.425 ±0.037 (seeds 0.090)"
    assert cells["top-1"] == f"0.500 ±{ratio_with_stderr([5, 5], TOKENS)[1]:.3f} (seeds 0.000)"
    assert cells["ppl"] == "9.00 (seeds 0.00)"  # no error is defined for it
    assert grid.rows[3][columns.index("CE")] == "2.350"  # a single seed has its error in KL alone
    assert (cells["MB"], cells["bits/w"], cells["trained"]) == ("1.0", "4.50", "6,030")
    one = dict(zip(grid.columns, grid.rows[2], strict=True))
    assert one["KL"].endswith("(seeds –)") and one["t"] == "–"
    assert table["seed_groups"][0]["diagnostics"]["response"]["kl"]["sd_over_seeds"] is None
    assert sum("of the FP4 codes differ" in note for note in grid.notes) == 2
    assert not any("Budgets differ" in note for note in grid.notes)
    assert any("qad-seed0, qad-seed1, qad-seed2: 10 steps" in note and "1.0, 2.0, 3.0 %" in note for note in grid.notes)
    assert "qad (3 seeds) | 53.3" in render(table, "md")


def test_the_row_of_a_group_is_a_line_of_the_csv_too(tmp_path):
    table = build_table(make_run(tmp_path, THREE))
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert [row["variant"] for row in rows] == [*THREE, "qad (3 seeds)"]
    group = table["seed_groups"][0]["diagnostics"]["response"]["kl"]
    assert float(rows[4]["kl"]) == group["mean"] and float(rows[4]["kl_sd_over_seeds"]) == group["sd_over_seeds"]
    assert (rows[4]["n_seeds"], rows[4]["group"], rows[4]["kl_p50"], rows[4]["t.n_scored"]) == ("3", "qad", "", "")
    assert (rows[1]["seed"], rows[1]["group"], rows[0]["seed"], rows[0]["group"]) == ("0", "qad", "", "")


def test_without_samples_the_scores_of_the_run_give_the_very_same_errors(tmp_path):
    run = make_run(tmp_path, THREE)
    write_scores(run, read_lines(run / "tasks.jsonl"))
    with_samples = build_table(run)["seed_groups"]
    shutil.rmtree(run / "samples")
    assert build_table(run)["seed_groups"] == with_samples
    assert not with_samples[0]["tasks"]["t"]["error_is_mean_of_seeds"]


def test_without_samples_the_error_is_the_mean_of_the_seeds_errors_an_upper_bound_and_a_note_says_so(tmp_path):
    (tmp_path / "with").mkdir()
    exact = build_table(make_run(tmp_path / "with", THREE))["seed_groups"][0]["tasks"]["t"]
    table = build_table(make_run(tmp_path, THREE, samples=False))
    bound = table["seed_groups"][0]["tasks"]["t"]
    errors = [row["tasks"]["t"]["metrics"]["acc"]["stderr"] for row in table["rows"][1:]]
    assert bound["metrics"]["acc"]["stderr_over_questions"] == pytest.approx(sum(errors) / 3)
    assert bound["metrics"]["acc"]["stderr_over_questions"] > exact["metrics"]["acc"]["stderr_over_questions"]
    assert (bound["error_is_mean_of_seeds"], exact["error_is_mean_of_seeds"]) == (True, False)
    assert any("qad t: the samples of all seeds" in note and "upper bound" in note for note in build_grid(table).notes)


def test_differences_are_of_groups_and_not_of_every_pair_of_seeds(tmp_path):
    table = build_table(make_run(tmp_path, [*THREE, "qat-seed0"]))
    pairs = {(pair["candidate"], pair["baseline"]): pair for pair in table["paired_kl"]}
    assert set(pairs) == {("qad (3 seeds)", "ptq"), ("qad (3 seeds)", "qat (1 seed)"), ("qat (1 seed)", "ptq")}
    pair = pairs["qad (3 seeds)", "ptq"]
    difference, stderr = ratio_with_stderr([5.0 - 10.0, 12.0 - 24.0], TOKENS)
    assert (pair["difference"], pair["stderr"]) == (pytest.approx(difference), pytest.approx(stderr))
    assert pair["stderr_over_seeds"] == pytest.approx(statistics.stdev([14 / 40, 16 / 40, 21 / 40]) / 3**0.5)
    assert pairs["qat (1 seed)", "ptq"]["stderr_over_seeds"] is None
    assert any("± 0.052 over seeds" in note for note in build_grid(table).notes)


def test_a_seed_that_is_not_measured_yet_is_said_and_not_counted(tmp_path):
    folder = make_run(tmp_path, THREE)
    for name in ("tasks", "diagnostics", "diagnostics_sequences"):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if "qad-seed2" not in line))
    table = build_table(folder)
    cells = dict(zip(build_grid(table).columns, build_grid(table).rows[4], strict=True))
    assert "(2 of 3 seeds 0.035)" in cells["KL"]
    assert table["seed_groups"][0]["tasks"]["t"]["metrics"]["acc"]["n"] == 2


def test_seeds_measured_on_different_sequences_have_no_mean(tmp_path):
    folder = make_run(tmp_path, THREE)
    path = folder / "diagnostics_sequences.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(StoreError, match="qad-seed0 and qad-seed2 were measured on different sequences"):
        build_table(folder)


def test_a_damaged_sample_file_is_named(tmp_path):
    folder = make_run(tmp_path, THREE)
    (folder / "samples" / "qad-seed1.t.jsonl.zst").write_bytes(b"not zstd")
    with pytest.raises(StoreError, match=r"qad-seed1\.t\.jsonl\.zst: damaged"):
        build_table(folder)


def test_no_figure_has_no_mean_and_no_spread():
    assert summary([None, None], None, "questions") == {
        "n": 0,
        "mean": None,
        "stderr_over_questions": None,
        "sd_over_seeds": None,
    }
    assert seed_groups([], [], lambda variant, task: None) == []


def test_a_task_that_chose_the_checkpoint_is_marked_everywhere(tmp_path):
    table = build_table(make_run(tmp_path, THREE, selection={"select": "best_of_k", "tasks": ["t"], "k": 10}))
    assert [row["tasks"]["t"]["chose_checkpoint"] for row in table["rows"][1:]] == [True] * 3
    assert table["seed_groups"][0]["tasks"]["t"]["chose_checkpoint"] is True
    grid = build_grid(table)
    assert all(row[1].endswith("†") for row in grid.rows[1:])
    assert any(
        note.startswith("† t: chose the checkpoint of qad-seed0, qad-seed1, qad-seed2") and "gate" in note
        for note in grid.notes
    )
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert [row["t.chose_checkpoint"] for row in rows] == ["", "true", "true", "true", "true"]


def test_a_group_carries_the_marks_of_its_seeds(tmp_path):
    run = make_run(tmp_path, THREE)
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    for row in rows:
        row["flags"] = ["imported"] if row["variant"] == "qad-seed1" else []
    (run / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = build_grid(build_table(run))
    assert [row[0] for row in grid.rows if row[1].endswith("‡")] == ["qad-seed1", "qad (3 seeds)"]
    assert "‡ t of qad-seed1: scored by another tool and imported" in "".join(grid.notes)


def test_a_checkpoint_chosen_by_validation_loss_gets_a_note_and_no_mark(tmp_path):
    selection = {"select": "best_val", "tasks": [], "step": 1200, "steps": 1500}
    table = build_table(make_run(tmp_path, THREE, selection=selection))
    grid = build_grid(table)
    assert "†" not in "".join(cell for row in grid.rows for cell in row)
    assert "qad-seed1: the checkpoint with the lowest validation loss at step 1,200 of 1,500." in grid.notes


def test_a_run_without_seeds_or_selection_says_nothing_of_them(tmp_path):
    table = build_table(make_run(tmp_path, ["ptq"]))
    assert table["seed_groups"] == []
    text = render(table, "md")
    assert "seed" not in text.lower() and "†" not in text


def test_budgets_differ_when_other_ones_were_asked_for(tmp_path):
    folder = make_run(tmp_path, [*THREE, "qat-seed0"])
    about = json.loads((folder / "run.json").read_text())
    about["variants"][-1]["training"]["tokens"] = 9000
    (folder / "run.json").write_text(json.dumps(about))
    assert any("Budgets differ between trained variants" in note for note in build_grid(build_table(folder)).notes)
