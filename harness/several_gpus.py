"""Trainings over several GPUs: the command that starts them, and which trainings of a suite a plain run would do on one of several. No torch."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from harness.done import adopt_imported, find_done
from harness.errors import HarnessError
from harness.plan import make_plan
from harness.provenance import gpu_count
from harness.store import Store, cache_folder
from harness.suite import load_suite
from qad.errors import QadError

MORE = "docs/multi-gpu.md"


def torchrun_command(suite: Path, *, count: int, nodes: int = 1) -> str:
    """What runs a suite with a process for each of `count` GPUs of `nodes` nodes; with several it is given on each, and <one of them> is to be filled in."""
    meet = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-id 1 --rdzv-endpoint <one of them>:29500 " if nodes > 1 else ""
    return f"torchrun {meet}--nproc-per-node {count} --module harness run {shlex.quote(str(suite))}"


def visible_gpus() -> int:
    """NVIDIA GPUs of this machine that a process started from here may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpu_count() if named is None else len([name for name in named.split(",") if name])


def on_one_gpu(suite: Path) -> str | None:
    """What to say of a suite of which trainings are to be done here, on one GPU of several; None of any other.

    Also None of a suite that cannot be planned: its run says why.
    """
    n_gpus = visible_gpus()
    if n_gpus < 2:
        return None
    try:
        store = Store(cache_folder())
        plan = make_plan(load_suite(suite), store)
        adopt_imported(plan, store)
        to_do = [stage.label for stage in plan.stages if stage.kind == "train" and find_done(stage, store) is None]
    except (HarnessError, QadError):
        return None
    if not to_do:
        return None
    return (
        f"{suite}: {', '.join(to_do)}: without torchrun on one of {n_gpus} GPUs, for which it may be too large; to use all of them, first: "
        f"{torchrun_command(suite, count=n_gpus)} ({MORE})"
    )
