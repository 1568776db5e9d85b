"""Run folders made by hand, with sample rows as scoring writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from harness.records import SCHEMA, write_samples
from harness.score_files import write_scores


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
    row_changes: dict[tuple[str, str] | str, dict[str, Any]] | None = None,
    variant_changes: dict[str, dict[str, Any]] | None = None,
    about_changes: dict[str, Any] | None = None,
    diagnostics: list[dict[str, Any]] | None = None,
    sequences: list[dict[str, Any]] | None = None,
) -> Path:
    """A finished run with these samples by (variant, task), the rows and scores that go with them, and prompts: given, or made up, by question.

    A variant's method is its name. row_changes: of rows of tasks.jsonl, by (variant, task), or by variant or task for all of it.
    variant_changes: of a variant's record. about_changes: of run.json. diagnostics, sequences: their rows, but for the schema.
    """
    variants = list(dict.fromkeys(variant for variant, _ in samples))
    about = {
        "schema": SCHEMA,
        "suite": "hand",
        "run": folder.name,
        "status": "complete",
        "rehearsal": False,
        "plan": "0",
        "model": {"notes": []},
        "resolved": {"model": {"thinking": thinking}},
        "variants": [{"name": name, "method": name} | (variant_changes or {}).get(name, {}) for name in variants],
    } | (about_changes or {})
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(about))
    rows = []
    for (variant, task), found in samples.items():
        write_samples(folder / "samples" / f"{variant}.{task}.jsonl.zst", found)
        scores = [score for row in found if isinstance(score := row["metrics"]["exact_match"], float)]
        changes = row_changes or {}
        by_doc: dict[int, list[float]] = {}
        for row in found:
            by_doc.setdefault(row["doc"], [])
            by_doc[row["doc"]] += [score] if isinstance(score := row["metrics"]["exact_match"], float) else []
        means = [sum(each) / len(each) for each in by_doc.values() if each]
        _write_asked(folder / "tasks" / task, found, prompts or {}, excluded or {})
        rows.append(
            {
                "schema": SCHEMA,
                "variant": variant,
                "task": task,
                "metric": "exact_match",
                "primary": "exact_match",
                "value": sum(means) / len(means) if means else None,
                "unit": "share",
                "higher_is_better": True,
                "stderr": 0.1,
                "n_scored": len(scores),
                "n_total": len(found),
                "incomplete_rate": 0.0,
                "kernels": {"linear": "bf16" if variant.startswith("bf16") else "w4a4_emulation", "kv_cache": "bf16"},
                "judge": None,
                "engine": {"engine": "hf", "version": 1},
                "sampling_seed": 0,
                "scorer": found[0]["scorer"] if found else None,
                "n_missing": sum(row["missing"] is not None for row in found),
                "truncated_rate": 0.0,
                "mean_tokens": 7.0,
                "p95_tokens": 7.0,
                "is_partial": False,
                "version": 1,
                "flags": [],
                "repeats": len({row["repeat"] for row in found}),
                "n_questions": len({row["doc"] for row in found}),
                "publishable": publishable,
                **changes.get(variant, {}),
                **changes.get(task, {}),
                **changes.get((variant, task), {}),
            }
        )
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, given in (("diagnostics", diagnostics), ("diagnostics_sequences", sequences)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"schema": SCHEMA} | row) + "\n" for row in given or ()))
    write_scores(folder, rows)
    return folder


def _write_asked(folder: Path, rows: list[dict[str, Any]], prompts: dict[int, str], excluded: dict[int, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    docs = list(dict.fromkeys(row["doc"] for row in rows))
    asks = [{"doc": doc, "index": 0, "prompt": prompts.get(doc, f"What is {doc} plus {doc}?")} for doc in docs]
    write_samples(folder / "requests.jsonl.zst", asks)
    left_out = [{"doc": doc, "reason": reason} for doc, reason in excluded.items()]
    (folder / "task.json").write_text(json.dumps({"schema": SCHEMA, "excluded": left_out}))
