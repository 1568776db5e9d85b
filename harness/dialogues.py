"""Text to token ids with a response mask: dialogues in the model's own chat template, a prompt and its response, plain text.

A response mask covers every assistant turn up to its end-of-turn token. What cannot be masked without doubt is refused with
a reason, and the caller counts it: a template that raises, one that renders the beginning of a dialogue differently once it
goes on, one that leaves out the reasoning of an earlier turn.

An image-text model writes through its processor. Masks are found on tokens that have one placeholder an image; what stands behind the last
image before a response is the same when images are expanded, and is held against it, so every position is known and none is guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from harness.data import Sequence
from harness.errors import DataError, ModelError
from harness.images import Image

if TYPE_CHECKING:
    from harness.processor import Encoded, Processor

_REASONING = re.compile(r"<think>(.*?)</think>", re.DOTALL)


class RowError(Exception):
    """A row that cannot become a sequence; the reason, without the row."""


@dataclass(frozen=True)
class Turn:
    """One labelled question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class _Response:
    """Where an assistant turn lies in a chat without its expansion. n_messages, n_images: up to its end."""

    n_messages: int
    n_images: int
    prompt_tokens: int
    whole_tokens: int


def render_dialogue(
    tokenizer: Any,
    turns: list[Turn],
    eos_ids: set[int],
    *,
    processor: Processor | None = None,
    images: tuple[Image, ...] = (),
) -> Sequence:
    """Token ids of a dialogue in the chat template, the images before its first question; DataError where none can be written or masked."""
    require_template(tokenizer, processor)
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    if images:
        messages[0]["content"] = [*({"type": "image"} for _ in images), {"type": "text", "text": turns[0].question}]
    try:
        return render_messages(tokenizer, messages, eos_ids, processor=processor, images=images)
    except RowError as error:
        raise DataError(f"{error}; no response mask can be made") from None


def require_template(tokenizer: Any, processor: Processor | None = None) -> None:
    """DataError unless there is a chat template."""
    if not has_template(tokenizer, processor):
        writer = "tokenizer" if processor is None else "processor"
        raise DataError(f"the {writer} has no chat template, and a dialogue cannot be written without one")


def has_template(tokenizer: Any, processor: Processor | None = None) -> bool:
    """Whether chats can be written."""
    return bool(tokenizer.chat_template) if processor is None else processor.has_template


def render_messages(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    eos_ids: set[int],
    *,
    processor: Processor | None = None,
    images: tuple[Image, ...] = (),
) -> Sequence:
    """Token ids of a chat up to its last assistant turn; responses are the assistant's tokens up to the end-of-turn one.

    images: those that the messages have places for, in order; `processor` writes and expands them.
    RowError: nothing would be a response, the template fails, renders a beginning differently or leaves out reasoning, the processor refuses
    an image.
    """
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends:
        raise RowError("no assistant turn, so that nothing is a response")
    _require_contents(tokenizer, messages[: ends[-1]], processor)
    mask: list[bool] = []
    rendered: list[int] = []
    responses: list[_Response] = []
    for end in ends:
        prompt = _apply(tokenizer, messages[: end - 1], processor, add_generation_prompt=True)
        whole = _apply(tokenizer, messages[:end], processor, add_generation_prompt=False)
        if prompt[: len(rendered)] != rendered or whole[: len(prompt)] != prompt:
            raise RowError(_why_no_prefix(tokenizer, messages[:end], processor))
        response = whole[len(prompt) :]
        if not response:
            raise RowError("the chat template renders nothing for an assistant turn: an empty response mask")
        stops = [i for i, token in enumerate(response) if token in eos_ids]
        n_response = stops[0] + 1 if stops else len(response)
        mask += [False] * (len(prompt) - len(rendered)) + [True] * n_response + [False] * (len(response) - n_response)
        rendered = whole
        responses.append(_Response(end, n_places(messages[:end]), len(prompt), len(whole)))
    plain = Sequence(tuple(rendered), tuple(mask))
    if processor is None or not responses[-1].n_images:
        require_no_image_token(plain.token_ids, processor)
        return plain
    return _expanded(plain, responses, messages, processor, images)


def _expanded(
    plain: Sequence, responses: list[_Response], messages: list[dict[str, Any]], processor: Processor, images: tuple[Image, ...]
) -> Sequence:
    """The chat with its images expanded: once for all responses behind the same images."""
    token_ids: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()
    for n_images, of_them in groupby(responses, key=lambda response: response.n_images):
        behind = list(of_them)
        first, last = behind[0], behind[-1]
        text = _text(processor.tokenizer, messages[: last.n_messages], processor, add_generation_prompt=False)
        found = encode(processor, text, images[:n_images]).token_ids
        tail = slice(first.prompt_tokens, last.whole_tokens)
        start = len(found) - (last.whole_tokens - first.prompt_tokens)
        if found[start:] != plain.token_ids[tail] or found[: len(token_ids)] != token_ids:
            raise RowError(
                "the processor writes other tokens behind an image than the chat has there, so that no response can be found"
            )
        mask += (False,) * (start - len(token_ids)) + plain.is_response[tail]
        token_ids = found
    return Sequence(token_ids, mask, images[: responses[-1].n_images])


def tokenized(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids; RowError where a tokenizer of a closed vocabulary, without an unknown token, cannot write the text."""
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    except Exception as error:
        if type(error) is not Exception:  # what the library of tokenizers raises has no class of its own
            raise
        raise RowError(
            f"the tokenizer cannot write the text ({error}): its vocabulary is closed, and lacks some of it"
        ) from None


def n_places(messages: list[dict[str, Any]]) -> int:
    """How many images the messages have places for."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return sum(part["type"] == "image" for content in contents for part in content)


def encode(processor: Processor, text: str, images: tuple[Image, ...]) -> Encoded:
    """As the processor's own; what it refuses is the fault of the row."""
    try:
        return processor.encode(text, images)
    except ModelError as error:
        raise RowError(str(error)) from None


def require_no_image_token(token_ids: tuple[int, ...], processor: Processor | None) -> None:
    """RowError if text without images holds the token that stands for them: the model would look for an image."""
    if processor is not None and processor.image_token_id in token_ids:
        raise RowError(f"the text holds {processor.image_token}, which stands for an image, and there is none")


def render_prompt(tokenizer: Any, messages: list[dict[str, Any]], *, processor: Processor | None = None) -> tuple[int, ...]:
    """Token ids that ask for the next assistant turn, of a chat without images; without a chat template, the contents as plain text."""
    if not has_template(tokenizer, processor):
        return tuple(tokenized(tokenizer, "".join(message["content"] for message in messages)))
    token_ids = tuple(_apply(tokenizer, messages, processor, add_generation_prompt=True))
    require_no_image_token(token_ids, processor)
    return token_ids


def encode_prompt(processor: Processor, messages: list[dict[str, Any]], images: tuple[Image, ...]) -> Encoded:
    """What asks for the next assistant turn of a chat with images."""
    return encode(processor, _text(processor.tokenizer, messages, processor, add_generation_prompt=True), images)


def render_plain(tokenizer: Any, prompt: str, response: str) -> Sequence:
    """A prompt and its response without a template, each tokenized alone as in serving, ended by the end-of-text token."""
    asked = tokenized(tokenizer, prompt)
    answered = tokenized(tokenizer, response, add_special_tokens=False)
    if not answered:
        raise RowError("the response is empty: an empty response mask")
    if tokenizer.eos_token_id is not None:
        answered = [*answered, tokenizer.eos_token_id]
    return Sequence((*asked, *answered), (False,) * len(asked) + (True,) * len(answered))


def cut_text(tokenizer: Any, text: str, *, seq_len: int, shortest: int) -> list[Sequence]:
    """Plain text in pieces of `seq_len` tokens, all of them responses; a piece of fewer than `shortest` is left out."""
    token_ids = tokenized(tokenizer, text)
    pieces = [tuple(token_ids[start : start + seq_len]) for start in range(0, len(token_ids), seq_len)]
    return [Sequence(piece, (True,) * len(piece)) for piece in pieces if len(piece) >= shortest]


def end_of_turn(tokenizer: Any, eos_ids: set[int], *, processor: Processor | None = None) -> int | None:
    """The token that ends an assistant turn in the chat template, or without one the end-of-text token."""
    if has_template(tokenizer, processor):
        sequence = render_dialogue(tokenizer, [Turn("a", "b")], eos_ids, processor=processor)
        last = [t for t, is_response in zip(sequence.token_ids, sequence.is_response, strict=True) if is_response][-1]
        if last in eos_ids:
            return last
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def _require_contents(tokenizer: Any, messages: list[dict[str, Any]], processor: Processor | None) -> None:
    """RowError unless the reasoning and the answer of every assistant turn stand in the rendered text."""
    turns = [message for message in messages if message["role"] == "assistant"]
    text = _text(tokenizer, messages, processor, add_generation_prompt=False)
    thoughts = [[*_REASONING.findall(turn["content"]), turn.get("reasoning_content", "")] for turn in turns]
    for what, written in (
        ("reasoning", thoughts),
        ("content", [[_REASONING.sub("", turn["content"])] for turn in turns]),
    ):
        missing = sum(any(part.strip() not in text for part in parts) for parts in written)
        if missing:
            raise RowError(f"the chat template leaves out the {what} of {missing} of {len(turns)} assistant turns")


def _why_no_prefix(tokenizer: Any, messages: list[dict[str, Any]], processor: Processor | None) -> str:
    """Whether it is the template or the tokenizer that has no clear border between the last turn and what is before it."""
    asked = _text(tokenizer, messages[:-1], processor, add_generation_prompt=True)
    before = _text(tokenizer, messages[:-2], processor, add_generation_prompt=False) if len(messages) > 2 else ""
    if asked.startswith(before) and _text(tokenizer, messages, processor, add_generation_prompt=False).startswith(asked):
        return (
            "the tokenizer merges the beginning of a response with the end of its prompt; begin it without spaces and newlines"
        )
    return "the chat template renders the beginning of a dialogue differently once it goes on"


def _apply(
    tokenizer: Any, messages: list[dict[str, Any]], processor: Processor | None, *, add_generation_prompt: bool
) -> list[int]:
    text = _text(tokenizer, messages, processor, add_generation_prompt=add_generation_prompt)
    return tokenized(tokenizer, text, add_special_tokens=False)


def _text(tokenizer: Any, messages: list[dict[str, Any]], processor: Processor | None, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError  # here, since what only plans a suite imports this module too

    if processor is not None:
        try:
            return processor.render(messages, add_generation_prompt=add_generation_prompt)
        except ModelError as error:
            raise RowError(str(error)) from None
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:  # what a template's own code may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RowError(f"the chat template fails: {reason}") from error
