"""One forward pass worth of token sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, or rows of packed documents.

    input_ids (sequences, tokens) int64; attention_mask the same, 1 for real tokens; loss_mask the same, bool, True for a
    token that is to be predicted (its prediction comes from the position before it). position_ids (sequences, tokens) int64 where
    documents are packed: they restart at 0 with each document, and no mask is passed to the model; else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    position_ids: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def n_loss_tokens(self) -> int:
        return int(self.loss_mask[:, 1:].sum())

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with."""
        where = {"attention_mask": self.attention_mask} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids, **where, "use_cache": False}

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        if self.input_ids.device == device:
            return self
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.loss_mask.to(device), positions)

    def without_loss(self) -> Batch:
        """The same with nothing to predict: keeps ranks in step where one has no sequences left."""
        return Batch(self.input_ids, self.attention_mask, torch.zeros_like(self.loss_mask), self.position_ids)
