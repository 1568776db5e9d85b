"""What a run shows, question by question and without text: all that comparisons, gates and reports are made of. No torch.

Read from the small files of the run folder alone (`records`, `score_files`): neither the cache nor the samples have to be there.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import StoreError
from harness.evidence_checks import (
    AGAIN,
    ASKED,
    SCORE_ROW,
    SUBTASK_ROW,
    TASK_ROW,
    require_about,
    require_diagnostics,
    require_keys,
    require_once,
    require_rows,
    require_sequences,
)
from harness.null_variants import baseline_of
from harness.records import read_lines, read_run
from harness.score_files import scores_path

if TYPE_CHECKING:
    from harness.paired import QuestionPair


@dataclass(frozen=True)
class Question:
    """What a variant made of one question; tuples have an entry a repeat, None where there is nothing.

    key: what the same question has under every variant: the digest of what was asked or, imported, of its source; of several questions
    with one digest the later ones are numbered. question: the digest of its source. cluster: questions that err together.
    """

    key: str
    doc: int
    question: str
    cluster: str
    subtask: str
    scores: tuple[float | None, ...]
    requests: tuple[str, ...]
    seeds: tuple[int | None, ...]
    n_tokens: tuple[int | None, ...]
    incomplete: tuple[bool | None, ...]
    truncated: tuple[bool | None, ...]
    missing: tuple[str | None, ...]

    @property
    def n_scored(self) -> int:
        return sum(score is not None for score in self.scores)

    @property
    def mean(self) -> float | None:
        """Over the repeats that are scored; None if none is."""
        present = [score for score in self.scores if score is not None]
        return math.fsum(present) / len(present) if present else None


@dataclass(frozen=True)
class Answers:
    """A variant in a task. row: the row of tasks.jsonl of the metric that stands in the table."""

    variant: str
    task: str
    metric: str
    unit: str
    higher_is_better: bool | None
    questions: dict[str, Question]
    row: dict[str, Any]

    @property
    def is_imported(self) -> bool:
        return bool(self.row.get("imported"))

    @property
    def repeats(self) -> int:
        return int(self.row["repeats"])

    @cached_property
    def is_share(self) -> bool:
        """Whether the metric is a share, by its unit and by its scores."""
        return self.unit == "share" and self.out_of_range is None

    @cached_property
    def out_of_range(self) -> Question | None:
        """A question with a score that no share has."""
        return next((q for q in self.questions.values() if not all(s is None or 0 <= s <= 1 for s in q.scores)), None)

    @cached_property
    def without_requests(self) -> list[Question]:
        """Questions of which it is not known for each repeat what was asked."""
        return [question for question in self.questions.values() if len(question.requests) < len(question.scores)]

    def sample_rows(self) -> list[dict[str, Any]]:
        """A row a (question, repeat) as samples have them, with what is known without text: question, cluster and the score."""
        return [
            {
                **{key: getattr(question, key) for key in ("doc", "question", "cluster", "subtask")},
                "imported": self.is_imported,
                "repeat": repeat,
                "metrics": {self.metric: score},
            }
            for question in self.questions.values()
            for repeat, score in enumerate(question.scores)
        ]


@dataclass(frozen=True)
class Pairing:
    """Two variants' answers to the same questions.

    pairs: of the questions that both scored, beside `questions` (baseline's, candidate's). n_expected: questions that either was asked.
    paired_by: "request", what was asked is the same token by token; "question", the source of the question is.
    Questions with one source, or that were asked in the same tokens, are no independent evidence: their clusters are joined here.
    coverage: the share of the asked answers that are in the pairs, of the variant where it is smaller.
    """

    pairs: tuple[QuestionPair, ...]
    questions: tuple[tuple[Question, Question], ...]
    n_expected: int
    paired_by: Literal["request", "question"]
    coverage: float


@dataclass(frozen=True)
class RunEvidence:
    """A run folder. about: run.json. rows: of tasks.jsonl by (variant, task), those of the metric that stands in the table."""

    folder: Path
    about: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    tasks: tuple[str, ...]
    rows: dict[tuple[str, str], dict[str, Any]]
    diagnostics: dict[str, dict[str, Any]]

    @property
    def baseline(self) -> str | None:
        """The BF16 variant; not the one that only draws with other seeds, to show what chance does."""
        return baseline_of(self.variants.values())

    @property
    def is_finished(self) -> bool:
        return self.about.get("status") == "complete"

    @cached_property
    def sequences(self) -> dict[str, list[dict[str, Any]]]:
        """By variant, the rows of diagnostics_sequences.jsonl."""
        found: dict[str, list[dict[str, Any]]] = {}
        path = self.folder / "diagnostics_sequences.jsonl"
        rows = read_lines(path)
        require_sequences(path, rows)
        for row in rows:
            found.setdefault(row["variant"], []).append(row)
        return found

    def answers(self, variant: str, task: str) -> Answers | None:
        """None where the variant has no result in the task; StoreError where its scores are missing or damaged."""
        row = self.rows.get((variant, task))
        if row is None:
            return None
        path = scores_path(self.folder, variant, task)
        if not path.is_file():
            if not self.is_finished:
                raise StoreError(f"{path}: not there yet, the run is not finished; look again later, or run the suite again")
            raise StoreError(
                f"{path}: missing; runs made by an older version have no scores: run the suite again (finished stages are stored and are "
                f"not made again), or `harness score {self.folder}` where its samples are kept"
            )
        require_keys(f"{self.folder / 'tasks.jsonl'}: {variant} in {task}", row, ASKED)
        questions = _questions(path, read_lines(path), variant, task, is_imported=bool(row.get("imported")))
        found = Answers(variant, task, row["metric"], row["unit"], row.get("higher_is_better"), questions, row)
        _require_same_amounts(path, found, self._n_uncovered(found))
        _require_same_figures(path, found)
        return found

    def _n_uncovered(self, answers: Answers) -> int:
        """Questions of the task that are in subtasks without the metric."""
        path = self.folder / "subtasks.jsonl"
        rows = read_lines(path) if path.is_file() else []
        require_rows(path, rows, SUBTASK_ROW)
        mine = [row for row in rows if (row["variant"], row["task"]) == (answers.variant, answers.task)]
        covered = {row["subtask"] for row in mine if row["metric"] == answers.metric}
        n_answers = {row["subtask"]: row["n_total"] for row in mine if row["subtask"] not in covered}
        return sum(n_answers.values()) // answers.repeats


def open_run_evidence(folder: Path) -> RunEvidence:
    """The run in `folder`, also one that is not finished (`is_finished`).

    StoreError: no run, a file that is cut short or of another schema version, a record without what this version reads, rows twice.
    """
    about = read_run(folder)
    require_about(folder / "run.json", about)
    tasks, diagnostics = read_lines(folder / "tasks.jsonl"), read_lines(folder / "diagnostics.jsonl")
    require_rows(folder / "tasks.jsonl", tasks, TASK_ROW)
    require_diagnostics(folder / "diagnostics.jsonl", diagnostics)
    primary = [_marked(row) for row in tasks if row["metric"] == row["primary"]]
    require_once(folder / "tasks.jsonl", (f"{row['variant']} in {row['task']}" for row in primary))
    return RunEvidence(
        folder=folder,
        about=about,
        variants={variant["name"]: variant for variant in about["variants"]},
        tasks=tuple(dict.fromkeys(row["task"] for row in tasks)),
        rows={(row["variant"], row["task"]): row for row in primary},
        diagnostics={row["variant"]: row for row in diagnostics},
    )


def pair(baseline: Answers, candidate: Answers) -> Pairing:
    """The answers of two variants to the same questions, by what was asked or, where that is not known of either, by the source.

    A question that one of the two lacks, or did not score, is in no pair and lowers the coverage.
    """
    from harness.paired import QuestionPair

    is_by_source = any(side.is_imported or side.without_requests for side in (baseline, candidate))
    ours, theirs = (_by_source(side) if is_by_source else side.questions for side in (baseline, candidate))
    keys = list(dict.fromkeys([*ours, *theirs]))
    both = _with_joined_clusters([(ours[key], theirs[key]) for key in keys if key in ours and key in theirs])
    scored = [(b, c) for b, c in both if b.mean is not None and c.mean is not None]
    pairs = tuple(
        QuestionPair(b.mean, c.mean, b.cluster, b.n_scored, c.n_scored)
        for b, c in scored
        if b.mean is not None and c.mean is not None
    )
    shares = []
    for side, asked, repeats in ((0, ours, baseline.repeats), (1, theirs, candidate.repeats)):
        n_asked = sum(max(repeats, len(asked[key].scores)) if key in asked else repeats for key in keys)
        shares.append(sum(pair[side].n_scored for pair in scored) / n_asked if keys else 0.0)
    return Pairing(pairs, tuple(scored), len(keys), "question" if is_by_source else "request", min(shares))


def _with_joined_clusters(both: list[tuple[Question, Question]]) -> list[tuple[Question, Question]]:
    """The pairs, those with a source, a request or a cluster in common in one cluster, which has the least of their names."""
    parents: dict[tuple[str, str], tuple[str, str]] = {}

    def root(mark: tuple[str, str]) -> tuple[str, str]:
        while parents.setdefault(mark, mark) != mark:
            parents[mark] = parents[parents[mark]]
            mark = parents[mark]
        return mark

    for ours, theirs in both:
        first = root(("cluster", ours.cluster))
        for question in (ours, theirs):
            marks = [("cluster", question.cluster), ("source", question.question), *(("request", r) for r in question.requests)]
            for mark in marks:
                parents[root(mark)] = first
    names: dict[tuple[str, str], str] = {}
    for ours, _ in both:
        place = root(("cluster", ours.cluster))
        names[place] = min(ours.cluster, names.get(place, ours.cluster))
    joined = [names[root(("cluster", ours.cluster))] for ours, _ in both]
    return [(replace(b, cluster=cluster), replace(c, cluster=cluster)) for (b, c), cluster in zip(both, joined, strict=True)]


def _marked(row: dict[str, Any]) -> dict[str, Any]:
    """What was imported has the mark of it, whatever its flags say."""
    flags = row.get("flags")
    if not row.get("imported") or not isinstance(flags, list) or "imported" in flags:
        return row
    return {**row, "flags": [*flags, "imported"]}


def _require_same_amounts(path: Path, answers: Answers, n_uncovered: int) -> None:
    """StoreError unless each question that was asked is there, once, with all its repeats; of a share, which alone is evidence."""
    if answers.unit != "share":
        return
    repeats, n_questions = answers.repeats, len(answers.questions)
    short = next((q for q in answers.questions.values() if len(q.scores) != repeats), None)
    if short is not None:
        raise StoreError(
            f"{path}: question {short.doc} has {len(short.scores)} scores, tasks.jsonl says repeats = {repeats}; {AGAIN}"
        )
    said = answers.row["n_questions"]
    if said != n_questions + n_uncovered:
        parts = f" and {n_uncovered:,} of subtasks without {answers.metric}" if n_uncovered else ""
        raise StoreError(f"{path}: has {n_questions:,} questions{parts}, tasks.jsonl says n_questions = {said:,}; {AGAIN}")


def _require_same_figures(path: Path, answers: Answers) -> None:
    """StoreError unless the scores come to what tasks.jsonl says of them: a file that lost lines, or is of another scoring."""
    row, questions = answers.row, answers.questions.values()
    found: dict[str, Any] = {"n_total": sum(len(question.scores) for question in questions)}
    if answers.unit == "share":
        means = [question.mean for question in questions if question.mean is not None]
        found |= {"n_scored": sum(question.n_scored for question in questions)}
        found |= {"value": math.fsum(means) / len(means) if means else None}
    for key, value in found.items():
        said = row[key]
        if said != value and not (said is not None and value is not None and math.isclose(said, value, abs_tol=1e-9)):
            raise StoreError(f"{path}: its scores come to {key} = {value}, tasks.jsonl says {said}; {AGAIN}")


def _by_source(answers: Answers) -> dict[str, Question]:
    return _keyed([(question.question, question) for question in answers.questions.values()])


def _questions(path: Path, rows: list[dict[str, Any]], variant: str, task: str, *, is_imported: bool) -> dict[str, Question]:
    require_rows(path, rows, SCORE_ROW)
    other = next((row for row in rows if (row["variant"], row["task"]) != (variant, task)), None)
    if other is not None:
        raise StoreError(
            f"{path}: has the scores of {other['variant']} in {other['task']}, not of {variant} in {task}; their files have one name, so "
            "give the variant or the task another one and run the suite again"
        )
    require_once(path, (f"question {row['doc']}" for row in rows))
    made = [_question(path, row) for row in rows]
    return _keyed([(q.question if is_imported or not q.requests else q.requests[0], q) for q in made])


def _keyed(found: list[tuple[str, Question]]) -> dict[str, Question]:
    """By key; questions that share one are numbered from the second on, in the order of the task."""
    times: Counter[str] = Counter()
    keyed = {}
    for key, question in found:
        times[key] += 1
        name = key if times[key] == 1 else f"{key}#{times[key]}"
        keyed[name] = Question(**{**vars(question), "key": name})
    return keyed


def _question(path: Path, row: dict[str, Any]) -> Question:
    lists = {key: tuple(row[key]) for key in ("scores", "seeds", "n_tokens", "incomplete", "truncated", "missing")}
    if len({len(each) for each in lists.values()}) > 1 or not lists["scores"]:
        raise StoreError(f"{path}: question {row['doc']} has not as many of everything as repeats; {AGAIN}")
    return Question(
        key="",
        doc=row["doc"],
        question=row["question"],
        cluster=row["cluster"],
        subtask=row["subtask"],
        **lists,
        requests=tuple(each for each in row["requests"] if each is not None),
    )
