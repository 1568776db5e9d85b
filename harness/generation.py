"""Text that the model writes itself: prompts to an engine in rounds, responses kept one by one, sequences with their masks.

A round is planned whole, so its batches do not depend on where generation ends; every answer is journalled under what decides
it, and an interrupted generation finds the ones it has. A sequence is the rendered prompt and the response, with the token
that ends a turn where the model ended it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.answering import answer_requests
from harness.data import Sequence, split_of
from harness.dialogues import RowError, Turn, encode_prompt, end_of_turn, n_places, render_prompt, require_template
from harness.engines import Answer, Engine, Failure, Request, Sampling
from harness.errors import DataError, EngineError
from harness.images import FOLDER, Image
from harness.journal import Journal
from harness.row_chats import Message
from harness.rows import FilteredRows, chat_and_images, place_of
from harness.schema_data import Bos, Generated, Teacher
from harness.scorers import SCORERS

if TYPE_CHECKING:
    from harness.processor import Processor
    from harness.token_store import TokenWriter

ROUND = {"hf": 128, "vllm": 2048}
"""Requests that are planned together, by engine: some batches of it, since no budget is looked at within a round."""


@dataclass(frozen=True)
class Ask:
    """A prompt: its place in the source, its tokens, the text that decides its split, and the reference response.

    text is None where the response itself decides; with images it is the digest of the first. fail: told why the prompt could not be asked.
    images, unexpanded_ids, messages: as in a `Request`.
    """

    number: int
    token_ids: tuple[int, ...]
    text: str | None = None
    reference: str = ""
    fail: Callable[[int, str], None] | None = None
    images: tuple[Image, ...] = ()
    unexpanded_ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()


def turn_ask(number: int, turn: Turn, tokenizer: Any, *, processor: Processor | None = None) -> Ask:
    """A labelled question as a prompt. DataError if it cannot be written."""
    try:
        token_ids = render_prompt(tokenizer, [{"role": "user", "content": turn.question}], processor=processor)
    except RowError as error:
        raise DataError(f"question {number}: {error}; take another source") from None
    return Ask(number, token_ids, turn.question, turn.answer)


def row_asks(
    rows: FilteredRows, tokenizer: Any, *, processor: Processor | None = None, images: Path = Path(FOLDER)
) -> Iterator[Ask]:
    """The beginning of each row's chat, up to its first assistant turn; rows that have none are counted as failed.

    processor: of an image-text model. images: the folder where images are kept.
    """
    if rows.section.images is not None:
        require_template(tokenizer, processor)
    for number, row in rows:
        try:
            messages, found = chat_and_images(row, rows, images)
            answered = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            end = answered[0] if answered else len(messages)
            reference = messages[end]["content"] if answered else ""
            asked = Ask(number, (), place_of(messages, found), reference, rows.fail)
            prompt = messages[:end]
            shown = found[: n_places(prompt)]
            if processor is not None and shown:
                yield image_ask(asked, prompt, shown, processor)
            else:
                yield replace(asked, token_ids=render_prompt(tokenizer, prompt, processor=processor))
        except RowError as error:
            rows.fail(number, str(error))
    rows.finish()


def image_ask(ask: Ask, messages: list[Message], images: tuple[Image, ...], processor: Processor) -> Ask:
    """`ask` with a prompt about images. RowError if the processor refuses it."""
    encoded = encode_prompt(processor, messages, images)
    ids, unexpanded = encoded.token_ids, encoded.unexpanded_ids
    return replace(ask, token_ids=ids, images=images, unexpanded_ids=unexpanded, messages=tuple(messages))


def bos_asks(name: str, tokenizer: Any) -> Iterator[Ask]:
    """The beginning-of-text token, again and again; DataError if the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise DataError(
            f'data.{name}: the tokenizer has no beginning-of-text token, from which source = "bos" starts; use another'
        )
    return (Ask(number, (int(tokenizer.bos_token_id),)) for number in count(1))


def generate(
    name: str,
    section: Generated,
    asks: Iterator[Ask],
    writer: TokenWriter,
    *,
    engine: Engine,
    journal: Journal,
    on_progress: Callable[[int, int], None],
    processor: Processor | None = None,
) -> dict[str, Any]:
    """Ask, keep and append until the section's budget is full; what became of the responses.

    processor: of an image-text model.

    Raises:
        DataError: the prompts end, or a whole round keeps nothing, before there are `tokens` tokens.
        EngineError: a prompt that does not fit the context of the model.
    """
    samples = section.samples_per_prompt if isinstance(section, Teacher) else 1
    limit = section.n_prompts if isinstance(section, Teacher) else None
    budget = section.tokens if isinstance(section, Teacher | Bos) else None
    counts, kept = Counter[str](), 0
    end_token = end_of_turn(engine.tokenizer, set(engine.eos_ids), processor=processor)
    never = None if processor is None else processor.image_token_id
    pending = islice(asks, limit)
    while budget is None or kept < budget:
        members = [(ask, i) for ask in islice(pending, max(1, ROUND[section.engine] // samples)) for i in range(samples)]
        if not members:
            break
        before = kept
        for ask, answer in _answers(section, members, engine, journal, counts):
            if never in answer.token_ids:
                counts["with_an_image_token"] += 1
                continue
            sequence = _sequence(section, ask, answer, end_token, counts)
            if sequence is None:
                continue
            text = answer.text if ask.text is None else ask.text
            writer.append(split_of(text.strip()), sequence)
            kept += len(sequence)
            if budget is not None and kept >= budget:
                break
        on_progress(
            *((kept, budget) if budget is not None else (counts["asked"], max(counts["asked"], (limit or 0) * samples)))
        )
        if kept == before and budget is not None and isinstance(section, Bos):
            break
    _require_enough(name, section, kept, counts)
    return {"responses": dict(sorted(counts.items())), "kernels": engine.kernels}


def seed_of(section_seed: int, number: int, sample: int) -> int:
    """The seed of one response: distinct for every prompt and sample, the same whatever is asked beside it."""
    digest = hashlib.sha256(f"response {section_seed} {number} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _answers(
    section: Generated, members: list[tuple[Ask, int]], engine: Engine, journal: Journal, counts: Counter[str]
) -> Iterator[tuple[Ask, Answer]]:
    sampling = Sampling(
        max_tokens=section.max_tokens, until=(), temperature=section.temperature, top_p=section.top_p, top_k=section.top_k
    )
    fitting = [(ask, i) for ask, i in members if _fits(ask, i, section, engine, counts)]
    requests = [
        Request(
            token_ids=ask.token_ids,
            sampling=sampling,
            repeat=sample,
            seed=seed_of(section.seed, ask.number, sample) if section.temperature > 0 else None,
            images=ask.images,
            unexpanded_ids=ask.unexpanded_ids,
            messages=ask.messages,
        )
        for ask, sample in fitting
    ]
    counts["asked"] += len(requests)
    outcomes = answer_requests(engine, journal, requests)
    for (ask, _), outcome in zip(fitting, outcomes, strict=True):
        if isinstance(outcome, Failure):
            raise EngineError(f"prompt {ask.number} got no response: {outcome.reason}; run again to ask what is missing")
        if isinstance(outcome, Answer):
            yield ask, outcome


def _fits(ask: Ask, sample: int, section: Generated, engine: Engine, counts: Counter[str]) -> bool:
    room = min(section.seq_len, engine.context_length - section.max_tokens)
    if len(ask.token_ids) <= min(room, section.seq_len - 1):
        return True
    counts["prompt_too_long"] += 1
    if sample == 0 and ask.fail is not None:
        ask.fail(ask.number, f"{len(ask.token_ids)} prompt tokens leave no room to answer")
    return False


def _sequence(section: Generated, ask: Ask, answer: Answer, end_token: int | None, counts: Counter[str]) -> Sequence | None:
    """Prompt and response as a sequence, or None if it is not one to keep."""
    is_stopped = answer.finish_reason == "stop"
    counts["ended_by_the_model" if is_stopped else "cut_at_max_tokens"] += 1
    if not answer.token_ids:
        counts["empty"] += 1
        return None
    if isinstance(section, Teacher) and section.scorer is not None:
        is_correct = SCORERS[section.scorer](ask.reference, answer.text)
        judged = {True: "correct", False: "incorrect", None: "without_reference"}[is_correct]
        counts[judged] += 1
        if section.keep not in ("all", judged):
            return None
    response = (*answer.token_ids, end_token) if is_stopped and end_token is not None else answer.token_ids
    token_ids = (*ask.token_ids, *response)[: section.seq_len]
    counts["kept"] += 1
    counts["truncated"] += len(token_ids) < len(ask.token_ids) + len(response)
    return Sequence(token_ids, tuple(i >= len(ask.token_ids) for i in range(len(token_ids))), ask.images)


def _require_enough(name: str, section: Generated, kept: int, counts: Counter[str]) -> None:
    budget = section.tokens if isinstance(section, Teacher | Bos) else None
    found = ", ".join(f"{what} {n:,}" for what, n in sorted(counts.items()))
    if budget is not None and kept < budget:
        raise DataError(
            f"data.{name}.tokens: the responses kept hold {kept:,} tokens, {budget - kept:,} of the {budget:,} asked for are missing "
            f"({found}); lower tokens, or give more prompts or samples_per_prompt"
        )
    if not counts["kept"]:
        raise DataError(f"data.{name}: no response was kept ({found}); look at keep, scorer, seq_len and the prompts")
