"""A grid as Markdown and on a terminal. No torch."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.table_grid import Grid


def as_markdown(grid: Grid) -> str:
    """The grid, those below it, and the notes as a list."""
    tables = [line for each in (grid, *grid.below) for line in (*_markdown(each), "")]
    return "\n".join([*tables, *(f"- {note}" for note in grid.notes), ""])


def print_grid(grid: Grid, console: Console) -> None:
    """Print to a terminal, each table as one where it is wide enough, else its columns over several."""
    for each in (grid, *grid.below):
        _print_table(each, console)
    for note in grid.notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)


def _print_table(grid: Grid, console: Console) -> None:
    unbounded = console.options.update(max_width=10_000)
    start = 1
    while start < len(grid.columns):
        end = len(grid.columns)
        while end > start + 1 and console.measure(_part(grid, start, end), options=unbounded).maximum > console.width:
            end -= 1
        console.print(_part(grid, start, end))
        start = end


def _part(grid: Grid, start: int, end: int) -> Table:
    table = Table(
        title=Text(grid.title) if start == 1 else None,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for index in (0, *range(start, end)):
        table.add_column(grid.columns[index], justify="right" if index else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*map(Text, (row[0], *row[start:end])))
    return table


def _markdown(grid: Grid) -> list[str]:
    head = [f"**{grid.title}**", "", "| " + " | ".join(grid.columns) + " |", "|" + " --- |" * len(grid.columns)]
    return head + ["| " + " | ".join(row) + " |" for row in grid.rows]
