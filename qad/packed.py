"""Packed layers as they lie in the files of a checkpoint: configuration, names, codes, scales; one layer at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qad import fp8, nvfp4
from qad.errors import CheckpointError, NonFiniteError
from qad.fp8 import Fp8Packed
from qad.layouts import CACHE_NAMES, NAMES, Layout, QuantizedLayer, Scheme, as_scale, read_scheme
from qad.nvfp4 import BLOCK_SIZE, Packed
from qad.tensor_files import TensorFiles


def read_encodings(folder: Path) -> dict[str, Packed]:
    """The codes and scales of the NVFP4 layers of a checkpoint by name (CheckpointError: see `load_checkpoint`)."""
    files, scheme = TensorFiles(folder), scheme_of(folder, read_config(folder))
    if scheme is None:
        raise CheckpointError(f"{folder}: is not quantized, so it has no codes to start from")
    encodings = {name: read_layer(files, scheme, name).encoding for name in layer_names(files, scheme.layout)}
    return {name: encoding for name, encoding in encodings.items() if isinstance(encoding, Packed)}


def decode(layer: QuantizedLayer, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight of a layer (out, in)."""
    if isinstance(layer.encoding, Fp8Packed):
        return fp8.dequantize(layer.encoding, dtype)
    return nvfp4.dequantize(layer.encoding, dtype)


def layer_names(files: TensorFiles, layout: Layout) -> list[str]:
    """Names of the layers whose tensors are packed, in the order of the files."""
    names = NAMES[layout]
    found: dict[str, None] = {}
    for key in files.where:
        if key.endswith(names.codes) and files.dtype(key) == "U8":
            found[key.removesuffix(names.codes)] = None
        elif key.endswith(names.fp8_weight) and files.dtype(key) == "F8_E4M3":
            found[key.removesuffix(names.fp8_weight)] = None
    return list(found)


def read_layer(files: TensorFiles, scheme: Scheme, name: str) -> QuantizedLayer:
    """The codes and scales of one quantized layer; CheckpointError names the tensor that is missing or wrong."""
    names, where = NAMES[scheme.layout], str(files.folder)

    def stored(suffix: str) -> Tensor:
        if name + suffix not in files.where:
            raise CheckpointError(f"{where}: {name} is packed but {name}{suffix} is missing")
        return files.get(name + suffix)

    def scale(suffix: str, *, inverse: bool) -> Tensor:
        return as_scale(where, name + suffix, stored(suffix), inverse=inverse)

    if name + names.fp8_weight in files.where and files.dtype(name + names.fp8_weight) == "F8_E4M3":
        codes = stored(names.fp8_weight)
        if codes.ndim != 2:
            raise CheckpointError(
                f"{where}: {name}{names.fp8_weight} has shape {tuple(codes.shape)}; an FP8 layer has (out, in)"
            )
        require_e4m3_numbers(codes, f"{where}: {name}{names.fp8_weight}")
        has_input = name + names.fp8_input_scale in files.where
        input_scale = scale(names.fp8_input_scale, inverse=False) if has_input else None
        return QuantizedLayer(Fp8Packed(codes, scale(names.fp8_scale, inverse=False)), input_scale)
    packed, block_scale = stored(names.codes), stored(names.block_scale)
    if packed.ndim != 2 or packed.shape[1] * 2 % BLOCK_SIZE:
        raise CheckpointError(
            f"{where}: {name}{names.codes} has shape {tuple(packed.shape)}; NVFP4 needs (out, in/2) with in a multiple of {BLOCK_SIZE}"
        )
    expected = (packed.shape[0], packed.shape[1] * 2 // BLOCK_SIZE)
    if block_scale.dtype is not torch.float8_e4m3fn or tuple(block_scale.shape) != expected:
        raise CheckpointError(
            f"{where}: {name}{names.block_scale} is {block_scale.dtype} {tuple(block_scale.shape)}; "
            f"NVFP4 needs float8_e4m3fn {expected}"
        )
    require_e4m3_numbers(block_scale, f"{where}: {name}{names.block_scale}")
    tensor_scale = scale(names.tensor_scale, inverse=names.inverse)
    has_input = name + names.input_scale in files.where
    return QuantizedLayer(
        Packed(packed, block_scale, tensor_scale), scale(names.input_scale, inverse=names.inverse) if has_input else None
    )


def read_cache(files: TensorFiles, scheme: Scheme) -> dict[str, tuple[Tensor, Tensor]]:
    """k_scale and v_scale by attention layer; CheckpointError where the configuration and the tensors disagree."""
    k_suffix, v_suffix = CACHE_NAMES[scheme.layout]
    names = [key.removesuffix(k_suffix) for key in files.where if key.endswith(k_suffix)]
    if bool(names) != scheme.kv_cache:
        raise CheckpointError(
            f"{files.folder}: its config {'asks for' if scheme.kv_cache else 'has no'} FP8 KV cache but "
            f"{len(names)} attention layers have a scale for it; the config disagrees with the tensors: export it again"
        )
    found = {}
    for name in names:
        if name + v_suffix not in files.where:
            raise CheckpointError(f"{files.folder}: {name}{k_suffix} is there but {name}{v_suffix} is missing")
        k_scale, v_scale = (
            as_scale(str(files.folder), name + suffix, files.get(name + suffix), inverse=False)
            for suffix in (k_suffix, v_suffix)
        )
        found[name] = k_scale, v_scale
    return found


def require_e4m3_numbers(codes: Tensor, name: str) -> None:
    """NonFiniteError that names the tensor if an E4M3 tensor holds a NaN, the one value of the format that is no number."""
    bad = int(((codes.view(torch.uint8) & 0x7F) == 0x7F).sum())
    if bad:
        raise NonFiniteError(
            f"{name}: holds {bad} NaN among its E4M3 values; the checkpoint is damaged: copy or export it again"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder; CheckpointError where it is missing or not JSON."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds no config.json; a checkpoint is a folder with config.json and *.safetensors")
    return _read_json(path)


def scheme_of(folder: Path, config: dict[str, Any]) -> Scheme | None:
    """What the configuration of a checkpoint folder says about its quantization."""
    path = folder / "hf_quant_config.json"
    return read_scheme(str(folder), config, _read_json(path) if path.is_file() else None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(), object_hook=_special_number)
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return found


def _special_number(value: dict[str, Any]) -> Any:
    """Numbers that JSON lacks: transformers 5 writes infinity, the limit of a Mamba layer's time steps, as {"__float__": "Infinity"}."""
    if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return value
