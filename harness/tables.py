"""The result table of a run: as data (JSON), and as Markdown, CSV and terminal text from one grid. No torch.

Built from the row files of the run alone, so that it can be printed again after the cache is gone.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.errors import StoreError
from harness.records import SCHEMA, read_json, read_lines
from qad.clustered import ratio_with_stderr

MISSING = "–"
SMALL_MODEL_WEIGHTS = 1_000_000_000


@dataclass(frozen=True)
class Grid:
    """Cells as text; `notes` stand below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


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
    measured = {row["variant"]: {k: row[k] for k in row if k not in ("schema", "variant")} for row in diagnostics}
    rows = [
        {
            "variant": variant["name"],
            "method": variant["method"],
            "tasks": _tasks_of(variant["name"], tasks),
            "diagnostics": measured.get(variant["name"]),
            "checkpoint_bytes": variant.get("checkpoint_bytes"),
            "n_weights": variant.get("n_weights"),
            "bits_per_weight": variant.get("bits_per_weight"),
            "budget": variant.get("budget"),
            "codes_changed": variant.get("codes_changed"),
        }
        for variant in about["variants"]
    ]
    return {
        "schema": SCHEMA,
        "suite": about["suite"],
        "run": about["run"],
        "status": about["status"],
        "model": about["model"],
        "rows": rows,
        "paired_kl": paired_kl(read_lines(run / "diagnostics_sequences.jsonl"), about["variants"]),
    }


def paired_kl(sequences: list[dict[str, Any]], variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences in mean KL over response tokens, candidate minus baseline, with errors over sequences.

    Every trained variant against every PTQ, and every QAD against every QAT.
    """
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for row in sequences:
        by_variant.setdefault(row["variant"], []).append(row)
    against = {"qad": ("ptq", "qat"), "qat": ("ptq",)}
    found = []
    for candidate in variants:
        for baseline in variants:
            if baseline["method"] not in against.get(candidate["method"], ()):
                continue
            ours, theirs = by_variant.get(candidate["name"]), by_variant.get(baseline["name"])
            if not ours or not theirs:
                continue
            if [(row["sequence"], row["n_tokens"]) for row in ours] != [(row["sequence"], row["n_tokens"]) for row in theirs]:
                raise StoreError(
                    f"diagnostics_sequences.jsonl: {candidate['name']} and {baseline['name']} were measured on different sequences "
                    "and cannot be paired; run the suite again"
                )
            pairs = list(zip(ours, theirs, strict=True))
            value, stderr = ratio_with_stderr([a["kl_sum"] - b["kl_sum"] for a, b in pairs], [a["n_tokens"] for a, _ in pairs])
            found.append(
                {
                    "candidate": candidate["name"],
                    "baseline": baseline["name"],
                    "difference": value,
                    "stderr": stderr,
                    "n_sequences": len(pairs),
                }
            )
    return found


def build_grid(table: dict[str, Any]) -> Grid:
    """The table as text cells: scores in percent with their standard errors, KL and CE in nats a token."""
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["tasks"]))
    columns = ("variant", *names, "KL", "CE", "ppl", "top-1", "MB", "bits/w", "trained")
    rows = tuple(_cells(row, names) for row in table["rows"])
    return Grid(f"{table['suite']} {table['run']}", columns, rows, tuple(_notes(table, names)))


def render(table: dict[str, Any], style: str) -> str:
    """The table as "md" or "csv"."""
    grid = build_grid(table)
    if style == "csv":
        return _csv(table)
    lines = [f"**{grid.title}**", "", "| " + " | ".join(grid.columns) + " |", "|" + " --- |" * len(grid.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in grid.rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in grid.notes), ""])


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
    for note in grid.notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)


def _part(grid: Grid, start: int, end: int) -> Table:
    table = Table(title=grid.title if start == 1 else None, title_justify="left")
    for index in (0, *range(start, end)):
        table.add_column(grid.columns[index], justify="right" if index else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(row[0], *row[start:end])
    return table


def _tasks_of(variant: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        if row["variant"] != variant:
            continue
        shared = {key: row[key] for key in ("primary", "incomplete_rate", "kernels", "is_partial", "version")}
        task = found.setdefault(row["task"], {**shared, "metrics": {}})
        task["metrics"][row["metric"]] = {key: row[key] for key in ("value", "stderr", "n_scored", "n_total")}
    return found


def _cells(row: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    diagnostics = row["diagnostics"]["response"] if row["diagnostics"] else {}
    budget = row["budget"]
    return (
        row["variant"],
        *(_score(row["tasks"].get(name)) for name in names),
        _with_error(diagnostics.get("kl"), diagnostics.get("kl_stderr"), 3),
        _number(diagnostics.get("ce"), 3),
        _number(diagnostics.get("ppl"), 2),
        _number(diagnostics.get("top1"), 3),
        _number(None if row["checkpoint_bytes"] is None else row["checkpoint_bytes"] / 1e6, 1),
        _number(row["bits_per_weight"], 2),
        MISSING if budget is None else f"{budget['tokens']:,}",
    )


def _score(task: dict[str, Any] | None) -> str:
    if task is None:
        return MISSING
    metric = task["metrics"][task["primary"]]
    mark = "*" if task["is_partial"] else ""
    value, stderr = (None if metric[part] is None else 100 * metric[part] for part in ("value", "stderr"))
    return _with_error(value, stderr, 1) + mark


def _with_error(value: float | None, stderr: float | None, digits: int) -> str:
    if value is None:
        return MISSING
    return _number(value, digits) + ("" if stderr is None else f" ±{stderr:.{digits}f}")


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _notes(table: dict[str, Any], names: list[str]) -> list[str]:
    rows = table["rows"]
    notes = [f"{note}." for note in table["model"]["notes"]]
    n_weights = max((row["n_weights"] for row in rows if row["n_weights"]), default=None)
    if n_weights and n_weights < SMALL_MODEL_WEIGHTS:
        notes.append(
            f"{n_weights / 1e6:,.1f} million weights: quantization damages so small a model far more than one of a real size."
        )
    if table["status"] != "complete":
        notes.append(f"This run is {table['status']}: rows without figures are still to come.")
    counts = {
        name: {row["tasks"][name]["metrics"][row["tasks"][name]["primary"]]["n_scored"] for row in rows if name in row["tasks"]}
        for name in names
    }
    if names:
        sizes = ", ".join(f"{name} {'/'.join(map(str, sorted(n)))}" for name, n in counts.items())
        notes.append(f"Scores: percent ± standard error over questions, related ones as clusters; questions scored: {sizes}.")
    if any(row["tasks"][name]["is_partial"] for row in rows for name in row["tasks"]):
        notes.append("* partial: the suite limits this task to its first questions.")
    measured = [row for row in rows if row["diagnostics"]]
    if measured:
        n = measured[0]["diagnostics"]["response"]
        notes.append(
            f"KL(BF16 ‖ variant) and CE: nats a token over {n['n_tokens']:,} response tokens of {n['n_sequences']} held-out "
            "sequences; error of KL over sequences. All tokens: table.json."
        )
    for pair in table["paired_kl"]:
        in_errors = f", {abs(pair['difference']) / pair['stderr']:.1f} standard errors" if pair["stderr"] else ""
        notes.append(
            f"KL {pair['candidate']} − {pair['baseline']}: {pair['difference']:+.3f} {_pm(pair['stderr'])}(paired over "
            f"{pair['n_sequences']} sequences{in_errors})."
        )
    notes += _kernel_notes(rows) + _incomplete_notes(rows) + _training_notes(rows)
    return notes


def _kernel_notes(rows: list[dict[str, Any]]) -> list[str]:
    by_kernel: dict[str, list[str]] = {}
    for row in rows:
        kernels = [part["kernels"]["linear"] for part in (*row["tasks"].values(), row["diagnostics"]) if part]
        for kernel in dict.fromkeys(kernels):
            by_kernel.setdefault(kernel, []).append(row["variant"])
    listed = "; ".join(f"{', '.join(names)}: {kernel}" for kernel, names in by_kernel.items())
    return [f"Kernels of linear layers: {listed}. Native FP4: not measured."] if listed else []


def _incomplete_notes(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        for name, task in row["tasks"].items():
            if task["incomplete_rate"]:
                found.append(f"{row['variant']} {name} {100 * task['incomplete_rate']:.1f} %")
        saturated = (row["diagnostics"] or {}).get("saturated_share")
        if saturated:
            found.append(f"{row['variant']}: {100 * saturated:.3g} % of activation blocks saturate")
    return [f"Incomplete answers (scored 0) and saturation: {'; '.join(found)}."] if found else []


def _training_notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    budgets = {(r["budget"]["tokens"], r["budget"]["steps"]) for r in rows if r["budget"]}
    for row in rows:
        budget = row["budget"]
        if budget:
            again = f", data read {budget['epochs_read']} times" if budget["epochs_read"] > 1 else ""
            notes.append(
                f"{row['variant']}: {budget['steps']} steps, {budget['loss_tokens']:,} tokens in the loss, lr {budget['lr']:g}{again}; "
                f"{100 * row['codes_changed']:.1f} % of the FP4 codes differ from PTQ."
            )
    if len(budgets) > 1:
        notes.append("Budgets differ between trained variants: they are not compared at equal cost.")
    return notes


def _pm(stderr: float | None) -> str:
    return "" if stderr is None else f"± {stderr:.3f} "


def _csv(table: dict[str, Any]) -> str:
    """One line a variant, plain numbers in full precision; empty where there is no figure."""
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["tasks"]))
    diagnostic_columns = ("kl", "kl_stderr", "kl_p50", "kl_p99", "ce", "ppl", "top1", "n_tokens", "n_sequences")
    columns = ["variant", "method"]
    for name in names:
        columns += [f"{name}.{part}" for part in ("value", "stderr", "n_scored", "n_total", "incomplete_rate")]
    columns += [*diagnostic_columns, "checkpoint_bytes", "bits_per_weight", "tokens_trained"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in table["rows"]:
        cells: list[Any] = [row["variant"], row["method"]]
        for name in names:
            task = row["tasks"].get(name)
            metric = task["metrics"][task["primary"]] if task else {}
            cells += [metric.get(part) for part in ("value", "stderr", "n_scored", "n_total")] + [
                task["incomplete_rate"] if task else None
            ]
        response = row["diagnostics"]["response"] if row["diagnostics"] else {}
        budget = row["budget"] or {}
        cells += [response.get(column) for column in diagnostic_columns]
        cells += [row["checkpoint_bytes"], row["bits_per_weight"], budget.get("tokens")]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return buffer.getvalue()
