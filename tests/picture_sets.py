"""Mirrors with made-up rows of the sets that ask about pictures, in their schemas, with pictures that are rendered here; gold answers."""

import io
import json
import random

import pyarrow
from PIL import Image, ImageDraw
from pyarrow import parquet

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


def picture(text, form="PNG", size=(96, 64), mode="RGB"):
    """The bytes of a picture with a word in it."""
    drawn = Image.new("RGB", size, "white")
    ImageDraw.Draw(drawn).text((6, 20), text, fill="black")
    file = io.BytesIO()
    drawn.convert(mode).save(file, form)
    return file.getvalue()


def _shown(text, form="PNG"):
    return {"bytes": picture(text, form), "path": f"{text}.{form.lower()}"}


def _ai2d(i):
    options = [f"stage {i}", f"layer {i + 1}", "both of them", "none of the above"][: 2 + i % 3]
    return {
        "question": f"What does label {i} show?",
        "options": options,
        "answer": str(i % len(options)),
        "image": _shown(f"D{i}"),
    }


def _chartqa(i):
    return {
        "type": ("human_test", "augmented_test")[i % 2],
        "question": f"What is the value of bar {i}?",
        "answer": (str(10 * i), f"{i}.5%", "Yes", f"Country {i}")[i % 4],
        "image": _shown(f"C{i}", "JPEG"),
    }


def _page(i):
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


def _infographic(i):
    return {
        "questionId": str(7000 + i),
        "question": f"How many in part {i}?",
        "answers": [f"{i} million"],
        "answer_type": ["single span"],
        "image": _shown(f"I{i // 2}", "JPEG"),
        "image_url": "…",
        "data_split": "val",
    }


def _ocrbench(i):
    kind = OCR_KINDS[i % len(OCR_KINDS)]
    is_formula = kind.startswith("Handwritten")
    return {
        "dataset": "HME100k" if is_formula else "IIIT5K",
        "question": "what is written in the image?",
        "question_type": kind,
        "answer": [rf"\frac {{ {i} }} {{ X }}" if is_formula else f"Word{i}"],
        "image": _shown(f"O{i}"),
    }


def _textvqa(i):
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


def _mmmu(i):
    shown = {f"image_{n}": None for n in range(1, 8)}
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


SETS = {
    "ai2d": ("lmms-lab/ai2d/data/test", _ai2d, 3088),
    "chartqa": ("lmms-lab/ChartQA/data/test", _chartqa, 2500),
    "docvqa": ("lmms-lab/DocVQA/DocVQA/validation", _page, 5349),
    "infovqa": ("lmms-lab/DocVQA/InfographicVQA/validation", _infographic, 2801),
    "ocrbench": ("echo840/OCRBench/data/test", _ocrbench, 1000),
    "textvqa": ("lmms-lab/textvqa/data/validation", _textvqa, 5000),
    "mmmu": ("lmms-lab/MMMU/data/validation", _mmmu, 900),
}
"""By task: where its files begin in a mirror, its row with a number, and how many rows the real set has."""


def made_up(mirror, task, n=100, change=lambda row: row):
    """Write a mirror with n rows of the schema of a task's set, in two parquet files of row groups of 10."""
    start, row_of, _ = SETS[task]
    rows = [change(row_of(i)) for i in range(n)]
    path = mirror / start
    path.parent.mkdir(parents=True, exist_ok=True)
    for part, mine in enumerate((rows[: (n + 1) // 2], rows[(n + 1) // 2 :])):
        if not mine:
            continue
        parquet.write_table(pyarrow.Table.from_pylist(mine), f"{path}-0000{part}-of-00002.parquet", row_group_size=10)
    return rows


def as_jsonl(mirror, task, rows):
    """Write the same rows as lines of JSON, their pictures as files beside them."""
    start = SETS[task][0]
    folder = mirror / "/".join(start.split("/")[:2])
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        row = dict(row)
        for name, value in row.items():
            if isinstance(value, dict):
                row[name] = f"pictures/{number}-{name}"
                (folder / row[name]).write_bytes(value["bytes"])
        lines.append(json.dumps(row))
    path = mirror / f"{start}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def gold(task, doc):
    """An answer to a document that deserves the most its metric gives."""
    rng = random.Random(doc["source_question"])
    if task in ("ai2d", "mmmu") and doc["options"]:
        letter = doc["answer"] if task == "ai2d" else doc["answers"][0]
        return rng.choice(["%s", "(%s)", "Answer: %s", r"\boxed{%s}", "**%s.**", "I think\n%s"]) % letter
    if task == "ocrbench":
        return f"It says {doc['answers'][0]}, I think."
    answer = doc["answer"] if task == "chartqa" else doc["answers"][0]
    return rng.choice(["%s", "Answer: %s", "The answer is %s.", "**%s**", "So\n\nFinal answer: **%s**"]) % answer


def wrong(task, doc):
    """An answer that deserves nothing: where there are options, another letter."""
    if task in ("ai2d", "mmmu") and doc["options"]:
        letter = doc["answer"] if task == "ai2d" else doc["answers"][0]
        return "B" if letter == "A" else "A"
    return "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"
