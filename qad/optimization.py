"""The optimizer, its learning rates and their schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from qad import ranks
from qad.errors import TrainingError

Optimizer = Literal["adamw", "adafactor"]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class LrGroup:
    """Parameters whose name matches `match` (fnmatch) are trained with `lr`; the first group that matches counts."""

    match: str
    lr: float


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """An optimizer of torch on the FP32 masters, linear warm-up, then decay to zero (linear, cosine) or a constant rate.

    optimizer: "adamw", eight bytes of state a parameter; "adafactor" (torch.optim.Adafactor, arXiv 1804.04235), next to none: second
        moments by row and column, no first moment. Its `lr` is relative to the RMS of each parameter.
    clip_norm: the gradient's global norm is cut to this.
    """

    lr: float
    schedule: Schedule = "linear"
    warmup_steps: int = 5
    optimizer: Optimizer = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    lr_groups: tuple[LrGroup, ...] = ()

    def factor_at(self, step: int, n_steps: int) -> float:
        """What every rate is multiplied by at `step` (from 0): warm-up reaches 1 at step `warmup_steps` - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        left = (n_steps - step) / max(1, n_steps - self.warmup_steps)
        return left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))

    def lr_at(self, step: int, n_steps: int) -> float:
        """The rate of `step`, of parameters that no group names."""
        return self.lr * self.factor_at(step, n_steps)

    def require_matches(self, names: list[str]) -> None:
        """TrainingError for a pattern of `lr_groups` that is the first match of none of the trained parameters."""
        used = {next((g.match for g in self.lr_groups if fnmatchcase(name, g.match)), None) for name in names}
        for group in self.lr_groups:
            if group.match not in used:
                raise TrainingError(
                    f'lr_groups: "{group.match}" matches none of the {len(names)} trained parameters that an earlier group does not '
                    f"match; names look like {', '.join(names[:3])}"
                )

    def require_shareable(self) -> None:
        """TrainingError where several ranks share the model and torch's optimizer of that name cannot work on its shards."""
        if self.optimizer == "adafactor" and ranks.world_size() > 1:
            raise TrainingError(
                f'optimizer = "adafactor" does not work over {ranks.world_size()} ranks: torch takes no root of sums that are spread '
                'over shards; use "adamw", whose state is spread over the ranks, or one rank'
            )

    def build(self, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of `named` parameters; every group carries its rate before the schedule as `base_lr`; scales do not decay.

        Raises as `require_matches`.
        """
        self.require_matches(list(named))
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in named.items():
            lr = next((group.lr for group in self.lr_groups if fnmatchcase(name, group.match)), self.lr)
            decay = 0.0 if name.endswith(".block_scale") else self.weight_decay
            group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "base_lr": lr, "weight_decay": decay})
            group["params"].append(parameter)
        if self.optimizer == "adafactor":
            return torch.optim.Adafactor(groups.values(), lr=self.lr)
        return torch.optim.AdamW(groups.values(), lr=self.lr, betas=self.betas)

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int, n_steps: int) -> float:
        """Give every group its rate at `step`; returns `lr_at`."""
        factor = self.factor_at(step, n_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.lr * factor
