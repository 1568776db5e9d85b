"""`harness leaderboard`: from every run of a results folder to a site and a LEADERBOARD.md. Same results, same bytes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.accepted import invalidated, last_accepted
from harness.errors import StoreError
from harness.leaderboard.collect import Found, duplicates, find_runs, read_run
from harness.leaderboard.findings import RECORD, read_findings
from harness.leaderboard.index import Index, read_index, write_index
from harness.leaderboard.markdown import leaderboard_text
from harness.leaderboard.ranking import RANKED, Board, make_boards
from harness.leaderboard.site import open_site, pages_there, run_id, write_findings, write_page, write_site
from harness.questions import visible
from harness.store import disk_errors, write_text

LEADERBOARD = "LEADERBOARD.md"
_MANY, _MOST_PROCESSES = 50, 8
_Read = str | tuple[dict[str, Any], dict[str, Any], int]
"""Why a run is left out, or its summary, its protocols and the size of its page."""


@dataclass(frozen=True)
class Built:
    """What a build came to. left_out: (place below the results folder, why)."""

    page: Path
    n_runs: int
    n_read: int
    boards: list[Board]
    left_out: list[tuple[str, str]]


def build_leaderboard(results: Path, site: Path) -> Built:
    """Bring the site and LEADERBOARD.md up to the runs in `results`.

    Raises StoreError where `results` is no folder, where the log of withdrawn runs cannot be read (nothing could be ranked safely), and where
    `site` holds something else.
    """
    if not results.is_dir():
        raise StoreError(f"{results}: is no folder; give a results folder, such as results/")
    withdrawn = invalidated(results)
    with disk_errors(f"the site {site}"):
        open_site(site)
        index = read_index(site)
        runs, left_out = _bring_up(results, site, index)
        n_read = sum(run.pop("is_new") for run in runs.values())
        summaries = sorted((run["summary"] for run in runs.values()), key=lambda summary: (summary["suite"], summary["run"]))
        boards = make_boards(summaries, withdrawn)
        accepted = {
            suite: release["run"] for suite in _suites(summaries) if (release := last_accepted(results, suite)) is not None
        }
        found = read_findings(results)
        left_out += [(RECORD, found.problem)] if found.problem else []
        said = [(visible(place), visible(reason)) for place, reason in left_out]
        gone = [[suite, run, reason] for (suite, run), reason in sorted(withdrawn.items())]
        more = {"left_out": said, "accepted": accepted, "invalidated": gone, "findings": list(found.suites)}
        write_site(site, boards, summaries, index.protocols, more)
        write_findings(site, found.view)
        write_text(results / LEADERBOARD, leaderboard_text(boards, said, results, site, found.view))
        if n_read or len(runs) != len(index.runs):
            write_index(site, runs, index.protocols)
    return Built(site / "index.html", len(runs), n_read, boards, said)


def lines(built: Built) -> list[str]:
    """What the command prints."""
    n_ranked = sum(row.state == RANKED for board in built.boards for row in board.rows)
    n_boards = sum(board.has_ranks for board in built.boards)
    found = [f"left out {place}: {reason}" for place, reason in built.left_out]
    found.append(f"{built.n_runs:,} runs ({built.n_read:,} read anew), {n_ranked:,} ranked rows on {n_boards:,} boards")
    return [*found, f"Leaderboard: {built.page}"]


def _bring_up(results: Path, site: Path, index: Index) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """Every run that can be used, by place, and what cannot; pages of new ones are written. Adds protocols to the index."""
    pages = pages_there(site)
    runs: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    new: list[Found] = []
    for found in find_runs(results):
        known = index.runs.get(found.place)
        if known is not None and _is_current(known, found, pages):
            runs[found.place] = {**known, "is_new": False}
        else:
            new.append(found)
    for found, read in zip(new, _read_all(results, site, new), strict=True):
        if isinstance(read, str):
            left_out[found.place] = read
            continue
        summary, protocols, size = read
        index.protocols |= protocols
        runs[found.place] = {"signature": found.signature, "page_bytes": size, "summary": summary, "is_new": True}
    copies = duplicates({place: run["summary"] for place, run in runs.items()})
    for place in copies:
        del runs[place]
    return runs, sorted((left_out | copies).items())


def _read_all(results: Path, site: Path, new: list[Found]) -> Iterable[_Read]:
    """Each run read and its page written, in order; many of them by several processes."""
    work = functools.partial(_read_one, results, site)
    n_processes = min(os.cpu_count() or 1, _MOST_PROCESSES)
    if len(new) < _MANY or n_processes < 2:
        return map(work, new)
    with ProcessPoolExecutor(n_processes) as pool:
        return list(pool.map(work, new, chunksize=8))


def _read_one(results: Path, site: Path, found: Found) -> _Read:
    read = read_run(results, found)
    return read if isinstance(read, str) else (read.summary, read.protocols, write_page(site, read.summary, read.details))


def _is_current(known: dict[str, Any], found: Found, pages: dict[str, int]) -> bool:
    return known["signature"] == found.signature and pages.get(f"{run_id(found.place)}.js") == known["page_bytes"]


def _suites(summaries: list[dict[str, Any]]) -> list[str]:
    return sorted({summary["suite"] for summary in summaries})
