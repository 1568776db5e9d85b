"""Sequences of the wind tunnel in batches: token ids of a dialogue, padded on the right, and which tokens are to be predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.windtunnel.build import ASSISTANT, BOS, EOS, USER

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A prompt and what is learnt to follow it, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class Encoder:
    """Questions and solutions to token ids: those that the chat template gives (a test holds it)."""

    def __init__(self, tokenizer: Any) -> None:
        self._encode = tokenizer.encode
        self.pad_id, self.eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id

    def prompt(self, question: str) -> tuple[int, ...]:
        return tuple(self._encode(f"{BOS}{USER}{question}{ASSISTANT}", add_special_tokens=False))

    def example(self, question: str, solution: str) -> Example:
        return Example(self.prompt(question), tuple(self._encode(f"{solution}{EOS}", add_special_tokens=False)))


def parts(examples: Sequence[Example], longest_ratio: float = 1.35) -> Iterator[list[Example]]:
    """The examples from short to long, in parts of which none is much longer than the shortest: little is padded."""
    part: list[Example] = []
    for example in sorted(examples, key=len):
        if part and len(example) > longest_ratio * len(part[0]) + 8:
            yield part
            part = []
        part.append(example)
    if part:
        yield part


def padded(examples: Sequence[Example], pad_id: int, *, whole: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and labels, [examples, tokens]; a label is the token at its own place, or `IGNORED` in padding and, unless `whole`, in prompts."""
    longest = max(map(len, examples))
    ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example.prompt + example.response)
        begin = 0 if whole else len(example.prompt)
        labels[row, begin : len(example)] = ids[row, begin : len(example)]
    return ids, labels


def weights(examples: Sequence[Example], of_prompts: float) -> Tensor:
    """What each token to be predicted weighs, in the order of `response_logits` of whole sequences: one of a response 1."""
    return torch.tensor(
        [weight for each in examples for weight in [of_prompts] * (len(each.prompt) - 1) + [1.0] * len(each.response)]
    )


def response_logits(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits before each token that has a label, [such tokens, vocabulary], and those tokens. Rows are padded on the right."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != IGNORED
    return model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted]
