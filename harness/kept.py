"""What quantization and training leave alone: held against the BF16 model, bit for bit, before and after it is written.

Embeddings, norms and an excluded output head are among it; of an image-text model also the vision tower and the projector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch

from harness.errors import HarnessError


def kept_digests(model: Any, left_out: Collection[str]) -> dict[str, str]:
    """sha256 of every parameter and stored buffer by name, but of the linear layers named in `left_out`: their type, shape and bytes."""
    weights = {f"{name}.weight" for name in left_out}
    stored = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
    found = {}
    for name, kept in (*model.named_parameters(), *buffers):
        if name in weights:
            continue
        tensor = kept.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def require_kept(
    label: str, before: Mapping[str, str], *after: Mapping[str, str], trained: Collection[str] = ()
) -> dict[str, Any]:
    """How many parameters stayed those of the BF16 model, and one digest over them all.

    Args:
        before: `kept_digests` of the BF16 model; after: the same of what was made of it.
        trained: names of parameters that may differ.
    Raises:
        HarnessError: one that nothing was to change is another now.
    """
    kept = {name: digest for name, digest in before.items() if name not in trained}
    for found in after:
        changed = [name for name, digest in kept.items() if found.get(name) != digest]
        if changed:
            raise HarnessError(
                f"{label}: {changed[0]} (one of {len(changed)}) should have stayed as in the BF16 model and is another; report this"
            )
    return {"parameters": len(kept), "digest": hashlib.sha256(json.dumps(sorted(kept.items())).encode()).hexdigest()}
