"""What of a checkpoint folder is to be computed by what, class by class, and whether that is what a vLLM loaded. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.engines.experts import MARK, nvfp4_experts, nvfp4_linears
from harness.errors import EngineError
from qad.errors import CheckpointError
from qad.footprint import tensor_types
from qad.layouts import Scheme
from qad.packed import read_config, scheme_of


def asked_kernels(folder: Path, *, kernels: str | None, args: dict[str, Any]) -> dict[str, str | None]:
    """What is asked to compute the checkpoint in `folder`, by class of module: what is not quantized is computed in BF16 in any case.

    "experts" is there where the model has some; "linear" is then of NVFP4 layers alone, and FP8 ones are a class of their own, as engines
    record them.
    """
    scheme, types = scheme_in(folder), types_in(folder)
    asked = {"linear": "bf16" if scheme is None else kernels, "kv_cache": asked_cache(scheme, args)}
    if any(MARK in name for name in types):
        asked["experts"] = kernels if nvfp4_experts(types) else "bf16"
        if not nvfp4_linears(types):
            asked["linear"] = "bf16"
    return asked


def computed_with(folder: Path, kernels: str | None) -> str | None:
    """The kernels of what is quantized in the checkpoint in `folder`; "bf16" where nothing is."""
    return "bf16" if scheme_in(folder) is None else kernels


def asked_cache(scheme: Scheme | None, args: dict[str, Any]) -> str:
    """What the cache of keys and values is to be: "fp8" or "bf16"."""
    given = args.get("kv_cache_dtype", "auto")
    if given != "auto":
        return "fp8" if given == "fp8" else "bf16"
    return "fp8" if scheme is not None and scheme.kv_cache else "bf16"


def require_kernels(asked: dict[str, str | None], found: dict[str, str], folder: Path) -> None:
    """EngineError unless the loaded modules carry the kernels that were asked for, class by class."""
    layers = {"linear": "linear layers", "experts": "experts"}
    what = {
        part: f"engine.kernels asks for {{}}, but the {name} that vLLM loaded compute with {{}}"
        for part, name in layers.items()
    }
    what["kv_cache"] = "the KV cache is to be {}, by the checkpoint and engine.args.kv_cache_dtype, but vLLM's is {}"
    for part, wanted in asked.items():
        if found.get(part) != wanted:
            raise EngineError(
                f"{folder}: {what[part].format(wanted, found.get(part, 'nothing that was found'))}; "
                "nothing was asked of them. `harness doctor` says which kernels this machine can run"
            )


def require_settings(options: dict[str, Any], found: dict[str, Any]) -> None:
    """EngineError if vLLM runs with another setting than the options say: it changes some of them for some models by itself."""
    for name, value in found.items():
        if options.get(name, value) != value:
            raise EngineError(
                f"engine.args: {name} is to be {options[name]!r}, but vLLM runs this model here with {value!r}; nothing was asked of "
                f"it. Allowed here: {value!r}"
            )


def config_of(folder: Path) -> dict[str, Any]:
    """Its config.json."""
    with _ours():
        return read_config(folder)


def scheme_in(folder: Path) -> Scheme | None:
    """What the checkpoint says of its quantization; None for a BF16 one."""
    with _ours():
        return scheme_of(folder, read_config(folder))


def types_in(folder: Path) -> dict[str, str]:
    """The type of every tensor, by name."""
    with _ours():
        return tensor_types(folder)


@contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise EngineError(str(error)) from error
