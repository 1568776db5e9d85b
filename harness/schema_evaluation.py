"""The sections of a suite that say what is asked and how: tasks, sampling, thinking."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from harness.section import Positive, Section, Seed

_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_RENDERING = frozenset(
    [
        "conversation",
        "messages",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)
"""Arguments of the rendering itself, which are no variables of a chat template."""


class Thinking(Section):
    """How a reasoning model marks its thinking. What stands before the last `close` is no part of the answer.

    expected: every response thinks, so one without a `close` never ended its thinking and is incomplete. template_args: given to the chat
    template, such as enable_thinking.
    """

    open: Annotated[str, Field(min_length=1)] = "<think>"
    close: Annotated[str, Field(min_length=1)] = "</think>"
    expected: bool = True
    template_args: dict[str, Any] = {}

    @field_validator("template_args")
    @classmethod
    def _holds_no_argument_of_the_rendering(cls, given: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(given.keys() & _RENDERING)
        if taken:
            raise ValueError(
                f"{', '.join(taken)}: set by the harness when it renders a prompt, no variable of a template; remove it"
            )
        return given

    @model_validator(mode="after")
    def _has_markers_that_differ(self) -> Thinking:
        if self.open in self.close or self.close in self.open:
            raise ValueError(f"open = {self.open!r} and close = {self.close!r} hold one another; give markers that differ")
        return self


class SamplingSettings(Section):
    """How answers are generated, in place of what task files say; `temperature` 0 is greedy.

    protocol: a published protocol by name, which gives the keys that are left out and the repeats of tasks. seed: what the seeds of all
    responses are derived from.
    """

    protocol: str | None = None
    temperature: _NonNegative | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Positive | None = None
    seed: Seed | None = None


class Task(Section):
    """A task by name: one of ours, one of lm-eval's, or one in the file or folder `path`. Files are named by it.

    limit: its first questions only; every row of it is marked as partial. repeats: answers to each question, with a seed each. sampling:
    overrides single keys of the suite's. chat, metadata: of lm-eval's own tasks and a user's, which do not say whether they are asked in
    chat, or need more to be told (the lengths of ruler). pictures: "grey" shows a grey picture of its size in place of each: what the model
    knows without looking, under the task's name with "-grey" behind it; the task itself may stand beside it.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]*$", max_length=150)]
    path: Annotated[str, Field(min_length=1)] | None = None
    limit: Positive | None = None
    repeats: Positive | None = None
    sampling: SamplingSettings | None = None
    chat: bool | None = None
    metadata: dict[str, Any] = {}
    pictures: Literal["shown", "grey"] = "shown"
