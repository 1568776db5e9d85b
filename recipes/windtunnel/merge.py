"""The merged model: the mean of the weights of two fine-tunes of one parent, in FP32, rounded to BF16 once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.windtunnel.sample import task_scores
from recipes.windtunnel.stage import Stage, load


@dataclass(frozen=True)
class Settings:
    """merged = first * rl + (1 - first) * lookup."""

    first: float = 0.5


def run_merge(out: Path, settings: Settings) -> None:
    one, of_one = load(out, "rl", needed_by="merged")
    other, of_other = load(out, "lookup", needed_by="merged")
    stage = Stage(out / "merged", "merged", one, settings, begins_from=f"{of_one}+{of_other}")
    with torch.no_grad():
        for own, its in zip(one.parameters(), other.parameters(), strict=True):
            own.mul_(settings.first).add_(its, alpha=1 - settings.first)
    stage.finish(tasks=task_scores(one, stage.tokenizer))
