"""Every constant of the plan's model of machines, each with its source: GPUs, bytes, and how much of a peak is reached.

`verified` is what has been checked against a machine of that kind by this project. Nothing here has been, so plans mark it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.errors import SuiteError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU. memory_mib: as its driver reports it. bandwidth: bytes/s. flops of products by type, dense, in operations/s; None: not in hardware."""

    name: str
    memory_mib: int
    bandwidth: float
    bf16: float
    fp8: float | None
    fp4: float | None
    source: str
    verified: bool = False

    @property
    def usable_bytes(self) -> int:
        """What tensors can have: all but what the driver's context takes."""
        return self.memory_mib * 2**20 - CONTEXT_BYTES


_AICONFIGURATOR = "NVIDIA aiconfigurator, systems/{}.yaml (read in public copies); memory: nvidia-smi output in public logs"
GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 81_920, 2.039e12, 312e12, None, None, _AICONFIGURATOR.format("a100_sxm")),
    "h100": Gpu("H100 SXM 80 GB", 81_559, 3.35e12, 989e12, 1978e12, None, _AICONFIGURATOR.format("h100_sxm")),
    "h200": Gpu("H200 SXM 141 GB", 143_771, 4.8e12, 989e12, 1978e12, None, _AICONFIGURATOR.format("h200_sxm")),
    "b200": Gpu("B200 SXM 180 GB", 183_359, 8.0e12, 2250e12, 4500e12, 9000e12, _AICONFIGURATOR.format("b200_sxm")),
    "b300": Gpu("B300 SXM 288 GB", 275_040, 7.75e12, 2250e12, 4500e12, 14000e12, _AICONFIGURATOR.format("b300_sxm")),
}
"""The GPUs that can be planned for. Peaks are dense: half of what is advertised with sparsity."""

CONTEXT_BYTES = 551 * 2**20
"""The driver's context and the libraries' workspaces of a process. aiconfigurator, a comment beside `other_mem`; not measured here."""
NCCL_BYTES = 411_041_792
"""Buffers of NCCL in each of several processes. aiconfigurator, `nccl_mem` for 8 GPUs; not measured here."""
FRAGMENTATION = 0.05
"""What torch's allocator holds beyond what tensors have, as a share of it. Assumed: no source."""

BF16, FP32, FP64, INT64 = 2, 4, 8, 8
"""Bytes of a number."""
CODE_BYTES = 0.5 + 1 / 16
"""Bytes of a weight in NVFP4: a code of four bits, and a block scale of eight for 16 of them. By the format."""
FP8_BYTES = 1
"""Bytes of a weight in FP8, which has one scale for a tensor. By the format."""

TRAINING_SHARE = 0.30
"""Share of the BF16 peak that training a dense model reaches. Assumed: no source, nothing measured here."""
TRAINING_SHARE_EXPERTS = 0.03
"""The same with experts. Model-Optimizer's tutorial on Qwen3.6-35B-A3B: 8.4e9 tokens in 735 hours of GB200 (2.5e15 a second), 8 x 3e9
operations a token, attention left out: 0.03. Theirs is Megatron; ours computes experts one by one and will not do better."""
FORWARD_SHARE = 0.40
"""Share of the BF16 peak that a forward pass of a long prompt reaches. Assumed: no source."""
BANDWIDTH_SHARE = 0.60
"""Share of the memory's bandwidth that generating token by token reaches. Assumed; aiconfigurator scales single kernels by 0.8."""
HF_SHARE = 0.15
"""The same of the engine in process, which transformers drives a token at a time. Assumed: no source."""
VLLM_MEMORY_SHARE = 0.92
"""`gpu_memory_utilization` where a suite does not say. vLLM 0.32, vllm/config/cache.py."""

MAX_COUNT, MAX_NODES, MAX_HOST_GB = 16, 1024, 100_000
"""GPUs of a node, nodes, and GB of a node's memory, beyond which a number is taken for a mistake."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines with `count` GPUs each. host_gb: the memory of one of them beside its GPUs, None where nobody says."""

    gpu: Gpu
    count: int
    nodes: int = 1
    host_gb: float | None = None

    @property
    def ranks(self) -> int:
        return self.count * self.nodes

    def __str__(self) -> str:
        each = f"{self.count} × {self.gpu.name}"
        return each if self.nodes == 1 else f"{self.nodes} nodes of {each}"


def cluster_of(
    gpu: str | None,
    count: int | None,
    nodes: int | None = None,
    *,
    config: Path | None = None,
    host_gb: float | None = None,
) -> Cluster | None:
    """The cluster that the command line asks for, None where it asks for none.

    Raises:
        SuiteError: a GPU that is not known, a number that is missing or makes no sense, or one of the others without a GPU.
    """
    others = {"--count": count, "--nodes": nodes, "--config": config, "--host-memory": host_gb}
    if gpu is None:
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise SuiteError(f"{given[0]}: has no effect without --gpu; name one. Known: {', '.join(GPUS)}")
        return None
    if gpu.lower() not in GPUS:
        raise SuiteError(f"--gpu {gpu}: not known. Known: {', '.join(GPUS)}")
    if count is None:
        raise SuiteError(f"--count: missing; say how many GPUs a node has beside --gpu {gpu}")
    nodes = 1 if nodes is None else nodes
    for name, value, most, what in (("--count", count, MAX_COUNT, "GPUs of a node"), ("--nodes", nodes, MAX_NODES, "nodes")):
        if not 1 <= value <= most:
            raise SuiteError(f"{name} {value}: allowed are 1 to {most} {what}")
    if host_gb is not None and not 0 < host_gb <= MAX_HOST_GB:
        raise SuiteError(f"--host-memory {host_gb:g}: allowed are more than 0, and at most {MAX_HOST_GB:,} GB of a node")
    return Cluster(GPUS[gpu.lower()], count, nodes, host_gb)
