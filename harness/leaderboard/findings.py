"""The page of findings: results/findings.json, which `harness findings` wrote, as the site shows it. Texts of tables are those of the Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.findings_text import HEADS, METHOD, counted, label, row_text, weights
from harness.leaderboard.reading import record_of

RECORD = "findings.json"
_OF_A_CLAIM = ("id", "topic", "text", "source", "note", "untested", "verdict")


@dataclass(frozen=True)
class Findings:
    """view: what the page shows; None without findings. suites: that they are made of. problem: why they are left out."""

    view: dict[str, Any] | None = None
    suites: tuple[str, ...] = ()
    problem: str | None = None


def read_findings(results: Path) -> Findings:
    """The findings of a results folder; a record that is damaged or of another version is left out as a whole."""
    path = results / RECORD
    if not path.is_file():
        return Findings()
    try:
        record = record_of(path)
        return Findings(_view(record), tuple(suite["name"] for suite in record["suites"]))
    except StoreError as error:
        return Findings(problem=str(error).replace(str(path), RECORD))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        return Findings(problem=f"not of this version, or damaged ({type(error).__name__} {error}); run harness findings again")


def _view(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "claims_file": record["claims_file"],
        "counted": counted(record),
        "method": [list(each) for each in METHOD],
        "heads": list(HEADS),
        "claims": [
            {
                **{key: claim[key] for key in _OF_A_CLAIM},
                "rows": [row_text(each) for each in claim["comparisons"]],
                "notes": list(dict.fromkeys(note for each in claim["comparisons"] for note in each["notes"])),
            }
            for claim in record["claims"]
        ],
        "trajectories": [
            {
                **{key: trajectory[key] for key in ("id", "title", "suite")},
                "panels": [_panel(panel) for panel in trajectory["panels"]],
            }
            for trajectory in record["trajectories"]
        ],
        "suites": [[each["name"], each["file"], each["place"], each["model"], weights(each)] for each in record["suites"]],
    }


def _panel(panel: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": label(panel["name"]),
        "unit": panel["unit"],
        "lines": [[line["name"], [_point(point) for point in line["points"]]] for line in panel["lines"]],
        "levels": [[level["variant"], *_point(level)[1:]] for level in panel["levels"]],
    }


def _point(cell: dict[str, Any]) -> list[Any]:
    return [cell["tokens"], cell["value"], cell["low"], cell["high"], len(cell["seeds"])]
