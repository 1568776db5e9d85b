"""Numerics versions: a number for each kind of stage, bumped by hand when its results change.

A test fails when the source files of a kind have changed and `numerics.json` has neither a new version nor an entry that
says that the numbers are unchanged. `python -m harness.numerics` prints the entries to add.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
REGISTER = Path(__file__).with_suffix(".json")

_CHOICE = ("qad/_numba_scales.py", "qad/gptq.py", "qad/observe.py")
_FORMAT = (
    "qad/nvfp4.py",
    "qad/fp8.py",
    "qad/scales.py",
    "qad/kernels.py",
    "qad/_numba.py",
    "qad/_triton.py",
    "qad/modules.py",
    "qad/exceptions.py",
    "qad/quantize.py",
    "qad/recipe.py",
    "qad/kv_cache.py",
    "qad/straight_through.py",
)
_LOADING = (
    "qad/backbone.py",
    "qad/batch.py",
    "qad/building.py",
    "qad/remote_code.py",
    "qad/checkpoint.py",
    "qad/decilm.py",
    "qad/experts.py",
    "qad/image_processors.py",
    "qad/layouts.py",
    "qad/packed.py",
    "qad/stored_names.py",
    "qad/tensor_files.py",
    "harness/loading.py",
    "harness/batches.py",
    "harness/data.py",
    "harness/images.py",
    "harness/processor.py",
    "harness/recipes.py",
    "harness/stages.py",
    "harness/tasks/pictures.py",
    "harness/token_store.py",
)
_TRAINING = (
    "qad/candidates.py",
    "qad/cells.py",
    "qad/distill.py",
    "qad/layers.py",
    "qad/losses.py",
    "qad/masters.py",
    "qad/optimization.py",
    "qad/packing.py",
    "qad/ranks.py",
    "qad/resume.py",
    "harness/training.py",
)
_ANSWERING = (
    "harness/evaluation.py",
    "harness/answering.py",
    "harness/engines/__init__.py",
    "harness/engines/hf.py",
    "harness/processor.py",
    "qad/image_processors.py",
)
_JUDGING = (
    "harness/judge.py",
    "harness/judge_prompt.py",
    "harness/judging.py",
    "harness/answering.py",
    "harness/engines/__init__.py",
    "harness/engines/hf.py",
    "harness/thinking.py",
)
_PREPARING = (
    "harness/prompts.py",
    "harness/sampling.py",
    "harness/task_about.py",
    "harness/evaluate.py",
    "harness/prepared.py",
    "harness/thinking.py",
    "harness/images.py",
    "harness/processor.py",
    "qad/image_processors.py",
    "harness/picture_asks.py",
    "harness/picture_documents.py",
    "harness/picture_prompts.py",
    "harness/tasks/pictures.py",
    "harness/tasks/picture_rows.py",
)
_SCORING = (
    "harness/evaluate.py",
    "harness/thinking.py",
    "harness/evaluation.py",
    "harness/aggregates.py",
    "harness/stats.py",
    "harness/judge.py",
    "harness/judging.py",
    "qad/clustered.py",
)
SOURCES = {
    "model": _LOADING,
    "data": (
        "harness/stages.py",
        "harness/loading.py",
        "harness/data.py",
        "harness/builtin.py",
        "harness/data_stage.py",
        "harness/dialogues.py",
        "harness/drawn.py",
        "harness/images.py",
        "harness/processor.py",
        "harness/row_chats.py",
        "harness/row_files.py",
        "harness/row_images.py",
        "harness/rows.py",
        "harness/sources.py",
        "harness/token_store.py",
        "harness/tasks/canvas.py",
        "harness/tasks/drawing_kinds.py",
        "harness/tasks/drawings.py",
        "harness/tasks/pictures.py",
        "harness/tasks/world.py",
        "harness/tasks/mini.py",
        "harness/tasks/tunnel.py",
        "harness/tasks/tunnel_words.py",
        "harness/tunnel_source.py",
        "qad/image_processors.py",
    ),
    "generate": (
        "harness/generation.py",
        "harness/answering.py",
        "harness/scorers.py",
        "harness/engines/__init__.py",
        "harness/engines/hf.py",
        "qad/backbone.py",
        "qad/building.py",
        "qad/remote_code.py",
        "qad/checkpoint.py",
        "qad/decilm.py",
        "qad/experts.py",
        "qad/stored_names.py",
        "qad/tensor_files.py",
    ),
    "calibrate": ("qad/calibrate.py", "qad/exceptions.py", "qad/observe.py", "qad/recipe.py", "qad/kv_cache.py", *_LOADING),
    "quantize": (*_FORMAT, *_CHOICE, *_LOADING),
    "train": (*_FORMAT, *_LOADING, *_TRAINING),
    "select": (*_FORMAT, *_LOADING, *_TRAINING, *_ANSWERING, *_SCORING),
    "prepare": _PREPARING,
    "evaluate": (*_FORMAT, *_LOADING, *_ANSWERING),
    "judge": (*_FORMAT, *_LOADING, *_JUDGING),
    "score": _SCORING,
    "vllm": (
        "qad/_vllm.py",
        "qad/vllm_plugin.py",
        "harness/engines/asked.py",
        "harness/engines/decilm.py",
        "harness/engines/experts.py",
        "harness/engines/vllm.py",
        "harness/engines/vllm_worker.py",
    ),
    "diagnostics": (
        *_FORMAT,
        *_LOADING,
        "qad/divergence.py",
        "qad/losses.py",
        "qad/clustered.py",
        "qad/calibrate.py",
        "harness/answers.py",
        "harness/diagnostics.py",
    ),
    "server": (
        "harness/engines/chat.py",
        "harness/engines/exchange.py",
        "harness/engines/launch.py",
        "harness/engines/server.py",
    ),
}
"""The files whose code decides the numbers of a stage, by its kind; "vllm", "server": of what a stage adds with that engine; "generate": of
what a "data" stage adds whose text a model writes."""


def versions() -> dict[str, int]:
    """The numerics version of every kind of stage."""
    return {kind: entry["version"] for kind, entry in _register().items()}


def source_digest(kind: str) -> str:
    """sha256 over the source files of a kind."""
    digest = hashlib.sha256()
    for name in SOURCES[kind]:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def unaccounted() -> dict[str, str]:
    """Kinds whose sources are not registered under their version, with the digest that is missing."""
    register = _register()
    digests = {kind: source_digest(kind) for kind in SOURCES}
    return {kind: digest for kind, digest in digests.items() if digest not in register[kind]["sources"]}


def _register() -> dict[str, dict[str, Any]]:
    return json.loads(REGISTER.read_text())


if __name__ == "__main__":
    for kind, digest in unaccounted().items():
        print(
            f'{kind}: if the numbers are unchanged, add "{digest}" to its sources; if not, raise its version and start them anew'
        )
