"""What the published figures of a suite name, held against the suite alone: variants, and metrics of the tasks that come with the harness. No torch.

Scores may be imported, of any task and with any metric, so a task that the suite does not ask is a mistake only where it is almost one that comes
with the harness, and a metric is held against tasks alone that the suite asks itself. What a task of another place has is known once it is
prepared (`harness.reference_metrics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.published import DIAGNOSTICS
from harness.task_files import config_of, is_ours, known_tasks, metadata_of
from harness.task_settings import looks_mistyped

if TYPE_CHECKING:
    from harness.schema_gate import Reference
    from harness.suite import ResolvedVariant
    from harness.task_settings import ResolvedTask

JUDGED = "judge_correct"
"""The metric that a judge adds (`harness.judge`; a test holds both)."""


def reference_mistakes(
    reference: Reference | None, variants: Sequence[ResolvedVariant], tasks: Sequence[ResolvedTask], *, is_judged: bool
) -> Iterator[tuple[str, str, tuple[str, list[str]] | None]]:
    """Key, message, and what was written with what is known, if that helps: a mistake each, by the suite alone. is_judged: whether it has a judge."""
    known = list(dict.fromkeys([*(variant.name for variant in variants), *(variant.method for variant in variants)]))
    asked = {task.name: task for task in tasks}
    for index, figure in enumerate(reference.figure if reference else ()):
        if figure.variant not in known:
            yield f"reference.figure[{index}].variant", f'no variant "{figure.variant}"', (figure.variant, known)
        task = asked.get(figure.task)
        if task is None and figure.task != DIAGNOSTICS and looks_mistyped(figure.task):
            yield f"reference.figure[{index}].task", f'unknown task "{figure.task}"', (figure.task, [*asked, *known_tasks()])
        if figure.metric is None or task is None or task.path is not None or not is_ours(task.own_name):
            continue
        metrics = [str(each["metric"]) for each in config_of(task.own_name).get("metric_list") or ()]
        found = with_derived(metrics, task, is_judged=is_judged)
        if figure.metric not in found:
            yield f"reference.figure[{index}].metric", f'{figure.task} has no metric "{figure.metric}"', (figure.metric, found)
    scores = [figure.value for figure in (reference.figure if reference else ()) if figure.task != DIAGNOSTICS]
    if any(scores) and max(scores) <= 1:
        yield (
            "reference.figure",
            f"no value is above 1 (the largest is {max(scores):g}): values are in percent, so write {100 * max(scores):g} for a "
            f"share of {max(scores):g}",
            None,
        )


def with_derived(metrics: list[str], task: ResolvedTask, *, is_judged: bool) -> list[str]:
    """The metrics of a task with those of a judge and of several repeats."""
    over_repeats = [f"pass@{task.repeats}", f"maj@{task.repeats}"] if task.repeats > 1 else []
    has_verdicts = is_judged and task.path is None and metadata_of(task.own_name).get("judge")
    return [*metrics, *([JUDGED] if has_verdicts else []), *over_repeats]
