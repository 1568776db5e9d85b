"""Makes transformers find the image processors of Idefics2, Idefics3 and SmolVLM where torchvision is not installed.

transformers (5.17) has a version of each that needs Pillow alone, but decides what a file needs by words in it: a comment of these files
names the class of torchvision, so that the automatic classes are handed a stand-in that refuses. Imported by its own module the class
works. Registering it does nothing, for transformers keeps its own choice for configurations of its own; so it is put where it is
looked for. vLLM loads processors by the same automatic classes, in its own process.
"""

from __future__ import annotations

import importlib

from transformers.utils import is_torchvision_available

_MISJUDGED = {"idefics2": "Idefics2", "idefics3": "Idefics3", "smolvlm": "SmolVLM"}


def allow_without_torchvision() -> None:
    """Put the Pillow versions into place in this process, unless torchvision is there. Once or often."""
    if is_torchvision_available():
        return
    for package, name in _MISJUDGED.items():
        processing = importlib.import_module(f"transformers.models.{package}.image_processing_pil_{package}")
        class_name = f"{name}ImageProcessorPil"
        for where in ("transformers", f"transformers.models.{package}"):
            setattr(importlib.import_module(where), class_name, getattr(processing, class_name))
