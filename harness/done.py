"""Which stored result, own or imported, serves a planned stage. No torch.

The key of a stage holds the device kind and the versions of packages, so a stage made on another machine has another key. An imported
one is recognised by what it is: kind, suite sections, numerics version, and the digests of its inputs as they are here. A person
imported it by name, so it is taken even where an own result is stored: otherwise an own calibration, with other bits than the one that
came along, would hide the training that was imported with it. Its record keeps its own device and versions, and runs show them.
"""

from __future__ import annotations

import json
from typing import Any

from harness.plan import Plan, Stage
from harness.store import Store, StoredStage


def is_done(stage: Stage, store: Store) -> bool:
    """Whether nothing is left to do for `stage`: it is stored, and no response is missing in it."""
    if stage.is_external:
        return True
    found = find_done(stage, store)
    return found is not None and not found.record["result"].get("n_missing")


def require_keys(plan: Plan, store: Store) -> None:
    """EngineError now where an endpoint that will be asked needs a key that is not set, not when a model was made for it."""
    if any(stage.kind in ("evaluate", "judge") and not is_done(stage, store) for stage in plan.stages) and plan.endpoints:
        from harness.engines.server import key_of

        for endpoint in plan.endpoints:
            key_of(endpoint)


def find_done(stage: Stage, store: Store) -> StoredStage | None:
    """The stored result of `stage`, if its inputs are still what they were when it was made."""
    found = store.find(stage.key)
    return found if found is not None and found.record["inputs"] == input_digests(stage, store) else None


def about_stage(stage: Stage, store: Store) -> dict[str, Any]:
    """What the record of `stage` says before it is made; `input_keys` leads to those of its inputs that are in the store."""
    inputs = {role: store.find(given.key) for role, given in stage.inputs.items() if not given.is_external}
    return {
        "kind": stage.kind,
        "label": stage.label,
        "sections": stage.sections,
        "numerics": stage.numerics,
        "inputs": input_digests(stage, store),
        "input_keys": {role: found.record["key"] for role, found in inputs.items() if found is not None},
    }


def input_digests(stage: Stage, store: Store) -> dict[str, str | None]:
    """What the inputs of `stage` are at present, by role; None for one that is not made yet."""
    return {role: _digest(given, store) for role, given in stage.inputs.items()}


def adopt_imported(plan: Plan, store: Store) -> list[str]:
    """Let imported stages serve the stages of `plan` that they match; the newest first, where several match.

    Returns a line for each imported stage that has the kind and sections of a planned one and is not used, with the reason.
    """
    imported = store.imported()
    unused: dict[str, str] = {}
    for stage in plan.stages:  # inputs come before what is made of them
        if stage.is_external:
            continue
        sections, present = json.loads(json.dumps(stage.sections)), input_digests(stage, store)
        for found in imported:
            if (found.record["kind"], found.record["sections"]) != (stage.kind, sections):
                continue
            key = found.record["key"]
            why = _mismatch(found, stage, present) or ("a newer imported one is used" if stage.key in store.adopted else None)
            if why is None:
                store.adopt(stage.key, key)
            else:
                unused[key] = f"imported {key[:12]} is not used for {stage.label}: {why}"
    return [line for key, line in unused.items() if key not in store.adopted.values()]


def _mismatch(found: StoredStage, stage: Stage, present: dict[str, str | None]) -> str | None:
    """Why an imported stage of the same kind and sections is not the one that is planned, or None."""
    if found.record["numerics"] != stage.numerics:
        return f"numerics version {_versions(found.record['numerics'])}, here {_versions(stage.numerics)}"
    different = [
        role for role in sorted({*found.record["inputs"], *present}) if found.record["inputs"].get(role) != present.get(role)
    ]
    return f"its {' and '.join(different)} had other bytes than here" if different else None


def _digest(stage: Stage, store: Store) -> str | None:
    if stage.is_external and stage.source is not None:
        return stage.source.fingerprint
    found = store.find(stage.key)
    return None if found is None else found.digest


def _versions(numerics: dict[str, int]) -> str:
    return ", ".join(f"{kind} {version}" for kind, version in numerics.items())
