"""The processes of one training run: how many there are, which one this is, and sums over all of them.

Started by torchrun, a process joins the group with `join`; everything else works alone too, where there is no group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_PATIENCE = timedelta(days=7)
"""How long a rank waits for another, which may be measuring a model meanwhile."""


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def joined() -> Iterator[None]:
    """Within, this process is one of torchrun's ranks: NCCL between GPUs, gloo between CPUs. Nothing happens without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """What this process computes on: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def total(values: Tensor) -> Tensor:
    """The sum of `values` (on a CPU, any shape) over the ranks."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself where it is not sharded. Writes reach the original."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def gathered(part: dict[str, Any]) -> dict[str, Any]:
    """The dictionaries of all ranks in one."""
    if world_size() == 1:
        return part
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return {key: value for each in parts for key, value in each.items()}


def from_first(value: Any) -> Any:
    """What rank 0 passed."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
