"""The rule of a release gate for one task, and for several pooled: is the damage within the margin? No torch.

damage = baseline - candidate, over questions, in [-1, 1]; margins and everything printed are in points, 100 x that.

PASS          the upper bound of the damage is at most the margin, and a candidate that answers nothing right would FAIL
FAIL          the lower bound of the damage is above the margin
INCONCLUSIVE  all else: then with what would decide

Both bounds are one-sided at alpha (`paired.damage_bound`). Source of the rule: non-inferiority by confidence bound, as in arXiv 2411.00640
(paired differences, clusters) and the usual practice of equivalence trials; "no significant difference" is no PASS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.evidence import pair
from harness.gate_checks import Check, Result, missing_flaws, notes_on, of_task, task_flaws
from harness.gate_outlook import would_decide, would_decide_pooled
from harness.paired import damage_bound, holm, p_inferior, pooled_damage_bound, pooled_p_inferior

if TYPE_CHECKING:
    from harness.evidence import Answers, Pairing, RunEvidence
    from harness.paired import QuestionPair
    from harness.schema_gate import Gate, GateTask, Pooled


@dataclass(frozen=True)
class Measured:
    """A task of the policy with its check and, where both variants have a result, what they answered."""

    task: GateTask
    check: Check
    baseline: Answers | None = None
    candidate: Answers | None = None
    pairing: Pairing | None = None

    @property
    def pairs(self) -> tuple[QuestionPair, ...]:
        return self.pairing.pairs if self.pairing else ()


def judge_task(run: RunEvidence, policy: Gate, task: GateTask, *, candidate: str, baseline: str | None) -> Measured:
    """The check of one task, before Holm (`correct_supporting`)."""
    born = Check(task.name, "task", task.tier, figures={"margin": task.margin, "alpha": of_task(task, policy, "alpha")})
    missing = missing_flaws(run, task.name, candidate=candidate, baseline=baseline)
    first = None if baseline is None or missing else run.answers(baseline, task.name)
    second = None if missing else run.answers(candidate, task.name)
    if first is None or second is None:
        return Measured(task, replace(born, reasons=tuple(missing)))
    pairing = pair(first, second)
    flaws = task_flaws(run, policy, task, first, second, pairing)
    check = replace(born, figures=born.figures | _amounts(first, second, pairing), reasons=tuple(flaws))
    if pairing.pairs and first.is_share and second.is_share:
        check = _decided(check, pairing, has_evidence=not flaws)
    check = replace(check, reasons=(*check.reasons, *_notes(first), *_notes(second)))
    return Measured(task, check, first, second, pairing)


def _notes(answers: Answers) -> list[str]:
    return notes_on(f"{answers.variant}'s score", answers.row.get("flags") or ())


def correct_supporting(checks: Sequence[Check], p_values: Sequence[float | None]) -> list[Check]:
    """Supporting checks after Holm over all of them that have evidence: a FAIL stands only if it is one after the correction.

    p_values: of "the damage is at most the margin", None where there is no evidence.
    """
    present = [index for index, p in enumerate(p_values) if p is not None]
    adjusted = dict(zip(present, holm([p for p in p_values if p is not None]), strict=True)) if present else {}
    found = []
    for index, check in enumerate(checks):
        p, corrected = p_values[index], adjusted.get(index)
        if corrected is None or p is None:
            found.append(check)
            continue
        figures = check.figures | {"p_beyond_margin": p, "p_beyond_margin_holm": corrected}
        check = replace(check, figures=figures)
        if check.verdict == "FAIL" and not corrected <= check.figures["alpha"]:
            why = f"alone it would be a FAIL (p = {p:.2g}), but not among {len(present)} supporting checks after Holm (p = {corrected:.2g})"
            check = replace(check, verdict="INCONCLUSIVE", reasons=(*check.reasons, why))
        found.append(check)
    return found


def p_beyond(measured: Measured) -> float | None:
    """The p of "the damage is at most the margin" of a task that has evidence."""
    return p_inferior(measured.pairs, margin=measured.task.margin / 100) if measured.check.has_evidence else None


def judge_pooled(policy: Gate, pooled: Pooled, measured: Sequence[Measured]) -> tuple[Check, float | None]:
    """The check of the pooled endpoint, the mean over its tasks, each weighing the same, and its p as of `p_beyond`.

    Where one of its tasks has no evidence it has none.
    """
    names = pooled.tasks or tuple(each.task.name for each in measured)
    mine = [each for each in measured if each.task.name in names]
    alpha = policy.alpha if pooled.alpha is None else pooled.alpha
    figures: dict[str, Any] = {"margin": pooled.margin, "alpha": alpha, "tasks": list(names)}
    check = Check("pooled", "pooled", pooled.tier, figures=figures)
    without = [each.task.name for each in mine if not each.check.has_evidence]
    if without or not mine:
        why = f"no evidence in {', '.join(without) or 'any task'}, and the pooled endpoint is of all its tasks"
        return replace(check, reasons=(why,)), None
    tasks = [each.pairs for each in mine]
    low, high = pooled_damage_bound(tasks, alpha=alpha)
    delta = math.fsum(_mean_delta(pairs) for pairs in tasks) / len(tasks)
    n_questions = sum(map(len, tasks))
    figures |= {"delta": 100 * delta, "damage_low": 100 * low, "damage_high": 100 * high}
    figures |= {"n_tasks": len(tasks), "n_questions": n_questions}
    result = verdict_of(low, high, pooled.margin / 100)
    can_lose = pooled_damage_bound([_all_wrong(pairs) for pairs in tasks], alpha=alpha)[0]
    reason = (
        f"{_change(delta)} on average over {len(tasks)} tasks; {_against_margin(figures, result)} ({n_questions:,} questions)"
    )
    if result == "PASS" and not can_lose > pooled.margin / 100:
        result, reason = "INCONCLUSIVE", _nothing_to_lose(figures, can_lose)
    elif result == "INCONCLUSIVE":
        reason += "; " + would_decide_pooled(tasks, margin=pooled.margin, alpha=alpha)
    noted = [note for each in mine for answers in (each.baseline, each.candidate) if answers for note in _notes(answers)]
    check = replace(check, verdict=result, reasons=(reason, *dict.fromkeys(noted)), figures=figures, has_evidence=True)
    return check, pooled_p_inferior(tasks, margin=pooled.margin / 100)


def verdict_of(low: float, high: float, limit: float) -> Result:
    """The rule, for bounds and limit in one unit. A bound that is NaN decides nothing."""
    if high <= limit:
        return "PASS"
    return "FAIL" if low > limit else "INCONCLUSIVE"


def _decided(check: Check, pairing: Pairing, *, has_evidence: bool) -> Check:
    """The check with bounds and, where the scores are evidence, by the rule."""
    low, high = damage_bound(pairing.pairs, alpha=check.figures["alpha"])
    delta = _mean_delta(pairing.pairs)
    figures = check.figures | {"delta": 100 * delta, "damage_low": 100 * low, "damage_high": 100 * high}
    if not has_evidence:
        return replace(check, figures=figures)
    result = verdict_of(low, high, check.figures["margin"] / 100)
    can_lose = damage_bound(_all_wrong(pairing.pairs), alpha=check.figures["alpha"])[0]
    if result == "PASS" and not can_lose > check.figures["margin"] / 100:
        return replace(check, reasons=(_nothing_to_lose(figures, can_lose),), figures=figures, has_evidence=True)
    of = f"({_asked(figures)})"
    reason = f"{_change(delta, figures)}; {_against_margin(figures, result)} {of}"
    if result == "INCONCLUSIVE":
        reason += "; " + would_decide(pairing, margin=figures["margin"], alpha=figures["alpha"])
    return replace(check, verdict=result, reasons=(reason,), figures=figures, has_evidence=True)


def _all_wrong(pairs: Sequence[QuestionPair]) -> list[QuestionPair]:
    """The same with a candidate that answers nothing right: its damage is the baseline's own score."""
    return [replace(pair, candidate=0.0) for pair in pairs]


def _nothing_to_lose(figures: dict[str, Any], can_lose: float) -> str:
    sure = f"with {100 * (1 - figures['alpha']):g} % confidence"
    return (
        f"the baseline's own score is {sure} only above {_down(max(0.0, 100 * can_lose))}, no more than the margin of "
        f"{figures['margin']:g}: a candidate that answers nothing right would pass, too; a smaller margin, or questions that the baseline can answer"
    )


def _amounts(baseline: Answers, candidate: Answers, pairing: Pairing) -> dict[str, Any]:
    """What was compared. Values in points where they are shares, over the questions that both answered."""
    pairs = pairing.pairs
    scale = 100 if baseline.is_share and candidate.is_share else 1
    return {
        "baseline_value": scale * math.fsum(pair.baseline for pair in pairs) / len(pairs) if pairs else None,
        "candidate_value": scale * math.fsum(pair.candidate for pair in pairs) / len(pairs) if pairs else None,
        "metric": candidate.metric,
        "n_questions": len(pairs),
        "n_expected": pairing.n_expected,
        "n_clusters": len({pair.cluster for pair in pairs}),
        "repeats": candidate.repeats,
        "coverage": pairing.coverage,
        "paired_by": pairing.paired_by,
        "worse": sum(pair.candidate < pair.baseline for pair in pairs),
        "better": sum(pair.candidate > pair.baseline for pair in pairs),
    }


def _mean_delta(pairs: Sequence[QuestionPair]) -> float:
    return math.fsum(pair.candidate - pair.baseline for pair in pairs) / len(pairs)


def _change(delta: float, figures: dict[str, Any] | None = None) -> str:
    points = f"{abs(100 * delta):.1f}"
    told = "no change" if points == "0.0" else f"{points} points {'worse' if delta < 0 else 'better'}"
    return told if figures is None else f"{told} ({figures['candidate_value']:.1f} against {figures['baseline_value']:.1f})"


def _against_margin(figures: dict[str, Any], result: Result) -> str:
    low, high, margin = figures["damage_low"], figures["damage_high"], f"{figures['margin']:g}"
    sure = f"with {100 * (1 - figures['alpha']):g} % confidence"
    if result == "PASS":
        return f"{sure} at most {_up(high)} points of damage, within the margin of {margin}"
    if result == "FAIL":
        return f"{sure} at least {_down(low)} points of damage, beyond the margin of {margin}"
    return f"{sure} each way between {_down(low)} and {_up(high)} points of damage, which leaves the margin of {margin} open"


def _up(points: float) -> str:
    return f"{math.ceil(10 * points - 1e-9) / 10:.1f}"


def _down(points: float) -> str:
    return f"{math.floor(10 * points + 1e-9) / 10:.1f}"


def _asked(figures: dict[str, Any]) -> str:
    repeats = f" × {figures['repeats']} repeats" if figures["repeats"] > 1 else ""
    clusters = f" in {figures['n_clusters']:,} clusters" if figures["n_clusters"] < figures["n_questions"] else ""
    missing = f", {100 * figures['coverage']:.1f} % scored" if figures["coverage"] < 1 else ""
    return f"{figures['n_questions']:,} questions{clusters}{repeats}{missing}"
