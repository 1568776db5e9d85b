"""`harness findings`: claims held against finished runs; each difference with its interval, test and verdict. No torch.

    harness findings CLAIMS.toml --results results --out docs/findings.md

writes the Markdown, the same as JSON beside it, a figure of each trajectory, and a copy of the JSON into the results folder, which the
leaderboard shows. The same claims and runs give the same bytes.

The rule of a verdict: "higher" and "lower" agree where the whole interval lies on the claimed side of the margin, and disagree where it lies
wholly on the other; "equal" agrees where the interval lies within the margin, and disagrees where it lies wholly beyond; "not lower" and "not
higher" are one half of "equal"; all else cannot tell.
A claim agrees where all its comparisons do, and disagrees where any does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from harness.cells import Group, Layout, group_of, of_tasks, of_tokens
from harness.claim_runs import SuiteRun, runs_of
from harness.claims import Claim, Claims, Comparison, Expected, Trajectory, load_claims
from harness.contrasts import Contrast, MixedSeeds, OneTraining, contrast
from harness.errors import StoreError
from harness.findings_text import counted, render_markdown
from harness.leaderboard.findings import RECORD
from harness.paired import holm
from harness.records import SCHEMA
from harness.store import disk_errors, write_json, write_text

Verdict = Literal["agrees", "disagrees", "cannot tell", "not tested"]
CONFIDENCE = 0.95
POINTS, NATS = "points", "nats a token"
_DIGITS = 6


def find(claims: Claims, results: Path) -> dict[str, Any]:
    """The findings as plain data; StoreError with a line for each comparison that cannot be made."""
    runs = runs_of(claims.suites, results)
    problems: list[str] = []
    decided = [_claim(claim, runs, problems) for claim in claims.claims]
    trajectories = [_trajectory(each, runs, problems) for each in claims.trajectories]
    scores = [_scores(run, named) for run in runs.values() if (named := _named(claims, run.suite.name))] if not problems else []
    if problems:
        raise StoreError("\n".join(dict.fromkeys(problems)))
    comparisons = [comparison for claim in decided for comparison in claim["comparisons"]]
    for comparison, p in zip(comparisons, holm([each["p"] for each in comparisons]), strict=True):
        comparison["p_holm"] = _short(p)
    return {
        "schema": SCHEMA,
        "claims_file": claims.path.as_posix(),
        "chosen": list(claims.chosen),
        "confidence": CONFIDENCE,
        "n_comparisons": len(comparisons),
        "claims": decided,
        "trajectories": trajectories,
        "scores": scores,
        "suites": [_suite(run) for run in runs.values()],
    }


def findings(path: Path, results: Path, out: Path | None, only: tuple[str, ...] = ()) -> list[str]:
    """Decide the claims in the file at `path` and write what comes of it; returns lines to print. out: None writes nothing."""
    if out is not None and out.suffix != ".md":
        raise StoreError(f"--out {out}: is no name of a Markdown file; give one that ends with .md, such as docs/findings.md")
    claims = load_claims(path, only)
    record = find(claims, results)
    written = []
    if out is not None:
        written = [f"Findings: {out}"]
        with disk_errors(f"the findings {out}"):
            _write(record, out)
            if not only:
                write_json(results / RECORD, record)
    return [*(f"{claim['verdict']:12} {claim['id']}" for claim in record["claims"]), counted(record), *written]


def decide(expects: Expected, margin: float, low: float, high: float) -> Verdict:
    """The verdict on one difference, all in one unit: see the module."""
    if expects in ("lower", "not higher"):
        low, high = -high, -low
    if expects in ("not lower", "not higher"):
        margin = -margin
    if expects == "equal":
        is_so, is_not = -margin < low and high < margin, low > margin or high < -margin
    else:
        is_so, is_not = low > margin, high < margin
    return "agrees" if is_so else "disagrees" if is_not else "cannot tell"


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim with several comparisons; without any it was not tested."""
    found = set(verdicts)
    if not found:
        return "not tested"
    return "disagrees" if "disagrees" in found else "agrees" if found == {"agrees"} else "cannot tell"


def _write(record: dict[str, Any], out: Path) -> None:
    from harness.plots import plot_trajectory

    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), record)
    for each in record["trajectories"]:
        plot_trajectory(each, out.with_name(f"{out.stem}-{each['id']}.svg"))
    write_text(out, render_markdown(record, out.stem))


def _claim(claim: Claim, runs: dict[str, SuiteRun], problems: list[str]) -> dict[str, Any]:
    comparisons = []
    for number, comparison in enumerate(claim.comparison):
        try:
            comparisons.append(_compared(comparison, runs))
        except StoreError as error:
            problems.append(f'claim "{claim.id}": comparison[{number}]: {error}')
    return {
        **{key: getattr(claim, key) for key in ("id", "topic", "text", "source", "note", "untested")},
        "verdict": together(each["verdict"] for each in comparisons),
        "comparisons": comparisons,
    }


def _compared(comparison: Comparison, runs: dict[str, SuiteRun]) -> dict[str, Any]:
    groups = [group_of(weight, runs[suite], variant) for weight, suite, variant in comparison.cells]
    layout = of_tasks(groups, comparison.tasks) if comparison.tasks else of_tokens(groups, comparison.metric or "")
    scale, unit = _unit(comparison.metric)
    reach = len(groups) / 2 if unit == POINTS else math.inf
    found = _estimate(layout, (-reach, reach))
    margin = comparison.margin / scale
    limits = {
        "higher": (margin,),
        "lower": (-margin,),
        "equal": (-margin, margin),
        "not higher": (margin,),
        "not lower": (-margin,),
    }[comparison.expects]
    return {
        "tasks": list(comparison.tasks) if comparison.tasks else None,
        "metric": comparison.metric,
        "unit": unit,
        "expects": comparison.expects,
        "margin": comparison.margin,
        "cells": [_cell(group, layout, number, comparison.metric) for number, group in enumerate(groups)],
        "difference": _short(scale * found.value),
        "low": _short(scale * found.low),
        "high": _short(scale * found.high),
        "stderr_questions": _short(scale * found.stderr_questions),
        "stderr_seeds": None if found.stderr_seeds is None else _short(scale * found.stderr_seeds),
        "degrees": _short(found.degrees),
        "n_units": found.n_units,
        "n_clusters": found.n_clusters,
        "repeats": None if layout.repeats is None else sorted(set(layout.repeats)),
        "seeds_are_paired": _are_paired(groups),
        "p": _short(found.p_decided(limits)),
        "verdict": decide(comparison.expects, margin, found.low, found.high),
        "notes": list(layout.notes),
    }


def _estimate(layout: Layout, bounds: tuple[float, float]) -> Contrast:
    """The contrast; StoreError in place of an interval that could not be one."""
    try:
        found = contrast(layout.cells, layout.units, confidence=CONFIDENCE, bounds=bounds)
    except OneTraining as error:
        raise StoreError(str(error)) from None
    except MixedSeeds as error:
        raise StoreError(
            f"{error}: on the same data they are neither paired nor independent; give both the same seeds, or none in common, and run them again"
        ) from None
    if found.n_clusters < 2 or not math.isfinite(found.stderr_questions):
        raise StoreError("all questions are one cluster, which bounds nothing; ask questions that do not all err together")
    return found


def _cell(group: Group, layout: Layout, number: int, metric: str | None) -> dict[str, Any]:
    scale, unit = _unit(metric)
    alone = Layout(((1, layout.cells[number][1]),), layout.units, layout.repeats, ())
    found = _estimate(alone, (0.0, 1.0 if unit == POINTS else math.inf))
    return {
        "suite": group.run.suite.name,
        "variant": group.variant,
        "method": group.members[0].record["method"],
        "seeds": list(group.seeds),
        "tokens": None if group.tokens is None else round(group.tokens),
        **{key: _short(scale * getattr(found, key)) for key in ("value", "low", "high")},
    }


def _trajectory(each: Trajectory, runs: dict[str, SuiteRun], problems: list[str]) -> dict[str, Any]:
    run = runs[each.suite]
    figures = [*((task, None) for task in each.tasks), *((metric, metric) for metric in each.metrics)]
    panels = []
    for name, metric in figures:
        try:
            panels.append(_panel(each, run, name, metric))
        except StoreError as error:
            problems.append(f'trajectory "{each.id}": {error}')
    return {"id": each.id, "title": each.title, "suite": each.suite, "panels": panels}


def _panel(each: Trajectory, run: SuiteRun, name: str, metric: str | None) -> dict[str, Any]:
    variants = list(dict.fromkeys(each.variants))
    groups = [group_of(1, run, variant) for variant in variants]
    layout = of_tokens(groups, metric) if metric else of_tasks(groups, [name])
    cells = {v: _cell(group, layout, n, metric) for n, (v, group) in enumerate(zip(variants, groups, strict=True))}
    start = [] if each.start is None else [{**cells[each.start], "tokens": 0}]
    return {
        "name": name,
        "unit": _unit(metric)[1],
        "lines": [{"name": line.name, "points": [*start, *(cells[v] for v in line.variants)]} for line in each.line],
        "levels": [cells[variant] for variant in each.levels],
    }


def _named(claims: Claims, suite: str) -> set[str]:
    """The variants of a suite that a claim or a trajectory names."""
    of_claims = {
        variant for claim in claims.claims for each in claim.comparison for _, its, variant in each.cells if its == suite
    }
    return of_claims.union(*(each.variants for each in claims.trajectories if each.suite == suite))


def _scores(run: SuiteRun, named: set[str]) -> dict[str, Any]:
    """What the named variants of a suite scored, each alone: a column a task, KL and CE where they were measured; what has none, and why."""
    figures: list[tuple[str, str | None]] = [(task.name, None) for task in run.suite.tasks]
    figures += [("kl", "kl"), ("ce", "ce")] if run.suite.diagnostics else []
    groups = [
        group_of(1, run, v) for v in dict.fromkeys([*(v.group for v in run.suite.variants), *sorted(named)]) if v in named
    ]
    columns, without = [], []
    for name, metric in figures:
        try:
            layout = of_tokens(groups, metric) if metric else of_tasks(groups, [name])
            cells = [_cell(group, layout, number, metric) for number, group in enumerate(groups)]
        except StoreError as error:
            without.append(f"{name}: {error}")
            continue
        columns.append({"name": name, "unit": _unit(metric)[1], "cells": cells})
    return {"suite": run.suite.name, "columns": columns, "without": without}


def _suite(run: SuiteRun) -> dict[str, Any]:
    about = run.evidence.about
    return {
        "name": run.suite.name,
        "file": run.suite.path.as_posix(),
        "place": run.place,
        "plan": about["plan"],
        "model": about["model"]["path"],
        "fingerprint": about["model"]["fingerprint"],
    }


def _are_paired(groups: Sequence[Group]) -> bool:
    draws = [(group.draw, group.seeds) for group in groups if group.is_trained]
    return len(set(draws)) < len(draws)


def _unit(metric: str | None) -> tuple[float, str]:
    """What figures are multiplied by to be in the unit of their margin, and the unit."""
    return (1.0, NATS) if metric in ("kl", "ce") else (100.0, POINTS)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
