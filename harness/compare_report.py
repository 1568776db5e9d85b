"""A comparison as a terminal shows it, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from harness.compare import Comparison, FigureComparison, TaskComparison
from harness.paired import PooledDifference
from harness.records import SCHEMA
from harness.table_cells import MISSING, in_unit
from harness.table_grid import Grid
from harness.table_text import print_grid

_FIGURES = {"kl": "KL", "ce": "CE", "top1": "top-1"}


def as_data(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON knows it, with a schema version; flips: questions that became (worse, better)."""
    tasks = [dataclasses.asdict(task) | {"is_comparable": task.is_comparable, "flips": task.flips} for task in comparison.tasks]
    return {"schema": SCHEMA, **dataclasses.asdict(comparison), "tasks": tasks, "refused": list(comparison.refused)}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print to a terminal, as many tables beside each other as it is wide."""
    for grid in _grids(comparison):
        print_grid(grid, console)
    for line in lines(comparison):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def render_markdown(comparison: Comparison) -> str:
    """The same tables and sentences as Markdown."""
    parts = []
    for grid in _grids(comparison):
        rows = [grid.columns, tuple("---" for _ in grid.columns), *grid.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
        parts += [f"**{grid.title}**", table]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines(comparison))]) + "\n"


def lines(comparison: Comparison) -> list[str]:
    """What the tables do not say: refusals, notes, how p-values were adjusted; the last line counts what was refused."""
    found = [f"{task.task}: not comparable. {refusal}" for task in comparison.tasks for refusal in task.refusals]
    found += [f"{', '.join(tasks)}: {note}." for note, tasks in _by_note(comparison).items()]
    tested = [task for task in comparison.tasks if task.p is not None]
    if tested:
        n = len(tested)
        found += [
            "Scores and recovery in percent, differences in points (candidate less baseline); worse and better count questions.",
            f"p: two-sided, exact McNemar's where every question stands alone with one answer, else the permutation test's; adjusted by Holm "
            f"over {n} task{'s' if n > 1 else ''}. Intervals are not adjusted.",
        ]
    if any(task.recovery and task.recovery.reason for task in comparison.tasks):
        found += [f"{t.task}: recovery {t.recovery.reason}." for t in comparison.tasks if t.recovery and t.recovery.reason]
    return [*found, *comparison.notes, closing(comparison)]


def _by_note(comparison: Comparison) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for task in comparison.tasks:
        for note in task.notes:
            found.setdefault(note, []).append(task.task)
    return found


def closing(comparison: Comparison) -> str:
    """How many tasks were compared, and which were not."""
    n, refused = len(comparison.tasks), comparison.refused
    if not n:
        return "Nothing to compare: neither variant has a result in a task."
    what = "the only task" if n == 1 else f"all {n} tasks"
    if not refused:
        return f"Compared {what}."
    if len(refused) == n:
        return f"Refused {what}: nothing is comparable."
    return f"Compared {n - len(refused)} of {n} tasks; refused {len(refused)}: {', '.join(refused)}."


def _grids(comparison: Comparison) -> list[Grid]:
    level = f"{100 * comparison.confidence:g} %"
    other = "" if comparison.run == comparison.baseline_run else f" (baseline of run {comparison.baseline_run})"
    title = f"{comparison.suite} {comparison.run}: {comparison.candidate} against {comparison.baseline}{other}"
    baseline, candidate = comparison.baseline, comparison.candidate
    columns: tuple[str, ...] = (
        "task",
        baseline,
        candidate,
        f"difference [{level}]",
        "worse",
        "better",
        "p",
        "p (Holm)",
        f"recovery % [{level}]",
        "questions",
        "clusters",
        "scored",
    )
    rows = [_cells(task) for task in comparison.tasks]
    if comparison.pooled is not None:
        rows.append(_pooled(comparison.pooled))
    found = [Grid(title, columns, tuple(rows), ())]
    compared = [task for task in comparison.tasks if task.difference is not None]
    if compared:
        columns = ("task", f"t [{level}]", f"bootstrap [{level}]", "p permutation", "p McNemar")
        found.append(Grid("Beside it, for information", columns, tuple(map(_informative, compared)), ()))
    if comparison.figures:
        columns = ("figure", baseline, candidate, f"difference [{level}]", "clusters")
        rows = [_figure(each) for each in comparison.figures]
        n = comparison.figures[0].n_sequences
        found.append(Grid(f"On {n:,} sequences, KL and CE in nats a token", columns, tuple(rows), ()))
    return found


def _cells(task: TaskComparison) -> tuple[str, ...]:
    values = tuple(in_unit({"unit": task.unit}, value) for value in (task.baseline, task.candidate))
    scored = MISSING
    if task.n_scored is not None and task.n_total is not None:
        shares = dict.fromkeys(f"{n:,}/{total:,}" for n, total in zip(task.n_scored, task.n_total, strict=True))
        scored = ", ".join(shares)
    if not task.is_comparable:
        return (task.task, *values, "not comparable", *[MISSING] * 7, scored)
    found = task.difference
    if found is None or task.flips is None:
        return (task.task, *values, "no test", *[MISSING] * 7, scored)
    return (
        task.task,
        *values,
        _interval(found.delta, found.low, found.high),
        *(f"{n:,}" for n in task.flips),
        _p(task.p),
        _p(task.p_holm),
        _recovery(task),
        f"{found.n_questions:,}",
        f"{found.n_clusters:,}",
        scored,
    )


def _pooled(found: PooledDifference) -> tuple[str, ...]:
    interval = _interval(found.delta, found.low, found.high)
    counts = (f"{found.n_questions:,}", f"{found.n_clusters:,}", MISSING)
    return (f"mean of {found.n_tasks} tasks", MISSING, MISSING, interval, *[MISSING] * 5, *counts)


def _informative(task: TaskComparison) -> tuple[str, ...]:
    found = task.difference
    assert found is not None
    return (
        task.task,
        *(MISSING if each is None else f"[{_points(each[0])}, {_points(each[1])}]" for each in (found.t, found.bootstrap)),
        _p(found.p_permutation),
        _p(None if found.mcnemar is None else found.mcnemar.p_two_sided),
    )


def _figure(found: FigureComparison) -> tuple[str, ...]:
    interval = "" if found.low is None or found.high is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    values = (f"{found.baseline:.4f}", f"{found.candidate:.4f}", f"{found.difference:+.4f}{interval}")
    return (_FIGURES[found.figure], *values, f"{found.n_clusters:,}")


def _recovery(task: TaskComparison) -> str:
    ratio = task.recovery
    if ratio is None or ratio.value is None or ratio.low is None or ratio.high is None:
        return MISSING if ratio is None else "undefined"
    return f"{100 * ratio.value:.1f} [{100 * ratio.low:.1f}, {100 * ratio.high:.1f}]"


def _interval(delta: float, low: float, high: float) -> str:
    return f"{_points(delta)} [{_points(low)}, {_points(high)}]"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _p(p: float | None) -> str:
    return MISSING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
