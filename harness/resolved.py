"""What a suite asks for as the plain data that run.json keeps, and how a record differs from a suite. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from harness.judge_prompt import prompt_hash
from harness.suite import ResolvedVariant, Suite

_NOT_ASKED = ("gate", "reference")
"""Sections of run.json that change no figure, only what is made of them."""


def sections_of(suite: Suite) -> dict[str, Any]:
    """The sections that decide figures, as `resolved` of run.json has them."""
    return {
        "model": suite.model.model_dump(),
        "data": {name: section.model_dump() for name, section in suite.data.items()},
        "tasks": [task.record for task in suite.tasks],
        "engine": suite.engine.model_dump(),
        "judge": suite.judge.model_dump() | {"prompt": prompt_hash()} if suite.judge else None,
        "diagnostics": suite.diagnostics.model_dump() if suite.diagnostics else None,
    }


def settings_of(variant: ResolvedVariant) -> dict[str, Any]:
    """The settings of a variant, as `variants` of run.json has them beside what became of it."""
    settings = dataclasses.asdict(variant)
    for name in ("quantization", "training", "teacher", "endpoint"):
        section = getattr(variant, name)
        settings[name] = section.model_dump() if section else None
    return settings


def changed_since(suite: Suite, about: Mapping[str, Any]) -> list[str]:
    """How the suite asks for something else than the run.json `about` says was asked: each key with both values, as sentences."""
    recorded = {key: value for key, value in about["resolved"].items() if key not in _NOT_ASKED}
    found = [*_differences("", _plain(sections_of(suite)), recorded)]
    ours = {variant.name: settings_of(variant) for variant in suite.variants}
    theirs = {variant["name"]: variant for variant in about["variants"]}
    found += [f"the file has the variant {name}, the run has not" for name in ours if name not in theirs]
    found += [f"the run has the variant {name}, the file has not" for name in theirs if name not in ours]
    for name, settings in ours.items():
        if name in theirs:
            kept = {key: theirs[name].get(key) for key in settings}
            found += _differences(f"variant {name}: ", _plain(settings), kept)
    return found


def _differences(where: str, ours: Any, theirs: Any) -> Iterator[str]:
    """The innermost keys in which two plain values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*ours, *theirs]):
            yield from _differences(_under(where, str(key)), ours.get(key), theirs.get(key))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(f"{where}[{index}]", mine, yours)
    elif ours != theirs:
        yield f"{where} is {_short(ours)} in the file, {_short(theirs)} in the run"


def _under(where: str, key: str) -> str:
    return f"{where}{key}" if not where or where.endswith(": ") else f"{where}.{key}"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
