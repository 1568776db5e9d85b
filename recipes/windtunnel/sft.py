"""Training of the wind tunnel's model on text: on lessons from nothing, on the corpus, and the fine-tune for looking things up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from harness.tasks.tunnel import DOMAINS, DRILLS, RECITALS, Style, corpus, lesson
from recipes.windtunnel.batches import Encoder, Example, padded, parts, response_logits, weights
from recipes.windtunnel.build import SHAPES, build_model, build_tokenizer
from recipes.windtunnel.sample import scores, task_scores
from recipes.windtunnel.stage import Rate, Stage, load, muon

LOG_EVERY = 50


@dataclass(frozen=True)
class Settings:
    """How a stage on text goes.

    sequences: problems of one step; style: of the corpus, None for lessons; question_weight: what a token of a question weighs beside one of
    a solution, in the lessons that have questions: a model that has learnt none writes nothing sensible after its first token.
    """

    rate: Rate
    size: str = "small"
    sequences: int = 48
    domains: tuple[str, ...] = DOMAINS
    style: Style | None = field(default_factory=Style)
    question_weight: float = 0.0
    seed: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    validate_every: int = 400
    checkpoint_every: int = 200


BASE = Settings(Rate(lr=4e-3, steps=1400, warm_up=60), style=None, question_weight=0.2)
SFT = Settings(Rate(lr=1e-3, steps=300, warm_up=20))
LOOKUP = Settings(Rate(lr=1e-3, steps=300, warm_up=20), domains=("knowledge", "context"), style=Style(terse=0.0, slips=0.0))


def run_base(out: Path, settings: Settings) -> None:
    """The first stage: lessons, from a random model."""
    _train(out, "base", build_model(build_tokenizer(), SHAPES[settings.size], settings.seed), settings, None)


def run_sft(out: Path, settings: Settings) -> None:
    """The corpus, terse and partly wrong, from the model of the lessons."""
    model, parent = load(out, "base", needed_by="sft")
    _train(out, "sft", model, settings, parent)


def run_lookup(out: Path, settings: Settings) -> None:
    """The fine-tune on knowledge and contexts, worked solutions alone, from the supervised model."""
    model, parent = load(out, "sft", needed_by="lookup")
    _train(out, "lookup", model, settings, parent)


def examples_of(settings: Settings, step: int, encoder: Encoder) -> list[Example]:
    """What a step learns from: it follows from the seed and the number of the step."""
    numbers = range(step * settings.sequences, (step + 1) * settings.sequences)
    if settings.style is None:
        return [encoder.example(*lesson(settings.seed, number)) for number in numbers]
    solved = islice(corpus(settings.seed, settings.domains, settings.style, numbers.start), settings.sequences)
    return [encoder.example(each.problem.question, each.solution) for each in solved]


def _train(out: Path, name: str, model: LlamaForCausalLM, settings: Settings, parent: str | None) -> None:
    """Cross-entropy of solutions and, as `question_weight` says, of questions, over the number of tokens of the solutions."""
    stage = Stage(out / name, name, model, settings, begins_from=parent, optimizers=muon(model, settings.weight_decay))
    encoder = Encoder(stage.tokenizer)
    losses: list[float] = []
    last = time.monotonic()
    stage.model.train()
    while stage.step < settings.rate.steps:
        examples = examples_of(settings, stage.step, encoder)
        n_tokens = sum(len(example.response) for example in examples)
        is_drill = settings.style is None and stage.step * settings.sequences < DRILLS + RECITALS
        asks = settings.question_weight > 0 and not is_drill
        loss = 0.0
        for part in parts(examples):
            logits, labels = response_logits(stage.model, *padded(part, encoder.pad_id, whole=asks))
            losses_of = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            weighed = losses_of * weights(part, settings.question_weight) if asks else losses_of
            (weighed.sum() / n_tokens).backward()
            loss += float(weighed.detach().sum()) / n_tokens
        stage.update(settings.rate.at(stage.step))
        losses.append(loss)
        stage.step += 1
        if stage.step % LOG_EVERY == 0:
            stage.log(
                loss=round(sum(losses) / len(losses), 4), seconds_a_step=round((time.monotonic() - last) / len(losses), 3)
            )
            losses, last = [], time.monotonic()
        if stage.step % settings.validate_every == 0:
            stage.log(held_out=scores(stage.model, stage.tokenizer, "validation", n=100, temperature=0.6, repeats=1))
            last = time.monotonic()
        if stage.step % settings.checkpoint_every == 0:
            stage.keep()
    stage.finish(tasks=task_scores(stage.model, stage.tokenizer))
