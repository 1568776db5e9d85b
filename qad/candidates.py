"""Checkpoints that may be chosen: the ones with the lowest validation losses, packed, without optimizer state."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qad import ranks


@dataclass(frozen=True, order=True)
class Candidate:
    """A checkpoint after `step` optimizer steps, with its validation `loss` in nats a token. The lower loss, then the earlier step, is first."""

    loss: float
    step: int


@dataclass
class Candidates:
    """The `keep` best of the checkpoints that were offered, in files of `folder`."""

    folder: Path
    keep: int
    kept: list[Candidate] = field(default_factory=list)

    def offer(self, candidate: Candidate, snapshot: Callable[[], dict[str, Tensor]]) -> None:
        """Keep the candidate if it is among the best. Every rank must call it."""
        best = sorted([*self.kept, candidate])[: self.keep]
        if candidate in best:
            tensors = snapshot()
            if ranks.rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = self.path(candidate).with_suffix(".partial")
                save_file(tensors, partial)
                os.replace(partial, self.path(candidate))
        self.kept = best

    def prune(self) -> None:
        """Remove the files of those that are no longer kept; not before a resumed run would know that, too."""
        if ranks.rank() == 0:
            for path in set(self.folder.glob("step-*.safetensors")) - {self.path(candidate) for candidate in self.kept}:
                path.unlink()

    def path(self, candidate: Candidate) -> Path:
        """The file of a candidate."""
        return self.folder / f"step-{candidate.step:06}.safetensors"

    def read(self, candidate: Candidate) -> dict[str, Tensor]:
        """The snapshot of a candidate."""
        return load_file(self.path(candidate))

    def state(self) -> list[dict[str, Any]]:
        """What a resumed run needs to know."""
        return [asdict(candidate) for candidate in self.kept]

    def resume(self, state: list[dict[str, Any]]) -> bool:
        """Go on from `state`; False, and nothing is changed, if a file of it is gone. Every rank must call it."""
        kept = [Candidate(**each) for each in state]
        if not ranks.from_first(all(self.path(candidate).is_file() for candidate in kept)):
            return False
        self.kept = kept
        return True
