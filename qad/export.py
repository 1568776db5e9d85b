"""A finished checkpoint copied to another folder, in either layout. Codes and block scales are never computed again."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from qad.checkpoint import RECORD, appearing, copy_companions
from qad.errors import CheckpointError
from qad.layouts import CACHE_NAMES, NAMES, Layout, Scheme, as_scale, cache_tensors, configs, layer_tensors
from qad.packed import layer_names, read_cache, read_config, read_layer, scheme_of
from qad.recipe import FusedGroup, Targets
from qad.tensor_files import SHARD_BYTES, TensorFiles, write_json, write_shards


def copy_checkpoint(source: Path, folder: Path, *, layout: Layout | None = None, shard_bytes: int = SHARD_BYTES) -> int:
    """Copy the checkpoint in `source` to the empty or missing `folder`, renamed to `layout` where it has another.

    Returns how many tensor and input scales changed in their last bits: compressed-tensors stores reciprocals, and
    1/(1/s) can differ from s. Powers of two never do.

    Raises CheckpointError: not a checkpoint, not quantized although a layout is asked for, or `folder` is not empty.
    """
    config = read_config(source)
    files = TensorFiles(source)
    scheme = scheme_of(source, config)
    if scheme is None and layout is not None:
        raise CheckpointError(f"{source}: is not quantized, so it has no layout; leave the layout out")
    target = scheme.layout if scheme is not None and layout is None else layout
    with appearing(folder) as partial:
        if scheme is None or target is None or scheme.layout == target:
            copy_companions(source, partial)
            for path in (
                *files.files,
                *(source / name for name in (RECORD, "hf_quant_config.json", "model.safetensors.index.json")),
            ):
                if path.is_file():
                    shutil.copyfile(path, partial / path.name)
            return 0
        return _relabel(files, scheme, config, partial, target, shard_bytes)


def _relabel(
    files: TensorFiles, scheme: Scheme, config: dict[str, Any], partial: Path, layout: Layout, shard_bytes: int
) -> int:
    cache = read_cache(files, scheme)
    layers = layer_names(files, scheme.layout)
    owner = {name + suffix: name for name in layers for suffix in NAMES[scheme.layout].all if name + suffix in files.where}
    owner |= {name + suffix: name for name in cache for suffix in CACHE_NAMES[scheme.layout]}
    changed: dict[str, int] = {}

    @lru_cache(maxsize=1)
    def renamed(name: str) -> dict[str, Tensor]:
        if name in cache:
            return cache_tensors(layout, name, *cache[name])
        layer = read_layer(files, scheme, name)
        tensors = layer_tensors(layout, name, layer)
        changed[name] = sum(
            float(as_scale("", "", tensors[name + suffix], inverse=NAMES[layout].inverse)) != float(scale)
            for suffix, scale in (
                (NAMES[layout].tensor_scale, layer.encoding.tensor_scale),
                (NAMES[layout].input_scale, layer.input_scale),
            )
            if scale is not None and layer.format == "nvfp4"
        )
        return tensors

    sizes: dict[str, int] = {}
    come_from: dict[str, str] = {}
    seen: set[str] = set()
    for stored in files.where:
        name = owner.get(stored)
        if name is None:
            sizes[stored] = files.n_bytes(stored)
        elif name not in seen:
            seen.add(name)
            for key, tensor in renamed(name).items():
                sizes[key], come_from[key] = tensor.numel() * tensor.element_size(), name
    found = {name: scheme.group_of(name) for name in layers}
    strangers = [name for name, group in found.items() if group is None]
    if strangers:
        raise CheckpointError(
            f"{files.folder}: {strangers[0]} is packed but its config leaves it alone; run harness verify on it"
        )
    groups = tuple(FusedGroup(name, (name,), group[0]) for name, group in found.items() if group is not None)
    targets = Targets(groups, _left_alone(files, scheme), tuple(cache))
    has_inputs = {group[1] for group in found.values() if group is not None}
    if len(has_inputs) > 1:
        raise CheckpointError(
            f"{files.folder}: some of its layers quantize their inputs and some do not; such a mixture is copied in its own layout only: "
            "leave the layout out"
        )
    (activations,) = has_inputs
    config["quantization_config"], hf_quant_config = configs(layout, targets, activations=activations)
    if hf_quant_config is not None:
        write_json(partial / "hf_quant_config.json", hf_quant_config)
    write_json(partial / "config.json", config)
    record = json.loads((files.folder / RECORD).read_text()) if (files.folder / RECORD).is_file() else {}
    record |= {"layout": layout}
    write_json(partial / RECORD, record)
    copy_companions(files.folder, partial)

    def get(key: str) -> Tensor:
        return renamed(come_from[key])[key] if key in come_from else files.get(key)

    write_shards(partial, sizes, get, metadata={"qad": json.dumps(record, sort_keys=True)}, shard_bytes=shard_bytes)
    return sum(changed.values())


def _left_alone(files: TensorFiles, scheme: Scheme) -> tuple[str, ...]:
    """Full names of what the patterns of a scheme leave alone; both layouts read plain names."""
    plain = [pattern for pattern in scheme.ignored if not pattern.startswith("re:") and not set("*?[") & set(pattern)]
    modules = [key.removesuffix(".weight") for key in files.where if key.endswith(".weight") and len(files.shape(key)) == 2]
    matched = [name for name in modules if any(scheme.is_match(pattern, name) for pattern in scheme.ignored)]
    return tuple(dict.fromkeys([*plain, *matched]))
