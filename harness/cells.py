"""Cells of runs: what the members of a variant made of the same questions, or of the same tokens, laid out for `contrasts`. No torch.

Everything that makes two scores not comparable (`comparable`) is an error here, with one exception that claims are about: the weights that two
suites are of, and whether activations are quantized.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.claim_runs import SuiteRun
from harness.comparable import differ_in_activations, differences
from harness.contrasts import Cell, Units
from harness.errors import StoreError
from harness.evidence import Answers, pair
from harness.pairs import cluster_of, same_sequence
from harness.selection import selection_tasks

_TRAINED = ("qat", "qad")


@dataclass(frozen=True)
class Member:
    """One variant of a run."""

    run: SuiteRun
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.record["name"])


@dataclass(frozen=True)
class Group:
    """The variants that are one cell. weight: in its contrast."""

    weight: int
    run: SuiteRun
    variant: str
    members: tuple[Member, ...]

    @property
    def is_trained(self) -> bool:
        return self.members[0].record["method"] in _TRAINED

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of its trainings; none where nothing was trained."""
        if not self.is_trained:
            return ()
        records = [member.record for member in self.members]
        return tuple(r["training"]["seed"] if r.get("seed") is None else r["seed"] for r in records)

    @property
    def draw(self) -> str:
        """What one seed draws alike: the data, whose order the seed decides."""
        sections = self.run.evidence.about["resolved"]["data"]
        return json.dumps(sections.get(self.members[0].record.get("data")), sort_keys=True)

    @property
    def tokens(self) -> float | None:
        """Real tokens of a training, a mean over seeds; None where nothing was trained or the record does not say."""
        budgets = [member.record["budget"]["tokens"] for member in self.members if member.record.get("budget")]
        return sum(budgets) / len(budgets) if self.is_trained and len(budgets) == len(self.members) else None

    @property
    def label(self) -> str:
        return f"{self.variant} of {self.run.suite.name}"


@dataclass(frozen=True)
class Layout:
    """Cells over the same units. repeats: answers to a question, a task; None of tokens. notes: what a reader has to know."""

    cells: tuple[tuple[int, Cell], ...]
    units: tuple[Units, ...]
    repeats: tuple[int, ...] | None
    notes: tuple[str, ...]


def group_of(weight: int, run: SuiteRun, variant: str) -> Group:
    """The cell `variant` of a run; StoreError where the run has none."""
    records = run.members(variant)
    if not records:
        raise StoreError(f"{run.evidence.folder}: no variant {variant}; run the suite again: harness run {run.suite.path}")
    return Group(weight, run, variant, tuple(Member(run, record) for record in records))


def of_tasks(groups: Sequence[Group], tasks: Sequence[str]) -> Layout:
    """What the cells scored in each task, in [0, 1]; StoreError where two are not comparable, or a score is missing or no share."""
    rows: list[list[np.ndarray[Any, Any]]] = [[] for _ in groups]
    units, repeats, notes = [], [], _budgets(groups)
    for task in tasks:
        answers = [[_answers(member, task) for member in group.members] for group in groups]
        _require_comparable(groups, answers)
        first = answers[0][0]
        questions = [ours for ours, _ in pair(first, answers[-1][0]).questions]
        for number, group in enumerate(answers):
            rows[number].append(np.array([[each.questions[q.key].mean for q in questions] for each in group], dtype=float))
        units.append(Units(tuple(question.cluster for question in questions)))
        repeats.append(first.repeats)
        notes += _task_notes(groups, answers, task)
    cells = [_cell(group, tuple(figures)) for group, figures in zip(groups, rows, strict=True)]
    return Layout(_weighted(groups, cells), tuple(units), tuple(repeats), tuple(dict.fromkeys(notes)))


def of_tokens(groups: Sequence[Group], figure: str) -> Layout:
    """KL, CE or top-1 of the cells, sums over the tokens of each sequence; StoreError where two were measured on other ones."""
    first = _sequences(groups[0].members[0])
    cells = []
    for group in groups:
        rows = [_sequences(member) for member in group.members]
        for member, found in zip(group.members, rows, strict=True):
            _require_same_sequences(groups[0].members[0], member)
            if list(map(same_sequence, found)) != list(map(same_sequence, first)):
                raise StoreError(
                    f"{member.run.place}: {member.name} and {groups[0].members[0].name} of {groups[0].run.place} were measured on "
                    "different sequences; give both suites the same data and [diagnostics], and run them again"
                )
        cells.append(_cell(group, (np.array([[row[f"{figure}_sum"] for row in each] for each in rows], dtype=float),)))
    units = Units(tuple(map(cluster_of, first)), tuple(row["n_tokens"] for row in first))
    return Layout(_weighted(groups, cells), (units,), None, tuple(_budgets(groups)))


def _cell(group: Group, figures: tuple[np.ndarray[Any, Any], ...]) -> Cell:
    return Cell(group.label, group.seeds, group.draw, figures)


def _weighted(groups: Sequence[Group], cells: Sequence[Cell]) -> tuple[tuple[int, Cell], ...]:
    return tuple((group.weight, cell) for group, cell in zip(groups, cells, strict=True))


def _answers(member: Member, task: str) -> Answers:
    found = member.run.answers(member.name, task)
    if found is None:
        raise StoreError(
            f"{member.run.place}: {member.name} has no result in {task}; run it: harness run {member.run.suite.path}"
        )
    if found.row["is_partial"]:
        raise StoreError(
            f"{member.run.place}: {member.name} was asked the first questions of {task} only (limit), which decides no claim; remove "
            f"limit from {member.run.suite.path} and run it again"
        )
    if not found.is_share:
        raise StoreError(
            f"{member.run.place}: {found.metric} of {task} is no share of 1, and only shares have an interval here"
        )
    return found


def _require_comparable(groups: Sequence[Group], answers: Sequence[Sequence[Answers]]) -> None:
    """Every member against the first one of each of the first two cells."""
    every = [(m, a) for group, found in zip(groups, answers, strict=True) for m, a in zip(group.members, found, strict=True)]
    firsts = [(group.members[0], found[0]) for group, found in zip(groups[:2], answers, strict=False)]
    for first, theirs in firsts:
        for member, ours in every:
            pair_of_answers = (first.run.place, first.name, member.name, ours.task)
            if member is first or pair_of_answers in member.run.alike:
                continue
            other = None if member.run is first.run else first.run.evidence
            found = differences(member.run.evidence, theirs, ours, baseline_run=other, may_differ=("model", "activations"))
            if found:
                raise StoreError(
                    f"{first.name} of {first.run.place} and {member.name} of {member.run.place}, {ours.task}: not comparable. "
                    f"{' '.join(found)} Make the suites alike and run them again."
                )
            member.run.alike.add(pair_of_answers)


def _sequences(member: Member) -> list[dict[str, Any]]:
    found = member.run.evidence.sequences.get(member.name)
    if not found:
        raise StoreError(
            f"{member.run.place}: KL, CE and top-1 of {member.name} were not measured; give {member.run.suite.path} a section [diagnostics] "
            "and run it"
        )
    return found


def _require_same_sequences(first: Member, member: Member) -> None:
    """That two runs measured on the same text, as far as their records say, and two quantized variants with one kernel."""
    if first.run is not member.run:
        for section in ("diagnostics", "data"):
            ours, theirs = (_measured_on(each, section) for each in (member, first))
            if ours != theirs:
                raise StoreError(
                    f"{first.run.place} and {member.run.place}: KL, CE and top-1 were measured on other sequences, [{section}] differs; make "
                    "the suites alike and run them again"
                )
    records = (first.record, member.record)
    if any(record["method"] == "bf16" for record in records) or differ_in_activations(*records):
        return
    ours, theirs = ((each.run.evidence.diagnostics.get(each.name) or {}).get("kernels") for each in (member, first))
    if ours != theirs:
        raise StoreError(
            f"{first.run.place} and {member.run.place}: KL, CE and top-1 of {first.name} were measured with the kernels {theirs}, of "
            f"{member.name} with {ours}; run both on one machine"
        )


def _measured_on(member: Member, section: str) -> Any:
    resolved = member.run.evidence.about["resolved"]
    diagnostics = resolved["diagnostics"] or {}
    return diagnostics if section == "diagnostics" else resolved["data"].get(diagnostics.get("data"))


def _budgets(groups: Sequence[Group]) -> list[str]:
    """That trained cells of one contrast had budgets of their own: within a tenth they are one, since a budget ends with a batch."""
    said = [(group.label, group.tokens) for group in groups if group.tokens is not None]
    amounts = [tokens for _, tokens in said if tokens is not None]
    if not amounts or max(amounts) <= 1.1 * min(amounts):
        return []
    return [f"training budgets differ: {', '.join(f'{label} {tokens:,.0f} tokens' for label, tokens in said)}"]


def _task_notes(groups: Sequence[Group], answers: Sequence[Sequence[Answers]], task: str) -> list[str]:
    notes = []
    for group, found in zip(groups, answers, strict=True):
        if any(task in selection_tasks(member.record) for member in group.members):
            notes.append(f"{task} helped to choose the checkpoints of {group.label}, whose score is flattered")
        flags = sorted({str(flag) for each in found for flag in each.row.get("flags") or ()})
        if flags:
            notes.append(f"{group.label} in {task}: {', '.join(flags)}")
    return notes
