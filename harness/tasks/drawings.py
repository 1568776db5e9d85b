"""Small generated pictures with questions and answers, and which of them may be trained on.

Every picture belongs to one side, "train" or "held-out", by two rules:

- A made-up word belongs to a side by its hash, and a picture holds words of its own side alone: no word of a held-out picture
  is ever seen in training, wherever and in whatever kind of picture.
- What a picture tells, all its answers together and in order (the series of values of a chart, the fields of a document, the
  arrangement of a diagram, the words of a scene), belongs to a side by its hash, whatever colours and places it is drawn
  with: no held-out series, document, arrangement or scene is ever seen in training, so no picture is either.

Labels of documents, shapes and colours are the same on both sides; so are single values, of which there are few.
What a kind of picture shows: `harness/tasks/drawing_kinds.py`. How hard it is to see is told by its specks: a share of its pixels, taken
by chance, has a colour by chance.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from harness.errors import DataError
from harness.tasks.canvas import CELL, Canvas, Cell

SIDE = 8 * CELL
"""Pixels of a side of every picture."""
GREY = (128, 128, 128)
"""Of the picture that shows nothing. Not 127 and a half: an Idefics3 drops a picture whose normalized pixels are all zero."""

Side = Literal["train", "held-out"]
MOST_TRIED = 20_000
"""Draws that find nothing new after which there is nothing: four times what the rarest chart takes on average."""
_HELD_OUT_OF = 8
"""One word and one content of so many is held out."""
_CONSONANTS, _VOWELS = "BCDFGHJKLMNPRSTVWZ", "AEIOU"


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How hard the pictures are: fixed on the BF16 model, before any score of a quantized one.

    bars, fields, marks, signs, word_length: the least and the most of them in a picture. levels: the largest value of a chart, at most 9.
    number_length: most digits of a number in a form. specks: the least and the largest share of pixels that are specks.
    """

    bars: tuple[int, int] = (3, 4)
    levels: int = 7
    fields: tuple[int, int] = (3, 4)
    number_length: int = 3
    marks: tuple[int, int] = (4, 4)
    signs: tuple[int, int] = (1, 2)
    word_length: tuple[int, int] = (3, 5)
    specks: tuple[float, float] = (0.0, 0.6)


@dataclass(frozen=True)
class Question:
    """`kind` names what is asked, within a kind of picture."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """`pixels`: [SIDE, SIDE, 3] uint8. `style`: what else is worth telling, such as "bar". `content`: what decides its side.

    `cells`: what stands where, for a training that teaches to see before it teaches to answer.
    """

    kind: str
    style: str
    pixels: Any
    content: str
    questions: tuple[Question, ...]
    cells: tuple[Cell, ...]

    @property
    def side(self) -> Side:
        return side_of(self.content)


@dataclass
class Draw:
    """What the maker of a picture draws from: chance, the side it is for, and how hard it shall be."""

    rng: random.Random
    side: Side
    difficulty: Difficulty

    def between(self, bounds: tuple[int, int]) -> int:
        return self.rng.randint(*bounds)

    def words(self, n: int) -> list[str]:
        """Different made-up words of the side."""
        found: dict[str, None] = {}
        while len(found) < n:
            word = made_up_word(self.rng, self.between(self.difficulty.word_length))
            if side_of_word(word) == self.side:
                found[word] = None
        return list(found)

    def picture(self, kind: str, style: str, canvas: Canvas, content: str, questions: Sequence[Question]) -> Picture:
        """What was drawn, with specks."""
        pixels = speckled(canvas.pixels, self.rng.uniform(*self.difficulty.specks), self.rng)
        return Picture(kind, style, pixels, f"{kind} {content}", tuple(questions), tuple(canvas.cells))


Maker = Callable[[Draw], Picture]


def side_of(content: str) -> Side:
    """The side of what a picture tells."""
    return "held-out" if hashlib.sha256(content.encode()).digest()[0] % _HELD_OUT_OF == 0 else "train"


def side_of_word(word: str) -> Side:
    """The side of a word, in pictures of every kind."""
    return side_of(f"word {word}")


def made_up_word(rng: random.Random, length: int) -> str:
    """Consonants and vowels in turn, in capitals."""
    first = rng.randrange(2)
    return "".join(rng.choice(_CONSONANTS if place % 2 == first else _VOWELS) for place in range(length))


def pictures(maker: Maker, side: Side, *, seed: str, difficulty: Difficulty | None = None) -> Iterator[Picture]:
    """Pictures of one side, no content twice; the same for the same arguments.

    DataError once there are no more: an easy kind has few.
    """
    draw = Draw(random.Random(f"{maker.__name__} {side} {seed}"), side, difficulty or Difficulty())
    seen: set[str] = set()
    n_tried = 0
    while n_tried < MOST_TRIED:
        picture = maker(draw)
        n_tried += 1
        if picture.side == side and picture.content not in seen:
            seen.add(picture.content)
            n_tried = 0
            yield picture
    raise DataError(
        f"a {maker.__name__} has {len(seen):,} different contents on the side {side}: {MOST_TRIED:,} draws more found no other"
    )


def speckled(pixels: Any, share: float, rng: random.Random) -> Any:
    """A copy in which about so large a share of the pixels, in steps of 1/256, has a colour by chance."""
    chosen = np.frombuffer(rng.randbytes(SIDE * SIDE), dtype=np.uint8).reshape(SIDE, SIDE) < round(256 * share)
    colours = np.frombuffer(rng.randbytes(3 * int(chosen.sum())), dtype=np.uint8).reshape(-1, 3)
    found = pixels.copy()
    found[chosen] = colours
    return found


def one_question(picture: Picture, rng: random.Random, kinds: tuple[str, ...]) -> Question:
    """A question of a picture: its kind first, so that each kind is asked as often, however many questions it has."""
    by_kind = [[question for question in picture.questions if question.kind == kind] for kind in kinds]
    return rng.choice(rng.choice([questions for questions in by_kind if questions]))


def grey_pixels() -> Any:
    """A picture that shows nothing, of the same size."""
    return Canvas(SIDE, GREY).pixels
