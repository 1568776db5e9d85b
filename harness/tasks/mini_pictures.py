"""The four mini tasks on pictures: 200 held-out pictures each, one question a picture, exact match. No download.

Used by the YAML files beside it, through lm-eval's `!function`, here and in plain `lm_eval --include_path`.
The pictures are those of `harness/tasks/drawing_kinds.py`; `EVALUATED` there says how hard they are to see.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import islice
from typing import Any

import datasets
from PIL import Image

from harness.tasks.drawing_kinds import EVALUATED
from harness.tasks.drawings import Difficulty, grey_pixels, one_question, pictures
from harness.tasks.sizes import N_QUESTIONS

EVALUATION_SEED = "2026-01-01"


def rows(
    task: str, *, n: int = N_QUESTIONS, seed: str = EVALUATION_SEED, difficulty: Difficulty | None = None
) -> list[dict[str, Any]]:
    """Held-out pictures of a task, each with a question: `image` (PIL), `question`, `answer`, `kind` of question, `style` of picture.

    `difficulty`: another than the task's own.
    """
    about = EVALUATED[task]
    rng = random.Random(f"{task} {seed}")
    found = []
    for picture in islice(pictures(about.maker, "held-out", seed=seed, difficulty=difficulty or about.difficulty), n):
        question = one_question(picture, rng, about.kinds)
        found.append(
            {
                "image": Image.fromarray(picture.pixels),
                "question": question.text,
                "answer": question.answer,
                "kind": question.kind,
                "style": picture.style,
            }
        )
    return found


def blinded(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same questions, each about a grey picture that shows nothing: what a model knows without looking."""
    return [row | {"image": Image.fromarray(grey_pixels())} for row in asked]


def chart_dataset(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Values, the largest or smallest, and differences in bar and line charts."""
    return _dataset("mini_chart")


def document_dataset(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Fields of forms and receipts."""
    return _dataset("mini_document")


def diagram_dataset(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Which shape a letter marks, or which letter marks a shape."""
    return _dataset("mini_diagram")


def ocr_dataset(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Words on signs in a scene."""
    return _dataset("mini_ocr")


def images(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture of a document, drawn from what the document says."""
    return [_drawn(doc["task"])[doc["picture"]]["image"]]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the response, whatever its case, the white space around it and a full stop at its end, is the answer."""
    said = _plain(results[0])
    return {"exact_match": float(said == _plain(doc["answer"])), "unparsed": float(not said)}


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").strip().casefold()


@cache
def _drawn(task: str) -> list[dict[str, Any]]:
    return rows(task)


def _dataset(task: str) -> dict[str, datasets.Dataset]:
    """Plain data: the number of the picture stands for it."""
    shown = [{"task": task, "picture": i} | row for i, row in enumerate(_drawn(task))]
    return {"test": datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "image"} for row in shown])}
