"""What `harness plan` prints: stages, whether they are stored, requests, training tokens, the gate's power. No torch, no lm-eval."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from harness.done import adopt_imported, find_done
from harness.plan import Plan, Stage, make_plan
from harness.records import read_json
from harness.reference_metrics import mistaken_metrics
from harness.schema_data import Bos, Teacher
from harness.store import Store, StoredStage, cache_folder
from harness.suite import load_suite
from harness.tasks.sizes import MINI_TASKS, REQUESTS_A_QUESTION, n_questions


def outline(
    path: Path, *, policy: Path | None = None, results: Path = Path("results"), missing: list[str] | None = None
) -> list[str]:
    """Lines that describe the plan of the suite at `path`, and what its gate, or the policy in a file, will be able to decide.

    results: where earlier runs are, of which the newest finished one says how much answers vary.
    missing: as for `make_plan`.
    """
    suite = load_suite(path)
    store = Store(cache_folder())
    plan = make_plan(suite, store, missing=missing)
    unused = adopt_imported(plan, store)
    lines = [
        f"suite {suite.name}: model {suite.model.path} ({plan.source.origin})",
        *(f"note: {note}" for note in plan.source.notes),
    ]
    n_done = 0
    for stage in plan.stages:
        found = None if stage.is_external else find_done(stage, store)
        is_missing = stage.source is not None and stage.source.is_missing
        n_done += (stage.is_external and not is_missing) or found is not None
        state = (
            "missing"
            if is_missing
            else "external"
            if stage.is_external
            else "to do"
            if found is None
            else "imported"
            if found.is_imported
            else "stored"
        )
        key = found.record["key"] if found is not None else stage.key
        begun = _begun(stage, store) if state == "to do" else ""
        lines.append(f"  {state:8}  {key[:12]}  {stage.label}{_size(plan, stage, store)}{_origin(found)}{begun}")
    defaults = dict.fromkeys((variant.group, default) for variant in plan.variants for default in variant.defaults)
    lines += [f"{group}: default {default}" for group, default in defaults]
    lines += list(dict.fromkeys(task.default for task in plan.suite.tasks if task.default))
    lines += _missing_keys(plan)
    (lines if missing is None else missing).extend(mistaken_metrics(plan, store))
    lines += [*unused, *_left_behind(plan, store), f"{n_done} of {len(plan.stages)} stages are stored"]
    return lines + _gate(plan, store, policy, results)


def _missing_keys(plan: Plan) -> list[str]:
    """A line for each variable with a key of an endpoint that a run will want and that is not set here."""
    names = (endpoint.api_key_env for endpoint in plan.endpoints)
    return [
        f"{name} is not set here; harness run needs the key in it"
        for name in dict.fromkeys(names)
        if name and not os.environ.get(name)
    ]


def _gate(plan: Plan, store: Store, policy: Path | None, results: Path) -> list[str]:
    """What can be decided, where there is a policy."""
    if policy is None and plan.suite.gate is None:
        return []
    from harness.plan_gate import gate_lines
    from harness.policy import OF_THE_SUITE, load_policy

    given = plan.suite.gate if policy is None else load_policy(policy)
    assert given is not None
    return gate_lines(plan, store, given, source=OF_THE_SUITE if policy is None else str(policy), results=results)


def _origin(found: StoredStage | None) -> str:
    """Where an imported stage was made."""
    if found is None or not found.is_imported:
        return ""
    made = found.record["provenance"]
    return f", made on {made['device']} with torch {made['packages']['torch']}"


def _begun(stage: Stage, store: Store) -> str:
    """How far a training came that was interrupted."""
    folder = store.unfinished / stage.key
    if stage.kind != "train" or not folder.is_dir():
        return ""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]
    return f", unfinished, {max(steps, default=0):,} steps done"


def _left_behind(plan: Plan, store: Store) -> list[str]:
    """A line for each unfinished training that no stage to be done here goes on with, and what removes it."""
    ours = {stage.key: stage for stage in plan.stages if stage.kind == "train"}
    lines = []
    for folder in sorted(path for path in store.unfinished.glob("*") if path.is_dir()):
        if folder.name not in ours:
            why = "of no train stage of this suite; if no other suite goes on with it"
        elif find_done(ours[folder.name], store) is not None:
            why = f"of {ours[folder.name].label}, which is stored"
        else:
            continue
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        lines.append(f"unfinished {folder.name[:12]} ({size / 1e6:,.1f} MB) is {why}: rm -r {shlex.quote(str(folder))}")
    return lines


def _size(plan: Plan, stage: Stage, store: Store) -> str:
    section = None if stage.text is None else stage.text.section
    if isinstance(section, Teacher):
        prompts = "the prompts" if section.n_prompts is None else f"{section.n_prompts:,} prompts"
        until = "" if section.tokens is None else f", until {section.tokens:,} tokens are kept"
        samples = section.samples_per_prompt
        return f" ({prompts} of {section.prompts} × {samples} sample{'s' * (samples > 1)}{until}; engine {section.engine})"
    if isinstance(section, Bos):
        return f" (until {section.tokens:,} tokens are kept; engine {section.engine})"
    if stage.kind == "train" and stage.variant is not None and stage.variant.training is not None:
        settings = stage.variant.training
        return f" ({settings.tokens:,} tokens, {settings.batch_size} sequences a step, lr {settings.lr:g})"
    if stage.kind == "prepare" and stage.task is not None:
        n = _n_requests(stage, store)
        return f" (not prepared: harness prepare {shlex.quote(str(plan.suite.path))})" if n is None else f" ({n:,} requests)"
    if stage.kind == "evaluate" and stage.task is not None:
        n = _n_requests(stage.inputs["task"], store)
        return "" if n is None else f" ({stage.task.repeats * n:,} requests)"
    if stage.kind == "diagnostics" and plan.suite.diagnostics is not None:
        unit = "answers a task" if plan.suite.diagnostics.on == "answers" else "sequences"
        return f" ({plan.suite.diagnostics.samples} {unit})"
    return ""


def _n_requests(prepared: Stage, store: Store) -> int | None:
    """How many requests a task makes once; None where it has to be prepared to know."""
    assert prepared.task is not None
    found = find_done(prepared, store)
    if found is not None:
        return int(read_json(found.folder / "task.json")["n_requests"])
    if prepared.task.own_name in MINI_TASKS and prepared.task.path is None:
        return n_requests(prepared.task.own_name, prepared.task.limit)
    return None


def n_requests(task: str, limit: int | None) -> int:
    """How many requests a mini task makes: questions, times choices where they are scored by likelihood."""
    questions = n_questions(task)
    return (questions if limit is None else min(limit, questions)) * REQUESTS_A_QUESTION.get(task, 1)
