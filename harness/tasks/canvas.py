"""A small raster of its own for the generated pictures: filled shapes, lines and a fixed bitmap font, in integers only.

Nothing is smoothed and no font of the system is read, so the same calls give the same bytes on every machine and with every
version of Pillow. Coordinates are pixels, x to the right and y downwards, a box is (left, top, right, bottom) with the
right and bottom edges outside. What lies beyond the edges is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

CELL = 8
"""Side of a character with the space around it; the glyph itself is 5 wide and 7 high, one pixel from the left and the top."""

_GLYPHS = """
A 0e11111f111111|B 1e11111e11111e|C 0e11101010110e|D 1e11111111111e|E 1f10101e10101f|F 1f10101e101010|G 0e11101711110f
H 1111111f111111|I 0e04040404040e|J 0702020202120c|K 11121418141211|L 1010101010101f|M 111b1515111111|N 11191915131311
O 0e11111111110e|P 1e11111e101010|Q 0e11111115120d|R 1e11111e141211|S 0f10100e01011e|T 1f040404040404|U 1111111111110e
V 11111111110a04|W 11111115151b11|X 11110a040a1111|Y 11110a04040404|Z 1f01020408101f
0 0e11131519110e|1 040c040404040e|2 0e11010204081f|3 1f02040201110e|4 02060a121f0202|5 1f101e0101110e|6 0608101e11110e
7 1f010204080808|8 0e11110e11110e|9 0e11110f01020c|- 0000001f000000|. 00000000000606|: 00060600060600
"""
"""Seven rows of five bits a character, in hexadecimal, the leftmost pixel highest."""


@dataclass(frozen=True)
class Cell:
    """What a cell of the grid shows: `what` by name, its `place` in a text or a value, and the `owner` that a question asks about."""

    column: int
    row: int
    what: str
    place: int
    owner: str


class Canvas:
    """A square picture that is drawn on. `pixels`: [side, side, 3] uint8. `cells`: what was noted about it."""

    def __init__(self, side: int, background: Colour) -> None:
        self.pixels = np.empty((side, side, 3), dtype=np.uint8)
        self.pixels[:] = background
        self.cells: list[Cell] = []

    def note(self, left: int, top: int, what: str, place: int = 0, owner: str = "") -> None:
        """Tell what the cell shows that holds a pixel; draws nothing."""
        self.cells.append(Cell(left // CELL, top // CELL, what, place, owner))

    def fill(self, box: Box, colour: Colour) -> None:
        """A filled rectangle."""
        left, top, right, bottom = box
        self.pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = colour

    def frame(self, box: Box, colour: Colour) -> None:
        """The outline of a rectangle, one pixel wide, inside it."""
        left, top, right, bottom = box
        for edge in (
            (left, top, right, top + 1),
            (left, bottom - 1, right, bottom),
            (left, top, left + 1, bottom),
            (right - 1, top, right, bottom),
        ):
            self.fill(edge, colour)

    def line(self, start: tuple[int, int], end: tuple[int, int], colour: Colour, width: int = 1) -> None:
        """A straight line by Bresenham's rule, with a square pen."""
        for x, y in _on_line(start, end):
            self.fill((x, y, x + width, y + width), colour)

    def paint(self, mask: np.ndarray[Any, Any], left: int, top: int, colour: Colour) -> None:
        """The pixels where `mask`, [height, width] bool, is true."""
        height, width = mask.shape
        side = len(self.pixels)
        y, x = max(0, -top), max(0, -left)
        shown = mask[y : max(y, side - top), x : max(x, side - left)]
        self.pixels[max(top, 0) : top + height, max(left, 0) : left + width][shown] = colour

    def text(self, words: str, left: int, top: int, colour: Colour, owner: str = "") -> None:
        """Characters in cells of `CELL` pixels, from left to right; noted with their places, from 1 on, if they have an owner.

        Raises:
            KeyError: a character that the font lacks.
        """
        for place, character in enumerate(words):
            if character != " ":
                self.paint(_glyph(character), left + place * CELL + 1, top + 1, colour)
                self.note(left + place * CELL, top, character, place + 1 if owner else 0, owner)

    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


@cache
def _glyph(character: str) -> np.ndarray[Any, Any]:
    rows = bytes.fromhex(_font()[character])
    return np.array([[bool(row >> (4 - column) & 1) for column in range(5)] for row in rows])


@cache
def _font() -> dict[str, str]:
    return {entry[0]: entry[2:] for line in _GLYPHS.strip().split("\n") for entry in line.split("|")}


def _on_line(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    (x, y), (to_x, to_y) = start, end
    width, height = abs(to_x - x), -abs(to_y - y)
    step_x, step_y = (1 if x < to_x else -1), (1 if y < to_y else -1)
    error = width + height
    while True:
        yield x, y
        if (x, y) == (to_x, to_y):
            return
        doubled = 2 * error
        if doubled >= height:
            error, x = error + height, x + step_x
        if doubled <= width:
            error, y = error + width, y + step_y
