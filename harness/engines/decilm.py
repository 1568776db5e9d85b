"""DeciLM models (`model_type` "nemotron-nas") behind vLLM: it has the model, and reads the configuration through our plug-in.

vLLM 0.32 (`vllm/model_executor/models/nemotron_nas.py`) computes blocks of different shapes and blocks without attention or MLP; not what
is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.errors import EngineError
from qad.decilm import MODEL_TYPE


def is_decilm(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a DeciLM model, whose Python files are then not needed."""
    return config.get("model_type") == MODEL_TYPE


def require_decilm(folder: Path, config: dict[str, Any]) -> None:
    """EngineError for blocks of a DeciLM model that vLLM computes otherwise or not at all."""
    blocks = config.get("block_configs") or []
    for index, block in enumerate(blocks):
        for part in ("attention", "ffn"):
            if block.get(part, {}).get("replace_with_linear"):
                raise EngineError(
                    f"{folder}: block_configs[{index}].{part}.replace_with_linear: vLLM's DeciLM has no linear layer in place of a part; "
                    'allowed are parts with no_op or a size; use the hf engine (engine.kind = "hf")'
                )
    if blocks and blocks[0].get("attention", {}).get("no_op"):
        raise EngineError(
            f"{folder}: block_configs[0].attention.no_op: vLLM's DeciLM cannot begin with a block without attention; use the hf engine "
            '(engine.kind = "hf")'
        )
