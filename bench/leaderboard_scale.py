"""What `harness leaderboard` takes on thousands of made-up runs: cold, with nothing new, with one more run.

    python bench/leaderboard_scale.py [--runs 2000] [--tasks 10] [--questions 20] [--keep FOLDER]

Each run has BF16 and three quantized variants, records as the harness writes them (a stage a variant and task with its provenance), two
trainings of 100 steps, and text-free scores of every question. Asked for: under 20 s and 1 GiB cold, under 3 s with one more run; both are
of whole processes. Reading scores by question is most of a cold build: it grows with --questions, and is paid once a run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = (("bf16", "bf16"), ("ptq", "w4a4_emulation"), ("qat", "w4a4_emulation"), ("qad", "w4a4_emulation"))
PACKAGES = dict.fromkeys(
    ("accelerate", "datasets", "gguf", "lm-eval", "numba", "safetensors", "torch", "transformers", "vllm"), "1.0"
)
PROVENANCE = {"cpu": "a CPU", "device": "cpu-x86_64", "packages": PACKAGES, "platform": "Linux", "python": "3.11.7"}
BASE = {"bf16": 0.62, "ptq": 0.55, "qat": 0.585, "qad": 0.60}


def make_run(
    results: Path, number: int, *, suite: str = "nightly", tasks: int = 10, questions: int = 20, **changes: Any
) -> Path:
    """Write one complete run; the same number is the same run. changes: keys of run.json to set."""
    draw = random.Random(number)
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime(1_700_000_000 + 86_400 * number))
    folder = results / suite / f"{moment}-{digest[:8]}"
    for part in ("training", "scores"):
        (folder / part).mkdir(parents=True)
    names = [f"task_{i}" for i in range(tasks)]
    about = _about(folder.name, suite, digest, names) | changes
    rows, measured = [], []
    for variant, kernel in VARIANTS:
        for name in names:
            scores = [int(draw.random() < BASE[variant] - 0.02 * (names.index(name) % 5)) for _ in range(questions)]
            answered = [{"variant": variant, "task": name} | _question(name, doc, s) for doc, s in enumerate(scores)]
            _write_lines(folder / "scores" / f"{variant}.{name}.jsonl", answered)
            rows.append(_row(variant, kernel, name, scores))
        kl = {"bf16": 0.0, "ptq": 0.09, "qat": 0.12, "qad": 0.04}[variant] * draw.uniform(0.97, 1.03)
        part = {
            "kl": kl,
            "kl_stderr": kl / 40,
            "ce": 2.3 + kl,
            "ppl": 10.0,
            "top1": 1 - kl,
            "n_tokens": 10_000,
            "n_sequences": 100,
        }
        measured.append({"schema": 1, "variant": variant, "kernels": {"linear": kernel}, "all": part, "response": part})
    for variant in ("qat", "qad"):
        steps = [
            {"schema": 1, "step": i, "loss": 3 / (1 + i) + draw.random(), "kl": None, "ce": 2.0, "lr": 1e-4} for i in range(100)
        ]
        _write_lines(folder / "training" / f"{variant}.jsonl", steps)
    _write_lines(folder / "tasks.jsonl", rows)
    _write_lines(folder / "diagnostics.jsonl", measured)
    (folder / "run.json").write_text(json.dumps(about, indent=1, sort_keys=True))
    return folder


def _about(run: str, suite: str, digest: str, names: list[str]) -> dict[str, Any]:
    labels = [f"{variant}: {name}" for variant, _ in VARIANTS for name in names]
    stages = [
        {
            "kind": kind,
            "label": label + end,
            "key": digest,
            "digest": digest,
            "inputs": {},
            "seconds": 1.5,
            "provenance": PROVENANCE,
        }
        for label in labels
        for kind, end in (("evaluate", ""), ("score", ": score"))
    ]
    return {
        "schema": 1,
        "suite": suite,
        "run": run,
        "status": "complete",
        "plan": digest[:12],
        "gaps": [],
        "imported": [],
        "model": {"path": "org/a-model", "fingerprint": "hub:abc", "origin": "hub", "notes": []},
        "resolved": {
            "tasks": [{"name": name, "limit": None, "repeats": 1, "sampling": {}, "seed": 0} for name in names],
            "engine": {"kind": "hf", "args": {"batch_size": 8}},
            "model": {"path": "org/a-model", "thinking": None, "system_prompt": None},
        },
        "data": {},
        "variants": [
            {"name": variant, "method": variant, "group": variant, "bits_per_weight": 16.0 if variant == "bf16" else 4.6,
             "quantized": [f"model.layers.{i}.mlp.up_proj" for i in range(60)] if variant != "bf16" else []}
            for variant, _ in VARIANTS
        ],
        "stages": stages,
        "provenance": PROVENANCE,
    }  # fmt: skip


def _row(variant: str, kernel: str, task: str, scores: list[int]) -> dict[str, Any]:
    n, mean = len(scores), sum(scores) / len(scores)
    return {
        "schema": 1,
        "variant": variant,
        "task": task,
        "metric": "acc",
        "primary": "acc",
        "value": mean,
        "stderr": (mean * (1 - mean) / max(1, n - 1)) ** 0.5,
        "n_scored": n,
        "n_total": n,
        "unit": "share",
        "n_questions": n,
        "n_missing": 0,
        "repeats": 1,
        "version": 1,
        "scorer": f"{task}@1:abc",
        "kernels": {"linear": kernel, "kv_cache": "bf16"},
        "flags": [],
        "judge": None,
        "is_partial": False,
        "incomplete_rate": 0.0,
        "truncated_rate": 0.0,
        "mean_tokens": 12.0,
        "publishable": False,
    }


def _question(task: str, doc: int, score: int) -> dict[str, Any]:
    digest = hashlib.sha256(f"{task} {doc}".encode()).hexdigest()
    return {
        "schema": 1,
        "doc": doc,
        "question": digest,
        "cluster": digest[:16],
        "subtask": task,
        "scores": [float(score)],
        "requests": [digest],
        "seeds": [0],
        "n_tokens": [12],
        "incomplete": [False],
        "truncated": [False],
        "missing": [None],
    }


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def measure(results: Path) -> tuple[float, float]:
    """Seconds and peak GiB of the whole command."""
    command = [sys.executable, "-m", "harness", "leaderboard", str(results)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = process.communicate()[0]
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"harness leaderboard ended with {process.returncode}: {said}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def main() -> None:
    """Make the runs, build three times, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="Make the runs here, and leave them and the site; a folder that is missing.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = asked.keep or Path(scratch) / "results"
        for number in range(asked.runs):
            make_run(results, number, tasks=asked.tasks, questions=asked.questions)
        print(f"{asked.runs:,} runs × {asked.tasks} tasks × {len(VARIANTS)} variants, {asked.questions} questions a task")
        print("| build | seconds | peak GiB so far |")
        print("| --- | --- | --- |")
        for what in ("cold", "nothing new", "one more run"):
            if what == "one more run":
                make_run(results, asked.runs, tasks=asked.tasks, questions=asked.questions)
            seconds, peak = measure(results)
            print(f"| {what} | {seconds:.2f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
