"""AI2D: questions about labelled diagrams of school science, with options; the answer is a letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from harness.errors import DataError
from harness.tasks.choices import LETTERS, chosen_letter, lettered
from harness.tasks.picture_rows import (
    load_picture_rows,
    picture_dataset,
    picture_fields,
    pictures_of,
    source_question,
    unmarked,
)
from harness.tasks.sources import RowSet

ROWS = RowSet("lmms-lab/ai2d", "test", columns=("question", "options", "answer"))

images = pictures_of


def dataset(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions with their options; `answer` is the letter of the option whose number, from 0, the set gives."""
    found = load_picture_rows(ROWS, n_rows=n_rows)
    docs = [_doc(row, f"{ROWS.path}: row {i}") for i, row in enumerate(found.rows, start=1)]
    return picture_dataset(docs, ROWS, found.origin)


def extract(responses: Sequence[Sequence[str]], documents: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The letter of the option that a response names, or "[invalid]"."""
    return [[chosen_letter(each, doc["options"]) for each in given] for given, doc in zip(responses, documents, strict=True)]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the letter is the right one."""
    return {} if doc["excluded"] else {"exact_match": float(results[0] == doc["answer"])}


def _doc(row: dict[str, Any], where: str) -> dict[str, Any]:
    options, answer = row["options"], str(row["answer"])
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS) or not all(isinstance(o, str) for o in options):
        raise DataError(f"{where}: options {options!r}; allowed: a list of 2 to {len(LETTERS)} texts")
    if not answer.isdecimal() or int(answer) >= len(options):
        raise DataError(f"{where}: answer {answer!r}; allowed: the number of an option, 0 to {len(options) - 1}")
    fields = picture_fields(row)
    return {
        "question": unmarked(row["question"]),
        "options": options,
        "choices": unmarked(lettered(options, "{letter}. {option}")),
        "answer": LETTERS[int(answer)],
        "source_question": source_question(row["question"], fields),
        **fields,
    }
