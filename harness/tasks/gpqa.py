"""GPQA-Diamond: questions of graduate level with four options, in an order of their own that no other state decides.

The set is gated, and its authors ask that it stay out of plain text: the canary and everything but question, options, record and
domain is left behind.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import datasets

from harness.tasks.answers import extract_letter, first_of_each
from harness.tasks.sources import RowSet, as_dataset, load_rows

LETTERS = "ABCD"
_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
ROWS = RowSet(
    "Idavidrein/gpqa",
    "train",
    subset="gpqa_diamond",
    files=("gpqa_diamond",),
    columns=("Question", *_OPTIONS, "Record ID", "High-level domain", "Subdomain"),
    revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
    access="the set is gated: accept its terms on its page of the hub, then log in there with a token (hf auth login, or HF_TOKEN)",
)

extract = first_of_each(extract_letter)


def dataset(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions, each with its options in the order that its own text decides, and the letter of the right one."""
    rows, origin = load_rows(ROWS, n_rows=n_rows)
    return {"test": as_dataset([_doc(row) for row in rows], origin)}


def option_order(question: str) -> list[int]:
    """Which of the options (0: the right one) stands at A, B, C, D: a shuffle whose seed is the sha256 of the question."""
    order = list(range(len(LETTERS)))
    random.Random(int.from_bytes(hashlib.sha256(question.strip().encode()).digest())).shuffle(order)
    return order


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the letter is the right one."""
    return {"exact_match": float(results[0] == doc["answer"])}


def _doc(row: dict[str, Any]) -> dict[str, Any]:
    order = option_order(row["Question"])
    return {
        "question": row["Question"].strip(),
        "options": [row[_OPTIONS[place]].strip() for place in order],
        "answer": LETTERS[order.index(0)],
        "record": row["Record ID"],
        "domain": row["High-level domain"],
        "subdomain": row["Subdomain"],
        "source_question": row["Question"],
    }
