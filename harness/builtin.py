"""The builtin source: text that no model wrote, generated or found on every machine.

Labelled questions and answers from a seed, and the English of Python's own manual (`pydoc_data.topics`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data import SPLITS, Sequence, split_of
from harness.dialogues import RowError, Turn, cut_text, render_dialogue
from harness.errors import DataError
from harness.schema_data import SHORTEST_TEXT
from harness.tasks.world import facts

if TYPE_CHECKING:
    from harness.processor import Processor

N_DIALOGUE_TURNS = 1600


def builtin_fingerprint() -> str:
    """sha256 of the natural text of the builtin source: it differs between versions of Python."""
    return hashlib.sha256(_topics_file().read_bytes()).hexdigest()


def builtin_sequences(
    tokenizer: Any, *, seq_len: int, seed: int, eos_ids: set[int], processor: Processor | None = None
) -> dict[str, list[Sequence]]:
    """Sequences of the builtin source by split, each split in an order given by hashes.

    processor: of an image-text model.

    Raises:
        DataError: the tokenizer has no chat template, or one whose rendering of a dialogue does not begin with the
            rendering of its beginning.
    """
    by_split: dict[str, list[Sequence]] = {name: [] for name in SPLITS}
    for split, turns in _turns_by_split(seed).items():
        by_split[split] += _dialogues(tokenizer, turns, seq_len, eos_ids, processor)
    for text in natural_texts():
        try:
            pieces = cut_text(tokenizer, text, seq_len=seq_len, shortest=SHORTEST_TEXT)
        except RowError as error:
            raise DataError(f"the manual of Python: {error}; take another source") from None
        for piece in pieces:
            by_split[split_of(repr(piece.token_ids))].append(piece)
    for sequences in by_split.values():
        sequences.sort(key=lambda s: hashlib.sha256(repr(s.token_ids).encode()).digest())
    return by_split


def natural_texts() -> list[str]:
    """The sections of Python's manual, without paragraphs that an earlier section has already."""
    specification = importlib.util.spec_from_file_location("topics", _topics_file())
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    seen: set[str] = set()
    texts = []
    for name in sorted(module.topics):
        paragraphs = [p for p in module.topics[name].split("\n\n") if p.strip() and p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        if paragraphs:
            texts.append("\n\n".join(paragraphs))
    return texts


def generated_turns(seed: int) -> list[Turn]:
    """Labelled questions without repetition: sums, facts, texts to read, numbers and words to sort.

    None of them is asked by a mini task: sums and facts of the evaluation are left out by their hash.
    """
    rng = random.Random(seed)
    turns = dict.fromkeys(_fact_turns(rng))
    makers: list[Callable[[random.Random], Turn | None]] = [
        _sum_turn,
        _context_turn,
        _sorting_turn,
        _comparison_turn,
        _alphabet_turn,
    ]
    while len(turns) < N_DIALOGUE_TURNS:
        turn = makers[len(turns) % len(makers)](rng)
        if turn is not None:
            turns[turn] = None
    shuffled = list(turns)
    rng.shuffle(shuffled)
    return shuffled


def _topics_file() -> Path:
    specification = importlib.util.find_spec("pydoc_data.topics")
    if specification is None or specification.origin is None:
        raise DataError(
            "this Python comes without pydoc_data.topics, the text of the builtin source; install a complete Python"
        )
    return Path(specification.origin)


def _turns_by_split(seed: int) -> dict[str, list[Turn]]:
    by_split: dict[str, list[Turn]] = {name: [] for name in SPLITS}
    for turn in generated_turns(seed):
        by_split[split_of(turn.question)].append(turn)
    return by_split


def _dialogues(
    tokenizer: Any, turns: list[Turn], seq_len: int, eos_ids: set[int], processor: Processor | None
) -> Iterator[Sequence]:
    """As many turns in one dialogue as fit; a turn that fits nowhere is left out."""
    current: list[Turn] = []
    done: Sequence | None = None
    for turn in turns:
        longer = render_dialogue(tokenizer, [*current, turn], eos_ids, processor=processor)
        if len(longer) <= seq_len:
            current, done = [*current, turn], longer
            continue
        if done is not None:
            yield done
        alone = render_dialogue(tokenizer, [turn], eos_ids, processor=processor)
        current, done = ([turn], alone) if len(alone) <= seq_len else ([], None)
    if done is not None:
        yield done


def _fact_turns(rng: random.Random) -> list[Turn]:
    turns = [Turn(fact.question, f"{fact.prompt} {fact.answer}.") for fact in facts() if not fact.is_evaluated]
    rng.shuffle(turns)
    return turns


def _sum_turn(rng: random.Random) -> Turn | None:
    from harness.tasks import mini

    a, b = rng.randint(2, 60), rng.randint(2, 60)
    if max(a, b) <= mini.LARGEST_TERM and mini.is_evaluated_sum(a, b):
        return None
    return Turn(mini.sum_question(a, b), mini.worked_sum(a, b))


def _context_turn(rng: random.Random) -> Turn:
    from harness.tasks import mini

    row = mini.context_row(rng, rng.randrange(3))
    sentence = f"{row['question']} {row['answer']}."
    blank = f"{row['question']} ..."
    return Turn(f"{row['text']}\n\nComplete the sentence: {blank}", sentence[0].upper() + sentence[1:])


def _sorting_turn(rng: random.Random) -> Turn:
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    return Turn(
        f"Sort these numbers from smallest to largest: {', '.join(map(str, numbers))}",
        f"From smallest to largest: {', '.join(map(str, sorted(numbers)))}.",
    )


def _comparison_turn(rng: random.Random) -> Turn:
    a, b = rng.sample(range(1, 1000), 2)
    return Turn(f"Which number is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}.")


def _alphabet_turn(rng: random.Random) -> Turn:
    from harness.tasks import mini

    words = rng.sample(mini.PETS + mini.JOBS, 3)
    return Turn(
        f"Put these words in alphabetical order: {', '.join(words)}", f"In alphabetical order: {', '.join(sorted(words))}."
    )
