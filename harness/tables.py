"""The result table of a run: as data (JSON), and as Markdown, CSV and terminal text from one grid. No torch.

Built from the row files of the run alone, so that it can be printed again after the cache is gone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.errors import StoreError
from harness.pairs import paired_kl, scale_rules
from harness.records import SCHEMA, read_json, read_lines, read_samples
from harness.seeds import merge_seeds, seed_groups
from harness.table_notes import mean_kl, native_fp4, table_notes

MISSING = "–"
_OF_A_TASK = (
    "primary",
    "kernels",
    "judge",
    "is_partial",
    "version",
    "flags",
    "repeats",
    "n_questions",
    "n_missing",
    "incomplete_rate",
    "truncated_rate",
    "mean_tokens",
    "p95_tokens",
)
"""What a table keeps of a task beside its figures."""


@dataclass(frozen=True)
class Grid:
    """Cells as text; a smaller table and `notes` stand below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    below: Grid | None = None


def build_table(run: Path) -> dict[str, Any]:
    """The table of a run folder as data; StoreError if a file of it is missing or damaged."""
    try:
        return _build_table(run)
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{run}: not a run of this version, a record lacks {error}; give a folder such as results/<suite>/<run id>"
        ) from error


def _build_table(run: Path) -> dict[str, Any]:
    about = read_json(run / "run.json")
    tasks, diagnostics = read_lines(run / "tasks.jsonl"), read_lines(run / "diagnostics.jsonl")
    sequences = read_lines(run / "diagnostics_sequences.jsonl")
    measured = {row["variant"]: {k: row[k] for k in row if k not in ("schema", "variant")} for row in diagnostics}
    rows = [
        {
            "variant": variant["name"],
            "group": variant.get("group", variant["name"]),
            "seed": variant.get("seed"),
            "method": variant["method"],
            "tasks": _tasks_of(variant, tasks),
            "selection": variant.get("selection"),
            "diagnostics": measured.get(variant["name"]),
            "checkpoint_bytes": variant.get("checkpoint_bytes"),
            "n_weights": variant.get("n_weights"),
            "bits_per_weight": variant.get("bits_per_weight"),
            "budget": variant.get("budget"),
            "budget_asked": {key: (variant.get("training") or {}).get(key) for key in ("tokens", "batch_size")},
            "codes_changed": variant.get("codes_changed"),
        }
        for variant in about["variants"]
    ]
    groups = seed_groups(rows, sequences, lambda variant, task: read_samples(run / "samples" / f"{variant}.{task}.jsonl.zst"))
    variants, sequences = merge_seeds(about["variants"], sequences, groups)
    table = {
        "schema": SCHEMA,
        "suite": about["suite"],
        "run": about["run"],
        "status": about["status"],
        "model": about["model"],
        "rows": rows,
        "seed_groups": groups,
        "native_fp4": native_fp4(rows),
        "paired_kl": paired_kl(sequences, variants),
    }
    return table | {"scale_rules": scale_rules(sequences, variants, mean_kl(table))}


def build_grid(table: dict[str, Any]) -> Grid:
    """The table as text cells: scores in percent, or plain where they are no shares, with standard errors; KL and CE in nats a token."""
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["tasks"]))
    columns = ("variant", *names, "KL", "CE", "ppl", "top-1", "MB", "bits/w", "trained")
    rows = tuple(_group_cells(row, names) if is_group else _cells(row, names) for row, is_group in _in_order(table))
    return Grid(f"{table['suite']} {table['run']}", columns, rows, tuple(table_notes(table, names)), _by_position(table))


def render(table: dict[str, Any], style: str) -> str:
    """The table as "md" or "csv"."""
    grid = build_grid(table)
    if style == "csv":
        return _csv(table)
    lines = _markdown(grid) if grid.below is None else [*_markdown(grid), "", *_markdown(grid.below)]
    return "\n".join([*lines, "", *(f"- {note}" for note in grid.notes), ""])


def _markdown(grid: Grid) -> list[str]:
    head = [f"**{grid.title}**", "", "| " + " | ".join(grid.columns) + " |", "|" + " --- |" * len(grid.columns)]
    return head + ["| " + " | ".join(row) + " |" for row in grid.rows]


def print_grid(grid: Grid, console: Console) -> None:
    """Print to a terminal: one table where it is wide enough, else its columns over several."""
    unbounded = console.options.update(max_width=10_000)
    start = 1
    while start < len(grid.columns):
        end = len(grid.columns)
        while end > start + 1 and console.measure(_part(grid, start, end), options=unbounded).maximum > console.width:
            end -= 1
        console.print(_part(grid, start, end))
        start = end
    if grid.below is not None:
        print_grid(grid.below, console)
    for note in grid.notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)


def _part(grid: Grid, start: int, end: int) -> Table:
    table = Table(title=grid.title if start == 1 else None, title_justify="left")
    for index in (0, *range(start, end)):
        table.add_column(grid.columns[index], justify="right" if index else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(row[0], *row[start:end])
    return table


def _in_order(table: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
    """Rows of variants and, after the last seed of each, of groups of seeds (True)."""
    last = {group["variants"][-1]: group for group in table["seed_groups"]}
    found: list[tuple[dict[str, Any], bool]] = []
    for row in table["rows"]:
        found.append((row, False))
        if row["variant"] in last:
            found.append((last[row["variant"]], True))
    return found


def _tasks_of(variant: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    selection = variant.get("selection") or {}
    judges = selection.get("tasks", ()) if selection.get("select") == "best_of_k" else ()
    found: dict[str, Any] = {}
    for row in rows:
        if row["variant"] != variant["name"]:
            continue
        shared = {key: row.get(key) for key in _OF_A_TASK}
        task = found.setdefault(row["task"], {**shared, "chose_checkpoint": row["task"] in judges, "metrics": {}})
        figures = {key: row[key] for key in ("value", "stderr", "n_scored", "n_total")}
        task["metrics"][row["metric"]] = figures | {"unit": row.get("unit", "share")}
    return found


def _cells(row: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    diagnostics = row["diagnostics"]["response"] if row["diagnostics"] else {}
    return (
        row["variant"],
        *(_score(row["tasks"].get(name)) for name in names),
        _with_error(diagnostics.get("kl"), diagnostics.get("kl_stderr"), 3),
        _number(diagnostics.get("ce"), 3),
        _number(diagnostics.get("ppl"), 2),
        _number(diagnostics.get("top1"), 3),
        *_sizes(row, None if row["budget"] is None else row["budget"]["tokens"]),
    )


def _group_cells(group: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    """As `_cells`, each figure as mean ± error (seeds spread)."""
    n = len(group["variants"])
    diagnostics = group["diagnostics"]["response"] if group["diagnostics"] else {}
    scores = []
    for name in names:
        task = group["tasks"].get(name)
        cell = _over_seeds(task["metrics"][task["primary"]], n, in_unit) if task else MISSING
        scores.append(cell + (_marks(task) if task else ""))
    figures = [
        _over_seeds(diagnostics.get(figure), n, _fixed(digits))
        for figure, digits in (("kl", 3), ("ce", 3), ("ppl", 2), ("top1", 3))
    ]
    return (group["label"], *scores, *figures, *_sizes(group, group["tokens_trained"]))


def _by_position(table: dict[str, Any]) -> Grid | None:
    """KL on answers by task and by position in the answer; None where it was measured on text. The last row counts tokens."""
    measured = {row["variant"]: row["diagnostics"] for row in table["rows"] if (row["diagnostics"] or {}).get("tasks")}
    if not measured:
        return None
    first = next(iter(measured.values()))
    bounds = [(part["from"], part["to"]) for part in first["positions"]]
    columns = ("variant", *first["tasks"], *(f"{start}+" if end is None else f"{start}–{end - 1}" for start, end in bounds))

    def cells(name: str, found: dict[str, Any], cell: Callable[[dict[str, Any] | None], str]) -> tuple[str, ...]:
        parts = {(part["from"], part["to"]): part for part in found["positions"]}
        return (
            name,
            *(cell(found["tasks"].get(task)) for task in first["tasks"]),
            *(cell(parts.get(bound)) for bound in bounds),
        )

    rows = [cells(name, found, _kl_cell) for name, found in measured.items()]
    tokens = cells("tokens", first, lambda part: MISSING if part is None else f"{part['n_tokens']:,}")
    return Grid("KL on BF16 answers, by task and by token of the answer", columns, (*rows, tokens), ())


def _kl_cell(part: dict[str, Any] | None) -> str:
    return MISSING if part is None else _with_error(part["kl"], part["kl_stderr"], 3)


def _sizes(row: dict[str, Any], tokens: int | None) -> tuple[str, str, str]:
    megabytes = None if row["checkpoint_bytes"] is None else row["checkpoint_bytes"] / 1e6
    return _number(megabytes, 1), _number(row["bits_per_weight"], 2), MISSING if tokens is None else f"{tokens:,}"


def _score(task: dict[str, Any] | None) -> str:
    if task is None:
        return MISSING
    return score_text(task["metrics"][task["primary"]]) + _marks(task)


def score_text(figure: dict[str, Any]) -> str:
    """A figure with `value`, `stderr` and `unit` as "34.5 ±1.2": a "share" (the unit of rows without one) in percent, else as it is."""
    value, stderr = (in_unit(figure, figure[part]) for part in ("value", "stderr"))
    return MISSING if figure["value"] is None else value + ("" if figure["stderr"] is None else f" ±{stderr}")


def in_unit(figure: dict[str, Any], value: float | None) -> str:
    """A value or an error of a task: a share in percent with one decimal, other figures with three significant digits."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f}" if figure.get("unit", "share") == "share" else f"{value:.3g}"


def _fixed(digits: int) -> Callable[[dict[str, Any], float | None], str]:
    return lambda figure, value: _number(value, digits)


def _marks(task: dict[str, Any]) -> str:
    return ("*" if task["is_partial"] else "") + ("†" if task["chose_checkpoint"] else "") + ("‡" if task["flags"] else "")


def _over_seeds(figure: dict[str, Any] | None, n: int, written: Callable[[dict[str, Any], float | None], str]) -> str:
    if figure is None or figure["mean"] is None:
        return MISSING
    error = next(value for key, value in figure.items() if key.startswith("stderr_over_"))
    seeds = "seeds" if figure["n"] == n else f"{figure['n']} of {n} seeds"
    stderr = "" if error is None else f" ±{written(figure, error)}"
    return f"{written(figure, figure['mean'])}{stderr} ({seeds} {written(figure, figure['sd_over_seeds'])})"


def _with_error(value: float | None, stderr: float | None, digits: int) -> str:
    if value is None:
        return MISSING
    return _number(value, digits) + ("" if stderr is None else f" ±{stderr:.{digits}f}")


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _csv(table: dict[str, Any]) -> str:
    """One line a variant and a group of seeds, plain numbers in full precision; empty where there is no figure."""
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["tasks"]))
    parts = ("value", "stderr", "n_scored", "n_total", "incomplete_rate", "chose_checkpoint", "sd_over_seeds")
    diagnostic_columns = ("kl", "kl_stderr", "kl_p50", "kl_p99", "ce", "ppl", "top1", "n_tokens", "n_sequences")
    spreads = ("kl_sd_over_seeds", "ce_sd_over_seeds", "ppl_sd_over_seeds", "top1_sd_over_seeds")
    columns = ["variant", "method", *(f"{name}.{part}" for name in names for part in parts), *diagnostic_columns]
    columns += ["checkpoint_bytes", "bits_per_weight", "tokens_trained", "group", "seed", "n_seeds", *spreads]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row, is_group in _in_order(table):
        cells = _csv_group(row) if is_group else _csv_row(row, diagnostic_columns)
        writer.writerow({key: "" if value is None else value for key, value in cells.items()})
    return buffer.getvalue()


def _csv_row(row: dict[str, Any], diagnostic_columns: tuple[str, ...]) -> dict[str, Any]:
    cells = {key: row[key] for key in ("variant", "method", "checkpoint_bytes", "bits_per_weight", "seed")}
    cells["group"] = row["group"] if row["group"] != row["variant"] else None
    cells["tokens_trained"] = (row["budget"] or {}).get("tokens")
    for name, task in row["tasks"].items():
        metric = task["metrics"][task["primary"]]
        cells |= {f"{name}.{part}": metric[part] for part in ("value", "stderr", "n_scored", "n_total")}
        cells |= {f"{name}.incomplete_rate": task["incomplete_rate"], f"{name}.chose_checkpoint": _claim(task)}
    response = row["diagnostics"]["response"] if row["diagnostics"] else {}
    return cells | {column: response.get(column) for column in diagnostic_columns}


def _csv_group(group: dict[str, Any]) -> dict[str, Any]:
    cells = {key: group[key] for key in ("method", "group", "checkpoint_bytes", "bits_per_weight", "tokens_trained")}
    cells |= {"variant": group["label"], "n_seeds": len(group["variants"])}
    for name, task in group["tasks"].items():
        metric = task["metrics"][task["primary"]]
        cells |= {f"{name}.value": metric["mean"], f"{name}.stderr": metric["stderr_over_questions"]}
        cells |= {f"{name}.sd_over_seeds": metric["sd_over_seeds"], f"{name}.chose_checkpoint": _claim(task)}
    for figure, found in (group["diagnostics"]["response"] if group["diagnostics"] else {}).items():
        cells |= {figure: found["mean"], f"{figure}_sd_over_seeds": found["sd_over_seeds"]}
        if figure == "kl":
            cells["kl_stderr"] = found["stderr_over_sequences"]
    return cells


def _claim(task: dict[str, Any]) -> str | None:
    return "true" if task["chose_checkpoint"] else None
