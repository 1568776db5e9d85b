"""DocVQA and InfographicVQA: questions about a scanned page and about an infographic, answered by a span of text; ANLS.

The questions about the pages of one document err together (`cluster`), where the set says which document a page is of.
"""

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
from harness.tasks.vision_metrics import anls

_DOCUMENT = "ucsf_document_id"
_COLUMNS = ("questionId", "question", "answers")
DOCVQA = RowSet("lmms-lab/DocVQA", "validation", subset="DocVQA", columns=_COLUMNS)
INFOVQA = RowSet("lmms-lab/DocVQA", "validation", subset="InfographicVQA", columns=_COLUMNS)

images = pictures_of
extract = first_of_each(stated_answer)


def dataset_docvqa(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions about pages, with their accepted answers."""
    return _dataset(DOCVQA, n_rows)


def dataset_infovqa(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions about infographics, with their accepted answers."""
    return _dataset(INFOVQA, n_rows)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The ANLS of the answer."""
    if doc["excluded"]:
        return {}
    return {"anls": 0.0 if results[0] == INVALID else anls(results[0], doc["answers"])}


def _dataset(wanted: RowSet, n_rows: int | None) -> dict[str, datasets.Dataset]:
    found = load_picture_rows(wanted, n_rows=n_rows, optional=(_DOCUMENT,))
    return picture_dataset([_doc(row, wanted) for row in found.rows], wanted, found.origin)


def _doc(row: dict[str, Any], wanted: RowSet) -> dict[str, Any]:
    fields = picture_fields(row)
    return {
        "question": unmarked(row["question"]),
        "answers": gold_texts(row["answers"], f"{wanted.path} ({wanted.subset}): question {row['questionId']}"),
        "source_question": source_question(row["question"], fields),
        **fields,
        "cluster": row[_DOCUMENT] or fields["cluster"],
    }
