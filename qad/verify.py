"""What is wrong with a packed checkpoint: every problem at once, without loading the model. One tensor is in memory at a time.

Found are the defects that serving engines pass over or only warn about: scales that differ inside a fused group, layers that
are neither quantized nor left alone by the configuration, patterns that match nothing, widths that tensor parallelism cuts.
Which linear layers a model has is asked of transformers, on shapes without weights; for an architecture that it does not
know they are guessed from the tensors, and the report says so.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qad.architecture import Architecture, architecture_of
from qad.errors import CheckpointError
from qad.experts import EXPERT, expert_layers, unopened
from qad.layouts import CACHE_NAMES, NAMES, Names, Scheme, disagreements
from qad.nvfp4 import BLOCK_SIZE
from qad.packed import layer_names, read_config, scheme_of
from qad.recipe import FUSED
from qad.tensor_files import TensorFiles, broken_files

ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "dense_4h_to_h", "c_proj", "w2", "fc2")
"""Layers whose input width tensor parallelism cuts (vLLM's RowParallelLinear); the others are cut along their outputs."""
_FLOATS = ("BF16", "F16", "F32")
_GATE_UP = ({"gate_proj", "up_proj"}, {"w1", "w3"})


@dataclass(frozen=True)
class Verification:
    """problems: one line each, empty for a sound checkpoint. formats: quantized layers by format. n_left: linear layers left alone.

    is_guessed: the linear layers were guessed from the tensors, since transformers does not know the architecture.
    """

    problems: tuple[str, ...]
    formats: dict[str, int]
    n_left: int
    is_guessed: bool


def verify(folder: Path, *, tensor_parallel: int = 1) -> Verification:
    """Look at every tensor and at the configuration of the checkpoint in `folder`.

    Args:
        tensor_parallel: the number of devices that will share each layer.
    Raises:
        CheckpointError: there is no configuration, or it asks for a quantization that is not read here, or for none.
    """
    config = read_config(folder)
    scheme = scheme_of(folder, config)
    if scheme is None:
        raise CheckpointError(
            f"{folder}: is not quantized (no quantization_config, no hf_quant_config.json); nothing to verify"
        )
    files = TensorFiles(folder)
    broken = broken_files(files)
    if broken:
        return Verification(tuple(broken), {}, 0, False)
    checks = _Checks(files, config, scheme)
    checks.both_configurations()
    checks.layers()
    checks.plain_tensors()
    checks.configuration()
    checks.fused_groups()
    checks.experts()
    checks.kv_cache()
    checks.model()
    if tensor_parallel > 1:
        checks.parallel(tensor_parallel)
    formats = {format: sum(found.format == format for found in checks.found.values()) for format in ("nvfp4", "fp8")}
    n_left = len(set(checks.linears) - set(checks.found))
    return Verification(tuple(checks.problems), {f: n for f, n in formats.items() if n}, n_left, checks.architecture is None)


@dataclass
class _Layer:
    """One quantized layer: its width, the scalars that it shares with its group, None where they are missing or broken."""

    format: str
    out_features: int
    in_features: int
    tensor_scale: float | None = None
    input_scale: float | None = None
    has_input: bool = False


@dataclass
class _Checks:
    files: TensorFiles
    config: dict[str, Any]
    scheme: Scheme
    problems: list[str] = field(default_factory=list)
    found: dict[str, _Layer] = field(default_factory=dict)

    @property
    def names(self) -> Names:
        return NAMES[self.scheme.layout]

    @cached_property
    def architecture(self) -> Architecture | None:
        """What transformers knows of it; None where it does not know it."""
        decoded = {f"{name}.weight" for name in self.found}
        return architecture_of(self.config, decoded | {key for key in self.files.where if key not in self.packed})

    @cached_property
    def packed(self) -> set[str]:
        """The tensors of quantized layers and of the KV cache."""
        layers = {name + suffix for name in self.found for suffix in self.names.all}
        return layers | {key for key in self.files.where if key.endswith(CACHE_NAMES[self.scheme.layout])}

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear layers, experts of their own included."""
        if self.architecture is not None:
            experts = sorted(name for name in self.found if EXPERT.match(name))
            return tuple(dict.fromkeys((*self.architecture.linears, *experts)))
        plain = [
            key.removesuffix(".weight")
            for key in self.files.where
            if key.endswith(".weight") and len(self.files.shape(key)) == 2 and self.files.dtype(key) in _FLOATS
        ]
        return tuple([name for name in plain if not re.search("embed|wte|wpe|norm", name)] + list(self.found))

    def both_configurations(self) -> None:
        """config.json against hf_quant_config.json: engines read one or the other."""
        if "quantization_config" not in self.config:
            return
        try:
            other = scheme_of(self.files.folder, {})
        except CheckpointError as error:
            self._add(f"hf_quant_config.json: {error}")
            return
        if other is not None:
            self.problems += [
                f"config.json and hf_quant_config.json disagree: {found}" for found in disagreements(self.scheme, other)
            ]

    def layers(self) -> None:
        """Types, shapes and scales of every quantized layer."""
        for name in layer_names(self.files, self.scheme.layout):
            is_fp8 = self._dtype(name + self.names.fp8_weight) == "F8_E4M3"
            self.found[name] = self._fp8(name) if is_fp8 else self._nvfp4(name)
        scales = (self.names.block_scale, self.names.tensor_scale)
        for key in self.files.where:
            for suffix in scales:
                name = key.removesuffix(suffix)
                if key.endswith(suffix) and name not in self.found:
                    stored = self._dtype(name + self.names.codes) or self._dtype(name + ".weight") or "missing"
                    self._add(
                        f"{key}: a scale without a packed weight: the weight of {name} is {stored}; NVFP4 needs U8, FP8 F8_E4M3"
                    )
                    break

    def plain_tensors(self) -> None:
        """NaN and infinity in everything that is not packed."""
        for key in self.files.where:
            if self.files.dtype(key) in _FLOATS and not key.endswith(self.names.all[1:]):
                bad = int((~torch.isfinite(self.files.get(key))).sum())
                if bad:
                    self._add(f"{key}: holds {bad} values that are NaN or infinite")

    def configuration(self) -> None:
        """The configuration against the tensors, both ways."""
        for name, layer in self.found.items():
            expected = self.scheme.group_of(name)
            if expected is None:
                self._add(
                    f"{name}: is packed ({layer.format}) but the config leaves it alone: an engine reads its bytes as plain weights"
                )
            elif expected[0] != layer.format:
                self._add(f"{name}: is {layer.format} but the config says {expected[0]}")
            elif expected[1] != layer.has_input:
                said, has = ("W4A4", "no") if expected[1] else ("weights only", "an")
                self._add(f"{name}: the config says {said} but it has {has} input scale")
        own = {} if self.architecture is None else self.architecture.linears
        for name in self.linears:
            if (
                name not in self.found
                and not self._is_missing_expert(name)
                and self.scheme.group_of(name, own.get(name, name)) is not None
            ):
                self._add(f"{name}: is neither quantized nor excluded: the config says that it is packed, its tensor is not")
        modules = {key.rpartition(".")[0] for key in self.files.where}
        if self.architecture is not None:
            modules |= {name for name, _ in self.architecture.model.named_modules() if name} | set(self.linears)
        for pattern in self.scheme.ignored:
            if pattern not in modules and not any(self.scheme.is_match(pattern, name) for name in modules):
                self._add(f'excluded name "{pattern}" matches nothing in the checkpoint: is it misspelt, or of another model?')

    def fused_groups(self) -> None:
        """Members of a fused group: all or none quantized, one format, one scale."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.linears:
            parent, _, leaf = name.rpartition(".")
            for fused, leaves in FUSED.items():
                if leaf in leaves and not EXPERT.match(name):
                    groups[f"{parent}.{fused}"].append(name)
        for group, members in groups.items():
            packed = [name for name in members if name in self.found]
            if packed and len(packed) < len(members):
                left = sorted(set(members) - set(packed))
                self._add(f"{group}: a fused group quantized in part: {', '.join(packed)} packed, {', '.join(left)} not")
            if len({self.found[name].format for name in packed}) > 1:
                self._add(f"{group}: a fused group in two formats: " + ", ".join(f"{n} {self.found[n].format}" for n in packed))
            else:
                self._require_one(group, packed, "tensor_scale", "weight scales")
                self._require_one(group, packed, "input_scale", "input scales")

    def experts(self) -> None:
        """Every expert has every projection; inputs of a projection share one scale, gate and up one weight scale."""
        layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for name in self.found:
            match = EXPERT.match(name)
            if match:
                layers[match["layer"]][int(match["index"])].add(match["projection"])
        known = expert_layers(self.architecture.linears) if self.architecture is not None else {}
        stated = next(
            (self.config[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if self.config.get(k)), None
        )
        for layer in dict.fromkeys((*known, *layers)):
            packed = dict.fromkeys(f"{i}.{p}" for i, own in sorted(layers[layer].items()) for p in sorted(own))
            projections = sorted(set().union(*layers[layer].values()))
            count = max(stated or 0, max(layers[layer], default=0) + 1)
            needed = [name.removeprefix(f"{layer}.") for name in known.get(layer, ())]
            needed = needed or [f"{i}.{p}" for i in range(count) for p in projections]
            plain = [part for part in needed if part not in packed and f"{layer}.{part}.weight" in self.files.where]
            missing = [part for part in needed if part not in packed and f"{layer}.{part}.weight" not in self.files.where]
            for what, found in (
                ("missing experts", missing if len(missing) < len(needed) else ["all of them"]),
                ("experts quantized in part, though engines serve them as one; not quantized are", plain if packed else []),
                ("experts that the architecture does not have", sorted(set(packed) - set(needed))),
            ):
                if found:
                    self._add(f"{layer}: {what}: {', '.join(found[:5])}" + (f" and {len(found) - 5} more" if found[5:] else ""))
        for layer, experts in layers.items():
            projections = sorted(set().union(*experts.values()))
            for shared in [{p} for p in projections if not any(p in pair for pair in _GATE_UP)] + list(_GATE_UP):
                members = [f"{layer}.{i}.{p}" for i in sorted(experts) for p in sorted(shared & experts[i])]
                self._require_one(
                    f"{layer}.*.{'/'.join(sorted(shared & set(projections)))}",
                    members,
                    "input_scale",
                    "input scales across its experts",
                )
            for pair in _GATE_UP:
                for index in sorted(experts):
                    members = [f"{layer}.{index}.{p}" for p in sorted(pair & experts[index])]
                    self._require_one(f"{layer}.{index}", members, "tensor_scale", "weight scales")

    def kv_cache(self) -> None:
        """The scales of the KV cache against the configuration."""
        suffixes = CACHE_NAMES[self.scheme.layout]
        scaled = {suffix: {k.removesuffix(suffix) for k in self.files.where if k.endswith(suffix)} for suffix in suffixes}
        names = set().union(*scaled.values())
        if bool(names) != self.scheme.kv_cache:
            self._add(
                f"the config {'asks for' if self.scheme.kv_cache else 'has no'} FP8 KV cache but {len(names)} attention layers have scales for it"
            )
        guessed = {name.rpartition(".")[0] for name in self.linears if name.endswith(".k_proj")}
        attention = guessed if self.architecture is None else self.architecture.attention
        for name in sorted(names | (attention if names else set())):
            for suffix in suffixes:
                if name not in scaled[suffix]:
                    self._add(f"{name}{suffix}: missing; an engine falls back to a scale of 1")
                else:
                    self._scale(name + suffix)

    def model(self) -> None:
        """Shapes and completeness against the architecture."""
        if self.architecture is None:
            return
        expected = self.architecture.shapes
        stored = set(self.files.where)
        tied = self.architecture.tied
        stacks = tuple(f"{name}." for name in unopened(self.architecture.model))
        for key, shape in expected.items():
            name = key.removesuffix(".weight")
            if key.startswith(stacks) or self._is_missing_expert(name):
                continue
            if name in self.found and key.endswith(".weight"):
                actual = (self.found[name].out_features, self.found[name].in_features)
                if actual != shape:
                    self._add(f"{name}: decodes to {actual}, the architecture has {shape}")
            elif key not in stored and key not in tied:
                self._add(f"{key}: missing; the architecture has it with shape {shape}")
            elif key in stored and self.files.shape(key) != shape:
                self._add(f"{key}: has shape {self.files.shape(key)}, the architecture has {shape}")
            elif key in stored and self.files.dtype(key) not in _FLOATS and self.architecture.are_floats[key]:
                self._add(f"{key}: is {self.files.dtype(key)}; what is not packed is {', '.join(_FLOATS)}")
        for key in sorted(stored - self.packed - set(expected)):
            if not key.startswith(stacks) and not key.endswith("rotary_emb.inv_freq") and not self._is_scale(key):
                self._add(f"{key}: left over; {type(self.architecture.model).__name__} has no such tensor")

    def parallel(self, count: int) -> None:
        """Widths that `count` devices would cut off a multiple of a block."""
        for name, layer in self.found.items():
            is_row = name.rpartition(".")[2] in ROW_PARALLEL
            width, what = (layer.in_features, "input") if is_row else (layer.out_features, "output")
            if width % count:
                self._add(f"{name}: {what} width {width} does not divide by --tp {count}")
            elif is_row and layer.format == "nvfp4" and width // count % BLOCK_SIZE:
                self._add(
                    f"{name}: --tp {count} cuts its input width {width} into {width // count}, not a multiple of {BLOCK_SIZE}; "
                    "use fewer devices or leave the layer in BF16"
                )

    def _nvfp4(self, name: str) -> _Layer:
        shape = self.files.shape(name + self.names.codes)
        layer = _Layer("nvfp4", shape[0] if shape else 0, shape[-1] * 2 if shape else 0)
        if len(shape) != 2:
            self._add(f"{name}{self.names.codes}: has shape {shape}; NVFP4 needs (out, in/2)")
            return layer
        if layer.in_features % BLOCK_SIZE:
            self._add(
                f"{name}: input width {layer.in_features} is not a multiple of {BLOCK_SIZE}, the NVFP4 block; leave the layer in BF16"
            )
        self._block_scales(name + self.names.block_scale, (layer.out_features, math.ceil(layer.in_features / BLOCK_SIZE)))
        layer.tensor_scale = self._scale(name + self.names.tensor_scale, ("F32",))
        layer.has_input = name + self.names.input_scale in self.files.where
        if layer.has_input:
            layer.input_scale = self._scale(name + self.names.input_scale, ("F32",))
        return layer

    def _fp8(self, name: str) -> _Layer:
        shape = self.files.shape(name + self.names.fp8_weight)
        layer = _Layer("fp8", shape[0] if shape else 0, shape[-1] if shape else 0)
        if len(shape) != 2:
            self._add(f"{name}{self.names.fp8_weight}: is F8_E4M3 with shape {shape}; an FP8 layer has (out, in)")
            return layer
        codes = self.files.get(name + self.names.fp8_weight).view(torch.uint8)
        bad = int(((codes & 0x7F) == 0x7F).sum())
        if bad:
            self._add(f"{name}{self.names.fp8_weight}: holds {bad} NaN")
        layer.tensor_scale = self._scale(name + self.names.fp8_scale)
        layer.has_input = name + self.names.fp8_input_scale in self.files.where
        if layer.has_input:
            layer.input_scale = self._scale(name + self.names.fp8_input_scale)
        return layer

    def _block_scales(self, key: str, expected: tuple[int, int]) -> None:
        if key not in self.files.where:
            self._add(f"{key}: missing")
        elif self.files.dtype(key) != "F8_E4M3" or self.files.shape(key) != expected:
            self._add(f"{key}: is {self.files.dtype(key)} {self.files.shape(key)}; NVFP4 needs F8_E4M3 {expected}")
        else:
            codes = self.files.get(key).view(torch.uint8)
            magnitude = codes & 0x7F
            for what, bad in (
                ("NaN", magnitude == 0x7F),
                ("zero", magnitude == 0),
                ("negative", (codes > 0x80) & (magnitude != 0x7F)),
            ):
                if bool(bad.any()):
                    self._add(
                        f"{key}: holds {int(bad.sum())} {what} block scales, the first at {tuple(bad.nonzero()[0].tolist())}"
                    )

    def _scale(self, key: str, allowed: tuple[str, ...] = _FLOATS) -> float | None:
        """The stored scalar, or None after saying what is wrong with it."""
        if key not in self.files.where:
            self._add(f"{key}: missing")
            return None
        stored = self.files.get(key)
        if self.files.dtype(key) not in allowed or stored.numel() != 1:
            self._add(f"{key}: is {self.files.dtype(key)} {tuple(stored.shape)}; it must be one {' or '.join(allowed)}")
            return None
        value = float(stored)
        if not 0 < value < math.inf:
            self._add(f"{key}: is {value:g}; a scale is positive and finite")
            return None
        return value

    def _require_one(self, group: str, members: list[str], attribute: str, what: str) -> None:
        values = {name: getattr(self.found[name], attribute) for name in members}
        known = {name: value for name, value in values.items() if value is not None}
        if len(set(known.values())) > 1:
            listed = ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in list(known.items())[:4])
            self._add(f"{group}: unequal {what} ({listed}): engines take one of them and decode the others wrongly")

    def _is_missing_expert(self, name: str) -> bool:
        """Whether a linear layer is of an expert that the files have nothing of, which `experts` says."""
        return EXPERT.match(name) is not None and name not in self.found and f"{name}.weight" not in self.files.where

    def _is_scale(self, key: str) -> bool:
        return key.endswith((self.names.block_scale, self.names.tensor_scale))

    def _dtype(self, key: str) -> str | None:
        return self.files.dtype(key) if key in self.files.where else None

    def _add(self, problem: str) -> None:
        self.problems.append(problem)
