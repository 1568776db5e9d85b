"""The engine in process: a transformers model on the CPU, greedy decoding and likelihoods in padded batches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from harness.engines import Answer, Likelihood, Request, Sampling
from harness.errors import EngineError
from qad.checkpoint import Loaded

VERSION = 1
DEFAULT_BATCH_SIZE = 32


class HfEngine:
    """Answers with a loaded checkpoint. Batches are of equal kind and sampling, sorted by length."""

    def __init__(self, loaded: Loaded, tokenizer: Any, *, eos_ids: set[int], args: dict[str, Any]) -> None:
        self.model = loaded.model
        self.kernels, self.backend = loaded.kernels, loaded.backend
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.context_length = int(self.model.config.max_position_embeddings)
        self.batch_size = int(args.get("batch_size", DEFAULT_BATCH_SIZE))
        self.protocol = {"engine": "hf", "version": VERSION, "batch_size": self.batch_size}
        self._pad = min(self.eos_ids)

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        kinds: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault((request.continuation is None, request.sampling), []).append(index)
        batches = []
        for members in kinds.values():
            members.sort(key=lambda i: (-len(requests[i].token_ids) - len(requests[i].continuation or ()), i))
            batches += [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]
        return batches

    @torch.no_grad()
    def answer(self, batch: Sequence[Request]) -> list[Answer | Likelihood]:
        sampling = batch[0].sampling
        return self._likelihoods(batch) if sampling is None else self._generate(batch, sampling)

    def _generate(self, batch: Sequence[Request], sampling: Sampling) -> list[Answer | Likelihood]:
        if sampling.temperature != 0:
            raise EngineError(f"the hf engine decodes greedily; found temperature {sampling.temperature}")
        began = time.perf_counter()
        width = max(len(r.token_ids) for r in batch)
        ids = torch.full((len(batch), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, width - len(request.token_ids) :] = 1
        stops = _StopStrings(self.tokenizer, sampling.until, width)
        generated = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=sampling.max_tokens, eos_token_id=sorted(self.eos_ids), pad_token_id=self._pad
            ),
            stopping_criteria=StoppingCriteriaList([stops]),
        )
        seconds = (time.perf_counter() - began) / len(batch)
        return [read_answer(self.tokenizer, self.eos_ids, row[width:].tolist(), sampling, seconds) for row in generated]

    def _likelihoods(self, batch: Sequence[Request]) -> list[Answer | Likelihood]:
        began = time.perf_counter()
        rows = [[*r.token_ids, *(r.continuation or ())] for r in batch]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        found = [
            _score(head(hidden[row, len(r.token_ids) - 1 : len(rows[row]) - 1]), r.continuation or ())
            for row, r in enumerate(batch)
        ]
        seconds = (time.perf_counter() - began) / len(batch)
        return [Likelihood(logprob, is_greedy, seconds) for logprob, is_greedy in found]


def read_answer(tokenizer: Any, eos_ids: frozenset[int], tokens: list[int], sampling: Sampling, seconds: float) -> Answer:
    """Generated tokens as an answer: cut at the first end-of-text token, its text at the first stop string."""
    ends = [i for i, token in enumerate(tokens) if token in eos_ids]
    kept = tokens[: ends[0]] if ends else tokens
    text = decode(tokenizer, kept)
    cuts = [text.index(stop) for stop in sampling.until if stop in text]
    if cuts:
        text = text[: min(cuts)]
    return Answer(text, tuple(kept), "stop" if ends or cuts else "length", seconds)


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Text of tokens, special ones left out, spaces untouched."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _score(logits: Tensor, continuation: tuple[int, ...]) -> tuple[float, bool]:
    targets = torch.tensor(continuation)
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    logprob = float(log_probabilities.gather(1, targets[:, None]).sum())
    if not math.isfinite(logprob):
        raise EngineError(f"the likelihood of a continuation is {logprob}; the model's logits overflow")
    return logprob, bool((log_probabilities.argmax(dim=-1) == targets).all())


class _StopStrings(StoppingCriteria):
    """Ends a row once its generated text holds a stop string."""

    def __init__(self, tokenizer: Any, until: tuple[str, ...], prompt_width: int) -> None:
        self.tokenizer, self.until, self.prompt_width = tokenizer, until, prompt_width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.until:
            return torch.zeros(len(input_ids), dtype=torch.bool)
        texts = [decode(self.tokenizer, row) for row in input_ids[:, self.prompt_width :].tolist()]
        return torch.tensor([any(stop in text for stop in self.until) for text in texts])
