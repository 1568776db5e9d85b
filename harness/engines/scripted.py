"""An engine without a model: a function answers each prompt. For tests of everything around an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.engines import Answer, Likelihood, Outcome, Request


class ScriptedEngine:
    """Answers `respond(prompt text)` or, for likelihoods, `likelihood(prompt text, continuation text)`.

    A response that is an Outcome is given as it is. asked: every request that reached it, in order; n_batches: how often it
    was called.
    """

    backend: str | None = None
    flags: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: Any,
        respond: Callable[[str], str | Outcome],
        *,
        likelihood: Callable[[str, str], float] = lambda prompt, continuation: 0.0,
        context_length: int = 8192,
        batch_size: int = 8,
        answers_depend_on_batch: bool = True,
    ) -> None:
        self.tokenizer, self.respond, self.likelihood = tokenizer, respond, likelihood
        self.eos_ids = frozenset({tokenizer.eos_token_id})
        self.context_length, self.batch_size = context_length, batch_size
        self.kernels = {"linear": "scripted", "kv_cache": "scripted"}
        self.protocol: dict[str, Any] = {"engine": "scripted", "version": 1, "batch_size": batch_size}
        self.answers_depend_on_batch = answers_depend_on_batch
        self.n_batches = 0
        self.asked: list[Request] = []

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        indices = list(range(len(requests)))
        return [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]

    def answer(self, batch: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        self.n_batches += 1
        for place, request in enumerate(batch):
            self.asked.append(request)
            yield place, self._answer(request)

    def _answer(self, request: Request) -> Outcome:
        prompt = self.tokenizer.decode(list(request.token_ids))
        if request.sampling is None:
            continuation = self.tokenizer.decode(list(request.continuation or ()))
            return Likelihood(self.likelihood(prompt, continuation), False, 0.0)
        text = self.respond(prompt)
        if not isinstance(text, str):
            return text
        token_ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Answer(text, token_ids, "length" if len(token_ids) >= request.sampling.max_tokens else "stop", 0.0)
