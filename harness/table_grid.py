"""The table of a run as text cells: one grid, smaller ones below it, and the notes that they need. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.published import COLUMNS as PUBLISHED
from harness.published import published_cells, published_notes, published_rows
from harness.speed import speed_notes
from harness.table_against import COLUMNS, against_notes, against_rows
from harness.table_build import in_order
from harness.table_cells import MISSING, fixed, in_unit, marks, number, over_seeds, score_text, with_error
from harness.table_notes import table_notes

_SPEED = "tok/s"
_FIGURES = ("KL", "CE", "ppl", "top-1", "MB", "bits/w", _SPEED, "trained")


@dataclass(frozen=True)
class Grid:
    """Cells as text; smaller tables and `notes` stand below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    below: tuple[Grid, ...] = ()


def build_grid(table: dict[str, Any]) -> Grid:
    """The table as text cells: scores in percent, or plain where they are no shares, with standard errors; KL and CE in nats a token.

    The column of speeds is left out where none is known.
    """
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["tasks"]))
    rows = [_group_cells(row, names) if is_group else _cells(row, names) for row, is_group in in_order(table)]
    rows += [row + (MISSING,) * (len(_FIGURES)) for row in published_cells(table["published"], names)]
    columns, kept = ("variant", *names, *_FIGURES), list(range(1 + len(names) + len(_FIGURES)))
    if all(row["tokens_per_second"] is None for row in table["rows"]):
        kept.remove(columns.index(_SPEED))
    blocks = [block for block in (_against(table), _published(table), _by_position(table)) if block is not None]
    return Grid(
        f"{'REHEARSAL of ' if table.get('rehearsal') else ''}{table['suite']} {table['run']}",
        tuple(columns[index] for index in kept),
        tuple(tuple(row[index] for index in kept) for row in rows),
        tuple(_notes(table, names)),
        tuple(blocks),
    )


def _notes(table: dict[str, Any], names: list[str]) -> list[str]:
    notes = table_notes(table, names) + against_notes(table) + published_notes(table["published"])
    return notes + speed_notes(table["rows"]) + _single_seeds(table)


def _single_seeds(table: dict[str, Any]) -> list[str]:
    """The seeds of sampling, and of trainings that have one; several of a variant are told elsewhere."""
    sampling = ", ".join(map(str, table["sampling_seeds"]))
    single = [row for row in table["rows"] if row["group"] == row["variant"] and row["training_seed"] is not None]
    training = ", ".join(f"{row['variant']} {row['training_seed']}" for row in single)
    said = ([f"sampling {sampling}"] if sampling else []) + ([f"training {training}"] if training else [])
    return [f"Seeds: {'; '.join(said)}."] if said else []


def _against(table: dict[str, Any]) -> Grid | None:
    rows = against_rows(table)
    return Grid(f"Against {table['differences'][0]['baseline']}", COLUMNS, tuple(rows), ()) if rows else None


def _published(table: dict[str, Any]) -> Grid | None:
    rows = published_rows(table["published"])
    return Grid("Published figures", PUBLISHED, tuple(rows), ()) if rows else None


def _cells(row: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    diagnostics = row["diagnostics"]["response"] if row["diagnostics"] else {}
    return (
        row["variant"],
        *(_score(row["tasks"].get(name)) for name in names),
        with_error(diagnostics.get("kl"), diagnostics.get("kl_stderr"), 3),
        number(diagnostics.get("ce"), 3),
        number(diagnostics.get("ppl"), 2),
        number(diagnostics.get("top1"), 3),
        *_sizes(row, None if row["budget"] is None else row["budget"]["tokens"]),
    )


def _group_cells(group: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    """As `_cells`, each figure as mean ± error (seeds spread)."""
    n = len(group["variants"])
    diagnostics = group["diagnostics"]["response"] if group["diagnostics"] else {}
    scores = []
    for name in names:
        task = group["tasks"].get(name)
        cell = over_seeds(task["metrics"][task["primary"]], n, in_unit) if task else MISSING
        scores.append(cell + (marks(task) if task else ""))
    figures = [
        over_seeds(diagnostics.get(figure), n, fixed(digits))
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
    return MISSING if part is None else with_error(part["kl"], part["kl_stderr"], 3)


def _sizes(row: dict[str, Any], tokens: int | None) -> tuple[str, str, str, str]:
    megabytes = None if row["checkpoint_bytes"] is None else row["checkpoint_bytes"] / 1e6
    speed = row.get("tokens_per_second")  # a group of seeds has none: its seeds have
    return (
        number(megabytes, 1),
        number(row["bits_per_weight"], 2),
        MISSING if speed is None else f"{speed:,.1f}",
        MISSING if tokens is None else f"{tokens:,}",
    )


def _score(task: dict[str, Any] | None) -> str:
    if task is None:
        return MISSING
    return score_text(task["metrics"][task["primary"]]) + marks(task)
