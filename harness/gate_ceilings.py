"""Ceilings of a release policy: KL, saturated activation blocks, incomplete answers, growth of answers. No torch.

Where a figure has an error it is judged by bounds, as a margin is: PASS when the upper bound is at most the ceiling, FAIL when the lower one is
above it, else INCONCLUSIVE; both one-sided at alpha. What was not measured, and what is no amount, is INCONCLUSIVE, and so is a FAIL where the
baseline itself is beyond the ceiling: that is no regression. Ceilings are critical; those of an advisory task are advisory.

KL                nats a response token, Student's t over sequences (over questions, where it was measured on answers)
saturated share   a count over all blocks of the measured text, which has no sampling error of its own: the figure itself
incomplete share  over questions of the share of their repeats (`intervals.mean_interval`)
length growth     sum of the candidate's tokens / sum of the baseline's - 1, over answers that both gave; linearized error over clusters
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

from scipy.special import stdtrit

from harness.gate_checks import Check, flag_flaws, notes_on, of_task
from harness.gate_kernels import NOT_QUANTIZED, kernel_flaws
from harness.gate_tasks import Measured, verdict_of
from harness.intervals import mean_interval
from harness.null_variants import twin_of
from qad.clustered import ratio_over_clusters

if TYPE_CHECKING:
    from harness.evidence import RunEvidence
    from harness.schema_gate import Gate, Tier


def judge_ceilings(
    run: RunEvidence, policy: Gate, candidate: str, baseline: str | None, measured: list[Measured]
) -> list[Check]:
    """The checks of all ceilings that the policy has."""
    found = []
    if policy.max_kl is not None:
        found.append(_kl(run, policy, candidate, policy.max_kl))
    if policy.max_saturated_share is not None:
        found.append(_saturated(run, policy, candidate, baseline, policy.max_saturated_share))
    for each in measured:
        found += _of_a_task(policy, each)
    return found


def _kl(run: RunEvidence, policy: Gate, candidate: str, ceiling: float) -> Check:
    check = Check("KL", "ceiling", "critical", figures={"ceiling": ceiling, "alpha": policy.alpha})
    row, flaws, notes = _diagnostics(run, policy, candidate)
    response = (row or {}).get("response") or {}
    kl, stderr = response.get("kl"), response.get("kl_stderr")
    n = response.get("n_questions") or response.get("n_sequences") or 0
    if not flaws and not (_is_amount(kl) and _is_amount(stderr) and _is_amount(n)):
        flaws = [f"the KL of {candidate} has no value or no error, or they are no amounts: found {kl}, {stderr} over {n}"]
    if not flaws and n < max(policy.min_clusters, 2):
        flaws = [f"the KL of {candidate} is over {n:,} sequences, of at least {policy.min_clusters:,} (min_clusters)"]
    if flaws or kl is None or stderr is None:
        return replace(check, reasons=(*flaws, *notes))
    half = float(stdtrit(n - 1, 1 - policy.alpha)) * stderr
    check = _bounded(check, kl, kl - half, kl + half, ".3f", "nats a token", f"{n:,} sequences")
    return replace(check, reasons=(*check.reasons, *notes))


def _saturated(run: RunEvidence, policy: Gate, candidate: str, baseline: str | None, ceiling: float) -> Check:
    check = Check("saturated share", "ceiling", "critical", figures={"ceiling": ceiling})
    quantization = run.variants.get(candidate, {}).get("quantization")
    if quantization is not None and quantization.get("activations") is False:
        reason = f"the activations of {candidate} are not quantized, so that none saturates"
        return replace(check, verdict="PASS", reasons=(reason,), has_evidence=True)
    if run.variants.get(candidate, {}).get("method") in NOT_QUANTIZED:
        return replace(check, verdict="PASS", reasons=(f"nothing of {candidate} is quantized",), has_evidence=True)
    row, flaws, notes = _diagnostics(run, policy, candidate)
    share = (row or {}).get("saturated_share")
    if not flaws and not (_is_amount(share) and share <= 1):
        flaws = [f"the saturated share of {candidate} was not measured" + (f": found {share}" if share is not None else "")]
    if flaws or share is None:
        return replace(check, reasons=(*flaws, *notes))
    is_within = share <= ceiling
    reason = f"{100 * share:.3g} % of activation blocks saturate, {'within' if is_within else 'beyond'} the ceiling of {100 * ceiling:g} %"
    figures = check.figures | {"value": share}
    check = replace(
        check, verdict="PASS" if is_within else "FAIL", reasons=(reason, *notes), figures=figures, has_evidence=True
    )
    own = (run.diagnostics.get(str(baseline)) or {}).get("saturated_share")
    return _no_regression(check, 100 * own, 100 * ceiling) if _is_amount(own) else check


def _diagnostics(run: RunEvidence, policy: Gate, candidate: str) -> tuple[dict[str, Any] | None, list[str], list[str]]:
    """The row of the candidate, or of the variant with the same weights that only draws otherwise; why it is no evidence; what is noted of it."""
    variant = run.variants.get(candidate, {})
    same_weights = (twin_of(variant, run.variants.values()) or variant).get("name")
    row = run.diagnostics.get(candidate) or run.diagnostics.get(str(same_weights))
    if row is None or candidate not in run.variants:
        return None, [f"not measured: the run has no [diagnostics] of {candidate}"], []
    what = f"the KL of {candidate}"
    flagged = [row, *(row.get("tasks") or {}).values()]
    flags = sorted({str(flag) for part in flagged for flag in part.get("flags") or ()})
    flaws = [*kernel_flaws(variant, row.get("kernels"), flags, policy, what), *flag_flaws(flags, policy, what)]
    return row, flaws, notes_on(what, flags)


def _of_a_task(policy: Gate, measured: Measured) -> Iterator[Check]:
    task = measured.task
    for key, name, judge in (
        ("max_incomplete_rate", "incomplete answers", _incomplete),
        ("max_length_growth", "answer length", _growth),
    ):
        ceiling = of_task(task, policy, key)
        if ceiling is None or (getattr(task, key) is None and _generates_nothing(measured)):
            continue
        tier: Tier = "advisory" if task.tier == "advisory" else "critical"
        figures = {"ceiling": ceiling, "alpha": measured.check.figures["alpha"], "task": task.name}
        check = Check(f"{task.name}: {name}", "ceiling", tier, figures=figures)
        if measured.check.has_evidence:
            yield judge(check, measured)
        else:
            yield replace(check, reasons=(f"not judged: no evidence in {task.name}, see there",))


def _generates_nothing(measured: Measured) -> bool:
    """Whether the task asks for likelihoods: of an answer that was generated here something is always known, its length at least."""
    both = [answers for answers in (measured.baseline, measured.candidate) if answers is not None]
    return len(both) == 2 and all(
        not answers.is_imported
        and all({*q.incomplete, *q.truncated, *q.n_tokens} <= {None} for q in answers.questions.values())
        for answers in both
    )


def _incomplete(check: Check, measured: Measured) -> Check:
    assert measured.pairing is not None
    values, clusters, repeats = [], [], 1
    for _, question in measured.pairing.questions:
        known = [is_incomplete for is_incomplete in question.incomplete if is_incomplete is not None]
        if len(known) < question.n_scored or not known:
            return replace(check, reasons=("not measured: whether answers are complete is not known",))
        values.append(sum(known) / len(known))
        clusters.append(question.cluster)
        repeats = max(repeats, len(known))
    interval = mean_interval(values, clusters, confidence=1 - 2 * check.figures["alpha"], repeats=repeats)
    if interval is None:
        return replace(check, reasons=("not measured: no answer",))
    value = 100 * sum(values) / len(values)
    check = replace(check, figures=check.figures | {"ceiling": 100 * check.figures["ceiling"]})
    check = _bounded(check, value, 100 * interval.low, 100 * interval.high, ".1f", "% incomplete", f"{len(values):,} questions")
    known = [cut for first, _ in measured.pairing.questions for cut in first.incomplete if cut is not None]
    return _no_regression(check, 100 * sum(known) / len(known), check.figures["ceiling"]) if known else check


def _growth(check: Check, measured: Measured) -> Check:
    assert measured.pairing is not None
    ours, theirs, clusters = [], [], []
    for first, second in measured.pairing.questions:
        pairs = zip(first.n_tokens, second.n_tokens, strict=False)
        both = [(before, after) for before, after in pairs if _is_amount(before) and _is_amount(after)]
        if both:
            ours.append(sum(int(before) for before, _ in both))
            theirs.append(sum(int(after) for _, after in both))
            clusters.append(first.cluster)
    m = len(set(clusters))
    if len(ours) < len(measured.pairing.questions) or not sum(ours) or m < 2:
        return replace(check, reasons=("not measured: how long the answers are is not known",))
    ratio, stderr = ratio_over_clusters(theirs, ours, clusters)
    half = float(stdtrit(m - 1, 1 - check.figures["alpha"])) * (stderr or 0.0)
    low, value, high = (100 * (ratio - 1 + shift) for shift in (-half, 0.0, half))
    check = replace(check, figures=check.figures | {"ceiling": 100 * check.figures["ceiling"]})
    return _bounded(check, value, low, high, "+.1f", "% in length of answers", f"{len(ours):,} questions")


def _no_regression(check: Check, own: float, ceiling: float) -> Check:
    """A FAIL where the baseline is beyond the ceiling, too, tells nothing of the candidate; own, ceiling: in one unit, percent."""
    if check.verdict != "FAIL" or own <= ceiling:
        return check
    why = f"the baseline itself is beyond it ({own:.3g} %), so this is no regression; a higher ceiling, or a better baseline"
    return replace(
        check, verdict="INCONCLUSIVE", reasons=(*check.reasons, why), figures=check.figures | {"baseline_value": own}
    )


def _is_amount(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a count, a share or a divergence can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _bounded(check: Check, value: float, low: float, high: float, form: str, unit: str, n: str) -> Check:
    """The check decided by the bounds of a figure; all in the unit of its ceiling."""
    ceiling = check.figures["ceiling"]
    result = verdict_of(low, high, ceiling)
    sure = f"with {100 * (1 - check.figures['alpha']):g} % confidence"
    told = {
        "PASS": f"{sure} at most {high:{form}}, within the ceiling of {ceiling:g}",
        "FAIL": f"{sure} at least {low:{form}}, beyond the ceiling of {ceiling:g}",
        "INCONCLUSIVE": f"{sure} each way between {low:{form}} and {high:{form}}, which leaves the ceiling of {ceiling:g} open",
    }[result]
    figures = check.figures | {"value": value, "low": low, "high": high, "unit": unit}
    return replace(check, verdict=result, reasons=(f"{value:{form}} {unit}; {told} ({n})",), figures=figures, has_evidence=True)
