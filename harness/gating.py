"""What `harness gate` does: open the run, find policy, baseline and candidates, judge each, write and print the verdicts. No torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from harness.accepted import run_digest, withdrawn_reason
from harness.errors import SuiteError
from harness.evidence import RunEvidence, open_run_evidence
from harness.gate import Decision, as_record, judge_run, resolve_policy, worst
from harness.gate_checks import quantized
from harness.gate_drift import drift_check
from harness.schema_gate import Gate
from harness.verdict_files import print_verdicts, remove_verdicts, write_verdicts


def gate(
    run: Path,
    console: Console,
    *,
    policy: Path | None = None,
    candidates: tuple[str, ...] = (),
    baseline: str | None = None,
    each: bool = False,
    out: Path | None = None,
) -> Decision:
    """Judge and return the worst verdict; its files stand in `out`, or in the run folder.

    The run is looked up in the log of releases beside it: a withdrawn one is never GO, and an accepted one is what a new one is shown beside.
    Files of an earlier verdict are removed first, so that none outlives a judgement that ends in an error. SuiteError: the policy, or no
    candidate.  StoreError: the run.
    """
    folder = out or run
    remove_verdicts(folder)
    evidence = open_run_evidence(run)
    rule, source = resolve_policy(evidence, policy)
    names = _candidates(evidence, rule, candidates, each=each)
    results = Path(os.path.realpath(run)).parent.parent
    withdrawn = withdrawn_reason(run, evidence.about)
    verdicts = []
    for name in names:
        verdict = judge_run(evidence, rule, candidate=name, baseline=baseline, withdrawn=withdrawn)
        drift = drift_check(evidence, name, results)
        verdicts.append(verdict if drift is None else replace(verdict, checks=(*verdict.checks, drift)))
    record = as_record(verdicts, evidence, source) | {"digest": run_digest(run)}
    paths = write_verdicts(record, folder)
    print_verdicts(record, console)
    console.print(f"written: {', '.join(map(str, paths))}", highlight=False, markup=False, soft_wrap=True)
    return worst(verdicts)


def _candidates(run: RunEvidence, policy: Gate, asked: tuple[str, ...], *, each: bool) -> list[str]:
    """The candidates to judge: those asked for, with --each all quantized ones (each weights once), else the policy's."""
    released = quantized(run)
    if len(asked) > 1 and not each:
        raise SuiteError(
            f"--candidate {','.join(asked)}: several candidates are judged one by one with --each; exits with the worst"
        )
    if asked:
        return list(dict.fromkeys(asked))
    if each:
        if not released:
            raise SuiteError(
                f"{run.folder}: --each: no variant is quantized, so there is no candidate; it has {', '.join(run.variants)}"
            )
        return released
    if policy.candidate is not None:
        return [policy.candidate]
    known = ", ".join(released) or "none is quantized"
    raise SuiteError(f"{run.folder}: no candidate is named; give --candidate, or --each for all that are quantized: {known}")
