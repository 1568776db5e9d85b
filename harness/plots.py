"""Figures: of each training as SVG and PNG, panels of loss, validation KL, validation CE and learning rate over steps; of scores along training.

The only module that imports matplotlib.
A series that was not recorded is not drawn. The same rows give the same SVG, byte for byte, with one matplotlib.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.findings_text import label
from harness.records import read_lines

_STEP, _MEAN, _KL, _CE, _RATE, _GRID = "#a9c1dc", "#1f5a96", "#c44e52", "#5f8350", "#444444", "#e4e4e4"
_LINES = (_KL, _MEAN, _CE, "#8f3fb0", "#c2571a", "#0a7d8c")
_DASHES = ("--", ":", "-.")
_VALIDATIONS = (("validation_kl", _KL, "validation KL"), ("validation_ce", _CE, "validation CE"))
SMOOTHED_FROM = 60
"""From this many steps on, a running mean over a thirtieth of them is drawn over the loss of single steps."""


def plot_trainings(run: Path) -> None:
    """Draw each `training/<variant>.jsonl` of a run folder beside it; a figure of the same rows is left alone."""
    for path in sorted((run / "training").glob("*.jsonl")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        svg = path.with_suffix(".svg")
        if svg.is_file() and digest in svg.read_text(encoding="utf-8")[:4000] and path.with_suffix(".png").is_file():
            continue
        plot_training(read_lines(path), svg, title=f"{run.parent.name}: {path.stem}", source=f"{path.name} {digest}")


def plot_training(rows: list[dict[str, Any]], svg: Path, *, title: str, source: str) -> None:
    """Write the figure of one training to `svg`, and as PNG beside it.

    Args:
        rows: of training.jsonl: a row a step with loss and lr, and rows with validation_kl, validation_ce where there was a validation.
        source: what the rows are, kept in the metadata of both files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with _style("training"):
        validations = [each for each in _VALIDATIONS if _points(rows, each[0])[0]]
        heights = [3, *[1.7] * len(validations), 1]
        figure = Figure(figsize=(7.2, 1.1 * sum(heights) + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
        _loss_panel(panels[0], rows)
        for panel, (key, color, label) in zip(panels[1:], validations, strict=False):  # a panel each: their heights differ
            _draw(panel, _points(rows, key), color, label, marker="o")
            panel.set_ylabel(label.replace(" ", "\n"))
        _draw(panels[-1], _points(rows, "lr"), _RATE, "lr")
        panels[-1].set_ylabel("lr")
        panels[-1].set_ylim(bottom=0)
        panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        for panel in panels:
            panel.grid(color=_GRID, linewidth=0.7)
            panel.set_axisbelow(True)
            panel.margins(x=0.01)
        panels[0].set_title(title, loc="left", fontsize=10.5, fontweight="bold")
        figure.align_ylabels()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Description": source})
        figure.savefig(svg.with_suffix(".png"), format="png", dpi=144, metadata={"Description": source, "Software": None})


def plot_trajectory(trajectory: dict[str, Any], svg: Path) -> None:
    """Write the figure of scores along training to `svg`: a panel a figure, a line a method with its intervals, levels as dashes.

    Args:
        trajectory: as the record of `findings` has it.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _style("trajectory"):
        panels = trajectory["panels"]
        figure = Figure(figsize=(7.2, 2.5 * len(panels) + 0.6), layout="constrained")
        FigureCanvasSVG(figure)
        for panel, axes in zip(panels, list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]), strict=True):
            for number, line in enumerate(panel["lines"]):
                color, points = _LINES[number % len(_LINES)], line["points"]
                errors = [[max(0.0, p["value"] - p["low"]) for p in points], [max(0.0, p["high"] - p["value"]) for p in points]]
                axes.errorbar(
                    [point["tokens"] for point in points],
                    [point["value"] for point in points],
                    yerr=errors,
                    color=color,
                    label=line["name"],
                    linewidth=1.4,
                    marker="o",
                    markersize=3.5,
                    capsize=2.5,
                    elinewidth=0.9,
                )
            for number, level in enumerate(panel["levels"]):
                axes.axhline(
                    level["value"], color=_RATE, linewidth=1, linestyle=_DASHES[number % len(_DASHES)], label=level["variant"]
                )
            axes.set_ylabel(f"{label(panel['name'])}\n({panel['unit']})")
            axes.grid(color=_GRID, linewidth=0.7)
            axes.set_axisbelow(True)
        axes.set_xlabel("tokens trained")
        first = figure.axes[0]
        first.set_title(trajectory["title"], loc="left", fontsize=10.5, fontweight="bold")
        first.legend(frameon=False, fontsize=8.5, ncols=4)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Description": f"{trajectory['suite']}: {trajectory['id']}"})


@contextlib.contextmanager
def _style(salt: str) -> Iterator[None]:
    """Our look, whatever the user has set up for figures of their own; ids in an SVG are made of the salt."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        look: dict[Any, Any] = {"svg.hashsalt": salt, "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
        matplotlib.rcParams.update(look)
        yield


def _loss_panel(panel: Any, rows: list[dict[str, Any]]) -> None:
    steps, losses = _points(rows, "loss")
    is_smoothed = len(steps) >= SMOOTHED_FROM
    _draw(panel, (steps, losses), _STEP if is_smoothed else _MEAN, "loss of a step")
    if is_smoothed:
        width = max(3, len(steps) // 30)
        _draw(panel, _running_mean(steps, losses, width), _MEAN, f"mean of {width} steps")
        panel.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper right")
    panel.set_ylabel("loss")


def _draw(panel: Any, points: tuple[list[int], list[float]], color: str, label: str, *, marker: str = "") -> None:
    if points[0]:
        panel.plot(*points, color=color, label=label, linewidth=1.4, marker=marker, markersize=3.5)


def _points(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """How many steps were done, and the values that were recorded then: a step's "step" is its index, a validation's is that number."""
    found = [(row["step"] + ("loss" in row), row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(steps: list[int], values: list[float], width: int) -> tuple[list[int], list[float]]:
    """Means over `width` neighbours, each at its middle step."""
    sums = [sum(values[i : i + width]) for i in range(len(values) - width + 1)]
    middle = width // 2
    return steps[middle : middle + len(sums)], [total / width for total in sums]
