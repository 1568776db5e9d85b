"""Mirrors with made-up rows of the sets that ask about pictures, in their schemas, with pictures that are rendered here; gold answers."""

import json
import random

import pyarrow
from pyarrow import parquet

from harness.rehearsal_pictures import SETS, picture

__all__ = ["SETS", "as_jsonl", "gold", "made_up", "picture", "wrong"]


def made_up(mirror, task, n=100, change=lambda row: row):
    """Write a mirror with n rows of the schema of a task's set, in two parquet files of row groups of 10."""
    start, row_of, _ = SETS[task]
    rows = [change(row_of(i)) for i in range(n)]
    path = mirror / start
    path.parent.mkdir(parents=True, exist_ok=True)
    for part, mine in enumerate((rows[: (n + 1) // 2], rows[(n + 1) // 2 :])):
        if not mine:
            continue
        parquet.write_table(pyarrow.Table.from_pylist(mine), f"{path}-0000{part}-of-00002.parquet", row_group_size=10)
    return rows


def as_jsonl(mirror, task, rows):
    """Write the same rows as lines of JSON, their pictures as files beside them."""
    start = SETS[task][0]
    folder = mirror / "/".join(start.split("/")[:2])
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        row = dict(row)
        for name, value in row.items():
            if isinstance(value, dict):
                row[name] = f"pictures/{number}-{name}"
                (folder / row[name]).write_bytes(value["bytes"])
        lines.append(json.dumps(row))
    path = mirror / f"{start}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def gold(task, doc):
    """An answer to a document that deserves the most its metric gives."""
    rng = random.Random(doc["source_question"])
    if task in ("ai2d", "mmmu") and doc["options"]:
        letter = doc["answer"] if task == "ai2d" else doc["answers"][0]
        return rng.choice(["%s", "(%s)", "Answer: %s", r"\boxed{%s}", "**%s.**", "I think\n%s"]) % letter
    if task == "ocrbench":
        return f"It says {doc['answers'][0]}, I think."
    answer = doc["answer"] if task == "chartqa" else doc["answers"][0]
    return rng.choice(["%s", "Answer: %s", "The answer is %s.", "**%s**", "So\n\nFinal answer: **%s**"]) % answer


def wrong(task, doc):
    """An answer that deserves nothing: where there are options, another letter."""
    if task in ("ai2d", "mmmu") and doc["options"]:
        letter = doc["answer"] if task == "ai2d" else doc["answers"][0]
        return "B" if letter == "A" else "A"
    return "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"
