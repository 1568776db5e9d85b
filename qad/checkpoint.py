"""The packed checkpoint: written in either layout, loaded back into a transformers model.

Written: safetensors in shards, the configuration, and the companion files of the original model (tokenizer, chat template,
generation configuration, processor). One shard is in memory at a time beside the model; the folder appears whole, under its
name, or not at all. Everything that is not quantized is stored as the model holds it; a tied output head is not stored twice.
Names and configurations of the layouts are in `qad.layouts`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qad import kv_cache
from qad.building import build
from qad.errors import CheckpointError, SplitError
from qad.experts import EXPERT, expert_layers
from qad.kernels import backend
from qad.layouts import (
    CACHE_NAMES,
    NAMES,
    Layout,
    QuantizedLayer,
    Scheme,
    cache_tensors,
    configs,
    layer_tensors,
)
from qad.modules import QuantizedLinear, install, quantized_linears
from qad.packed import decode, layer_names, read_cache, read_config, read_layer, scheme_of
from qad.recipe import Format, FusedGroup, Targets, groups_of
from qad.stored_names import loaded_layers, stored_layers, stored_tensors
from qad.tensor_files import INDEX, SHARD_BYTES, TensorFiles, sizes_of, write_json, write_shards

_KEYS = ".k_proj"
"""The layer of an attention module by which it is found under its other name."""
RECORD = "quantization_record.json"
"""How a checkpoint was made: recipe, scale rule, calibration, seed, versions."""
_NOT_COPIED = (
    "SHA256SUMS",
    ".safetensors",
    INDEX,
    ".bin",
    ".gguf",
    ".pt",
    ".pth",
    ".pkl",
    ".jsonl",
    "hf_quant_config.json",
    RECORD,
)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: the model, and what computes its modules.

    kernels: by class of module. "linear": "bf16", "w4a4_emulation", "w4a16" or "w8a8_emulation"; "linear_fp8" beside it where
        a recipe is mixed; "experts" beside it where the model has some, and then "linear" is never of FP8 layers; "kv_cache": "bf16" or "fp8_emulation".
    backend: which code quantizes activations, "numba", "triton" or "torch"; None where none are. All of them are bit-equal.
    merged_inputs: projections of layers of experts whose files hold several input scales, as other tools write them. Computed is with
        the largest, as vLLM 0.32 does (`fused_moe/oracle/nvfp4.py`), which may not be what the tool meant; verification names them.
    """

    model: Any
    kernels: dict[str, str]
    backend: str | None
    merged_inputs: tuple[str, ...] = ()


def write_checkpoint(
    folder: Path,
    model: Any,
    *,
    targets: Targets | None,
    companions: Path,
    record: dict[str, Any],
    layout: Layout = "modelopt",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` to the empty or missing `folder`.

    Args:
        targets: what was quantized; None writes the model as it is.
        companions: the folder of the original model.
        record: how it was made; kept beside the weights and in the header of every shard.
    Raises:
        CheckpointError: `folder` holds files already.
    """
    with appearing(folder) as partial:
        names = stored_layers(model)
        tensors = dict(_stored_tensors(model, layout, names))
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        if targets is not None:
            w4a4 = any(module.input_quantizer is not None for module in quantized_linears(model).values())
            config["quantization_config"], hf_quant_config = configs(layout, _as_stored(targets, names), activations=w4a4)
            if hf_quant_config is not None:
                write_json(partial / "hf_quant_config.json", hf_quant_config)
            write_json(partial / RECORD, record)
        copy_companions(companions, partial)
        write_json(partial / "config.json", _with_code(config, partial))
        metadata = {"qad": json.dumps(record, sort_keys=True)}
        write_shards(partial, sizes_of(tensors.items()), tensors.__getitem__, metadata=metadata, shard_bytes=shard_bytes)


def load_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> Loaded:
    """Load a BF16 or packed folder of either layout onto the CPU, in BF16 and in evaluation mode.

    Args:
        trust_remote_code: run the Python files of the folder where its configuration names them.
    Raises:
        CheckpointError: not a folder with config.json and safetensors, another quantization, tensors that are missing,
            left over, of a wrong type or shape, not finite, unequal scales in a fused group, a group in several formats, a
            configuration that disagrees.
    """
    config = read_config(folder)
    files = TensorFiles(folder)
    scheme = scheme_of(folder, config)
    config.pop("quantization_config", None)
    if scheme is None:
        plain = {name: files.get(name) for name in files.where}
        model = build(folder, config, plain, trust_remote_code)
        experts = {"experts": "bf16"} if expert_layers(name for name, _ in model.named_modules()) else {}
        return Loaded(model, {"linear": "bf16", **experts, "kv_cache": "bf16"}, None)
    names = layer_names(files, scheme.layout)
    cache = read_cache(files, scheme)
    consumed = {name + suffix for name in names for suffix in NAMES[scheme.layout].all}
    consumed |= {name + suffix for name in cache for suffix in CACHE_NAMES[scheme.layout]}
    tensors = {name: files.get(name) for name in files.where if name not in consumed}
    stored: dict[str, tuple[Format, Tensor, Tensor | None]] = {}
    for name in names:
        layer = read_layer(files, scheme, name)
        _require_as_configured(folder, scheme, name, layer)
        tensors[f"{name}.weight"] = decode(layer)
        stored[name] = layer.format, layer.encoding.tensor_scale, layer.input_scale
    model = build(folder, config, tensors, trust_remote_code)
    linears = tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    own, known = loaded_layers(model, stored), set(linears)
    strangers = sorted(name for name in stored if own[name] not in known)
    if strangers:
        raise CheckpointError(f"{folder}: {strangers[0]} is quantized but is no linear layer of {type(model).__name__}")
    layers = {own[name]: found for name, found in stored.items()}
    in_files = stored_layers(model)
    for name in sorted(set(linears) - set(layers)):
        if scheme.group_of(in_files.get(name, name), name) is not None:
            raise CheckpointError(
                f"{folder}: its config says that {name} is quantized but its tensor is not; the config disagrees with the tensors: "
                "export it again, or list the layer among those left alone"
            )
    formats: dict[str, Format] = {name: format for name, (format, _, _) in layers.items()}
    merged = []
    for sharing in _by_input(_whole_groups(folder, formats, linears)):
        for group in sharing:
            _require_equal(folder, group.name, "tensor scales", [layers[name][1] for name in group.members])
        found_scales = [layers[name][2] for group in sharing for name in group.members]
        input_scales = [scale for scale in found_scales if scale is not None]
        if 0 < len(input_scales) < len(found_scales):
            raise CheckpointError(
                f"{folder}: {sharing[0].input_name}: some of its members have an input scale and some have none; serving engines merge them"
            )
        if sharing[0].experts is None:
            _require_equal(folder, sharing[0].name, "input scales", input_scales)
        elif len({float(scale) for scale in input_scales}) > 1:
            merged.append(sharing[0].input_name)
        input_scale = max(input_scales, key=float, default=None)
        for group in sharing:
            install(model, group, {name: layers[name][1] for name in group.members}, input_scale)
    if cache:
        attention = {
            name: found.removesuffix(_KEYS) for name, found in loaded_layers(model, (f"{n}{_KEYS}" for n in cache)).items()
        }
        kv_cache.install(model, {attention[f"{name}{_KEYS}"]: scales for name, scales in cache.items()})
    found = [(name, (formats[name], layers[name][2] is not None)) for name in layers]
    has_experts = bool(expert_layers(linears))
    others = {kind for name, kind in found if not EXPERT.match(name)}
    kernels = kernels_of(others, has_fp8_cache=bool(cache), is_fp8_apart=has_experts)
    if has_experts:
        kernels["experts"] = kernels_of({kind for name, kind in found if EXPERT.match(name)}, has_fp8_cache=False)["linear"]
    is_w4a4 = any("w4a4" in kernel for kernel in kernels.values())
    return Loaded(model, kernels, backend(torch.device("cpu")) if is_w4a4 else None, tuple(merged))


def kernels_of(formats: set[tuple[Format, bool]], *, has_fp8_cache: bool, is_fp8_apart: bool = False) -> dict[str, str]:
    """What computes each class of module in this library, given the formats and whether inputs are quantized; joined by "+".

    is_fp8_apart: FP8 layers are "linear_fp8" and not "linear" even where no layer is NVFP4.
    """
    names = {
        ("nvfp4", True): "w4a4_emulation",
        ("nvfp4", False): "w4a16",
        ("fp8", True): "w8a8_emulation",
        ("fp8", False): "w8a16",
    }
    found = {
        format: "+".join(sorted(names[key] for key in formats if key[0] == format))
        for format in sorted({key[0] for key in formats})
    }
    is_apart = is_fp8_apart or "nvfp4" in found
    return {
        "linear": found.get("nvfp4" if is_apart else "fp8", "bf16"),
        **({"linear_fp8": found["fp8"]} if is_apart and "fp8" in found else {}),
        "kv_cache": "fp8_emulation" if has_fp8_cache else "bf16",
    }


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill beside `folder`; it becomes `folder` when the block ends without an error, and vanishes otherwise.

    What a process that was killed left of an earlier attempt is removed. Raises CheckpointError where that cannot be.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already and not empty; choose another folder or remove it")
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.parent.glob(f".partial-{folder.name}-*"):
            if not Path(f"/proc/{abandoned.name.rpartition('-')[2]}").exists():
                shutil.rmtree(abandoned, ignore_errors=True)
        partial.mkdir()
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder}: cannot be made: {error.strerror} ({error.filename}); choose another folder"
        ) from error
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights and configuration, and is not there yet."""
    for path in sorted(source.iterdir()):
        is_companion = path.is_file() and not path.name.endswith(_NOT_COPIED) and not path.name.startswith(".")
        if is_companion and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _with_code(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config`, without an `auto_map` to Python files that are not in `folder`: nobody could follow it."""
    classes = [str(name) for name in (config.get("auto_map") or {}).values()]
    files = {f"{name.partition('.')[0]}.py" for name in classes if "--" not in name}
    if all((folder / file).is_file() for file in files):
        return config
    return {key: value for key, value in config.items() if key != "auto_map"}


def _stored_tensors(model: Any, layout: Layout, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in files. names: of modules, in the model and in files."""
    quantized = quantized_linears(model)
    storages: set[int] = set()
    for stored, (name, tensor) in stored_tensors(model, model.state_dict()).items():
        module_name, _, leaf = (name or "").rpartition(".")
        if leaf == "weight" and module_name in quantized:
            yield from layer_tensors(layout, names[module_name], _layer(module_name, quantized[module_name])).items()
        elif tensor.data_ptr() not in storages:
            storages.add(tensor.data_ptr())
            yield stored, tensor
    for name, cache in kv_cache.kv_cache_quantizers(model).items():
        yield from cache_tensors(layout, _attention(name, names), cache.k_scale, cache.v_scale).items()


def _as_stored(targets: Targets, names: Mapping[str, str]) -> Targets:
    groups = tuple(
        FusedGroup(group.name, tuple(names[member] for member in group.members), group.format) for group in targets.groups
    )
    excluded, never_linear = (
        tuple(names.get(name, name) for name in each) for each in (targets.excluded, targets.never_linear)
    )
    return Targets(groups, excluded, tuple(_attention(name, names) for name in targets.kv_cache), never_linear)


def _attention(name: str, names: Mapping[str, str]) -> str:
    return names[name + _KEYS].removesuffix(_KEYS)


def _layer(name: str, module: QuantizedLinear) -> QuantizedLayer:
    if module.encoding is None:
        raise ValueError(f"{name}: holds no encoding; only a model that was quantized in memory can be written")
    quantizer = module.input_quantizer
    return QuantizedLayer(module.encoding, None if quantizer is None else quantizer.tensor_scale)


def _require_as_configured(folder: Path, scheme: Scheme, name: str, layer: QuantizedLayer) -> None:
    expected = scheme.group_of(name)
    found = (layer.format, layer.input_scale is not None)
    if expected != found:
        said = (
            "is left alone" if expected is None else f"is {expected[0]} {'with' if expected[1] else 'without'} an input scale"
        )
        raise CheckpointError(
            f"{folder}: its config says that {name} {said} but its tensors are {found[0]} {'with' if found[1] else 'without'} "
            "one; the config disagrees with the tensors: export it again"
        )


def _whole_groups(folder: Path, formats: dict[str, Format], linears: tuple[str, ...]) -> tuple[FusedGroup, ...]:
    try:
        return groups_of(formats, linears)
    except SplitError as error:
        raise CheckpointError(
            f"{folder}: {error.where}: the checkpoint splits {error.found}; engines serve them as one: export it again with all of them in "
            "one format, or all in BF16; harness verify lists every such problem"
        ) from error


def _by_input(groups: tuple[FusedGroup, ...]) -> list[list[FusedGroup]]:
    """Groups together that share one input scale when served."""
    found: dict[str, list[FusedGroup]] = {}
    for group in groups:
        found.setdefault(group.input_name, []).append(group)
    return list(found.values())


def _require_equal(folder: Path, group: str, what: str, scales: list[Tensor]) -> None:
    values = {float(scale) for scale in scales}
    if len(values) > 1:
        raise CheckpointError(
            f"{folder}: {group}: its members have different {what} {sorted(values)}; serving engines take the largest and "
            "decode the others wrongly; export the checkpoint again with one scale a fused group"
        )
