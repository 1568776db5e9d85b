"""TextVQA: questions about text in photographs, each answered by ten people; VQA accuracy."""

from __future__ import annotations

from typing import Any

import datasets

from harness.stats import INVALID
from harness.tasks.answers import first_of_each, stated_answer
from harness.tasks.picture_rows import (
    gold_texts,
    load_picture_rows,
    picture_dataset,
    picture_fields,
    pictures_of,
    source_question,
    unmarked,
)
from harness.tasks.sources import RowSet
from harness.tasks.vision_metrics import vqa_accuracy

ROWS = RowSet("lmms-lab/textvqa", "validation", columns=("question_id", "question", "answers"))

images = pictures_of
extract = first_of_each(stated_answer)


def dataset(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions with the answers of ten people."""
    found = load_picture_rows(ROWS, n_rows=n_rows)
    return picture_dataset([_doc(row) for row in found.rows], ROWS, found.origin)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The VQA accuracy of the answer."""
    if doc["excluded"]:
        return {}
    return {"vqa_accuracy": 0.0 if results[0] == INVALID else vqa_accuracy(results[0], doc["answers"])}


def _doc(row: dict[str, Any]) -> dict[str, Any]:
    fields = picture_fields(row)
    return {
        "question": unmarked(row["question"]),
        "answers": gold_texts(row["answers"], f"{ROWS.path}: question {row['question_id']}"),
        "source_question": source_question(row["question"], fields),
        **fields,
    }
