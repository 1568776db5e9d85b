"""Score the recorded answers of a run again, from the run folder alone: no model, no cache, no data set."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.provenance import PACKAGES, package_versions
from harness.records import (
    SCHEMA,
    read_json,
    read_lines,
    read_run,
    read_samples,
    rehearsal_mark,
    subtask_rows,
    task_rows,
    write_lines,
    write_samples,
    write_subtasks,
)
from harness.score_files import score_rows, scores_path, write_scores
from harness.store import disk_errors, make_folder, write_json
from harness.tables import write_tables
from harness.task_settings import task_of

_OF_THE_ENGINE = ("kernels", "flags", "repeats", "judge")


def rescore(run: Path) -> list[str]:
    """Score every task of the run folder with the scorers of this version; returns what changed, a line a task and variant.

    No file of the run changes before all is scored and written beside it: it may hold the only copy of its answers.

    Raises:
        StoreError: no run folder, one without what was asked and answered, or one of another version.
        TaskError: a task that is not there any more.
    """
    from harness import evaluation
    from harness.prepared import read_questions

    with _of_this_version(run):
        about, rows = read_run(run), read_lines(run / "tasks.jsonl")
        tasks = {record["name"]: task_of(record) for record in about["resolved"]["tasks"]}
        done = {(row["variant"], row["task"]): row for row in rows if not row.get("imported")}
        pairs = {pair: (tasks[pair[1]], _engine_of(row)) for pair, row in done.items()}
    found, parts, lines = [], [], []
    scored: dict[Path, Path] = {}
    try:
        with disk_errors(f"the run folder {run}"):
            for (variant, name), (task, engine) in pairs.items():
                samples, folder = run / "samples" / f"{variant}.{name}.jsonl.zst", run / "tasks" / name
                answers = read_samples(samples)
                if answers is None or not (folder / "docs.jsonl.zst").is_file():
                    raise StoreError(f"{run}: {variant} {name}: what was asked and answered is not kept; run the suite again")
                with _of_this_version(run):
                    asked, questions = read_json(folder / "task.json"), read_questions(folder)
                    before = {sample["scorer"] for sample in answers}
                samples_now, result = evaluation.score_task(task, asked, questions, answers, engine)
                scored[samples] = samples.with_name(f".{samples.name}.scored")
                write_samples(scored[samples], samples_now)
                scores = scores_path(run, variant, name)
                make_folder(scores.parent, "the run folder")
                scored[scores] = scores.with_name(f".{scores.name}.scored")
                write_lines(scored[scores], score_rows(variant, name, samples_now, result["primary"]))
                found += task_rows(variant, name, result)
                parts += subtask_rows(variant, name, result)
                lines.append(_change(variant, name, done[variant, name], result, before))
            for path, partial in scored.items():
                partial.replace(path)
            imported = [row for row in rows if row.get("imported")]
            write_scores(run, imported)
            write_lines(run / "tasks.jsonl", [row | rehearsal_mark(about.get("rehearsal")) for row in (*found, *imported)])
            write_subtasks(run, [row | rehearsal_mark(about.get("rehearsal")) for row in parts])
            now = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "packages": package_versions(PACKAGES["score"])}
            write_json(run / "run.json", {**about, "schema": SCHEMA, "rescored": [*about.get("rescored", ()), now]})
            write_tables(run)
    finally:
        for partial in scored.values():
            partial.unlink(missing_ok=True)
    return lines


@contextlib.contextmanager
def _of_this_version(run: Path) -> Iterator[None]:
    """StoreError for records that lack what this version writes, or hold what it does not know."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{run}: not a run that this version can score, its records lack or add {str(error).splitlines()[0]}; score it with the "
            "version that wrote it, or run the suite again (responses are kept)"
        ) from error


def _engine_of(row: dict[str, Any]) -> dict[str, Any]:
    """What is known of what answered; older rows say less of the engine."""
    return {key: row[key] for key in _OF_THE_ENGINE} | {key: row.get(key) for key in ("engine", "sampling_seed")}


def _change(variant: str, name: str, row: dict[str, Any], result: dict[str, Any], scorers: set[str]) -> str:
    primary = result["primary"]
    now = result["metrics"][primary]["value"]
    score = "no score" if now is None else f"{100 * now:.1f} % {primary}"
    changed = "same scorer" if scorers == {result["scorer"]} else f"scorer {', '.join(sorted(scorers))} -> {result['scorer']}"
    return f"{variant} {name}: {score}, {result['n_questions']:,} questions ({changed})"
