"""Text to token ids with a response mask: dialogues in the model's own chat template, a prompt and its response, plain text.

A response mask covers every assistant turn up to its end-of-turn token. What cannot be masked without doubt is refused with
a reason, and the caller counts it: a template that raises, one that renders the beginning of a dialogue differently once it
goes on, one that leaves out the reasoning of an earlier turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.data import Sequence
from harness.errors import DataError

_REASONING = re.compile(r"<think>(.*?)</think>", re.DOTALL)


class RowError(Exception):
    """A row that cannot become a sequence; the reason, without the row."""


@dataclass(frozen=True)
class Turn:
    """One labelled question and its answer."""

    question: str
    answer: str


def render_dialogue(tokenizer: Any, turns: list[Turn], eos_ids: set[int]) -> Sequence:
    """Token ids of a dialogue in the chat template; DataError where none can be written or masked."""
    require_template(tokenizer)
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    try:
        return render_messages(tokenizer, messages, eos_ids)
    except RowError as error:
        raise DataError(f"{error}; no response mask can be made") from None


def require_template(tokenizer: Any) -> None:
    """DataError unless the tokenizer has a chat template."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, and a dialogue cannot be written without one")


def render_messages(tokenizer: Any, messages: list[dict[str, str]], eos_ids: set[int]) -> Sequence:
    """Token ids of a chat up to its last assistant turn; responses are the assistant's tokens up to the end-of-turn one.

    RowError: nothing would be a response, the template fails, renders a beginning differently or leaves out reasoning.
    """
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends:
        raise RowError("no assistant turn, so that nothing is a response")
    _require_contents(tokenizer, messages[: ends[-1]])
    mask: list[bool] = []
    rendered: list[int] = []
    for end in ends:
        prompt = _apply(tokenizer, messages[: end - 1], add_generation_prompt=True)
        whole = _apply(tokenizer, messages[:end], add_generation_prompt=False)
        if prompt[: len(rendered)] != rendered or whole[: len(prompt)] != prompt:
            raise RowError(_why_no_prefix(tokenizer, messages[:end]))
        response = whole[len(prompt) :]
        if not response:
            raise RowError("the chat template renders nothing for an assistant turn: an empty response mask")
        stops = [i for i, token in enumerate(response) if token in eos_ids]
        n_response = stops[0] + 1 if stops else len(response)
        mask += [False] * (len(prompt) - len(rendered)) + [True] * n_response + [False] * (len(response) - n_response)
        rendered = whole
    return Sequence(tuple(rendered), tuple(mask))


def render_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[int, ...]:
    """Token ids that ask for the next assistant turn; without a chat template, the contents as plain text."""
    if not tokenizer.chat_template:
        return tuple(tokenizer("".join(message["content"] for message in messages))["input_ids"])
    return tuple(_apply(tokenizer, messages, add_generation_prompt=True))


def render_plain(tokenizer: Any, prompt: str, response: str) -> Sequence:
    """A prompt and its response without a template, each tokenized alone as in serving, ended by the end-of-text token."""
    asked = tokenizer(prompt)["input_ids"]
    answered = tokenizer(response, add_special_tokens=False)["input_ids"]
    if not answered:
        raise RowError("the response is empty: an empty response mask")
    if tokenizer.eos_token_id is not None:
        answered = [*answered, tokenizer.eos_token_id]
    return Sequence((*asked, *answered), (False,) * len(asked) + (True,) * len(answered))


def cut_text(tokenizer: Any, text: str, *, seq_len: int, shortest: int) -> Iterator[Sequence]:
    """Plain text in pieces of `seq_len` tokens, all of them responses; a piece of fewer than `shortest` is left out."""
    token_ids = tokenizer(text)["input_ids"]
    for start in range(0, len(token_ids), seq_len):
        piece = tuple(token_ids[start : start + seq_len])
        if len(piece) >= shortest:
            yield Sequence(piece, (True,) * len(piece))


def end_of_turn(tokenizer: Any, eos_ids: set[int]) -> int | None:
    """The token that ends an assistant turn in the chat template, or without one the end-of-text token."""
    if tokenizer.chat_template:
        sequence = render_dialogue(tokenizer, [Turn("a", "b")], eos_ids)
        last = [t for t, is_response in zip(sequence.token_ids, sequence.is_response, strict=True) if is_response][-1]
        if last in eos_ids:
            return last
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def _require_contents(tokenizer: Any, messages: list[dict[str, str]]) -> None:
    """RowError unless the reasoning and the answer of every assistant turn stand in the rendered text."""
    turns = [message for message in messages if message["role"] == "assistant"]
    text = _text(tokenizer, messages, add_generation_prompt=False)
    thoughts = [[*_REASONING.findall(turn["content"]), turn.get("reasoning_content", "")] for turn in turns]
    for what, written in (
        ("reasoning", thoughts),
        ("content", [[_REASONING.sub("", turn["content"])] for turn in turns]),
    ):
        missing = sum(any(part.strip() not in text for part in parts) for parts in written)
        if missing:
            raise RowError(f"the chat template leaves out the {what} of {missing} of {len(turns)} assistant turns")


def _why_no_prefix(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Whether it is the template or the tokenizer that has no clear border between the last turn and what is before it."""
    asked = _text(tokenizer, messages[:-1], add_generation_prompt=True)
    before = _text(tokenizer, messages[:-2], add_generation_prompt=False) if len(messages) > 2 else ""
    if asked.startswith(before) and _text(tokenizer, messages, add_generation_prompt=False).startswith(asked):
        return (
            "the tokenizer merges the beginning of a response with the end of its prompt; begin it without spaces and newlines"
        )
    return "the chat template renders the beginning of a dialogue differently once it goes on"


def _apply(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    text = _text(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError  # here, since what only plans a suite imports this module too

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:  # what a template's own code may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RowError(f"the chat template fails: {reason}") from error
