"""Text to token batches: sources, splits by hash, response masks, and the order in which training reads.

A *sequence* is at most `seq_len` token ids with a response mask: in a dialogue the assistant's tokens, in plain text
all. Every piece of text belongs to one split by its own hash, so splits never overlap and do not move when a source
grows. The `builtin` source is text that no model wrote: labelled questions and answers generated from a seed, and the
English of Python's own manual (`pydoc_data.topics`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DataError
from harness.tasks.world import facts

SPLITS = {"train": 60, "validation": 5, "calibration": 10, "diagnostics": 25}
"""Shares of the splits in percent."""
N_DIALOGUE_TURNS = 1600
SHORTEST_TEXT = 32
"""Rests of plain text shorter than this many tokens are dropped."""


@dataclass(frozen=True)
class Sequence:
    """Token ids and, for each, whether it is part of a response."""

    token_ids: tuple[int, ...]
    is_response: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Turn:
    """One labelled question and its answer."""

    question: str
    answer: str


def split_of(text: str) -> str:
    """The split that a piece of text belongs to."""
    position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
    for name, share in SPLITS.items():
        position -= share
        if position < 0:
            return name
    raise AssertionError("the shares of SPLITS do not add up to 100")


def builtin_fingerprint() -> str:
    """sha256 of the natural text of the builtin source: it differs between versions of Python."""
    return hashlib.sha256(_topics_file().read_bytes()).hexdigest()


def builtin_sequences(tokenizer: Any, *, seq_len: int, seed: int, eos_ids: set[int]) -> dict[str, list[Sequence]]:
    """Sequences of the builtin source by split, each split in an order given by hashes.

    Raises:
        DataError: the tokenizer has no chat template, or one whose rendering of a dialogue does not begin with the
            rendering of its beginning.
    """
    by_split: dict[str, list[Sequence]] = {name: [] for name in SPLITS}
    for split, turns in _turns_by_split(seed).items():
        by_split[split] += _dialogues(tokenizer, turns, seq_len, eos_ids)
    for text in natural_texts():
        token_ids = tokenizer(text)["input_ids"]
        for start in range(0, len(token_ids), seq_len):
            piece = tuple(token_ids[start : start + seq_len])
            if len(piece) >= SHORTEST_TEXT:
                by_split[split_of(repr(piece))].append(Sequence(piece, (True,) * len(piece)))
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


def render_dialogue(tokenizer: Any, turns: list[Turn], eos_ids: set[int]) -> Sequence:
    """Token ids of a dialogue in the chat template; responses are the assistant's tokens up to the end-of-turn one."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, and a dialogue cannot be written without one")
    messages: list[dict[str, str]] = []
    mask: list[bool] = []
    rendered: list[int] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        prompt = _apply(tokenizer, messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": turn.answer})
        whole = _apply(tokenizer, messages, add_generation_prompt=False)
        if prompt[: len(rendered)] != rendered or whole[: len(prompt)] != prompt:
            raise DataError(
                "the chat template renders the beginning of a dialogue differently once it goes on; no response mask can be made"
            )
        response = whole[len(prompt) :]
        ends = [i for i, token in enumerate(response) if token in eos_ids]
        n_response = ends[0] + 1 if ends else len(response)
        mask += [False] * (len(prompt) - len(rendered)) + [True] * n_response + [False] * (len(response) - n_response)
        rendered = whole
    return Sequence(tuple(rendered), tuple(mask))


def training_order(sequences: list[Sequence], *, tokens: int, epochs: int, seed: int) -> tuple[list[int], int]:
    """Indices of the sequences that a budget reads, in order, and how many passes over the data that takes.

    Every pass is shuffled by `seed`. DataError if `epochs` passes hold fewer than `tokens` tokens.
    """
    available = sum(map(len, sequences))
    if available * epochs < tokens:
        raise DataError(
            f"the training split holds {available:,} tokens; {epochs} pass{'es' * (epochs > 1)} over it lack "
            f"{tokens - available * epochs:,} of the {tokens:,} asked for: lower training.tokens, add data, or raise training.epochs"
        )
    order: list[int] = []
    read = 0
    for epoch in range(epochs):
        indices = list(range(len(sequences)))
        random.Random(f"{seed} {epoch}").shuffle(indices)
        for index in indices:
            if read >= tokens:
                return order, -(-read // available)
            order.append(index)
            read += len(sequences[index])
    return order, epochs


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


def _dialogues(tokenizer: Any, turns: list[Turn], seq_len: int, eos_ids: set[int]) -> Iterator[Sequence]:
    """As many turns in one dialogue as fit; a turn that fits nowhere is left out."""
    current: list[Turn] = []
    done: Sequence | None = None
    for turn in turns:
        longer = render_dialogue(tokenizer, [*current, turn], eos_ids)
        if len(longer) <= seq_len:
            current, done = [*current, turn], longer
            continue
        if done is not None:
            yield done
        alone = render_dialogue(tokenizer, [turn], eos_ids)
        current, done = ([turn], alone) if len(alone) <= seq_len else ([], None)
    if done is not None:
        yield done


def _apply(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
