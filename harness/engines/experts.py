"""Experts behind vLLM: what a checkpoint's are stored in, which of vLLM's expert kernels is asked for, and what cannot be. No torch.

vLLM chooses kernels of experts by a table of its own, in which our linear kernels do not appear (0.32,
`vllm/model_executor/layers/fused_moe/oracle/nvfp4.py`). Left to itself a GPU without FP4 units takes Marlin, which leaves inputs in 16
bits; the option `moe_backend` names another one, for all expert layers of a model at once, those in BF16 included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from harness.errors import EngineError

BACKENDS = {"w4a4_emulation": "emulation", "w4a16": "marlin"}
"""vLLM's `moe_backend` by engine.kernels. "native" is left to vLLM, which takes what the GPU has; what it took is read back."""
MARK = ".experts."
"""In the name of every tensor of an expert, and of no shared expert's."""
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PREDICTS_MORE = re.compile(r"(model\.)?mtp\.")


def nvfp4_experts(types: Mapping[str, str]) -> list[str]:
    """The packed weights of experts, given the type of every tensor by name."""
    return [name for name, kind in types.items() if MARK in name and kind == "U8"]


def nvfp4_linears(types: Mapping[str, str]) -> list[str]:
    """The packed weights of all other layers."""
    return [name for name, kind in types.items() if MARK not in name and kind == "U8"]


def experts_option(types: Mapping[str, str], kernels: str | None) -> dict[str, str]:
    """The option of vLLM on a GPU that gives the experts of a checkpoint the kernels that are asked for; none where nothing is quantized."""
    return {"moe_backend": BACKENDS[kernels]} if kernels in BACKENDS and nvfp4_experts(types) else {}


def served_types(types: Mapping[str, str], n_layers: int | None) -> dict[str, str]:
    """`types` without the layers that predict several tokens at once, which vLLM leaves out unless it drafts with them: they are called "mtp."
    or come after the `n_layers` of the model."""
    return {
        name: kind
        for name, kind in types.items()
        if not _PREDICTS_MORE.match(name) and not (n_layers and (found := _LAYER.search(name)) and int(found[1]) >= n_layers)
    }


def require_experts(
    folder: Path, types: Mapping[str, str], kernels: str | None, *, is_cpu: bool, n_layers: int | None = None
) -> None:
    """EngineError for quantized experts that vLLM here cannot compute with these kernels. n_layers: `num_hidden_layers`, where it is said."""
    types = served_types(types, n_layers)
    packed = nvfp4_experts(types)
    fp8 = [name for name, kind in types.items() if MARK in name and name.endswith(".weight") and kind == "F8_E4M3"]
    if fp8:
        raise EngineError(
            f"{folder}: {fp8[0]}: FP8 experts are not served by this engine in this version; allowed are experts in NVFP4 or BF16"
        )
    if packed and is_cpu:
        raise refusal(f"{folder}: {packed[0]}")
    layers = {name.partition(MARK)[0] for name in packed}
    plain = [name for name in types if MARK in name and name.partition(MARK)[0] not in layers]
    if packed and plain and kernels in BACKENDS:
        raise EngineError(
            f"{folder}: {plain[0]} is in BF16 and {packed[0]} in NVFP4: vLLM takes one backend for the experts of all layers, and "
            f'"{BACKENDS[kernels]}", which {kernels} needs, computes none in BF16; allowed: quantize the experts of all layers or of none, '
            'or kernels = "native" on a GPU with FP4 units; or use the hf engine'
        )


def require_plain_experts(folder: Path, types: Mapping[str, str]) -> None:
    """EngineError for experts in BF16 that vLLM on a CPU cannot compute: those without a gate, such as relu² ones of nemotron_h."""
    parts = [name.rpartition(MARK)[2] for name in types if MARK in name]
    if parts and not any("gate" in part or ".w3." in part for part in parts):
        raise EngineError(
            f"{folder}: its experts have no gate, which vLLM on a CPU computes not even in BF16; use the hf engine (engine.kind = "
            '"hf"), or a machine with a CUDA GPU'
        )


def refusal(where: str) -> EngineError:
    """That a CPU serves no NVFP4 experts; where: the folder and tensor, or the variant and layer."""
    return EngineError(
        f'{where}: vLLM on a CPU has no kernel for NVFP4 experts; use the hf engine (engine.kind = "hf"), or a machine with a CUDA GPU'
    )
