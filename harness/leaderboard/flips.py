"""Questions that became worse or better from BF16 to a variant: counts, and the first characters of their digests.

From the text-free files in `scores/` of a run; a run without them has no flips.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.leaderboard.reading import rows_of
from harness.records import SCHEMA

MOST_LISTED = 20
"""Digests listed each way; the counts are of all."""
_DIGEST_LENGTH = 12

_LINE = re.compile(
    rb'\{"cluster": "\w*", "doc": (\d+), "incomplete": LIST, "missing": LIST, "n_tokens": LIST, "question": "(\w+)", "requests": (LIST), '
    rb'"schema": %d, "scores": (LIST), "seeds": LIST, "subtask": "[^"\\]*", "task": "([^"\\]*)", "truncated": LIST, '
    rb'"variant": "([^"\\]*)"\}\n'.replace(b"LIST", rb"\[[^][]*\]")
    % SCHEMA
)
"""A line as `write_lines` writes it; a file with any other is parsed as JSON, which takes five times as long."""

Scores = dict[tuple[int, str], tuple[bytes, float]]
"""By (number, digest) of a question: the digests of what was asked, as JSON, and the mean of its scored repeats."""


def flips_of(folder: Path, baseline: str | None, variants: list[str], tasks: list[str]) -> list[dict[str, Any]]:
    """A row a (variant, task) that can be paired with the baseline, in the given order.

    Questions count only where both were asked the same thing; repeats are averaged first. Raises StoreError for a damaged file.
    """
    if baseline is None:
        return []
    there = {path.name: path for path in (folder / "scores").glob("*.jsonl")}
    found = []
    for task in tasks:
        first = _scores(there, baseline, task)
        if not first:
            continue
        for variant in variants:
            second = _scores(there, variant, task) if variant != baseline else None
            if second:
                found.append({"variant": variant, "task": task, **_compare(first, second)})
    return found


def _compare(first: Scores, second: Scores) -> dict[str, Any]:
    worse: list[str] = []
    better: list[str] = []
    n = 0
    for key, (asked, score) in first.items():
        other = second.get(key)
        if other is None or other[0] != asked:
            continue
        n += 1
        if other[1] != score:
            (worse if other[1] < score else better).append(key[1][:_DIGEST_LENGTH])
    return {
        "n": n,
        "worse": len(worse),
        "better": len(better),
        "worse_questions": sorted(worse)[:MOST_LISTED],
        "better_questions": sorted(better)[:MOST_LISTED],
    }


def _scores(there: dict[str, Path], variant: str, task: str) -> Scores:
    path = there.get(f"{variant}.{task}.jsonl")
    if path is None:
        return {}
    try:
        found = _quickly(path.read_bytes(), variant, task)
        return _as_json(path, variant, task) if found is None else found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: damaged ({error}); score the run again (harness score)") from error


def _quickly(text: bytes, variant: str, task: str) -> Scores | None:
    """The scores of a file all of whose lines are as `_LINE` and of this variant and task; None for any other."""
    whose = (task.encode(), variant.encode())
    means: dict[bytes, float | None] = {}
    found: Scores = {}
    end = 0
    for line in _LINE.finditer(text):
        doc, question, requests, scores, *of = line.groups()
        if line.start() != end or tuple(of) != whose:
            return None
        end = line.end()
        if scores not in means:
            means[scores] = _mean(json.loads(scores))
        mean = means[scores]
        if mean is not None:
            found[int(doc), question.decode()] = (requests, mean)
    return found if end == len(text) else None


def _as_json(path: Path, variant: str, task: str) -> Scores:
    found: Scores = {}
    for row in rows_of(path):
        if (row["variant"], row["task"]) != (variant, task):
            raise ValueError(f"has the scores of {row['variant']} in {row['task']}")
        mean = _mean(row["scores"])
        if mean is not None:
            found[row["doc"], str(row["question"])] = (json.dumps(row["requests"]).encode(), mean)
    return found


def _mean(scores: list[float | None]) -> float | None:
    """Of the repeats that are scored. ValueError for what is no finite number."""
    scored = [score for score in scores if score is not None]
    if not all(map(math.isfinite, scored)):
        raise ValueError("a score is no finite number")
    return math.fsum(scored) / len(scored) if scored else None
