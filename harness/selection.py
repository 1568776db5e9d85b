"""Which tasks a variant owes its checkpoint to: a score in one of those is flattered. No torch."""

from __future__ import annotations

from typing import Any


def selection_tasks(variant: dict[str, Any]) -> set[str]:
    """Tasks that took part in the choice of the checkpoint, as the variant's record says or its training asked for, however it was chosen."""
    recorded, asked = variant.get("selection") or {}, variant.get("training") or {}
    return {*(recorded.get("tasks") or ()), *(asked.get("select_tasks") or ())}
