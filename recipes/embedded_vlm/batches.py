"""Batches of pictures with questions, made from a seed and the number of a step: the same in every run, from wherever it resumes.

A sequence is a picture with as many of its questions as fit, as turns of one dialogue: a picture is looked at once and asked often.
The loss is on answers, with the token that ends them. What stands in each cell of the pictures goes with them, for the first stage.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.tasks import drawing_kinds
from harness.tasks.canvas import CELL
from harness.tasks.drawings import SIDE, Difficulty, Draw, Maker, Picture
from recipes.embedded_vlm.build import END, PICTURE, START

LONGEST = 160
"""Tokens of a sequence, those of the picture included."""
N_CELLS = SIDE // CELL
MAKERS: tuple[Maker, ...] = (
    drawing_kinds.page,
    drawing_kinds.chart,
    drawing_kinds.document,
    drawing_kinds.diagram,
    drawing_kinds.scene,
)


@dataclass(frozen=True)
class Batch:
    """input_ids [sequences, tokens]; answers, the same shape, bool: tokens to predict; pixels [sequences, 1, 3, side, side] float32."""

    input_ids: Tensor
    answers: Tensor
    pixels: Tensor


@dataclass(frozen=True)
class Seen:
    """Pictures, [pictures, 1, 3, side, side] float32, and by name of a note what their cells show, [pictures, cells] int64 in 0..n-1."""

    pixels: Tensor
    notes: dict[str, Tensor]


NOTES: dict[str, int] = {
    "what": len(drawing_kinds.WHATS),
    "place": drawing_kinds.N_PLACES,
    "owner": len(drawing_kinds.OWNERS),
}
"""How many values each note about a cell may have; 0 is that of an empty cell."""
_WHATS = {what: number for number, what in enumerate(drawing_kinds.WHATS)}
_OWNERS = {owner: number for number, owner in enumerate(drawing_kinds.OWNERS)}


class Encoder:
    """Turns of a dialogue to tokens, each text once. Joined, they are what the chat template gives (a test holds it)."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad_id: int = tokenizer.pad_token_id
        self.ids = cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))

    def turns(self, asked: Iterable[tuple[str, str]], longest: int) -> tuple[list[int], list[bool]]:
        """Token ids and which of them are to be predicted; questions that no longer fit are left out."""
        ids: list[int] = []
        predicted: list[bool] = []
        for question, answer in asked:
            opening = f"{START}user\n" + ("" if ids else PICTURE)
            prompt = (*self.ids(opening), *self.ids(question), *self.ids(f"{END}\n{START}assistant\n"))
            before = (*self.ids("\n"), *prompt) if ids else prompt
            answered = (*self.ids(answer), *self.ids(END))
            if ids and len(ids) + len(before) + len(answered) > longest:
                break
            ids += [*before, *answered]
            predicted += [False] * len(before) + [True] * len(answered)
        return ids, predicted


def seen_batch(*, seed: int, step: int, n: int, shares: Sequence[float]) -> Seen:
    """`n` pictures of the training side with what stands in their cells."""
    drawn = _drawn(seed, step, n, shares)
    notes = {name: np.zeros((n, N_CELLS, N_CELLS), dtype=np.int64) for name in NOTES}
    for number, picture in enumerate(drawn):
        for cell in picture.cells:
            where = number, cell.row, cell.column
            notes["what"][where] = _WHATS[cell.what]
            notes["place"][where] = cell.place
            notes["owner"][where] = _OWNERS[cell.owner]
    pixels = normalized(np.stack([picture.pixels for picture in drawn])).unsqueeze(1)
    return Seen(pixels, {name: torch.from_numpy(of_all.reshape(n, -1)) for name, of_all in notes.items()})


def training_batch(encoder: Encoder, *, seed: int, step: int, n: int, shares: Sequence[float]) -> Batch:
    """`n` pictures of the training side with their questions; `shares`: of each of `MAKERS` among them."""
    drawn = _drawn(seed, step, n, shares)
    rng = random.Random(f"embedded vlm questions {seed} {step}")
    sequences = []
    for picture in drawn:
        questions = rng.sample(picture.questions, len(picture.questions))
        sequences.append(encoder.turns([(q.text, q.answer) for q in questions], LONGEST))
    return collate(sequences, [picture.pixels for picture in drawn], encoder.pad_id)


def _drawn(seed: int, step: int, n: int, shares: Sequence[float]) -> list[Picture]:
    rng = random.Random(f"embedded vlm {seed} {step}")
    draw = Draw(rng, "train", Difficulty())
    return [_training_picture(maker, draw) for maker in rng.choices(MAKERS, shares, k=n)]


def _training_picture(maker: Maker, draw: Draw) -> Picture:
    while (picture := maker(draw)).side != "train":
        pass
    return picture


def collate(sequences: Sequence[tuple[list[int], list[bool]]], pictures: Sequence[Any], pad_id: int) -> Batch:
    """Sequences filled up on the right, where a causal model does not see what fills them."""
    longest = max(len(ids) for ids, _ in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id)
    answers = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, (ids, predicted) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        answers[row, : len(ids)] = torch.tensor(predicted)
    return Batch(input_ids, answers, normalized(np.stack(pictures)).unsqueeze(1))


def normalized(pixels: Any) -> Tensor:
    """[n, side, side, 3] uint8 to [n, 3, side, side] float32 in -1 to 1, as the image processor does it (a test holds it)."""
    return torch.tensor(pixels).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
