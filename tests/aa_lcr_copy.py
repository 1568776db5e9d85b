"""A made-up copy of AA-LCR in the layout of the data set: three sets, five questions, the last of which lacks a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import rehearsal_rows
from harness.rehearsal_rows import aa_lcr_texts as write_texts

__all__ = ["COLUMNS", "ROWS", "TEXTS", "write_copy", "write_rows", "write_texts"]

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
COLUMNS = list(rehearsal_rows.AA_LCR_COLUMNS)


def write_copy(mirror: Path) -> Path:
    """The files below `mirror`; returns the folder of the data set."""
    return rehearsal_rows.write_aa_lcr(mirror, ROWS, TEXTS)


def write_rows(folder: Path, rows: list[tuple[str, ...]], **changed: Any) -> None:
    """The CSV of `rows`; their tokens are a quarter of their characters, unless `tokens` says otherwise."""
    rehearsal_rows.aa_lcr_questions(folder, rows, TEXTS, **changed)
