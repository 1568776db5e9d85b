"""A training as a person sees it: loss, KL, CE, lr, tokens a second, memory, time left, the last validation. No torch of its own."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.trackers import Tracker

RECENT_STEPS = 20
"""Rates and the estimate are over so many last steps: a resumed training, or one that slows down, is judged by what it does now."""
_FIGURES = (
    ("loss", "loss", ".4f"),
    ("kl", "KL", ".4f"),
    ("ce", "CE", ".4f"),
    ("lr", "lr", ".2e"),
    ("grad_norm", "gradient", ".3g"),
)
_VALIDATION = (
    ("validation_kl", "KL", ".4f"),
    ("validation_ce", "CE", ".4f"),
    ("codes_changed", "codes changed", ".2%"),
    ("block_scales_changed", "block scales changed", ".2%"),
)


class TrainingView:
    """Takes the figures of a training as they come, draws them (it is a rich renderable) and passes them on to a tracker.

    A figure that is missing or None is not shown and not sent. On a terminal rich draws the view; elsewhere a line is said now and then.
    """

    def __init__(
        self, label: str, total: int, tracker: Tracker | None, *, say: Callable[[str], None], seconds_between_lines: float
    ) -> None:
        self.label, self.total, self.is_live = label, total, False
        self._tracker, self._say, self._seconds_between_lines = tracker, say, seconds_between_lines
        self._began = self._said = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._began, 0)], maxlen=RECENT_STEPS + 1)
        self._done = 0
        self._step: dict[str, Any] = {}
        self._validation: dict[str, Any] = {}
        self._note = ""

    def step(self, figures: dict[str, Any]) -> None:
        """A finished optimizer step: a row of training.jsonl, with "step" from 0, and "n_tokens"."""
        self._step, self._done = figures, figures["step"] + 1
        self._recent.append((time.monotonic(), figures.get("n_tokens") or 0))
        self._track(self._done, figures)
        if not self.is_live and time.monotonic() - self._said >= self._seconds_between_lines:
            self._said = time.monotonic()
            self._say(f"  {self.label}: {', '.join([f'{self._done}/{self.total}', *self._parts()])}")

    def validation(self, figures: dict[str, Any]) -> None:
        """A validation: its row of training.jsonl, with "step": how many optimizer steps came before it."""
        self._validation = figures
        self._track(figures["step"], figures)
        if not self.is_live:
            self._say(f"  {self.label}: {self._validation_line()}")

    def note(self, text: str) -> None:
        """What else there is to know: a checkpoint was written, a training goes on from step N."""
        self._note = text
        if not self.is_live:
            self._say(f"  {self.label}: {text}")

    def close(self) -> None:
        """No more figures come."""
        self._guarded(lambda tracker: tracker.finish())
        self._tracker = None

    def last_line(self) -> str:
        """The training in one line, when it is over."""
        shown = [f"{name} {self._step[key]:{form}}" for key, name, form in _FIGURES[:3] if _is_number(self._step.get(key))]
        seconds = time.monotonic() - self._began
        return f"  {self.label}: {', '.join([f'{self._done}/{self.total} steps', *shown, f'{seconds:.1f} s'])}"

    def tokens_per_second(self) -> float | None:
        """Over the last steps; None before the first."""
        seconds = self._recent[-1][0] - self._recent[0][0]
        return sum(n for _, n in list(self._recent)[1:]) / seconds if seconds > 0 else None

    def seconds_left(self) -> float | None:
        """By the time of the last steps, validations and checkpoints between them included; None before the first."""
        n = len(self._recent) - 1
        return (self._recent[-1][0] - self._recent[0][0]) / n * max(0, self.total - self._done) if n else None

    def __rich_console__(self, console: Any, options: Any) -> Iterator[RenderableType]:
        indent = (0, 0, 0, 4)
        figures = Table.grid(padding=(0, 2))
        for _ in range(6):
            figures.add_column(no_wrap=True)
        cells = [part for name, value in self._cells() for part in (Text(name, style="dim"), Text(value))]
        for start in range(0, len(cells), 6):
            figures.add_row(*cells[start : start + 6])
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"  {self.label}"),
            ProgressBar(total=self.total, completed=self._done, width=24),
            f"{self._done}/{self.total}",
            f"{_clock(time.monotonic() - self._began)} passed",
            f"{_clock(self.seconds_left())} left",
        )
        rest = [Text(self._validation_line())] if self._validation else []
        rest += [Text(self._note, style="dim")] if self._note else []
        yield Group(head, Padding(figures, indent), *(Padding(line, indent) for line in rest))

    def _cells(self) -> list[tuple[str, str]]:
        """Names and values of what is known of the last step."""
        cells = [(name, f"{self._step[key]:{form}}") for key, name, form in _FIGURES if _is_number(self._step.get(key))]
        rate = self.tokens_per_second()
        cells += [("tokens/s", f"{rate:,.0f}")] if rate else []
        return cells + [(name, f"{size / 2**30:.2f} GiB") for name, size in _memory()]

    def _parts(self) -> list[str]:
        left = self.seconds_left()
        return [f"{name} {value}" for name, value in self._cells()] + (
            [f"about {_clock(left)} left"] if left is not None else []
        )

    def _validation_line(self) -> str:
        known = [(key, name, form) for key, name, form in _VALIDATION if _is_number(self._validation.get(key))]
        shown = ", ".join(f"{name} {self._validation[key]:{form}}" for key, name, form in known)
        return f"validation after step {self._validation['step']}: {shown}"

    def _track(self, done: int, figures: dict[str, Any]) -> None:
        numbers = {key: value for key, value in figures.items() if key not in ("schema", "step") and _is_number(value)}
        self._guarded(lambda tracker: tracker.log(done, numbers))

    def _guarded(self, action: Callable[[Tracker], None]) -> None:
        """A tracker that fails is left out from then on and said so: no training ends because a dashboard is away."""
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:  # whatever a package of others raises; the figures themselves are in training.jsonl
            self._tracker = None
            self._say(
                f"  {self.label}: the tracker failed and is left out from here on ({error}); training.jsonl has all figures"
            )


def _memory() -> list[tuple[str, int]]:
    """Bytes in use: of this process, and the most that torch has held on the GPU, where it has been imported and there is one."""
    found = []
    try:
        found.append(("memory", int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()))
    except OSError:  # not Linux
        found.append(("peak memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found.append(("GPU peak", torch.cuda.max_memory_allocated()))
    return found


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
