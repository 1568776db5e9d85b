"""A suite that asks about pictures, shown and grey, through the real command: what the run folder holds, and what it does without."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from harness.cli import app
from harness.records import read_lines, read_samples

SUITE = """
schema = 1
name = "see"
[model]
path = "{model}"
kind = "image-text"
[[variant]]
name = "bf16"
method = "bf16"
[[task]]
name = "mini_chart"
limit = 4
[[task]]
name = "mini_chart"
pictures = "grey"
limit = 4
[[task]]
name = "mini_choice"
limit = 2
[engine]
kind = "hf"
[diagnostics]
on = "answers"
samples = 4
"""


def command(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def made(tiny_vlm, tmp_path_factory):
    """(run folder, cache, what was said) of the suite."""
    root = tmp_path_factory.mktemp("see")
    (root / "see.toml").write_text(SUITE.format(model=tiny_vlm))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HARNESS_CACHE", str(root / "cache"))
        said = command("run", root / "see.toml", "--results", root / "results")
    (run,) = (root / "results/see").glob("*/run.json")
    return run.parent, root / "cache", said


def test_both_are_asked_and_the_control_is_marked_as_none(made):
    run, _, said = made
    flags = {row["task"]: row["flags"] for row in read_lines(run / "tasks.jsonl")}
    assert flags == {"mini_chart": [], "mini_chart-grey": ["grey pictures"], "mini_choice": []}
    assert "‡ mini_chart-grey of bf16: every picture was a grey one" in said
    shown, grey = (read_samples(run / f"samples/bf16.{name}.jsonl.zst") for name in ("mini_chart", "mini_chart-grey"))
    assert [row["question"] for row in shown] == [row["question"] for row in grey]
    assert len({row["images"][0] for row in shown}) == 4
    assert len({row["images"][0] for row in grey}) == 1
    assert not any(one["requests"] == other["requests"] for one, other in zip(shown, grey, strict=True))


def test_divergence_is_measured_on_answers_about_pictures_and_not_on_those_of_the_control(made):
    run, _, _ = made
    (row,) = read_lines(run / "diagnostics.jsonl")
    assert list(row["tasks"]) == ["mini_chart"]
    assert row["response"]["n_sequences"] == 4


def test_no_image_is_in_the_results_and_nothing_needs_the_cache_again(made, tmp_path, monkeypatch):
    run, cache, _ = made
    kinds = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".md", ".csv", ".tex", ".zst", ".html"}
    pictures = {row["images"][0] for row in read_samples(run / "samples/bf16.mini_chart.jsonl.zst")}
    assert pictures <= {path.name for path in cache.glob("stages/*/files/images/*")}
    copy = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "nothing"))
    before = [json.loads(line) for line in (copy / "tasks.jsonl").read_text().splitlines()]
    command("score", copy)
    assert [json.loads(line) for line in (copy / "tasks.jsonl").read_text().splitlines()] == before
    shown = command("inspect", copy, "--task", "mini_chart", "--question", "1")
    (image,) = read_samples(copy / "samples/bf16.mini_chart.jsonl.zst")[1]["images"]
    assert f"images: {image[:16]} (64 × 64)" in shown
