"""The scores of a run without text: a small file a (variant, task) that comparisons, gates and sites read, and that may be published.

<run>/scores/<variant>.<task>.jsonl   a line a question, of the metric that stands in the table; lists have an entry a repeat

    variant, task                     whose: names may hold dots, so that the name of the file could be of two pairs
    doc, question, cluster, subtask   its number, the digest of its source, a digest of what it errs with, its part of the task
    scores                            null: there is none
    requests                          a digest of the hashes of all that was asked; null: asked elsewhere, not known
    seeds, n_tokens                   of the draw; of the answer
    incomplete, truncated             whether the answer ended before it said anything; whether it was cut
    missing                           why there is no score, as a class: a server's words may hold the question

Samples hold all this and the text, which may not be published, and of which there may be gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.records import SCHEMA, read_lines, write_lines
from harness.store import disk_errors, make_folder

_CLASSES = (
    (r"no answer within", "timeout"),
    (r"no connection|the connection was cut", "connection"),
    (r"not in .*results", "not in the results"),
)


def scores_path(folder: Path, variant: str, task: str) -> Path:
    """Where the scores of a variant in a task lie in a run folder."""
    return folder / "scores" / f"{variant}.{task}.jsonl"


def write_scores(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the scores of a run folder from the samples that lie in it, own and imported, for these rows of its tasks.jsonl."""
    from harness.samples import samples_path, stream_samples

    for row in rows:
        samples = samples_path(folder, row["variant"], row["task"])
        if row["metric"] == row["primary"] and samples.is_file():
            path = scores_path(folder, row["variant"], row["task"])
            make_folder(path.parent, "the run folder")
            write_lines(path, score_rows(row["variant"], row["task"], stream_samples(samples), row["primary"]))


def write_missing_scores(folder: Path) -> None:
    """`write_scores` of a run made before there were any, or before they said whose they are, or that lost some."""
    rows = read_lines(folder / "tasks.jsonl")
    with disk_errors(f"the run folder {folder}"):
        write_scores(folder, [row for row in rows if not _says_whose(scores_path(folder, row["variant"], row["task"]))])


def _says_whose(path: Path) -> bool:
    """Whether the file is there, and of a version that writes whose scores they are."""
    return path.is_file() and all("variant" in row for row in read_lines(path))


def score_rows(variant: str, task: str, samples: Iterable[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The rows of one scores file from the sample rows of a variant in a task. A question that the metric does not cover has none."""
    by_doc: dict[int, list[dict[str, Any]]] = {}
    for row in samples:
        if metric in row["metrics"]:
            by_doc.setdefault(row["doc"], []).append(_of_repeat(row, metric))
    whose = {"schema": SCHEMA, "variant": variant, "task": task}
    return [whose | _of_question(sorted(rows, key=lambda row: row["repeat"])) for _, rows in sorted(by_doc.items())]


def missing_class(reason: str) -> str:
    """Why a response is missing, without any text of a server, a question or an answer."""
    status = re.match(r"(?:status|HTTP) (\d{3})\b", reason)
    if status:
        return f"status {status.group(1)}"
    return next((name for pattern, name in _CLASSES if re.match(pattern, reason)), "other")


def _of_repeat(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """One sample without its text, so that never more than one text is held."""
    value = row["metrics"][metric]
    is_number = isinstance(value, int | float)
    requests = row["requests"]
    return {
        **{key: row[key] for key in ("doc", "question", "subtask", "repeat", "seed", "n_tokens")},
        "cluster": hashlib.sha256(str(row["cluster"]).encode(errors="surrogatepass")).hexdigest()[:16],
        "score": float(value) if is_number else None,
        "request": hashlib.sha256(json.dumps(requests).encode()).hexdigest() if requests else None,
        "incomplete": row["is_incomplete"],
        "truncated": row["is_truncated"],
        "missing": _missing(row, value),
    }


def _missing(row: dict[str, Any], value: Any) -> str | None:
    if row["missing"] is not None:
        return missing_class(row["missing"])
    return "no verdict" if value is None and row.get("judged") is not None else None


def _of_question(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    lists = {
        "scores": "score",
        "requests": "request",
        "seeds": "seed",
        **{key: key for key in ("n_tokens", "incomplete", "truncated", "missing")},
    }
    return {
        **{key: repeats[0][key] for key in ("doc", "question", "cluster", "subtask")},
        **{name: [row[key] for row in repeats] for name, key in lists.items()},
    }
