"""JSON records and JSON lines, strictly: a NaN is damage, too. Lines are parsed at once, since a call a line would be most of the time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from harness.records import SCHEMA, read_json, read_lines


def record_of(path: Path) -> dict[str, Any]:
    """As `records.read_json`, whose errors it has; ValueError for a NaN or an infinity."""
    try:
        record = json.loads(path.read_bytes(), parse_constant=_no_number)
        if record["schema"] == SCHEMA:
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return dict(json.loads(json.dumps(read_json(path)), parse_constant=_no_number))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """As `records.read_lines`, whose errors it has: StoreError naming file and line; ValueError for a NaN or an infinity."""
    try:
        text = path.read_bytes()
        rows = json.loads(b"[" + b",".join(text.splitlines()) + b"]", parse_constant=_no_number)
        if {row["schema"] for row in rows} <= {SCHEMA}:
            return list(rows)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rows = read_lines(path)
    return [json.loads(json.dumps(row), parse_constant=_no_number) for row in rows]


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no figure")
