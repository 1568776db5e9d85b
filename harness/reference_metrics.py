"""Published figures of metrics that their tasks, once prepared, turn out not to have. No torch."""

from __future__ import annotations

import difflib

from harness.done import find_done
from harness.errors import SuiteError
from harness.mistakes import listed
from harness.plan import Plan
from harness.records import read_json
from harness.reference_checks import with_derived
from harness.schema_gate import Figure
from harness.store import Store


def mistaken_metrics(plan: Plan, store: Store) -> list[str]:
    """A line for each figure whose metric its task turns out not to have, of the tasks that are prepared."""
    reference = plan.suite.reference
    prepared = {stage.task.name: stage for stage in plan.stages if stage.kind == "prepare" and stage.task is not None}
    lines = []
    for index, figure in enumerate(reference.figure if reference else ()):
        stage = prepared.get(figure.task)
        done = None if stage is None else find_done(stage, store)
        if figure.metric is None or done is None or stage is None or stage.task is None:
            continue
        metrics = [str(each) for each in read_json(done.folder / "task.json")["metrics"]]
        found = with_derived(metrics, stage.task, is_judged=plan.suite.judge is not None)
        if figure.metric not in found:
            lines.append(f"{plan.suite.path}: reference.figure[{index}].metric: {_unknown(figure, found)}")
    return lines


def _unknown(figure: Figure, known: list[str]) -> str:
    near = difflib.get_close_matches(str(figure.metric), known, n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]}?" if near else "."
    return f'{figure.task} has no metric "{figure.metric}"{meant} Known: {listed(known)}'


def require_metrics(plan: Plan, store: Store) -> None:
    """SuiteError for what `mistaken_metrics` finds."""
    found = mistaken_metrics(plan, store)
    if found:
        raise SuiteError("\n".join(found))
