"""One exchange of the completions protocol: a request as its complete body, a reply as what it shows was asked and answered.

A reply that could be another when asked again raises Unanswered; one that shows a server which asks or answers something else
is an EngineError, or a Failure where only this request is concerned.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from harness.engines import Answer, Failure, Likelihood, Request, Sampling
from harness.engines.completions import Unanswered
from harness.engines.hf import read_answer
from harness.errors import EngineError

T = TypeVar("T", bound=BaseModel)

LEAST_LOGPROB = -9999.0
"""What vLLM's server writes for minus infinity."""


class PromptToken(BaseModel):
    """A token of the prompt, or one that could have stood in its place."""

    logprob: float
    rank: int | None = None


class Logprobs(BaseModel):
    """Of generated tokens, by position: the likeliest, by token."""

    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(BaseModel):
    """The one answer. Token ids and prompt_logprobs are vLLM's additions."""

    text: str
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, PromptToken] | None] | None = None
    logprobs: Logprobs | None = None


class Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Reply(BaseModel):
    """A reply's parts that are looked at; others are no concern."""

    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    model: str | None = None
    usage: Usage | None = None


def body_of(request: Request, *, model: str, eos_ids: frozenset[int], is_vllm: bool) -> dict[str, Any]:
    """A request with every parameter that a server or a checkpoint could have a default for.

    vLLM takes ends of text from generation_config.json too, whatever it is told of that file, unless it is to ignore its own:
    then only `stop_token_ids` end an answer. Other servers may not know those, and keep theirs.
    """
    sampling = request.sampling or Sampling(max_tokens=1, until=())
    if sampling.temperature > 0 and request.seed is None:
        raise EngineError("a sampled request carries no seed; its answer could not be repeated")
    body: dict[str, Any] = {
        "model": model,
        "prompt": _sent(request),
        "n": 1,
        "stream": False,
        "echo": False,
        "max_tokens": sampling.max_tokens,
        "min_tokens": 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed,
        "stop": list(sampling.until),
        "stop_token_ids": sorted(eos_ids),
        "ignore_eos": is_vllm,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "add_special_tokens": False,
        "return_token_ids": True,
    }
    return body if request.sampling else body | {"prompt_logprobs": 0}


def read_reply(raw: dict[str, Any], request: Request, *, model: str, where: str) -> Reply:
    """The reply with its one choice.

    Raises:
        Unanswered: it is none.  EngineError: another model answered, or the prompt was not taken as it was sent.
    """
    reply = validated(Reply, raw)
    if reply.model not in (model, None):
        raise EngineError(f"{where}: asked for model {model}, answered by {reply.model!r:.100}; declare the one that answers")
    taken, n_sent = reply.choices[0].prompt_token_ids, len(_sent(request))
    n_taken = n_sent if reply.usage is None or reply.usage.prompt_tokens is None else reply.usage.prompt_tokens
    if n_taken != n_sent or (taken is not None and taken != _sent(request)):
        raise EngineError(
            f"{where}: the prompt was not taken as it was sent ({n_sent} tokens sent, {n_taken} read); the server must take token ids "
            "without adding, cutting or changing any"
        )
    return reply


def validated(kind: type[T], raw: dict[str, Any]) -> T:
    """A reply as a model of `kind`; Unanswered, with the first thing that is wrong, if it is none."""
    if (found := raw.get("choices")) is not None and isinstance(found, list) and len(found) != 1:
        raise Unanswered(f"{len(found)} choices where 1 was asked for")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        raise Unanswered(f"{'.'.join(map(str, problem['loc']))}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None


def answer_of(reply: Reply, sampling: Sampling, *, tokenizer: Any, eos_ids: frozenset[int], seconds: float) -> Answer | Failure:
    """The answer, read from its token ids as every engine's, or tokenized from its text where the server gives none.

    A Failure where the server ended it for a reason of its own, as it would again.
    """
    choice, usage = reply.choices[0], reply.usage or Usage()
    n = usage.completion_tokens if choice.token_ids is None else len(choice.token_ids)
    if choice.finish_reason == "length" and n not in (sampling.max_tokens, None):
        return Failure(f"the server cut the answer at {n} tokens, {sampling.max_tokens} were asked for")
    if choice.token_ids is None:
        tokens = tokenizer(choice.text, add_special_tokens=False)["input_ids"]
        return Answer(choice.text, tuple(tokens), choice.finish_reason, seconds)
    answer = read_answer(tokenizer, eos_ids, choice.token_ids, sampling, seconds)
    if choice.finish_reason == "stop" and answer.finish_reason != "stop":
        return Failure(f"the server ended the answer at token {choice.token_ids[-1:]}, which ends no text of this model")
    return answer


def likelihood_of(reply: Reply, request: Request, *, where: str, seconds: float) -> Likelihood:
    """The continuation's likelihood, by the log probabilities of the prompt's own tokens; EngineError if the server has none."""
    given, continuation = reply.choices[0].prompt_logprobs, request.continuation or ()
    if given is None:
        raise EngineError(
            f"{where}: this server gives no likelihoods (no prompt_logprobs in its answer, as vLLM's has); leave out the tasks that "
            "need them, or ask vLLM or the hf engine"
        )
    rows = given[len(request.token_ids) :]
    chosen = [(row or {}).get(token) for row, token in zip(rows, continuation, strict=False)]
    found = [token for token in chosen if token is not None and token.rank is not None]
    if len(found) != len(continuation) or len(rows) != len(continuation):
        raise Unanswered("prompt_logprobs that lack tokens of the prompt")
    values = [token.logprob for token in found]
    if not all(math.isfinite(value) and value > LEAST_LOGPROB for value in values):
        raise EngineError("the likelihood of a continuation is not finite; the model's logits overflow")
    return Likelihood(math.fsum(values), all(token.rank == 1 for token in found), seconds)


def _sent(request: Request) -> list[int]:
    return [*request.token_ids, *(request.continuation or ())]
