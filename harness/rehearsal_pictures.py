"""Made-up rows of the sets that tasks with pictures read, in their schemas, with pictures that are rendered here: for rehearsals and tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

Row = dict[str, Any]

_DIFFERENT = 60
"""Rows of a whole set that differ in more than their number."""
SUBJECTS = ("Accounting", "Art_Theory", "Math")
OCR_KINDS = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


def picture(text: str, form: str = "PNG", size: tuple[int, int] = (96, 64), mode: str = "RGB") -> bytes:
    """The bytes of a picture with a word in it."""
    drawn = Image.new("RGB", size, "white")
    ImageDraw.Draw(drawn).text((6, 20), text, fill="black")
    file = io.BytesIO()
    drawn.convert(mode).save(file, form)
    return file.getvalue()


def _shown(text: str, form: str = "PNG") -> Row:
    return {"bytes": picture(text, form), "path": f"{text}.{form.lower()}"}


def _ai2d(i: int) -> Row:
    options = [f"stage {i}", f"layer {i + 1}", "both of them", "none of the above"][: 2 + i % 3]
    return {
        "question": f"What does label {i} show?",
        "options": options,
        "answer": str(i % len(options)),
        "image": _shown(f"D{i}"),
    }


def _chartqa(i: int) -> Row:
    return {
        "type": ("human_test", "augmented_test")[i % 2],
        "question": f"What is the value of bar {i}?",
        "answer": (str(10 * i), f"{i}.5%", "Yes", f"Country {i}")[i % 4],
        "image": _shown(f"C{i}", "JPEG"),
    }


def _page(i: int) -> Row:
    return {
        "questionId": str(1000 + i),
        "question": f"Who signed page {i}?",
        "question_types": ["handwritten"],
        "image": _shown(f"P{i // 2}"),
        "docId": i // 2,
        "ucsf_document_id": f"doc{i // 4}",
        "ucsf_document_page_no": "1",
        "answers": [f"Signer {i}", f"Mr. Signer {i}"],
        "data_split": "val",
    }


def _infographic(i: int) -> Row:
    return {
        "questionId": str(7000 + i),
        "question": f"How many in part {i}?",
        "answers": [f"{i} million"],
        "answer_type": ["single span"],
        "image": _shown(f"I{i // 2}", "JPEG"),
        "image_url": "…",
        "data_split": "val",
    }


def _ocrbench(i: int) -> Row:
    kind = OCR_KINDS[i % len(OCR_KINDS)]
    is_formula = kind.startswith("Handwritten")
    return {
        "dataset": "HME100k" if is_formula else "IIIT5K",
        "question": "what is written in the image?",
        "question_type": kind,
        "answer": [rf"\frac {{ {i} }} {{ X }}" if is_formula else f"Word{i}"],
        "image": _shown(f"O{i}"),
    }


def _textvqa(i: int) -> Row:
    return {
        "image_id": f"{i:016x}",
        "question_id": 34602 + i,
        "question": f"what is the brand of item {i}?",
        "image": _shown(f"T{i}", "JPEG"),
        "image_width": 96,
        "image_height": 64,
        "answers": [f"brand {i}"] * 7 + ["the brand", "", "unknown"],
        "set_name": "val",
        "ocr_tokens": [],
    }


def _mmmu(i: int) -> Row:
    shown: Row = {f"image_{n}": None for n in range(1, 8)}
    shown["image_1"] = _shown(f"M{i}")
    question = f"In <image 1>, what is {i}?"
    options = ["the first", "the second <image 1>", "the third", f"number {i}"]
    if i % 3 == 1:
        shown["image_2"] = _shown(f"N{i}")
        question = f"Compare <image 2> with <image 1>: what is {i}?"
        options = [f"'{word}' \"so\"" for word in ("one", "two", "three", "four", "five")]
    is_open = i % 5 == 4
    return {
        "id": f"validation_{SUBJECTS[i % 3]}_{i}",
        "question": question,
        "options": "[]" if is_open else repr(options),
        "explanation": "",
        **shown,
        "img_type": "['Diagrams']",
        "answer": (f"{i}.25" if i % 2 else f"['no {i}', 'none of {i}']") if is_open else "ABCD"[i % 4],
        "topic_difficulty": "Easy",
        "question_type": "open" if is_open else "multiple-choice",
        "subfield": "…",
    }


SETS: dict[str, tuple[str, Callable[[int], Row], int]] = {
    "ai2d": ("lmms-lab/ai2d/data/test", _ai2d, 3088),
    "chartqa": ("lmms-lab/ChartQA/data/test", _chartqa, 2500),
    "docvqa": ("lmms-lab/DocVQA/DocVQA/validation", _page, 5349),
    "infovqa": ("lmms-lab/DocVQA/InfographicVQA/validation", _infographic, 2801),
    "ocrbench": ("echo840/OCRBench/data/test", _ocrbench, 1000),
    "textvqa": ("lmms-lab/textvqa/data/validation", _textvqa, 5000),
    "mmmu": ("lmms-lab/MMMU/data/validation", _mmmu, 900),
}
"""By task: where its files begin in a mirror, its row with a number, and how many rows the real set has."""


def write_set(mirror: Path, task: str) -> None:
    """Write the whole set of a task below `mirror`: as many rows as the real one has, with few different pictures."""
    import pyarrow
    from pyarrow import parquet

    start, row_of, n_rows = SETS[task]
    rows = [row_of(i) for i in range(_DIFFERENT)]
    path = mirror / f"{start}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    every = [_numbered(rows[i % _DIFFERENT], i) for i in range(n_rows)]
    parquet.write_table(pyarrow.Table.from_pylist(every), path, row_group_size=500)


def _numbered(row: Row, i: int) -> Row:
    """A row again under another id and question."""
    again: Row = {"question_id": i} if "question_id" in row else {}
    again |= {"questionId": str(i)} if "questionId" in row else {}
    again |= {"id": f"{row['id'].rpartition('_')[0]}_{i}"} if "id" in row else {}
    return row | again | {"question": f"{row['question']} ({i})"}
