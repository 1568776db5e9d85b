"""What a person sees while they wait: a bar with an estimate on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Reporter:
    """Writes to a rich console; `console.is_terminal` decides how."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def track(self, label: str) -> Iterator[Callable[[int, int, str], None]]:
        """Yields `advance(done, total, note)`; the time it took is printed at the end."""
        began = time.monotonic()
        if self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(label, total=None, note="")

                def move(done: int, total: int, note: str = "") -> None:
                    bar.update(task, completed=done, total=total, note=note)

                yield move
        else:
            yield self._lines(label, began)
        self.say(f"  {label}: {time.monotonic() - began:.1f} s")

    def _bar(self) -> Progress:
        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("passed,"), TimeRemainingColumn(), TextColumn("left  {task.fields[note]}"))
        return Progress(*columns, *times, console=self.console, transient=True)

    def _lines(self, label: str, began: float) -> Callable[[int, int, str], None]:
        last = began

        def move(done: int, total: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < SECONDS_BETWEEN_LINES or not done:
                return
            last = now
            left = (now - began) / done * (total - done)
            self.say(f"  {label}: {done}/{total}, about {left:.0f} s left {note}".rstrip())

        return move
