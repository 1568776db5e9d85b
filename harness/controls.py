"""Which rows of results are of a control and no score: grey pictures show what a model knows without looking. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GREY_FLAG = "grey pictures"
"""The flag of the rows of a task that was asked with `pictures = "grey"`."""
CONTROL = "grey control"
"""What such a task is called beside its figures."""


def is_control(row: Mapping[str, Any]) -> bool:
    """Whether a row of tasks.jsonl, or a task of a table, is of a control: it is printed, never pooled, ranked or published as a score."""
    flags = row.get("flags")
    return isinstance(flags, list | tuple) and GREY_FLAG in flags


def controls_of(about: Mapping[str, Any]) -> frozenset[str]:
    """The names of the controls that a run.json says were asked for."""
    tasks = (about.get("resolved") or {}).get("tasks") or ()
    return frozenset(task["name"] for task in tasks if task.get("pictures") == "grey")
