"""What a rehearsal finds by counting alone, on the real configuration and the real rows: patterns, prompts and answers against the context,
and what the gate would judge. Said in lines; what would end the real run is a problem.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.models import mirror_folder
from harness.rehearsal_checks import ArchitectureCheck, check_recipes
from harness.rehearsal_lengths import LengthCheck, check_lengths
from harness.suite import Suite
from harness.task_files import metadata_of
from harness.twins import write_stand_in


def check_statically(suite: Suite, config: Mapping[str, Any], twin: Path) -> tuple[list[str], list[str]]:
    """Lines about the real suite, and the problems among them. twin: whose tokenizer counts where no better one is needed."""
    architecture = check_recipes(suite, config)
    lines, problems = _about_recipes(architecture), list(architecture.problems)
    with tempfile.TemporaryDirectory() as work:
        stand_in = twin
        if suite.model.kind == "text" and any(_has_rows(task.own_name) for task in suite.tasks):
            stand_in = write_stand_in(Path(work) / "words")
        for each in check_lengths(suite, config, stand_in, work=Path(work) / "pictures"):
            lines.append(_about_length(each))
            if each.is_problem:
                problems.append(lines[-1])
    gate = _about_gate(suite)
    return lines + gate, problems


def _has_rows(task: str) -> bool:
    dataset = metadata_of(task).get("dataset")
    return dataset is not None and mirror_folder(dataset) is not None


def _about_recipes(found: ArchitectureCheck) -> list[str]:
    lines = [] if found.unchecked is None else [f"recipes: {found.unchecked}"]
    for each in found.recipes:
        whose = ", ".join(each.variants)
        if each.problem is not None:
            lines.append(f"recipe of {whose}: {each.problem}")
            continue
        formats = ", ".join(f"{n:,} {name}" for name, n in each.formats.items())
        left = ", ".join(f"{share.name} {share.left}" for share in each.shares if share.left)
        cache = f"; FP8 cache of {each.kv_cache} attention layers" if each.kv_cache else ""
        lines.append(
            f"recipe of {whose}: of {found.model_class} {formats} linear layers are quantized, {each.left:,} stay ({left}){cache}"
        )
    return lines


def _about_length(found: LengthCheck) -> str:
    parts = [found.what]
    if found.limit is not None:
        parts.append(f"context {found.limit.tokens:,} ({found.limit.key})")
    if found.answer is not None:
        parts.append(f"answers to {found.answer:,} tokens")
    if found.n_questions:
        about = "about " if found.is_approximate else ""
        parts.append(f"longest of {found.n_questions:,} prompts {about}{found.longest:,} tokens")
    if found.n_over:
        about = "about " if found.is_approximate else ""
        fit = "may not fit" if found.is_close else "do not fit"
        parts.append(f"{found.n_over:,} prompts {fit} with their answers, the worst by {about}{found.over_by:,} tokens")
    parts += [each for each in (found.problem, found.note) if each is not None]
    return "; ".join(parts)


def _about_gate(suite: Suite) -> list[str]:
    """Tasks that the gate judges and the suite does not run: their results have to be imported."""
    asked = {task.name for task in suite.tasks}
    judged = [] if suite.gate is None else [task.name for task in suite.gate.task if task.name not in asked]
    return [f"gate: {name} is no task of the suite; without imported results the verdict is INCONCLUSIVE" for name in judged]
