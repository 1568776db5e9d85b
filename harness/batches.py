"""Token sequences as padded batches, and as the tensors of a stored data stage."""

from __future__ import annotations

import collections.abc
import random
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from harness.data import Sequence
from harness.errors import DataError
from harness.schema import Training
from qad.batch import Batch
from qad.packing import pack, row_positions

if TYPE_CHECKING:
    from harness.processor import Processor

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


def batch_of(sequences: list[Sequence], processor: Processor | None = None) -> Batch:
    """One right-padded batch. Tokens that stand for an image are never in the loss; pixels are made when a model is called.

    processor: of an image-text model; ValueError if there are images and it is not given.
    """
    tensors = as_tensors(sequences)
    ids = tensors["token_ids"].long()
    positions = torch.arange(ids.shape[1])
    attention = (positions < tensors["lengths"][:, None]).long()
    loss_mask = tensors["is_response"].bool()
    if not any(sequence.images for sequence in sequences):
        return Batch(ids, attention, loss_mask)
    if processor is None:
        raise ValueError("sequences with images need the processor of the model")
    is_image = ids == processor.image_token_id
    image_inputs = partial(processor.model_inputs, [sequence.images for sequence in sequences], ids)
    return Batch(ids, attention, loss_mask & ~is_image, image_inputs=image_inputs, is_image=is_image)


class Batches(collections.abc.Sequence[Batch]):
    """Groups of sequences as batches, each made when it is asked for."""

    def __init__(
        self, sequences: collections.abc.Sequence[Sequence], groups: list[list[int]], processor: Processor | None
    ) -> None:
        self._sequences, self._groups, self._processor = sequences, groups, processor

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            return Batches(self._sequences, self._groups[index], self._processor)
        return batch_of([self._sequences[i] for i in self._groups[index]], self._processor)


def batches_of(sequences: collections.abc.Sequence[Sequence], processor: Processor | None = None) -> Batches:
    """Batches of about FORWARD_TOKENS tokens, in order."""
    longest = max(map(len, sequences), default=1)
    size = max(1, FORWARD_TOKENS // longest)
    places = range(len(sequences))
    return Batches(sequences, [list(places[i : i + size]) for i in range(0, len(sequences), size)], processor)


def batches_by_length(
    sequences: collections.abc.Sequence[Sequence], processor: Processor | None = None
) -> tuple[list[int], Batches]:
    """Batches of at most about FORWARD_TOKENS tokens with padding, the shortest sequences first, and the order of the sequences in them."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    groups: list[list[int]] = []
    for index in order:
        if not groups or (len(groups[-1]) + 1) * len(sequences[index]) > FORWARD_TOKENS:
            groups.append([])
        groups[-1].append(index)
    return order, Batches(sequences, groups, processor)


class TrainingSteps(collections.abc.Sequence[list[Batch]]):
    """The optimizer steps that a budget reads, each a list of batches, made when they are asked for.

    Every pass over the sequences is shuffled by the seed. A row is one sequence or, packed, as many as fit in `seq_len`, in order; a
    step is `batch_size` rows, in batches of `micro_batch_size`. processor: of an image-text model.

    Raises:
        DataError: the sequences hold fewer tokens than the budget, or the budget is less than one step.
    """

    def __init__(self, sequences: Any, settings: Training, *, seq_len: int, processor: Processor | None = None) -> None:
        self._sequences, self._settings, self._processor = sequences, settings, processor
        lengths = [int(n) for n in sequences.lengths]
        order, self.epochs_read = training_order(lengths, tokens=settings.tokens, epochs=settings.epochs, seed=settings.seed)
        self._rows = [[index] for index in order]
        if settings.packing:
            self._rows = [[order[i] for i in row] for row in pack([lengths[i] for i in order], seq_len)]
        self.n_tokens = sum(lengths[i] for i in order)
        if len(self._rows) < settings.batch_size:
            raise DataError(
                f"training.tokens {settings.tokens:,} is less than one optimizer step: it reads {len(self._rows)} rows, batch_size is "
                f"{settings.batch_size}; raise tokens or lower batch_size"
            )

    def __len__(self) -> int:
        return -(-len(self._rows) // self._settings.batch_size)

    def __getitem__(self, step: Any) -> Any:
        if not 0 <= step < len(self):
            raise IndexError(step)
        size = self._settings.batch_size
        rows = self._rows[step * size : (step + 1) * size]
        micro = self._settings.micro_batch_size or size
        return [self._batch(rows[start : start + micro]) for start in range(0, len(rows), micro)]

    @property
    def budget(self) -> dict[str, Any]:
        """What was read: tokens, tokens in the loss, steps, passes over the data."""
        loss_tokens = sum(self._loss_tokens(step) for step in range(len(self)))
        return {"tokens": self.n_tokens, "loss_tokens": loss_tokens, "steps": len(self), "epochs_read": self.epochs_read}

    def require_loss_tokens(self) -> None:
        """DataError for a step of which no token is to be predicted."""
        for index in range(len(self)):
            if not self._loss_tokens(index):
                raise DataError(
                    f"step {index} of {len(self)}: none of its {self._settings.batch_size} rows has a token of a response, so that nothing is "
                    'learned from it; raise training.batch_size, give data with responses, or set loss_on = "all"'
                )

    def _loss_tokens(self, step: int) -> int:
        return sum(batch.n_loss_tokens for batch in self[step])

    def _batch(self, rows: list[list[int]]) -> Batch:
        documents = [[_counted(self._sequences[i], self._settings.loss_on) for i in row] for row in rows]
        if self._settings.packing:
            return packed_batch(documents, self._processor)
        return batch_of([sequence for (sequence,) in documents], self._processor)


def packed_batch(rows: list[list[Sequence]], processor: Processor | None = None) -> Batch:
    """Rows of whole documents, one behind the other: positions restart with each, and its first token is not predicted.

    The padding at the end of a row is a document of its own. Images are in the order of their documents.
    """
    batch = batch_of([_joined(row) for row in rows], processor)
    if processor is not None and batch.is_image is not None:
        images = [document.images for row in rows for document in row]
        batch = replace(batch, image_inputs=partial(processor.model_inputs, images, batch.input_ids))
    width = batch.input_ids.shape[1]
    return replace(batch, position_ids=torch.stack([row_positions([len(document) for document in row], width) for row in rows]))


def _joined(row: list[Sequence]) -> Sequence:
    """The documents of a row as one sequence."""
    ids = [token for document in row for token in document.token_ids]
    mask = [flag and i > 0 for document in row for i, flag in enumerate(document.is_response)]
    return Sequence(tuple(ids), tuple(mask), tuple(image for document in row for image in document.images))


def validation_batches(sequences: Any, loss_on: str, processor: Processor | None = None) -> Batches:
    """Held-out sequences as training sees them, in batches for a forward pass."""
    return batches_of([_counted(sequence, loss_on) for sequence in sequences], processor)


def training_order(lengths: list[int], *, tokens: int, epochs: int, seed: int) -> tuple[list[int], int]:
    """Indices of the sequences that a budget reads, in order, and how many passes over the data that takes.

    Every pass is shuffled by `seed`. DataError if `epochs` passes hold fewer than `tokens` tokens.
    """
    available = sum(lengths)
    if available * epochs < tokens:
        raise DataError(
            f"the training split holds {available:,} tokens; {epochs} pass{'es' * (epochs > 1)} over it lack "
            f"{tokens - available * epochs:,} of the {tokens:,} asked for: lower training.tokens, add data, or raise training.epochs"
        )
    order: list[int] = []
    read = 0
    for epoch in range(epochs):
        indices = list(range(len(lengths)))
        random.Random(f"{seed} {epoch}").shuffle(indices)
        for index in indices:
            if read >= tokens:
                return order, -(-read // available)
            order.append(index)
            read += lengths[index]
    return order, epochs


def _counted(sequence: Sequence, loss_on: str) -> Sequence:
    return sequence if loss_on == "assistant" else replace(sequence, is_response=(True,) * len(sequence))


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """What a model is called with."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.make_image_inputs()}


class Inputs(collections.abc.Sequence[dict[str, Tensor]]):
    """What a model is called with for each of `batches`, on `device`: made when it is asked for, as they are."""

    def __init__(self, batches: collections.abc.Sequence[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return inputs_of(self._batches[index].to(self._device))


def ticking(batches: collections.abc.Sequence[Any], advance: Any) -> Any:
    """The batches one by one, each reported to `advance`."""
    for index, batch in enumerate(batches):
        advance(index, len(batches), "")
        yield batch
    advance(len(batches), len(batches), "")
