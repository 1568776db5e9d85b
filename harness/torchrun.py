"""Several processes of one run, started by torchrun: rank 0 leads, the others take part in training alone. No torch without them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.plan import Plan
from harness.progress import Reporter
from harness.store import Store

_together = False
"""Whether the ranks are in a computation of all of them."""


def is_follower() -> bool:
    """Whether this process is a rank other than 0."""
    return _is_one_of_several() and int(os.environ["RANK"]) > 0


@contextmanager
def leading() -> Iterator[None]:
    """Within, rank 0 has the others at hand; at the end they are told that all is done. Nothing happens in a single process."""
    if not _is_one_of_several():
        yield
        return
    os.environ["TQDM_DISABLE"] = "1"  # torch, too, imports the library that reads it once
    from qad import ranks

    with ranks.joined():
        try:
            yield
        except BaseException:
            if not _together:
                ranks.from_first(None)
            raise
        ranks.from_first(None)


@contextmanager
def together() -> Iterator[None]:
    """Within, the other ranks compute with this one, and listen to nothing else: if it fails, torchrun ends them."""
    global _together
    _together = True
    yield
    _together = False


def follow(plan: Plan, store: Store, results: Path, reporter: Reporter) -> None:
    """Train with rank 0 whenever it does, until all is done. Cache and results must be folders that all ranks share."""
    from harness.stages import Workbench
    from harness.training import take_part
    from qad import ranks

    with ranks.joined():
        take_part(Workbench(plan, store, results / "journals", reporter))


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
