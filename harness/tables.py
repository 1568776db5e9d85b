"""The result table of a run: as data, as a grid of text cells, and in every format that it is printed in. No torch.

Data and cells are made in `table_build` and `table_grid`; a format only writes down what they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.store import write_json, write_text
from harness.table_build import build_table
from harness.table_cells import MISSING, in_unit, score_text
from harness.table_csv import as_csv
from harness.table_grid import Grid, build_grid
from harness.table_latex import as_latex
from harness.table_text import as_markdown, print_grid

__all__ = [
    "FORMATS",
    "MISSING",
    "Grid",
    "build_grid",
    "build_table",
    "in_unit",
    "print_grid",
    "render",
    "score_text",
    "write_tables",
]

FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "md": lambda table: as_markdown(build_grid(table)),
    "csv": as_csv,
    "tex": lambda table: as_latex(build_grid(table)),
}
"""What a table is written as beside JSON, by the ending of the file."""


def render(table: dict[str, Any], style: str) -> str:
    """The table as one of FORMATS."""
    return FORMATS[style](table)


def write_tables(run: Path) -> None:
    """Write table.json and the table in every format into the run folder, made from its row files."""
    table = build_table(run)
    write_json(run / "table.json", table)
    for style in FORMATS:
        write_text(run / f"table.{style}", render(table, style))
