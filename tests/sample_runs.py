"""Run folders made by hand, with sample rows as scoring writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from harness.records import SCHEMA, write_samples


def sample(doc: int, score: float | None = 1.0, *, task: str = "maths", repeat: int = 0, **changes: Any) -> dict[str, Any]:
    """One answered question; score None: its response is missing."""
    is_missing = score is None
    row = {
        "schema": SCHEMA,
        "task": task,
        "subtask": task,
        "doc": doc,
        "question": hashlib.sha256(f"{task} question {doc}".encode()).hexdigest(),
        "requests": [hashlib.sha256(f"{task} request {doc}".encode()).hexdigest()],
        "cluster": str(doc),
        "repeat": repeat,
        "seed": None,
        "target": str(2 * doc),
        "stops": [],
        "response": None if is_missing else [f"It is {2 * doc}."],
        "answer": {} if is_missing else {"boxed": str(2 * doc)},
        "metrics": {"exact_match": score},
        "scorer": f"{task}@1:abc",
        "finish_reason": None if is_missing else ["stop"],
        "n_tokens": None if is_missing else 7,
        "is_incomplete": None if is_missing else False,
        "is_truncated": None if is_missing else False,
        "missing": "HTTP 500 after 5 tries" if is_missing else None,
        "seconds": 0.5,
    }
    return row | changes


def write_run(
    folder: Path,
    samples: dict[tuple[str, str], list[dict[str, Any]]],
    *,
    publishable: bool = True,
    thinking: dict[str, Any] | None = None,
    prompts: dict[int, str] | None = None,
    excluded: dict[int, str] | None = None,
) -> Path:
    """A run with these samples by (variant, task), the rows that go with them, and prompts: given, or made up, by question."""
    variants = list(dict.fromkeys(variant for variant, _ in samples))
    about = {
        "schema": SCHEMA,
        "suite": "hand",
        "run": folder.name,
        "status": "complete",
        "plan": "0",
        "model": {"notes": []},
        "resolved": {"model": {"thinking": thinking}},
        "variants": [{"name": name, "method": name} for name in variants],
    }
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(about))
    rows = []
    for (variant, task), found in samples.items():
        write_samples(folder / "samples" / f"{variant}.{task}.jsonl.zst", found)
        scores = [score for row in found if isinstance(score := row["metrics"]["exact_match"], float)]
        _write_asked(folder / "tasks" / task, found, prompts or {}, excluded or {})
        rows.append(
            {
                "schema": SCHEMA,
                "variant": variant,
                "task": task,
                "metric": "exact_match",
                "primary": "exact_match",
                "value": sum(scores) / len(scores) if scores else None,
                "stderr": 0.1,
                "n_scored": len(scores),
                "n_total": len(found),
                "incomplete_rate": 0.0,
                "kernels": {"linear": "bf16"},
                "is_partial": False,
                "version": 1,
                "flags": [],
                "repeats": 1,
                "n_questions": len(found),
                "publishable": publishable,
            }
        )
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("diagnostics", "diagnostics_sequences"):
        (folder / f"{name}.jsonl").write_text("")
    return folder


def _write_asked(folder: Path, rows: list[dict[str, Any]], prompts: dict[int, str], excluded: dict[int, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    docs = list(dict.fromkeys(row["doc"] for row in rows))
    asks = [{"doc": doc, "index": 0, "prompt": prompts.get(doc, f"What is {doc} plus {doc}?")} for doc in docs]
    write_samples(folder / "requests.jsonl.zst", asks)
    left_out = [{"doc": doc, "reason": reason} for doc, reason in excluded.items()]
    (folder / "task.json").write_text(json.dumps({"schema": SCHEMA, "excluded": left_out}))
