"""What can be wrong between the kind of a suite's model and what the suite gives it to read. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from harness.schema_data import Drawings, Rows

if TYPE_CHECKING:
    from harness.schema import File


_BOOLEAN: tuple[Callable[[Any], bool], str] = (lambda value: type(value) is bool, "true or false")
IMAGE_ARGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "limit_mm_per_prompt": (
        lambda value: (
            isinstance(value, dict) and value.keys() == {"image"} and type(value["image"]) is int and value["image"] > 0
        ),
        "a table such as { image = 4 }: images a prompt, at most",
    ),
    "mm_device_do_normalize": _BOOLEAN,
    "mm_processor_cache_gb": (lambda value: type(value) in (int, float) and value >= 0, "a number, 0 or more, in GiB"),
    "skip_mm_profiling": _BOOLEAN,
}
"""The arguments of vLLM about images: what is allowed, as a test and in words."""


def kind_mistakes(file: File) -> Iterator[tuple[str, str]]:
    """Every mistake, as key and message. Tasks that ask about pictures are looked at where tasks are resolved."""
    if file.model.kind == "image-text":
        if file.model.path.startswith("package:"):
            yield (
                "model.kind",
                f'"image-text", but {file.model.path} is a GGUF file, whose vision part is not read; give a folder or a hub id',
            )
        return
    for name in IMAGE_ARGS:
        if name in file.engine.args:
            yield f"engine.args.{name}", _refused("it is about images")
    for name, section in file.data.items():
        if isinstance(section, Drawings):
            yield f"data.{name}.source", _refused('"drawings" are pictures')
        elif isinstance(section, Rows) and section.images is not None:
            yield f"data.{name}.images", _refused("its rows hold pictures")


def _refused(what: str) -> str:
    return f'{what}, and a model of kind "text" is given none; set model.kind = "image-text" for a model that reads them, or remove it'
