"""Runs in memory for the release gate: scores by variant and task, everything else as it should be, unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.evidence import Answers, Question, RunEvidence
from harness.schema_gate import Gate

Scores = Sequence[Sequence[float | None]]
"""Of each question the scores of its repeats."""


@dataclass(frozen=True)
class Memory(RunEvidence):
    """Evidence that was never on a disk."""

    held: dict[tuple[str, str], Answers] = field(default_factory=dict)
    rows_of_sequences: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def sequences(self) -> dict[str, list[dict[str, Any]]]:
        return self.rows_of_sequences

    def answers(self, variant: str, task: str) -> Answers | None:
        return self.held.get((variant, task))


def answers(
    variant: str, task: str, scores: Scores, *, row: Mapping[str, Any] | None = None, n_clusters: int | None = None
) -> Answers:
    """What a variant made of a task: question i was asked the same of every variant."""
    questions = {}
    for doc, repeats in enumerate(scores):
        n = len(repeats)
        key = f"{task} {doc}"
        questions[key] = Question(
            key=key,
            doc=doc,
            question=key,
            cluster=str(doc if n_clusters is None else doc % n_clusters),
            subtask=task,
            scores=tuple(repeats),
            requests=(key,) * n,
            seeds=tuple(range(n)) if n > 1 else (None,),
            n_tokens=(10,) * n,
            incomplete=tuple(None if score is None else False for score in repeats),
            truncated=tuple(None if score is None else False for score in repeats),
            missing=tuple("timeout" if score is None else None for score in repeats),
        )
    present = [score for repeats in scores for score in repeats if score is not None]
    of_row = {
        "variant": variant,
        "task": task,
        "metric": "exact_match",
        "primary": "exact_match",
        "unit": "share",
        "higher_is_better": True,
        "value": sum(present) / len(present) if present else None,
        "n_scored": len(present),
        "n_total": sum(map(len, scores)),
        "n_questions": len(scores),
        "repeats": len(scores[0]) if scores else 1,
        "kernels": {"linear": "bf16" if variant.startswith("bf16") else "w4a4_emulation"},
        "judge": None,
        "engine": {"engine": "hf"},
        "scorer": f"{task}@1:abc",
        "version": 1,
        "is_partial": False,
        "flags": [],
    } | dict(row or {})
    return Answers(variant, task, of_row["metric"], of_row["unit"], of_row["higher_is_better"], questions, of_row)


def run_of(
    held: Sequence[Answers],
    *,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
    diagnostics: Mapping[str, Mapping[str, Any]] | None = None,
) -> Memory:
    """A complete run of these answers. variants: changes of their records, whose method is their name up to a dash."""
    names = list(dict.fromkeys([*(each.variant for each in held), *(variants or {})]))
    records = {name: {"name": name, "method": name.split("-")[0]} | dict((variants or {}).get(name, {})) for name in names}
    return Memory(
        folder=Path("made up"),
        about={"schema": 1, "suite": "hand", "run": "r", "status": "complete", "rehearsal": False, "resolved": {}}
        | dict(about or {}),
        variants=records,
        tasks=tuple(dict.fromkeys(each.task for each in held)),
        rows={(each.variant, each.task): each.row for each in held},
        diagnostics={name: dict(row) for name, row in (diagnostics or {}).items()},
        held={(each.variant, each.task): each for each in held},
    )


def policy(*tasks: Mapping[str, Any], **keys: Any) -> Gate:
    """A policy for these tasks, one critical task "maths" with a margin of 3 points if there are none."""
    given = tasks or ({"name": "maths"},)
    full = tuple({"margin": 3.0, "tier": "critical"} | dict(task) for task in given)
    return Gate.model_validate({"kernels": ("w4a4_emulation",), "task": full} | keys)


def right(n: int, n_right: int | None = None) -> list[list[float]]:
    """Single answers to n questions, the first n_right of them right."""
    return [[1.0 if i < (n if n_right is None else n_right) else 0.0] for i in range(n)]


def diagnostics_row(kl: float = 0.1, stderr: float | None = 0.01, n: int = 100, **changes: Any) -> dict[str, Any]:
    """A row of diagnostics.jsonl."""
    response = {"kl": kl, "kl_stderr": stderr, "n_sequences": n}
    return {"response": response, "kernels": {"linear": "w4a4_emulation"}, "saturated_share": 0.0} | changes
