"""Every suite rehearsed, one after the other, each by the real command in a process of its own: seconds, exit status, what was found.

    python bench/rehearsals.py [SUITE ...] [--results DIR] [--limit SECONDS]

Prints a Markdown table. CPU seconds are those of all processes of a rehearsal, and the figure to compare on a machine that has other
work. Status 1 where a rehearsal ends without a table, takes longer than the limit, or finds a problem other than what suites leave open: commits, rows. No
network.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDERS = ("suites", "suites/released", "suites/ablations")
ENDED = re.compile(r"^REHEARSAL: (.*?), \d+ s; (.*)$", re.MULTILINE)
FAIR = (0, 4)
"""Exit statuses of a rehearsal that found no problem; 4: a part could not be rehearsed here."""
OPEN = re.compile(r"revision: |there is no such file")
"""Of a problem that the suite leaves to whoever runs it: a commit that was not found in public, rows of one's own."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--limit", type=float, default=300.0)
    given = parser.parse_args()
    suites = given.suites or [path for folder in FOLDERS for path in sorted(Path(folder).glob("*.toml"))]
    with tempfile.TemporaryDirectory() as temporary:
        results = given.results or Path(temporary) / "results"
        print("| suite | s | CPU s | status | result | notes |\n| --- | --- | --- | --- | --- | --- |", flush=True)
        found = [_rehearse(path, results, given.limit) for path in suites]
    return 0 if all(found) else 1


def _rehearse(path: Path, results: Path, limit: float) -> bool:
    """Print a row; whether it ended with a table, in time, without a problem."""
    began, used = time.monotonic(), _cpu_seconds()
    command = [sys.executable, "-m", "harness", "rehearse", str(path), "--results", str(results)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds, cpu = time.monotonic() - began, _cpu_seconds() - used
    ended = ENDED.search(done.stdout)
    has_table = "variant" in done.stdout and "REHEARSAL of" in done.stdout and ended is not None
    lines = done.stdout.splitlines()
    notes = [line for line in lines if line.startswith(("not rehearsed:", "problem:"))] or []
    notes += [line.strip() for line in lines if '"hf" in place of' in line]
    result = ended[1] if ended is not None else (done.stderr.strip().splitlines() or ["no table"])[-1]
    cells = [str(path), f"{seconds:.0f}", f"{cpu:.0f}", str(done.returncode), result, "; ".join(notes)]
    print("| " + " | ".join(cell.replace("|", "/")[:400] for cell in cells) + " |", flush=True)
    is_open = done.returncode == 1 and all(OPEN.search(line) for line in lines if line.startswith("problem:"))
    return has_table and (done.returncode in FAIR or is_open) and seconds <= limit


def _cpu_seconds() -> float:
    """Of all children that have ended, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
