"""IFEval: prompts with instructions that code can check. The checkers are lm-eval's own; what they need is found before they are loaded.

lm-eval's package downloads NLTK's sentence model when it is imported, and langdetect draws random numbers: here the model must be
on this machine, and langdetect is seeded, so that a response always gets the same score.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import datasets

from harness.errors import DataError
from harness.tasks.needs import language_data, require
from harness.tasks.sources import RowSet, as_dataset, load_rows

ROWS = RowSet(
    "google/IFEval",
    "train",
    files=("train", "ifeval_input_data"),
    columns=("key", "prompt", "instruction_id_list", "kwargs"),
    revision="966cd89545d6b6acfd7638bc708b98261ca58e84",
)


def dataset(*, n_rows: int | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The prompts with their instructions; TaskError if the checkers could not run here."""
    require("ifeval")
    rows, origin = load_rows(ROWS, n_rows=n_rows)
    return {"test": as_dataset([_doc(row) for row in rows], f"{origin}; {_language_data_origin()}")}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Whether all instructions of the prompt are followed, and which; strictly, and loosely (less a first or last line, or asterisks).

    `inst_level_…` is a list, a boolean an instruction, for `over_instructions`.
    """
    checkers = _checkers()
    asked = checkers.InputExample(
        key=doc["key"], instruction_id_list=doc["instruction_id_list"], prompt=doc["question"], kwargs=doc["kwargs"]
    )
    found: dict[str, Any] = {}
    for how in ("strict", "loose"):
        checked = getattr(checkers, f"test_instruction_following_{how}")(asked, results[0])
        found[f"prompt_level_{how}_acc"] = float(checked.follow_all_instructions)
        found[f"inst_level_{how}_acc"] = [bool(followed) for followed in checked.follow_instruction_list]
    return found


def over_instructions(values: Iterable[Sequence[bool]]) -> float:
    """The share of all instructions that were followed: a prompt with three of them counts three times."""
    followed = [each for value in values for each in value]
    return sum(followed) / len(followed)


@lru_cache(maxsize=1)
def _checkers() -> Any:
    require("ifeval")
    folder = language_data()
    assert folder is not None
    import nltk
    from langdetect import DetectorFactory

    if str(folder) not in nltk.data.path:
        nltk.data.path.insert(0, str(folder))
    DetectorFactory.seed = 0
    return importlib.import_module("lm_eval.tasks.ifeval.utils")


def _doc(row: dict[str, Any]) -> dict[str, Any]:
    if len(row["instruction_id_list"]) != len(row["kwargs"]):
        raise DataError(
            f"{ROWS.path}: prompt {row['key']} has {len(row['instruction_id_list'])} instructions and {len(row['kwargs'])} kwargs"
        )
    return {
        "key": row["key"],
        "question": row["prompt"],
        "instruction_id_list": row["instruction_id_list"],
        "kwargs": row["kwargs"],
        "source_question": row["prompt"],
    }


def _language_data_origin() -> str:
    folder = language_data()
    assert folder is not None
    digest = hashlib.sha256()
    for path in sorted((folder / "tokenizers" / "punkt_tab" / "english").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return f"punkt_tab english sha256 {digest.hexdigest()}"
