"""A grid as LaTeX: tables with the rules of `booktabs`, plain enough for pdflatex; notes as a list below. No torch."""

from __future__ import annotations

import re

from harness.table_grid import Grid

_WRITTEN = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "*": r"\textasteriskcentered{}",
    "[": "{[}",  # after the end of a row it would be read as an argument
    "]": "{]}",
    "–": "--",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "∞": r"$\infty$",
    "‖": r"$\Vert$",
    "→": r"$\rightarrow$",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "…": r"\ldots{}",
    "\n": " ",
    "\t": " ",
}
_SPECIAL = re.compile("|".join(map(re.escape, _WRITTEN)))


def as_latex(grid: Grid) -> str:
    """The grid, those below it and the notes as a fragment to \\input; it needs the package booktabs.

    Characters that are no ASCII and have no name here are left as they are: pdflatex reads UTF-8, but its font may lack them.
    """
    head = [r"% Needs \usepackage{booktabs}", r"\begin{table}", r"\centering\small"]
    body = [line for each in (grid, *grid.below) for line in _tabular(each)]
    notes = [rf"\item {escape(note)}" for note in grid.notes]
    listed = [r"\begin{itemize}\footnotesize", *notes, r"\end{itemize}"] if notes else []
    return "\n".join([*head, *body, *listed, r"\end{table}", ""])


def escape(text: str) -> str:
    """Text as LaTeX prints it, character for character."""
    return _SPECIAL.sub(lambda found: _WRITTEN[found.group()], text)


def _tabular(grid: Grid) -> list[str]:
    """One table with its title above; numbers stand on the right."""
    return [
        rf"\par\medskip\noindent\textbf{{{escape(grid.title)}}}\par\smallskip",
        rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}",
        r"\toprule",
        _row(grid.columns),
        r"\midrule",
        *map(_row, grid.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _row(cells: tuple[str, ...]) -> str:
    return " & ".join(map(escape, cells)) + r" \\"
