"""Configurations of models that are kept with the harness: what is planned and rehearsed before a config.json is to be had. Standard library only.

Each file of `known_models/` is one model: fields of its config.json, where they were found in public, and whether two sources agree on them
or the model's own file was read. Weights are not here, and no run depends on these files: by the time it checks a recipe it has the model's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import ModelError

FOLDER = Path(__file__).parent / "known_models"


@dataclass(frozen=True)
class KnownModel:
    """A model by its id on the hub.

    revision: the commit that the fields are of; None where no source names one.
    source: where the fields were found, in words. verified: whether that is the model's own file, or sources that agree.
    config: as in config.json, the fields that were found alone.
    released: what a published NVFP4 checkpoint of the model leaves out, with its own id and revision; None where there is none.
    """

    path: str
    revision: str | None
    source: str
    verified: bool
    config: dict[str, Any]
    released: dict[str, Any] | None

    @property
    def origin(self) -> str:
        """What is said wherever the configuration is used."""
        return f"the configuration kept with the harness ({'' if self.verified else 'unverified; '}{self.source})"


def known_model(path: str) -> KnownModel | None:
    """The model with the id `path` (org/name) on the hub, or None."""
    return known_models().get(path)


@cache
def known_models() -> dict[str, KnownModel]:
    """All of them, by id; ModelError where a file has mistakes."""
    found = [read_known_model(file) for file in sorted(FOLDER.glob("*.json"))]
    return {model.path: model for model in found}


def read_known_model(file: Path) -> KnownModel:
    """The model that a file holds.

    Raises:
        ModelError: no JSON, a field that is unknown, missing or of another type, or a source that says nothing.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error}); take it again from the harness") from None
    names = [field.name for field in fields(KnownModel)]
    if not isinstance(content, dict) or content.keys() != set(names):
        found = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise ModelError(f"{file}: found {found or 'nothing'}; a known model has exactly the fields {', '.join(names)}")
    allowed = {
        "path": (isinstance(content["path"], str) and content["path"].count("/") == 1, "an id of the hub (org/name)"),
        "revision": (content["revision"] is None or _is_commit(content["revision"]), "a commit (40 hex digits) or null"),
        "source": (
            isinstance(content["source"], str) and bool(content["source"].strip()),
            "where the fields were found, in words",
        ),
        "verified": (isinstance(content["verified"], bool), "true or false"),
        "config": (isinstance(content["config"], dict) and "model_type" in content["config"], "an object with a model_type"),
        "released": (content["released"] is None or isinstance(content["released"], dict), "an object or null"),
    }
    for name, (is_good, what) in allowed.items():
        if not is_good:
            raise ModelError(f"{file}: {name}: found {content[name]!r:.80}; allowed is {what}")
    return KnownModel(**content)


def _is_commit(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 40 and set(value) <= set("0123456789abcdef")
