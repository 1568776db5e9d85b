"""What an engine is: requests in, answers out, in batches that are planned before the first one runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


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
    """

    token_ids: tuple[int, ...]
    sampling: Sampling | None = None
    continuation: tuple[int, ...] | None = None
    repeat: int = 0
    seed: int | None = None

    @property
    def hash(self) -> str:
        """sha256 of the prompt's token ids and the continuation: what is asked, whoever answers and however often."""
        asked: dict[str, Any] = {"token_ids": self.token_ids, "media": [], "continuation": self.continuation}
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


class Engine(Protocol):
    """Answers requests with one model.

    kernels: what computes each class of module, read from the loaded model.
    protocol: everything of the engine that can change an answer: kind, version, arguments.
    """

    tokenizer: Any
    eos_ids: frozenset[int]
    context_length: int
    kernels: dict[str, str]
    protocol: dict[str, Any]

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of `requests` in batches. Answers may depend on the batch, so a batch is answered whole or again."""

    def answer(self, batch: Sequence[Request]) -> list[Answer | Likelihood]:
        """The answers of one planned batch, in its order."""


def batch_digest(batch: Sequence[Request]) -> str:
    """Identity of a planned batch: its requests in order, with their sampling parameters, repeats and seeds."""
    members = [(r.hash, None if r.sampling is None else asdict(r.sampling), r.repeat, r.seed) for r in batch]
    return hashlib.sha256(json.dumps(members).encode()).hexdigest()[:16]
