"""Inspection as one static page: no script, nothing fetched, all text escaped.

Text of a task that is not publishable never enters the page: numbers of questions, digests, scores and counts do, and the page says so.
"""

from __future__ import annotations

import hashlib
import html
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.inspect_terminal import COUNTED, change, facts, metrics, weighed
from harness.questions import (
    Question,
    QuestionView,
    Selection,
    TaskOverview,
    cluster_of,
    extractions,
    responses,
    score_of,
    shown_images,
    thinking_and_answer,
    verdict_of,
    visible,
)
from harness.schema_evaluation import Thinking
from harness.store import disk_errors, write_text
from harness.table_cells import score_text

LONGEST_TEXT = 400_000
LONGEST_TEXT_OF_MANY = 20_000
"""Of longer texts the middle is left out, and how much is said: a browser has to lay the page out. The second is for a page of several
questions."""


def write_page(path: Path, selection: Selection, overviews: list[TaskOverview], views: list[QuestionView], limit: int) -> None:
    """Write the page of these overviews and questions; StoreError where that cannot be."""
    body = [f"<h1>{_text(selection.run.name)}</h1>"]
    body += [_notice(selection, overviews, views)]
    shown = {(view.task.name, view.question.key) for view in views}
    for overview in overviews:
        body.append(_overview(overview, selection.baseline, limit, shown))
    longest = LONGEST_TEXT if len(views) == 1 else LONGEST_TEXT_OF_MANY
    body += [_question(view, selection, longest) for view in views]
    if not path.parent.is_dir():
        raise StoreError(f"--html {path}: the folder {path.parent} does not exist; make it, or give another file")
    if path.is_dir():
        raise StoreError(f"--html {path}: is a folder; give a file, such as {path / 'questions.html'}")
    with disk_errors(f"the page {path}"):
        write_text(path, _PAGE.format(title=_text(selection.run.name), style=_STYLE, body="\n".join(body)))


def _notice(selection: Selection, overviews: list[TaskOverview], views: list[QuestionView]) -> str:
    tasks = {task.name: task for task in (*(o.task for o in overviews), *(v.task for v in views))}
    hidden = [name for name, task in tasks.items() if not task.is_publishable]
    if not hidden:
        return ""
    return (
        f'<p class="notice">Not publishable: {_text(", ".join(hidden))}. Of these tasks the page holds numbers, digests and scores '
        "only; their text is in the samples of the run and in <code>harness inspect</code> without <code>--html</code>.</p>"
    )


def _overview(task: TaskOverview, baseline: str, limit: int, shown: set[Any]) -> str:
    compared = f", compared with {_text(baseline)}" if task.worse else ""
    heads = ("variant", "score", "worse", "better", "incomplete", "truncated", "missing")
    rows = []
    for variant in task.variants:
        mark = " (imported)" if variant in task.imported else ""
        counts = [str(len(flips[variant])) if variant in flips else "–" for flips in (task.worse, task.better)]
        counts += [str(len(kind[variant])) for kind in (task.incomplete, task.truncated, task.missing)]
        cells = "".join(f"<td>{cell}</td>" for cell in (_value(task.task.values.get(variant)), *counts))
        rows.append(f'<tr><th scope="row">{_text(variant + mark)}</th>{cells}</tr>')
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    lists = "".join(f"<li><b>{_text(head)}:</b> {', '.join(parts)}</li>" for head, parts in _lists(task, limit, shown))
    return (
        f"<section><h2>{_text(task.task.name)}</h2>"
        f"<p>{_text(task.task.primary)}, {task.n_questions:,} questions × {task.repeats}{compared}. {COUNTED}</p>"
        f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f"<ul>{lists}</ul></section>"
    )


def _lists(task: TaskOverview, limit: int, shown: set[Any]) -> list[tuple[str, list[str]]]:
    name = task.task.name
    found = []
    for variant in task.variants:
        for word, flips in (("worse", task.worse), ("better", task.better)):
            parts = [_link(name, f.question, shown) + change(f) for f in flips.get(variant, [])[:limit]]
            found.append((f"{variant} {word}", parts, len(flips.get(variant, []))))
        for word, kind in (("incomplete", task.incomplete), ("truncated", task.truncated)):
            found.append((f"{variant} {word}", [_link(name, q, shown) for q in kind[variant][:limit]], len(kind[variant])))
        pairs = task.missing[variant]
        parts = [_link(name, q, shown) + _reason(reason, task.task.is_publishable) for q, reason in pairs[:limit]]
        found.append((f"{variant} missing", parts, len(pairs)))
    out = task.task.excluded
    parts = [f"{doc}{_reason(why, task.task.is_publishable)}" for doc, why in out[:limit]]
    found.append(("left out, never asked", parts, len(out)))
    return [(head, [*parts, *([f"and {n - limit} more"] if n > limit else [])]) for head, parts, n in found if parts]


def _link(task: str, question: Question, shown: set[Any]) -> str:
    label = _text(question.label)
    return f'<a href="#{_anchor(task, question)}">{label}</a>' if (task, question.key) in shown else label


def _anchor(task: str, question: Question) -> str:
    return "q-" + hashlib.sha256(f"{task}:{question.key}".encode()).hexdigest()[:16]


def _reason(reason: str, is_publishable: bool) -> str:
    """Why a response is missing; a server may have put the question into it."""
    return f" ({_text(reason)})" if is_publishable else ""


def _question(view: QuestionView, selection: Selection, longest: int) -> str:
    is_open = view.task.is_publishable
    row = view.first
    part = "" if view.question.subtask is None else f" ({_text(view.question.subtask)})"
    about = [f"digest <code>{_text(view.question.digest)}</code>", f"scorer {_text(row['scorer'])}"]
    cluster = cluster_of(row)
    if is_open and cluster is not None:
        about.append(f"cluster {_text(cluster)}")
    parts = [f"<p>{', '.join(about)}</p>"]
    for prompt in view.prompts:
        shown = f"<pre>{_long(prompt, longest)}</pre>" if is_open else f"<p>sha256 {_digest(prompt)}</p>"
        parts.append(f"<details open><summary>prompt, {len(prompt):,} characters</summary>{shown}</details>")
    if view.images:
        parts.append(f"<p>images: <code>{_text(', '.join(shown_images(view)))}</code></p>")
    if is_open and row["target"] is not None:
        parts.append(f"<p><b>target</b></p><pre>{_long(row['target'], longest)}</pre>")
    columns = "".join(_variant(view, variant, selection, longest) for variant in view.rows)
    return (
        f'<section id="{_anchor(view.task.name, view.question)}"><h2>{_text(view.task.name)}, question '
        f'{_text(view.question.label)}{part}</h2>{"".join(parts)}<div class="variants">{columns}</div></section>'
    )


def _variant(view: QuestionView, variant: str, selection: Selection, longest: int) -> str:
    mean, first = view.mean(variant), view.mean(selection.baseline)
    title = _text(variant)
    if mean is not None:
        title += f' <span class="{view.task.grade(mean)}">{mean:.3g}</span>'
        if first is not None and mean != first:
            title += (
                f" <small>{'worse' if view.task.is_worse(mean, first) else 'better'} than {_text(selection.baseline)}</small>"
            )
    answers = "".join(_answer(view, row, selection.run.thinking, longest) for row in view.rows[variant])
    return f"<article><h3>{title}</h3>{answers or '<p>not answered in this run</p>'}</article>"


def _answer(view: QuestionView, row: dict[str, Any], thinking: Thinking | None, longest: int) -> str:
    is_open = view.task.is_publishable
    parts = [f'<p class="facts">{_text(facts(row))}</p>']
    if row["missing"] is not None:
        return "".join([*parts, f'<p class="some">missing{_reason(row["missing"], is_open)}</p>'])
    parts.append(f'<p class="{view.task.grade(score_of(row, view.task.primary))}">{_text(metrics(row, with_text=is_open))}</p>')
    parts += [f'<p class="some">{word}</p>' for word in ("incomplete", "truncated") if row[f"is_{word}"]]
    verdict = verdict_of(row, with_text=is_open)
    if verdict is not None:
        parts.append(f"<p><b>judge:</b> {_long(verdict, longest)}</p>")
    if not is_open:
        return "".join([*parts, f"<p>response: sha256 {_digest(row['response'])}</p>"])
    for name, found in extractions(row, thinking).items():
        parts.append(f"<p><b>{_text(name)}:</b> <code>{_long(found, longest)}</code></p>")
    return "".join([*parts, _response(row, view.options, thinking, longest)])


def _response(row: dict[str, Any], options: tuple[str, ...], thinking: Thinking | None, longest: int) -> str:
    parts = [f"<p>{_long(line, longest)}</p>" for line in weighed(row, options)]
    for response in responses(row):
        thought, answer = thinking_and_answer(response, thinking)
        if thought:
            summary = f"<summary>thinking, {len(thought):,} characters</summary>"
            parts.append(f'<details class="thinking">{summary}<pre>{_long(thought, longest)}</pre></details>')
        shown = answer.lstrip() if thought else answer
        parts += [f"<pre>{_long(shown, longest)}</pre>"] if shown or not thought else []
    return "".join(parts)


def _value(row: dict[str, Any] | None) -> str:
    return "–" if row is None else score_text(row)


def _digest(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return f"<code>{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]}</code>"


def _long(text: str, longest: int) -> str:
    left_out = len(text) - longest
    if left_out <= 0:
        return _text(text)
    half = longest // 2
    return (
        f'{_text(text[:half])}<span class="some">\n… {left_out:,} characters are left out here …\n</span>{_text(text[-half:])}'
    )


def _text(value: Any) -> str:
    return html.escape(visible(str(value)))


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #666; --right: #0a6b2d; --wrong: #b3261e; --some: #8a5a00; --box: #8881; }
@media (prefers-color-scheme: dark) { :root { --dim: #aaa; --right: #6fd08c; --wrong: #ff8a80; --some: #f0c060; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 110rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.2rem; margin-top: 2rem; border-top: 1px solid var(--line); padding-top: 1rem }
h3 { font-size: 1rem; margin: 0 0 .5rem }
table { border-collapse: collapse } th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child { text-align: left }
.wide { overflow-x: auto } .notice { border-left: 4px solid var(--some); padding: .5rem 1rem; background: var(--box) }
.variants { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem }
article { border: 1px solid var(--line); border-radius: 6px; padding: .8rem; min-width: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); padding: .6rem; border-radius: 4px; margin: .4rem 0;
      max-height: 40rem; overflow-y: auto; font-size: .85rem }
.facts:nth-of-type(n+2) { border-top: 1px solid var(--line); padding-top: .5rem; margin-top: .8rem }
p { margin: .3rem 0 } summary { cursor: pointer; color: var(--dim) }
.facts, small { color: var(--dim); font-size: .85rem; font-weight: normal } .thinking pre { color: var(--dim); font-style: italic }
.right { color: var(--right) } .wrong { color: var(--wrong) } .some { color: var(--some) }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
