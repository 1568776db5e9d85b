"""Made-up rows of the sets that text tasks read, in their schemas and numbers: a rehearsal, and tests, need no set that is gated or elsewhere.

Every writer makes files of a set below a mirror, as the hub lays them out. Answers are right only by accident. No torch.
"""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

AA_LCR = "ArtificialAnalysis/AA-LCR"
AA_LCR_COLUMNS = ("document_category", "document_set_id", "question_id", "question", "answer", "data_source_filenames")
GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_GPQA_COLUMNS = ("Record ID", "Question", *GPQA_OPTIONS, "High-level domain", "Subdomain", "Explanation", "Canary String")


def gpqa(mirror: Path, n: int = 198) -> Path:
    """GPQA-Diamond: quotes, commas and line breaks within the values, as there."""
    rng, rows = random.Random(0), []
    for i in range(n):
        values = rng.sample(range(1000), 4)
        about = {
            "Record ID": f"rec{i}",
            "Question": f'A body, "number {i}",\nfalls. How far?\n',
            "High-level domain": "Physics",
            "Subdomain": "Mechanics",
            "Explanation": "…",
            "Canary String": "canary",
        }
        rows.append(
            about | {option: f"{value} m, or\n{value}00 cm " for option, value in zip(GPQA_OPTIONS, values, strict=True)}
        )
    path = mirror / "Idavidrein" / "gpqa" / "gpqa_diamond.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _GPQA_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def aime24(mirror: Path, n: int = 30) -> Path:
    return _jsonl(mirror / "HuggingFaceH4/aime_2024/train.jsonl", [_sum(i) for i in range(n)])


def aime25(mirror: Path, n: int = 30) -> Path:
    return _jsonl(mirror / "yentinglin/aime_2025/train.jsonl", [_sum(1000 + i) for i in range(n)])


def math500(mirror: Path, n: int = 500) -> Path:
    rows = [
        {"problem": f"What is $\\frac{{{i}}}{{7}}$ in lowest terms?", "answer": f"\\frac{{{i}}}{{7}}"} for i in range(1, n + 1)
    ]
    return _jsonl(mirror / "HuggingFaceH4/MATH-500/test.jsonl", rows)


def gsm8k(mirror: Path, n: int = 1319) -> Path:
    rows = [
        {"question": f"Ann has {i} apples and buys {i % 7}. How many has she?", "answer": f"{i} + {i % 7}\n#### {i + i % 7}"}
        for i in range(n)
    ]
    return _jsonl(mirror / "openai/gsm8k/main/test.jsonl", rows)


def ifeval(mirror: Path, n: int = 541) -> Path:
    rows = [
        {
            "key": i,
            "prompt": f"Write a line about the number {i} without any comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for i in range(n)
    ]
    return _jsonl(mirror / "google/IFEval/ifeval_input_data.jsonl", rows)


def aa_lcr(mirror: Path, n_sets: int = 2) -> Path:
    """AA-LCR: so many document sets of two short texts each, and two questions to a set."""
    texts = {
        ("Legal", f"set{i}", f"{name}.txt"): f"Document {name} of set {i} says {i + 10}. " * 6
        for i in range(n_sets)
        for name in ("first", "second")
    }
    rows: list[tuple[str, ...]] = [
        ("Legal", f"set{i}", f"{2 * i + j}", f"What do the documents of set {i} say?", f"{i + 10}", "first.txt;second.txt")
        for i in range(n_sets)
        for j in range(2)
    ]
    return write_aa_lcr(mirror, rows, texts)


def write_aa_lcr(mirror: Path, rows: list[tuple[str, ...]], texts: dict[tuple[str, str, str], str]) -> Path:
    """A copy of AA-LCR with these rows, in the order of AA_LCR_COLUMNS, and texts by category, set and file; its folder."""
    folder = mirror / AA_LCR
    (folder / "extracted_text").mkdir(parents=True, exist_ok=True)
    aa_lcr_questions(folder, rows, texts)
    aa_lcr_texts(folder, {f"lcr/{'/'.join(where)}": text for where, text in texts.items()})
    return folder


def aa_lcr_questions(
    folder: Path, rows: list[tuple[str, ...]], texts: dict[tuple[str, str, str], str], *, tokens: object = None
) -> None:
    """The CSV of `rows`; their tokens are a quarter of their characters, unless `tokens` says otherwise."""
    from harness.tasks.aa_lcr import QUESTIONS_FILE, frame

    file = io.StringIO()
    writer = csv.DictWriter(file, [*AA_LCR_COLUMNS, "input_tokens"])
    writer.writeheader()
    for row in rows:
        named = dict(zip(AA_LCR_COLUMNS, row, strict=True))
        shown = [texts.get((row[0], row[1], name.strip()), "") for name in row[5].split(";")]
        writer.writerow(named | {"input_tokens": len(frame(shown, row[3])) // 4 if tokens is None else tokens})
    (folder / QUESTIONS_FILE).write_text(file.getvalue(), encoding="utf-8")


def aa_lcr_texts(folder: Path, texts: dict[str, str]) -> None:
    """The zip of texts, by their names in it."""
    from harness.tasks.aa_lcr import TEXTS_FILE

    with zipfile.ZipFile(folder / TEXTS_FILE, "w") as zipped:
        for name, text in texts.items():
            zipped.writestr(name, text)


def _sum(i: int) -> dict[str, Any]:
    return {"problem": f"Find the remainder of ${i}^2 + {i + 1}$ when divided by 1000.", "answer": str((i * i + i + 1) % 1000)}


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


MADE: dict[str, Callable[[Path], object]] = {
    "aa_lcr": aa_lcr,
    "aime24": aime24,
    "aime25": aime25,
    "gpqa_diamond": gpqa,
    "gsm8k": gsm8k,
    "ifeval": ifeval,
    "math500": math500,
}
"""By task: what makes its set."""
