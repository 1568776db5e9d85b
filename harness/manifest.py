"""What run.json says: what was asked, resolved; what became of its data; the stages with keys, times and
surroundings; each variant's checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from harness.models import folder_of
from harness.plan import Plan, Stage
from harness.provenance import provenance
from harness.records import SCHEMA
from harness.resolved import sections_of, settings_of
from harness.store import StoredStage
from harness.suite import Suite
from qad.footprint import footprint


def manifest(
    plan: Plan, done: list[tuple[Stage, StoredStage]], *, run: str, is_complete: bool, imported: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of run.json, given the stages that are done, and where the results come from that were scored elsewhere."""
    suite = plan.suite
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "run": run,
        "plan": plan.digest,
        "status": "complete" if is_complete else "unfinished",
        "rehearsal": suite.is_rehearsal,
        "model": {
            "path": suite.model.path,
            "origin": plan.source.origin,
            "fingerprint": plan.source.fingerprint,
            "notes": list(plan.source.notes),
        },
        "resolved": {**sections_of(suite), **read_by(suite)},
        "imported": imported,
        "gaps": [
            {"variant": s.variant.name, "task": s.task.name, "n_missing": f.record["result"]["n_missing"]}
            for s, f in done
            if s.variant is not None and s.task is not None and f.record["result"].get("n_missing")
        ],
        "data": {s.text.name: f.record["result"] for s, f in done if s.text is not None},
        "variants": [_variant_record(plan, variant, done) for variant in plan.variants],
        "stages": [
            {
                "kind": s.kind,
                "label": s.label,
                "variant": s.variant.name if s.variant is not None else None,
                "generated": f.record["result"].get("generated"),
                "key": s.key,
                "imported_from": f.record["key"] if f.is_imported else None,
                "digest": f.digest,
                **{k: f.record[k] for k in ("inputs", "seconds", "peak_memory_bytes", "provenance")},
            }
            for s, f in done
        ],
        "provenance": provenance(),
    }


def read_by(suite: Suite) -> dict[str, Any]:
    """Settings that change no figure, only what is made of them."""
    return {
        "gate": suite.gate.model_dump() if suite.gate else None,
        "reference": suite.reference.model_dump() if suite.reference else None,
    }


def _variant_record(plan: Plan, variant: Any, done: list[tuple[Stage, StoredStage]]) -> dict[str, Any]:
    """A variant with its settings and what is known of its checkpoint."""
    settings = settings_of(variant)
    teacher = next((s.inputs["teacher"].source for s in plan.stages if s.variant == variant and "teacher" in s.inputs), None)
    if teacher is not None:
        settings["teacher_fingerprint"] = teacher.fingerprint
    checkpoint = plan.checkpoint_of[variant.name]
    found = next((stored for stage, stored in done if stage.key == checkpoint.key), None)
    folder = found.folder if found else folder_of(checkpoint.source) if checkpoint.source and done else None
    size: dict[str, Any] = (
        dataclasses.asdict(footprint(folder)) if folder is not None and (found or checkpoint.is_external) else {}
    )
    if found is not None:
        size["checkpoint"] = {"stage": found.record["key"], "digest": found.digest}
    elif folder is not None:
        size["checkpoint"] = {"folder": str(folder.resolve())}
    return settings | size | (found.record["result"] if found else {})
