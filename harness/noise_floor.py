"""What chance alone does to the scores of a run: a variant that was asked again with another `sampling_seed`, against itself. No torch.

Read from the scores of the run folder. A difference between two other variants that is no larger than this is no news.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.controls import is_control
from harness.null_variants import twin_of

if TYPE_CHECKING:
    from harness.evidence import RunEvidence

_FIGURES = ("n_questions", "n_clusters", "worse", "better", "delta", "stderr", "low", "high", "confidence")


def noise_floors(run: Path, variants: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A floor for each of the `variants` of a run.json that is another one asked again; none where there is no such variant.

    Each has the names of both, the seed, by task the figures of the paired difference (or `reason`, why there are none), and the KL that
    was measured of the null, None where it was not. StoreError if the scores of the run are missing or damaged.
    """
    pairs = [(variant, twin) for variant in variants if (twin := twin_of(variant, variants)) is not None]
    if not pairs:
        return []
    from harness.evidence import open_run_evidence

    evidence = open_run_evidence(run)
    return [
        {
            "variant": null["name"],
            "baseline": twin["name"],
            "sampling_seed": null["sampling_seed"],
            "tasks": {
                task: found
                for task in evidence.tasks
                if (found := _task(evidence, twin["name"], null["name"], task)) is not None
            },
            "kl": ((evidence.diagnostics.get(null["name"]) or {}).get("response") or {}).get("kl"),
        }
        for null, twin in pairs
    ]


def noise_notes(floors: Sequence[dict[str, Any]]) -> list[str]:
    """`noise_floors` in words, for below a table."""
    notes = []
    for floor in floors:
        tasks = "; ".join(f"{task} {_in_words(found)}" for task, found in floor["tasks"].items()) or "no task is scored yet"
        kl = "" if floor["kl"] is None else f"; KL {floor['kl']:.3f}"
        notes.append(
            f"Noise floor: {floor['variant']} is {floor['baseline']} asked again (sampling_seed {floor['sampling_seed']}), so chance alone is "
            f"behind these differences in points (95 % intervals): {tasks}{kl}."
        )
    return notes


def _task(evidence: RunEvidence, baseline: str, null: str, task: str) -> dict[str, Any] | None:
    """The figures of one task; None until both are scored, and of a control, which has no scores."""
    from harness.evidence import pair
    from harness.paired import paired_difference

    ours, theirs = evidence.answers(baseline, task), evidence.answers(null, task)
    if ours is None or theirs is None or is_control(ours.row):
        return None
    if not (ours.is_share and theirs.is_share):
        return {"reason": f"{ours.metric} is no share"}
    pairs = pair(ours, theirs).pairs
    if not pairs:
        return {"reason": "no question that both answered"}
    found = paired_difference(pairs)
    return {key: getattr(found, key) for key in _FIGURES}


def _in_words(found: dict[str, Any]) -> str:
    if "reason" in found:
        return f"not measured ({found['reason']})"
    return (
        f"{found['worse']} worse, {found['better']} better of {found['n_questions']:,}, {100 * found['delta']:+.1f} "
        f"[{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    )
