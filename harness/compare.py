"""Two variants of a run, task by task: what differs, how surely, and what may not be compared and why. No torch.

Nothing is compared that `comparable` refuses, and nothing refused enters a test over tasks or the pooled difference. Values and differences
are of the questions that both scored, which are all of them unless a lower coverage was asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy.special import stdtrit

from harness.comparable import differences
from harness.controls import is_control
from harness.errors import StoreError
from harness.evidence import Answers, Pairing, RunEvidence, pair
from harness.null_variants import twin_of
from harness.paired import PairedDifference, PooledDifference, holm, paired_difference, pooled_difference
from harness.pairs import are_same_sequences, cluster_of, mean_difference
from harness.recovery import Ratio, recovery
from harness.selection import selection_tasks

_FIGURES = ("kl", "ce", "top1")


@dataclass(frozen=True)
class TaskComparison:
    """One task. Scores as they are, in [0, 1] where `unit` is "share".

    baseline, candidate: values over the questions that both scored; of a task that is refused or has no shares, those of the table.
    refusals: why the two are not comparable; then there is no difference. notes: what a reader has to know of the pairing.
    difference: None too where the metric is no share. worse, better: flips, whichever way the metric is good.
    p, p_holm: two-sided, exact McNemar's where it applies and the permutation test's elsewhere; adjusted over the tasks compared.
    n_scored, n_total: answers, of the baseline and the candidate.
    """

    task: str
    metric: str | None
    unit: str | None
    higher_is_better: bool | None
    baseline: float | None
    candidate: float | None
    refusals: tuple[str, ...]
    notes: tuple[str, ...] = ()
    difference: PairedDifference | None = None
    recovery: Ratio | None = None
    p: float | None = None
    p_test: Literal["McNemar", "permutation"] | None = None
    p_holm: float | None = None
    paired_by: Literal["request", "question"] | None = None
    coverage: float | None = None
    n_scored: tuple[int, int] | None = None
    n_total: tuple[int, int] | None = None

    @property
    def is_comparable(self) -> bool:
        return not self.refusals

    @property
    def flips(self) -> tuple[int, int] | None:
        """Questions that became worse, and better."""
        if self.difference is None:
            return None
        fell, rose = self.difference.worse, self.difference.better
        return (rose, fell) if self.higher_is_better is False else (fell, rose)


@dataclass(frozen=True)
class FigureComparison:
    """KL, CE (nats a token) or top-1 agreement with BF16 on the same sequences: means over tokens, a t interval over what errs together."""

    figure: str
    baseline: float
    candidate: float
    difference: float
    stderr: float | None
    low: float | None
    high: float | None
    n_sequences: int
    n_clusters: int


@dataclass(frozen=True)
class Comparison:
    """All tasks that either variant has results in. pooled: over the comparable tasks in `pooled_tasks`, two or more of them."""

    suite: str
    run: str
    baseline_run: str
    baseline: str
    candidate: str
    confidence: float
    tasks: tuple[TaskComparison, ...]
    pooled: PooledDifference | None
    pooled_tasks: tuple[str, ...]
    figures: tuple[FigureComparison, ...]
    notes: tuple[str, ...]

    @property
    def refused(self) -> tuple[str, ...]:
        """Names of the tasks that are not comparable."""
        return tuple(task.task for task in self.tasks if not task.is_comparable)


def compare_runs(
    run: RunEvidence,
    baseline: str,
    candidate: str,
    tasks: Sequence[str] = (),
    *,
    baseline_run: RunEvidence | None = None,
    min_coverage: float = 1.0,
    confidence: float = 0.95,
) -> Comparison:
    """Compare two variants in all tasks but controls, or in these.

    Args:
        run: of the candidate, and of the baseline unless that is in `baseline_run`.
        min_coverage: the share of the asked answers that both have to have scored for a task to be compared.
    Raises:
        StoreError: no such variant or task, with the known ones; the same variant twice; scores that are missing or damaged.
    """
    first = run if baseline_run is None else baseline_run
    _require(baseline, first.variants, f"{first.folder}: baseline {baseline}: no such variant in this run")
    _require(candidate, run.variants, f"{run.folder}: candidate {candidate}: no such variant in this run")
    if baseline == candidate and baseline_run is None:
        raise StoreError(f"{run.folder}: baseline and candidate are both {baseline}; name two variants, such as {_two(run)}")
    known = list(dict.fromkeys([*run.tasks, *first.tasks]))
    for name in tasks:
        _require(name, known, f"{run.folder}: --task {name}: no such task in this run")
    found, controls = [], []
    pairings: dict[str, Pairing] = {}
    for name in dict.fromkeys(tasks) or known:
        ours, theirs = first.answers(baseline, name), run.answers(candidate, name)
        if ours is None and theirs is None and not tasks:
            continue
        if not tasks and any(side is not None and is_control(side.row) for side in (ours, theirs)):
            controls.append(name)
            continue
        if ours is None or theirs is None:
            found.append(_lacking(name, baseline, ours, candidate, theirs))
            continue
        refusals = differences(run, ours, theirs, baseline_run=baseline_run, min_coverage=min_coverage)
        pairings[name] = pair(ours, theirs)
        notes = _notes(first, ours, run, theirs, pairings[name])
        found.append(_compared(ours, theirs, pairings[name], refusals, notes, confidence))
    compared = _adjusted(found)
    pooled = [task.task for task in compared if task.difference is not None and task.higher_is_better is not False]
    figures, about_figures = _figures(first, baseline, run, candidate, confidence)
    return Comparison(
        suite=str(run.about.get("suite")),
        run=str(run.about.get("run")),
        baseline_run=str(first.about.get("run")),
        baseline=baseline,
        candidate=candidate,
        confidence=confidence,
        tasks=tuple(compared),
        pooled=pooled_difference([pairings[n].pairs for n in pooled], confidence=confidence) if len(pooled) > 1 else None,
        pooled_tasks=tuple(pooled),
        figures=figures,
        notes=(*_run_notes(first, baseline, run, candidate), *about_figures, *_about_controls(controls)),
    )


def _about_controls(names: Sequence[str]) -> list[str]:
    return [f"Left out, controls with grey pictures and no scores: {', '.join(names)}."] if names else []


def _lacking(task: str, baseline: str, ours: Answers | None, candidate: str, theirs: Answers | None) -> TaskComparison:
    without = [name for name, side in ((baseline, ours), (candidate, theirs)) if side is None]
    present = ours or theirs
    refusal = f"Missing: {' and '.join(without)} {'has' if len(without) == 1 else 'have'} no result in {task}."
    return TaskComparison(
        task=task,
        metric=present.metric if present else None,
        unit=present.unit if present else None,
        higher_is_better=present.higher_is_better if present else None,
        baseline=ours.row["value"] if ours else None,
        candidate=theirs.row["value"] if theirs else None,
        refusals=(refusal,),
    )


def _compared(
    ours: Answers, theirs: Answers, pairing: Pairing, refusals: list[str], notes: tuple[str, ...], confidence: float
) -> TaskComparison:
    plain = TaskComparison(
        task=ours.task,
        metric=ours.metric,
        unit=ours.unit,
        higher_is_better=ours.higher_is_better,
        baseline=ours.row["value"],
        candidate=theirs.row["value"],
        refusals=tuple(refusals),
        notes=notes,
        paired_by=pairing.paired_by,
        coverage=pairing.coverage,
        n_scored=(ours.row["n_scored"], theirs.row["n_scored"]),
        n_total=(ours.row["n_total"], theirs.row["n_total"]),
    )
    if refusals:
        return plain
    if not (ours.is_share and theirs.is_share):
        return replace(plain, notes=(*notes, f"{ours.metric} is no share of 1: shown without a test, and not pooled"))
    found = paired_difference(pairing.pairs, confidence=confidence)
    n = len(pairing.pairs)
    return replace(
        plain,
        baseline=sum(each.baseline for each in pairing.pairs) / n,
        candidate=sum(each.candidate for each in pairing.pairs) / n,
        difference=found,
        recovery=None if ours.higher_is_better is False else recovery(pairing.pairs),
        p=found.p_permutation if found.mcnemar is None else found.mcnemar.p_two_sided,
        p_test="McNemar" if found.mcnemar is not None else None if found.p_permutation is None else "permutation",
    )


def _adjusted(found: Sequence[TaskComparison]) -> list[TaskComparison]:
    tested = [task for task in found if task.p is not None]
    adjusted = dict(zip((task.task for task in tested), holm([task.p for task in tested if task.p is not None]), strict=True))
    return [replace(task, p_holm=adjusted.get(task.task)) for task in found]


def _notes(first: RunEvidence, ours: Answers, run: RunEvidence, theirs: Answers, pairing: Pairing) -> tuple[str, ...]:
    notes = []
    if pairing.paired_by == "question":
        tool = ours.row.get("scorer") or "another tool"
        notes.append(f"scored elsewhere ({tool}): paired by the source of the question, prompts and kernels are not known")
    if pairing.coverage < 1:
        notes.append(f"{len(pairing.pairs):,} of {pairing.n_expected:,} questions are scored by both")
    if ours.row["is_partial"] and theirs.row["is_partial"]:
        notes.append("the first questions of the task only (limit)")
    if any(b.seeds != c.seeds for b, c in pairing.questions):
        notes.append("drawn with other seeds on each side")
    for evidence, side in ((first, ours), (run, theirs)):
        if side.task in selection_tasks(evidence.variants[side.variant]):
            notes.append(f"helped to choose the checkpoint of {side.variant}, whose score is flattered")
        flags = [flag for flag in side.row.get("flags") or () if flag != "imported"]
        if flags:
            notes.append(f"{side.variant}: {', '.join(flags)}")
    if ours.higher_is_better is None and ours.unit == "share":
        notes.append("whether more is better is not recorded; taken as if it were")
    if ours.higher_is_better is False:
        notes.append("less is better")
    return tuple(notes)


def _run_notes(first: RunEvidence, baseline: str, run: RunEvidence, candidate: str) -> list[str]:
    notes = []
    for each in {id(run): run, id(first): first}.values():
        name = each.about.get("run", each.folder.name)
        if not each.is_finished:
            notes.append(
                f"The run {name} is not finished: it is still being written or was interrupted, and figures may change."
            )
        if each.about.get("rehearsal"):
            notes.append(f"The run {name} is a rehearsal: its figures say nothing of the model.")
    records = (first.variants[baseline], run.variants[candidate])
    if first is run and any(twin_of(record, records) is not None for record in records):
        notes.append(
            f"{baseline} and {candidate} have the same weights: what differs is chance, the noise floor of comparisons."
        )
    budgets = [record.get("budget") or {} for record in records]
    if all(budgets) and any(budgets[0].get(key) != budgets[1].get(key) for key in ("tokens", "steps")):
        said = [
            f"{name} {budget['tokens']:,} tokens in {budget['steps']:,} steps"
            for name, budget in zip((baseline, candidate), budgets, strict=True)
        ]
        notes.append(f"Training budgets differ: {', '.join(said)}.")
    return notes


def _figures(
    first: RunEvidence, baseline: str, run: RunEvidence, candidate: str, confidence: float
) -> tuple[tuple[FigureComparison, ...], list[str]]:
    """Paired differences of KL, CE and top-1; or why there are none."""
    if first is not run:
        return (), ["KL, CE and top-1 are compared within one run only: another run's sequences may be others."]
    theirs, ours = run.sequences.get(baseline), run.sequences.get(candidate)
    if not ours or not theirs:
        return (), []
    if not are_same_sequences(ours, theirs):
        return (), [f"KL, CE and top-1: not comparable, {baseline} and {candidate} were measured on different sequences."]
    kernels = [(run.diagnostics.get(name) or {}).get("kernels") for name in (baseline, candidate)]
    is_quantized = all(run.variants[name].get("method") != "bf16" for name in (baseline, candidate))
    if is_quantized and kernels[0] != kernels[1]:
        return (), [f"KL, CE and top-1: not comparable, {baseline} and {candidate} were measured with different kernels."]
    n_clusters, n_tokens = len(set(map(cluster_of, ours))), sum(row["n_tokens"] for row in ours)
    found = []
    for figure in _FIGURES:
        value, stderr = mean_difference(ours, theirs, figure)
        half = None if stderr is None else -float(stdtrit(n_clusters - 1, (1 - confidence) / 2)) * stderr
        before, after = (sum(row[f"{figure}_sum"] for row in rows) / n_tokens for rows in (theirs, ours))
        low, high = (None, None) if half is None else (value - half, value + half)
        found.append(FigureComparison(figure, before, after, value, stderr, low, high, len(ours), n_clusters))
    return tuple(found), []


def _require(name: str, known: Iterable[str], problem: str) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise StoreError(f"{problem}{hint} Known: {', '.join(names) or 'none'}")


def _two(run: RunEvidence) -> str:
    names = list(run.variants)
    first = run.baseline or names[0]
    return " and ".join([first, *(name for name in names if name != first)][:2])
