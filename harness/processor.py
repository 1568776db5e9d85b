"""What an image-text model's own processor makes of chats and images: the one rendering that every engine must reproduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from harness.errors import ModelError
from harness.images import Image
from harness.loading import require_own_code
from qad.image_processors import allow_without_torchvision

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""What a template's own code may raise."""
_WITHOUT_CHAT = "ask without a chat, or give the model another template"
_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids")
"""What a processor returns about text, which we have."""
_TOKEN_TYPES = "mm_token_type_ids"
"""What some models are told beside token ids: 1 where a token stands for an image."""


@dataclass(frozen=True)
class Encoded:
    """A rendered chat. token_ids: as the model sees it, image placeholders expanded. unexpanded_ids: one placeholder an image."""

    token_ids: tuple[int, ...]
    unexpanded_ids: tuple[int, ...]


class Processor:
    """The processor of one model. image_token_id: the token that stands for a part of an image."""

    def __init__(self, processor: Any, folder: Path) -> None:
        self._processor, self._folder = processor, folder
        self.tokenizer = processor.tokenizer
        self._chats = processor if getattr(processor, "chat_template", None) is not None else processor.tokenizer
        self.image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **template_args: Any) -> str:
        """A chat as text, one placeholder an image.

        Templates differ in what they take for a text: many that expect images pass over a string without a word. Those are given a list of
        one text in its place.

        Args:
            messages: {"role", "content"}, the content a string or a list of {"type": "text", "text": ...} and {"type": "image"}.
        Raises:
            ModelError: it fails, or leaves out a text of another role than the assistant's.
        """
        given = list(messages) if self._writes_strings else [{**m, "content": _parts(m["content"])} for m in messages]
        try:
            text = self._rendered(given, add_generation_prompt=add_generation_prompt, **template_args)
        except _TEMPLATE_ERRORS as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{self._folder}: its chat template fails ({reason}); {_WITHOUT_CHAT}") from error
        if not all(part["text"].strip() in text for part in _texts_of(messages)):
            raise ModelError(f"{self._folder}: its chat template leaves out a text of the chat; {_WITHOUT_CHAT}")
        return text

    @property
    def has_template(self) -> bool:
        """Whether it can write chats."""
        return bool(getattr(self._chats, "chat_template", None))

    @cached_property
    def _writes_strings(self) -> bool:
        """Whether the content of a message may be a string; a template that has no lists either shall fail by itself."""
        try:
            return "probe" in self._rendered([{"role": "user", "content": "probe"}], add_generation_prompt=False)
        except _TEMPLATE_ERRORS:
            return False

    def _rendered(self, messages: list[dict[str, Any]], **template_args: Any) -> str:
        return str(self._chats.apply_chat_template(messages, tokenize=False, **template_args))

    def encode(self, text: str, images: Sequence[Image]) -> Encoded:
        """Token ids of a rendered chat with its images, in the order of their placeholders.

        Raises:
            ModelError: another number of placeholders than of images, or images that the processor does not take.
        """
        placeholders = text.count(self.image_token)
        if placeholders != len(images):
            raise ModelError(
                f"{placeholders} placeholders {self.image_token} for {len(images)} images; a chat has one for each image, and its "
                "text may not hold any"
            )
        unexpanded = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not images:
            return Encoded(tuple(unexpanded), tuple(unexpanded))
        expanded = self._call([text], [images])["input_ids"][0]
        return Encoded(tuple(int(i) for i in expanded), tuple(unexpanded))

    def unexpanded(self, token_ids: Sequence[int], images: Sequence[Image]) -> tuple[int, ...]:
        """Expanded token ids with one placeholder an image again. ModelError where an image's tokens are not found in their order."""
        kept, begun = [], 0
        for image in images:
            tokens = self.encode(self.image_token, [image]).token_ids
            ends = (
                i for i in range(begun + len(tokens), len(token_ids) + 1) if tuple(token_ids[i - len(tokens) : i]) == tokens
            )
            end = next(ends, None)
            if end is None:
                raise ModelError(
                    f"{self._folder}: the {len(tokens)} tokens of image {image.digest[:12]} are not in its sequence"
                )
            kept += [*token_ids[begun : end - len(tokens)], self.image_token_id]
            begun = end
        return (*kept, *token_ids[begun:])

    def model_inputs(self, images: Sequence[Sequence[Image]], input_ids: Tensor) -> dict[str, Tensor]:
        """What a model is called with beside its token ids, for a batch: pixels, and what else it takes; {} without images.

        Args:
            images: of each sequence, in order. Some processors make fewer tokens of an image that has others beside it, so the images of
                each sequence are one sample; sequences without images are none.
            input_ids: (sequences, tokens).
        Raises:
            ModelError: as `encode`, or the tokens hold another number of places for images than these images take.
        """
        samples = [of_one for of_one in images if of_one]
        if not samples:
            return {}
        texts = [self.image_token * len(of_one) for of_one in samples]
        found = self._call(texts, samples, return_tensors="pt", padding=len(samples) > 1)
        n_taken, n_places = (int((ids == self.image_token_id).sum()) for ids in (found["input_ids"], input_ids))
        if n_taken != n_places:
            raise ModelError(
                f"{self._folder}: its processor makes {n_taken} tokens of {sum(map(len, samples))} images, where the prompts hold {n_places}; the prompts "
                "are of another processor: give the model the processor files of the one that they were made with"
            )
        inputs = {name: value for name, value in found.items() if name not in _OF_TOKENS and isinstance(value, Tensor)}
        if _TOKEN_TYPES in inputs:
            inputs[_TOKEN_TYPES] = (input_ids == self.image_token_id).to(inputs[_TOKEN_TYPES].dtype)
        return inputs

    def _call(self, texts: list[str], images: Sequence[Sequence[Image]], **options: Any) -> Any:
        opened = [[image.open() for image in of_one] for of_one in images]
        try:
            with torch.no_grad():
                return self._processor(text=texts, images=opened, add_special_tokens=False, **options)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError, IndexError) as error:
            every = [image for of_one in opened for image in of_one]
            sizes = ", ".join(f"{image.width} × {image.height}" for image in every[:3])
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"its processor does not take {len(every)} images ({sizes}): {reason}") from error


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts_of(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The texts that no template may leave out; of what the assistant said some leave out the thinking."""
    for message in messages:
        if message["role"] != "assistant":
            yield from (part for part in _parts(message["content"]) if part["type"] == "text")


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Processor:
    """The processor of the model in `folder`.

    Raises:
        ModelError: it has none, it needs a package that is not installed, or takes no images; `require_own_code`.
    """
    from transformers import AutoProcessor

    if trust_remote_code:
        require_own_code(folder)
    allow_without_torchvision()
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{folder}: its processor needs a package that is not installed ({reason}); install it beside the harness"
        ) from error
    except Exception as error:  # the libraries behind it raise whatever they like for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{folder}: its processor cannot be loaded ({reason}); copy the processor files of the original model into it"
        ) from error
    if not hasattr(processor, "image_processor") or getattr(processor, "image_token", None) is None:
        raise ModelError(f'{folder}: {type(processor).__name__} takes no images; the model is kind = "text"')
    return Processor(processor, folder)
