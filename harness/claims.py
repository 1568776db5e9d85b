"""A file of claims: what a source says of variants, as differences that runs of suites can decide. No torch.

    [[claim]]               id, text (in own words), source; topic: what it is a part of; note: how it is put to the test here
    [[claim.comparison]]    candidate less baseline in tasks or in a figure over tokens, and what is claimed of the difference
    [[trajectory]]          scores along training: lists of variants with growing budgets

The suites lie beside the file. What a claim names is checked against them before any run is read: all mistakes of a file are reported at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.errors import SuiteError
from harness.mistakes import Mistakes
from harness.section import Name, Section
from harness.suite import ResolvedVariant, Suite, load_suite
from harness.toml_file import read_toml

Figure = Literal["kl", "ce", "top1"]
Expected = Literal["higher", "lower", "equal", "not higher", "not lower"]
_Text = Annotated[str, Field(pattern=r"\S")]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MIN_SEEDS = 3
"""Of a trained cell: with two, intervals that should cover 95 % cover as few as 88 % (docs/design/findings.md)."""
EXAMPLE = "suites/windtunnel/claims.toml"
_KEYS = ("candidate", "baseline", "minus.candidate", "minus.baseline")
_SEEDS = "seeds = [0, 1, 2, 3, 4]"


class Minus(Section):
    """The difference that is taken off in a difference of differences. suite: as of the comparison, unless it says otherwise."""

    suite: Name | None = None
    candidate: Name
    baseline: Name
    baseline_suite: Name | None = None


class Comparison(Section):
    """One difference, and what decides whether it is as claimed.

    tasks: their mean, each weighing the same; or metric: KL, CE (nats a token) or top-1 agreement with BF16. Without either, `tasks` of the file.
    baseline_suite: where the baseline is from, if not from `suite`. minus: a difference of the same to take off.
    margin: in points, of KL and CE in nats. "higher" and "lower" mean by more than it (0), "equal", "not higher" and
    "not lower" by less than it, and have to have one.
    """

    suite: Name
    tasks: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    metric: Figure | None = None
    candidate: Name
    baseline: Name
    baseline_suite: Name | None = None
    minus: Minus | None = None
    expects: Expected
    margin: _Amount = 0.0

    @model_validator(mode="after")
    def _is_one_difference(self) -> Comparison:
        if self.tasks is not None and self.metric is not None:
            raise ValueError("found tasks and metric; a comparison is in one of the two, remove the other")
        if self.tasks is not None and len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: found {', '.join(self.tasks)}, one of them twice")
        if self.expects in ("equal", "not higher", "not lower") and not self.margin:
            raise ValueError(
                f'margin: missing or 0; expects = "{self.expects}" needs one: what difference still counts as none'
            )
        if (self.candidate, self.suite) == (self.baseline, self.baseline_suite or self.suite):
            raise ValueError(f'candidate and baseline are both "{self.candidate}" of {self.suite}; name two')
        return self

    @property
    def cells(self) -> tuple[tuple[int, str, str], ...]:
        """(weight, suite, variant) of each cell: candidate, baseline and, where there is one, the difference that is taken off."""
        found = ((1, self.suite, self.candidate), (-1, self.baseline_suite or self.suite, self.baseline))
        if self.minus is None:
            return found
        suite = self.minus.suite or self.suite
        return (*found, (-1, suite, self.minus.candidate), (1, self.minus.baseline_suite or suite, self.minus.baseline))


class Claim(Section):
    """What is claimed, by whom, and what decides it. untested: why nothing here can, instead of comparisons."""

    id: Name
    topic: _Text
    text: _Text
    source: _Text
    note: _Text | None = None
    untested: _Text | None = None
    comparison: tuple[Comparison, ...] = ()

    @model_validator(mode="after")
    def _is_decided_or_says_why_not(self) -> Claim:
        if bool(self.comparison) == (self.untested is not None):
            raise ValueError(
                f'claim "{self.id}": needs either [[claim.comparison]] or untested, which says why it has none, and not both'
            )
        return self


class Line(Section):
    """One method along its training. variants: with growing budgets."""

    name: _Text
    variants: Annotated[tuple[Name, ...], Field(min_length=2)]


class Trajectory(Section):
    """Figures along training, a panel each. start: the variant that all lines begin at. levels: variants that are drawn as levels."""

    id: Name
    title: _Text
    suite: Name
    tasks: tuple[Name, ...] = ()
    metrics: tuple[Figure, ...] = ()
    line: Annotated[tuple[Line, ...], Field(min_length=1)]
    start: Name | None = None
    levels: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _shows_something(self) -> Trajectory:
        if not (self.tasks or self.metrics):
            raise ValueError("it shows nothing; give tasks or metrics")
        return self

    @property
    def variants(self) -> tuple[str, ...]:
        return (*(name for line in self.line for name in line.variants), *self.levels, *([self.start] if self.start else ()))


class _File(Section):
    """tasks: of comparisons that name neither tasks nor a metric."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    tasks: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    claim: Annotated[tuple[Claim, ...], Field(min_length=1)]
    trajectory: tuple[Trajectory, ...] = ()


@dataclass(frozen=True)
class Claims:
    """A file of claims that fits its suites. suites: by name, those that it names. chosen: the claims that were asked for, if not all."""

    path: Path
    claims: tuple[Claim, ...]
    trajectories: tuple[Trajectory, ...]
    suites: dict[str, Suite]
    chosen: tuple[str, ...] = ()


def load_claims(path: Path, only: tuple[str, ...] = ()) -> Claims:
    """The claims in the file at `path`, all or those with these ids, and the suites beside it that they name.

    Raises SuiteError with one line a mistake: a key, a suite, a variant, a task that is not known; a trained variant with one seed; a task of
    which the suite asks its first questions only; budgets that do not grow. Trajectories are left out where claims are chosen.
    """
    raw = read_toml(path, what="file of claims", example=EXAMPLE)
    mistakes = Mistakes(path)
    file = mistakes.parse(_File, raw, "")
    if file is None:
        raise SuiteError("\n".join(mistakes.found))
    known = [claim.id for claim in file.claim]
    for name in only:
        if name not in known:
            mistakes.add("--claim", f'no claim "{name}"', near=(name, known))
    for key, ids in (("claim", known), ("trajectory", [each.id for each in file.trajectory])):
        for name in sorted({name for name in ids if ids.count(name) > 1}):
            mistakes.add(key, f'the id "{name}" is repeated; ids must differ')
    claims = tuple(_with_tasks(claim, file.tasks) for claim in file.claim if not only or claim.id in only)
    trajectories = () if only else file.trajectory
    places = _suite_files(path)
    wanted = {
        *(suite for claim in claims for comparison in claim.comparison for _, suite, _ in comparison.cells),
        *(each.suite for each in trajectories),
    }
    suites = {name: load_suite(places[name]) for name in sorted(wanted) if name in places}
    for where, message, near in _misfits(claims, trajectories, suites, places):
        mistakes.add(where, message, near=near)
    if mistakes.found:
        raise SuiteError("\n".join(mistakes.found))
    return Claims(path, claims, trajectories, suites, only)


def members(suite: Suite, name: str) -> list[ResolvedVariant]:
    """The variants of a suite that are one cell: those declared under the name, or the one that has it."""
    return [v for v in suite.variants if v.group == name] or [v for v in suite.variants if v.name == name]


def _with_tasks(claim: Claim, tasks: tuple[str, ...] | None) -> Claim:
    """The claim, each comparison with what it is in."""
    given = [each if each.tasks or each.metric else each.model_copy(update={"tasks": tasks}) for each in claim.comparison]
    return claim.model_copy(update={"comparison": tuple(given)})


_Misfit = tuple[str, str, tuple[str, list[str]] | None]


def _misfits(
    claims: tuple[Claim, ...], trajectories: tuple[Trajectory, ...], suites: dict[str, Suite], places: dict[str, Path]
) -> Iterator[_Misfit]:
    unknown: dict[str, list[str]] = {}
    for claim in claims:
        for index, comparison in enumerate(claim.comparison):
            where = f'claim "{claim.id}": comparison[{index}]'
            if comparison.tasks is None and comparison.metric is None:
                yield where, "needs tasks or metric, since the file has no tasks for all", None
            for key, (_, suite, variant) in zip(_KEYS, comparison.cells, strict=False):
                if suite not in suites:
                    unknown.setdefault(suite, []).append(where)
                else:
                    yield from _of_cell(f"{where}.{key}", suites[suite], variant)
                    yield from _of_figures(where, suites[suite], comparison.tasks or (), comparison.metric)
    for each in trajectories:
        where = f'trajectory "{each.id}"'
        if each.suite in suites:
            yield from _of_trajectory(where, suites[each.suite], each)
        else:
            unknown.setdefault(each.suite, []).append(where)
    for suite, named in unknown.items():
        wheres = list(dict.fromkeys(named))
        more = f" and {len(wheres) - 1} more" if len(wheres) > 1 else ""
        yield f"{wheres[0]}.suite{more}", f'no suite "{suite}" beside the file of claims', (suite, list(places))


def _of_trajectory(where: str, suite: Suite, each: Trajectory) -> Iterator[_Misfit]:
    for variant in dict.fromkeys(each.variants):
        yield from _of_cell(where, suite, variant)
    for metric in each.metrics or (None,):
        yield from _of_figures(where, suite, each.tasks, metric)
    for line in each.line:
        yield from _of_line(f'{where}: line "{line.name}"', suite, line)


def _of_cell(where: str, suite: Suite, name: str) -> Iterator[_Misfit]:
    found = members(suite, name)
    if not found:
        names = list(dict.fromkeys(variant.group for variant in suite.variants))
        yield where, f'no variant "{name}" in the suite {suite.name} ({suite.path})', (name, names)
    elif found[0].is_trained and len(found) < MIN_SEEDS:
        yield where, few_seeds(suite, name, len(found)), None


def few_seeds(suite: Suite, name: str, n: int) -> str:
    """Why a trained cell with too few seeds has no interval, and how to give it more."""
    return (
        f'"{name}" of the suite {suite.name} is trained with {n} seed{"" if n == 1 else "s"}; nothing said of it has an interval without a '
        f"spread over at least {MIN_SEEDS}: give its [[variant]] in {suite.path} {_SEEDS} and run it: harness run {suite.path}"
    )


def _of_figures(where: str, suite: Suite, tasks: tuple[str, ...], metric: str | None) -> Iterator[_Misfit]:
    names = {task.name: task for task in suite.tasks}
    for name in tasks:
        if name not in names:
            yield f"{where}.tasks", f'no task "{name}" in the suite {suite.name} ({suite.path})', (name, list(names))
        elif names[name].limit is not None:
            message = f"{name}: the suite {suite.name} asks its first {names[name].limit} questions only; remove limit from {suite.path}"
            yield f"{where}.tasks", message, None
    if metric is not None and suite.diagnostics is None:
        message = f'"{metric}" is not measured by the suite {suite.name}; give {suite.path} a section [diagnostics]'
        yield f"{where}.metric", message, None


def _of_line(where: str, suite: Suite, line: Line) -> Iterator[_Misfit]:
    cells = [members(suite, name) for name in line.variants]
    if not all(cells):
        return
    untrained = [name for name, cell in zip(line.variants, cells, strict=True) if cell[0].training is None]
    if untrained:
        yield where, f"{untrained[0]} is not trained, so it has no budget; give it as start or among levels", None
        return
    budgets = [cell[0].training.tokens for cell in cells if cell[0].training is not None]
    if any(later <= earlier for earlier, later in itertools.pairwise(budgets)):
        said = ", ".join(f"{name} {tokens:,}" for name, tokens in zip(line.variants, budgets, strict=True))
        yield where, f"budgets have to grow from one variant to the next; found {said} tokens", None


def _suite_files(claims: Path) -> dict[str, Path]:
    """The suites beside the file, by name; SuiteError where two have one name."""
    found: dict[str, Path] = {}
    for path in sorted(claims.parent.glob("*.toml")):
        raw = {} if path.name == claims.name else read_toml(path, what="suite", example="suites/quickstart.toml")
        name = raw.get("name")
        if "variant" not in raw or not isinstance(name, str):
            continue
        if name in found:
            raise SuiteError(
                f'{path}: name: "{name}" is that of {found[name]}, too; suites whose runs are compared need names of their own'
            )
        found[name] = path
    return found
