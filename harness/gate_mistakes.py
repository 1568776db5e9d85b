"""What the [gate] of a suite says that its own variants, tasks and engine contradict. A policy in a file of its own is held against a run alone.

No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.schema import Engine
    from harness.schema_gate import Gate
    from harness.suite import ResolvedVariant
    from harness.task_settings import ResolvedTask

Mistake = tuple[str, str, tuple[str, list[str]] | None]


def gate_mistakes(
    gate: Gate | None, engine: Engine, variants: Sequence[ResolvedVariant], tasks: Sequence[ResolvedTask]
) -> Iterator[Mistake]:
    """Key, message, and what was written with what is known, a mistake each. Tasks that are imported are named by the run, and known only then."""
    if gate is None:
        return
    names = [variant.name for variant in variants]
    for key in ("baseline", "candidate"):
        name = getattr(gate, key)
        if name is not None and name not in names:
            yield f"gate.{key}", f'no variant "{name}"', (name, names)
    controls = [task.name for task in tasks if task.pictures == "grey"]
    for index, judged in enumerate(gate.task):
        if judged.name in controls:
            yield (
                f"gate.task[{index}].name",
                f"{judged.name} is a control with grey pictures, and no score to judge; remove it",
                None,
            )
    yield from _kernel_mistakes(gate, engine, variants, tasks)


def _kernel_mistakes(
    gate: Gate, engine: Engine, variants: Sequence[ResolvedVariant], tasks: Sequence[ResolvedTask]
) -> Iterator[Mistake]:
    """Kernels that the gate does not admit, where they compute every candidate in a task that has to PASS: nothing could ever be GO.

    What quantizes a checkpoint made elsewhere and what an endpoint computes with is not known here, and scores may be imported.
    """
    asked = {task.name for task in tasks}
    candidates = [each for each in variants if gate.candidate in (each.name, None) and each.method != "bf16"]
    computed = [_kernels_of(each, engine) for each in candidates]
    has_to_pass = [task.name for task in gate.task if task.tier == "critical" and task.name in asked]
    if has_to_pass and computed and all(found is not None and found not in gate.kernels for found in computed):
        found, whose = str(computed[0]), candidates[0].name
        yield (
            "gate.kernels",
            f"found {list(gate.kernels)}, but {_what_says_so(candidates[0], engine)} computes {whose} with {found}, so that {has_to_pass[0]} "
            f'could never PASS, and nothing be GO; name "{found}" here, or another engine',
            None,
        )


def _kernels_of(variant: ResolvedVariant, engine: Engine) -> str | None:
    """What its quantized layers will be recorded to be computed with; None where that is not known."""
    if variant.quantization is None or variant.endpoint is not None:
        return None
    if not variant.quantization.activations:
        return "w4a16"
    return "w4a4_emulation" if engine.kind == "hf" else engine.kernels


def _what_says_so(variant: ResolvedVariant, engine: Engine) -> str:
    if variant.quantization is not None and not variant.quantization.activations:
        return "activations = false"
    return 'engine.kind = "hf"' if engine.kind == "hf" else f'engine.kernels = "{engine.kernels}"'
