"""The files of the site: a page, its scripts and libraries, one data file for the tables and one for each run.

<site>/index.html, *.js, style.css, vendor/    copied from this package
<site>/data/leaderboard.js                     boards, rows, the rule, what was left out
<site>/data/findings.js                        the page of findings; null without
<site>/data/runs/<id>.js                       the page of a run, loaded when it is opened
<site>/.index.json                             what the next build need not read again; no part of the site

Works from file://: data are scripts, a call with one JSON text each. All of it is ASCII; names of files are digests, never names of runs.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.leaderboard.ranking import RULE, Board, Row
from harness.store import make_folder, write_text

ASSETS = Path(__file__).parent / "assets"
_MADE_BY = '<meta name="generator" content="qad-harness leaderboard">'
_RUN_TIME = re.compile(r"(\d{8}-\d{6})-")
_PAGE_NAME = re.compile(r"[0-9a-f]{16}\.js")
_OF_A_TASK = (
    "metric",
    "unit",
    "version",
    "scorer",
    "judge",
    "questions",
    "answers",
    "repeats",
    "settings",
    "engine",
    "model settings",
)


def run_id(place: str) -> str:
    """What the address and the data file of the run at `place` are called."""
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def open_site(site: Path) -> None:
    """Make the folder; StoreError if it holds something that is not such a site."""
    if site.is_file():
        raise StoreError(f"--out {site}: is a file; give a folder")
    page = site / "index.html"
    is_ours = page.is_file() and _MADE_BY in page.read_text(encoding="utf-8", errors="replace")
    if site.is_dir() and any(site.iterdir()) and not is_ours:
        raise StoreError(f"--out {site}: not empty and not a leaderboard of this harness; give another folder")
    make_folder(site / "data" / "runs", "the site")


def pages_there(site: Path) -> dict[str, int]:
    """The run pages that lie in the site, with their sizes."""
    return {path.name: path.stat().st_size for path in (site / "data" / "runs").iterdir() if _PAGE_NAME.fullmatch(path.name)}


def write_page(site: Path, summary: dict[str, Any], details: dict[str, Any]) -> int:
    """Write the data of one run; returns its size in bytes."""
    name = run_id(summary["place"])
    shared = {key: summary[key] for key in ("suite", "run", "status", "model", "baseline", "verdict")}
    text = _script(f"run:{name}", {**shared, **details})
    write_text(site / "data" / "runs" / f"{name}.js", text)
    return len(text)


def write_site(
    site: Path, boards: list[Board], summaries: list[dict[str, Any]], protocols: dict[str, Any], more: dict[str, Any]
) -> None:
    """Write page, assets and the tables; take away pages of runs that are gone.

    more: {"left_out": [[place, reason]], "accepted": {suite: run}, "invalidated": [[suite, run, reason]], "findings": [suite]}.
    """
    for path in sorted(path for path in ASSETS.rglob("*") if path.is_file()):
        target = site / path.relative_to(ASSETS)
        content = path.read_bytes().decode()
        if not target.is_file() or target.read_bytes() != content.encode():
            make_folder(target.parent, "the site")
            write_text(target, content)
    names = {run_id(summary["place"]): summary for summary in summaries}
    for name in set(pages_there(site)) - {f"{each}.js" for each in names}:
        (site / "data" / "runs" / name).unlink()
    numbers = {name: number for number, name in enumerate(names)}
    runs = [[name, each["suite"], each["run"], _time(each["run"])] for name, each in names.items()]
    tables = {"rule": RULE, "runs": runs, "boards": [_board(board, numbers, protocols) for board in boards], **more}
    write_text(site / "data" / "leaderboard.js", _script("leaderboard", tables))


def write_findings(site: Path, view: dict[str, Any] | None) -> None:
    """Write what the page of findings shows."""
    write_text(site / "data" / "findings.js", _script("findings", view))


def _board(board: Board, numbers: dict[str, int], protocols: dict[str, Any]) -> dict[str, Any]:
    asked = {name: protocols[digest] for name, digest in board.protocol.items()}
    reasons: dict[str, int] = {}
    return {
        "key": board.key,
        "suite": board.suite,
        "model": board.model,
        "kernels": board.kernels,
        "tasks": [{"name": name, **{k: asked[name].get(k) for k in _OF_A_TASK if name in asked}} for name in board.tasks],
        "rows": [_row(row, board.tasks, numbers, reasons) for row in board.rows],
        "reasons": list(reasons),
    }


def _row(row: Row, tasks: tuple[str, ...], numbers: dict[str, int], reasons: dict[str, int]) -> list[Any]:
    """A row as the list that app.js takes apart by position (`Site.ROW`)."""
    variant, verdict = row.variant, row.summary["verdict"] or {}
    scores: list[Any] = []
    for name in tasks:
        score = variant["scores"].get(name)
        scores += [None, None] if score is None else [_short(score["value"]), _short(score["stderr"])]
    return [
        numbers[run_id(row.summary["place"])],
        variant["name"],
        variant["method"],
        row.state,
        row.rank,
        row.tied,
        *(
            _short(value)
            for value in (row.mean, row.low, row.high, row.recovery, *variant["kl"], variant["top1"], variant["bits"])
        ),
        variant["kernels"],
        verdict.get(variant["name"]),
        [reasons.setdefault(reason, len(reasons)) for reason in row.reasons],
        scores,
    ]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _time(run: str) -> int | None:
    """Seconds since 1970 from a run id, its clock read as UTC; None for another name."""
    found = _RUN_TIME.match(run)
    try:
        return int(datetime.strptime(found.group(1), "%Y%m%d-%H%M%S").replace(tzinfo=UTC).timestamp()) if found else None
    except ValueError:
        return None


def _script(name: str, value: Any) -> str:
    """A script that hands over `value` under `name`: JSON in a text, so that no key can name a prototype."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return f"Site.put({json.dumps(name)}, {json.dumps(text)});\n"
