"""Requests with images to a server: the chat protocol, for no server takes token ids together with images.

The server renders the chat and expands its images itself. What it made of them is held against the tokens that the harness
rendered, where it says it (vLLM does); else their number is, and the rows are flagged. Images travel as their files are, in base64, and
are made into text when a request is sent.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from harness.engines import Request, Sampling
from harness.engines.completions import Completions, Unanswered
from harness.engines.exchange import Choice, Reply, Usage, body_of, validated
from harness.errors import EngineError
from harness.images import Image
from harness.tasks.pictures import grey_picture

PATH = "chat/completions"
_NOT_OF_A_CHAT = ("prompt", "echo")


class Message(BaseModel):
    content: str | None = None


class ChatChoice(BaseModel):
    """The one answer. Token ids are vLLM's addition."""

    message: Message
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = None


class ChatReply(BaseModel):
    """A reply's parts that are looked at. The prompt's token ids are vLLM's addition."""

    choices: Annotated[list[ChatChoice], Field(min_length=1, max_length=1)]
    model: str | None = None
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


def chat_body_of(request: Request, *, model: str, eos_ids: frozenset[int], is_vllm: bool) -> dict[str, Any]:
    """A request with images, with every parameter of `body_of`. EngineError for a likelihood, which a chat cannot ask for."""
    if request.sampling is None:
        raise EngineError(
            "the likelihood of a text after images cannot be asked of a server; leave out the tasks that need it, or use the vllm or "
            "the hf engine"
        )
    completion = body_of(request, model=model, eos_ids=eos_ids, is_vllm=is_vllm)
    goes_on = bool(request.messages) and request.messages[-1]["role"] == "assistant"
    chat = {"messages": list(_with_images(request.messages, request.images)), "add_generation_prompt": not goes_on}
    return (
        {key: value for key, value in completion.items() if key not in _NOT_OF_A_CHAT}
        | chat
        | ({"continue_final_message": True} if goes_on else {})
        | ({"chat_template_kwargs": request.template_args} if request.template_args else {})
    )


async def image_prompts(client: Completions, *, model: str, eos_ids: frozenset[int], is_vllm: bool) -> str:
    """What a server says of a chat with a grey picture: "returned", its token ids; "counted", at most their number; "refused".

    Raises:
        Unanswered: it gives no answer that is one.
    """
    drawn = io.BytesIO()
    grey_picture().save(drawn, format="PNG")
    content = [_part(drawn.getvalue(), "image/png"), {"type": "text", "text": "?"}]
    asked = Request(token_ids=(), sampling=Sampling(max_tokens=1, until=()), messages=({"role": "user", "content": content},))
    body = chat_body_of(asked, model=model, eos_ids=eos_ids, is_vllm=is_vllm)
    try:
        reply = await client.post(PATH, body, lambda raw, seconds: validated(ChatReply, raw), str)
    except EngineError:  # requests with images will say why
        return "refused"
    return "counted" if reply.prompt_token_ids is None else "returned"


def read_chat(raw: dict[str, Any], request: Request, *, model: str, where: str, tells_tokens: bool) -> Reply:
    """The reply in the form of a completion.

    Args:
        tells_tokens: the server has said before what it makes of a prompt.
    Raises:
        Unanswered: it is none.  EngineError: another model answered, or another prompt than the one that was rendered.
    """
    reply = validated(ChatReply, raw)
    if reply.model not in (model, None):
        raise EngineError(f"{where}: asked for model {model}, answered by {reply.model!r:.100}; declare the one that answers")
    if tells_tokens and reply.prompt_token_ids is None:
        raise Unanswered("no token ids of the prompt, which this server gives")
    _require_same_prompt(reply, request, where)
    choice = reply.choices[0]
    if choice.token_ids is None and choice.message.content is None:
        raise Unanswered("an answer without text")
    found = Choice(text=choice.message.content or "", finish_reason=choice.finish_reason, token_ids=choice.token_ids)
    return Reply(choices=[found], model=reply.model, usage=reply.usage)


def _require_same_prompt(reply: ChatReply, request: Request, where: str) -> None:
    taken, expected = reply.prompt_token_ids, list(request.token_ids)
    counted = None if reply.usage is None else reply.usage.prompt_tokens
    n_taken = counted if taken is None else len(taken)
    if taken == expected or (taken is None and n_taken in (None, len(expected))):
        return
    n_images, n_text = len(request.images), len(request.unexpanded_ids)
    if n_taken is not None and n_taken <= n_text:
        what = f"which the text alone has: it ignores the {n_images} images; serve an image-text model in a server that takes images"
    else:
        place = "" if taken is None else f" that differ from token {first_difference(taken, expected)} on"
        what = f"with {n_images} images{place}; its chat template and processor files must be those of the checkpoint"
    raise EngineError(
        f"{where}: the server makes {n_taken} tokens of a chat where the model's own processor makes {len(expected)}, {what}. An answer to "
        "another prompt is no answer"
    )


def first_difference(found: Sequence[int], expected: Sequence[int]) -> int:
    """The first place at which two lists differ, or at which the shorter one ends."""
    pairs = enumerate(zip(found, expected, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(found), len(expected)))


def _with_images(messages: tuple[dict[str, Any], ...], images: tuple[Image, ...]) -> Iterator[dict[str, Any]]:
    """The chat with each placeholder of an image as its file."""
    waiting = iter(images)
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_part_of(next(waiting)) if part["type"] == "image" else part for part in content]
        yield {**message, "content": content}


def _part_of(image: Image) -> dict[str, Any]:
    return _part(image.read(), image.media_type)


def _part(data: bytes, media_type: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{base64.b64encode(data).decode()}"}}
