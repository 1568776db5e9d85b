"""Kill training at random moments, start the same command again, and compare the trained weights with those of a run left alone.

    python bench/kill_campaign.py [--kills 20] [--seed 0] [--folder FOLDER]

The model is tiny and random (that of the tests): what is tested is what lies on disk when a process dies. Each trial starts from the
stages before training, kills the command with signal 9 somewhere in its training, then runs it to its end. Before each kill the
dice decide how far training may get; a trial whose process was faster than the dice is thrown again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parent.parent
N_STEPS = 24
SUITE = """
schema = 1
name = "killed"

[model]
path = "{model}"

[quantization]
block_scales = "learned"
calibration = {{ data = "text", samples = 8 }}

[data.text]
source = "builtin"
seq_len = 512

[training]
tokens = {tokens}
batch_size = 2
micro_batch_size = 1
lr = 1e-3
loss_on = "all"
epochs = 4
checkpoint_every = 2
validate_every = 3
validation_samples = 2
select = "best_val"

[[variant]]
name = "bf16"
method = "bf16"

[[variant]]
name = "qad"
method = "qad"

[engine]
kind = "hf"

[diagnostics]
data = "text"
samples = 2
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--folder", type=Path, help="where to work; a temporary folder where left out")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        equal = campaign(given.folder or Path(temporary), kills=given.kills, seed=given.seed)
    print(f"{equal} of {given.kills} killed runs ended with the weights of the run that was left alone")
    sys.exit(0 if equal == given.kills else 1)


def campaign(folder: Path, *, kills: int, seed: int, n_steps: int = N_STEPS) -> int:
    """How many of `kills` killed runs, of `n_steps` steps or a few more, ended with identical weights."""
    suite = _suite(folder, n_steps)
    _finish(_start(suite, folder / "alone"))
    expected, _ = _trained(folder / "alone")
    dice, equal = random.Random(seed), 0
    for trial in range(1, kills + 1):
        work = folder / f"trial-{trial}"
        moment = None
        while moment is None:
            shutil.rmtree(work, ignore_errors=True)
            _without_training(folder / "alone", work)
            moment = _kill_in_training(suite, work, dice, n_steps)
        _finish(_start(suite, work))
        found, record = _trained(work)
        equal += found == expected
        print(
            f"{trial:3}: killed {moment}, went on from step {record['resumed_at']}: "
            f"{'identical' if found == expected else 'DIFFERENT'} weights",
            flush=True,
        )
        shutil.rmtree(work)
    return equal


def _suite(folder: Path, n_steps: int) -> Path:
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from conftest import build_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    suite = folder / "killed.toml"
    suite.write_text(SUITE.format(model=build_tiny_model(folder / "model"), tokens=1000 * n_steps))
    return suite


def _start(suite: Path, root: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli", "run", str(suite), "--results", str(root / "results")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HARNESS_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the command ended with status {process.returncode}:\n{output}")


def _kill_in_training(suite: Path, root: Path, dice: random.Random, n_steps: int) -> str | None:
    """Kill the command after a random number of checkpoints and a moment more; None where it ended before."""
    wanted, more = 2 * dice.randrange(0, n_steps // 2 - 1), dice.random() * 0.2
    process = _start(suite, root)
    reached = -1
    while reached < wanted and process.poll() is None:
        reached = _reached(root)
        time.sleep(0.002)
    time.sleep(more)
    if process.poll() is not None:
        process.communicate()
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return None if _train_stages(root) else f"at {more:.3f} s after the checkpoint of step {max(reached, 0)}"


def _reached(root: Path) -> int:
    """The step of the newest checkpoint, 0 where training has begun without one, -1 before."""
    runs = list((root / "cache" / "unfinished").glob("*"))
    steps = [int(path.name.removeprefix("step-")) for run in runs for path in run.glob("step-*")]
    return max(steps, default=0 if runs else -1)


def _trained(root: Path) -> tuple[dict[str, str], dict[str, int | None]]:
    """sha256 of every tensor of the one trained stage, by name, and its record.

    Not of the files: safetensors writes the entries of its metadata in another order in each process.
    """
    (stage,) = _train_stages(root)
    digests = {}
    for path in sorted((stage / "files").rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digests[f"{path.name}: {name}"] = hashlib.sha256(content).hexdigest()
    return digests, json.loads((stage / "stage.json").read_text())["result"]


def _train_stages(root: Path) -> list[Path]:
    records = (root / "cache" / "stages").glob("*/stage.json")
    return [path.parent for path in records if json.loads(path.read_text())["kind"] == "train"]


def _without_training(done: Path, root: Path) -> None:
    shutil.copytree(done / "cache", root / "cache")
    for stage in _train_stages(root):
        shutil.rmtree(stage)


if __name__ == "__main__":
    main()
