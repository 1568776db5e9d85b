"""How large a checkpoint is: bytes, and bits a weight, read from the headers of its safetensors files. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qad.errors import CheckpointError

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_SCALES = (
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".weight_global_scale",
    ".input_global_scale",
    ".k_scale",
    ".v_scale",
)


@dataclass(frozen=True)
class Footprint:
    """checkpoint_bytes: of the weight files. n_weights: the weights that they decode to. bits_per_weight: stored bits over these.

    Scales count as storage, not as weights; a byte of codes is two weights.
    """

    checkpoint_bytes: int
    n_weights: int
    bits_per_weight: float


def footprint(folder: Path) -> Footprint:
    """The footprint of the checkpoint in `folder`; ValueError if it has no weights."""
    size = bits = weights = 0
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        for name, entry in header(path).items():
            count = math.prod(entry["shape"])
            bits += count * bits_of(entry["dtype"])
            if not name.endswith(_SCALES):
                weights += count * (2 if entry["dtype"] == "U8" else 1)
    if not weights:
        raise ValueError(f"{folder}: holds no weights in safetensors files")
    return Footprint(size, weights, bits / weights)


def bits_of(dtype: str) -> int:
    """Bits of one element of a type as safetensors spells it; CheckpointError for one that no checkpoint of ours has."""
    if dtype.startswith("F8"):
        return 8
    if dtype not in _BITS:
        raise CheckpointError(f"a tensor of type {dtype}: allowed are {', '.join(_BITS)} and the F8 types")
    return _BITS[dtype]


def tensor_types(folder: Path) -> dict[str, str]:
    """The safetensors type of every tensor of the checkpoint in `folder`, by name."""
    return {name: entry["dtype"] for path in sorted(folder.glob("*.safetensors")) for name, entry in header(path).items()}


def header(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file by tensor name: dtype, shape, data_offsets. CheckpointError if it is cut short."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {name: entry for name, entry in found.items() if name != "__metadata__"}
    except (ValueError, AttributeError, OSError, OverflowError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); is it cut short? copy it again") from error
