"""Checkpoints of an unfinished training run: masters and optimizer state, and what else decides how it goes on.

<folder>/step-000050/          torch.distributed.checkpoint: tensors, whatever the number of ranks that wrote or read them
<folder>/step-000050/state.json  step, random state, records of the steps so far; identity of the run; sha256 of every other file

A checkpoint is written beside its place and renamed: half of one is never found. It is read only where its identity is that of the
run and every digest fits, since torch.distributed.checkpoint keeps its metadata in a pickle. Only the newest one stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from qad import ranks
from qad.errors import TrainingError

_STATE = "state.json"
_VERSION = 1  # of what a checkpoint holds: one of another version is begun anew


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in `folder`; `identity` is a digest of everything that the run depends on."""

    folder: Path
    identity: str
    every: int

    def save(self, step: int, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Keep the state after `step` optimizer steps, and nothing older. Every rank must call it.

        Raises TrainingError where it cannot be written; what was kept before stays.
        """
        target = self.folder / f"step-{step:06}"
        partial = self.folder / f".partial-{target.name}"
        if ranks.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.barrier()
        with _quietly():
            try:
                save_tensors(_tensors(named, optimizer), checkpoint_id=partial, no_dist=ranks.world_size() == 1)
            except CheckpointException as error:
                raise TrainingError(
                    f"{partial}: the checkpoint after step {step} cannot be written ({_reason(error)}); make room, and the same "
                    "command goes on from the one before it, if there is one"
                ) from error
        ranks.barrier()
        names = sorted(path.name for path in partial.iterdir())
        digests = ranks.gathered({name: _sha256(partial / name) for name in names[ranks.rank() :: ranks.world_size()]})
        random_states = ranks.gathered({str(ranks.rank()): _random_state()})
        if ranks.rank() == 0:
            with_state = [name for name, parameter in named.items() if optimizer.state.get(parameter)]
            ours = {
                "version": _VERSION,
                "identity": self.identity,
                "step": step,
                "random": random_states,
                "with_state": with_state,
            }
            record = {**ours, "files": digests, **state}
            with open(partial / _STATE, "w", encoding="utf-8") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
            for old in self.folder.glob("step-*"):
                if old != target:
                    shutil.rmtree(old)
        ranks.barrier()

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Folder and state of the newest whole checkpoint of this run, or None. Every rank must call it."""
        found = None
        if ranks.rank() == 0:
            found = next((str(path) for path in sorted(self.folder.glob("step-*"), reverse=True) if self._is_ours(path)), None)
        found = ranks.from_first(found)
        return None if found is None else (Path(found), json.loads((Path(found) / _STATE).read_text()))

    def load(
        self, folder: Path, state: dict[str, Any], named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Read what `latest` found into masters, optimizer and random state."""
        for name in state["with_state"]:  # a step of size zero, so that the optimizer has a state to read into
            named[name].grad = torch.zeros_like(named[name])
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tensors = _tensors(named, optimizer)
        with _quietly():
            load_tensors(tensors, checkpoint_id=folder, no_dist=ranks.world_size() == 1)
        with torch.no_grad():
            for target, source in _pairs(named, optimizer, tensors):
                if target is not source:
                    target.copy_(source)
        saved = state["random"].get(str(ranks.rank()))
        if saved is not None and len(state["random"]) == ranks.world_size():
            _set_random_state(saved)

    def _is_ours(self, path: Path) -> bool:
        try:
            state = json.loads((path / _STATE).read_text())
            names = {file.name for file in path.iterdir()} - {_STATE}
            return (
                (state["version"], state["identity"]) == (_VERSION, self.identity)
                and names == set(state["files"])
                and all(_sha256(path / name) == digest for name, digest in state["files"].items())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False


def _tensors(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found: dict[str, Any] = {f"master.{name}": parameter.detach() for name, parameter in named.items()}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = value
    return found


def _pairs(
    named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, loaded: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    return [(target, loaded[name]) for name, target in _tensors(named, optimizer).items()]


def _reason(error: CheckpointException) -> str:
    """What the system said, below what torch made of it."""
    first = next(iter(error.failures.values()))[0]
    cause: BaseException | None = first
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(first).splitlines()[0] if cause is None else str(cause.strerror)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warning that there is no process group, where none is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _random_state() -> dict[str, str]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return {device: state.numpy().tobytes().hex() for device, state in found.items()}


def _set_random_state(saved: dict[str, str]) -> None:
    states = {device: torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8) for device, state in saved.items()}
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
