"""Tokens per second of the engine, from what a run records of its "evaluate" stages. No torch.

Generated tokens over the time that the engine took to answer, prompts included, its loading not. It is known only of stages that asked
everything in one go: where answers were found in a journal, or are missing, the time belongs to another work than the tokens. Tasks that
generate nothing do not count.
"""

from __future__ import annotations

from typing import Any


def tokens_per_second(stages: list[dict[str, Any]], variant: str) -> float | None:
    """Of the stages that run.json lists, those of a variant together; None where it is unknown of one of them."""
    mine = [stage for stage in stages if stage["kind"] == "evaluate" and stage.get("variant") == variant]
    if not mine or any(stage.get("generated") is None for stage in mine):
        return None
    generating = [stage["generated"] for stage in mine if stage["generated"]["n_tokens"]]
    seconds = sum(each["seconds"] for each in generating)
    return sum(each["n_tokens"] for each in generating) / seconds if seconds > 0 else None


def speed_notes(rows: list[dict[str, Any]]) -> list[str]:
    """What the column is, and what it is not; none where nothing is known."""
    known = [row for row in rows if row["tokens_per_second"] is not None]
    if not known:
        return []
    parts = [part for row in known for part in row["tasks"].values()]
    is_emulated = any("emulation" in str(part["kernels"].get("linear")) for part in parts)
    emulated = " Emulated kernels are slower than BF16 and say nothing of FP4 hardware." if is_emulated else ""
    return [
        "tok/s: tokens that were generated over the seconds that the engine took to answer, prompts included, loading not; as it went on a "
        f"machine that may have had other work, so no measurement of speed.{emulated}"
    ]
