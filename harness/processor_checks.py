"""Whether two processors make the same of images: what is compared token by token must have read the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from harness.errors import ModelError
from harness.images import Image, keep_picture
from harness.processor import Processor

_SIZES = ((96, 64), (700, 400))
"""Of the pictures that both are given: one smaller and one larger than most tiles."""


def require_same_images(ours: Processor, theirs: Processor, where: str) -> None:
    """ModelError unless both make the same tokens and the same inputs of two pictures; `where` is whose the second one is."""
    with tempfile.TemporaryDirectory() as folder:
        for size in _SIZES:
            image = keep_picture(_picture(size), Path(folder))
            found = [_read(processor, image) for processor in (ours, theirs)]
            for key in ("tokens", *sorted({key for inputs in found for key in inputs if key != "tokens"})):
                one, other = (inputs.get(key) for inputs in found)
                if one is None or other is None or not torch.equal(one, other):
                    raise ModelError(
                        f"{where}: its processor makes other {key} of an image ({size[0]} × {size[1]}) than the model's, so both would not "
                        "read the same; copy the model's processor files into it, or choose another"
                    )


def _read(processor: Processor, image: Image) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([processor.encode(processor.image_token, [image]).token_ids])
    return {"tokens": tokens, **processor.model_inputs([[image]], tokens)}


def _picture(size: tuple[int, int]) -> Any:
    """Colours that differ from pixel to pixel."""
    from PIL import Image as Pillow

    width, height = size
    return Pillow.frombytes("RGB", size, bytes(7 * i * i % 251 for i in range(3 * width * height)))
