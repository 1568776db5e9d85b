"""Whether training is worth its cost: the release gate's own rule (`harness.gate`), asked of the variant that is not trained. No torch.

Passing untrained, a candidate has nothing to gain by the policy; failing, it has. The run may be unfinished: that QAT and QAD are still to come is
what the question is about, so it alone is no reason against the verdict here. All else that the gate looks at counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.accepted import withdrawn_reason
from harness.errors import SuiteError
from harness.evidence import open_run_evidence
from harness.gate import Check, Verdict, judge_run
from harness.gate_checks import TRAINED, quantized
from harness.policy import resolve_policy

if TYPE_CHECKING:
    from harness.evidence import RunEvidence


@dataclass(frozen=True)
class Advice:
    """is_worth_training: None where the evidence does not tell. lines: the advice and its reasons, to print."""

    is_worth_training: bool | None
    lines: tuple[str, ...]


def advise(folder: Path, *, policy_path: Path | None = None, candidate: str | None = None) -> Advice:
    """What the run in `folder` says of training, by the policy in a file or by the `[gate]` of its suite.

    candidate: a variant that is not trained; may be left out where there is one PTQ variant. Raises StoreError for a folder that is no run,
    SuiteError for a policy with mistakes or none, and for a candidate that is not there, is trained, or could be several.
    """
    run = open_run_evidence(folder)
    policy, source = resolve_policy(run, policy_path)
    name = _candidate(run, candidate)
    verdict = judge_run(_as_far_as_it_is(run), policy, candidate=name, withdrawn=withdrawn_reason(folder, run.about))
    by = f"by the policy {source}" if policy_path else "by its suite's [gate]"
    if verdict.verdict == "GO":
        return Advice(
            False, (f"not worth training: {name} passes untrained, {by}", *_indented(verdict.reasons), *_to_come(run))
        )
    if verdict.verdict == "NO-GO":
        failed = ", ".join(check.name for check in _failed(verdict))
        return Advice(True, (f"worth training: {name} fails in {failed}, {by}", *_indented(verdict.reasons), *_to_come(run)))
    return Advice(None, (f"cannot tell yet whether training is worth it, {by}; open:", *_indented(verdict.reasons)))


def _candidate(run: RunEvidence, asked: str | None) -> str:
    untrained = [name for name in quantized(run) if run.variants[name].get("method") == "ptq"]
    if asked is None and len(untrained) == 1:
        return untrained[0]
    if asked is None:
        found = f"its PTQ variants are {', '.join(untrained)}" if untrained else "it has no PTQ variant"
        raise SuiteError(f"{run.folder}: {found}; say with --candidate which variant the advice is about")
    if asked not in run.variants:
        raise SuiteError(f"--candidate {asked}: {run.folder} has no such variant. Known: {', '.join(run.variants)}")
    if run.variants[asked].get("method") in TRAINED:
        raise SuiteError(
            f"--candidate {asked}: is trained, and the advice is about whether to train; give a variant that is not, or judge this one: "
            f"harness gate {run.folder} --candidate {asked}"
        )
    return asked


def _as_far_as_it_is(run: RunEvidence) -> RunEvidence:
    """The run, its stages to come left out of account."""
    return replace(run, about=run.about | {"status": "complete"}) if run.about.get("status") == "unfinished" else run


def _failed(verdict: Verdict) -> list[Check]:
    """The checks that a NO-GO comes from."""
    return [check for check in verdict.checks if check.verdict == "FAIL" and check.tier != "advisory"]


def _to_come(run: RunEvidence) -> list[str]:
    """The trainings that the suite asks for, with their cost where they are not done."""
    trained = {name: variant for name, variant in run.variants.items() if variant.get("method") in TRAINED}
    if not trained:
        return ["its suite trains no variant"]
    done = [name for name in trained if any(variant == name for variant, _ in run.rows)]
    ahead = [
        f"{name} ({(trained[name].get('training') or {}).get('tokens', 0):,} tokens)" for name in trained if name not in done
    ]
    return ([f"still to train: {', '.join(ahead)}"] if ahead else []) + (
        [f"trained already: {', '.join(done)}"] if done else []
    )


def _indented(lines: tuple[str, ...]) -> list[str]:
    return [f"  {line}" for line in lines]
