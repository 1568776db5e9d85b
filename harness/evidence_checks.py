"""What the small files of a run have to hold before anything is made of them: keys, and the kinds of their values. No torch.

A record that lacks a key, or holds something else than this version writes, is refused with its file, line and key; nothing is taken as given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import StoreError

AGAIN = "run the suite again, or `harness score` on the run folder where its samples are kept"
_SHOWN = 60
"""Characters of a value that an error quotes."""

Kind = tuple[str, Callable[[Any], bool]]
"""What is allowed, in words, and whether a value is."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _or_none(kind: Kind) -> Kind:
    return f"{kind[0]} or null", lambda value: value is None or kind[1](value)


def _list_of(kind: Kind) -> Kind:
    return f"a list of {kind[0]}", lambda value: isinstance(value, list) and all(map(kind[1], value))


_TEXT: Kind = ("text", lambda value: isinstance(value, str))
_BOOL: Kind = ("true or false", lambda value: isinstance(value, bool))
_NUMBER: Kind = ("a number", _is_number)
_COUNT: Kind = ("a count", _is_count)
_REPEATS: Kind = ("a count of at least 1", lambda value: _is_count(value) and value >= 1)
_ERROR: Kind = ("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))

TASK_ROW = {
    **dict.fromkeys(("variant", "task", "metric", "primary"), _TEXT),
    "value": _or_none(_NUMBER),
    **dict.fromkeys(("n_scored", "n_total"), _COUNT),
    "is_partial": _BOOL,
}
ASKED = {"n_questions": _COUNT, "repeats": _REPEATS, "unit": _TEXT}
"""What a row of tasks.jsonl has to hold beside `TASK_ROW` where its scores are read."""
SCORE_ROW = {
    **dict.fromkeys(("variant", "task", "question", "cluster", "subtask"), _TEXT),
    "doc": _COUNT,
    "scores": _list_of(_or_none(_NUMBER)),
    "requests": _list_of(_or_none(_TEXT)),
    "seeds": _list_of(_or_none(_NUMBER)),
    "n_tokens": _list_of(_or_none(_COUNT)),
    "incomplete": _list_of(_or_none(_BOOL)),
    "truncated": _list_of(_or_none(_BOOL)),
    "missing": _list_of(_or_none(_TEXT)),
}
_SEQUENCE_ROW = {
    "variant": _TEXT,
    "sequence": _COUNT,
    "n_tokens": _COUNT,
    **dict.fromkeys(("kl_sum", "ce_sum", "top1_sum"), _NUMBER),
}
SUBTASK_ROW = {**dict.fromkeys(("variant", "task", "subtask", "metric"), _TEXT), "n_total": _COUNT}
_VARIANT = {"name": _TEXT, "method": _TEXT}
_DIAGNOSTICS_ROW = {"variant": _TEXT}
_RESPONSE = {"kl": _or_none(_NUMBER), "kl_stderr": _or_none(_ERROR), "n_sequences": _COUNT}
_REFERENCE = {"source": _TEXT, "band": _ERROR, "figure": _list_of(_OBJECT)}
_FIGURE = {"variant": _TEXT, "task": _TEXT, "metric": _or_none(_TEXT), "value": _NUMBER}


def require_keys(where: str, record: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """StoreError that names the place and the key unless the record holds all of these."""
    for key, (allowed, is_allowed) in kinds.items():
        if key not in record:
            raise StoreError(f"{where}: lacks {key!r} ({allowed}), as records of another version do; {AGAIN}")
        if not is_allowed(record[key]):
            found = repr(record[key])
            shown = found if len(found) <= _SHOWN else f"{found[: _SHOWN - 1]}…"
            raise StoreError(f"{where}: {key} is {shown}, allowed is {allowed}; {AGAIN}")


def require_rows(path: Path, rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, Kind]) -> None:
    """`require_keys` of each line of a file of rows."""
    for number, row in enumerate(rows, start=1):
        require_keys(f"{path}: line {number}", row, kinds)


def require_once(path: Path, names: Iterable[str]) -> None:
    """StoreError for a name that stands there twice: which is meant is not known."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise StoreError(f"{path}: {name} stands there twice, and which is meant is not known; run the suite again")
        seen.add(name)


def require_about(path: Path, about: Mapping[str, Any]) -> None:
    """That run.json says of what variants the run is, each once, and that its published figures are ones."""
    require_keys(str(path), about, {"variants": _list_of(_OBJECT)})
    for number, variant in enumerate(about["variants"], start=1):
        require_keys(f"{path}: variant {number}", variant, _VARIANT)
    require_once(path, (f"the variant {variant['name']}" for variant in about["variants"]))
    resolved = about.get("resolved")
    require_keys(str(path), {"resolved": resolved}, {"resolved": _or_none(_OBJECT)})
    reference, tasks = (resolved or {}).get("reference"), (resolved or {}).get("tasks")
    require_keys(f"{path}: resolved", {"tasks": tasks}, {"tasks": _or_none(_list_of(_OBJECT))})
    for number, task in enumerate(tasks or (), start=1):
        require_keys(f"{path}: resolved.tasks: task {number}", task, {"name": _TEXT})
    require_keys(f"{path}: resolved", {"reference": reference}, {"reference": _or_none(_OBJECT)})
    if reference is not None:
        require_keys(f"{path}: resolved.reference", reference, _REFERENCE)
        for number, figure in enumerate(reference["figure"], start=1):
            metric = {"metric": figure.get("metric")}
            require_keys(f"{path}: resolved.reference: figure {number}", figure | metric, _FIGURE)


def require_sequences(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """That diagnostics_sequences.jsonl has figures of sequences, each once a variant."""
    require_rows(path, rows, _SEQUENCE_ROW)
    for number, row in enumerate(rows, start=1):
        related = {key: row.get(key) for key in ("task", "cluster")}
        require_keys(f"{path}: line {number}", related, dict.fromkeys(related, _or_none(_TEXT)))
    require_once(path, (f"sequence {row['sequence']} of {row['variant']}" for row in rows))


def require_diagnostics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """That diagnostics.jsonl has one row a variant, whose figures are numbers."""
    require_rows(path, rows, _DIAGNOSTICS_ROW)
    require_once(path, (f"the variant {row['variant']}" for row in rows))
    for number, row in enumerate(rows, start=1):
        where = f"{path}: line {number}"
        measured = {key: row.get(key) for key in ("response", "saturated_share")}
        require_keys(where, measured, {"response": _or_none(_OBJECT), "saturated_share": _or_none(_ERROR)})
        if measured["response"]:
            require_keys(f"{where}: response", measured["response"], _RESPONSE)
