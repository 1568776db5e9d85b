"""Figures of the paper as data: a TOML file of tables, validated. No torch.

A figure is known by its table, model, variant, task and metric. Values are as printed; `value_in_suite` is the same as `[reference]` of a suite
has it: percent points, or nats. It holds nothing but figures: what they mean is said where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from harness.errors import SuiteError
from harness.mistakes import Mistakes
from harness.published import DIAGNOSTICS
from harness.schema_gate import Verified
from harness.section import Name, Section
from harness.toml_file import read_toml

Unit = Literal["percent", "points of 1000", "nats"]
Key = tuple[str, str, str, str, str | None]
"""Table, model, variant, task and metric: as in the `[reference]` of a suite, None for the metric that stands in our tables."""
_LARGEST = {"percent": 100.0, "points of 1000": 1000.0, "nats": float("inf")}
_Source = Annotated[str, Field(pattern=r"^arXiv \d{4}\.\d{5}(v\d+)?, \S.*$")]


class _Figure(Section):
    """One cell. unit, source: of the table, unless it says otherwise."""

    model: Name
    variant: Name
    task: Name
    metric: Name | None = None
    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    verified: Verified
    unit: Unit | None = None
    source: _Source | None = None


class _Table(Section):
    """One table. source: an arXiv id and the table in it."""

    id: Annotated[str, Field(pattern=r"^T[1-9][0-9]?[a-z]?$")]
    source: _Source | None = None
    unit: Unit
    figure: Annotated[tuple[_Figure, ...], Field(min_length=1)]


class _File(Section):
    schema_version: Annotated[Literal[1], Field(alias="schema")]
    table: Annotated[tuple[_Table, ...], Field(min_length=1)]


@dataclass(frozen=True)
class PaperFigure:
    """A published figure, where it is from, and how sure it is that it was printed so."""

    table: str
    model: str
    variant: str
    task: str
    metric: str | None
    value: float
    unit: Unit
    source: str
    verified: Verified

    @property
    def key(self) -> Key:
        return self.table, self.model, self.variant, self.task, self.metric

    @property
    def value_in_suite(self) -> float:
        """The value in percent points; in nats of one that is."""
        return round(self.value / 10, 6) if self.unit == "points of 1000" else self.value


def load_paper_figures(path: Path) -> dict[Key, PaperFigure]:
    """The figures in the file at `path`, in its order.

    Raises:
        SuiteError: one line a mistake: a key that is not known, a value out of its range, a figure without a source or that stands there twice.
    """
    raw = read_toml(path, what="file of published figures", example="docs/paper-figures.toml")
    mistakes = Mistakes(path)
    file = mistakes.parse(_File, raw, "")
    found: dict[Key, PaperFigure] = {}
    places: dict[Key, str] = {}
    for place, table, figure in _cells(file) if file is not None else ():
        source, unit = figure.source or table.source, figure.unit or table.unit
        key = (table.id, figure.model, figure.variant, figure.task, figure.metric)
        if source is None:
            mistakes.add(place, 'no source; give one to the figure or to its table, such as "arXiv 2601.20088v3, T1: …"')
        if figure.value > _LARGEST[unit]:
            mistakes.add(place, f"found {figure.value:g}; allowed: at most {_LARGEST[unit]:g}, as its unit is {unit}")
        if (unit == "nats") != (figure.task == DIAGNOSTICS):
            mistakes.add(
                place,
                f'found the unit {unit} of task = "{figure.task}"; nats are of task = "{DIAGNOSTICS}", others of no such task',
            )
        if key in found:
            named = " ".join(part for part in key if part is not None)
            mistakes.add(place, f"{named} stands there twice, first as {places[key]}; remove one")
        elif source is not None:
            places[key] = place
            found[key] = PaperFigure(*key, figure.value, unit, source, figure.verified)
    if mistakes.found:
        raise SuiteError("\n".join(mistakes.found))
    return found


def _cells(file: _File) -> Iterator[tuple[str, _Table, _Figure]]:
    """Every figure with its place and its table."""
    for number, table in enumerate(file.table):
        for index, figure in enumerate(table.figure):
            yield f"table[{number}].figure[{index}] ({table.id} {figure.model})", table, figure
