"""What became of single questions: where variants disagree, and the answers of all variants to one question. No torch, no cache.

Everything is read from the run folder; `inspect_terminal` and `inspect_page` show it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.samples import Asked, RunSamples, TaskRecord, open_samples, question_key
from harness.schema_evaluation import Thinking
from harness.thinking import split_thinking

MIN_DIGEST = 4
"""So many characters of a question's digest are needed to mean it; anything shorter could only be a number."""


@dataclass(frozen=True)
class Selection:
    """What of a run is looked at. The first variant is what the others are compared with: the BF16 one where it is among them."""

    run: RunSamples
    variants: tuple[str, ...]
    tasks: tuple[TaskRecord, ...]

    @property
    def baseline(self) -> str:
        return self.variants[0]


@dataclass
class Outcome:
    """What one variant made of one question, over its repeats; a score that is missing is None."""

    scores: list[float | None] = field(default_factory=list)
    incomplete: int = 0
    truncated: int = 0
    missing: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float | None:
        present = [score for score in self.scores if score is not None]
        return math.fsum(present) / len(present) if present else None


@dataclass(frozen=True)
class Question:
    """Which question: `key` pairs it between variants, `label` is its number in the task, `digest` that of its source text.

    subtask: of which part of a task that has several, else None.
    """

    key: tuple[Any, ...]
    label: str
    digest: str
    subtask: str | None


@dataclass(frozen=True)
class Flip:
    """A question that a variant scored otherwise than the baseline."""

    question: Question
    baseline: float
    candidate: float


@dataclass(frozen=True)
class TaskOverview:
    """One task: by variant, the questions that flipped (worse, better) against the baseline, and those with trouble."""

    task: TaskRecord
    variants: tuple[str, ...]
    n_questions: int
    repeats: int
    worse: dict[str, list[Flip]]
    better: dict[str, list[Flip]]
    incomplete: dict[str, list[Question]]
    truncated: dict[str, list[Question]]
    missing: dict[str, list[tuple[Question, str]]]
    imported: tuple[str, ...]

    def listed(self, limit: int) -> list[Question]:
        """Every question that is named when at most `limit` of a kind are, each once."""
        found = [flip.question for flips in (*self.worse.values(), *self.better.values()) for flip in flips[:limit]]
        found += [q for kind in (self.incomplete, self.truncated) for questions in kind.values() for q in questions[:limit]]
        found += [q for pairs in self.missing.values() for q, _ in pairs[:limit]]
        return list({question.key: question for question in found}.values())


@dataclass(frozen=True)
class QuestionView:
    """One question with its prompts and the rows of each variant, by repeat; a variant without rows has not answered it.

    options: the texts whose likelihoods were asked, where the run keeps them. images: what was shown, as (digest, width, height).
    """

    task: TaskRecord
    question: Question
    prompts: list[str]
    rows: dict[str, list[dict[str, Any]]]
    options: tuple[str, ...] = ()
    images: tuple[tuple[str, int, int], ...] = ()

    @property
    def first(self) -> dict[str, Any]:
        return next(rows[0] for rows in self.rows.values() if rows)

    def mean(self, variant: str) -> float | None:
        """The variant's mean score over repeats."""
        return Outcome([score_of(row, self.task.primary) for row in self.rows.get(variant, ())]).mean


def select(folder: Path, *, variants: tuple[str, ...] = (), task: str | None = None) -> Selection:
    """The variants and tasks to look at, all where nothing is named; StoreError for a name that the run does not have."""
    run = open_samples(folder)
    for name in variants:
        _require(name, run.variants, f"{folder}: --variant {name}: no such variant in this run")
    if task is not None:
        _require(task, run.tasks, f"{folder}: --task {task}: no such task in this run")
    chosen = [name for name in run.variants if not variants or name in variants]
    if run.baseline in chosen:
        chosen = [run.baseline, *(name for name in chosen if name != run.baseline)]
    tasks = tuple(record for name, record in run.tasks.items() if task in (None, name))
    if not any(set(record.variants) & set(chosen) for record in tasks):
        raise StoreError(f"{folder}: no samples of {', '.join(chosen)} in {', '.join(r.name for r in tasks)} in this run")
    return Selection(run, tuple(chosen), tasks)


def overview(selection: Selection) -> list[TaskOverview]:
    """Each task of the selection that has samples."""
    return [found for task in selection.tasks if (found := _overview(selection, task)) is not None]


def find_question(selection: Selection, wanted: str) -> QuestionView:
    """The question with this number, or with a digest that begins so.

    StoreError if there is none, naming near ones, or if several tasks or questions are meant.
    """
    found: list[tuple[TaskRecord, Question]] = []
    known: dict[str, None] = {}
    for task in selection.tasks:
        questions = _questions(selection, task)
        known |= dict.fromkeys(question.label for question in questions)
        found += [(task, question) for question in _matching(questions, wanted)]
    where = f"{selection.run.folder}: --question {wanted}"
    if not found:
        names = ", ".join(task.name for task in selection.tasks)
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise StoreError(
            f"{where}: no such question in {names}{hint} Give its number ({_span(list(known))}) or the first {MIN_DIGEST} or more "
            "characters of its digest"
        )
    if len(found) > 1:
        meant = ", ".join(f"{task.name} {question.label} ({question.digest[:8]})" for task, question in found[:5])
        raise StoreError(f"{where}: {len(found)} questions are meant: {meant}; give --task, or more of the digest")
    return read_questions(selection, *found)[0]


def read_questions(selection: Selection, *wanted: tuple[TaskRecord, Question]) -> list[QuestionView]:
    """The questions with all their text; each file is read once."""
    found: dict[tuple[str, Any], dict[str, list[dict[str, Any]]]] = {
        (task.name, question.key): {variant: [] for variant in selection.variants} for task, question in wanted
    }
    asked: dict[str, dict[int, Asked]] = {}
    for task in dict.fromkeys(task.name for task, _ in wanted):
        for variant in _variants(selection, selection.run.tasks[task]):
            for row in selection.run.rows(variant, task):
                rows = found.get((task, question_key(row)))
                if rows is not None:
                    rows[variant].append(row)
        docs = {int(question.label) for record, question in wanted if record.name == task}
        asked[task] = selection.run.asked(task, docs)
    views = []
    for record, question in wanted:
        by_variant = {v: sorted(rows, key=_repeat) for v, rows in found[record.name, question.key].items()}
        given = {row["prompt"]: None for rows in by_variant.values() for row in rows if row.get("prompt") is not None}
        mine = asked[record.name].get(int(question.label), Asked())
        views.append(
            QuestionView(record, question, [*given] or mine.prompts, by_variant, tuple(mine.options), tuple(mine.images))
        )
    return views


def shown_images(view: QuestionView) -> list[str]:
    """The images of a question in words: digest and size in pixels."""
    return [f"{digest[:16]} ({width:,} × {height:,})" for digest, width, height in view.images]


def score_of(row: dict[str, Any], metric: str) -> float | None:
    """The score of a row; None where its response is missing, and where the metric gives a sample no score of its own."""
    value = row["metrics"].get(metric)
    return value if isinstance(value, int | float) else None


def responses(row: dict[str, Any]) -> list[str]:
    """The texts that were answered: one, or several where one score is of several; none where choices were weighed."""
    return [each for each in row["response"] or () if isinstance(each, str)]


def likelihoods(row: dict[str, Any]) -> list[float]:
    """The log-likelihood of each choice; none where a text was asked for."""
    return [each[0] for each in row["response"] or () if not isinstance(each, str)]


def thinking_and_answer(response: str, thinking: Thinking | None) -> tuple[str, str]:
    """(thinking, answer) of a response, as scoring tells them apart."""
    split = split_thinking(response, thinking)
    return (response, "") if split.is_open else (response.removesuffix(split.answer), split.answer)


def extractions(row: dict[str, Any], thinking: Thinking | None) -> dict[str, str]:
    """What each filter made of the answer, but for filters that left it as it is."""
    answers = {thinking_and_answer(response, thinking)[1] for response in responses(row)}
    found = {name: value if isinstance(value, str) else repr(value) for name, value in row["answer"].items()}
    return {name: value for name, value in found.items() if value not in answers}


def verdict_of(row: dict[str, Any], *, with_text: bool) -> str | None:
    """What a judge said of the answer, or why it was not asked; None where the task has no judge.

    with_text: also what it wrote where that was no verdict, and why a verdict is missing.
    """
    judged = row.get("judged")
    if judged is None:
        return None
    if judged["unasked"] is not None:
        return f"not asked, the answer is {judged['unasked']}"
    if judged["missing"] is not None:
        return f"missing ({judged['missing']})" if with_text else "missing"
    said = str(judged["verdict"])
    return said if said in ("CORRECT", "INCORRECT") or not with_text else f"{said}: {judged['text']}"


def cluster_of(row: dict[str, Any]) -> str | None:
    """The cluster of a question; None where it is one of its own."""
    return None if row["cluster"] in (str(row["doc"]), row["question"]) else str(row["cluster"])


def visible(text: str) -> str:
    """Text with what would move a cursor, colour a terminal or reverse the reading order made visible; lines and tabs stay."""
    return _HIDDEN.sub(lambda match: _picture(match.group()), text.replace("\r\n", "\n"))


_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def _overview(selection: Selection, task: TaskRecord) -> TaskOverview | None:
    variants = _variants(selection, task)
    questions: dict[tuple[Any, ...], Question] = {}
    outcomes: dict[str, dict[tuple[Any, ...], Outcome]] = {}
    repeats, imported = 0, []
    for variant in variants:
        mine = outcomes[variant] = {}
        for row in selection.run.rows(variant, task.name):
            question = _question(row)
            questions.setdefault(question.key, question)
            _add(mine.setdefault(question.key, Outcome()), row, task.primary)
            if row.get("imported") and variant not in imported:
                imported.append(variant)
        repeats = max([repeats, *(len(outcome.scores) for outcome in mine.values())])
    if not variants:
        return None
    worse, better = {}, {}
    first = outcomes.get(selection.baseline, {})
    for variant in variants:
        if variant == selection.baseline or selection.baseline not in outcomes:
            continue
        flips = _flips(questions, first, outcomes[variant])
        worse[variant] = [flip for flip in flips if task.is_worse(flip.candidate, flip.baseline)]
        better[variant] = [flip for flip in flips if task.is_worse(flip.baseline, flip.candidate)]
    return TaskOverview(
        task=task,
        variants=variants,
        n_questions=len(questions),
        repeats=repeats,
        worse=worse,
        better=better,
        incomplete={v: [questions[k] for k, o in outcomes[v].items() if o.incomplete] for v in variants},
        truncated={v: [questions[k] for k, o in outcomes[v].items() if o.truncated] for v in variants},
        missing={v: _missing(questions, outcomes[v]) for v in variants},
        imported=tuple(imported),
    )


def _add(outcome: Outcome, row: dict[str, Any], metric: str) -> None:
    outcome.scores.append(score_of(row, metric))
    outcome.incomplete += bool(row["is_incomplete"])
    outcome.truncated += bool(row["is_truncated"])
    if row["missing"] is not None:
        outcome.missing.append(row["missing"])


def _flips(questions: dict[tuple[Any, ...], Question], first: dict[Any, Outcome], candidate: dict[Any, Outcome]) -> list[Flip]:
    """Questions that both scored, and otherwise; the largest difference first."""
    pairs = [
        (question, first.get(key, Outcome()).mean, candidate.get(key, Outcome()).mean) for key, question in questions.items()
    ]
    flips = [Flip(q, before, after) for q, before, after in pairs if before is not None and after is not None]
    return sorted((flip for flip in flips if flip.baseline != flip.candidate), key=lambda f: -abs(f.candidate - f.baseline))


def _missing(questions: dict[tuple[Any, ...], Question], outcomes: dict[Any, Outcome]) -> list[tuple[Question, str]]:
    """Questions with a missing response, and those that other variants were asked and this one was not."""
    found = []
    for key, question in questions.items():
        if key not in outcomes:
            found.append((question, "not in this variant's samples"))
        elif outcomes[key].missing:
            found.append((question, "; ".join(dict.fromkeys(outcomes[key].missing))))
    return found


def _questions(selection: Selection, task: TaskRecord) -> list[Question]:
    found: dict[tuple[Any, ...], Question] = {}
    for variant in _variants(selection, task):
        for row in selection.run.rows(variant, task.name):
            question = _question(row)
            found.setdefault(question.key, question)
    return list(found.values())


def _question(row: dict[str, Any]) -> Question:
    subtask = row["subtask"] if row["subtask"] != row["task"] else None
    return Question(question_key(row), str(row["doc"]), str(row["question"]), subtask)


def _matching(questions: list[Question], wanted: str) -> list[Question]:
    numbered = [question for question in questions if wanted == question.label]
    if numbered:
        return numbered
    is_digest = len(wanted) >= MIN_DIGEST and re.fullmatch("[0-9a-f]+", wanted.lower())
    return [question for question in questions if is_digest and question.digest.startswith(wanted.lower())]


def _variants(selection: Selection, task: TaskRecord) -> tuple[str, ...]:
    return tuple(variant for variant in selection.variants if variant in task.variants)


def _require(name: str, known: Iterable[str], problem: str) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise StoreError(f"{problem}{hint} Known: {', '.join(names)}")


def _span(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} to {labels[-1]}"


def _repeat(row: dict[str, Any]) -> int:
    return int(row["repeat"])
