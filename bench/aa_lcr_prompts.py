"""All prompts of AA-LCR from its files to token ids: time and peak memory of the whole process, imports included.

    HARNESS_MIRROR=... python bench/aa_lcr_prompts.py --tokenizer FOLDER [--runs N]

Each run is a process of its own and does what the stage that prepares a task does: texts, prompts, the chat template of the
tokenizer in FOLDER, token ids, the files. Linux only: the peak is read through /proc.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak() -> float:
    """The peak of resident memory, in GiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def build(folder: Path) -> dict[str, float]:
    """Make every prompt; returns what was made and what it took. cpu_s: of this process, which a busy machine does not change."""
    began = time.monotonic()
    from harness.loading import load_tokenizer
    from harness.prepared import write_prepared
    from harness.prompts import prepare
    from harness.task_settings import plain_task

    prepared = prepare(plain_task("aa_lcr", None, None), load_tokenizer(folder), folder)
    prompts_s = time.monotonic() - began
    with tempfile.TemporaryDirectory() as scratch:
        write_prepared(Path(scratch), prepared)
    return {
        "questions": len(prepared.questions),
        "prompts": len(prepared.asks),
        "tokens": sum(len(ask.token_ids) for ask in prepared.asks),
        "longest": max(len(ask.token_ids) for ask in prepared.asks),
        "prompts_s": prompts_s,
        "cpu_s": time.process_time(),
        "peak_gib": peak(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model folder with a chat template")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="one run in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(build(arguments.tokenizer)))
        return
    command = [sys.executable, __file__, "--tokenizer", str(arguments.tokenizer), "--once"]
    runs = []
    for _ in range(arguments.runs):
        began = time.monotonic()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]) | {"process_s": time.monotonic() - began})
    first = runs[0]
    print(
        f"{first['prompts']} prompts of {first['questions']} questions, {first['tokens']:,} tokens, the longest {first['longest']:,}"
    )
    print("| | median | lowest | highest | runs |")
    print("| --- | --- | --- | --- | --- |")
    for key, what in (
        ("process_s", "whole process, s"),
        ("cpu_s", "CPU time, s"),
        ("prompts_s", "of it without writing the files, s"),
        ("peak_gib", "peak memory, GiB"),
    ):
        values = [run[key] for run in runs]
        print(f"| {what} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} | {len(values)} |")


if __name__ == "__main__":
    main()
