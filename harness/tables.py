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
from harness.pairs import paired_kl, scale_notes, scale_rules
from harness.records import SCHEMA, read_json, read_lines

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
    sequences = read_lines(run / "diagnostics_sequences.jsonl")
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
        "native_fp4": native_fp4(rows),
        "paired_kl": paired_kl(sequences, about["variants"]),
        "scale_rules": scale_rules(sequences, about["variants"], _mean_kl(rows)),
    }


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


def _mean_kl(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {row["variant"]: row["diagnostics"]["response"]["kl"] for row in rows if row["diagnostics"]}


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
    notes += scale_notes(table["scale_rules"], _mean_kl(rows))
    notes += _kernel_notes(rows) + _incomplete_notes(rows) + _training_notes(rows)
    return notes


def _kernel_notes(rows: list[dict[str, Any]]) -> list[str]:
    linear = _by_kernel(rows, "linear")
    if not linear:
        return []
    native = native_fp4(rows)
    others = [(what, _by_kernel(rows, part)) for what, part in (("FP8 layers", "linear_fp8"), ("KV cache", "kv_cache"))]
    return [
        " ".join(
            [
                f"Kernels of linear layers: {linear}.",
                *(f"{what}: {found}." for what, found in others if found),
                *(["Native FP4: not measured."] if native == "not measured" else []),
            ]
        )
    ]


def native_fp4(rows: list[dict[str, Any]]) -> str:
    """Whether any figure was computed by FP4 units: "measured" or "not measured"."""
    parts = [part for row in rows for part in (*row["tasks"].values(), row["diagnostics"]) if part]
    return "measured" if any("native" in part["kernels"]["linear"].split("+") for part in parts) else "not measured"


def _by_kernel(rows: list[dict[str, Any]], part: str) -> str:
    """Variants by the kernel of one class of module; a BF16 cache is what everyone has and is not listed."""
    by_kernel: dict[str, list[str]] = {}
    for row in rows:
        measured = [found["kernels"].get(part) for found in (*row["tasks"].values(), row["diagnostics"]) if found]
        for kernel in dict.fromkeys(measured):
            if kernel is not None and not (part == "kv_cache" and kernel == "bf16"):
                by_kernel.setdefault(kernel, []).append(row["variant"])
    return "; ".join(f"{', '.join(names)}: {kernel}" for kernel, names in by_kernel.items())


def _incomplete_notes(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        for name, task in row["tasks"].items():
            if task["incomplete_rate"]:
                found.append(f"{row['variant']} {name} {100 * task['incomplete_rate']:.1f} %")
        diagnostics = row["diagnostics"] or {}
        if diagnostics.get("saturated_share"):
            overshoot = diagnostics.get("overshoot")  # runs from before it was counted have none
            factor = "" if overshoot is None else f", by up to {overshoot:.3g} times"
            found.append(
                f"{row['variant']}: {100 * diagnostics['saturated_share']:.3g} % of activation blocks saturate{factor}"
            )
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
