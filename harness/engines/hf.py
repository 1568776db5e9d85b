"""The engine in process: a transformers model; greedy decoding, sampling and likelihoods in padded batches, with or without images.

The images of a batch go to the model once, in the order of their tokens, when the prompts are read. A sampled token is drawn by inverting the
cumulative distribution at one uniform number of the request's own generator: what is drawn for a request depends on its seed and its
logits, not on the other rows of the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from harness.engines import Answer, Likelihood, Outcome, Request, Sampling
from harness.errors import EngineError
from harness.models import TEXT_CONFIGS
from harness.processor import Processor
from qad.backbone import last_hidden, speaker_of
from qad.checkpoint import Loaded

VERSION = 1
DEFAULT_BATCH_SIZE = 32
SHORTLIST = 1024
"""Tokens among which top_p looks first; a row of which they hold too little looks further."""
_LENGTH = "max_position_embeddings"


def context_length(config: Any) -> int:
    """Tokens that a model holds, by its loaded configuration; EngineError if it does not say."""
    parts = [config.get_text_config(), *(getattr(config, key, None) for key in TEXT_CONFIGS)]
    given = (part if isinstance(part, dict) else {_LENGTH: getattr(part, _LENGTH, None)} for part in parts)
    found = next((part[_LENGTH] for part in given if part.get(_LENGTH) is not None), None)
    if found is None:
        raise EngineError(
            f"the configuration of {type(config).__name__} says nowhere how many tokens the model holds ({_LENGTH}, beside or in "
            f"{', '.join(TEXT_CONFIGS)}); add it to config.json"
        )
    return int(found)


MERGED_INPUTS = "merged input scales"
"""What a row's flags say where the experts of a layer have several input scales and the largest computed, as in vLLM."""


class HfEngine:
    """Answers with a loaded checkpoint. Batches are of equal kind and sampling, sorted by length.

    processor: gives the model's own, which is asked for when the first request with images comes; None for a model of text alone.
    """

    answers_depend_on_batch = True

    def __init__(
        self,
        loaded: Loaded,
        tokenizer: Any,
        *,
        eos_ids: set[int],
        args: dict[str, Any],
        processor: Callable[[], Processor] | None = None,
    ) -> None:
        self.model = loaded.model
        self.model.generation_config = GenerationConfig()  # transformers takes from it what a request leaves open
        self.kernels = loaded.kernels
        self.backend: str | None = loaded.backend
        self.flags: tuple[str, ...] = (MERGED_INPUTS,) if loaded.merged_inputs else ()
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.context_length = context_length(self.model.config)
        self.batch_size = int(args.get("batch_size", DEFAULT_BATCH_SIZE))
        self.protocol = {"engine": "hf", "version": VERSION, "batch_size": self.batch_size}
        self._pad = min(self.eos_ids)
        self._make_processor = processor
        self._processor: Processor | None = None

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
    def answer(self, batch: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        sampling = batch[0].sampling
        return iter(enumerate(self._likelihoods(batch) if sampling is None else self._generate(batch, sampling)))

    def _generate(self, batch: Sequence[Request], sampling: Sampling) -> list[Answer]:
        draws = LogitsProcessorList([SeededDraws(sampling, [r.seed for r in batch])] if sampling.temperature > 0 else [])
        began = time.perf_counter()
        width = max(len(r.token_ids) for r in batch)
        ids = torch.full((len(batch), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, width - len(request.token_ids) :] = 1
        stops = _StopStrings(self.tokenizer, sampling.until, width)
        generated = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            **self._image_inputs(batch, ids),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=sampling.max_tokens, eos_token_id=sorted(self.eos_ids), pad_token_id=self._pad
            ),
            logits_processor=draws,
            stopping_criteria=StoppingCriteriaList([stops]),
        )
        seconds = (time.perf_counter() - began) / len(batch)
        return [read_answer(self.tokenizer, self.eos_ids, row[width:].tolist(), sampling, seconds) for row in generated]

    def _likelihoods(self, batch: Sequence[Request]) -> list[Likelihood]:
        began = time.perf_counter()
        rows = [[*r.token_ids, *(r.continuation or ())] for r in batch]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device), "use_cache": False}
        hidden = last_hidden(self.model, inputs | self._image_inputs(batch, ids))
        head = speaker_of(self.model).get_output_embeddings()
        found = [
            _score(head(hidden[row, len(r.token_ids) - 1 : len(rows[row]) - 1]), r.continuation or ())
            for row, r in enumerate(batch)
        ]
        seconds = (time.perf_counter() - began) / len(batch)
        return [Likelihood(logprob, is_greedy, seconds) for logprob, is_greedy in found]

    def _image_inputs(self, batch: Sequence[Request], ids: Tensor) -> dict[str, Tensor]:
        """What the model is called with besides tokens, for the padded `ids` (requests, tokens) of a batch; {} without images."""
        if not any(request.images for request in batch):
            return {}
        if self._make_processor is None:
            raise EngineError('a request with images, but the model was loaded as one of text; set [model] kind = "image-text"')
        self._processor = self._processor or self._make_processor()
        found = self._processor.model_inputs([request.images for request in batch], ids)
        return {name: value.to(self.model.device) for name, value in found.items()}


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
    targets = torch.tensor(continuation, device=logits.device)
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    logprob = float(log_probabilities.gather(1, targets[:, None]).sum())
    if not math.isfinite(logprob):
        raise EngineError(f"the likelihood of a continuation is {logprob}; the model's logits overflow")
    return logprob, bool((log_probabilities.argmax(dim=-1) == targets).all())


class SeededDraws(LogitsProcessor):
    """Leaves of each row's logits the one token that is drawn, so that greedy decoding takes it.

    temperature, then top_k (0: all), then top_p, as other engines order them; each row has a generator of its own seed.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int | None]) -> None:
        if any(seed is None for seed in seeds):
            raise EngineError("a sampled request carries no seed; its answer could not be repeated")
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds if seed is not None]

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores.double().cpu() / self.sampling.temperature, dim=-1)
        drawn = [self._draw(row, g) for row, g in zip(probabilities, self.generators, strict=True)]
        chosen = torch.tensor(drawn, device=scores.device)[:, None]
        return torch.full_like(scores, -math.inf).scatter(1, chosen, 0.0)

    def _draw(self, probabilities: Tensor, generator: torch.Generator) -> int:
        tokens: Tensor | None = None
        if self.sampling.top_k or self.sampling.top_p < 1:
            probabilities, tokens = self._most_likely(probabilities)
        cumulative = probabilities.cumsum(dim=-1)
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        point = torch.minimum(uniform * cumulative[-1], torch.nextafter(cumulative[-1], torch.zeros(1, dtype=torch.float64)))
        place = torch.searchsorted(cumulative, point, right=True)
        return int(place if tokens is None else tokens[place])

    def _most_likely(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities that top_k and top_p leave, from the largest down, and their tokens. No full sort of a vocabulary."""
        n = self.sampling.top_k or SHORTLIST
        while True:
            kept, tokens = probabilities.topk(min(n, len(probabilities)))
            enough = self.sampling.top_p * (kept.sum() if self.sampling.top_k else 1.0)
            before = kept.cumsum(dim=-1) - kept
            if self.sampling.top_k or len(kept) == len(probabilities) or before[-1] >= enough:
                n_kept = max(1, int((before < enough).sum()))
                return kept[:n_kept], tokens[:n_kept]
            n *= 8


class _StopStrings(StoppingCriteria):
    """Ends a row once its generated text holds a stop string."""

    def __init__(self, tokenizer: Any, until: tuple[str, ...], prompt_width: int) -> None:
        self.tokenizer, self.until, self.prompt_width = tokenizer, until, prompt_width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.until:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        texts = [decode(self.tokenizer, row) for row in input_ids[:, self.prompt_width :].tolist()]
        return torch.tensor([any(stop in text for stop in self.until) for text in texts], device=input_ids.device)
