"""Scoring a run folder again: what is written and in which order, and what is said of folders that cannot be scored."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from sample_runs import sample, write_run

from harness import evaluation, rescore
from harness.errors import StoreError
from harness.prepared import Question
from harness.provenance import PACKAGES
from harness.records import SCHEMA, read_json, read_lines, read_samples, write_rows, write_samples

TASK = {
    "name": "maths",
    "limit": None,
    "sampling": {},
    "chat": None,
    "metadata": {},
    "thinking": None,
    "system_prompt": None,
    "path": None,
    "repeats": 1,
    "seed": 0,
    "default": None,
}


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_rows(run, make):
    rows = [make(row) for row in read_lines(run / "tasks.jsonl")]
    (run / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    samples = {
        ("bf16", "other tool's"): [sample(0, imported=True)],
        ("bf16", "maths"): [sample(0), sample(1)],
        ("ptq", "maths"): [sample(0), sample(1)],
    }
    made = write_run(tmp_path / "run", samples)
    change(made / "run.json", resolved={"tasks": [TASK]})
    change_rows(made, lambda row: row | {"judge": None} | ({} if row["task"] == "maths" else {"imported": {"files": []}}))
    questions = [Question(n, "maths", "q", str(n), "2", {}) for n in range(2)]
    write_samples(made / "tasks" / "maths" / "docs.jsonl.zst", map(vars, questions))
    return made


@pytest.fixture
def scorer(monkeypatch, run):
    """A scorer of another version, by which every answer is wrong; `fails_at` makes it end instead, the number of a call."""
    calls = []

    def score_task(task, about, questions, answers, engine):
        calls.append(task.name)
        if len(calls) == score_task.fails_at:
            raise score_task.error
        shown = {"unit": "share", "value": 0.0, "stderr": 0.0, "n_scored": 2, "n_total": 2, "incomplete_rate": 0.0}
        result = {"primary": "exact_match", "metrics": {"exact_match": shown}, "scorer": "maths@2:def"}
        result |= {"subtasks": {"even": {"exact_match": shown}, "odd": {"exact_match": shown}}}
        result |= {"n_questions": 2, "repeats": 1, "is_partial": False, "version": 2, "publishable": True} | engine
        return [row | {"metrics": {"exact_match": 0.0}, "scorer": "maths@2:def"} for row in answers], result

    score_task.fails_at = None
    monkeypatch.setattr(evaluation, "score_task", score_task)
    return score_task


def files(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_what_is_imported_stays_last_parts_have_a_file_and_the_packages_that_scored_are_recorded(run, scorer):
    assert rescore.rescore(run)[0].endswith("(scorer maths@1:abc -> maths@2:def)")
    assert [(row["variant"], row["task"]) for row in read_lines(run / "tasks.jsonl")] == [
        ("bf16", "maths"),
        ("ptq", "maths"),
        ("bf16", "other tool's"),
    ]
    assert [(row["variant"], row["subtask"], row["value"]) for row in read_lines(run / "subtasks.jsonl")] == [
        (variant, part, 0.0) for variant in ("bf16", "ptq") for part in ("even", "odd")
    ]
    (now,) = read_json(run / "run.json")["rescored"]
    assert set(now["packages"]) == set(PACKAGES["score"]) and now["packages"]["lm-eval"] is not None
    assert {row["scorer"] for row in read_samples(run / "samples" / "ptq.maths.jsonl.zst")} == {"maths@2:def"}


def test_every_row_of_a_rehearsal_keeps_its_mark_and_a_run_gets_none(run, scorer):
    rescore.rescore(run)
    assert not any("rehearsal" in row for name in ("tasks", "subtasks") for row in read_lines(run / f"{name}.jsonl"))
    change(run / "run.json", rehearsal=True)
    rescore.rescore(run)
    rows = [row for name in ("tasks", "subtasks") for row in read_lines(run / f"{name}.jsonl")]
    assert len(rows) == 7 and all(row["rehearsal"] is True for row in rows)


def test_the_scores_without_text_are_those_of_the_new_scoring_and_imported_ones_come_too(run, scorer):
    shutil.rmtree(run / "scores")
    rescore.rescore(run)
    scores = {path.name: [row["scores"] for row in read_lines(path)] for path in (run / "scores").iterdir()}
    assert scores == {
        "bf16.maths.jsonl": [[0.0], [0.0]],
        "ptq.maths.jsonl": [[0.0], [0.0]],
        "bf16.other tool's.jsonl": [[1.0]],
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_end_in_the_middle_leaves_every_file_as_it_was(run, scorer, error):
    before = files(run)
    scorer.fails_at, scorer.error = 2, error
    with pytest.raises((KeyboardInterrupt, StoreError)):
        rescore.rescore(run)
    assert files(run) == before


def test_samples_are_whole_or_not_written(tmp_path, monkeypatch):
    path = tmp_path / "samples.jsonl.zst"
    write_samples(path, [sample(0)])

    def interrupted(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_samples(path, [sample(1)])
    assert read_samples(path) == [sample(0)]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("resolved", "message"),
    [
        (None, "lack or add 'resolved'"),
        ({"tasks": [TASK | {"batch": 3}]}, "lack or add .*unexpected keyword argument 'batch'"),
        ({"tasks": [TASK | {"thinking": {"begin": "x"}}]}, "lack or add .*Thinking"),
        ({"tasks": [TASK | {"name": "sums"}]}, "lack or add 'maths'"),
        ({"tasks": 3}, "lack or add"),
    ],
)
def test_a_run_of_another_shape_says_what_to_do(run, scorer, resolved, message):
    about = json.loads((run / "run.json").read_text())
    del about["resolved"]
    (run / "run.json").write_text(json.dumps(about | ({} if resolved is None else {"resolved": resolved})))
    with pytest.raises(StoreError, match=f"{message}.*; score it with the version that wrote it, or run the suite again"):
        rescore.rescore(run)


def test_rows_from_before_the_engine_was_recorded_are_scored_and_say_that_it_is_not_known(run, scorer):
    change_rows(run, lambda row: {name: value for name, value in row.items() if name not in ("engine", "sampling_seed")})
    rescore.rescore(run)
    own = [row for row in read_lines(run / "tasks.jsonl") if row["task"] == "maths"]
    assert [(row["engine"], row["sampling_seed"]) for row in own] == [(None, None)] * 2


@pytest.mark.parametrize("key", ["judge", "kernels", "variant"])
def test_rows_that_lack_a_key_are_a_run_of_another_shape(run, scorer, key):
    change_rows(run, lambda row: {name: value for name, value in row.items() if name != key})
    with pytest.raises(StoreError, match=f"lack or add '{key}'"):
        rescore.rescore(run)


def test_a_run_that_keeps_only_prompts_in_its_samples_says_that_the_questions_are_not_kept(run, scorer):
    (run / "tasks" / "maths" / "docs.jsonl.zst").unlink()
    with pytest.raises(StoreError, match="bf16 maths: what was asked and answered is not kept; run the suite again"):
        rescore.rescore(run)
    assert read_json(run / "run.json")["schema"] == SCHEMA


def test_a_run_writes_the_parts_of_a_group_beside_its_tasks(tmp_path):
    part = {"exact_match": {"value": 0.5}}
    result = {"schema": SCHEMA, "metrics": {"exact_match": {"value": 0.75}}, "subtasks": {"one": part}}
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "result.json").write_text(json.dumps(result))
    write_samples(tmp_path / "stage" / "samples.jsonl.zst", [sample(0)])
    stage = SimpleNamespace(kind="score", variant=SimpleNamespace(name="bf16"), task=SimpleNamespace(name="group"))
    write_rows(tmp_path, [(stage, SimpleNamespace(folder=tmp_path / "stage"))])
    (row,) = read_lines(tmp_path / "subtasks.jsonl")
    assert (row["task"], row["subtask"], row["metric"], row["value"]) == ("group", "one", "exact_match", 0.5)
    (row,) = read_lines(tmp_path / "tasks.jsonl")
    assert row["value"] == 0.75 and "subtasks" not in row


def test_without_subtasks_there_is_no_file_of_them(tmp_path):
    write_rows(tmp_path, [])
    assert not (tmp_path / "subtasks.jsonl").exists()
    assert (tmp_path / "tasks.jsonl").exists()
