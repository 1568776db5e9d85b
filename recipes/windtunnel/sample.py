"""Answers of a model in FP32: sampling in batches with a cache of keys and values, and the share of right ones on the four tasks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from harness.tasks.tunnel import Problem
from harness.tasks.tunnel_tasks import EVALUATION_SEED, TASKS, questions, score, score_option
from recipes.windtunnel.batches import Encoder

MAX_NEW = {"tunnel_math": 64, "tunnel_hard": 128, "tunnel_knowledge": 32, "tunnel_context": 32}
AT_ONCE = 256
"""Rows that are generated together."""


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[tuple[int, ...]], *, max_new: int, temperature: float, seed: int, eos_id: int
) -> list[tuple[int, ...]]:
    """A response to each prompt, with its end-of-text token where it came to one within `max_new`; temperature 0: the likeliest tokens."""
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), AT_ONCE):
        rows = order[start : start + AT_ONCE]
        responses = _sample_rows(model, [prompts[row] for row in rows], max_new, temperature, generator, eos_id)
        found |= dict(zip(rows, responses, strict=True))
    model.train(was_training)
    return [found[number] for number in range(len(prompts))]


def _sample_rows(
    model: Any, prompts: list[tuple[int, ...]], max_new: int, temperature: float, generator: torch.Generator, eos_id: int
) -> list[tuple[int, ...]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[eos_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])  # padded on the left
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    responses: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts))  # those that go on
    cache = DynamicCache(config=model.config)
    for _ in range(max_new):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).last_hidden_state
        logits = model.lm_head(hidden[:, -1]).float()
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            responses[row].append(token)
        going = (chosen != eos_id).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(rows):
            rows, chosen, mask = rows[going], chosen[going], mask[going]
            cache.batch_select_indices(going)
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
    return [tuple(response) for response in responses]


def is_right(tokenizer: Any, response: Sequence[int], answer: str) -> bool:
    """Whether a response came to its end and has the answer in its last box."""
    if not response or response[-1] != tokenizer.eos_token_id:
        return False
    return score({"answer": answer}, [tokenizer.decode(response[:-1])])["exact_match"] == 1.0


def scores(
    model: Any, tokenizer: Any, seed: str, *, n: int, temperature: float, repeats: int, tasks: Sequence[str] = tuple(TASKS)
) -> dict[str, dict[str, float]]:
    """By task the share of right answers to the first `n` questions of a seed, its standard error over questions, and mean length."""
    encoder = Encoder(tokenizer)
    found = {}
    for task in tasks:
        asked = questions(task, seed)[:n]
        prompts = [encoder.prompt(problem.question) for problem in asked for _ in range(repeats)]
        responses = sample(
            model, prompts, max_new=MAX_NEW[task], temperature=temperature, seed=0, eos_id=tokenizer.eos_token_id
        )
        right = [_score(task, tokenizer, each, asked[i // repeats]) for i, each in enumerate(responses)]
        shares = [sum(right[i : i + repeats]) / repeats for i in range(0, len(right), repeats)]
        found[task] = {
            "score": round(statistics.fmean(shares), 4),
            "stderr": round(statistics.stdev(shares) / len(shares) ** 0.5, 4),
            "questions": len(asked),
            "repeats": repeats,
            "tokens": round(statistics.fmean(map(len, responses)), 1),
        }
    return found


def _score(task: str, tokenizer: Any, response: Sequence[int], problem: Problem) -> float:
    if task != "tunnel_knowledge":
        return is_right(tokenizer, response, problem.answer)
    text = tokenizer.decode(response, skip_special_tokens=True)
    return score_option({"question": problem.question, "answer": problem.answer}, [text])["exact_match"]


def task_scores(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """The four tasks themselves at temperature 0.6, each question four times."""
    return scores(model, tokenizer, EVALUATION_SEED, n=200, temperature=0.6, repeats=4)
