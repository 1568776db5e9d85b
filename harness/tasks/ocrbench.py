"""OCRBench: 1,000 questions of ten kinds about text in pictures, a point each; what is counted is kept nowhere between runs."""

from __future__ import annotations

from typing import Any

import datasets

from harness.errors import DataError
from harness.stats import INVALID
from harness.tasks.answers import first_of_each
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
from harness.tasks.vision_metrics import ocr_point

ROWS = RowSet("echo840/OCRBench", "test", columns=("dataset", "question", "question_type", "answer"))
PARTS = {
    "Regular Text Recognition": "text_recognition",
    "Irregular Text Recognition": "text_recognition",
    "Artistic Text Recognition": "text_recognition",
    "Handwriting Recognition": "text_recognition",
    "Digit String Recognition": "text_recognition",
    "Non-Semantic Text Recognition": "text_recognition",
    "Scene Text-centric VQA": "scene_text_vqa",
    "Doc-oriented VQA": "document_vqa",
    "Key Information Extraction": "key_information",
    "Handwritten Mathematical Expression Recognition": "handwritten_formulas",
}
"""The metric of each kind of question: the five parts of the benchmark."""
FORMULAS = "HME100k"
FULL_POINTS = 1000.0

images = pictures_of
extract = first_of_each(lambda response: response.strip() or INVALID)


def dataset(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions with their accepted answers, kind and source."""
    found = load_picture_rows(ROWS, n_rows=n_rows)
    docs = [_doc(row, f"{ROWS.path}: row {i}") for i, row in enumerate(found.rows, start=1)]
    return picture_dataset(docs, ROWS, found.origin)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the point is given: over all and over the part of the benchmark; and as `points` of 1,000.

    `points` of a question is 1,000 or 0, its mean the points of the whole set; of a part of it, as many points in a thousand.
    """
    if doc["excluded"]:
        return {}
    point = float(results[0] != INVALID and ocr_point(results[0], doc["answers"], is_formula=doc["source"] == FORMULAS))
    return {"accuracy": point, "points": FULL_POINTS * point, PARTS[doc["kind"]]: point}


def _doc(row: dict[str, Any], where: str) -> dict[str, Any]:
    if row["question_type"] not in PARTS:
        raise DataError(f"{where}: question_type {row['question_type']!r}; allowed: {', '.join(PARTS)}")
    fields = picture_fields(row)
    return {
        "question": unmarked(row["question"].strip()),
        "answers": gold_texts(row["answer"], where),
        "kind": row["question_type"],
        "source": row["dataset"],
        "source_question": source_question(row["question"], fields),
        **fields,
    }
