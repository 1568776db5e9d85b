"""The source of drawings: generated pictures with what is asked about them, none of which a mini task has.

Charts, documents, diagrams and scenes in turn, of the training side of `harness.tasks.drawings` and as hard as the embedded model learned them. A
picture is one sequence: looked at once and asked often, with labels that are right by construction.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as Pillow

from harness.data import Sequence, split_of
from harness.dialogues import RowError, Turn, render_dialogue, require_template
from harness.errors import DataError
from harness.generation import Ask, image_ask
from harness.images import Image, keep_picture
from harness.schema_data import Drawings
from harness.tasks.drawing_kinds import EVALUATED
from harness.tasks.drawings import pictures

if TYPE_CHECKING:
    from harness.processor import Processor
    from harness.token_store import TokenWriter


def write_drawings(
    name: str,
    section: Drawings,
    writer: TokenWriter,
    *,
    processor: Processor,
    eos_ids: set[int],
    length_key: str | None = None,
) -> dict[str, Any]:
    """Append a sequence for each picture, with as many of its questions as fit; what became of them.

    Args:
        length_key: where `seq_len` was said, if not in the data section `name`.
    Raises:
        DataError: no picture fits `seq_len` with a question, there are not so many pictures, or the processor cannot write a chat.
    """
    counts = {"pictures": 0, "questions": 0, "left_out": 0}
    for image, turns in _drawn(name, section, writer.images):
        n, sequence = len(turns), _dialogue(turns, image, processor, eos_ids)
        while len(sequence) > section.seq_len and n > 1:
            n = min(n - 1, max(1, _n_answers(sequence, section.seq_len)))
            sequence = _dialogue(turns[:n], image, processor, eos_ids)
        n = n if len(sequence) <= section.seq_len else 0
        if n:
            writer.append(split_of(image.digest), sequence)
        counts["pictures"] += n > 0
        counts["questions"] += n
        counts["left_out"] += len(turns) - n
    if not counts["pictures"]:
        raise DataError(
            f"{length_key or f'data.{name}.seq_len'}: no picture fits {section.seq_len} tokens with a question (the last has {len(sequence)}); raise it"
        )
    return counts


def _dialogue(turns: list[Turn], image: Image, processor: Processor, eos_ids: set[int]) -> Sequence:
    return render_dialogue(processor.tokenizer, turns, eos_ids, processor=processor, images=(image,))


def _n_answers(sequence: Sequence, n_tokens: int) -> int:
    """How many answers end within the first tokens of a sequence."""
    mask = sequence.is_response[: n_tokens + 1]
    return sum(here and not after for here, after in pairwise(mask))


def drawing_asks(name: str, section: Drawings, *, processor: Processor, images: Path) -> Iterator[Ask]:
    """Each picture with one of its questions as a prompt; images are kept in the folder `images`. DataError as `write_drawings`."""
    require_template(processor.tokenizer, processor)
    for number, (image, turns) in enumerate(_drawn(name, section, images), start=1):
        content = [{"type": "image"}, {"type": "text", "text": turns[0].question}]
        asked = Ask(number, (), image.digest, turns[0].answer)
        try:
            ask = image_ask(asked, [{"role": "user", "content": content}], (image,), processor)
        except RowError as error:
            raise DataError(f"data.{name}: {error}") from None
        yield ask


def longest_question(processor: Processor, folder: Path) -> int:
    """Tokens of a drawing with one question: the most of one drawing of each kind. Models differ by a factor of ten."""
    asks = drawing_asks("parity", Drawings(source="drawings", pictures=len(EVALUATED)), processor=processor, images=folder)
    return max(len(ask.token_ids) for ask in asks)


def _drawn(name: str, section: Drawings, keep: Path) -> Iterator[tuple[Image, list[Turn]]]:
    seed = f"drawings {section.seed}"
    kinds = [pictures(about.maker, "train", seed=seed) for about in EVALUATED.values()]
    rng = random.Random(seed)
    found = 0
    try:
        for picture in islice((picture for together in zip(*kinds, strict=True) for picture in together), section.pictures):
            turns = [Turn(question.text, question.answer) for question in rng.sample(picture.questions, len(picture.questions))]
            found += 1
            yield keep_picture(Pillow.fromarray(picture.pixels), keep), turns
    except DataError as error:
        raise DataError(f"data.{name}.pictures: there are {found:,}, not {section.pictures:,} ({error}); lower it") from None
