"""What the comparisons of engines share: a suite run by the product's own command, and how far apart is too far."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def run_suite(text: str, name: str, results: Path) -> Path:
    """Run the suite `text`, called `name`; the folder of its newest run, below `results`/agree."""
    results.mkdir(parents=True, exist_ok=True)
    suite = results / f".{name}.toml"
    suite.write_text(text)
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "harness", "run", str(suite), "--results", str(results / "agree")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths})
    return sorted((results / "agree" / name).glob("*/run.json"))[-1].parent


def too_far(difference: float, stderr: float) -> str:
    """What is printed behind a difference of more than three standard errors; empty within them."""
    return "" if abs(difference) <= 3 * stderr else ": MORE THAN THREE STANDARD ERRORS"
