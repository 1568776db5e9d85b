"""One forward pass worth of token sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, or rows of packed documents.

    input_ids (sequences, tokens) int64; attention_mask the same, 1 for real tokens; loss_mask the same, bool, True for a
    token that is to be predicted (its prediction comes from the position before it). position_ids (sequences, tokens) int64 where
    documents are packed: they restart at 0 with each document, and no mask is passed to the model; else None.

    image_inputs: what an image-text model is called with besides, such as pixel_values, of all images in the order of their tokens; empty
    without images. Or what makes them: it is called each time that `inputs` is read and nothing is kept, so that no batch holds pixels beyond
    a forward pass, and counting opens no image. is_image: (sequences, tokens) bool, True for tokens that stand for an image, which nobody predicts; None without any.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    position_ids: Tensor | None = None
    image_inputs: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] = field(default_factory=dict)
    is_image: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def n_loss_tokens(self) -> int:
        return int(self.predicted.sum())

    @property
    def is_text(self) -> Tensor:
        """(sequences, tokens) bool: real tokens that stand for no image."""
        real = self.attention_mask.bool()
        return real if self.is_image is None else real & ~self.is_image

    @property
    def predicted(self) -> Tensor:
        """(sequences, tokens - 1) bool: positions whose next token is to be predicted; never one that stands for an image."""
        return (self.loss_mask if self.is_image is None else self.loss_mask & ~self.is_image)[:, 1:]

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with, its pixels made anew: read it once for all models that see the batch."""
        where = {"attention_mask": self.attention_mask} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids, **where, **self.make_image_inputs(), "use_cache": False}

    def make_image_inputs(self) -> dict[str, Tensor]:
        """The part of `inputs` that is of images."""
        found = self.image_inputs() if callable(self.image_inputs) else self.image_inputs
        return {name: value.to(self.input_ids.device) for name, value in found.items()}

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; images that are yet to be made will be moved there."""
        if self.input_ids.device == device:
            return self
        positions = None if self.position_ids is None else self.position_ids.to(device)
        is_image = None if self.is_image is None else self.is_image.to(device)
        images = self.image_inputs
        if not callable(images):
            images = {name: value.to(device) for name, value in images.items()}
        ids, mask, loss = (tensor.to(device) for tensor in (self.input_ids, self.attention_mask, self.loss_mask))
        return Batch(ids, mask, loss, positions, images, is_image)

    def without_loss(self) -> Batch:
        """The same with nothing to predict: keeps ranks in step where one has no sequences left."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))
