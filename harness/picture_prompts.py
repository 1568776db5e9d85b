"""Prompts that show pictures: the marks of a task's text become the places of its images in a chat, or in plain text. No lm_eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.errors import DataError, ModelError
from harness.images import Image
from harness.models import text_config_with_defaults
from harness.processor import Encoded, Processor
from harness.tasks.picture_rows import MARK


class PicturePrompts:
    """Renders the prompts of one task with the processor of a model.

    context: tokens that the model holds, None where its folder does not say. template_args: given to its chat template.
    """

    def __init__(self, processor: Processor, context: int | None, template_args: dict[str, Any]) -> None:
        self._processor, self._context, self.template_args = processor, context, template_args
        self._known: tuple[str, list[str], Encoded] | None = None

    @staticmethod
    def chat(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """For lm-eval in place of a chat template: the chat itself, of which `render` makes the prompt."""
        return json.dumps([history, add_generation_prompt])

    def render(self, prompt: str, n_images: int, *, is_chat: bool) -> tuple[str, tuple[dict[str, Any], ...]]:
        """(text with a placeholder an image, the chat that it was rendered from; () for plain text) of what lm-eval gave as a prompt.

        Raises:
            DataError: with the reason alone: another number of marks than of images, a chat that cannot be rendered.
        """
        if not is_chat:
            text = "".join(self._processor.image_token if part is None else part for part in _parted(prompt, n_images))
            return self._beginning + text, ()
        history, add_generation_prompt = json.loads(prompt)
        messages = with_images(history, n_images)
        try:
            text = self._processor.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.template_args,
            )
        except ModelError as error:
            raise DataError(str(error)) from error
        return text, tuple(messages)

    def encode(self, text: str, images: Sequence[Image]) -> Encoded:
        """Token ids of a rendered prompt; DataError, with the reason alone, for images that the model does not take or hold."""
        digests = [image.digest for image in images]
        if self._known is not None and self._known[:2] == (text, digests):
            return self._known[2]
        try:
            encoded = self._processor.encode(text, images)
        except ModelError as error:
            raise DataError(str(error)) from error
        if self._context is not None and len(encoded.token_ids) > self._context:
            raise DataError(
                f"its prompt with {len(images)} pictures is {len(encoded.token_ids):,} tokens, the model holds {self._context:,}"
            )
        self._known = text, digests, encoded
        return encoded

    @property
    def _beginning(self) -> str:
        """What the tokenizer puts before a plain text."""
        tokenizer = self._processor.tokenizer
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return str(tokenizer.bos_token) if begins else ""


def context_length(folder: Path) -> int | None:
    """Tokens that the model in `folder` holds; None where its configuration does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None  # a folder that holds no model is named where the model is read
    length = text_config_with_defaults(config).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def with_images(history: Sequence[dict[str, str]], n_images: int) -> list[dict[str, Any]]:
    """A chat with its images in the places of the marks `<image>`, or without any mark before the last question.

    Only messages with images have a list of parts for their content. DataError for another number of marks than of images.
    """
    last = max(place for place, message in enumerate(history) if message["role"] == "user")
    marks = [message["content"].count(MARK) for message in history]
    if not any(marks):
        marks[last] = n_images
    elif sum(marks) != n_images:
        raise _other_number(sum(marks), n_images)
    return [
        {**message, "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]}
        if n and (parts := _parted(message["content"], n))
        else dict(message)
        for message, n in zip(history, marks, strict=True)
    ]


def _parted(text: str, n_images: int) -> list[str | None]:
    """A text in parts, None for an image: in the places of the marks, or before it if there are none."""
    pieces = text.split(MARK)
    if len(pieces) == 1:
        return [*[None] * n_images, text]
    if len(pieces) - 1 != n_images:
        raise _other_number(len(pieces) - 1, n_images)
    parts: list[str | None] = []
    for number, piece in enumerate(pieces):
        parts += [None] if number else []
        parts += [piece] if piece else []
    return parts


def _other_number(marks: int, images: int) -> DataError:
    return DataError(f"its text has {marks} marks {MARK} and it has {images} pictures")
