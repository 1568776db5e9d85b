"""Which run of a suite a claim is decided by: the newest finished one that is of the suite as its file is now. No torch.

A rehearsal, an unfinished and a withdrawn run decide nothing; nor does one that was asked for something else than the file asks for today, or
that is of other weights than lie there now. Each is named, with what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from harness.accepted import invalidated
from harness.errors import ModelError, StoreError
from harness.evidence import Answers, RunEvidence, open_run_evidence
from harness.models import resolve_model
from harness.records import read_json
from harness.resolved import changed_since
from harness.schema import Model
from harness.store import Store, cache_folder
from harness.suite import Suite

_SHOWN = 3
"""Differences between a suite and a run that an error names."""


@dataclass(frozen=True)
class SuiteRun:
    """A suite and the run that stands for it."""

    suite: Suite
    evidence: RunEvidence

    @property
    def place(self) -> str:
        """Suite and run, as folders below the results."""
        return f"{self.evidence.folder.parent.name}/{self.evidence.folder.name}"

    @cached_property
    def alike(self) -> set[tuple[str, str, str, str]]:
        """(place of a run, variant of it, variant of this, task) of answers that were found comparable: many claims ask for the same."""
        return set()

    @cached_property
    def _answers(self) -> Any:
        return cache(self.evidence.answers)

    def answers(self, variant: str, task: str) -> Answers | None:
        """As `RunEvidence.answers`, read once."""
        return self._answers(variant, task)

    def members(self, name: str) -> list[dict[str, Any]]:
        """The records of the variants that are one cell: those declared under the name, or the one that has it."""
        records = list(self.evidence.variants.values())
        return [v for v in records if v.get("group") == name] or [v for v in records if v["name"] == name]


def runs_of(suites: dict[str, Suite], results: Path) -> dict[str, SuiteRun]:
    """The run that stands for each suite, by its name; StoreError with a line for each that has none."""
    if not results.is_dir():
        raise StoreError(f"--results {results}: there is no such folder; give one that runs were written to, such as results")
    withdrawn = invalidated(results)
    found, problems = {}, []
    for name, suite in suites.items():
        try:
            found[name] = SuiteRun(suite, open_run_evidence(_folder(suite, results, withdrawn)))
        except StoreError as error:
            problems.append(str(error))
    if problems:
        hint = (
            [f"{len(found)} of {len(suites)} suites have a run; --claim ID decides a claim whose suites have theirs"]
            if found
            else []
        )
        raise StoreError("\n".join([*problems, *hint]))
    return found


def _folder(suite: Suite, results: Path, withdrawn: dict[tuple[str, str], str]) -> Path:
    """The newest run folder that may decide something; StoreError that says what is there instead."""
    again = f"run it: harness run {suite.path} --results {results}"
    useless: dict[str, int] = {}
    stale: tuple[Path, list[str]] | None = None
    for path in sorted((results / suite.name).glob("*/run.json"), reverse=True):
        about = read_json(path)
        if about.get("rehearsal") is not False:
            kind = "a rehearsal, whose figures say nothing of the model"
        elif about.get("status") != "complete":
            kind = "unfinished"
        elif (suite.name, path.parent.name) in withdrawn:
            kind = "withdrawn"
        else:
            changes = [*changed_since(suite, about), *_other_weights(suite, about)]
            if not changes:
                return path.parent
            stale = stale or (path.parent, changes)
            continue
        useless[kind] = useless.get(kind, 0) + 1
    if stale is not None:
        folder, changes = stale
        more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise StoreError(
            f"{folder}: stale, the suite {suite.path} is another one now: {'; '.join(changes[:_SHOWN])}{more}; put the file back, or {again}"
        )
    seen = "; ".join(f"{n} {'is' if n == 1 else 'are'} {kind}" for kind, n in useless.items())
    there = f" ({seen})" if seen else ""
    raise StoreError(f"{results / suite.name}: no finished run of the suite {suite.name}{there}; {again}")


def _other_weights(suite: Suite, about: dict[str, Any]) -> Iterator[str]:
    """The models of a suite whose weights here and now are not those of the run. Of weights that do not lie here the record is all there is.

    StoreError: a folder is there, and its files are not what they were when it was made.
    """
    kept = {variant["name"]: variant.get("teacher_fingerprint") for variant in about["variants"]}
    models = [(suite.model, (about.get("model") or {}).get("fingerprint"))]
    models += [
        (Model(path=variant.teacher.path, revision=variant.teacher.revision), kept.get(variant.name))
        for variant in suite.variants
        if variant.teacher is not None
    ]
    seen = set()
    for model, recorded in models:
        if (model.path, recorded) in seen:
            continue
        seen.add((model.path, recorded))
        try:
            now = resolve_model(model, Store(cache_folder())).fingerprint
        except ModelError as error:
            if Path(model.path).expanduser().is_dir():
                raise StoreError(str(error)) from error
            continue
        if now != recorded:
            yield f"model {model.path} has the weights {now[:12]} now, {str(recorded)[:12]} in the run"
