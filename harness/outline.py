"""What `harness plan` prints: stages, whether they are stored, requests, training tokens. No torch, no lm-eval."""

from __future__ import annotations

from pathlib import Path

from harness.plan import Plan, Stage, make_plan
from harness.run import is_done
from harness.store import Store, cache_folder
from harness.suite import load_suite


def outline(path: Path) -> list[str]:
    """Lines that describe the plan of the suite at `path`."""
    suite = load_suite(path)
    store = Store(cache_folder())
    plan = make_plan(suite, store)
    lines = [
        f"suite {suite.name}: model {suite.model.path} ({plan.source.origin})",
        *(f"note: {note}" for note in plan.source.notes),
    ]
    for stage in plan.stages:
        state = "external" if stage.is_external else "stored" if is_done(stage, store) else "to do"
        lines.append(f"  {state:8}  {stage.key[:12]}  {stage.label}{_size(plan, stage)}")
    n_done = sum(is_done(stage, store) for stage in plan.stages)
    lines.append(f"{n_done} of {len(plan.stages)} stages are stored")
    return lines


def _size(plan: Plan, stage: Stage) -> str:
    if stage.kind == "train" and stage.variant is not None and stage.variant.training is not None:
        settings = stage.variant.training
        return f" ({settings.tokens:,} tokens, {settings.batch_size} sequences a step, lr {settings.lr:g})"
    if stage.kind == "evaluate" and stage.task is not None:
        requests = n_requests(stage.task.name, stage.task.limit)
        return f" ({requests:,} requests)"
    if stage.kind == "diagnostics" and plan.suite.diagnostics is not None:
        return f" ({plan.suite.diagnostics.samples} sequences)"
    return ""


def n_requests(task: str, limit: int | None) -> int:
    """How many requests a task makes: questions, times choices where they are scored by likelihood."""
    from harness.tasks.sizes import REQUESTS_A_QUESTION, n_questions

    questions = n_questions(task)
    return (questions if limit is None else min(limit, questions)) * REQUESTS_A_QUESTION.get(task, 1)
