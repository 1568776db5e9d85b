"""The safetensors files of a checkpoint folder: which tensor lies where, and tensors one at a time. Never a pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qad.errors import CheckpointError
from qad.footprint import bits_of, header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000
"""A shard is copied once while it is written, so this bounds the memory that writing takes."""


@dataclass(frozen=True)
class TensorFiles:
    """Tensors of `folder` by name, read one at a time. CheckpointError where a file is missing, cut short or no safetensors."""

    folder: Path

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The weight files: those of the index where there is one, else every *.safetensors file."""
        index = self.folder / INDEX
        if not index.is_file():
            found = tuple(sorted(self.folder.glob("*.safetensors")))
            if not found:
                raise CheckpointError(f"{self.folder}: holds no *.safetensors file; pickled weights are never read")
            return found
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors files ({error}); copy it again") from error
        strangers = [name for name in names if not name.endswith(".safetensors") or "/" in name]
        if strangers:
            raise CheckpointError(f"{index}: names {strangers[0]}; only *.safetensors files beside it are read")
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{self.folder}: the shard {missing[0]} of its index is missing; copy it again")
        return tuple(self.folder / name for name in names)

    @cached_property
    def where(self) -> dict[str, Path]:
        """The file of every tensor."""
        found: dict[str, Path] = {}
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as opened:
                    names = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: cannot be read as safetensors ({error}); is it cut short? copy it again"
                ) from error
            for name in names:
                if name in found:
                    raise CheckpointError(f"{path}: holds {name}, which {found[name].name} holds too; remove one of the files")
                found[name] = path
        return found

    def get(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self.where[name], framework="pt") as opened:
            return opened.get_tensor(name)

    @cached_property
    def _headers(self) -> dict[str, dict[str, Any]]:
        return {name: entry for path in set(self.where.values()) for name, entry in header(path).items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._headers[name]["shape"])

    def n_bytes(self, name: str) -> int:
        """Bytes of one tensor, without reading it."""
        return math.prod(self.shape(name)) * bits_of(self.dtype(name)) // 8

    def dtype(self, name: str) -> str:
        """The type as safetensors spells it: "U8", "F8_E4M3", "F32", "BF16", …"""
        return str(self._headers[name]["dtype"])


def broken_files(files: TensorFiles) -> list[str]:
    """What is wrong with the files themselves: one line a problem, empty where every tensor can be read."""
    problems = []
    try:
        paths = files.files
    except CheckpointError as error:
        return [str(error)]
    for path in paths:
        try:
            with safe_open(path, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            problems.append(f"{path.name}: cannot be read as safetensors ({error}); it is cut short or damaged: copy it again")
    if problems:
        return problems
    try:
        known = files.where
    except CheckpointError as error:
        return [str(error)]
    index = files.folder / INDEX
    if index.is_file():
        listed = json.loads(index.read_text())["weight_map"]
        problems += [f"{INDEX}: lists {name}, which {file} does not hold" for name, file in listed.items() if name not in known]
        problems += [
            f"{path.name}: holds {name}, which {INDEX} does not list" for name, path in known.items() if name not in listed
        ]
        strays = {path.name for path in files.folder.glob("*.safetensors")} - {path.name for path in paths}
        problems += [
            f"{name}: is not listed in {INDEX}; an engine that reads every file loads it too: remove it"
            for name in sorted(strays)
        ]
    return problems


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    get: Callable[[str], Tensor],
    *,
    metadata: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors in files of at most `shard_bytes` (more only for a single larger tensor), one file in memory at a time.

    Args:
        sizes: bytes by name, in the order in which they are written.
        get: a tensor by name; on any device.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    names = (
        [WEIGHTS] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, members in zip(names, shards, strict=True):
        save_file({name: get(name).detach().cpu().contiguous() for name in members}, folder / file, metadata | {"format": "pt"})
        _sort_metadata(folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _sort_metadata(path: Path) -> None:
    """Order the metadata keys of a safetensors header, which safetensors writes in another order in every process.

    Equal checkpoints are equal bytes then. The header keeps its length; the format fills with spaces what is left.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        written = file.read(length)
        header = json.loads(written)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > length:
            raise ValueError(f"{path}: its header has {length} bytes, {len(ordered)} with ordered keys; report this")
        file.seek(8)
        file.write(ordered.ljust(length))


def sizes_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Bytes of tensors by name."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
