"""Whether the baseline is what it should be: our scores of it beside published ones (`[reference]` of the suite). No torch.

A baseline that is further from a published figure than the stated band is suspect, and nothing that is measured against it counts. Answers
that are missing are taken for all wrong, and for all right: where either is outside the band the baseline is suspect, since nobody
knows that it is not. A figure that is of no variant and no method of the run makes it suspect, too: what it was to be held against is not known.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from harness.gate_checks import Check, near
from harness.published import DIAGNOSTICS, cell_of

if TYPE_CHECKING:
    from harness.evidence import RunEvidence


def sanity_checks(run: RunEvidence, baseline: str | None) -> list[Check]:
    """A check a published figure of the BF16 variant that can be compared; an advisory one for each that cannot, which says why.

    The figures are of the variant that the run's scores are rooted in, BF16, whichever variant the candidate is compared with.
    """
    reference = (run.about.get("resolved") or {}).get("reference") or {}
    names = {name for name in (run.baseline, "bf16") if name is not None}
    if baseline is not None and run.variants.get(baseline, {}).get("method") == "bf16":
        names.add(baseline)
    ours = run.baseline or baseline
    known = list(dict.fromkeys([*run.variants, *(str(variant.get("method")) for variant in run.variants.values())]))
    found = []
    for figure in reference.get("figure", ()):
        if figure["variant"] in names:
            found.append(_compared(run, ours, figure, reference))
        elif figure["variant"] not in known:
            found.append(_of_nobody(figure, known))
    return found


def _of_nobody(figure: dict[str, Any], known: list[str]) -> Check:
    of = figure["variant"]
    reason = f"suspect baseline: a published figure is of {of}, and the run has no such variant or method{near(of, known)}"
    return Check(f"{of} in {cell_of(figure)}", "sanity", "critical", reasons=(reason,), figures={"published": figure["value"]})


def _compared(run: RunEvidence, ours: str | None, figure: dict[str, Any], reference: dict[str, Any]) -> Check:
    task, published, band = figure["task"], figure["value"], reference["band"]
    name = f"BF16 in {cell_of(figure)}"
    numbers = {"published": published, "band": band, "source": reference["source"], "task": task}
    row = run.rows.get((ours, task)) if ours is not None else None
    why = _not_comparable(row, task, figure.get("metric"))
    if row is None or ours is None or why is not None:
        reason = f"{why}: not compared with the published {published:g}"
        return Check(name, "sanity", "advisory", reasons=(reason,), figures=numbers)
    low, high = (100 * value for value in _bounds(run, ours, task, row))
    furthest = max((low - published, high - published), key=abs)
    numbers |= {"value": low, "difference": furthest} if low == high else {"low": low, "high": high, "difference": furthest}
    between = f"{low:.1f}" if low == high else f"between {low:.1f} and {high:.1f}, by what the missing answers would have been"
    told = f"ours is {between}, published is {published:g} ({reference['source']})"
    if abs(furthest) <= band:
        return Check(name, "sanity", "critical", "PASS", (f"{told}: within {band:g} points",), numbers, has_evidence=True)
    may_be = "" if low == high else "up to "
    reason = f"suspect baseline: {told}, {may_be}{abs(furthest):.1f} points away where {band:g} are allowed"
    return Check(name, "sanity", "critical", "INCONCLUSIVE", (reason,), numbers)


def _bounds(run: RunEvidence, ours: str, task: str, row: dict[str, Any]) -> tuple[float, float]:
    """The score with all missing answers wrong, and with all of them right."""
    is_whole = row["n_scored"] == row["n_total"] and row["value"] is not None
    answers = None if is_whole else run.answers(ours, task)
    if answers is None:
        return row["value"], row["value"]
    low, high = (
        math.fsum(
            math.fsum(missing if score is None else score for score in question.scores) / len(question.scores)
            for question in answers.questions.values()
        )
        for missing in (0.0, 1.0)
    )
    return low / len(answers.questions), high / len(answers.questions)


def _not_comparable(row: dict[str, Any] | None, task: str, metric: str | None) -> str | None:
    if task == DIAGNOSTICS:
        return f"{metric} is in nats, and the band in points"
    if row is None or not row.get("n_total"):
        return f"BF16 has no score in {task}"
    if row.get("is_partial") is not False:
        return f"only the first {row.get('n_questions')} questions of {task} were asked (limit)"
    if metric not in (None, row.get("metric")):
        return f"the published figure of {task} is of {metric}, and what is judged of {row.get('metric')}"
    if row.get("unit", "share") != "share":
        return f"{row.get('metric')} is no share of {task}"
    return None
