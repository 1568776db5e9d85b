"""An exported checkpoint is read back and held against the model that it was made of: their logits are equal, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harness.errors import HarnessError
from qad.batch import Batch


def load_back(label: str, model: Any, read: Callable[[], Any], batch: Batch, device: torch.device) -> Any:
    """The model that `read` loads onto `device`, after it computed the logits of `batch` that `model` computes.

    One of the two at a time is on the device: more has no room where the model is as large as half of it. `model` is left on the CPU.

    Raises:
        HarnessError: logits that differ.
    """
    inputs = batch.to(device).inputs
    with torch.no_grad():
        expected = model.to(device).eval()(**inputs).logits.cpu()
        model.to("cpu")
        loaded = read()
        found = loaded(**inputs).logits.cpu()
    if not torch.equal(expected, found):
        difference = float((expected.float() - found.float()).abs().max())
        raise HarnessError(
            f"{label}: the exported checkpoint does not reproduce the model in memory (logits differ by up to {difference:g}); report this"
        )
    return loaded
