"""What an engine is: requests in, answers out as they finish, in batches that are planned before the first one runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

from harness.images import Image

RENDERING_UNVERIFIED = "unverified rendering"
"""A flag of an engine that renders chats with images and does not say which tokens it makes of them; nothing else is touched by it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Complete sampling parameters: nothing is left to a repository's generation_config. temperature 0 is greedy."""

    max_tokens: int
    until: tuple[str, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to go on from (`sampling`), or a continuation whose likelihood is asked for. One of the two is set.

    seed: of this request and repeat; None for greedy and likelihood requests, which draw nothing.
    images: in the order of their tokens. With images also unexpanded_ids, the prompt with one token an image, and messages, the chat that
        was rendered, both for engines that expand or render themselves: what they make of it must be `token_ids`. template_args: what the
        chat template was given.
    """

    token_ids: tuple[int, ...]
    sampling: Sampling | None = None
    continuation: tuple[int, ...] | None = None
    repeat: int = 0
    seed: int | None = None
    images: tuple[Image, ...] = ()
    unexpanded_ids: tuple[int, ...] = field(default=(), compare=False)
    messages: tuple[dict[str, Any], ...] = field(default=(), compare=False)
    template_args: dict[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def hash(self) -> str:
        """sha256 of the prompt's token ids, its images and the continuation: what is asked, whoever answers and however often."""
        media = [image.digest for image in self.images]
        asked: dict[str, Any] = {"token_ids": self.token_ids, "media": media, "continuation": self.continuation}
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """A generated response. finish_reason is "stop" (end of text or a stop string) or "length"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    seconds: float


@dataclass(frozen=True)
class Likelihood:
    """Sum of the continuation's log probabilities (nats), and whether greedy decoding would give it."""

    logprob: float
    is_greedy: bool
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A request that got no answer, after all that the engine tried itself; asked again by the next run."""

    reason: str


Outcome = Answer | Likelihood | Failure


class Engine(Protocol):
    """Answers requests with one model.

    kernels: what computes each class of module, read from the loaded model.
    protocol: everything of the engine that can change an answer: kind, version, arguments.
    answers_depend_on_batch: an answer belongs to the batch that it was planned in, and a batch that was interrupted is asked
        again whole; otherwise each response stands for itself.
    backend: what computes fake quantization in this process; None where another process computes.
    flags: what a reader of its figures must know, such as "unverified".
    """

    tokenizer: Any
    eos_ids: frozenset[int]
    context_length: int
    kernels: dict[str, str]
    protocol: dict[str, Any]
    answers_depend_on_batch: bool
    backend: str | None
    flags: tuple[str, ...]

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of `requests` in batches, each of which is one call of `answer`."""

    def answer(self, batch: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        """What came of each request of a planned batch, as (place in the batch, outcome), as it finishes."""


def identity(request: Request) -> str:
    """What one response answers: the request, its complete sampling parameters, the repeat and its seed."""
    sampling = None if request.sampling is None else asdict(request.sampling)
    return _digest([request.hash, sampling, request.repeat, request.seed])


def batch_digest(batch: Sequence[Request]) -> str:
    """Identity of a planned batch: its requests in order."""
    return _digest([identity(request) for request in batch])[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
