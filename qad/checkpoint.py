"""The packed checkpoint: written in ModelOpt's layout, loaded back into a transformers model.

The only place that knows foreign tensor names. Layout of a quantized linear layer `X`:
    X.weight          uint8 (out, in/2), two codes a byte, low nibble first
    X.weight_scale    float8_e4m3fn (out, in/16), block scales, row-major
    X.weight_scale_2  float32 (), the tensor scale (decodes)
    X.input_scale     float32 (), the tensor scale of the input (decodes); absent in W4A16
with `hf_quant_config.json` and `quantization_config` in `config.json`. Source: ModelOpt 0.47, `export/unified_export_hf.py`.
Everything else is stored as the model holds it. A tied output head is not stored twice.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qad import nvfp4
from qad.errors import CheckpointError
from qad.kernels import backend
from qad.modules import install, quantized_linears
from qad.nvfp4 import BLOCK_SIZE, Packed
from qad.recipe import Targets, groups_of

WEIGHTS = "model.safetensors"
_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: the model, and what computes its modules.

    kernels: by class of module ("linear", "kv_cache"): "bf16", "w4a4_emulation" or "w4a16".
    backend: which code quantizes activations, "numba" or "torch"; None where none are. All of them are bit-equal.
    """

    model: Any
    kernels: dict[str, str]
    backend: str | None


def write_checkpoint(folder: Path, model: Any, *, targets: Targets | None, companions: Path, metadata: dict[str, str]) -> None:
    """Write `model` to the empty or missing `folder`: weights, config, and the companion files of the original.

    Args:
        targets: what was quantized; None writes the model as it is.
        companions: the folder of the original model; its tokenizer, chat template and the like are copied.
        metadata: strings kept in the safetensors header.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(model)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if targets is not None:
        w4a4 = any(module.input_quantizer is not None for module in quantized_linears(model).values())
        config["quantization_config"] = _quantization_config(targets, w4a4)
        _write_json(folder / "hf_quant_config.json", _hf_quant_config(targets, w4a4))
    _write_json(folder / "config.json", config)
    for path in sorted(companions.iterdir()):
        if path.is_file() and not path.name.endswith(_NOT_COPIED) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"} | metadata)


def load_checkpoint(folder: Path) -> Loaded:
    """Load a BF16 or packed NVFP4 folder onto the CPU, in BF16 and in evaluation mode.

    Raises:
        CheckpointError: not a folder with config.json and safetensors, another quantization, tensors that are missing,
            left over, of a wrong type or shape, not finite, or unequal scales in a fused group.
    """
    config = _read_config(folder)
    tensors = read_tensors(folder)
    quantization = config.pop("quantization_config", None)
    if quantization is None:
        return Loaded(_build(folder, config, tensors), {"linear": "bf16", "kv_cache": "bf16"}, None)
    _require_supported(folder, quantization)
    encodings = _take_encodings(folder, tensors)
    input_scales = {name: tensors.pop(f"{name}.input_scale", None) for name in encodings}
    for name, encoding in encodings.items():
        tensors[f"{name}.weight"] = nvfp4.dequantize(encoding)
    model = _build(folder, config, tensors)
    with_input = {scale is not None for scale in input_scales.values()}
    if len(with_input) > 1:
        raise CheckpointError(
            f"{folder}: some quantized layers have an input_scale and some have none; it must be one or the other"
        )
    linears = tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    strangers = sorted(set(encodings) - set(linears))
    if strangers:
        raise CheckpointError(f"{folder}: {strangers[0]} is quantized but is no linear layer of {type(model).__name__}")
    for group in groups_of(list(encodings), linears):
        weight_scales = {name: encodings[name].tensor_scale for name in group.members}
        scales = [input_scales[name] for name in group.members]
        _require_equal(folder, group.name, "weight_scale_2", list(weight_scales.values()))
        _require_equal(folder, group.name, "input_scale", [scale for scale in scales if scale is not None])
        install(model, group, weight_scales, scales[0])
    w4a4 = True in with_input
    if w4a4 != (quantization["quant_algo"] == "NVFP4"):
        raise CheckpointError(
            f"{folder}: quant_algo is {quantization['quant_algo']} (W4A{4 if quantization['quant_algo'] == 'NVFP4' else 16}) but its "
            f"layers {'have' if w4a4 else 'lack'} an input_scale; the config disagrees with the tensors: export it again"
        )
    kernels = {"linear": "w4a4_emulation" if w4a4 else "w4a16", "kv_cache": "bf16"}
    return Loaded(model, kernels, backend(torch.device("cpu")) if w4a4 else None)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files in `folder`, by name (CheckpointError where there is none or one is cut short)."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no *.safetensors file; pickled weights are never read")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    tensors[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); is it cut short? copy it again") from error
    return tensors


def _tensors(model: Any) -> dict[str, Tensor]:
    quantized = quantized_linears(model)
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        module_name, _, leaf = name.rpartition(".")
        if leaf == "weight" and module_name in quantized:
            tensors |= _quantized_tensors(module_name, quantized[module_name])
        elif tensor.data_ptr() not in storages:
            storages.add(tensor.data_ptr())
            tensors[name] = tensor.detach().contiguous()
    return tensors


def _quantized_tensors(name: str, module: Any) -> dict[str, Tensor]:
    encoding = module.encoding
    if encoding is None:
        raise ValueError(f"{name}: holds no encoding; only a model that was quantized in memory can be written")
    tensors = {
        f"{name}.weight": encoding.packed.contiguous(),
        f"{name}.weight_scale": encoding.block_scale.contiguous(),
        f"{name}.weight_scale_2": encoding.tensor_scale.clone(),
    }
    if module.input_quantizer is not None:
        tensors[f"{name}.input_scale"] = module.input_quantizer.tensor_scale.clone()
    return tensors


def _hf_quant_config(targets: Targets, w4a4: bool) -> dict[str, Any]:
    return {
        "producer": {"name": "qad-harness", "version": "1"},
        "quantization": {
            "quant_algo": "NVFP4" if w4a4 else "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK_SIZE,
            "exclude_modules": list(targets.excluded),
        },
    }


def _quantization_config(targets: Targets, w4a4: bool) -> dict[str, Any]:
    scheme = {"dynamic": False, "group_size": BLOCK_SIZE, "num_bits": 4, "type": "float"}
    group: dict[str, Any] = {"weights": scheme, "targets": ["Linear"]}
    if w4a4:
        group["input_activations"] = scheme
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4" if w4a4 else "W4A16_NVFP4",
        "producer": {"name": "qad-harness", "version": "1"},
        "ignore": list(targets.excluded),
        "config_groups": {"group_0": group},
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds no config.json; a checkpoint is a folder with config.json and *.safetensors")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if config.get("auto_map"):
        raise CheckpointError(f"{path}: asks for remote code (auto_map), which is not available in this version")
    if "quantization_config" not in config and (folder / "hf_quant_config.json").is_file():
        config["quantization_config"] = {"quant_method": "modelopt"} | json.loads(
            (folder / "hf_quant_config.json").read_text()
        )["quantization"]
    return config


def _require_supported(folder: Path, quantization: dict[str, Any]) -> None:
    method, algorithm = quantization.get("quant_method"), quantization.get("quant_algo")
    if method != "modelopt" or algorithm not in ("NVFP4", "W4A16_NVFP4"):
        raise CheckpointError(
            f"{folder}: quantized with quant_method {method!r}, quant_algo {algorithm!r}; this version reads ModelOpt's "
            "layout with quant_algo NVFP4 or W4A16_NVFP4"
        )
    kv_cache = quantization.get("kv_cache_quant_algo") or quantization.get("kv_cache_scheme")
    if kv_cache:
        raise CheckpointError(f"{folder}: asks for a quantized KV cache ({kv_cache}), which is not available in this version")


def _take_encodings(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Packed]:
    encodings = {}
    for name in [key.removesuffix(".weight") for key, tensor in tensors.items() if key.endswith(".weight")]:
        packed = tensors[f"{name}.weight"]
        if packed.dtype is not torch.uint8:
            continue
        try:
            scale, tensor_scale = tensors.pop(f"{name}.weight_scale"), tensors.pop(f"{name}.weight_scale_2")
        except KeyError as error:
            raise CheckpointError(f"{folder}: {name}.weight is packed but {error.args[0]} is missing") from error
        expected = (packed.shape[0], packed.shape[1] * 2 // BLOCK_SIZE)
        if scale.dtype is not torch.float8_e4m3fn or tuple(scale.shape) != expected:
            raise CheckpointError(
                f"{folder}: {name}.weight_scale is {scale.dtype} {tuple(scale.shape)}; NVFP4 needs float8_e4m3fn {expected}"
            )
        if tensor_scale.dtype is not torch.float32 or tensor_scale.numel() != 1 or not 0 < float(tensor_scale) < float("inf"):
            raise CheckpointError(f"{folder}: {name}.weight_scale_2 must be one positive float32, found {tensor_scale}")
        nvfp4.require_finite(scale.float(), f"{folder}: {name}.weight_scale")
        encodings[name] = Packed(packed, scale, tensor_scale.reshape(()))
    if not encodings:
        raise CheckpointError(f"{folder}: its config says NVFP4 but no tensor is packed")
    return encodings


def _require_equal(folder: Path, group: str, what: str, scales: list[Tensor]) -> None:
    values = {float(scale) for scale in scales}
    if len(values) > 1:
        raise CheckpointError(
            f"{folder}: {group}: its members have different {what} {sorted(values)}; serving engines take the largest and "
            "decode the others wrongly; export the checkpoint again with one scale a fused group"
        )
    if values and not 0 < values.pop() < float("inf"):
        raise CheckpointError(f"{folder}: {group}: {what} must be positive and finite")


def _build(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            nvfp4.require_finite(tensor.float(), f"{folder}: {name}")
    try:
        model_config = AutoConfig.for_model(**config)
        architecture = AutoModelForCausalLM._model_mapping[type(model_config)]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: model_type {config.get('model_type')!r} is no causal language model that transformers knows natively"
        ) from error
    model, report = architecture.from_pretrained(
        None, config=model_config, state_dict=tensors, dtype=torch.bfloat16, output_loading_info=True
    )
    problems = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(key)}
    if problems:
        raise CheckpointError(f"{folder}: its tensors do not fit {architecture.__name__}: {problems}")
    model.generation_config = GenerationConfig()
    _require_plain_head(folder, model.eval())
    return model


@torch.no_grad()
def _require_plain_head(folder: Path, model: Any) -> None:
    """Losses and diagnostics apply the output head to hidden states themselves: refuse a model that does more than that."""
    ids = torch.arange(8)[None] % model.config.vocab_size
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.equal(model(input_ids=ids, use_cache=False).logits, hidden @ model.get_output_embeddings().weight.T):
        raise CheckpointError(
            f"{folder}: the logits of {type(model).__name__} are not lm_head(hidden): they are scaled, capped or biased; "
            "such a model is not available in this version"
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
