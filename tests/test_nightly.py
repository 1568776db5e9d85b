"""A night over several suites. What runs a suite is a stand-in here, but for the last test; everything else is the real command."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sample_runs import sample, write_run
from typer.testing import CliRunner

from harness import nightly
from harness.accepted import accept, invalidate
from harness.cli import app
from harness.records import open_results
from harness.schema_gate import Gate, GateTask

SUITE = """
schema = 1
name = "{name}"

[model]
path = "models/any"

[data.text]
source = "builtin"
seq_len = 64

[[variant]]
name = "bf16"
method = "bf16"

[engine]
kind = "hf"

[diagnostics]
data = "text"
samples = 2
"""
GATE = Gate(kernels=("w4a4_emulation",), task=(GateTask(name="maths", margin=3, tier="critical"),))
RUN = "20260101-000000-aaaaaaaa"


class House:
    """A results folder, suites, and what a stand-in for `harness run` does for each."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root, self.results = root, root / "results"
        open_results(self.results)
        self._does: dict[str, str] = {}
        monkeypatch.setattr(nightly, "command", lambda suite, results: ["bash", "-c", self._does[suite.stem]])

    def suite(self, name: str, does: str) -> Path:
        path = self.root / f"{name}.toml"
        path.write_text(SUITE.format(name=name))
        self._does[name] = does
        return path

    def run(self, name: str, *, ptq_right=360, n=400, run=RUN, gate=GATE, about=None, folder=None) -> Path:
        right = {"bf16": 9 * n // 10, "ptq": ptq_right}
        samples = {
            (v, "maths"): [sample(doc, 1.0 if doc < k else 0.0) for doc in range(n)] for v, k in right.items() if k is not None
        }
        resolved = {"model": {"thinking": None}, "gate": gate.model_dump(mode="json") if gate else None}
        changes = {"suite": name, "resolved": resolved, "gaps": []} | (about or {})
        return write_run((folder or self.results) / name / run, samples, about_changes=changes)

    def finished(self, name: str, **about) -> Path:
        """A suite of which everything is stored."""
        run = self.run(name, **about)
        return self.suite(name, f"echo 'all stored'; echo 'Results: {run}'")

    def night(self, *arguments: object) -> tuple[int, list[str]]:
        done = CliRunner().invoke(app, ["nightly", *map(str, arguments), "--results", str(self.results)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output.splitlines()

    def history(self) -> list[dict]:
        path = self.results / "nightly.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def house(tmp_path, monkeypatch):
    return House(tmp_path, monkeypatch)


def test_a_night_in_which_all_is_well_says_so_in_few_lines_and_builds_the_site(house):
    status, said = house.night(house.finished("one"))
    assert status == 0
    assert said[0] == f"one: GO; run {RUN} (nothing changed)"
    assert said[1] == "  ptq: GO"
    assert "  ptq against bf16: 1 figure within the noise" in said
    assert said[-1] == f"site: {house.results / 'site' / 'index.html'}"
    assert len(said) == 6
    assert (house.results / "site" / "index.html").is_file() and (house.results / "LEADERBOARD.md").is_file()
    (line,) = house.history()
    assert (line["suite"], line["run"], line["status"], line["verdicts"], line["is_new"]) == (
        "one",
        RUN,
        0,
        {"ptq": "GO"},
        False,
    )
    assert line["error"] is None and line["schema"] == 1


def test_a_run_that_the_night_made_is_told_as_new(house):
    staged = house.run("one", folder=house.root / "staged")
    target = house.results / "one" / RUN
    suite = house.suite("one", f"mkdir -p {target.parent} && mv {staged} {target} && echo 'Results: {target}'")
    status, said = house.night(suite)
    assert status == 0
    assert said[0].startswith(f"one: GO; run {RUN} (new, ")
    assert house.history()[0]["is_new"] is True


def test_the_history_is_appended_to(house):
    suite = house.finished("one")
    house.night(suite)
    house.night(suite)
    first, second = house.history()
    assert first["when"] <= second["when"]


def test_a_candidate_that_fails_is_no_go_with_the_reason_and_its_files(house):
    status, said = house.night(house.finished("one", ptq_right=300))
    assert status == 1
    assert said[0] == f"one: NO-GO; run {RUN} (nothing changed)"
    assert said[1] == "  ptq: NO-GO"
    assert said[2].startswith("    maths: 15.0 points worse")
    assert said[3].startswith("  ptq against bf16: maths -15.0 ±")
    latest = house.results / "nightly" / "latest"
    assert sorted(path.name for path in latest.iterdir()) == ["one.xml", "summary.md"]
    assert (latest / "one.xml").read_text() == (house.results / "one" / RUN / "verdict.xml").read_text()
    summary = (latest / "summary.md").read_text()
    assert "\n".join(said) in summary
    assert (house.results / "one" / RUN / "verdict.md").read_text().rstrip() in summary


def test_a_suite_without_a_policy_is_not_judged_and_says_so(house):
    status, said = house.night(house.finished("one", gate=None, ptq_right=300))
    assert status == 0
    assert said[:2] == [
        f"one: not judged; run {RUN} (nothing changed)",
        "  not judged: its suite has no [gate], and no --policy is given",
    ]
    assert house.history()[0]["verdicts"] == {}


@pytest.mark.parametrize("fails_between", [False, True])
def test_a_suite_that_loses_its_gate_does_not_turn_green(house, fails_between):
    house.night(house.finished("one", ptq_right=300))
    if fails_between:
        house.night(house.suite("one", "false"))
    shutil.rmtree(house.results / "one")
    status, said = house.night(house.finished("one", gate=None, ptq_right=300))
    assert status == 3
    assert said[1] == "  not judged: no [gate] any more, and no --policy (the run before was judged)"
    assert house.history()[-1]["status"] == 3


def test_the_same_quantized_weights_asked_again_are_no_candidate_of_a_night(house):
    run = house.run("one")
    about = json.loads((run / "run.json").read_text())
    about["variants"].append(about["variants"][1] | {"name": "ptq-again", "sampling_seed": 7})
    (run / "run.json").write_text(json.dumps(about))
    status, said = house.night(house.suite("one", f"echo 'Results: {run}'"))
    assert status == 0 and house.history()[0]["verdicts"] == {"ptq": "GO"}
    assert not [line for line in said if "ptq-again" in line]


def test_a_policy_that_is_given_judges_every_suite(house):
    policy = house.root / "policy.toml"
    policy.write_text('schema = 1\nkernels = ["w4a4_emulation"]\n[[task]]\nname = "maths"\nmargin = 40\ntier = "critical"\n')
    status, said = house.night(house.finished("one", ptq_right=300), "--policy", policy)
    assert status == 0
    assert said[0].startswith("one: GO")


def test_a_policy_that_names_a_candidate_is_not_asked_about_the_others(house):
    run = house.run("one", gate=GATE.model_copy(update={"candidate": "qad"}), ptq_right=300)
    about = json.loads((run / "run.json").read_text())
    about["variants"].append(about["variants"][1] | {"name": "qad", "method": "checkpoint"})
    (run / "run.json").write_text(json.dumps(about))
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    rows.append(rows[0] | {"variant": "qad", "kernels": rows[1]["kernels"]})
    (run / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = (run / "scores" / "bf16.maths.jsonl").read_text()
    (run / "scores" / "qad.maths.jsonl").write_text(scores.replace('"variant": "bf16"', '"variant": "qad"'))
    status, _ = house.night(house.suite("one", f"echo 'Results: {run}'"))
    assert house.history()[0]["verdicts"] == {"qad": "GO"}
    assert status == 0


def test_a_run_without_a_quantized_variant_is_not_judged(house):
    status, said = house.night(house.finished("one", ptq_right=None))
    assert status == 0
    assert said[1] == "  not judged: no variant is quantized"


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("echo working; echo 'harness: models/any: there is no such model' >&2; echo 'give a folder' >&2; exit 2", "models/any: there is no such model\n  give a folder"),
        ("echo 'Traceback (most recent call last):'; echo 'ZeroDivisionError: a bug'; exit 1", "the run ended with status 1: ZeroDivisionError: a bug"),
        ("echo tokens; kill -KILL $$", "the run was killed by SIGKILL: tokens"),
        ("kill -TERM $$", "the run was killed by SIGTERM ("),
        ("echo 'interrupted; kept'; exit 130", "the run ended with status 130: interrupted; kept"),
        ("true", "the run named no results folder"),
    ],
)  # fmt: skip
def test_a_suite_that_fails_does_not_stop_the_others_and_its_error_is_told_at_the_end(house, does, message):
    status, said = house.night(house.suite("bad", does), house.finished("good"))
    assert status == 2
    assert said[0].startswith("bad: failed, see the end")
    assert said[1].startswith("good: GO")
    end = "\n".join(said).partition("error: bad: ")[2]
    assert end.startswith(message)
    (log,) = (house.results / "nightly" / "logs").glob("*-bad.log")
    assert f"(all that it printed: {log})" in end
    assert [(line["suite"], line["status"]) for line in house.history()] == [("bad", 2), ("good", 0)]


def test_a_suite_with_mistakes_is_not_run_and_the_others_are(house):
    wrong = house.root / "wrong.toml"
    wrong.write_text(SUITE.format(name="wrong").replace("samples = 2", "sample = 2"))
    status, said = house.night(house.root / "none.toml", wrong, house.finished("good"))
    assert status == 2
    assert "good: GO" in "\n".join(said)
    assert any(line.startswith(f"error: {house.root / 'none.toml'}: ") and "no such suite" in line for line in said)
    assert any("diagnostics.sample: unknown key; did you mean samples?" in line for line in said)
    assert [(line["suite"], line["status"]) for line in house.history()] == [(None, 2), (None, 2), ("good", 0)]


def test_trainings_that_one_gpu_of_several_would_do_are_said_before_the_night_begins(house, tiny_model, monkeypatch):
    from conftest import SUITE as TINY

    suite = house.finished("one")
    suite.write_text(TINY.format(model=tiny_model).replace('name = "tiny"', 'name = "one"'))
    plain = house.finished("two")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    _, said = house.night(suite, plain)
    assert said[0].startswith(
        f"{suite}: qad: train, qat: train: without torchrun on one of 4 GPUs, for which it may be too large; "
    )
    assert said[0].endswith(f"first: torchrun --nproc-per-node 4 --module harness run {suite} (docs/multi-gpu.md)")
    assert said[1].startswith("one: ") and "torchrun" not in "".join(said[1:])
    for visible in ("0", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert house.night(suite, plain)[1][0].startswith("one: ")


def test_two_suites_of_one_name_are_one_too_many(house):
    suite = house.finished("one")
    other = house.root / "copy.toml"
    shutil.copy(suite, other)
    status, said = house.night(suite, other)
    assert status == 2
    assert any(f"{other}: another suite of this night is named 'one', too" in line for line in said)


def test_a_bug_in_one_suite_keeps_its_traceback_and_the_others_go_on(house, monkeypatch):
    real = nightly.quantized

    def fail(run):
        if run.about["suite"] == "bad":
            raise ZeroDivisionError("a bug")
        return real(run)

    monkeypatch.setattr(nightly, "quantized", fail)
    status, said = house.night(house.finished("bad"), house.finished("good"))
    assert status == 2
    assert any(line.startswith("good: GO") for line in said)
    assert "error: bad: Traceback (most recent call last):" in said
    assert "ZeroDivisionError: a bug" in said


def test_missing_responses_are_named_and_are_status_4(house):
    run = house.run("one", about={"gaps": [{"variant": "ptq", "task": "maths", "n_missing": 1200}]})
    status, said = house.night(house.suite("one", f"echo 'Results: {run}'; exit 4"))
    assert status == 4
    assert "  ptq maths: 1,200 responses are missing; the next night asks for them again" in said
    assert house.history()[0]["has_gaps"] is True


def test_a_run_that_was_invalidated_is_inconclusive_whatever_its_scores(house):
    suite = house.finished("one", gate=None)
    invalidate(house.results / "one" / RUN, reason="wrong prompts")
    status, said = house.night(suite)
    assert status == 3
    assert any("the run was invalidated (wrong prompts); to measure anew" in line for line in said)


@pytest.mark.parametrize(
    ("statuses", "first"), [((0, 3, 4, 1, 2), 2), ((0, 3, 4, 1), 1), ((0, 3, 4), 4), ((3, 0), 3), ((0, 0), 0), ((), 0)]
)
def test_the_worst_status_is_that_of_the_night(statuses, first):
    assert nightly.worst(statuses) == first


def test_what_moved_since_the_accepted_run_is_named(house):
    accept(house.run("one", run="older"), reason="ships")
    status, said = house.night(house.finished("one", ptq_right=340))
    assert status in (1, 3)
    (line,) = [line for line in said if "since the accepted run older" in line]
    assert "ptq maths -5.0" in line and "1 figure within the noise" in line
    (record,) = house.history()
    assert record["accepted"] == "older"
    assert [shift["variant"] for shift in record["drift"]["shifts"]] == ["ptq"]


def test_the_accepted_run_itself_is_not_compared_with_itself(house):
    suite = house.finished("one")
    accept(house.results / "one" / RUN, reason="ships")
    assert "  it is the accepted run" in house.night(suite)[1]


def test_an_accepted_run_that_was_changed_is_named_and_not_compared_with(house):
    older = house.run("one", run="older")
    accept(older, reason="ships")
    (older / "tasks.jsonl").write_text((older / "tasks.jsonl").read_text() + "\n")
    status, said = house.night(house.finished("one"))
    assert status == 0
    assert any("the accepted run older is not trusted" in line for line in said)
    assert house.history()[0]["accepted"] is None


def test_the_site_goes_where_it_is_told_and_its_failure_is_status_2(house, monkeypatch):
    suite = house.finished("one")
    status, said = house.night(suite, "--out", house.root / "www")
    assert status == 0
    assert said[-1] == f"site: {house.root / 'www' / 'index.html'}"
    (house.root / "photos").mkdir()
    (house.root / "photos" / "cat.jpg").write_text("cat")
    status, said = house.night(suite, "--out", house.root / "photos")
    assert status == 2
    assert said[-1].startswith("error: the leaderboard was not built: ")
    assert len(house.history()) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda results: (results / "nightly.jsonl").write_text('{"schema": 1'), "nightly.jsonl: line 1 is cut short"),
        (lambda results: (results / "nightly.jsonl").write_text('{"schema": 2}\n'), "nightly.jsonl: line 1 has schema 2, this version reads 1"),
        (lambda results: (results / "releases.jsonl").write_text("x\n"), "releases.jsonl: line 1 is damaged"),
        (lambda results: (results / "harness-results.json").unlink(), "not a results folder of this harness"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_hold_the_night_is_refused_before_anything_is_run(house, spoil, message):
    suite = house.suite("one", f"touch {house.root / 'was run'}")
    (house.results / "notes").write_text("")
    spoil(house.results)
    status, said = house.night(suite)
    assert status == 2
    assert message in "\n".join(said)
    assert not (house.root / "was run").exists()


def test_a_policy_with_a_mistake_is_refused_before_anything_is_run(house):
    policy = house.root / "policy.toml"
    policy.write_text('schema = 1\nkernel = ["native"]\n')
    status, said = house.night(house.suite("one", f"touch {house.root / 'was run'}"), "--policy", policy)
    assert status == 2
    assert "kernel: unknown key; did you mean kernels?" in "\n".join(said)
    assert not (house.root / "was run").exists()
    assert not house.history()


def test_a_night_under_torchrun_is_refused(house, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    status, said = house.night(house.suite("one", f"touch {house.root / 'was run'}"))
    assert status == 2
    assert said[0].startswith("harness: nightly is one process, and starts its runs itself; start it without torchrun")
    assert not (house.root / "was run").exists()


def test_a_second_night_on_the_same_results_refuses_and_touches_nothing(house):
    suite = house.finished("one")
    with (house.results / "nightly.lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 4711 since 2026-01-01T02:17:00+00:00\n")
        file.flush()
        status, said = house.night(suite)
    assert status == 2
    assert (
        "another nightly is under way there, or a run that it started (process 4711 since 2026-01-01T02:17:00+00:00)"
        in said[-1]
    )
    assert not house.history()
    assert house.night(suite)[0] == 0


STAND_IN = """
import shlex, sys
from pathlib import Path
from harness import cli, nightly
does = dict(pair.split("=", 1) for pair in sys.argv[2:])
nightly.command = lambda suite, results: ["bash", "-c", does[suite.stem]]
sys.argv = ["harness", "nightly", *(str(Path(sys.argv[1]) / f"{name}.toml") for name in does), "--results", str(Path(sys.argv[1]) / "results")]
try:
    cli.main()
finally:
    print(sorted({"torch", "lm_eval", "transformers", "matplotlib", "scipy.stats"} & set(sys.modules)))
"""


def started(house, **does):
    command = [sys.executable, "-c", STAND_IN, str(house.root), *(f"{name}={what}" for name, what in does.items())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_night_that_is_told_to_end_ends_its_run_and_keeps_what_was_done(house, number):
    done, running, kept = house.finished("one"), house.root / "running", house.root / "kept"
    house.suite("two", "")
    waits = f"trap 'sleep 0.3; touch {kept}; exit 130' TERM; touch {running}; for i in $(seq 1200); do sleep 0.05; done"
    process = started(house, one=f"echo 'Results: {house.results / done.stem / RUN}'", two=waits, three="exit 1")
    until(running.exists)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert kept.exists()  # the run was waited for
    assert printed.splitlines()[0].startswith("one: GO")
    assert "two: interrupted, after" in printed
    assert "interrupted; what was done is kept, the same command goes on from it" in errors
    assert "Traceback" not in errors
    assert [(line["suite"], line["status"]) for line in house.history()] == [("one", 0), ("two", 130)]
    assert printed.splitlines()[-1] == "[]"  # nothing heavy is loaded where suites are judged and compared


def test_a_second_signal_kills_a_run_that_does_not_end(house):
    house.suite("one", "")
    running, told = house.root / "running", house.root / "told"
    process = started(house, one=f"trap 'touch {told}' TERM; touch {running}; for i in $(seq 1200); do sleep 0.05; done")
    until(running.exists)
    process.terminate()
    until(told.exists)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_the_folder_stays_held_while_a_run_outlives_its_night(house):
    suite = house.finished("one")
    running, end = house.root / "running", house.root / "end"
    process = started(house, one=f"touch {running}; while [ ! -e {shlex.quote(str(end))} ]; do sleep 0.05; done")
    until(running.exists)
    process.kill()
    process.communicate(timeout=60)
    try:
        status, said = house.night(suite)
        assert status == 2
        assert f"a run that it started (process {process.pid} since" in said[-1]
    finally:
        end.touch()
    until(lambda: house.night(suite)[0] == 0)


def test_a_real_suite_goes_through_two_nights_and_the_second_does_nothing(tmp_path, tiny_model, text_at_hand, monkeypatch):
    from conftest import SUITE as TINY

    text_at_hand()
    text = TINY.format(model=tiny_model)
    for name in ("qat", "qad"):
        text = text.replace(f'[[variant]]\nname = "{name}"\nmethod = "{name}"\n', "")
    text = text[: text.index("[training]")] + text[text.index("[[variant]]") :]
    text += '\n[gate]\nkernels = ["w4a4_emulation"]\n[[gate.task]]\nname = "mini_math"\nmargin = 3\ntier = "critical"\n'
    suite, results = tmp_path / "tiny.toml", tmp_path / "results"
    suite.write_text(text)
    command = [sys.executable, "-m", "harness.cli", "nightly", str(suite), "--results", str(results)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    nights = [subprocess.run(command, capture_output=True, text=True, env=environment) for _ in range(2)]
    assert [night.returncode for night in nights] == [3, 3], nights[0].stdout + nights[0].stderr
    (run,) = (results / "tiny").iterdir()
    assert nights[0].stdout.startswith(f"tiny: INCONCLUSIVE; run {run.name} (new, ")
    assert nights[1].stdout.startswith(f"tiny: INCONCLUSIVE; run {run.name} (nothing changed)")
    assert "(limit)" in nights[0].stdout  # eight questions decide nothing
    assert (run / "verdict.json").is_file() and (results / "site" / "index.html").is_file()
    log = sorted((results / "nightly" / "logs").iterdir())[-1]
    assert "nothing to do, all" in log.read_text()
