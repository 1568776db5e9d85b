"""The release gate: a run and a policy in, GO, NO-GO or INCONCLUSIVE out, with reasons. Pure; nothing is printed or written. No torch.

Everything is born INCONCLUSIVE. From checks to the verdict:

INCONCLUSIVE  the run, its variants or its baseline are no evidence (`gate_checks`, `gate_sanity`): whatever the scores say
NO-GO         a critical check FAILs, or a supporting one does after Holm over the supporting ones
GO            at least one critical task (or the pooled endpoint) and every critical check PASSes, no supporting one FAILs, and each of those was
              measured with admissible evidence
INCONCLUSIVE  all else

Advisory checks are shown and decide nothing. Ceilings count as critical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from harness.gate_ceilings import judge_ceilings
from harness.gate_checks import Check, run_check, variants_check
from harness.gate_sanity import sanity_checks
from harness.gate_tasks import Measured, correct_supporting, judge_pooled, judge_task, p_beyond
from harness.policy import OF_THE_SUITE, as_plain, resolve_policy

if TYPE_CHECKING:
    from harness.evidence import RunEvidence
    from harness.schema_gate import Gate

__all__ = ["ORDER", "Check", "Verdict", "as_record", "decide", "judge_run", "resolve_policy", "worst"]

SCHEMA = 1
Decision = Literal["GO", "NO-GO", "INCONCLUSIVE"]
ORDER: tuple[Decision, ...] = ("NO-GO", "INCONCLUSIVE", "GO")
"""From the worst to the best."""
_MOST_REASONS = 12


@dataclass(frozen=True)
class Verdict:
    """What is said of one candidate. policy: as it was applied. unnamed: tasks of the run that the policy does not name."""

    candidate: str
    baseline: str
    checks: tuple[Check, ...]
    policy: dict[str, Any]
    verdict: Decision = "INCONCLUSIVE"
    reasons: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()


def judge_run(
    run: RunEvidence, policy: Gate, *, candidate: str, baseline: str | None = None, withdrawn: str | None = None
) -> Verdict:
    """The verdict on one candidate of a run.

    Args:
        baseline: a variant; without one the policy's or, if it names none, the BF16 variant.
        withdrawn: why the run was invalidated, if it was.
    """
    baseline = baseline or policy.baseline or run.baseline
    general = [
        run_check(run, withdrawn),
        variants_check(run, policy, candidate=candidate, baseline=baseline),
        *sanity_checks(run, baseline),
    ]
    measured = [judge_task(run, policy, task, candidate=candidate, baseline=baseline) for task in policy.task]
    tasks = _with_pooled_and_holm(policy, measured)
    checks = [*general, *tasks, *judge_ceilings(run, policy, candidate, baseline, measured)]
    suspect = next((check for check in general if check.verdict != "PASS" and check.tier == "critical"), None)
    if suspect is not None:
        checks = [check if check in general else _void(check, suspect) for check in checks]
    verdict, reasons = decide(checks)
    named = {task.name for task in policy.task}
    return Verdict(
        candidate=candidate,
        baseline=baseline or "",
        checks=tuple(checks),
        policy=as_plain(policy),
        verdict=verdict,
        reasons=tuple(reasons),
        unnamed=tuple(name for name in run.tasks if name not in named),
    )


def decide(checks: Sequence[Check]) -> tuple[Decision, list[str]]:
    """The verdict from checks, and the reasons for it."""
    critical = [check for check in checks if check.tier == "critical"]
    supporting = [check for check in checks if check.tier == "supporting"]
    doubtful = [check for check in critical if check.kind in ("evidence", "sanity") and check.verdict != "PASS"]
    if doubtful:
        return "INCONCLUSIVE", _told(doubtful)
    failed = [check for check in (*critical, *supporting) if check.verdict == "FAIL"]
    if failed:
        return "NO-GO", _told(failed)
    if not any(check.kind in ("task", "pooled") for check in critical):
        return "INCONCLUSIVE", ["nothing critical was judged"]
    open_checks = [check for check in critical if check.verdict != "PASS" or not check.has_evidence]
    open_checks += [check for check in supporting if not check.has_evidence]
    if open_checks:
        return "INCONCLUSIVE", _told(open_checks)
    undecided = [check.name for check in supporting if check.verdict != "PASS"]
    aside = f"; undecided, but no FAIL: {', '.join(undecided)}" if undecided else ""
    told = _told([check for check in critical if check.kind in ("task", "pooled")])
    return "GO", [f"every critical check passes ({len(critical)}), no supporting one fails ({len(supporting)}){aside}", *told]


def worst(verdicts: Sequence[Verdict]) -> Decision:
    """The worst verdict; INCONCLUSIVE without any."""
    found = {verdict.verdict for verdict in verdicts}
    return next((decision for decision in ORDER if decision in found), "INCONCLUSIVE")


def as_record(verdicts: Sequence[Verdict], run: RunEvidence, source: str = OF_THE_SUITE) -> dict[str, Any]:
    """What verdict.json holds. source: of the policy, a path or "suite"."""
    return {
        "schema": SCHEMA,
        "suite": run.about.get("suite"),
        "run": run.about.get("run"),
        "verdict": worst(verdicts),
        "policy": {**(verdicts[0].policy if verdicts else {}), "source": source},
        "candidates": [
            {
                "candidate": verdict.candidate,
                "baseline": verdict.baseline,
                "verdict": verdict.verdict,
                "reasons": list(verdict.reasons),
                "checks": [_check_record(check) for check in verdict.checks],
                "not_in_policy": list(verdict.unnamed),
            }
            for verdict in verdicts
        ],
    }


def _with_pooled_and_holm(policy: Gate, measured: Sequence[Measured]) -> list[Check]:
    checks = [(each.check, p_beyond(each)) for each in measured]
    if policy.pooled is not None:
        checks.append(judge_pooled(policy, policy.pooled, measured))
    supporting = [index for index, (check, _) in enumerate(checks) if check.tier == "supporting"]
    corrected = correct_supporting([checks[index][0] for index in supporting], [checks[index][1] for index in supporting])
    by_index = dict(zip(supporting, corrected, strict=True))
    return [by_index.get(index, check) for index, (check, _) in enumerate(checks)]


def _void(check: Check, suspect: Check) -> Check:
    """A check whose figures stand, and whose verdict does not count because of what is wrong with the run."""
    why = "suspect baseline" if suspect.kind == "sanity" else "no evidence"
    reasons = (f"does not count: {why}, see {suspect.name}", *check.reasons)
    return replace(check, verdict="INCONCLUSIVE", reasons=reasons, has_evidence=False)


def _told(checks: Sequence[Check]) -> list[str]:
    told = [f"{check.name}: {reason}" for check in checks for reason in check.reasons or ("not measured",)]
    left = len(told) - _MOST_REASONS
    return told if left <= 0 else [*told[:_MOST_REASONS], f"and {left} more"]


def _check_record(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "kind": check.kind,
        "tier": check.tier,
        "verdict": check.verdict,
        "has_evidence": check.has_evidence,
        "reasons": list(check.reasons),
        "figures": check.figures,
    }
