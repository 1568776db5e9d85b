"""A task through prepare, answers and scores, without stages: what tests of tasks and engines share."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import evaluation, prompts
from harness.prepared import Prepared
from harness.task_settings import ResolvedTask, plain_task


@dataclass(frozen=True)
class Evaluated:
    prepared: Prepared
    answers: evaluation.Answered
    samples: list[dict[str, Any]]
    result: dict[str, Any]

    def value(self, metric: str) -> float | None:
        return self.result["metrics"][metric]["value"]


def task(name: str, **settings: Any) -> ResolvedTask:
    return replace(plain_task(name, None, None), **settings)


def prepare(asked: ResolvedTask, tokenizer, folder="model", **options) -> Prepared:
    return prompts.prepare(asked, tokenizer, Path(folder), **options)


def evaluate(
    name, engine, journals, *, weights="w", prepared=None, batch_plan=None, images=Path("images"), **settings
) -> Evaluated:
    """Settings are those of a ResolvedTask, such as limit, repeats, sampling, thinking."""
    asked = task(name, **settings)
    prepared = prepared or prepare(asked, engine.tokenizer)
    answers = evaluation.answer_task(
        prepared,
        engine,
        weights=weights,
        journals=journals,
        repeats=asked.repeats,
        sampling_seed=asked.seed,
        on_progress=lambda done, total: None,
        batch_plan=batch_plan,
        images=images,
    )
    samples, result = evaluation.score_task(asked, prepared.about, prepared.questions, answers.rows, answers.about)
    return Evaluated(prepared, answers, samples, result)
