"""Whether a release gate may look at a score at all: of the run, of its variants, of each task, each kind of defect as a sentence.

What is found here never makes a PASS or a FAIL. A check without admissible evidence stays what every check is born as: INCONCLUSIVE.
No torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from harness.comparable import differences
from harness.gate_kernels import NOT_QUANTIZED, kernel_flaws
from harness.null_variants import have_same_weights, twin_of
from harness.selection import selection_tasks

if TYPE_CHECKING:
    from harness.evidence import Answers, Pairing, RunEvidence
    from harness.schema_gate import Gate, GateTask, Tier

Result = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Kind = Literal["task", "pooled", "ceiling", "sanity", "evidence"]
TRAINED = ("qat", "qad")
_ADMITTED_BY = {
    "imported": "admit_imported",
    "unverified": "admit_unverified",
    "kernels unverified": "admit_unverified",
    "no fingerprint": "admit_unverified",
}
"""The key of a policy that admits scores with a flag; a flag that is neither here nor in `NOTED` is admitted by none."""
NOTED = ("merged input scales",)
"""Flags that every policy admits and says: vLLM takes the same largest scale, so what was scored is what is served. Beside "judge", too."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. It is born INCONCLUSIVE and without evidence.

    reasons: sentences for whoever decides. figures: what they are made of. has_evidence: what it would need was measured, and may be used.
    """

    name: str
    kind: Kind
    tier: Tier
    verdict: Result = "INCONCLUSIVE"
    reasons: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    has_evidence: bool = False


def run_check(run: RunEvidence, withdrawn: str | None) -> Check:
    """Whether the run as a whole may decide a release. withdrawn: the reason, if it was invalidated."""
    flaws = []
    status = run.about.get("status")
    if status != "complete":
        flaws.append(f"the run is {status or 'without a status'}: its suite has stages left, run it again")
    rehearsal = run.about.get("rehearsal")
    if rehearsal not in (True, False):
        flaws.append("the run may be a rehearsal, since its run.json does not say that it is none: run its suite again")
    elif rehearsal:
        flaws.append("the run is a rehearsal: its scores say that the suite works, not what the model is worth")
    if withdrawn is not None:
        flaws.append(f"the run was invalidated: {withdrawn}")
    return _evidence("the run", flaws, "the run is complete")


def variants_check(run: RunEvidence, policy: Gate, *, candidate: str, baseline: str | None) -> Check:
    """Whether candidate and baseline are there, are two, and trained at the same cost where both are trained."""
    flaws = []
    if baseline is None:
        flaws.append('there is no baseline: no variant has method = "bf16" without sampling_seed, and none is named')
    for name in (candidate, baseline):
        if name is not None and name not in run.variants:
            flaws.append(f"the run has no variant {name}{near(name, list(run.variants))}")
    if candidate == baseline:
        flaws.append(f"{candidate} is compared with itself, which says nothing of a candidate")
    if not flaws and baseline is not None:
        ours, theirs = run.variants[baseline], run.variants[candidate]
        if have_same_weights(ours, theirs) and theirs.get("method") not in NOT_QUANTIZED:
            told = "so the two differ by chance alone, whatever was lost before; give BF16 as the baseline"
            flaws.append(f"{candidate} has the weights of {baseline}, {told}")
        flaws += _budget_flaws(theirs, ours, policy)
    return _evidence("the variants", flaws, f"{candidate} is compared with {baseline}")


def quantized(run: RunEvidence) -> list[str]:
    """The variants of a run that could be released: what is quantized, the same weights once."""
    variants = run.variants
    return [
        name
        for name, variant in variants.items()
        if variant.get("method") not in NOT_QUANTIZED and twin_of(variant, variants.values()) is None
    ]


def task_flaws(
    run: RunEvidence, policy: Gate, task: GateTask, baseline: Answers, candidate: Answers, pairing: Pairing
) -> list[str]:
    """Why the scores of a task are no evidence for this policy; empty where they are."""
    least = of_task(task, policy, "min_coverage")
    flaws = [sentence.removesuffix(".") for sentence in differences(run, baseline, candidate, min_coverage=least)]
    if not flaws and not pairing.coverage >= least:
        flaws.append(f"only {100 * pairing.coverage:.1f} % of the asked answers are scored, {100 * least:g} % are required")
    for answers in (baseline, candidate):
        flaws += _score_flaws(run, policy, answers)
    flaws += _amount_flaws(policy, task, pairing)
    return list(dict.fromkeys(flaws))


def missing_flaws(run: RunEvidence, task: str, *, candidate: str, baseline: str | None) -> list[str]:
    """What is said of a task that the run, or one of the two variants, has no result in."""
    if task not in run.tasks:
        return [f"the run has no task {task}{near(task, list(run.tasks))}"]
    lacking = [name for name in (baseline, candidate) if name is None or (name, task) not in run.rows]
    return [f"{name or 'a baseline'} has no result in {task}" for name in lacking]


def flag_flaws(flags: Any, policy: Gate, what: str) -> Iterator[str]:
    """A sentence for each flag of a figure that the policy does not admit. A figure without a list of flags is not one of this version."""
    if not isinstance(flags, list | tuple):
        yield f"{what} does not say whether it is verified"
        return
    for flag in flags:
        key = _ADMITTED_BY.get(flag)
        if is_noted(flag):
            continue
        if key is None:
            yield f"{what} is marked {flag!r}, which no policy admits"
        elif not getattr(policy, key):
            yield f"{what} is marked {flag!r}, and the policy does not admit that ({key} = true would)"


def notes_on(what: str, flags: Iterable[Any]) -> list[str]:
    """A sentence for each flag that is a note, and decides nothing."""
    return [f"noted: {what} is marked {flag!r}" for flag in flags if is_noted(flag)]


def is_noted(flag: Any) -> bool:
    """Whether a flag is a note, which is no reason against a score."""
    return isinstance(flag, str) and flag.removeprefix("judge ") in NOTED


def near(name: str, known: list[str]) -> str:
    """What could have been meant, and what there is."""
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"; did you mean {closest[0]}?" if closest else ";") + f" it has {', '.join(known) or 'none'}"


def _evidence(name: str, flaws: list[str], fine: str) -> Check:
    if flaws:
        return Check(name, "evidence", "critical", reasons=tuple(flaws))
    return Check(name, "evidence", "critical", "PASS", (fine,), has_evidence=True)


def _budget_flaws(candidate: dict[str, Any], baseline: dict[str, Any], policy: Gate) -> Iterator[str]:
    """A tuned learning rate is no budget; tokens and steps are. Of a checkpoint made elsewhere neither is known, so not of two of them either."""
    if policy.admit_unequal_budgets or not {candidate.get("method"), baseline.get("method")} <= {*TRAINED, "checkpoint"}:
        return
    found = [(variant.get("budget") or {}, variant["name"]) for variant in (candidate, baseline)]
    for key in ("tokens", "steps"):
        numbers = [budget.get(key) for budget, _ in found]
        if None in numbers or numbers[0] != numbers[1]:
            told = " and ".join(
                f"{name} on {'an unknown number of' if n is None else f'{n:,}'} {key}"
                for n, (_, name) in zip(numbers, found, strict=True)
            )
            yield f"trained at different cost: {told} (admit_unequal_budgets = true would admit that)"


def _score_flaws(run: RunEvidence, policy: Gate, answers: Answers) -> Iterator[str]:
    row, variant = answers.row, run.variants[answers.variant]
    what = f"{answers.variant}'s score"
    is_known = answers.higher_is_better is not None or (answers.is_imported and policy.admit_imported)
    if not answers.is_share:
        yield f"{answers.metric} is no share, so no margin in points applies to it"
    elif answers.higher_is_better is False or not is_known:
        direction = "is better when lower" if is_known else "is not known to be better when higher"
        yield f"{answers.metric} {direction}, so no margin in points applies to it"
    if row.get("is_partial") is not False:
        yield f"{what} is of the first {_number(row.get('n_questions'))} questions only (limit)"
    flags = row.get("flags")
    if answers.is_imported and isinstance(flags, list | tuple):
        flags = list(dict.fromkeys([*flags, "imported"]))
    yield from kernel_flaws(variant, row.get("kernels"), flags, policy, what)
    yield from flag_flaws(flags, policy, what)
    if answers.task in selection_tasks(variant):
        yield f"{answers.task} chose the checkpoint of {answers.variant} among several, so its score there is optimistic"


def _amount_flaws(policy: Gate, task: GateTask, pairing: Pairing) -> Iterator[str]:
    for what, n in (("questions", len(pairing.pairs)), ("clusters", len({pair.cluster for pair in pairing.pairs}))):
        least = of_task(task, policy, f"min_{what}")
        if n < least:
            yield f"{n:,} {what} answered by both, of at least {least:,}"


def of_task(task: GateTask, policy: Gate, key: str) -> Any:
    """A key of the task or, where it says nothing, of the policy."""
    own = getattr(task, key)
    return getattr(policy, key) if own is None else own


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "few"
