"""Several documents in one row, kept apart: which share a row, their positions, and the layers that must not mix them.

A packed row holds documents one after the other; `position_ids` start at 0 at each. The model is called with input_ids,
position_ids and use_cache=False, and *without* an attention mask: transformers finds the borders in the positions and lets
attention cross none, but only where it is given neither mask nor cache. Mamba layers know nothing of it there: their
convolution and state run on from one document into the next. After `allow_packing` they see each document on its own.

PACKABLE is what has passed the perturbation test (tests/test_packing.py): changing one document changes no logit of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qad import kv_cache
from qad.backbone import decoder_of
from qad.errors import TrainingError

PACKABLE = frozenset({"llama", "mistral", "nemotron", "nemotron-nas", "nemotron_h", "qwen2", "qwen3", "qwen3_moe"})
"""`config.model_type` of the architectures that keep packed documents apart."""
PACKABLE_WITH_IMAGES = frozenset({"idefics3", "internvl", "llava", "smolvlm"})
"""The same of image-text models, around a decoder that does: they hand positions on as they are, and put images in their places."""
ATTENTIONS = frozenset({"eager", "sdpa", kv_cache.ATTENTION})
"""Attention implementations that do. Flash attention looks for borders in a batch of one row only."""
OPEN_ROWS = 32


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which sequences share a row of `capacity` tokens: the indices of each row, in the order given.

    First fit: a sequence goes to the oldest of the last OPEN_ROWS rows that has room for it, else to a new one. A sequence
    more changes no row but the one it joins.

    Raises:
        ValueError: a length below 1 or above `capacity`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"sequence {index} has {length} tokens; a row holds 1 to {capacity}: cut it, or use longer rows")
        oldest = max(0, len(rows) - OPEN_ROWS)
        row = next((row for row in range(oldest, len(rows)) if room[row] >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= length
    return rows


def row_positions(lengths: Sequence[int], capacity: int) -> Tensor:
    """position_ids (capacity,) int64 of a row: from 0 in each document; the padding after them is one more document."""
    padding = capacity - sum(lengths)
    if padding < 0:
        raise ValueError(f"a row of {capacity} tokens cannot hold {sum(lengths)}; see pack")
    return torch.cat([torch.arange(length) for length in (*lengths, padding)])


def require_packable(model: Any) -> None:
    """TrainingError unless the architecture and the attention of `model` are known to keep packed documents apart."""
    decoder: Any = decoder_of(model)
    attention = decoder.config._attn_implementation
    for part, packable in ((model, PACKABLE if decoder is model else PACKABLE_WITH_IMAGES), (decoder, PACKABLE)):
        if part.config.model_type not in packable:
            raise TrainingError(
                f'{type(model).__name__}: model_type "{part.config.model_type}" is not known to keep packed documents apart; known: '
                f"{', '.join(sorted(packable))}. Set training.packing = false"
            )
    if attention not in ATTENTIONS:
        raise TrainingError(
            f'{type(model).__name__}: attention "{attention}" is not known to keep packed documents apart; known: '
            f"{', '.join(sorted(ATTENTIONS))}. Load the model with one of them, or set training.packing = false"
        )


def allow_packing(model: Any) -> None:
    """Make `model` keep packed documents apart, or raise as `require_packable`; rows that are not packed are unaffected.

    Teacher and student each need it, once, after quantization or before. A model without Mamba layers stays as it is.
    """
    require_packable(model)
    for block in model.modules():
        mixer = getattr(block, "mixer", None)
        if getattr(block, "block_type", None) != "linear_attention" or isinstance(mixer, _ByDocument):
            continue
        # torch.compile would compile anew for every set of lengths: these layers run as they are, between compiled parts.
        eager = {"forward": torch.compiler.disable(_ByDocument.forward)}
        mixer.__class__ = type(f"ByDocument{type(mixer).__name__}", (_ByDocument, type(mixer)), eager)
        block.register_forward_pre_hook(_pass_positions_on, with_kwargs=True)


def _pass_positions_on(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Give the mixer the positions that its block is called with: again, too, where checkpointing repeats the call.

    With a mask or a cache rows are not packed, by the rule of transformers.
    """
    if any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values")):
        return None
    return args, {**kwargs, "packed_positions": kwargs.get("position_ids")}


class _ByDocument(nn.Module):
    """A mixer (batch, tokens, width) -> the same that begins anew at each document.

    Documents become rows, padded on the right where a causal layer does not see it. Those of similar length run together, so
    that padding is never more than the documents themselves.
    """

    def forward(self, hidden_states: Tensor, *args: Any, packed_positions: Tensor | None = None, **kwargs: Any) -> Tensor:
        lengths = None if packed_positions is None else _document_lengths(packed_positions, hidden_states)
        if lengths is None:
            return super().forward(hidden_states, *args, **kwargs)
        documents = hidden_states.flatten(0, 1).split(lengths)
        results: list[Tensor | None] = [None] * len(documents)
        for alike in _of_similar_length(lengths):
            padded = nn.utils.rnn.pad_sequence([documents[i] for i in alike], batch_first=True)
            for i, row in zip(alike, super().forward(padded, *args, **kwargs), strict=True):
                results[i] = row[: lengths[i]]
        return torch.cat(results).view_as(hidden_states)  # type: ignore[arg-type]


def _document_lengths(positions: Tensor, hidden_states: Tensor) -> list[int] | None:
    """Lengths of all documents, row after row; None if every row is a single one. positions: (batch or 1, tokens)."""
    batch, tokens, _ = hidden_states.shape
    positions = positions.expand(batch, tokens)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    first = starts.flatten().nonzero().flatten().tolist()
    if len(first) == batch:
        return None
    return [end - start for start, end in zip(first, [*first[1:], batch * tokens], strict=True)]


def _of_similar_length(lengths: list[int]) -> list[list[int]]:
    """Indices by the number of binary digits of their length: the shortest has more than half the tokens of the longest."""
    found: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        found.setdefault(length.bit_length(), []).append(index)
    return list(found.values())
