"""The chat of a row: the spellings that sets have for messages, and the places of images in them.

A message is a role with a content, `from` with a `value` ("human", "gpt"), or a `user` and an `assistant` text, which are two. A content is
text or a list of parts, each a text or the place of an image. In rows with images `<image>` in a user's or a system's text is a place too, with the
newline beside it; where no place is given, all images stand before the first user turn.
"""

from __future__ import annotations

import re
from typing import Any

from harness.dialogues import RowError, n_places
from harness.schema_data import Rows

PLACE = "<image>"
_PLACE = re.compile(rf"\n?{PLACE}\n?")
_ROLES = {"human": "user", "gpt": "assistant"}
_OWN_IMAGE = ("image", "image_url", "url", "path", "base64", "bytes")

Message = dict[str, Any]
"""role, content and perhaps reasoning_content; the content is text, or parts if it has places of images: {"type": "text", "text"} and
{"type": "image"}."""


def chat_of(row: dict[str, Any], section: Rows) -> list[Message]:
    """The messages of a row; a prompt and its response are one turn. RowError if a field is missing or no text."""
    if section.messages is None:
        assert section.prompt is not None and section.response is not None
        return [
            {"role": "user", "content": text_in(row, section.prompt)},
            {"role": "assistant", "content": text_in(row, section.response)},
        ]
    messages = row.get(section.messages)
    if not isinstance(messages, list) or not messages:
        raise RowError(f'the field "{section.messages}" holds no list of messages')
    found = [message for index, given in enumerate(messages) for message in _messages(given, index)]
    if section.images is None and n_places(found):
        raise RowError("the messages have places of images; name the field that holds the images by the key `images`")
    return found


def with_places(messages: list[Message], n_images: int) -> list[Message]:
    """The chat of a row with a place for each of its images. RowError if it has more or fewer, or speaks of one where none is."""
    if n_images and not n_places(messages):
        messages = [_split(message) for message in messages]
    if n_images and not n_places(messages):
        messages = _before_first_question(messages, n_images)
    for index, message in enumerate(messages):
        if PLACE in _plain(message):
            raise RowError(f"{PLACE} in the text of message {index}, which is no place of an image there")
        if message["role"] == "assistant" and n_places([message]):
            raise RowError(f"message {index} is an answer and has the place of an image")
    if (found := n_places(messages)) != n_images:
        raise RowError(f"{found} places of images and {n_images} images")
    return messages


def text_of(messages: list[Message]) -> str:
    """The text whose hash decides the split of a chat: its first user turn."""
    asked = [_plain(message) for message in messages if message["role"] == "user"]
    return (asked or [_plain(messages[0])])[0].strip()


def text_in(row: dict[str, Any], key: str) -> str:
    """The text of a field; RowError if there is none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f'the field "{key}" is missing' if value is None else f'the field "{key}" is no text')
    text = str(value)
    if not text.strip():
        raise RowError(f'the field "{key}" is empty')
    return text


def _messages(message: Any, index: int) -> list[Message]:
    """One message of a row, or the two of a turn; fields that are None, as parquet fills them, count as absent."""
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if {"from", "value"} <= given.keys():
        given = {"role": _ROLES.get(given["from"], given["from"]), "content": given["value"]}
    turns = [given]
    if "role" not in given and {"user", "assistant"} <= given.keys():
        turns = [{"role": role, "content": given[role]} for role in ("user", "assistant")]
    kept = [{key: turn[key] for key in ("role", "content", "reasoning_content") if key in turn} for turn in turns]
    for each in kept:
        if isinstance(each.get("content"), list):
            each["content"] = _content(each["content"], index)
        is_text = {
            key: isinstance(value, str) for key, value in each.items() if key != "content" or not isinstance(value, list)
        }
        if not {"role", "content"} <= each.keys() or not all(is_text.values()):
            raise RowError(f"message {index} is not a role and a content of text")
    return kept


def _content(parts: list[Any], index: int) -> str | list[dict[str, str]]:
    """A list of parts, or the text of one without images."""
    kept, n_images = [], 0
    for part in parts:
        given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if given.get("type") == "image":
            if any(key in given for key in _OWN_IMAGE):
                raise RowError(f"message {index} holds an image itself; put it into a field of the row that `images` names")
            if given.get("index", n_images) != n_images:
                raise RowError(f"message {index} has the places of its images out of order")
            kept.append({"type": "image"})
            n_images += 1
        elif given.get("type") == "text" and isinstance(given.get("text"), str):
            kept.append({"type": "text", "text": given["text"]})
        else:
            raise RowError(f"message {index} has a part that is neither a text nor the place of an image")
    return kept if n_images else "".join(part["text"] for part in kept)


def _split(message: Message) -> Message:
    """A user's or a system's text cut at the places that it has."""
    if message["role"] == "assistant" or PLACE not in message["content"]:
        return message
    texts = _PLACE.split(message["content"])
    parts: list[dict[str, str]] = [{"type": "text", "text": texts[0]}] if texts[0] else []
    for text in texts[1:]:
        parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return message | {"content": parts}


def _before_first_question(messages: list[Message], n_images: int) -> list[Message]:
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RowError("images, and no user turn that they could belong to")
    parts = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": messages[first]["content"]}]
    return [*messages[:first], messages[first] | {"content": parts}, *messages[first + 1 :]]


def _plain(message: Message) -> str:
    """The text of a content."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
