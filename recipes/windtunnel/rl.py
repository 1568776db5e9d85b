"""Reinforcement learning on verified answers: GRPO, on mathematics alone, from the supervised model.

A step samples `group` answers to each of `prompts` problems at temperature 1. An answer that came to its end with the right number in
its last box is worth 1, any other 0. The advantage of an answer is its worth less the mean of its group, over the group's standard
deviation (Shao et al. 2024, DeepSeekMath, equation 3 without the reference term); groups whose answers are all right or all wrong say
nothing and are left out. One step of the optimizer a batch, so the ratio of new to old probabilities is 1 and needs no clipping. The
loss is a mean over tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.tasks.tunnel import MATHS, Problem, training_problem
from recipes.windtunnel.batches import Encoder, Example, padded, parts, response_logits
from recipes.windtunnel.sample import is_right, sample, scores, task_scores
from recipes.windtunnel.stage import Rate, Stage, adamw, load


@dataclass(frozen=True)
class Settings:
    """How the stage goes. A collapse is a mean reward over `window` steps below `collapsed` of the best such mean before."""

    rate: Rate
    prompts: int = 32
    group: int = 8
    domains: tuple[str, ...] = MATHS
    seed: int = 0
    max_new: int = 112
    weight_decay: float = 0.0
    clip: float = 1.0
    window: int = 10
    collapsed: float = 0.5
    validate_every: int = 50
    checkpoint_every: int = 10


RL = Settings(Rate(lr=1.5e-4, steps=100, warm_up=10))


class RewardCollapseError(SystemExit):
    """The policy has lost what it was rewarded for, or never got a reward."""


@dataclass(frozen=True)
class Answers:
    """Sampled answers to one problem and what each is worth."""

    examples: tuple[Example, ...]
    rewards: tuple[float, ...]

    @property
    def advantages(self) -> list[float]:
        """Of each answer; all 0 where all are worth the same."""
        mean, spread = statistics.fmean(self.rewards), statistics.pstdev(self.rewards)
        return [(reward - mean) / spread if spread else 0.0 for reward in self.rewards]


def run_rl(out: Path, settings: Settings) -> None:
    model, parent = load(out, "sft", needed_by="rl")
    before, _ = load(out, "sft", needed_by="rl")
    stage = Stage(out / "rl", "rl", model, settings, begins_from=parent, optimizers=adamw(model, settings.weight_decay))
    learn(stage)
    stage.finish(tasks=task_scores(stage.model, stage.tokenizer), kl=kl_between(stage.model, before, stage.tokenizer))


def learn(stage: Stage) -> None:
    """The steps that are left. RewardCollapseError: see `require_reward`."""
    settings: Settings = stage.settings
    rewards: list[float] = logged_rewards(stage)
    last = time.monotonic()
    while stage.step < settings.rate.steps:
        answered = _sampled(stage)
        rewards.append(statistics.fmean(reward for answers in answered for reward in answers.rewards))
        require_reward(rewards, settings, stage.folder)
        varied = [answers for answers in answered if any(answers.advantages)]
        if varied:
            _backward(stage.model, varied, stage.tokenizer.pad_token_id)
            stage.update(settings.rate.at(stage.step))
        stage.step += 1
        n_tokens = [len(example.response) for answers in answered for example in answers.examples]
        stage.log(
            reward=round(rewards[-1], 4),
            varied=len(varied),
            tokens=round(statistics.fmean(n_tokens), 1),
            seconds_a_step=round(time.monotonic() - last, 2),
        )
        if stage.step % settings.validate_every == 0:
            stage.log(held_out=scores(stage.model, stage.tokenizer, "validation", n=100, temperature=0.6, repeats=1))
        if stage.step % settings.checkpoint_every == 0:
            stage.keep()
        last = time.monotonic()


def require_reward(rewards: list[float], settings: Settings, folder: Path) -> None:
    """RewardCollapseError if the mean of the last `window` rewards is 0, or below `collapsed` of the best mean before."""
    window = settings.window
    if len(rewards) < window:
        return
    means = [statistics.fmean(rewards[end - window : end]) for end in range(window, len(rewards) + 1)]
    best = max(means)
    if means[-1] > 0 and means[-1] >= settings.collapsed * best:
        return
    at = means.index(best) + window
    was = f"it was {best:.3f} over the {window} until step {at}" if best else "it never was more"
    raise RewardCollapseError(
        f"{folder}: the reward collapsed at step {len(rewards)}: its mean over the last {window} steps is {means[-1]:.3f}, {was}. "
        f"No model is written. Lower the learning rate (now {settings.rate.lr:g}) or take more answers a problem (now "
        f"{settings.group}), remove {folder} and begin again"
    )


def kl_between(model: Any, before: Any, tokenizer: Any, n: int = 200) -> dict[str, float]:
    """KL(model || before) in nats a token over answers that `model` samples at temperature 1, with its standard error over answers."""
    encoder = Encoder(tokenizer)
    problems = [training_problem("kl", number, MATHS) for number in range(n)]
    prompts = [encoder.prompt(problem.question) for problem in problems]
    responses = sample(model, prompts, max_new=112, temperature=1.0, seed=0, eos_id=tokenizer.eos_token_id)
    examples = [Example(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    means = []
    for part in parts(examples):
        ids, labels = padded(part, encoder.pad_id)
        with torch.no_grad():
            new, old = (response_logits(each, ids, labels)[0].log_softmax(-1) for each in (model, before))
        of_tokens = (new.exp() * (new - old)).sum(-1)
        means += [float(of_one.mean()) for of_one in of_tokens.split([len(example.response) for example in part])]
    return {
        "nats_per_token": round(statistics.fmean(means), 4),
        "stderr": round(statistics.stdev(means) / n**0.5, 4),
        "answers": n,
    }


def logged_rewards(stage: Stage) -> list[float]:
    """The rewards of the steps before, where the stage goes on after a stop."""
    records = [json.loads(line) for line in (stage.folder / "log.jsonl").read_text().splitlines()]
    return [record["reward"] for record in records if "reward" in record]


def _sampled(stage: Stage) -> list[Answers]:
    settings: Settings = stage.settings
    tokenizer, encoder = stage.tokenizer, Encoder(stage.tokenizer)
    numbers = range(stage.step * settings.prompts, (stage.step + 1) * settings.prompts)
    problems: list[Problem] = [training_problem(f"rl {settings.seed}", number, settings.domains) for number in numbers]
    prompts = [encoder.prompt(problem.question) for problem in problems for _ in range(settings.group)]
    responses = sample(
        stage.model,
        prompts,
        max_new=settings.max_new,
        temperature=1.0,
        seed=settings.seed * 1_000_003 + stage.step,
        eos_id=tokenizer.eos_token_id,
    )
    found = []
    for number, problem in enumerate(problems):
        own = slice(number * settings.group, (number + 1) * settings.group)
        found.append(
            Answers(
                tuple(Example(prompt, response) for prompt, response in zip(prompts[own], responses[own], strict=True)),
                tuple(float(is_right(tokenizer, response, problem.answer)) for response in responses[own]),
            )
        )
    return found


def _backward(model: Any, varied: list[Answers], pad_id: int) -> None:
    """Gradients of -advantage * log-probability, a mean over the tokens of all answers."""
    weighed = {
        id(example): advantage
        for answers in varied
        for example, advantage in zip(answers.examples, answers.advantages, strict=True)
    }
    examples = [example for answers in varied for example in answers.examples]
    n_tokens = sum(len(example.response) for example in examples)
    for part in parts(examples):
        logits, chosen = response_logits(model, *padded(part, pad_id))
        weights: Tensor = torch.tensor([weighed[id(example)] for example in part for _ in example.response])
        log_probabilities = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        (-(weights * log_probabilities).sum() / n_tokens).backward()
