"""Mistakes of a suite file in words: where, what was found, what is allowed, the nearest legal spelling."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.data_checks import source_mistake
from harness.schema_data import SOURCES
from harness.section import Section

_LONG = 120
"""Characters of a section that are too many to repeat."""


class Mistakes:
    """The mistakes of the file at `path`, in the order in which they were found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []

    def parse(self, schema: type[Any], raw: Any, where: str) -> Any:
        """`raw` as `schema`, or None after adding what is wrong with it."""
        try:
            return schema.model_validate(_tuples(raw))
        except ValidationError as error:
            for problem in error.errors():
                if problem["type"] != "too_short" or not problem["input"]:  # else: an item of the list is wrong, and reported
                    self._explain(schema, where, problem)
            return None

    def add(self, key: str, message: str, near: tuple[str, Any] | None = None, what: str = "Known") -> None:
        """Add one mistake. near: what was written, and what could have been meant."""
        if near is not None:
            name, known = near
            closest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
            message += f"; did you mean {closest[0]}?" if closest else "."
            message += f" {what}: {listed(known)}"
        line = f"{self.path}: {key}: {message}"
        if line not in self.found:  # several variants share a section
            self.found.append(line)

    def _explain(self, schema: type[Any], where: str, problem: Any) -> None:
        if problem["loc"][:1] == ("data",) and len(problem["loc"]) > 1:
            mistake = source_mistake(problem)
            if mistake is not None:
                self.add(*mistake, what="Allowed")
                return
            schema, where, loc = SOURCES[problem["loc"][2]], f"data.{problem['loc'][1]}", problem["loc"][3:]
            problem = {**problem, "loc": loc}
        key = _dotted(where, problem["loc"])
        found, kind = problem["input"], problem["type"]
        if kind == "extra_forbidden":
            self.add(key, "unknown key", near=(str(problem["loc"][-1]), _known_keys(schema, problem["loc"][:-1])))
        elif kind == "missing":
            self.add(key, "missing; it is required and has no default")
        elif kind == "literal_error":
            allowed = re.findall(r"'([^']*)'", problem["ctx"]["expected"]) or [problem["ctx"]["expected"]]
            self.add(key, f"found {found!r}", near=(str(found), allowed), what="Allowed")
        elif kind == "value_error" and (len(problem["loc"]) < 2 or len(str(found)) > _LONG):  # of a section as a whole
            self.add(key, str(problem["ctx"]["error"]))
        else:
            plain = re.sub(r"^data\.[^.]+\.", "data.", re.sub(r"\[\d+\]", "", key))
            hint = (
                " (the commit, 40 hex digits: a branch or tag can move)"
                if plain in ("model.revision", "data.revision", "variant.revision")
                else ""
            )
            if plain.endswith("margin") and not plain.startswith("claim."):
                hint = " (a margin is how much damage is allowed, in points)"
            message = re.sub("[Tt]uple", "list", problem["msg"]).removeprefix("Value error, ")
            shown = list(found) if isinstance(found, tuple) else found
            self.add(key, f"found {shown!r}; {message[0].lower()}{message[1:]}{hint}")


def _tuples(value: Any) -> Any:
    """TOML arrays as tuples, which is what the frozen schema holds."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _dotted(where: str, loc: tuple[Any, ...]) -> str:
    key = where
    for part in loc:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    return key or "the file"


def _known_keys(schema: type[Any], loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        field = schema.model_fields.get(part)
        if field is None:
            continue
        schema = _section_type(field.annotation) or schema
    return [field.alias or name for name, field in schema.model_fields.items()]


def _section_type(annotation: Any) -> type[Any] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_type(argument)
        if found:
            return found
    return None


def listed(names: Any) -> str:
    """Names in order, or "none"."""
    return ", ".join(sorted(names)) or "none"
