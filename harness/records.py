"""The result records of a run, with a schema version on each, and the folder that holds them.

<results>/<suite>/<run id>/
    run.json                       what was asked, resolved; provenance; stages and their keys
    tasks.jsonl                    a row a (variant, task, metric)
    subtasks.jsonl                 a row a (variant, task, subtask, metric), of tasks with several; where there is one
    diagnostics.jsonl              a row a variant
    diagnostics_sequences.jsonl    a row a (variant, sequence): what paired differences need
    training/<variant>.jsonl       a row a step, and a row a validation; .svg and .png beside it are its figure
    tasks/<task>/                  what was asked: task.json, docs.jsonl.zst, requests.jsonl.zst
    samples/<variant>.<task>.jsonl.zst
                                   a row a (question, repeat): what was answered, what it was worth
    scores/<variant>.<task>.jsonl  a row a question: what its answers were worth, without text (`score_files`)
    table.json, table.md, table.csv, table.tex
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.store import StoredStage, disk_errors, make_folder, write_json, write_text

SCHEMA = 1
_NOT_IN_ROWS = ("metrics", "subtasks", "notes", "excluded")
MARKER = "harness-results.json"
_SHOWN = 3
"""Runs that are named where one is to be chosen."""


def open_results(folder: Path) -> Path:
    """The results folder, made if it is missing or empty; StoreError if it is something else's."""
    with disk_errors(f"the results folder {folder}"):
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"--results {folder}: is a file; give a folder")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise StoreError(
                f"--results {folder}: not empty and not a results folder of this harness (it has no {MARKER}); give another"
            )
        make_folder(folder, "the results folder")
        if not (folder / MARKER).is_file():
            write_json(
                folder / MARKER, {"schema": SCHEMA, "what": "results of qad-harness; journals/ holds paid-for responses"}
            )
    return folder


def open_run(
    results: Path,
    suite: str,
    digest: str,
    *,
    has_work: bool,
    imported: Sequence[list[str]] = (),
    read_by: Mapping[str, Any] | None = None,
) -> Path:
    """The folder of the run with this plan: the one that exists, or a new one named by time and plan.

    A complete run is never written again: where work is left although it is complete (the cache was deleted), or where it lists other
    imported results than those of these identities, or other settings that results are read by, or does not say that it is no rehearsal, a new
    one begins. A rehearsal is never gone on with, complete or not.
    """
    for path in sorted((results / suite).glob("*/run.json"), reverse=True):
        with contextlib.suppress(StoreError):  # an older run that cannot be read is not this one
            about = read_json(path)
            listed = [each["identity"] for each in about.get("imported", ())]
            read = {key: about["resolved"].get(key) for key in read_by or ()}
            is_current = (
                not has_work
                and about.get("rehearsal") is False
                and listed == list(imported)
                and read == json.loads(json.dumps(read_by or {}))
            )
            if about.get("rehearsal"):  # what it had made is gone
                continue
            if about.get("plan") == digest and (is_current or about.get("status") != "complete"):
                return path.parent
    folder = results / suite / f"{time.strftime('%Y%m%d-%H%M%S')}-{digest[:8]}"
    make_folder(folder, "the results folder")
    return folder


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of a run folder; StoreError that names the newest runs where the folder is one of runs."""
    if not (folder / "run.json").is_file():
        runs = sorted((path.parent.name for path in folder.glob("*/run.json")), reverse=True)
        if runs:
            raise StoreError(f"{folder}: holds runs, and is none itself; give one of them, such as {', '.join(runs[:_SHOWN])}")
        raise StoreError(
            f"{folder}: no run.json: this is no run folder, such as results/<suite>/<run id>, or its run was killed before it wrote one; "
            "run the same suite again"
        )
    return read_json(folder / "run.json")


def is_complete(run: Path) -> bool:
    """Whether the run folder has a record of all its stages."""
    return (run / "run.json").is_file() and read_json(run / "run.json")["status"] == "complete"


def write_rows(
    folder: Path,
    stages: list[tuple[Any, StoredStage]],
    imported: Sequence[dict[str, Any]] = (),
    *,
    is_rehearsal: bool = False,
) -> None:
    """Write the row files and samples of a run from its finished stages, given as (planned stage, stored stage).

    imported: rows of tasks.jsonl that were scored elsewhere; they stand last. is_rehearsal: every row says so.
    """
    mark = rehearsal_mark(is_rehearsal)
    tasks, subtasks, diagnostics, sequences = [], [], [], []
    with disk_errors(f"the run folder {folder}"):
        for stage, stored in stages:
            if stage.kind == "prepare":
                for name in ("task.json", "docs.jsonl.zst", "requests.jsonl.zst"):
                    _copy(stored.folder / name, folder / "tasks" / stage.task.name / name)
            elif stage.kind == "score":
                result = read_json(stored.folder / "result.json")
                tasks += task_rows(stage.variant.name, stage.task.name, result)
                subtasks += subtask_rows(stage.variant.name, stage.task.name, result)
                _copy(
                    stored.folder / "samples.jsonl.zst",
                    folder / "samples" / f"{stage.variant.name}.{stage.task.name}.jsonl.zst",
                )
            elif stage.kind == "diagnostics":
                result = read_json(stored.folder / "result.json")
                diagnostics.append({"schema": SCHEMA, "variant": stage.variant.name, **result})
                rows = read_lines(stored.folder / "sequences.jsonl")
                sequences += [{"schema": SCHEMA, "variant": stage.variant.name, **row} for row in rows]
            elif stage.kind == "train":
                _copy(stored.folder / "training.jsonl", folder / "training" / f"{stage.variant.name}.jsonl")
        write_lines(folder / "tasks.jsonl", [row | mark for row in (*tasks, *imported)])
        write_subtasks(folder, [row | mark for row in subtasks])
        write_lines(folder / "diagnostics.jsonl", [row | mark for row in diagnostics])
        write_lines(folder / "diagnostics_sequences.jsonl", [row | mark for row in sequences])


def rehearsal_mark(is_rehearsal: bool | None) -> dict[str, bool]:
    """What every row of a rehearsal says; nothing of another run."""
    return {"rehearsal": True} if is_rehearsal else {}


def write_subtasks(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write subtasks.jsonl, where any task has subtasks; without one there is no such file."""
    if rows:
        write_lines(folder / "subtasks.jsonl", rows)
    else:
        (folder / "subtasks.jsonl").unlink(missing_ok=True)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as JSON lines, atomically."""
    write_text(path, "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows))


def write_samples(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Sample rows as zstd-compressed JSON lines, atomically."""
    import zstandard

    lines = bytearray()  # not a list of texts to join: the prompts of a task may have 100 MB
    for row in rows:
        lines += json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(zstandard.compress(lines))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_samples(path: Path) -> list[dict[str, Any]] | None:
    """What `write_samples` wrote; None if it is not kept, StoreError if it is damaged."""
    if not path.is_file():
        return None
    import zstandard

    try:
        return [json.loads(line) for line in zstandard.decompress(path.read_bytes()).splitlines()]
    except (zstandard.ZstdError, ValueError) as error:
        raise StoreError(f"{path}: damaged ({error}); run the suite again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; StoreError that names the file if it is missing, cut short or of another schema."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path}: not a JSON object")
    if value.get("schema") != SCHEMA:
        raise StoreError(f"{path}: schema {value.get('schema')}, this version reads {SCHEMA}; use the version that wrote it")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; StoreError that names file and line if one is damaged."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: cannot be read, it is no text ({error})") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if row["schema"] != SCHEMA:
                raise StoreError(f"{path}: line {number} has schema {row['schema']}, this version reads {SCHEMA}")
            rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: line {number} is damaged ({error})") from error
    return rows


def task_rows(variant: str, task: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a metric of what scoring a task came to."""
    shared = {key: value for key, value in result.items() if key not in _NOT_IN_ROWS}
    return [
        {**shared, "schema": SCHEMA, "variant": variant, "task": task, "metric": metric, **values}
        for metric, values in result["metrics"].items()
    ]


def subtask_rows(variant: str, task: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a subtask and metric of a task that has several subtasks; none of another."""
    return [
        {"schema": SCHEMA, "variant": variant, "task": task, "subtask": name, "metric": metric, **values}
        for name, metrics in result.get("subtasks", {}).items()
        for metric, values in metrics.items()
    ]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True, parents=True)
    partial = target.with_name(f".{target.name}")
    shutil.copyfile(source, partial)
    partial.replace(target)
