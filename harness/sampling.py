"""Complete sampling parameters of a task: the suite's word before the task's, nothing left to a default of an engine."""

from __future__ import annotations

from typing import Any

from harness.engines import Sampling
from harness.errors import TaskError
from harness.task_settings import ResolvedTask

DEFAULT_MAX_TOKENS = 256
"""What lm-eval takes where a task does not say."""
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "n": 1, "min_p": 0.0}
"""Options of generation that a task may name, with the one value that changes nothing."""


def sampling_of(task: str, options: dict[str, Any], asking: ResolvedTask, notes: list[str]) -> tuple[Sampling, tuple[str, ...]]:
    """Complete sampling parameters, and the strings that end an answer: the suite's word before the task's."""
    given = {**options}
    until = given.pop("until", [])
    stops = tuple([until] if isinstance(until, str) else until) if isinstance(until, str | list | tuple) else (until,)
    if not all(isinstance(stop, str) for stop in stops):
        raise TaskError(f"task {task}: generation_kwargs.until: found {until!r}; allowed: a string, or a list of them")
    is_sampled = given.pop("do_sample", None)
    own = {
        "temperature": given.pop("temperature", None),
        "top_p": given.pop("top_p", None),
        "top_k": given.pop("top_k", None),
    }
    if not (is_sampled if is_sampled is not None else own["temperature"]):
        own = {"temperature": 0.0, "top_p": None, "top_k": None}
    elif own["temperature"] is None:
        own["temperature"] = 1.0
    own["max_tokens"] = next((given.pop(k) for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in given), None)
    unknown = {k: v for k, v in given.items() if k not in _NEUTRAL or v != _NEUTRAL[k]}
    if unknown:
        raise TaskError(
            f"task {task}: generates with {', '.join(f'{k} = {v!r}' for k, v in unknown.items())}, which no engine here does; copy "
            "its file without it and give task.path"
        )
    chosen = {**own, **asking.sampling}
    if chosen["max_tokens"] is None:
        notes.append(
            f"{task} does not say how many tokens an answer may have: lm-eval's default of {DEFAULT_MAX_TOKENS} holds, which cuts "
            "reasoning; set max_tokens in [sampling]"
        )
        chosen["max_tokens"] = DEFAULT_MAX_TOKENS
    chosen = {"top_p": 1.0, "top_k": 0} | {k: v for k, v in chosen.items() if v is not None}
    if type(chosen["max_tokens"]) is not int or chosen["max_tokens"] < 1:
        raise TaskError(
            f"task {task}: generation_kwargs.max_gen_toks: found {chosen['max_tokens']!r}; allowed: a positive integer"
        )
    # with thinking, stop strings are for the answer alone: they are looked for after it
    return Sampling(**chosen, until=() if asking.thinking else stops), stops
