"""The sample rows of a run, from its folder alone and one at a time: a file may hold far more text than fits in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import StoreError
from harness.null_variants import baseline_of
from harness.records import SCHEMA, read_json, read_lines, read_run

if TYPE_CHECKING:
    from harness.schema_evaluation import Thinking

_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class TaskRecord:
    """A task of a run: the metric that stands in the table, by variant its value, and the variants whose samples are kept.

    is_publishable: whether its text may stand in a page; not unless the run says so. excluded: (question, why it was never asked).
    higher_is_better: of that metric; None, not recorded, is taken as if it were.
    """

    name: str
    primary: str
    is_publishable: bool
    values: dict[str, dict[str, Any]]
    variants: tuple[str, ...]
    excluded: tuple[tuple[int, str], ...]
    higher_is_better: bool | None = None

    def is_worse(self, candidate: float, baseline: float) -> bool:
        """Whether the first score is worse than the second."""
        return candidate > baseline if self.higher_is_better is False else candidate < baseline

    def grade(self, score: float | None) -> Literal["right", "wrong", "some", "none"]:
        """What a score says of an answer; one that has no upper end is never wrong altogether."""
        if score is None:
            return "none"
        if self.higher_is_better is False:
            return "right" if score <= 0 else "some"
        return "right" if score >= 1 else "wrong" if score <= 0 else "some"


@dataclass(frozen=True)
class Asked:
    """prompts: one, or one a choice where they differ. options: the texts that were weighed, in order; runs of older versions have none.

    images: what was shown, in order, as (digest, width, height).
    """

    prompts: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    images: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class RunSamples:
    """What there is to look at in a run folder. thinking: the markers of the model, None if it does not think."""

    folder: Path
    name: str
    variants: tuple[str, ...]
    baseline: str | None
    thinking: Thinking | None
    tasks: dict[str, TaskRecord]

    def rows(self, variant: str, task: str) -> Iterator[dict[str, Any]]:
        """The rows of a variant in a task, in the order of the file; StoreError if the file is damaged or of another version."""
        return stream_samples(samples_path(self.folder, variant, task))

    def asked(self, task: str, docs: set[int]) -> dict[int, Asked]:
        """What was asked in these questions of a task; nothing of what is not kept."""
        path = self.folder / "tasks" / task / "requests.jsonl.zst"
        found: dict[int, Asked] = {}
        for _, row in _rows(path) if path.is_file() else ():
            if row["doc"] in docs:
                mine = found.setdefault(row["doc"], Asked())
                mine.prompts.extend([] if row["prompt"] in mine.prompts else [row["prompt"]])
                mine.options.extend([row["option"]] if row.get("option") is not None and row["part"] == 0 else [])
                shown = zip(row.get("images", ()), row.get("image_sizes", ()), strict=True)
                mine.images.extend([] if mine.images else [(digest, *size) for digest, size in shown])
        return found


def open_samples(folder: Path) -> RunSamples:
    """The run in `folder`; StoreError if it is no run, or none of its samples are there."""
    from pydantic import ValidationError  # slow to import, and tables need the names of this module alone

    from harness.schema_evaluation import Thinking

    about, rows = read_run(folder), read_lines(folder / "tasks.jsonl")
    try:
        variants = tuple(variant["name"] for variant in about["variants"])
        baseline = baseline_of(about["variants"])
        markers = about["resolved"]["model"].get("thinking")
        thinking = None if markers is None else Thinking(**markers)
        tasks = {name: _task(folder, name, variants, rows) for name in dict.fromkeys(row["task"] for row in rows)}
    except (KeyError, TypeError) as error:
        raise StoreError(f"{folder}: not a run of this version, a record lacks {error}; run the suite again") from error
    except ValidationError as error:
        raise StoreError(
            f"{folder}: run.json marks thinking as this version does not know it (model.thinking.{error.errors()[0]['loc'][0]}); look at it "
            "with the version that wrote it, or run the suite again"
        ) from error
    if not any(task.variants for task in tasks.values()):
        raise StoreError(
            f"{folder}: this run has no samples ({folder / 'samples'} is missing or empty), so there is nothing to look at; "
            "samples are written with the first scored task and are not copied with a table"
        )
    mark = "REHEARSAL of " if about.get("rehearsal") else ""
    return RunSamples(folder, f"{mark}{about['suite']} {about['run']}", variants, baseline, thinking, tasks)


def samples_path(folder: Path, variant: str, task: str) -> Path:
    """Where the samples of a variant in a task lie in a run folder."""
    return folder / "samples" / f"{variant}.{task}.jsonl.zst"


def question_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What is equal for one question under all variants: its number in the task or, imported, the digest of its source."""
    return ("source", row["question"]) if row.get("imported") else ("doc", row["doc"])


def stream_samples(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a samples file, one at a time; StoreError that says what is wrong with the file, also where it is cut short."""
    for number, row in _rows(path):
        if row.get("schema") != SCHEMA or "doc" not in row:
            raise StoreError(
                f"{path}: line {number} was written by another version; run the suite again to have its samples written anew "
                "(responses are kept)"
            )
        yield row


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, row) of compressed JSON lines."""
    import zstandard

    try:
        for number, line in enumerate(_lines(path), start=1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield number, row
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    except (zstandard.ZstdError, ValueError) as error:
        raise StoreError(f"{path}: damaged ({error}); run the suite again") from error


def _lines(path: Path) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor().decompressobj()
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            *lines, rest = (rest + decompressor.decompress(chunk)).split(b"\n")
            yield from lines
    if not decompressor.eof or decompressor.unused_data or rest:
        raise ValueError("cut short" if not decompressor.eof else "something follows the last line")


def _task(folder: Path, name: str, variants: tuple[str, ...], rows: list[dict[str, Any]]) -> TaskRecord:
    mine = [row for row in rows if row["task"] == name]
    primary = mine[0]["primary"]
    return TaskRecord(
        name=name,
        primary=primary,
        is_publishable=all(row.get("publishable") is True for row in mine),
        values={row["variant"]: row for row in mine if row["metric"] == primary},
        variants=tuple(variant for variant in variants if samples_path(folder, variant, name).is_file()),
        excluded=_excluded(folder / "tasks" / name / "task.json"),
        higher_is_better=next((row.get("higher_is_better") for row in mine if row["metric"] == primary), None),
    )


def _excluded(path: Path) -> tuple[tuple[int, str], ...]:
    return tuple((each["doc"], each["reason"]) for each in read_json(path)["excluded"]) if path.is_file() else ()
