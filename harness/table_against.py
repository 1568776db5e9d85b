"""The block of a table that holds every variant against BF16: differences, recovery, the gap that training closed, incomplete answers."""

from __future__ import annotations

from typing import Any

from harness.table_cells import MISSING, signed

COLUMNS = ("variant: task", "difference", "recovery, %", "gap closed, %", "incomplete", "lost/won")
NOT_COMPARED = "not compared"


def against_rows(table: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a (task, variant), seeds of one variant as their mean; empty where nothing was compared."""
    rates = {(row["variant"], name): task["incomplete_rate"] for row in table["rows"] for name, task in row["tasks"].items()}
    groups = {group["label"]: group["variants"] for group in table["seed_groups"]}
    single = {name for members in groups.values() for name in members}
    names = list(dict.fromkeys(row["task"] for row in table["differences"]))
    order = {row["variant"]: place for place, row in enumerate(table["rows"])}
    order |= {label: order[members[-1]] for label, members in groups.items()}
    shown = [row for row in table["differences"] if row["candidate"] not in single]
    shown.sort(key=lambda row: (names.index(row["task"]), order[row["candidate"]]))
    return [_cells(row, rates, groups.get(row["candidate"], [row["candidate"]])) for row in shown]


def against_notes(table: dict[str, Any]) -> list[str]:
    """What the block says and why cells of it are empty."""
    found = [row for row in table["differences"] if not row["refused"]]
    notes = []
    if found:
        baseline = found[0]["baseline"]
        starts = ", ".join(dict.fromkeys(row["start"] for row in found if row["start"]))
        gap = f"; gap closed = (variant − {starts}) / ({baseline} − {starts})" if starts else ""
        notes.append(
            f"Against {baseline}, on the same questions: difference in points; recovery = variant / {baseline}{gap}; in brackets 95 % intervals "
            f"over questions, related ones as clusters. Incomplete: of the answers (in brackets those of {baseline}). Lost/won: questions. "
            f"{_counts(found)}"
        )
    notes += _by_reason(
        "Undefined, since {0}: {1}.",
        [
            (ratio["reason"].removeprefix("undefined: "), f"{what} of {row['candidate']} in {row['task']}")
            for row in found
            for what, ratio in (("recovery", row["recovery"]), ("gap closed", row["gap_recovered"]))
            if ratio and ratio["reason"]
        ],
    )
    notes += _by_reason(
        "Not compared with BF16: {1}. {0}",
        [(" ".join(row["refused"]), f"{row['candidate']} in {row['task']}") for row in table["differences"] if row["refused"]],
    )
    if table["without_scores"]:
        n_results = sum(len(row["tasks"]) for row in table["rows"])
        which = "the results of this run" if len(table["without_scores"]) == n_results else ", ".join(table["without_scores"])
        notes.append(
            f"Not compared with BF16, since scores/ lacks them (an older version made them; run the suite again): {which}."
        )
    return notes


def _cells(row: dict[str, Any], rates: dict[tuple[str, str], float | None], members: list[str]) -> tuple[str, ...]:
    name, task = row["candidate"], row["task"]
    known = [rate for member in members if (rate := rates.get((member, task))) is not None]
    ours, theirs = sum(known) / len(known) if known else None, rates.get((row["baseline"], task))
    incomplete = MISSING if ours is None else f"{100 * ours:.1f} %" + ("" if theirs is None else f" ({100 * theirs:.1f})")
    if row["refused"]:
        return f"{name}: {task}", NOT_COMPARED, MISSING, MISSING, incomplete, MISSING
    return (
        f"{name}: {task}",
        difference_text(row),
        ratio_text(row["recovery"]),
        ratio_text(row["gap_recovered"], 0),
        incomplete,
        f"{row['worse']}/{row['better']}",
    )


def difference_text(row: dict[str, Any]) -> str:
    """A difference in points with its interval, as "−0.5 [−1.6, +0.6]"."""
    return f"{signed(100 * row['delta'])} [{signed(100 * row['low'])}, {signed(100 * row['high'])}]"


def ratio_text(ratio: dict[str, Any] | None, digits: int = 1) -> str:
    """A ratio in percent with its interval, as "99.3 [97.1, 101.5]"."""
    if ratio is None:
        return MISSING
    if ratio["value"] is None:
        return "undefined"
    low, high = (end if ratio[key] is None else _percent(ratio[key], digits) for key, end in (("low", "−∞"), ("high", "∞")))
    return f"{_percent(ratio['value'], digits)} [{low}, {high}]"


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f}".replace("-", "−")


def _counts(found: list[dict[str, Any]]) -> str:
    """How many questions and clusters each task's differences are of; several where variants differ."""
    by_task: dict[str, dict[str, None]] = {}
    for row in found:
        n, clusters = row["n_questions"], row["n_clusters"]
        text = f"{n:,}" if n == clusters else f"{n:,} in {clusters:,} clusters"
        by_task.setdefault(row["task"], {})[text] = None
    listed = [f"{task} {'/'.join(texts)}" for task, texts in by_task.items()]
    return f"Questions: {', '.join(listed)}."


def _by_reason(sentence: str, found: list[tuple[str, str]]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for reason, what in found:
        by_reason.setdefault(reason, []).append(what)
    return [sentence.format(reason, ", ".join(whats)) for reason, whats in by_reason.items()]
