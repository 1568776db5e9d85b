"""`harness inspect`: single questions of a run, in a terminal or as a page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from harness.errors import StoreError
from harness.inspect_page import write_page
from harness.inspect_terminal import print_overview, print_question
from harness.questions import find_question, overview, read_questions, select


def show(
    folder: Path,
    console: Console,
    *,
    variants: tuple[str, ...] = (),
    task: str | None = None,
    question: str | None = None,
    page: Path | None = None,
    limit: int = 20,
) -> None:
    """Print the overview of a run or one question of it, or write either as a page; StoreError says what is not there."""
    selection = select(folder, variants=variants, task=task)
    overviews = [] if question is not None else overview(selection)
    views = [] if question is None else [find_question(selection, question)]
    if page is not None:
        listed = [(each.task, wanted) for each in overviews for wanted in each.listed(limit)]
        questions = views or read_questions(selection, *listed)
        try:
            write_page(page, selection, overviews, questions, limit)
        except OSError as error:
            raise StoreError(f"--html {page}: cannot be written ({error.strerror}); give another file") from error
        console.print(f"{page}: written", markup=False, highlight=False, soft_wrap=True)
    elif views:
        print_question(views[0], selection, console)
    else:
        print_overview(overviews, selection, console, limit=limit)
