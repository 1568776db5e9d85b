"""Finding the runs of a results folder and reading each that is new. What cannot be read is named, never guessed and never ranked.

A run that changes while it is read, that has no run.json yet, or that is damaged anywhere is left out as a whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.leaderboard.details import details_of
from harness.leaderboard.reading import record_of, rows_of
from harness.leaderboard.summary import Unusable, summary_of
from harness.store import disk_errors

_RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
_PARTS_OF_A_RUN = ("tasks.jsonl", "diagnostics.jsonl", "table.json", "samples", "scores", "training", "tasks")
_ROW_FILES = ("run.json", "tasks.jsonl", "diagnostics.jsonl", "verdict.json")
_ROW_FOLDERS = ("training", "scores")


@dataclass(frozen=True)
class Found:
    """A run folder: its path below the results folder as text, and what its files look like from outside; None: it has no run.json."""

    place: str
    signature: str | None


@dataclass(frozen=True)
class RunRead:
    """A run that was read: what tables need, how its tasks were asked (by digest), and what its page needs."""

    summary: dict[str, Any]
    protocols: dict[str, dict[str, Any]]
    details: dict[str, Any]


def find_runs(results: Path) -> Iterator[Found]:
    """Every run folder `<results>/<suite>/<run>`, in the order of its path, and folders that look like one that is not there yet."""
    for suite in sorted(_folders(results)):
        for run in sorted(_folders(results / suite)) if not suite.startswith(".") else ():
            if not run.startswith("."):
                folder = results / suite / run
                signature = signature_of(folder)
                if signature is not None or _looks_like_a_run(folder):
                    yield Found(f"{suite}/{run}", signature)


def signature_of(folder: Path) -> str | None:
    """A digest of names, sizes and times of the files that the site is made of; None without a run.json."""
    parts: list[str] = []
    has_record = False
    for name in _ROW_FILES:
        try:
            stat = os.stat(folder / name)
        except OSError:
            continue
        has_record = has_record or name == "run.json"
        parts.append(f"{name}:{stat.st_size}:{stat.st_mtime_ns}")
    if not has_record:
        return None
    for name in _ROW_FOLDERS:
        try:
            with os.scandir(folder / name) as entries:
                stats = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(".jsonl")]
        except OSError:
            continue
        parts += sorted(f"{name}/{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def read_run(results: Path, found: Found) -> RunRead | str:
    """The run, or a sentence that says why it is left out."""
    folder = results / found.place
    if not _is_text(found.place):
        return "its name is not UTF-8; rename the folder"
    if found.signature is None:
        return "no run.json: it is still being written, or was never begun; run its suite again"
    try:
        about = record_of(folder / "run.json")
        tasks, diagnostics = rows_of(folder / "tasks.jsonl"), rows_of(folder / "diagnostics.jsonl")
        verdict = record_of(folder / "verdict.json") if (folder / "verdict.json").is_file() else None
        summary, protocols = summary_of(found.place, about, tasks, diagnostics, verdict)
        details = details_of(folder, about, tasks, diagnostics, verdict, summary)
    except StoreError as error:
        return str(error).replace(f"{folder}{os.sep}", "")
    except Unusable as error:
        return str(error)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        return f"a record is not of this version, or damaged: {type(error).__name__} {error}"
    if signature_of(folder) != found.signature:
        return "it changed while it was read: it is still being written; build the leaderboard again"
    return RunRead(summary, protocols, details)


def duplicates(places: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Why to leave out runs whose run.json bears the name of another folder's, given the summaries by place.

    Of several folders with one run id the one that lies where its run.json says stays; where none does, none stays.
    """
    by_name: dict[tuple[str, str], list[str]] = {}
    for place, summary in places.items():
        by_name.setdefault((summary["suite"], summary["run"]), []).append(place)
    out = {}
    for (suite, run), same in by_name.items():
        rightful = f"{suite}/{run}"
        for place in same if len(same) > 1 else ():
            if place != rightful:
                others = ", ".join(other for other in same if other != place)
                out[place] = f"duplicate run id {rightful}, which {others} has too; take the copy away"
    return out


def _folders(parent: Path) -> list[str]:
    with disk_errors(f"the results folder {parent}"), os.scandir(parent) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not (entry.is_symlink() and _is_sibling(entry.path))]


def _is_sibling(link: str) -> bool:
    """Whether a link such as `latest` only names a folder beside it."""
    path = Path(link)
    return path.resolve().parent == path.parent.resolve()


def _looks_like_a_run(folder: Path) -> bool:
    return bool(_RUN_ID.fullmatch(folder.name)) or any((folder / part).exists() for part in _PARTS_OF_A_RUN)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
