"""The Slurm template, run by a real shell with stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parent.parent / "docs" / "slurm" / "harness.sbatch"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "scontrol $*" >> "$LOG"; fi',
    "srun": 'shift; exec "$@"',
    "torchrun": 'echo "torchrun $*" >> "$LOG"; trap "sleep 0.3; echo checkpoint >> \\"$LOG\\"; exit 143" TERM; '
    'for i in $(seq $TICKS); do sleep 0.05; done; exit "$STATUS"',
}


@pytest.fixture
def submit(tmp_path):
    """Starts the template as Slurm would; returns the process and a function that reads what was called."""
    for name, body in STAND_INS.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    log = tmp_path / "log"

    def start(*, ticks: int, status: int = 0, restart: int = 0, **more: str):
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LOG": str(log),
            "HARNESS_CACHE": str(tmp_path / "cache"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_RESTART_COUNT": str(restart),
            "TICKS": str(ticks),
            "STATUS": str(status),
            **more,
        }
        command = ["bash", str(TEMPLATE), "suites/x.toml"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return process, lambda: log.read_text().splitlines() if log.exists() else []

    return start


def until_running(called) -> None:
    deadline = time.monotonic() + 20
    while not called() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)


def test_torchrun_runs_the_ordinary_command_with_a_rendezvous_on_the_first_node(submit):
    process, called = submit(ticks=1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    (line,) = called()
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 4711-0 --rdzv-endpoint node7:24711" in line
    assert line.endswith("--module harness run suites/x.toml --results results")


def test_near_the_time_limit_a_checkpoint_is_written_and_the_job_is_queued_again(submit):
    process, called = submit(ticks=400, restart=2)
    until_running(called)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert called()[1:] == ["checkpoint", "scontrol requeue 4711"]
    assert "restart 3 of at most 20" in printed
    assert process.returncode == 0


def test_a_job_that_fails_is_not_queued_again(submit):
    process, called = submit(ticks=1, status=2)
    process.communicate(timeout=30)
    assert process.returncode == 2
    assert len(called()) == 1


def test_restarts_have_a_limit(submit):
    process, called = submit(ticks=400, restart=20)
    until_running(called)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert called()[1:] == ["checkpoint"]
    assert process.returncode == 143
    assert "not queued again" in printed


def test_without_a_shared_cache_nothing_is_started(submit):
    process, called = submit(ticks=1, HARNESS_CACHE="")
    printed, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "set it to a folder that all nodes share" in printed
    assert called() == []


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "harness", "stage", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "import" in done.stdout and "export" in done.stdout
