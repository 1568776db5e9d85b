"""results/LEADERBOARD.md: the ranked rows of every board, what is shown there without a rank, and what was left out."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.leaderboard.ranking import BASELINE, NOT_RANKED, NULL, OLDER, RANKED, RULE, Board, Row
from harness.leaderboard.site import run_id
from harness.questions import visible

MOST_NOT_RANKED = 20
"""Rows without a rank that are listed by name under a board; the rest is counted."""
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&])")


def leaderboard_text(
    boards: list[Board], left_out: list[tuple[str, str]], results: Path, site: Path, findings: dict[str, Any] | None = None
) -> str:
    """The file as text; links are relative to the results folder. findings: what their page shows."""
    page = quote(os.path.relpath(site / "index.html", results).replace(os.sep, "/"))
    lines = ["# Leaderboard", "", f"[Tables, history, curves and runs]({page})", ""]
    if findings is not None:
        lines += [f"[Findings]({page}#/findings): {_text(findings['counted'])}", ""]
    lines += [f"- {rule}" for rule in RULE]
    for board in boards:
        if board.has_ranks:
            lines += ["", *_board(board, page)]
    without = [board for board in boards if not board.has_ranks]
    if without:
        lines += ["", "## Boards without a ranked row", ""]
        lines += [f"- {_text(board.suite)}, {_text(board.kernels)}: {len(board.rows):,} rows" for board in without]
    if left_out:
        lines += ["", "## Left out", "", *(f"- {_text(place)}: {_text(reason)}" for place, reason in left_out)]
    if not boards:
        lines += ["", "No run yet."]
    return "\n".join([*lines, ""])


def _board(board: Board, page: str) -> list[str]:
    columns = ["rank", "variant", "mean", "95 %", "recovery", "KL", *map(_text, board.tasks), "run"]
    lines = [f"## {_text(board.suite)}: {_text(board.kernels)}", "", f"{_text(board.model['path'])}", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cells(row, board, page)) + " |" for row in board.rows if row.state in (RANKED, BASELINE, NULL)]
    unranked = [row for row in board.rows if row.state == NOT_RANKED]
    n_older = sum(row.state == OLDER for row in board.rows)
    if unranked:
        lines += ["", "Not ranked:", ""]
        lines += [
            f"- {_text(row.variant['name'])} of {_link(row, page)}: {_text('; '.join(row.reasons))}"
            for row in unranked[:MOST_NOT_RANKED]
        ]
        if len(unranked) > MOST_NOT_RANKED:
            lines.append(f"- and {len(unranked) - MOST_NOT_RANKED:,} more, on the page")
    if n_older:
        lines += ["", f"{n_older:,} older rows are history, on the page."]
    return lines


def _cells(row: Row, board: Board, page: str) -> list[str]:
    rank = {BASELINE: "BF16", NULL: "null"}.get(row.state, f"{row.rank}{'=' if row.tied else ''}")
    kl, kl_stderr = row.variant["kl"]
    interval = "–" if row.low is None or row.high is None else f"{100 * row.low:.1f} to {100 * row.high:.1f}"
    return [
        rank,
        _text(row.variant["name"]),
        _percent(row.mean),
        interval,
        _percent(row.recovery),
        "–" if kl is None else f"{kl:.3f}" + ("" if kl_stderr is None else f" ±{kl_stderr:.3f}"),
        *(_score(row, name) for name in board.tasks),
        _link(row, page),
    ]


def _score(row: Row, name: str) -> str:
    score = row.variant["scores"].get(name)
    if score is None or score["value"] is None:
        return "–"
    if not score["is_share"]:
        return f"{score['value']:.3g}"
    return _percent(score["value"]) + ("" if score["stderr"] is None else f" ±{100 * score['stderr']:.1f}")


def _link(row: Row, page: str) -> str:
    return f"[{_text(row.summary['run'])}]({page}#/run/{run_id(row.summary['place'])})"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _text(value: str) -> str:
    """Text that is nothing but text in Markdown, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(visible(value).split()))
