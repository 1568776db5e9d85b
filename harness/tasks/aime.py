"""AIME 2024 and 2025: thirty problems each whose answers are integers of 0 to 999, given in a box."""

from __future__ import annotations

from typing import Any

import datasets

from harness.errors import DataError
from harness.stats import INVALID
from harness.tasks.answers import extract_integer, first_of_each
from harness.tasks.needs import require
from harness.tasks.sources import RowSet, as_dataset, load_rows
from harness.tasks.verifier import same_answer

ROWS_24 = RowSet(
    "HuggingFaceH4/aime_2024",
    "train",
    columns=("problem", "answer"),
    revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
)
ROWS_25 = RowSet(
    "yentinglin/aime_2025",
    "train",
    columns=("problem", "answer"),
    revision="6f71d77b0b89b9dabe07ab466c51df33f514df7f",
)

extract = first_of_each(extract_integer)


def dataset_24(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The problems of 2024, both halves."""
    return _dataset(ROWS_24, n_rows)


def dataset_25(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The problems of 2025, both halves."""
    return _dataset(ROWS_25, n_rows)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Equality of integers. Beside it: whether math_verify, asked about the same box, says otherwise, and whether it gave up."""
    is_right = results[0] == doc["answer"]
    verdict = results[0] != INVALID and same_answer(doc["answer"], results[0])
    return {
        "exact_match": float(is_right),
        "verifiers_disagree": float(verdict is not None and verdict != is_right),
        "verifier_gave_up": float(verdict is None),
    }


def _dataset(wanted: RowSet, n_rows: int | None) -> dict[str, datasets.Dataset]:
    require("aime24")
    rows, origin = load_rows(wanted, n_rows=n_rows)
    docs = [
        {"question": row["problem"], "answer": _gold(row, number, wanted), "source_question": row["problem"]}
        for number, row in enumerate(rows)
    ]
    return {"test": as_dataset(docs, origin)}


def _gold(row: dict[str, Any], number: int, wanted: RowSet) -> str:
    """The answer as plain digits; the error names the row and quotes neither problem nor answer, which may not be published."""
    text = str(row["answer"]).strip()
    if not (text.isascii() and text.isdigit() and int(text) <= 999):
        raise DataError(f"{wanted.path}: the answer of row {number} (from 0) is no integer of 0 to 999; get the set anew")
    return str(int(text))
