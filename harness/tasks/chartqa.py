"""ChartQA: questions about charts from the web, half of them written by people, half made from summaries; relaxed accuracy."""

from __future__ import annotations

from typing import Any

import datasets

from harness.errors import DataError
from harness.stats import INVALID
from harness.tasks.answers import first_of_each, stated_answer
from harness.tasks.picture_rows import (
    load_picture_rows,
    picture_dataset,
    picture_fields,
    pictures_of,
    source_question,
    unmarked,
)
from harness.tasks.sources import RowSet
from harness.tasks.vision_metrics import relaxed_match

ROWS = RowSet("lmms-lab/ChartQA", "test", columns=("type", "question", "answer"))
PARTS = {"human_test": "relaxed_accuracy_human", "augmented_test": "relaxed_accuracy_augmented"}

images = pictures_of
extract = first_of_each(stated_answer)


def dataset(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions, each with the part of the set that it belongs to."""
    found = load_picture_rows(ROWS, n_rows=n_rows)
    docs = [_doc(row, f"{ROWS.path}: row {i}") for i, row in enumerate(found.rows, start=1)]
    return picture_dataset(docs, ROWS, found.origin)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Relaxed accuracy: over all, and over the part of the set that the question belongs to."""
    if doc["excluded"]:
        return {}
    right = float(results[0] != INVALID and relaxed_match(results[0], doc["answer"]))
    return {"relaxed_accuracy": right, PARTS[doc["part"]]: right}


def _doc(row: dict[str, Any], where: str) -> dict[str, Any]:
    if row["type"] not in PARTS:
        raise DataError(f"{where}: type {row['type']!r}; allowed: {', '.join(PARTS)}")
    fields = picture_fields(row)
    return {
        "question": unmarked(row["question"]),
        "answer": str(row["answer"]),
        "part": row["type"],
        "source_question": source_question(row["question"], fields),
        **fields,
    }
