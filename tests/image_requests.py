"""Requests with images for tests of engines, and an untrained model whose answers change with its pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image as Pillow

from harness.engines import Request

CONTINUATION = (80, 90, 100)


def noise(seed, width=24, height=30):
    """A picture like no other."""
    return Pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def build_seeing_vlm(folder, tiny_vlm):
    """The untrained model with matrices eight times as large, so that pictures are felt: by tenths of a nat in three tokens."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_vlm, folder)
    weights = load_file(folder / "model.safetensors")
    grown = {name: 8 * weight if weight.ndim == 2 else weight for name, weight in weights.items()}
    save_file(grown, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def request(processor, images, text="What is it?", **settings):
    """A request in the model's own chat; the likelihood of CONTINUATION, if `settings` do not say otherwise."""
    messages = ({"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]},)
    encoded = processor.encode(processor.render(messages), images)
    return Request(
        token_ids=encoded.token_ids,
        unexpanded_ids=encoded.unexpanded_ids,
        images=tuple(images),
        messages=messages,
        **({"continuation": CONTINUATION} | settings),
    )


def mixed(processor, pictures, **settings):
    """No, one, two and three of six pictures, texts of several lengths."""
    shown = [[0], [], [1, 2], [3], [4, 5, 0], [], [2]]
    return [
        request(processor, [pictures[i] for i in chosen], "Is it?" + " Really?" * place, **settings)
        for place, chosen in enumerate(shown)
    ]


def outcomes(engine, batch):
    """All that comes of a batch, in its order."""
    found = dict(engine.answer(batch))
    return [found[place] for place in range(len(batch))]
