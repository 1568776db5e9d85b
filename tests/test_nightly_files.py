"""The files to copy under docs/nightly/: what they start exists, and they are what their readers take them for."""

import configparser
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer
import yaml

from harness.cli import app

DOCS = Path(__file__).parent.parent / "docs"
FILES = DOCS / "nightly"
SERVICE, TIMER, SBATCH, WORKFLOW = (
    FILES / name for name in ("harness-nightly.service", "harness-nightly.timer", "nightly.sbatch", "nightly.yml")
)

USAGE_ERROR = typer.BadParameter.__base__
"""Of click, or of the copy of it that typer carries."""


def harness_commands(text: str) -> list[list[str]]:
    """The arguments of each call of harness in shell text, without redirections and what comes after the command."""
    found = []
    for line in text.splitlines():
        begin = re.search(r"(?:^|[\s;&|]|\.venv/bin/|exec )harness (?=[a-z])", line)
        if line.lstrip().startswith("#") or not begin:
            continue
        lexer = shlex.shlex(line[begin.end() :].strip("'"), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words = list(lexer)
        end = next((i for i, word in enumerate(words) if set(word) <= set("|&;<>")), len(words))
        found.append(words[:end])
    return found


def require_legal(arguments: list[str]) -> None:
    """Raises a usage error of the real command where a verb or an option does not exist; starts nothing."""
    command = typer.main.get_command(app)
    with command.make_context("harness", list(arguments)) as outer:
        _, verb, rest = command.resolve_command(outer, arguments)
        verb.make_context(verb.name, list(rest), parent=outer)


def test_a_verb_or_an_option_that_does_not_exist_is_found():
    require_legal(["nightly", "a.toml", "--results", "r"])
    for wrong in (["nigthly", "a.toml"], ["nightly", "a.toml", "--resutls", "r"], ["nightly"], ["accept", "run"]):
        with pytest.raises(USAGE_ERROR):
            require_legal(wrong)


def test_calls_are_found_as_shells_read_them():
    lines = (
        "cd /srv && .venv/bin/harness nightly a*.toml > x 2>&1 || cat x\nharness accept r --reason 'it ships' &\n# harness no\n"
    )
    assert harness_commands(lines) == [["nightly", "a*.toml"], ["accept", "r", "--reason", "it ships"]]


@pytest.mark.parametrize("path", [FILES / "crontab", SERVICE, SBATCH, WORKFLOW], ids=lambda path: path.name)
def test_each_file_starts_a_nightly_with_options_that_exist(path):
    text = path.read_text()
    if path is WORKFLOW:
        steps = [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]
        text = "\n".join(step["run"] for step in steps if "run" in step)
    (arguments,) = harness_commands(text)
    assert arguments[0] == "nightly" and "--results" in arguments
    require_legal(arguments)


def test_the_commands_of_the_manual_exist():
    blocks = re.findall(r"```\n(.*?)```", (DOCS / "nightly.md").read_text(), flags=re.DOTALL)
    commands = [
        words
        for block in blocks
        for words in harness_commands(re.sub(r"\[(--[^]]*)]", r"\1", block).replace("<run id>", "run"))
    ]
    assert {words[0] for words in commands} == {"nightly", "accept", "invalidate", "advise", "run"}
    for words in commands:
        require_legal(words)


def test_the_manual_names_every_file_and_no_other():
    linked = set(re.findall(r"\]\(nightly/([^)]+)\)", (DOCS / "nightly.md").read_text()))
    assert linked == {path.name for path in FILES.iterdir()}


def test_the_crontab_has_one_job_of_five_times_and_no_bare_percent_sign():
    lines = [line for line in (FILES / "crontab").read_text().splitlines() if line and not line.startswith("#")]
    jobs = [line for line in lines if not re.match(r"\w+=", line)]
    assert len(jobs) == 1
    assert re.fullmatch(r"(?:[\d*]+ ){5}cd .*", jobs[0])
    assert "%" not in jobs[0]
    assert subprocess.run(["bash", "-n"], input=jobs[0].split(" ", 5)[5], text=True).returncode == 0


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units():
    done = subprocess.run(["systemd-analyze", "verify", str(SERVICE), str(TIMER)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_units_belong_together_and_give_a_training_time_for_its_checkpoint():
    service, timer = (configparser.ConfigParser(interpolation=None, strict=False) for _ in range(2))
    service.optionxform = timer.optionxform = str
    service.read(SERVICE)
    timer.read(TIMER)
    assert SERVICE.stem == TIMER.stem
    assert service["Service"]["Type"] == "oneshot"
    assert service["Service"]["KillMode"] == "mixed"  # the run gets SIGTERM from harness, and not twice
    assert service["Service"]["TimeoutStopSec"] == "15min"
    assert timer["Timer"]["Persistent"] == "true"
    assert timer["Install"]["WantedBy"] == "timers.target"
    assert subprocess.run(["bash", "-n"], input=service["Service"]["ExecStart"], text=True).returncode == 0


def test_the_workflow_is_one_that_runs_at_night_keeps_what_it_made_and_tells_when_it_fails():
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow[True]["schedule"] == [{"cron": "17 2 * * *"}]  # YAML 1.1 reads the key `on` as true
    assert workflow["concurrency"]["cancel-in-progress"] is False
    job = workflow["jobs"]["nightly"]
    assert job["env"]["HARNESS_CACHE"] == "${{ github.workspace }}/cache"
    steps = job["steps"]
    uses = {step["uses"].split("@")[0]: step for step in steps if "uses" in step}
    restored, saved = uses["actions/cache/restore"]["with"], uses["actions/cache/save"]["with"]
    assert restored["path"].split() == saved["path"].split() == ["cache", "results"]
    assert saved["key"].startswith(restored["restore-keys"])
    after = steps[next(i for i, step in enumerate(steps) if "harness nightly" in step.get("run", "")) + 1 :]
    assert after and all(step["if"] == "always()" for step in after)
    assert uses["actions/upload-artifact"]["with"]["path"].split() == [
        "results/nightly/latest",
        "results/site",
        "results/LEADERBOARD.md",
    ]
    for step in steps:
        if "run" in step:
            assert subprocess.run(["bash", "-n"], input=step["run"], text=True).returncode == 0
    pages = workflow["jobs"]["pages"]
    assert pages["needs"] == "nightly" and "vars.HARNESS_PAGES == 'true'" in pages["if"]


@pytest.fixture
def submit(tmp_path):
    """Starts the Slurm script as Slurm would, with stand-ins; returns the process and a function that reads what was called."""
    stand_ins = {
        "scontrol": 'echo "scontrol $*" >> "$LOG"',
        "harness": 'echo "harness $*" >> "$LOG"; trap "sleep 0.2; echo kept >> \\"$LOG\\"; exit 130" TERM; '
        'for i in $(seq $TICKS); do sleep 0.05; done; exit "$STATUS"',
    }
    for name, body in stand_ins.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    log = tmp_path / "log"

    def start(*, ticks, status=0, restart=0, suites=("a.toml", "b c.toml"), **more):
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "LOG": str(log),
            "HARNESS_CACHE": str(tmp_path / "cache"),
            "SLURM_JOB_ID": "4711",
            "SLURM_RESTART_COUNT": str(restart),
            "TICKS": str(ticks),
            "STATUS": str(status),
            **more,
        }
        process = subprocess.Popen(
            ["bash", str(SBATCH), *suites], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return process, lambda: log.read_text().splitlines() if log.exists() else []

    return start


def until_running(called):
    deadline = time.monotonic() + 20
    while not called() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)


def test_the_slurm_script_is_legal_bash():
    assert subprocess.run(["bash", "-n", str(SBATCH)]).returncode == 0


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_the_slurm_job_ends_with_the_status_of_the_night(submit, status):
    process, called = submit(ticks=1, status=status)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert called() == ["harness nightly a.toml b c.toml --results results"]


def test_near_the_time_limit_the_night_is_ended_and_queued_again(submit):
    process, called = submit(ticks=400, restart=2)
    until_running(called)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert called()[1:] == ["kept", "scontrol requeue 4711"]
    assert "restart 3 of at most 5" in printed
    assert process.returncode == 0


def test_a_night_is_not_queued_again_without_end(submit):
    process, called = submit(ticks=400, restart=5)
    until_running(called)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert called()[1:] == ["kept"]
    assert process.returncode == 130
    assert "not queued again" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"HARNESS_CACHE": ""}, "set it to a folder that outlives the job"),
        ({"suites": ()}, "give suites, such as suites/*.toml"),
    ],
)
def test_the_slurm_job_starts_nothing_without_what_it_needs(submit, changes, message):
    process, called = submit(ticks=1, **changes)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert message in printed
    assert called() == []
