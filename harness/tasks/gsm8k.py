"""GSM8K: word problems whose answers are numbers, given in a box."""

from __future__ import annotations

from typing import Any

import datasets

from harness.errors import DataError
from harness.tasks.answers import extract_number, first_of_each, plain, whole_number
from harness.tasks.sources import RowSet, as_dataset, load_rows

ROWS = RowSet(
    "openai/gsm8k",
    "test",
    subset="main",
    columns=("question", "answer"),
    revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
)
_MARK = "####"

extract = first_of_each(extract_number)


def dataset(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The test questions, with the number after the reference solution's mark."""
    rows, origin = load_rows(ROWS, n_rows=n_rows)
    docs = [{"question": row["question"], "answer": _gold(row["answer"]), "source_question": row["question"]} for row in rows]
    return {"test": as_dataset(docs, origin)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Equality of numbers, whatever their separators, currency signs and zeros."""
    return {"exact_match": float(results[0] == doc["answer"])}


def _gold(solution: str) -> str:
    _, mark, text = solution.rpartition(_MARK)
    value = whole_number(text) if mark else None
    if value is None:
        raise DataError(
            f"{ROWS.path}: a solution does not end with {_MARK} and a number: …{solution[-60:]!r}; get the set anew"
        )
    return plain(value)
