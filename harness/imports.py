"""Results of tasks that were scored elsewhere: brought in as sample rows, kept with the results, shown as imported. No torch.

<results>/imported/<suite>/<variant>.<task>.jsonl.zst   a row a (question, repeat), as scoring writes them
<results>/imported/<suite>/<variant>.<task>.json        where they came from, and what they come to

They are no part of any stage and of no key. Each run of the suite lists them beside its own, under the digest of the source question, by
which they are paired. Nothing here proves which weights answered: that is the word of whoever imports.
"""

from __future__ import annotations

import difflib
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import DataError, StoreError, SuiteError
from harness.foreign_results import Foreign, ForeignRow, read_foreign
from harness.prepared import question_digest
from harness.records import SCHEMA, open_results, read_json, task_rows, write_samples
from harness.store import disk_errors, make_folder, sha256, write_json

if TYPE_CHECKING:
    from harness.plan import Plan

FLAG = "imported"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Imported:
    """Imported results of one variant in one task. record: provenance, and the result as scoring would have written it."""

    variant: str
    task: str
    samples: Path
    record: dict[str, Any]

    @property
    def identity(self) -> list[str]:
        """What a run has to have listed to be of these results."""
        return [self.variant, self.task, self.record["samples_sha256"], self.record["result"]["primary"]]

    def rows(self) -> list[dict[str, Any]]:
        """Its rows of tasks.jsonl."""
        return task_rows(self.variant, self.task, self.record["result"])

    def about(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {"identity": self.identity, **self.record["result"]["imported"]}


def import_results(
    suite: Path, variant: str, task: str, files: list[Path], results: Path, *, tool: str = "auto", metric: str | None = None
) -> list[str]:
    """Bring in what another tool scored; returns what was brought in, in words.

    Args:
        files: all of one evaluation; of a tool that writes a file a repeat, all of them.
        metric: what stands in the table; the tool's own headline metric where nothing is said.
    Raises:
        SuiteError: no such variant, or a task that the suite runs itself.  DataError: files that are not understood, rows without a
        question, a response that is there twice.  StoreError: other results of this variant and task were imported before.
    """
    name = _checked(suite, variant, task)
    found = read_foreign(files, tool)
    rows, notes = sample_rows(found, task)
    source = {
        "tool": found.tool,
        **found.about,
        "files": [{"name": path.name, "sha256": sha256(path)} for path in files],
        "imported": time.strftime("%Y-%m-%d"),
    }
    result = _result(found, rows, source, metric, notes)
    folder = open_results(results) / "imported" / name
    samples = folder / f"{variant}.{task}.jsonl.zst"
    with disk_errors(f"the results folder {results}"):
        make_folder(folder, "the results folder")
        before = _read(samples)
        if before is not None and (before.variant, before.task) != (variant, task):
            raise StoreError(
                f"{samples}: holds results of {before.variant} in {before.task}, whose files have the same name; give the imported task "
                "another name (--task)"
            )
        if before is not None and before.about()["files"] != source["files"]:
            raise StoreError(
                f"{samples}: other results of {variant} in {task} were imported on {before.about()['imported']}; remove it and "
                f"{_record_path(samples).name} beside it to import these"
            )
        partial = samples.with_name(f".{samples.name}")
        try:
            write_samples(partial, rows)
            record = {"schema": SCHEMA, "variant": variant, "task": task, "samples_sha256": sha256(partial), "result": result}
            write_json(_record_path(samples), record)
            partial.replace(samples)
        finally:
            partial.unlink(missing_ok=True)
    shown = result["metrics"][result["primary"]]
    questions = f"{result['n_questions']:,} questions × {result['repeats']}"
    return [
        f"{variant} {task}: {questions} from {found.tool}, {result['primary']} {100 * shown['value']:.1f} %"
        if shown["value"] is not None
        else f"{variant} {task}: {questions} from {found.tool}, nothing scored",
        *(f"  {note}" for note in notes),
        f"  kept in {samples}; the next `harness run {suite}` lists it",
    ]


def imported_for(plan: Plan, results: Path) -> list[Imported]:
    """`find_imported` for the variants and tasks of a plan."""
    suite = plan.suite
    return find_imported(results, suite.name, [v.name for v in plan.variants], [task.name for task in suite.tasks])


def identities(plan: Plan, results: Path) -> list[list[str]]:
    """What a run of the plan has to have listed."""
    return [each.identity for each in imported_for(plan, results)]


def find_imported(results: Path, suite: str, variants: Iterable[str], tasks: Iterable[str]) -> list[Imported]:
    """What was imported for these variants of the suite, in their order.

    Raises:
        SuiteError: the suite meanwhile runs one of the tasks itself.  StoreError: a file is damaged.
    """
    names, ours = list(variants), list(tasks)
    found = [each for path in sorted((results / "imported" / suite).glob("*.jsonl.zst")) if (each := _read(path)) is not None]
    for each in found:
        if each.task in ours:
            raise SuiteError(
                f"{each.samples}: results of {each.task} were imported, and the suite runs {each.task} itself: which are meant is not "
                f"known; remove the imported file and {_record_path(each.samples).name}, or take the task from the suite"
            )
        if each.variant in names:
            _require_own_files(each.variant, each.task, names, ours)
    return sorted((each for each in found if each.variant in names), key=lambda each: (names.index(each.variant), each.task))


def copy_imported(found: Iterable[Imported], run: Path) -> list[dict[str, Any]]:
    """Put imported samples into a run folder; returns their rows of tasks.jsonl."""
    rows = []
    for each in found:
        target = run / "samples" / each.samples.name
        make_folder(target.parent, "the run folder")
        partial = target.with_name(f".{target.name}")
        shutil.copyfile(each.samples, partial)
        partial.replace(target)
        rows += each.rows()
    return rows


def sample_rows(found: Foreign, task: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Sample rows, by question and repeat, and what is to be known of them.

    A repeat that a question lacks is a row without a score, so that it counts as missing. DataError for a row without a question, and
    for one that is there twice.
    """
    notes = []
    is_by_text = _is_told_apart_by_text(found)
    if not is_by_text:
        notes.append(f"questions are known by {found.tool}'s own ids: paired with results of that tool alone")
    by_question: dict[str, dict[int, ForeignRow]] = {}
    for row in found.rows:
        known = row.text if is_by_text else row.identity
        if known is None:
            raise DataError(f"{row.where}: has neither the text of its question nor an id of it, so it could be any question's")
        repeats = by_question.setdefault(question_digest(known if is_by_text else f"{found.tool} {task} id {known}"), {})
        if row.repeat in repeats:
            raise DataError(
                f"{row.where}: the same question and repeat as {repeats[row.repeat].where}; give the files of one evaluation, each once"
            )
        repeats[row.repeat] = row
    numbers = sorted({row.repeat for row in found.rows})
    rows = [
        _sample(task, found, doc, digest, number, repeats.get(numbers[number]), next(iter(repeats.values())))
        for doc, (digest, repeats) in enumerate(by_question.items())
        for number in range(len(numbers))
    ]
    n_missing = sum(row["missing"] is not None for row in rows)
    return rows, notes + ([f"{n_missing:,} of {len(rows):,} responses are missing there"] if n_missing else [])


def _is_told_apart_by_text(found: Foreign) -> bool:
    """Whether the text of a question says which it is: not where it has none, asks about an image, or stands for several ids."""
    without = next((row for row in found.rows if row.text is None), None)
    if without is not None and any(row.text is not None for row in found.rows):
        raise DataError(
            f"{without.where}: has no text of its question, where other rows have; they could not be told apart for sure"
        )
    ids: dict[str, set[str]] = {}
    for row in found.rows:
        if row.text is not None and row.identity is not None:
            ids.setdefault(question_digest(row.text), set()).add(row.identity)
    return without is None and found.tool != "vlmevalkit" and all(len(of_text) == 1 for of_text in ids.values())


def _sample(
    task: str, found: Foreign, doc: int, digest: str, repeat: int, row: ForeignRow | None, any_row: ForeignRow
) -> dict[str, Any]:
    missing = f"not in {found.tool}'s results" if row is None else row.missing
    scores = dict.fromkeys(any_row.scores) if row is None else row.scores
    return {
        "schema": SCHEMA,
        "task": task,
        "subtask": task,
        "doc": doc,
        "question": digest,
        "cluster": any_row.cluster or digest,
        "requests": [],
        "repeat": repeat,
        "seed": None if row is None else row.seed,
        "prompt": any_row.prompt or any_row.text,
        "target": any_row.target,
        "scorer": " ".join([found.tool, *([found.about["tool_version"]] if "tool_version" in found.about else [])]),
        "stops": [],
        "response": None if row is None or row.response is None else [row.response],
        "answer": {} if row is None else row.answer,
        "metrics": scores,
        "finish_reason": None if row is None or row.finish_reason is None else [row.finish_reason],
        "n_tokens": None if row is None else row.n_tokens,
        "is_incomplete": None,
        "is_truncated": None if row is None or row.finish_reason is None else row.finish_reason == "length",
        "missing": missing,
        "seconds": None if row is None else row.seconds,
        "imported": True,
    }


def _result(
    found: Foreign, rows: list[dict[str, Any]], source: dict[str, Any], metric: str | None, notes: list[str]
) -> dict[str, Any]:
    from harness.aggregates import aggregate

    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    if metric is not None and metric not in names:
        near = difflib.get_close_matches(metric, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise DataError(f"--metric {metric}: the results have no such metric{hint} Known: {', '.join(names)}")
    figures = aggregate(
        rows,
        primary=metric or found.primary,
        aggregations={},
        repeats=len({row["repeat"] for row in rows}),
        higher_is_better=found.higher_is_better,
    )
    return figures | {
        "kernels": {"linear": "unknown"},
        "flags": [FLAG],
        "is_partial": found.is_partial,
        "version": found.about.get("task_version", "unknown"),
        "publishable": False,
        "notes": notes,
        "excluded": [],
        "scorer": rows[0]["scorer"],
        "imported": source,
    }


def _checked(path: Path, variant: str, task: str) -> str:
    """The name of the suite; SuiteError where it has no such variant, or runs the task itself."""
    from harness.suite import load_suite

    suite = load_suite(path)
    names = [each.name for each in suite.variants]
    if variant not in names:
        near = difflib.get_close_matches(variant, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise SuiteError(f"{path}: --variant {variant}: no such variant{hint} Known: {', '.join(names)}")
    if task in {each.name for each in suite.tasks}:
        raise SuiteError(
            f"{path}: --task {task}: the suite runs {task} itself, and a table cannot hold both; give the imported one another name, "
            "or take the task from the suite"
        )
    if not _NAME.fullmatch(task):
        raise SuiteError(
            f"--task {task}: not a name; letters, digits, '.', '_' and '-' are allowed, and a letter or digit first"
        )
    _require_own_files(variant, task, names, [each.name for each in suite.tasks])
    return suite.name


def _require_own_files(variant: str, task: str, variants: list[str], tasks: list[str]) -> None:
    """SuiteError where another pair of variant and task has files of the same name: names may hold dots."""
    for other in variants:
        same = next((each for each in tasks if f"{other}.{each}" == f"{variant}.{task}" and each != task), None)
        if same is not None:
            raise SuiteError(
                f"task {task} of {variant}, which is imported, and task {same} of {other} would both write samples/{variant}.{task}.jsonl.zst; "
                "give the imported task another name (--task)"
            )


def _read(samples: Path) -> Imported | None:
    """What is kept in this file and the record beside it; None if there is none."""
    if not samples.is_file():
        return None
    record = read_json(_record_path(samples))
    try:
        found = Imported(record["variant"], record["task"], samples, record)
        if samples.name != f"{found.variant}.{found.task}.jsonl.zst":
            raise StoreError(
                f"{samples}: its record is of {found.variant} in {found.task}; remove both and import the results again"
            )
        if sha256(samples) != record["samples_sha256"]:
            raise StoreError(f"{samples}: is not what was imported (its digest differs); remove it and import it again")
    except KeyError as error:
        raise StoreError(f"{_record_path(samples)}: lacks {error}; remove it and import its results again") from error
    return found


def _record_path(samples: Path) -> Path:
    return samples.with_name(samples.name.removesuffix(".jsonl.zst") + ".json")
