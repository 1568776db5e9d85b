"""How large a checkpoint is: bytes, and bits a weight, read from the headers of its safetensors files. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_SCALES = (".weight_scale", ".weight_scale_2", ".input_scale")


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
        for name, entry in _header(path).items():
            count = math.prod(entry["shape"])
            bits += count * (8 if entry["dtype"].startswith("F8") else _BITS[entry["dtype"]])
            if not name.endswith(_SCALES):
                weights += count * (2 if entry["dtype"] == "U8" else 1)
    if not weights:
        raise ValueError(f"{folder}: holds no weights in safetensors files")
    return Footprint(size, weights, bits / weights)


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return dict(header)
