"""Requests over an engine and a journal: what is journaled is not asked again, what finishes is journaled at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from harness.engines import Engine, Failure, Outcome, Request, Sampling, identity
from harness.errors import EngineError
from harness.journal import Journal
from harness.prepared import Ask


def answer_requests(
    engine: Engine,
    journal: Journal,
    requests: Sequence[Request],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    batch_plan: int | None = None,
) -> list[Outcome]:
    """What came of each request, in order.

    Where an engine's answers depend on the batch, batches are planned from all of `requests`, and a batch that is not journaled
    whole is asked again whole. Otherwise what the journal lacks is asked, and each response is journaled as it arrives. Requests that are
    equal in everything, of two questions with one text, are asked once.

    Args:
        on_progress: called with (requests settled, requests in all).
        batch_plan: seed by which the batches that the engine plans are dealt anew (`dealt_anew`). The journal must be another than
            that of answers without it.
    """
    places: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        places.setdefault(identity(request), []).append(index)
    first = [indices[0] for indices in places.values()]
    settled = _answer([requests[i] for i in first], engine, journal, on_progress, batch_plan)
    found = {index: outcome for outcome, indices in zip(settled, places.values(), strict=True) for index in indices}
    return [found[index] for index in range(len(requests))]


def _answer(
    requests: Sequence[Request],
    engine: Engine,
    journal: Journal,
    on_progress: Callable[[int, int], None],
    batch_plan: int | None,
) -> list[Outcome]:
    """`answer_requests` for requests that differ."""
    found: dict[int, Outcome] = {}

    def settle(index: int, outcome: Outcome) -> None:
        found[index] = outcome
        on_progress(len(found), len(requests))

    on_progress(0, len(requests))
    if engine.answers_depend_on_batch:
        for members in dealt_anew(engine.plan(requests), requests, batch_plan):
            batch = [requests[i] for i in members]
            outcomes: list[Outcome] | None = list(journal.find_batch(batch) or ())
            if not outcomes:
                by_place = dict(engine.answer(batch))
                outcomes = [by_place[place] for place in range(len(batch))]
                journal.append_batch(batch, outcomes)
            for index, outcome in zip(members, outcomes, strict=True):
                settle(index, outcome)
        return [found[index] for index in range(len(requests))]
    asked = []
    for index, request in enumerate(requests):
        known = journal.find(request)
        if known is None:
            asked.append(index)
        else:
            settle(index, known)
    missing = [requests[i] for i in asked]
    for members in dealt_anew(engine.plan(missing), missing, batch_plan):
        batch = [missing[i] for i in members]
        for place, outcome in engine.answer(batch):
            journal.append(batch[place], outcome)
            settle(asked[members[place]], outcome)
    return [found.get(index, Failure("the engine gave no answer")) for index in range(len(requests))]


def dealt_anew(batches: list[list[int]], requests: Sequence[Request], seed: int | None) -> list[list[int]]:
    """Planned batches with the requests that draw nothing dealt anew among the places of their kind; as they are without a seed.

    Where answers depend on the batch this is another composition of batches of the same sizes, where an engine forms its own another
    order of submission. The order follows from the seed and the requests alone, whichever of them are asked.
    """
    if seed is None:
        return batches
    kinds: dict[tuple[bool, Sampling | None], list[int]] = {}
    for index in (index for members in batches for index in members if requests[index].seed is None):
        kinds.setdefault(_kind(requests[index]), []).append(index)
    order = {index: hashlib.sha256(f"{seed}:{identity(request)}".encode()).digest() for index, request in enumerate(requests)}
    dealt = {kind: iter(sorted(members, key=order.__getitem__)) for kind, members in kinds.items()}
    return [[i if requests[i].seed is not None else next(dealt[_kind(requests[i])]) for i in members] for members in batches]


def _kind(request: Request) -> tuple[bool, Sampling | None]:
    return request.continuation is None, request.sampling


def require_fit(question: str, n_prompt: int, n_answer: int, context_length: int) -> None:
    """EngineError if a question needs more tokens than the context holds."""
    if n_prompt + n_answer > context_length:
        raise EngineError(
            f"{question}: {n_prompt:,} prompt tokens and {n_answer:,} to answer are more than the context of {context_length:,}; prompts "
            "are never cut to fit: lower max_tokens, or give the engine a longer context"
        )


def require_few_images(task: str, asks: Sequence[Ask], limit: int) -> None:
    """EngineError if a question of a task has more images than the engine takes in a prompt."""
    most = max(asks, key=lambda ask: len(ask.images), default=None)
    if most is not None and len(most.images) > limit:
        raise EngineError(
            f"{task}, question {most.doc}: {len(most.images)} images, and engine.args.limit_mm_per_prompt takes {limit} in a prompt; raise it "
            "to as many, or leave it out"
        )


def seed_of(sampling_seed: int, request_hash: str, repeat: int) -> int:
    """The seed of one response: another for every request and repeat, the same for every variant."""
    digest = hashlib.sha256(f"{sampling_seed}:{request_hash}:{repeat}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
