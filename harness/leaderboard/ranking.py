"""Who is ranked against whom, and how: the one rule of the leaderboard, which the page states in the words of RULE.

A board holds what may be compared: one suite, one model, tasks that were asked and scored alike by one engine, one set of kernels. On it
each variant stands with its newest run that has no reason against it; older ones are history, the rest is shown and not ranked.

    value     m = mean over the tasks of the share, each task weighing the same
    interval  of a task: at least Wilson's for its number of questions, and value ± 1.96 standard errors; of the mean, by adding variances:
              low = m - sqrt(sum (v - l)^2) / T, high = m + sqrt(sum (u - v)^2) / T   (Zou and Donner 2008, square-and-add)
    rank      1 + the number of rows whose whole interval lies above

Two rows whose intervals overlap are never told apart: comparing intervals is stricter than testing the difference, and no use is made of
the questions being the same. A paired comparison of two variants of one run is what `harness compare` and `harness gate` are for.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

Z = 1.959963984540054
RULE = (
    "Rows are ranked by the mean of their tasks, each weighing the same, only within one board: one suite, one model, the same tasks with the "
    "same limits, repeats, sampling, task and scorer versions, one engine with its version, and the same kernels. Never across kernels or engines.",
    "A variant stands with its newest run that may be ranked, not with its best one; its older runs are its history.",
    "Statistical ties share a rank: a row's rank is 1 plus the number of rows whose whole 95 % interval lies above its own. Intervals are "
    "unpaired and conservative, so small differences are ties here; harness compare pairs the questions of one run.",
    "BF16 is what the others are held against, and is not ranked. Incomplete, partial, rehearsed, suspect and invalidated runs, missing or "
    "unproven scores and checkpoints that a task of the board selected are shown, never ranked and never averaged over.",
)
"""The rule in the words of the page."""
RANKED, BASELINE, NULL, OLDER, NOT_RANKED = "ranked", "baseline", "null", "older", "not ranked"


@dataclass
class Row:
    """A variant of a run on the boards. low, high: of the mean. tied: how many others share the rank."""

    summary: dict[str, Any]
    variant: dict[str, Any]
    reasons: tuple[str, ...]
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    recovery: float | None = None
    state: str = NOT_RANKED
    rank: int | None = None
    tied: int = 0

    @property
    def order(self) -> tuple[str, str]:
        return self.summary["run"], self.variant["name"]


@dataclass
class Board:
    """What may be compared, and every row that belongs there: ranked ones first, by mean."""

    key: str
    suite: str
    model: dict[str, str]
    kernels: str
    tasks: tuple[str, ...]
    protocol: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    @property
    def has_ranks(self) -> bool:
        return any(row.state == RANKED for row in self.rows)

    @property
    def newest(self) -> str:
        return max(row.summary["run"] for row in self.rows)


def make_boards(summaries: list[dict[str, Any]], invalidated: dict[tuple[str, str], str]) -> list[Board]:
    """All boards of these runs, those with the newest runs of a suite first. invalidated: reasons by (suite, run).

    A row that cannot be ranked joins the newest board of its suite that it does not contradict, so that it is seen beside its peers.
    """
    rows = [row for summary in summaries for row in _rows(summary, invalidated)]
    boards: dict[str, Board] = {}
    fitting: list[Row] = []
    for row in rows:
        if row.variant["method"] == "bf16" or row.reasons:
            fitting.append(row)
        else:
            board = _board_of(row)
            boards.setdefault(board.key, board).rows.append(row)
    for board in boards.values():
        _rank(board)
    _add_others(boards, fitting)
    for board in boards.values():
        board.rows.sort(key=_standing)
    newest_first = sorted(boards.values(), key=lambda board: (board.newest, board.key), reverse=True)
    return sorted(newest_first, key=lambda board: (not board.has_ranks, board.suite))


def interval(value: float, stderr: float | None, n: int) -> tuple[float, float]:
    """A 95 % interval of a share: Wilson's for n questions or value ± 1.96 stderr, whichever bound is further out; [0, 1] without questions."""
    if n < 1:
        return 0.0, 1.0
    centre, spread = value + Z * Z / (2 * n), Z * math.sqrt(value * (1 - value) / n + Z * Z / (4 * n * n))
    low, high = (centre - spread) / (1 + Z * Z / n), (centre + spread) / (1 + Z * Z / n)
    error = Z * (stderr or 0.0)
    return max(0.0, min(low, value - error)), min(1.0, max(high, value + error))


def mean_interval(scores: list[dict[str, Any]]) -> tuple[float, float, float]:
    """(mean, low, high) over tasks, each weighing the same, their errors taken as independent."""
    bounds = [(score["value"], *interval(score["value"], score["stderr"], score["n"])) for score in scores]
    mean = math.fsum(value for value, _, _ in bounds) / len(bounds)
    below = math.sqrt(math.fsum((value - low) ** 2 for value, low, _ in bounds)) / len(bounds)
    above = math.sqrt(math.fsum((high - value) ** 2 for value, _, high in bounds)) / len(bounds)
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def _rows(summary: dict[str, Any], invalidated: dict[tuple[str, str], str]) -> list[Row]:
    folder = tuple(summary["place"].split("/", 1))
    withdrawn = invalidated.get((summary["suite"], summary["run"]), invalidated.get((folder[0], folder[1])))
    of_run = [f"invalidated: {withdrawn}"] if withdrawn is not None else []
    by_name = {variant["name"]: variant for variant in summary["variants"]}
    baseline = by_name.get(summary["baseline"])
    found = []
    for variant in summary["variants"]:
        scores = [score for score in variant["scores"].values() if score["is_share"]]
        reasons = [*of_run, *summary["problems"], *variant["problems"]]
        if not scores:
            reasons.append("no task whose figure is a share")
        row = Row(summary, variant, tuple(reasons))
        if scores and len(variant["scores"]) == len(summary["tasks"]) and all(score["value"] is not None for score in scores):
            row.mean, row.low, row.high = mean_interval(scores)
            row.recovery = _recovery(variant, baseline)
        found.append(row)
    return found


def _recovery(variant: dict[str, Any], baseline: dict[str, Any] | None) -> float | None:
    """Mean score over that of BF16 in the same run, where both were asked alike and BF16 has a score in every task."""
    if baseline is None or baseline["protocol"] != variant["protocol"]:
        return None
    ours, theirs = ([s["value"] for s in each["scores"].values() if s["is_share"]] for each in (variant, baseline))
    if None in ours or None in theirs or not math.fsum(theirs):
        return None
    return math.fsum(ours) / math.fsum(theirs)


def _board_of(row: Row) -> Board:
    summary, variant = row.summary, row.variant
    identity = [summary["suite"], summary["model"]["fingerprint"], variant["kernels"], sorted(variant["protocol"].items())]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return Board(key, summary["suite"], summary["model"], variant["kernels"], tuple(summary["tasks"]), variant["protocol"])


def _rank(board: Board) -> None:
    newest: dict[str, Row] = {}
    for row in sorted(board.rows, key=lambda row: row.order):
        newest[row.variant["name"]] = row
    standing = list(newest.values())
    for row in board.rows:
        row.state = OLDER
    for row in standing:
        row.state = RANKED
        row.rank = 1 + sum(_of(other.low) > _of(row.high) for other in standing)
    for row in standing:
        row.tied = sum(other.rank == row.rank for other in standing) - 1


def _add_others(boards: dict[str, Board], rows: list[Row]) -> None:
    """Put rows that are not ranked on every board they fit (BF16), or on the newest (the rest); on one of their own where there is none."""
    with_ranks: dict[str, list[Board]] = {}
    for board in sorted(boards.values(), key=lambda board: (board.newest, board.key), reverse=True):
        with_ranks.setdefault(board.suite, []).append(board)
    for row in rows:
        is_bf16 = row.variant["method"] == "bf16"
        if is_bf16 and not row.reasons:
            row.state = NULL if row.variant["is_null"] else BASELINE
        homes = [board for board in with_ranks.get(row.summary["suite"], ()) if _fits(row, board)]
        if not homes:
            board = _board_of(row)
            homes = [boards.setdefault(board.key, board)]
        for board in homes if is_bf16 else homes[:1]:
            board.rows.append(replace(row))
    for board in boards.values():
        held_against = [row for row in board.rows if row.state in (BASELINE, NULL)]
        newest = {row.variant["name"]: row.order for row in sorted(held_against, key=lambda row: row.order)}
        for row in held_against:
            if row.order != newest[row.variant["name"]]:
                row.state = OLDER


def _fits(row: Row, board: Board) -> bool:
    """Whether nothing that is known of the row contradicts the board."""
    is_same_kernel = row.variant["method"] == "bf16" or row.variant["kernels"] in (board.kernels, "unknown")
    is_same_model = row.summary["model"]["fingerprint"] == board.model["fingerprint"]
    return is_same_kernel and is_same_model and all(board.protocol.get(k) == v for k, v in row.variant["protocol"].items())


def _standing(row: Row) -> tuple[Any, ...]:
    """Ranked rows first, then BF16, then the rest; the newest run first."""
    place = (RANKED, BASELINE, NULL, NOT_RANKED, OLDER).index(row.state)
    run = tuple(-ord(letter) for letter in row.summary["run"])
    return (place, row.rank or 0, -(row.mean or 0.0) if row.state == RANKED else 0.0, run, row.variant["name"])


def _of(bound: float | None) -> float:
    if bound is None:
        raise ValueError("a row without a mean is never ranked")
    return bound
