"""Figures as the text of table cells, and the marks beside them. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MISSING = "–"


def score_text(figure: dict[str, Any]) -> str:
    """A figure with `value`, `stderr` and `unit` as "34.5 ±1.2": a "share" (the unit of rows without one) in percent, else as it is."""
    value, stderr = (in_unit(figure, figure[part]) for part in ("value", "stderr"))
    return MISSING if figure["value"] is None else value + ("" if figure["stderr"] is None else f" ±{stderr}")


def in_unit(figure: dict[str, Any], value: float | None) -> str:
    """A value or an error of a task: a share in percent with one decimal, other figures with three significant digits."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f}" if figure.get("unit", "share") == "share" else f"{value:.3g}"


def number(value: float | None, digits: int) -> str:
    """A value with so many decimals."""
    return MISSING if value is None else f"{value:.{digits}f}"


def with_error(value: float | None, stderr: float | None, digits: int) -> str:
    """A value and its standard error with so many decimals."""
    if value is None:
        return MISSING
    return number(value, digits) + ("" if stderr is None else f" ±{stderr:.{digits}f}")


def over_seeds(figure: dict[str, Any] | None, n: int, written: Callable[[dict[str, Any], float | None], str]) -> str:
    """A figure of a group of `n` seeds as mean ± error (seeds spread)."""
    if figure is None or figure["mean"] is None:
        return MISSING
    error = next(value for key, value in figure.items() if key.startswith("stderr_over_"))
    seeds = "seeds" if figure["n"] == n else f"{figure['n']} of {n} seeds"
    stderr = "" if error is None else f" ±{written(figure, error)}"
    return f"{written(figure, figure['mean'])}{stderr} ({seeds} {written(figure, figure['sd_over_seeds'])})"


def fixed(digits: int) -> Callable[[dict[str, Any], float | None], str]:
    """What writes a figure with so many decimals, whatever its unit."""
    return lambda figure, value: number(value, digits)


def signed(value: float, digits: int = 1) -> str:
    """A difference with so many decimals and its sign, a minus that is as wide as a plus; what rounds to nothing is +0.0."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "+")


def marks(task: dict[str, Any]) -> str:
    """What the reader of a score must know: * partial, † chose the checkpoint, ‡ not proven by this harness."""
    return ("*" if task["is_partial"] else "") + ("†" if task["chose_checkpoint"] else "") + ("‡" if task["flags"] else "")
