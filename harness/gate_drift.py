"""A candidate beside the last accepted release of its suite: an advisory check of scores and KL (`harness.drift`). No torch.

It is shown and decides nothing: what was accepted once may itself have been worse than BF16 allows.
"""

from __future__ import annotations

from pathlib import Path

from harness.accepted import last_accepted, untrusted
from harness.drift import drift
from harness.errors import StoreError
from harness.evidence import RunEvidence, open_run_evidence
from harness.gate_checks import Check, Result, near

NAME = "against the last accepted run"


def drift_check(run: RunEvidence, candidate: str, results: Path) -> Check | None:
    """The check; None where the suite has no accepted release, or where this run is it. StoreError: the log of releases is damaged.

    FAIL: a score fell or KL rose by more than chance. INCONCLUSIVE: the two cannot be compared.
    """
    suite = str(run.about.get("suite", ""))
    doubt = untrusted(results, suite)
    if doubt is not None:
        return Check(NAME, "sanity", "advisory", reasons=(doubt,))
    entry = last_accepted(results, suite)
    if entry is None or entry["run"] == run.about.get("run"):
        return None
    name = entry["candidate"] or candidate
    figures = {"run": entry["run"], "accepted": entry["when"], "candidate": name}
    try:
        before = open_run_evidence(results / suite / entry["run"])
        if name not in before.variants:
            reason = f"the accepted run {entry['run']} has no variant {name}{near(name, list(before.variants))}"
            return Check(NAME, "sanity", "advisory", reasons=(reason,), figures=figures)
        found = drift(before, run, variants=[(name, candidate)])
    except StoreError as error:
        return Check(
            NAME, "sanity", "advisory", reasons=(f"the accepted run cannot be compared with: {error}",), figures=figures
        )
    is_worse = any((shift.change > 0) == (shift.what == "KL") for shift in found.shifts)
    verdict: Result = "INCONCLUSIVE" if not found.n_compared else "FAIL" if is_worse else "PASS"
    reason = f"since {name} of {entry['run']}, accepted {entry['when']}: {found.sentence()}"
    return Check(
        NAME, "sanity", "advisory", verdict, (reason,), figures | found.as_record(), has_evidence=bool(found.n_compared)
    )
