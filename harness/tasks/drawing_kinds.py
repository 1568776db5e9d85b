"""What the generated pictures show: charts, documents, diagrams, signs in a scene, and pages of text for training alone.

A maker draws one picture with all questions that it answers, and notes what stands in each cell of the grid. Text stands on the grid;
a value of a chart fills or marks the row of cells that bears its number.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.tasks.canvas import CELL, Canvas, Colour
from harness.tasks.drawings import SIDE, Difficulty, Draw, Maker, Picture, Question, side_of_word

PAPER: tuple[Colour, ...] = ((255, 255, 255), (250, 246, 232), (236, 242, 250))
INK: tuple[Colour, ...] = ((0, 0, 0), (24, 28, 90), (90, 20, 20))
STRONG: dict[str, Colour] = {"red": (200, 30, 30), "blue": (30, 60, 200), "green": (20, 130, 50), "black": (20, 20, 20)}
FAINT: Colour = (214, 214, 214)
POINTER: Colour = (150, 150, 150)
N_COLUMNS = SIDE // CELL

FORM = {
    "NAME": "What is the name?",
    "CITY": "What is the city?",
    "SIGN": "Who signed?",
    "DATE": "What is the date?",
    "ROOM": "What is the room?",
    "CODE": "What is the code?",
    "TOTAL": "What is the total?",
    "PAID": "How much was paid?",
    "AGE": "What is the age?",
    "PAGE": "What is the page?",
}
_WORDY = ("NAME", "CITY", "SIGN")
_LARGEST = {"DATE": 31, "AGE": 99}
ITEMS = ("TEA", "MILK", "RICE", "FISH", "SALT", "SOAP", "CAKE", "NUTS")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond", "bar", "frame")
MARKS = "KLMNPRSTVWXZ"
"""Letters beside the shapes of a diagram: none of those that name the options."""
OPTIONS = "ABCD"


WHATS = ("", *string.ascii_uppercase, *string.digits, "top", "column", *SHAPES)
OWNERS = ("", *string.ascii_uppercase, *string.digits, *STRONG, *FORM, *ITEMS, "SHOP", "largest", "smallest", *SHAPES)
N_PLACES = 10
"""What the notes about a cell may say: an empty cell has the first of each."""


def chart(draw: Draw) -> Picture:
    """Bars or a line over three or four letters: values, the largest and the smallest, differences."""
    rng = draw.rng
    style = rng.choice(("bar", "line"))
    n = draw.between(draw.difficulty.bars)
    values = [rng.randint(1, draw.difficulty.levels) for _ in range(n)]
    labels = rng.sample(string.ascii_uppercase, n)
    extremes = {
        name: value for name, value in (("largest", max(values)), ("smallest", min(values))) if values.count(value) == 1
    }
    canvas = Canvas(SIDE, rng.choice(PAPER))
    ink, colour = rng.choice(INK), rng.choice(list(STRONG.values()))
    bottom = SIDE - CELL
    for level in range(1, draw.difficulty.levels + 1):
        canvas.text(str(level), 0, bottom - level * CELL, ink)
        canvas.fill((CELL, bottom - level * CELL, SIDE, bottom - level * CELL + 1), FAINT)
    canvas.fill((CELL, bottom, SIDE, bottom + 1), ink)
    lefts = [CELL + 2 * CELL * place for place in range(n)]
    for left, label, value in zip(lefts, labels, values, strict=True):
        canvas.text(label, left, bottom, ink)
        owner = next((name for name, extreme in extremes.items() if extreme == value), "")
        canvas.note(left, bottom, label, value, owner)
        if style == "bar":
            canvas.fill((left + 1, bottom - value * CELL, left + CELL - 1, bottom), colour)
            for level in range(1, value):
                canvas.note(left, bottom - level * CELL, "column", 0, label)
        canvas.note(left, bottom - value * CELL, "top", value, label)
    if style == "line":
        points = [(left + 3, bottom - value * CELL + 3) for left, value in zip(lefts, values, strict=True)]
        for start, end in itertools.pairwise(points):
            canvas.line(start, end, colour, 2)
        for x, y in points:
            canvas.fill((x - 2, y - 2, x + 4, y + 4), colour)
    questions = [
        Question("value", f"What is the value of {label}?", str(value)) for label, value in zip(labels, values, strict=True)
    ]
    questions += [
        Question("extreme", f"Which is the {name}?", labels[values.index(extreme)]) for name, extreme in extremes.items()
    ]
    first, second = rng.sample(range(n), 2)
    questions.append(
        Question(
            "difference",
            f"What is the difference between {labels[first]} and {labels[second]}?",
            str(abs(values[first] - values[second])),
        )
    )
    return draw.picture("chart", style, canvas, str(values), questions)


def document(draw: Draw) -> Picture:
    """A form with three or four of ten fields, or a receipt of a shop: what stands there."""
    return _form(draw) if draw.rng.random() < 0.6 else _receipt(draw)


def _form(draw: Draw) -> Picture:
    rng = draw.rng
    labels = rng.sample(list(FORM), draw.between(draw.difficulty.fields))
    words = iter(draw.words(len(_WORDY)))
    values = [_field(draw, label, words) for label in labels]
    canvas, ink = _sheet(draw)
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        canvas.text(label, 0, 2 * row * CELL, ink)
        canvas.text(value, rng.randint(1, N_COLUMNS - len(value)) * CELL, (2 * row + 1) * CELL, ink, label)
    questions = [Question("field", FORM[label], value) for label, value in zip(labels, values, strict=True)]
    return draw.picture("document", "form", canvas, str(values), questions)


def _field(draw: Draw, label: str, words: Iterator[str]) -> str:
    rng = draw.rng
    if label in _WORDY:
        return next(words)
    if label == "CODE":
        return "".join(rng.choice(string.digits + string.ascii_uppercase) for _ in range(3)) + rng.choice(string.digits)
    length = rng.randint(1, draw.difficulty.number_length)
    return str(rng.randint(1, _LARGEST[label]) if label in _LARGEST else rng.randint(10 ** (length - 1), 10**length - 1))


def _receipt(draw: Draw) -> Picture:
    rng = draw.rng
    items = rng.sample(ITEMS, draw.between(draw.difficulty.fields) - 1)
    prices = [rng.randint(2, 30) for _ in items]
    (shop,) = draw.words(1)
    canvas, ink = _sheet(draw)
    canvas.text(shop, (N_COLUMNS - len(shop)) // 2 * CELL, 0, ink, "SHOP")
    rows = [*zip(items, map(str, prices), strict=True), ("TOTAL", str(sum(prices)))]
    for row, (label, value) in enumerate(rows, start=2):
        top = (row + (label == "TOTAL")) * CELL
        canvas.text(label, 0, top, ink)
        canvas.text(value, (N_COLUMNS - len(value)) * CELL, top, ink, label)
    canvas.fill((0, top - 4, SIDE, top - 3), ink)
    questions = [
        Question("field", f"What does the {item.lower()} cost?", str(price)) for item, price in zip(items, prices, strict=True)
    ]
    questions += [Question("field", FORM["TOTAL"], str(sum(prices))), Question("field", "What is the shop?", shop)]
    return draw.picture("document", "receipt", canvas, str([shop, *prices]), questions)


def _sheet(draw: Draw) -> tuple[Canvas, Colour]:
    canvas, ink = Canvas(SIDE, draw.rng.choice(PAPER)), draw.rng.choice(INK)
    if draw.rng.random() < 0.5:
        canvas.frame((0, 0, SIDE, SIDE), FAINT)
    return canvas, ink


def diagram(draw: Draw) -> Picture:
    """Four shapes, each with a letter and a line to it: which shape a letter marks, with and without options, and which letter marks a shape."""
    rng = draw.rng
    n = draw.between(draw.difficulty.marks)
    shapes, marks = rng.sample(SHAPES, n), rng.sample(MARKS, n)
    places = sorted(rng.sample(range(4), n))
    canvas, ink = Canvas(SIDE, rng.choice(PAPER)), rng.choice(INK)
    for place, shape, mark in zip(places, shapes, marks, strict=True):
        left, top = place % 2 * 4 * CELL, place // 2 * 4 * CELL
        right, low = rng.randrange(2), rng.randrange(2)
        middle = left + 2 * CELL
        canvas.line((middle, top + 2 * CELL), (left + 4 + 3 * CELL * right, top + 4 + 3 * CELL * low), POINTER)
        canvas.paint(_SHAPES[shape], left + CELL, top + CELL, rng.choice(list(STRONG.values())))
        canvas.text(mark, left + 3 * CELL * right, top + 3 * CELL * low, ink, shape)
        for cell in range(4):
            canvas.note(left + CELL * (1 + cell % 2), top + CELL * (1 + cell // 2), shape, 0, mark)
    questions = []
    for shape, mark in zip(shapes, marks, strict=True):
        options = [shape, *rng.sample([other for other in shapes if other != shape], 3)]
        rng.shuffle(options)
        listed = ", ".join(f"{letter} {option}" for letter, option in zip(OPTIONS, options, strict=True))
        questions += [
            Question("option", f"What does {mark} mark? {listed}", OPTIONS[options.index(shape)]),
            Question("shape", f"What does {mark} mark?", shape),
            Question("mark", f"Which letter marks the {shape}?", mark),
        ]
    return draw.picture("diagram", f"{n} shapes", canvas, str(list(zip(places, shapes, marks, strict=True))), questions)


def _shape_masks() -> dict[str, np.ndarray[Any, Any]]:
    """Sixteen by sixteen pixels each; every second row and column of a shape is counted from its middle."""
    y, x = (2 * np.indices((16, 16)) - 15).astype(np.int64)
    distance = x * x + y * y
    inner = np.maximum(abs(x), abs(y))
    return {
        "circle": distance <= 210,
        "square": inner <= 13,
        "triangle": (y <= 13) & (2 * abs(x) <= y + 15),
        "cross": (np.minimum(abs(x), abs(y)) <= 3) & (inner <= 15),
        "ring": (distance <= 225) & (distance >= 81),
        "diamond": abs(x) + abs(y) <= 16,
        "bar": (abs(y) <= 5) & (abs(x) <= 15),
        "frame": (inner <= 15) & (inner >= 11),
    }


_SHAPES = _shape_masks()


def scene(draw: Draw) -> Picture:
    """One or two coloured signs on posts before a house and a tree: what they say."""
    rng = draw.rng
    n = draw.between(draw.difficulty.signs)
    colours, words = rng.sample(list(STRONG), n), draw.words(n)
    canvas = Canvas(SIDE, rng.choice(((198, 222, 246), (240, 226, 200), (222, 214, 236))))
    ground = SIDE - CELL
    canvas.fill((0, ground, SIDE, SIDE), rng.choice(((150, 190, 130), (190, 170, 140), (200, 200, 200))))
    _house(canvas, rng.randrange(0, SIDE - 28), ground)
    for number, (colour, word) in enumerate(zip(colours, words, strict=True)):
        room = N_COLUMNS - len(word)
        left = rng.randrange(room + 1) * CELL
        top = (3 * number + rng.randrange(1, 3)) * CELL
        right = left + len(word) * CELL
        canvas.fill(((left + right) // 2 - 1, top, (left + right) // 2 + 1, ground), (110, 80, 50))
        canvas.fill((left - 2, top - 2, right + 2, top + CELL + 2), STRONG[colour])
        canvas.text(word, left, top, (255, 255, 255), colour)
    questions = [
        Question("sign", f"What does the {colour} sign say?", word) for colour, word in zip(colours, words, strict=True)
    ]
    return draw.picture("ocr", f"{n} signs", canvas, str(words), questions)


def _house(canvas: Canvas, left: int, ground: int) -> None:
    wall: Colour = (226, 206, 186)
    canvas.fill((left, ground - 20, left + 28, ground), wall)
    for step in range(14):
        canvas.fill((left + step, ground - 20 - step, left + 28 - step, ground - 19 - step), (176, 120, 100))
    canvas.fill((left + 11, ground - 10, left + 17, ground), (140, 100, 80))


def page(draw: Draw) -> Picture:
    """Lines of characters by chance, for training alone: what a line says."""
    rng = draw.rng
    canvas, ink = _sheet(draw)
    lines = [_characters(draw) for _ in range(rng.randint(2, 4))]
    for number, line in enumerate(lines, start=1):
        left, top = rng.randint(0, N_COLUMNS - len(line)) * CELL, (2 * number - 2 + rng.randrange(2)) * CELL
        canvas.text(line, left, top, ink, str(number))
    questions = [Question("line", f"What does line {number} say?", line) for number, line in enumerate(lines, start=1)]
    return draw.picture("page", f"{len(lines)} lines", canvas, str(lines), questions)


def _characters(draw: Draw) -> str:
    while True:
        alphabet: Sequence[str] = draw.rng.choice(
            (string.ascii_uppercase, string.digits, string.ascii_uppercase + string.digits)
        )
        line = "".join(draw.rng.choice(alphabet) for _ in range(draw.rng.randint(2, 8)))
        if side_of_word(line) == draw.side:
            return line


@dataclass(frozen=True)
class Evaluated:
    """What a task asks about: the maker of its pictures, the kinds of question, and the share of pixels that are specks."""

    maker: Maker
    kinds: tuple[str, ...]
    specks: float

    @property
    def difficulty(self) -> Difficulty:
        return Difficulty(specks=(self.specks, self.specks))


EVALUATED: dict[str, Evaluated] = {
    "mini_chart": Evaluated(chart, ("value", "extreme", "difference"), specks=0.4),
    "mini_document": Evaluated(document, ("field",), specks=0.48),
    "mini_diagram": Evaluated(diagram, ("shape", "mark"), specks=0.6),
    "mini_ocr": Evaluated(scene, ("sign",), specks=0.4),
}
