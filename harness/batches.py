"""Token sequences as padded batches, and as the tensors of a stored data stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.data import Sequence
from qad.distill import Batch

FORWARD_TOKENS = 2048
"""Tokens of a forward pass without gradient, for calibration and diagnostics."""


def as_tensors(sequences: list[Sequence]) -> dict[str, Tensor]:
    """token_ids (sequences, tokens) int32, is_response uint8 and lengths, padded with zeros on the right."""
    width = max(map(len, sequences), default=0)
    ids = torch.zeros(len(sequences), width, dtype=torch.int32)
    mask = torch.zeros(len(sequences), width, dtype=torch.uint8)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence.token_ids)
        mask[row, : len(sequence)] = torch.tensor(sequence.is_response)
    return {"token_ids": ids, "is_response": mask, "lengths": torch.tensor([len(s) for s in sequences], dtype=torch.int32)}


def batch_of(sequences: list[Sequence]) -> Batch:
    """One right-padded batch."""
    tensors = as_tensors(sequences)
    positions = torch.arange(tensors["token_ids"].shape[1])
    attention = (positions < tensors["lengths"][:, None]).long()
    return Batch(tensors["token_ids"].long(), attention, tensors["is_response"].bool())


def batches_of(sequences: list[Sequence]) -> list[Batch]:
    """Batches of about FORWARD_TOKENS tokens, in order."""
    longest = max(map(len, sequences), default=1)
    size = max(1, FORWARD_TOKENS // longest)
    return [batch_of(sequences[i : i + size]) for i in range(0, len(sequences), size)]


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """What a model is called with."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def ticking(batches: list[Any], advance: Any) -> Any:
    """The batches one by one, each reported to `advance`."""
    for index, batch in enumerate(batches):
        advance(index, len(batches), "")
        yield batch
    advance(len(batches), len(batches), "")
