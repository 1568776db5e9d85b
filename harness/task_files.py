"""The task files that come with the harness, without importing lm_eval: names, declared metadata, fingerprints."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from harness.models import mirror_folder
from harness.store import Store

TASKS_FOLDER = Path(__file__).parent / "tasks"


class _Loader(yaml.SafeLoader):
    """Reads task files; functions stay the words that name them."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: loader.construct_scalar(node))


def known_tasks() -> list[str]:
    """Names of the tasks that come with the harness."""
    return sorted(file.stem for file in TASKS_FOLDER.glob("*.yaml"))


def is_ours(name: str) -> bool:
    return (TASKS_FOLDER / f"{name}.yaml").is_file()


@cache
def config_of(name: str) -> dict[str, Any]:
    """What the file of one of our tasks says."""
    return dict(yaml.load((TASKS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader=_Loader))


def gives_answers(name: str, path: object = None) -> bool | None:
    """Whether a task has answers generated rather than likelihoods compared; None where that is not known before it is read."""
    return config_of(name).get("output_type") == "generate_until" if path is None and is_ours(name) else None


def metadata_of(name: str) -> dict[str, Any]:
    """The metadata of one of our tasks: version, chat, images, primary, publishable, judge, dataset. Empty for other tasks."""
    return dict(config_of(name).get("metadata") or {}) if is_ours(name) else {}


def asks_about_pictures(name: str) -> str | None:
    """Why one of our tasks cannot be asked of a model of text, and what to do; None where it can, or the task is not ours."""
    if metadata_of(name).get("images") is not True:
        return None
    return (
        'asks about pictures, and a model of kind "text" is given none; remove it, or set kind = "image-text" in [model] if the model '
        "sees"
    )


def dataset_digests(dataset: str, store: Store) -> dict[str, str] | None:
    """The files of a data set in the mirror with their digests; None where the hub has to give them."""
    folder = mirror_folder(dataset)
    if folder is None:
        return None
    return {str(path.relative_to(folder)): store.file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def fingerprint(name: str, path: Path | None) -> str | None:
    """sha256 of everything that makes a task: its file, what that includes, the code and the data files that it names.

    Of a user's folder all files in it. None for lm-eval's own tasks, which its package version identifies.
    """
    if path is not None and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    elif path is not None:
        files = _named_by(path)
    elif is_ours(name):
        files = sorted([TASKS_FOLDER / f"{name}.yaml", *TASKS_FOLDER.glob("*.py")])
    else:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _named_by(path: Path) -> list[Path]:
    """A task file and the files that it names, as far as they are there."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return [path]  # no task: that is said when it is read
    config = config if isinstance(config, dict) else {}
    found = [path]
    for module in re.findall(r"!function\s+([\w.]+)\.\w+", text):
        found.append(path.parent / f"{module.replace('.', '/')}.py")
    found += [Path(each) for each in strings_in((config.get("dataset_kwargs") or {}).get("data_files"))]
    for included in strings_in(config.get("include")):
        if (path.parent / included).is_file():
            found += _named_by(path.parent / included)
    return [file for file in dict.fromkeys(found) if file.is_file()]


def strings_in(value: Any) -> list[str]:
    """The texts in a value of a task file, lists and tables within it included."""
    if isinstance(value, dict):
        return [each for part in value.values() for each in strings_in(part)]
    if isinstance(value, list | tuple):
        return [each for part in value for each in strings_in(part)]
    return [value] if isinstance(value, str) else []
