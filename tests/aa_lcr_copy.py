"""A made-up copy of AA-LCR in the layout of the data set: three sets, five questions, the last of which lacks a text."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path
from typing import Any

from harness.tasks import aa_lcr

TEXTS = {
    ("Legal", "law", "first.txt"): "one " * 100,
    ("Legal", "law", "What’s new.txt"): "two " * 100,
    ("Academia", "study", "paper.txt"): "three " * 100,
    ("Academia", "study", "Başev.txt"): "four " * 100,
    ("Marketing", "games", "guide.txt"): "five " * 100,
}
ROWS = [
    ("Legal", "law", "1", "Who?", "Anna Smith", "What’s new.txt;first.txt"),
    ("Academia", "study", "2", "How many?", "148 companies.", "paper.txt;Başev.txt"),
    ("Legal", "law", "3", "When?", "in 2023", "What’s new.txt; first.txt"),
    ("Marketing", "games", "4", "Which guide?", "The guide", "guide.txt"),
    ("Marketing", "games", "5", "Which other?", "The other guide", "guide.txt;lost – guide.txt"),
]
COLUMNS = ["document_category", "document_set_id", "question_id", "question", "answer", "data_source_filenames"]


def write_copy(mirror: Path) -> Path:
    """The files below `mirror`; returns the folder of the data set."""
    folder = mirror / aa_lcr.DATASET
    (folder / "extracted_text").mkdir(parents=True)
    write_rows(folder, ROWS)
    write_texts(folder, {f"lcr/{'/'.join(where)}": text for where, text in TEXTS.items()})
    return folder


def write_rows(folder: Path, rows: list[tuple[str, ...]], **changed: Any) -> None:
    """The CSV of `rows`; their tokens are a quarter of their characters, unless `tokens` says otherwise."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*COLUMNS, "input_tokens"])
    writer.writeheader()
    for row in rows:
        named = dict(zip(COLUMNS, row, strict=True))
        texts = [TEXTS.get((row[0], row[1], name.strip()), "") for name in row[5].split(";")]
        writer.writerow(named | {"input_tokens": changed.get("tokens", len(aa_lcr.frame(texts, row[3])) // 4)})
    (folder / aa_lcr.QUESTIONS_FILE).write_text(file.getvalue(), encoding="utf-8")


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    with zipfile.ZipFile(folder / aa_lcr.TEXTS_FILE, "w") as file:
        for name, text in texts.items():
            file.writestr(name, text)
