"""Inspection in a terminal: an overview of each task, or one question with the answers of all variants side by side.

Text of models and data is never read as markup, and what would steer a terminal is made visible.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from harness.questions import (
    Flip,
    Question,
    QuestionView,
    Selection,
    TaskOverview,
    cluster_of,
    extractions,
    likelihoods,
    responses,
    score_of,
    shown_images,
    thinking_and_answer,
    verdict_of,
    visible,
)
from harness.schema_evaluation import Thinking
from harness.table_cells import score_text

COLUMN_WIDTH = 36
"""Characters that a variant's column needs to be read with ease: as many columns as fit stand side by side."""
LONGEST_TEXT = 6_000
"""Of longer texts the middle is left out, and how much is said."""
MISSING = "–"
COUNTED = "Counts are of questions; shares below a table are of responses."
_COLOURS = {"none": "", "right": "green", "wrong": "red", "some": "yellow"}


def print_overview(found: list[TaskOverview], selection: Selection, console: Console, *, limit: int) -> None:
    """A table a task, and below it the numbers of the questions, at most `limit` of a kind."""
    console.print(Text(selection.run.name, style="bold"))
    for task in found:
        console.print()
        console.print(_summary(task, selection.baseline))
        for head, parts in _lists(task, limit):
            line = Text(head, style="bold").append(": ").append_text(Text(", ".join(parts), style="not bold"))
            console.print(Padding(line, (0, 0, 0, 2)))
    console.print()
    console.print(Text("One question: --task TASK --question NUMBER. A page of all listed here: --html FILE.", style="dim"))


def print_question(view: QuestionView, selection: Selection, console: Console) -> None:
    """Prompts, then the answers of all variants beside each other, repeat by repeat."""
    console.print(_head(view))
    for prompt in view.prompts:
        console.print(Panel(_cut(prompt), title="prompt", title_align="left", border_style="dim"))
    if view.images:
        console.print(Text("images: ", style="bold").append(Text(", ".join(shown_images(view)), style="not bold")))
    if view.first["target"] is not None:
        console.print(Text("target: ", style="bold").append_text(_cut(view.first["target"])))
    width = max(1, console.width // COLUMN_WIDTH)
    variants = list(view.rows)
    for start in range(0, len(variants), width):
        console.print()
        console.print(_side_by_side(view, variants[start : start + width], selection))


def _summary(task: TaskOverview, baseline: str) -> Table:
    compared = f", compared with {baseline}" if task.worse else ""
    title = f"{task.task.name}: {task.task.primary}, {task.n_questions} questions × {task.repeats}{compared}"
    table = Table(caption=Text(COUNTED), caption_justify="left", title=Text(title), title_justify="left", title_style="bold")
    for name in ("variant", "score", "worse", "better", "incomplete", "truncated", "missing"):
        table.add_column(name, justify="left" if name == "variant" else "right", overflow="fold")
    for variant in task.variants:
        mark = " (imported)" if variant in task.imported else ""
        table.add_row(
            Text(variant + mark),
            _value(task.task.values.get(variant)),
            *(str(len(flips[variant])) if variant in flips else MISSING for flips in (task.worse, task.better)),
            *(str(len(kind[variant])) for kind in (task.incomplete, task.truncated, task.missing)),
        )
    return table


def _lists(task: TaskOverview, limit: int) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for variant in task.variants:
        for word, flips in (("worse", task.worse), ("better", task.better)):
            found.append((f"{variant} {word}", _named([_flip(flip) for flip in flips.get(variant, [])], limit)))
        for word, kind in (("incomplete", task.incomplete), ("truncated", task.truncated)):
            found.append((f"{variant} {word}", _named([_name(question) for question in kind[variant]], limit)))
        reasons = [f"{_name(question)} ({visible(reason)})" for question, reason in task.missing[variant]]
        found.append((f"{variant} missing", _named(reasons, limit)))
    found.append(("left out, never asked", _named([f"{doc} ({visible(why)})" for doc, why in task.task.excluded], limit)))
    return [(head, parts) for head, parts in found if parts]


def _named(parts: list[str], limit: int) -> list[str]:
    more = len(parts) - limit
    return parts if more <= 0 else [*parts[:limit], f"and {more} more"]


def _name(question: Question) -> str:
    return question.label


def _flip(flip: Flip) -> str:
    return flip.question.label + change(flip)


def change(flip: Flip) -> str:
    """From which score to which, where that is not from right to wrong or back."""
    is_plain = {flip.baseline, flip.candidate} == {0.0, 1.0}
    return "" if is_plain else f" ({flip.baseline:.3g}→{flip.candidate:.3g})"


def _head(view: QuestionView) -> RenderableType:
    row = view.first
    part = "" if view.question.subtask is None else f" ({view.question.subtask})"
    title = Text(visible(f"{view.task.name}, question {view.question.label}{part}"), style="bold")
    cluster = cluster_of(row)
    about = [
        f"digest {view.question.digest[:16]}",
        *([] if cluster is None else [f"cluster {cluster}"]),
        f"scorer {row['scorer']}",
    ]
    return Group(Rule(title, align="left"), Text(visible(", ".join(about)), style="dim"))


def _side_by_side(view: QuestionView, variants: list[str], selection: Selection) -> Table:
    table = Table(show_lines=True, expand=True)
    for variant in variants:
        table.add_column(_variant(view, variant, selection.baseline), ratio=1, overflow="fold")
    repeats = sorted({row["repeat"] for variant in variants for row in view.rows[variant]})
    for repeat in repeats:
        table.add_row(*(_answer(view, variant, repeat, selection) for variant in variants))
    if not repeats:
        table.add_row(*(Text("not answered in this run", style="dim") for _ in variants))
    return table


def _variant(view: QuestionView, variant: str, baseline: str) -> Text:
    mean, first = view.mean(variant), view.mean(baseline)
    title = Text(variant, style="bold")
    if mean is None:
        return title
    title.append(f"  {mean:.3g}", style=_COLOURS[view.task.grade(mean)])
    if first is not None and mean != first:
        title.append(f" ({'worse' if view.task.is_worse(mean, first) else 'better'} than {baseline})", style="default")
    return title


def _answer(view: QuestionView, variant: str, repeat: int, selection: Selection) -> RenderableType:
    row = next((row for row in view.rows[variant] if row["repeat"] == repeat), None)
    if row is None:
        return Text("not answered in this run", style="dim")
    lines: list[RenderableType] = [Text(facts(row), style="dim")]
    if row["missing"] is not None:
        return Group(*lines, Text(f"missing: {visible(row['missing'])}", style="bold yellow"))
    score = score_of(row, view.task.primary)
    lines.append(Text(visible(metrics(row)), style=_COLOURS[view.task.grade(score)]))
    for word in ("incomplete", "truncated"):
        if row[f"is_{word}"]:
            lines.append(Text(word, style="bold yellow"))
    for name, found in extractions(row, selection.run.thinking).items():
        lines.append(Text(f"{visible(name)}: ", style="bold").append_text(_cut(found)))
    verdict = verdict_of(row, with_text=True)
    if verdict is not None:
        lines.append(Text("judge: ", style="bold").append_text(_cut(verdict)))
    return Group(*lines, Text(""), *_response(row, view.options, selection.run.thinking))


def _response(row: dict[str, Any], options: tuple[str, ...], thinking: Thinking | None) -> list[RenderableType]:
    found: list[RenderableType] = [_cut(line) for line in weighed(row, options)]
    for response in responses(row):
        thought, answer = thinking_and_answer(response, thinking)
        found += [_cut(thought, style="dim italic")] if thought else []
        found.append(_cut(answer.lstrip("\n") if thought else answer))
    return found


def weighed(row: dict[str, Any], options: tuple[str, ...]) -> list[str]:
    """The log-likelihood of each choice in words, the highest marked, and its text where that is known."""
    values = likelihoods(row)
    best = max(values, default=0.0)
    texts = [f": {option.strip()}" for option in options] if len(options) == len(values) else [""] * len(values)
    return [
        f"choice {i}: log-likelihood {x:.3f}{' (highest)' if x == best else ''}{text}"
        for i, (x, text) in enumerate(zip(values, texts, strict=True))
    ]


def metrics(row: dict[str, Any], *, with_text: bool = True) -> str:
    """Every metric of a row with its value; what is no number may hold the texts that are compared, and needs `with_text`."""
    return ", ".join(f"{name} {_metric(value, with_text)}" for name, value in row["metrics"].items())


def _metric(value: Any, with_text: bool) -> str:
    if value is None:
        return MISSING
    if isinstance(value, int | float):
        return f"{value:.3g}"
    return str(value) if with_text else "(no number, not shown)"


def facts(row: dict[str, Any]) -> str:
    """Repeat, finish reason, tokens, seed, seconds: those that are known."""
    reasons = ", ".join(dict.fromkeys(row["finish_reason"] or ()))
    parts = [
        f"repeat {row['repeat']}",
        "imported" if row.get("imported") else None,
        reasons or None,
        None if row["n_tokens"] is None else f"{row['n_tokens']:,} tokens",
        None if row["seed"] is None else f"seed {row['seed']}",
        None if row["seconds"] is None else f"{row['seconds']:.1f} s",
    ]
    return ", ".join(part for part in parts if part is not None)


def _value(row: dict[str, Any] | None) -> str:
    return MISSING if row is None else score_text(row)


def _cut(text: str, *, style: str = "") -> Text:
    shown = visible(text)
    left_out = len(shown) - LONGEST_TEXT
    if left_out <= 0:
        return Text(shown, style=style)
    half = LONGEST_TEXT // 2
    note = f"\n… {left_out:,} characters are left out here; --html FILE has more …\n"
    return Text(shown[:half], style=style).append(note, style="yellow").append(shown[-half:], style=style)
