"""MATH-500: problems of competition mathematics, answered in a box, compared as mathematics."""

from __future__ import annotations

import re
from typing import Any

import datasets

from harness.stats import INVALID
from harness.tasks.answers import first_of_each, last_box
from harness.tasks.needs import require
from harness.tasks.sources import RowSet, as_dataset, load_rows
from harness.tasks.verifier import same_answer

ROWS = RowSet(
    "HuggingFaceH4/MATH-500",
    "test",
    columns=("problem", "answer"),
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
)

_LOOK = re.compile(r"\\(?:left|right)(?=[()\[\]|])|\\!\s*")
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_IDLE_SPACE = re.compile(
    r"(?<![A-Za-z0-9\\,])\s+"
    r"|(?<!\\)(?<!\\left)(?<!\\right)\s+(?![A-Za-z0-9])"
    r"|(?<=,)\s+(?!\d{3}(?!\d))"  # "1, 200" is no 1,200
)


def canonical(latex: str) -> str:
    r"""An answer without what changes its look alone, so that repeats that agree vote alike: `$`, `\dfrac`, `\left(`, `\!`, idle spaces.

    It takes away nothing that changes what math_verify says, so an answer with a full stop stays as it is. What that takes for equal
    beyond it (1/2 and 0.5) stays different.
    """
    text = latex.strip()
    if text.endswith("."):
        return latex
    if len(text) > 2 and text.startswith("$") and text.endswith("$") and text.count("$") == 2:
        text = text[1:-1].strip()
    return _IDLE_SPACE.sub("", _FRACTION.sub(r"\\frac", _LOOK.sub("", text))) or latex


@first_of_each
def extract(response: str) -> str:
    """The content of the last box in canonical form, or "[invalid]"."""
    content = last_box(response)
    return INVALID if content is None else canonical(content)


def dataset(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The problems and their answers in LaTeX, in the order of the set."""
    require("math500")
    rows, origin = load_rows(ROWS, n_rows=n_rows)
    docs = [{"question": row["problem"], "answer": row["answer"], "source_question": row["problem"]} for row in rows]
    return {"test": as_dataset(docs, origin)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether math_verify takes the content of the last box for the gold answer, and whether it gave up on it."""
    verdict = results[0] != INVALID and same_answer(doc["answer"], results[0])
    return {"math_verify": float(verdict is True), "verifier_gave_up": float(verdict is None)}
