"""The process that holds vLLM. `harness.engines.vllm` starts it; nothing of vLLM is imported in the harness itself.

Written against vLLM 0.32. The engine core runs inside this process (no second one to lose), so that kernels and hidden
states can be read from the loaded modules.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NATIVE = (
    "FlashInferCuteDslNvFp4LinearKernel",
    "FlashInferCutlassNvFp4LinearKernel",
    "FlashInferB12xNvFp4LinearKernel",
    "FlashInferTrtllmNvFp4LinearKernel",
    "FlashInferCudnnNvFp4LinearKernel",
    "CutlassNvFp4LinearKernel",
    "FbgemmNvFp4LinearKernel",
    "B12xNvFp4LinearKernel",
    "TorchNvFp4LinearKernel",
)
"""vLLM's kernels that multiply FP4 by FP4."""
WEIGHT_ONLY = (
    "WeightOnlyNvFp4LinearKernel",
    "MarlinNvFp4LinearKernel",
    "HummingNvFp4LinearKernel",
    "B12xNvFp4W4A16LinearKernel",
    "FlashInferCuteDslNvFp4W4A16LinearKernel",
)
"""Kernels that leave the input in 16 bits."""
EMULATED = ("FakeQuantizedNvFp4LinearKernel", "EmulationNvFp4LinearKernel")
_EXPERTS = {
    "Nvfp4QuantizationEmulationTritonExperts": "w4a4_emulation",
    "MarlinExperts": "w4a16",
    "BatchedMarlinExperts": "w4a16",
    "BatchedHummingGroupedExperts": "w4a16",
    "HummingGroupedExperts": "w4a16",
    "HummingIndexedExperts": "w4a16",
    "CutlassExpertsFp4": "native",
    "FlashInferExperts": "native",
    "FlashInferB12xExperts": "native",
    "FlashInferCuteDSLExperts": "native",
    "FlashInferCuteDSLBatchedExperts": "native",
    "TrtLlmNvFp4ExpertsModular": "native",
    "TrtLlmNvFp4ExpertsMonolithic": "native",
}
"""vLLM's kernels of NVFP4 experts; some of those with another name multiply FP4 by FP4 or not, as a variable says."""
_KERNELS = dict.fromkeys(NATIVE, "native") | dict.fromkeys(WEIGHT_ONLY, "w4a16") | dict.fromkeys(EMULATED, "w4a4_emulation")


class Server:
    """What the harness may ask for."""

    def __init__(self) -> None:
        self._names = itertools.count()

    def probe(self) -> dict[str, Any]:
        """What vLLM's own kernel table offers on this machine: by choice of `engine.kernels`, a kernel class or None."""
        from vllm.model_executor.kernels import linear
        from vllm.platforms import current_platform

        table = [k for k in linear._POSSIBLE_NVFP4_KERNELS.get(current_platform._enum, []) if k.is_supported()[0]]
        found: dict[str, str | None] = dict.fromkeys(("native", "w4a4_emulation", "w4a16"))
        for kernel in reversed(table):
            choice = _KERNELS.get(kernel.__name__)
            if choice is not None:
                found[choice] = kernel.__name__
        if current_platform.is_cpu() or current_platform.is_cuda():
            found["w4a4_emulation"] = "FakeQuantizedNvFp4LinearKernel"
        if current_platform.is_cpu():
            found["w4a16"] = "WeightOnlyNvFp4LinearKernel"
        return {"platform": current_platform.device_type, "kernels": found}

    def architecture(self, names: list[str]) -> dict[str, Any]:
        """Whether vLLM has one of these model classes, and the package that its code lacks here, None where it lacks none."""
        from vllm.model_executor.models.registry import ModelRegistry

        known = [ModelRegistry.models[name] for name in names if name in ModelRegistry.models]
        if not known:
            return {"is_known": False, "missing": None}
        try:
            known[0].load_model_cls()
        except ImportError as error:
            return {"is_known": True, "missing": error.name or str(error)}
        return {"is_known": True, "missing": None}

    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        """Load the checkpoint; what computes its modules, by class."""
        from qad.vllm_plugin import register

        register()  # vLLM calls it again through the entry point, where the package is installed
        import vllm

        self.llm = vllm.LLM(
            model=folder,
            tokenizer=folder,
            dtype="bfloat16",
            generation_config="vllm",
            disable_log_stats=True,
            **options,
        )
        found = self.llm.apply_model(read_kernels)
        if any(other != found[0] for other in found):
            raise RuntimeError(f"the workers of one model compute with different kernels: {found}")
        return {"kernels": found[0], "vllm": vllm.__version__, "settings": self._settings()}

    def _settings(self) -> dict[str, Any]:
        """What vLLM made of the options that it may change by itself."""
        config = self.llm.llm_engine.vllm_config
        names = ("enable_prefix_caching", "mamba_cache_dtype", "mamba_ssm_cache_dtype")
        found = {name: getattr(config.cache_config, name) for name in names}
        names = ("enable_chunked_prefill", "max_num_batched_tokens", "max_num_seqs")
        return found | {name: getattr(config.scheduler_config, name) for name in names}

    def answer(
        self, prompts: list[list[int]], media: dict[str, Any], requests: list[dict[str, Any]], eos_ids: list[int]
    ) -> Iterator[dict[str, Any]]:
        """What came of each request, as it finishes: {"place", "seconds", and "token_ids" or "logprob" and "is_greedy"}.

        A request has a place of the asker's, the number of its prompt, and a continuation or all sampling parameters. media: of prompts
        with images, by number. seconds: since vLLM got it. As many are in vLLM as run at once; the next one enters when one has finished.
        """
        engine = self.llm.llm_engine
        waiting = iter(requests)
        entered: dict[str, tuple[dict[str, Any], float]] = {}
        try:
            while True:
                room = engine.vllm_config.scheduler_config.max_num_seqs - len(entered)
                for request in itertools.islice(waiting, room):
                    name = str(next(self._names))
                    number, more = request["prompt"], request.get("continuation") or []
                    prompt = self._prompt(prompts[number], media.get(str(number)), more)
                    engine.add_request(name, prompt, settings_of(request, eos_ids))
                    entered[name] = (request, time.perf_counter())
                if not entered:
                    return
                for output in engine.step():
                    if output.finished:
                        request, began = entered.pop(output.request_id)
                        found = read_output(output, len(prompts[request["prompt"]]), request.get("continuation"))
                        yield {"place": request["place"], "seconds": time.perf_counter() - began, **found}
        finally:
            if entered:
                engine.abort_request(list(entered))

    def _prompt(self, token_ids: list[int], media: dict[str, Any] | None, more: list[int]) -> Any:
        """A prompt and what follows it, as vLLM takes it: with images, expanded by vLLM's own code to the same tokens, or an error."""
        if media is None:
            return {"type": "token", "prompt_token_ids": token_ids + more}
        from harness.images import Image

        opened = [Image("", Path(path)).open() for path in media["images"]]
        asked = {"prompt_token_ids": media["unexpanded_ids"] + more, "multi_modal_data": {"image": opened}}
        (prompt,) = self.llm.llm_engine.renderer.render_cmpl([asked])
        require_same(prompt["prompt_token_ids"], token_ids + more, len(opened))
        return prompt

    def modules(self) -> dict[str, Any]:
        """The quantized linear modules: kernel class, and the tensor scales in use."""
        return {"modules": self.llm.apply_model(describe_modules)[0]}

    def served_names(self, names: list[str]) -> dict[str, Any]:
        """What vLLM calls modules that the files of the checkpoint call `names`, in their order."""
        mapper = getattr(self.llm.apply_model(lambda model: type(model))[0], "hf_to_vllm_mapper", None)
        return {"names": names if mapper is None else mapper.apply_list(names)}

    def caches(self) -> dict[str, Any]:
        """The scales of keys and values in use, by attention layer."""
        return {"caches": self.llm.apply_model(describe_caches)[0]}

    def module_outputs(self, inputs: str, outputs: str) -> dict[str, Any]:
        """Feed each named module its (tokens, width) input from a safetensors file; write the outputs to another."""
        from safetensors.torch import load_file, save_file

        model = self.llm.apply_model(lambda model: model)[0]
        found = {}
        for name, x in load_file(inputs).items():
            module = model.get_submodule(name)
            x = x.to(module_device(module))
            found[name] = module.quant_method.apply(module, x, module.bias).cpu().contiguous()
        save_file(found, outputs)
        return {}

    def hidden(self, sequences: list[list[int]], path: str, media: dict[str, Any] | None = None) -> dict[str, Any]:
        """Final hidden states (tokens, width) of each sequence, one at a time, into a safetensors file under "0", "1", ...

        media: of sequences with images, by number.
        """
        from safetensors.torch import save_file
        from vllm import SamplingParams

        engine, model = self.llm.llm_engine, self.llm.apply_model(lambda model: model)[0]
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, arguments, output: seen.append(output.detach()))
        found = {}
        try:
            for index, token_ids in enumerate(sequences):
                seen.clear()
                settings = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
                engine.add_request(f"hidden-{index}", self._prompt(token_ids, (media or {}).get(str(index)), []), settings)
                while engine.has_unfinished_requests():
                    engine.step()
                found[str(index)] = seen[0][: len(token_ids)].cpu().clone()
        finally:
            handle.remove()
        save_file(found, path)
        return {}


def require_same(found: list[int], expected: list[int], n_images: int) -> None:
    """ValueError unless vLLM expanded the images of a prompt to the tokens that the harness rendered."""
    if list(found) == expected:
        return
    first = next(
        (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), min(len(found), len(expected))
    )
    raise ValueError(
        f"vLLM expands a prompt with {n_images} images to {len(found)} tokens, where the model's own processor gave {len(expected)}; they "
        f"differ from token {first} on. Nothing was asked: an answer to another prompt would be no answer"
    )


def settings_of(request: dict[str, Any], eos_ids: list[int]) -> Any:
    """Complete sampling parameters of a request; a likelihood generates one token, which nobody reads.

    Only the given tokens end a text: vLLM would add those of the repository's generation_config.json, even when it is told not to
    take anything else from it.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if request.get("continuation") is not None:
        return SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
    return SamplingParams(
        n=1,
        max_tokens=request["max_tokens"],
        temperature=request["temperature"],
        top_p=request["top_p"],
        top_k=request["top_k"],
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=request["seed"],
        stop=request["until"],
        ignore_eos=True,
        stop_token_ids=eos_ids,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def read_output(output: Any, n_prompt: int, continuation: list[int] | None) -> dict[str, Any]:
    """The tokens of a response; or the continuation's summed log probability, None where it is not finite, and its greediness."""
    if continuation is None:
        return {"token_ids": list(output.outputs[0].token_ids)}
    chosen = [output.prompt_logprobs[n_prompt + i][token] for i, token in enumerate(continuation)]
    total = math.fsum(token.logprob for token in chosen)
    return {"logprob": total if math.isfinite(total) else None, "is_greedy": all(token.rank == 1 for token in chosen)}


def kernel_of(module: Any) -> Any:
    """The kernel object of a linear module of vLLM: both layouts keep it in another place; None if it is not quantized."""
    method = getattr(module, "quant_method", None)
    scheme = getattr(module, "scheme", None)
    return getattr(method, "kernel", None) or getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None)


def experts_kernel_of(module: Any) -> str | None:
    """What computes a module that holds the routed experts of a layer of vLLM; None for any other module."""
    method: Any = getattr(module, "quant_method", None)
    if not hasattr(method, "moe_kernel"):
        return None
    experts = getattr(method.moe_kernel, "fused_experts", None)
    method = getattr(method, "old_quant_method", method)  # vLLM wraps some after loading
    format, name = type(method).__name__, type(method if experts is None else experts).__name__
    if format.startswith("UnquantizedFusedMoE"):
        return "bf16"
    if "nvfp4" not in format.lower():
        return name
    return "w4a16" if getattr(method, "use_a16", False) else _EXPERTS.get(name, name)


def read_kernels(model: Any) -> dict[str, str]:
    """What computes each class of module of a loaded vLLM model.

    linear: of the NVFP4 layers, or "bf16" where there is none; several are joined by "+"; a class that is not known keeps its
    own name. linear_fp8: of FP8 layers, where there are any. experts: likewise of the quantized ones, where a model has experts.
    kv_cache: "bf16" or "fp8".

    Raises:
        RuntimeError: a layer of the part that sees is quantized, which is to stay in BF16.
    """
    linear: set[str] = set()
    fp8: set[str] = set()
    experts: set[str] = set()
    caches: set[str] = set()
    sees = _sees(model)
    for place, module in model.named_modules():
        kernel = kernel_of(module)
        if kernel is not None:
            if sees(place):
                raise RuntimeError(
                    f"vLLM quantizes {place}, which is no part of the language model; the checkpoint's config lists it wrongly"
                )
            name = type(kernel).__name__
            (fp8 if "NvFp4" not in name else linear).add(_KERNELS.get(name, name))
        experts |= {found for found in (experts_kernel_of(module),) if found is not None}
        cache = getattr(module, "kv_cache_dtype", None)
        if isinstance(cache, str):
            caches.add("fp8" if cache.startswith("fp8") else "bf16")
    found = {"linear": "+".join(sorted(linear)) or "bf16", "kv_cache": "+".join(sorted(caches)) or "bf16"}
    more = {"linear_fp8": fp8, "experts": (experts - {"bf16"}) or experts}
    return found | {part: "+".join(sorted(names)) for part, names in more.items() if names}


def _sees(model: Any) -> Callable[[str], bool]:
    """Whether the module of a name is neither in the language model nor its output head; never in a model of text alone."""
    if not hasattr(model, "get_language_model"):
        return lambda name: False
    language = {id(module) for module in model.get_language_model().modules()}
    reads = {name for name, module in model.named_modules() if id(module) in language}
    return lambda name: name not in reads and not name.endswith("lm_head")


def describe_modules(model: Any) -> dict[str, dict[str, Any]]:
    """By name of each NVFP4 linear module: its kernel class and the tensor scales in use."""
    found = {}
    for name, module in model.named_modules():
        kernel = kernel_of(module)
        if kernel is not None and "NvFp4" in type(kernel).__name__:
            scales = {
                key: float(getattr(module, key))
                for key in ("weight_global_scale", "input_global_scale")
                if hasattr(module, key)
            }
            found[name] = {"kernel": type(kernel).__name__, **scales}
    return found


def describe_caches(model: Any) -> dict[str, list[float]]:
    """k_scale and v_scale by attention layer of a loaded vLLM model."""
    return {
        name.removesuffix(".attn"): [float(module._k_scale_float), float(module._v_scale_float)]
        for name, module in model.named_modules()
        if hasattr(module, "_k_scale_float")
    }


def module_device(module: Any) -> Any:
    """Where a module of vLLM computes."""
    return next((parameter.device for parameter in module.parameters()), "cpu")


if __name__ == "__main__":
    from harness.engines.worker import serve

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    serve(Server())
    os._exit(0)  # vLLM's own end takes seconds and frees nothing that the kernel does not
