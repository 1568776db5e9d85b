"""What a person sees while they wait: a live view with an estimate on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness.sight import TrainingView
from harness.trackers import OpenTracker

SECONDS_BETWEEN_LINES = 15.0


class Reporter:
    """Writes to a rich console; `console.is_terminal` decides how. Figures of trainings go to a tracker too, if one is given."""

    def __init__(self, console: Console, *, open_tracker: OpenTracker | None = None) -> None:
        self.console = console
        self._open_tracker = open_tracker

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

    @contextmanager
    def training(self, label: str, total: int) -> Iterator[TrainingView]:
        """Yields the view of a training of `total` steps; its last figures and the time it took are printed at the end.

        Raises TrackerError if a tracker was asked for and does not start.
        """
        tracker = self._open_tracker(label) if self._open_tracker else None
        view = TrainingView(label, total, tracker, say=self.say, seconds_between_lines=SECONDS_BETWEEN_LINES)
        try:
            if self.console.is_terminal:
                view.is_live = True
                with Live(view, console=self.console, refresh_per_second=4, transient=True):
                    yield view
            else:
                yield view
        finally:
            view.close()
        self.say(view.last_line())

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
