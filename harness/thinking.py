"""What of a response is thinking, and what is the answer."""

from __future__ import annotations

from dataclasses import dataclass

from harness.schema_evaluation import Thinking


@dataclass(frozen=True)
class Split:
    """answer: the text after the last close marker, cut at the first stop string. is_open: thinking that never closed."""

    answer: str
    is_open: bool


def split_thinking(text: str, thinking: Thinking | None, stops: tuple[str, ...] = ()) -> Split:
    """The answer in a response.

    Without a close marker, thinking is open where the model is expected to think or the text shows an open marker; otherwise all
    of it is the answer.
    """
    if thinking is not None:
        if thinking.close in text:
            text = text.rpartition(thinking.close)[2].lstrip()  # the line breaks after the marker are no part of the answer
            if thinking.open in text:  # a second thought that never ended
                return Split("", is_open=True)
        elif thinking.expected or thinking.open in text:
            return Split("", is_open=True)
    cuts = [text.index(stop) for stop in stops if stop in text]
    return Split(text[: min(cuts)] if cuts else text, is_open=False)
