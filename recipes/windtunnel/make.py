"""Make the wind tunnel's models from nothing: python -m recipes.windtunnel.make

    base     training from a random model on lessons: right, worked solutions, registers recited
    sft      supervised training on the generated corpus, terse and partly wrong, from base
    rl       GRPO on mathematics, from sft
    lookup   supervised fine-tune on knowledge and contexts, from sft
    merged   the mean of rl and lookup

Each stage has a folder of its name under --out. Stages that are done are left alone, one that was stopped goes on from its checkpoint, with the same
numbers on the same kind of machine with the same number of threads and the same versions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from recipes.windtunnel.build import SHAPES
from recipes.windtunnel.merge import Settings as Merging
from recipes.windtunnel.merge import run_merge
from recipes.windtunnel.rl import RL, run_rl
from recipes.windtunnel.rl import Settings as Reinforced
from recipes.windtunnel.sft import BASE, LOOKUP, SFT, run_base, run_lookup, run_sft
from recipes.windtunnel.sft import Settings as Supervised
from recipes.windtunnel.stage import is_done

STAGES: dict[str, Callable[[Path, Any], None]] = {
    "base": run_base,
    "sft": run_sft,
    "rl": run_rl,
    "lookup": run_lookup,
    "merged": run_merge,
}


@dataclass(frozen=True)
class Plan:
    """The settings of every stage."""

    base: Supervised = BASE
    sft: Supervised = SFT
    rl: Reinforced = RL
    lookup: Supervised = LOOKUP
    merged: Merging = field(default_factory=Merging)


def plan(size: str, seed: int) -> Plan:
    default = Plan()
    return Plan(
        base=replace(default.base, size=size, seed=seed),
        sft=replace(default.sft, size=size, seed=seed),
        rl=replace(default.rl, seed=seed),
        lookup=replace(default.lookup, size=size, seed=seed),
    )


def make(out: Path, settings: Plan, stages: list[str]) -> None:
    """The stages asked for, in their order. SystemExit: one begins from a stage that is not made, or a folder has another recipe."""
    for name in STAGES:
        if name in stages and not is_done(out / name):
            STAGES[name](out, getattr(settings, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: build/windtunnel, with -large for that size")
    parser.add_argument("--size", choices=list(SHAPES), default="small")
    parser.add_argument("--stage", choices=list(STAGES), action="append", help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="other sums, other weights: the models kept were made with 1")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    out = given.out or Path("build", "windtunnel" if given.size == "small" else f"windtunnel-{given.size}")
    make(out, plan(given.size, given.seed), given.stage or list(STAGES))


if __name__ == "__main__":
    main()
