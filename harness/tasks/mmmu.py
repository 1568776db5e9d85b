"""MMMU: questions of college level in thirty subjects, about one picture or several; options, or a short answer of any kind.

Prompts are those of the benchmark's authors, with each `<image 3>` in its place. Departures from their evaluation, and so from
lm-eval and lmms-eval: an answer that names no option is wrong (a random option there, right one time in four); letters are found as
in the other tasks, by what the response says last, where a lone letter anywhere ("A ...") decides there; of an open question the
stated answer counts (`is_open_match`), where there any number after "is", "so" or "=" in any sentence does.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import datasets

from harness.errors import DataError
from harness.stats import INVALID
from harness.tasks.answers import stated_answer
from harness.tasks.choices import LETTERS, chosen_letter, lettered
from harness.tasks.picture_rows import (
    MARK,
    gold_texts,
    load_picture_rows,
    picture_dataset,
    picture_fields,
    pictures_of,
    source_question,
    unmarked,
)
from harness.tasks.sources import RowSet

PICTURES = tuple(f"image_{i}" for i in range(1, 8))
ROWS = RowSet("lmms-lab/MMMU", "validation", columns=("id", "question", "options", "answer", "question_type"))
_CHOICE, _OPEN = "multiple-choice", "open"
_PLACE = re.compile(r"<image ([1-7])>")
_NUMBER = re.compile(r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,2})?(?!\w)", re.IGNORECASE)
_CENT = Decimal("0.01")
_LONGEST_NUMBER = 25

images = pictures_of


def dataset(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The questions, each with its whole prompt and its pictures in the order of their marks."""
    found = load_picture_rows(ROWS, n_rows=n_rows, pictures=PICTURES)
    return picture_dataset([_doc(row) for row in found.rows], ROWS, found.origin)


def extract(responses: Sequence[Sequence[str]], documents: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The letter of an option, or of an open question the stated answer; "[invalid]" for none."""
    return [
        [chosen_letter(each, doc["options"]) if doc["options"] else stated_answer(each) for each in given]
        for given, doc in zip(responses, documents, strict=True)
    ]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the letter is the right one, or the answer one of the accepted ones."""
    if doc["excluded"]:
        return {}
    answer = results[0]
    right = answer in doc["answers"] if doc["options"] else answer != INVALID and is_open_match(answer, doc["answers"])
    return {"accuracy": float(right)}


def is_open_match(answer: str, golds: Sequence[str]) -> bool:
    """Whether the answer to an open question is one of the accepted ones.

    Numbers are equal where both, rounded to two decimals, are; of an answer with words beside its numbers the last number counts. A
    text is right where it stands in the last paragraph of the answer, from word border to word border, in lower case.
    Source of rounding and substring: the evaluation of MMMU's authors (Yue et al. 2024), which does not ask for borders: "no" is in
    "unknown" there.
    """
    said = " ".join(re.split(r"\n\s*\n", answer.strip())[-1].lower().split())
    numbers = [found for match in _NUMBER.finditer(said) if (found := _rounded(match[0])) is not None]
    return any(_is_said(" ".join(gold.lower().split()), said, numbers) for gold in golds)


def _is_said(gold: str, said: str, numbers: list[Decimal]) -> bool:
    value = _rounded(gold)
    if value is not None:
        return bool(numbers) and numbers[-1] == value
    return bool(gold) and re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", said) is not None


def _rounded(text: str) -> Decimal | None:
    """A text that is one number, to two decimals; else None."""
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    value = Decimal(text.replace(",", ""))
    return value if value.adjusted() > _LONGEST_NUMBER else value.quantize(_CENT, ROUND_HALF_EVEN)


def _doc(row: dict[str, Any]) -> dict[str, Any]:
    where = f"{ROWS.path}: question {row['id']}"
    options = _options(row, where)
    asked = unmarked(row["question"] if not options else f"{row['question']}\n\n{lettered(options, '({letter}) {option}')}")
    names = [f"image_{number}" for number in _PLACE.findall(asked)]
    if not names:  # the question does not say where: before it
        asked, names = f"<image 1>{asked}", ["image_1"]
    ending = "Answer with the option's letter from the given choices directly." if options else (
        "Answer the question using a single word or phrase."
    )  # fmt: skip
    fields = picture_fields(row, names)
    return {
        "prompt": f"{_PLACE.sub(MARK, asked)}\n\n{ending}",
        "options": options,
        "answers": _golds(row, options, where),
        "subject": re.sub(r"^[a-z]+_|_\d+$", "", row["id"]),
        "source_question": source_question(asked, fields),
        **fields,
    }


def _options(row: dict[str, Any], where: str) -> list[str]:
    """The options of a question, a list or the source of one; none of an open question."""
    if row["question_type"] not in (_CHOICE, _OPEN):
        raise DataError(f"{where}: question_type {row['question_type']!r}; allowed: {_CHOICE}, {_OPEN}")
    if row["question_type"] == _OPEN:
        return []
    options = _literal(row["options"])
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"{where}: options {row['options']!r}; allowed: a list of 2 to {len(LETTERS)} texts")
    return [str(option) for option in options]


def _golds(row: dict[str, Any], options: list[str], where: str) -> list[str]:
    found = _literal(row["answer"]) if str(row["answer"]).startswith("[") else row["answer"]
    golds = gold_texts(found, where)
    if options and not all(gold in LETTERS[: len(options)] for gold in golds):
        raise DataError(f"{where}: answer {row['answer']!r}; allowed: one of {', '.join(LETTERS[: len(options)])}")
    return golds


def _literal(value: Any) -> Any:
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return None
