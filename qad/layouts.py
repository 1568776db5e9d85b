"""The two checkpoint layouts: what they call the tensors of a quantized layer, and what their configurations say.

The only place that knows foreign names. The bytes are the same in both; a layer `X` is

                    modelopt                          compressed-tensors (nvfp4-pack-quantized)
    codes           X.weight          uint8           X.weight_packed         uint8          (out, in/2), low nibble first
    block scales    X.weight_scale    float8_e4m3fn   X.weight_scale          float8_e4m3fn  (out, in/16), row-major
    tensor scale    X.weight_scale_2  float32 ()      X.weight_global_scale   float32 (1,)   the latter divides: a reciprocal
    input scale     X.input_scale     float32 ()      X.input_global_scale    float32 (1,)   the same; absent in W4A16
    FP8 weight      X.weight          float8_e4m3fn (out, in), in both
    FP8 scales      X.weight_scale, X.input_scale     float32 () in modelopt, (1,) in compressed-tensors; both decode
    KV cache        A.k_proj.k_scale, A.v_proj.v_scale; A.k_scale, A.v_scale: float32, decode; A is the attention layer

Sources: ModelOpt 0.47 (`export/unified_export_hf.py`, `export/convert_hf_config.py`), compressed-tensors 0.17 and 0.20
(`compressors/nvfp4`, `quantization/quant_scheme.py`), vLLM 0.32 (`quantization/modelopt.py`, `compressed_tensors/`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from qad.errors import CheckpointError
from qad.experts import expert_layers
from qad.fp8 import Fp8Packed
from qad.nvfp4 import BLOCK_SIZE, Packed
from qad.recipe import Format, Targets

Layout = Literal["modelopt", "compressed-tensors"]
LAYOUTS: tuple[Layout, ...] = ("modelopt", "compressed-tensors")
PRODUCER = {"name": "qad-harness", "version": "1"}

_MODELOPT_FORMATS: dict[str, Format] = {"NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", "FP8": "fp8"}


@dataclass(frozen=True)
class Names:
    """Suffixes of the tensors of a quantized layer. inverse: the NVFP4 tensor and input scales are stored as reciprocals."""

    codes: str
    block_scale: str
    tensor_scale: str
    input_scale: str
    fp8_weight: str = ".weight"
    fp8_scale: str = ".weight_scale"
    fp8_input_scale: str = ".input_scale"
    inverse: bool = False

    @property
    def all(self) -> tuple[str, ...]:
        return (self.codes, self.block_scale, self.tensor_scale, self.input_scale, self.fp8_input_scale)


NAMES: dict[str, Names] = {
    "modelopt": Names(".weight", ".weight_scale", ".weight_scale_2", ".input_scale"),
    "compressed-tensors": Names(".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale", inverse=True),
}
CACHE_NAMES: dict[str, tuple[str, str]] = {
    "modelopt": (".k_proj.k_scale", ".v_proj.v_scale"),
    "compressed-tensors": (".k_scale", ".v_scale"),
}


@dataclass(frozen=True)
class QuantizedLayer:
    """What a checkpoint holds of one quantized layer. input_scale: () float32 that decodes; None where inputs stay BF16."""

    encoding: Packed | Fp8Packed
    input_scale: Tensor | None

    @property
    def format(self) -> Format:
        return "nvfp4" if isinstance(self.encoding, Packed) else "fp8"


@dataclass(frozen=True)
class Scheme:
    """What the configuration of a checkpoint says.

    groups: (targets, format, whether inputs are quantized), tried in order; a target is a class name, a full module name
        or "re:" and a regular expression.
    ignored: patterns of layers that are left alone, in the layout's own syntax.
    """

    layout: Layout
    groups: tuple[tuple[tuple[str, ...], Format, bool], ...]
    ignored: tuple[str, ...]
    kv_cache: bool

    def group_of(self, name: str, *aliases: str) -> tuple[Format, bool] | None:
        """Format of a linear layer and whether its input is quantized; None where it is left alone.

        aliases: other names of it; some writers list what is left alone by its name in memory, not by that in files.
        """
        if any(self._is_ignored(known) for known in (name, *aliases)):
            return None
        if name in self._named:
            return self._named[name]
        for by_class in (False, True):
            for targets, format, activations in self.groups:
                if any((target == "Linear") if by_class else self.is_match(target, name) for target in targets):
                    return format, activations
        return None

    @cached_property
    def _named(self) -> dict[str, tuple[Format, bool]]:
        """Targets that are plain names, which the many experts of a model would be compared with one by one."""
        found = [(target, (format, activations)) for targets, format, activations in self.groups for target in targets]
        return {target: group for target, group in reversed(found) if _is_plain(target) and target != "Linear"}

    @cached_property
    def _left_alone(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """What is ignored: plain names, and patterns."""
        plain = frozenset(pattern for pattern in self.ignored if _is_plain(pattern))
        return plain, tuple(pattern for pattern in self.ignored if pattern not in plain)

    def _is_ignored(self, name: str) -> bool:
        plain, patterns = self._left_alone
        parts = name.split(".")
        holders = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return any(holder in plain for holder in holders) or any(self.is_match(pattern, name) for pattern in patterns)

    def is_match(self, pattern: str, name: str) -> bool:
        """Whether a pattern of this layout's syntax names the layer `name` (or a module that holds it)."""
        if pattern.startswith("re:"):
            return re.match(pattern[3:], name) is not None
        return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _is_plain(pattern: str) -> bool:
    return not pattern.startswith("re:") and not set("*?[") & set(pattern)


def layer_tensors(layout: Layout, name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    """The tensors of one layer as they are stored; its scales are copies, for files hold no tensor twice and groups share scales."""
    names, encoding = NAMES[layout], layer.encoding
    if isinstance(encoding, Fp8Packed):
        shape = (1,) if layout == "compressed-tensors" else ()
        scales = {names.fp8_scale: encoding.tensor_scale, names.fp8_input_scale: layer.input_scale}
        stored = {name + suffix: scale.reshape(shape).clone() for suffix, scale in scales.items() if scale is not None}
        return {name + names.fp8_weight: encoding.codes, **stored}
    tensors = {name + names.codes: encoding.packed, name + names.block_scale: encoding.block_scale}
    for suffix, scale in ((names.tensor_scale, encoding.tensor_scale), (names.input_scale, layer.input_scale)):
        if scale is not None:
            tensors[name + suffix] = (1.0 / scale).reshape(1) if names.inverse else scale.reshape(())
    return {key: tensor.clone() if tensor.numel() == 1 else tensor for key, tensor in tensors.items()}


def cache_tensors(layout: Layout, name: str, k_scale: Tensor, v_scale: Tensor) -> dict[str, Tensor]:
    """The stored scales of the KV cache of the attention layer `name`."""
    shape = (1,) if layout == "compressed-tensors" else ()
    return {
        name + suffix: scale.reshape(shape).clone()
        for suffix, scale in zip(CACHE_NAMES[layout], (k_scale, v_scale), strict=True)
    }


def configs(layout: Layout, targets: Targets, *, activations: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`quantization_config` of config.json, and the content of hf_quant_config.json (ModelOpt's layout alone has one)."""
    formats = {group.format for group in targets.groups}
    if layout == "compressed-tensors":
        return _compressed_tensors_config(targets, formats, activations), None
    left_alone = [*targets.excluded, *targets.never_linear]
    nvfp4_algorithm = "NVFP4" if activations else "W4A16_NVFP4"
    algorithm = "MIXED_PRECISION" if len(formats) > 1 else "FP8" if formats == {"fp8"} else nvfp4_algorithm
    layers = {
        member: {"quant_algo": "NVFP4", "group_size": BLOCK_SIZE} if group.format == "nvfp4" else {"quant_algo": "FP8"}
        for group in targets.groups
        for member in group.members
    }
    mixed = {"quantized_layers": layers} if len(formats) > 1 else {}
    nvfp4 = {"dynamic": False, "group_size": BLOCK_SIZE, "num_bits": 4, "type": "float"}
    fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    groups = {}
    for index, (format, scheme) in enumerate((f, s) for f, s in (("nvfp4", nvfp4), ("fp8", fp8)) if f in formats):
        members = [member for group in targets.groups if group.format == format for member in group.members]
        group: dict[str, Any] = {"weights": scheme, "targets": ["Linear"] if len(formats) == 1 else members}
        groups[f"group_{index}"] = group | ({"input_activations": scheme} if activations else {})
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": PRODUCER,
        "ignore": left_alone,
        "config_groups": groups,
        **mixed,
    }
    if targets.kv_cache:
        config["kv_cache_scheme"] = fp8
    quantization = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": "FP8" if targets.kv_cache else None,
        "group_size": BLOCK_SIZE,
        "exclude_modules": left_alone,
        **mixed,
    }
    return config, {"producer": PRODUCER, "quantization": quantization}


def _compressed_tensors_config(targets: Targets, formats: set[Format], activations: bool) -> dict[str, Any]:
    nvfp4 = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": BLOCK_SIZE,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    stored = {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized"}
    groups = {}
    left_alone = [*targets.excluded, *targets.never_linear]
    packed = expert_layers(targets.members)
    patterns_left = [_all_of(layer) for layer in expert_layers(targets.excluded) if layer not in packed]
    for index, format in enumerate(sorted(formats, reverse=True)):
        members = [member for group in targets.groups if group.format == format for member in group.members]
        scheme = nvfp4 if format == "nvfp4" else fp8
        inputs = {**scheme, "dynamic": "local", "observer": "static_minmax"} if format == "nvfp4" else scheme
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(formats) == 1 else [*members, *map(_all_of, expert_layers(members))],
            "weights": scheme,
            "input_activations": inputs if activations else None,
            "output_activations": None,
            "format": stored[format],
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(formats) > 1 else stored[next(iter(formats))],
        "quantization_status": "compressed",
        "ignore": [*left_alone, *patterns_left],
        "config_groups": groups,
        "kv_cache_scheme": fp8 if targets.kv_cache else None,
    }


def _all_of(layer: str) -> str:
    """A pattern for whatever is in a layer of experts, from its list of layers on: vLLM asks for projections by names that files do not
    have ("None" for a gate that is missing), and renames what is before, in plain names but not in patterns."""
    found = re.search(r"[^.]+\.\d+\..+", layer)
    return rf"re:(?:.*\.)?{re.escape(found[0] if found else layer)}\..*"


def read_scheme(where: str, config: dict[str, Any], hf_quant_config: dict[str, Any] | None) -> Scheme | None:
    """What config.json and hf_quant_config.json say; None for a model that is not quantized.

    Raises CheckpointError for another method, and for numbers that no part of this library computes.
    """
    quantization = config.get("quantization_config")
    if quantization is None and hf_quant_config is not None:
        quantization = {"quant_method": "modelopt", **hf_quant_config.get("quantization", {})}
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    if method == "modelopt":
        return _read_modelopt(where, quantization)
    if method == "compressed-tensors":
        return _read_compressed_tensors(where, quantization)
    raise CheckpointError(
        f"{where}: quantized with quant_method {method!r}; NVFP4 and FP8 checkpoints of modelopt and compressed-tensors are read"
    )


def _read_modelopt(where: str, quantization: dict[str, Any]) -> Scheme:
    quantization = quantization.get("quantization", quantization)
    algorithm = str(quantization.get("quant_algo")).upper()
    layers = quantization.get("quantized_layers") or {}
    algorithms = {name: str(entry.get("quant_algo")).upper() for name, entry in layers.items()}
    unknown = set(algorithms.values() if algorithm == "MIXED_PRECISION" else [algorithm]) - set(_MODELOPT_FORMATS)
    if unknown:
        raise CheckpointError(
            f"{where}: quantized with modelopt's quant_algo {', '.join(sorted(unknown))}; "
            f"allowed: {', '.join(_MODELOPT_FORMATS)}, alone or in MIXED_PRECISION"
        )
    if algorithm == "MIXED_PRECISION":
        groups = tuple(((name,), _MODELOPT_FORMATS[found], found != "W4A16_NVFP4") for name, found in algorithms.items())
    else:
        groups = ((("Linear",), _MODELOPT_FORMATS[algorithm], algorithm != "W4A16_NVFP4"),)
    cache = quantization.get("kv_cache_quant_algo") or quantization.get("kv_cache_scheme")
    ignored = tuple(quantization.get("ignore") or quantization.get("exclude_modules") or ())
    return Scheme("modelopt", groups, ignored, _is_fp8_cache(where, cache))


def _read_compressed_tensors(where: str, quantization: dict[str, Any]) -> Scheme:
    groups = []
    for name, group in (quantization.get("config_groups") or {}).items():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
        if kind == (4, "float", "tensor_group") and weights.get("group_size") == BLOCK_SIZE:
            format: Format = "nvfp4"
            is_known = inputs is None or (inputs.get("strategy") == "tensor_group" and inputs.get("dynamic") == "local")
        elif kind == (8, "float", "tensor"):
            format = "fp8"
            is_known = inputs is not None and inputs.get("strategy") == "tensor" and inputs.get("dynamic") is False
        else:
            is_known = False
        if not is_known or not weights.get("symmetric", True):
            raise CheckpointError(
                f"{where}: config_groups.{name}: weights {kind} with input_activations "
                f"{None if inputs is None else (inputs.get('strategy'), inputs.get('dynamic'))}; read are NVFP4 (4 bits, float, "
                "tensor_group of 16, inputs local or none) and FP8 (8 bits, float, tensor, static inputs)"
            )
        groups.append((tuple(group.get("targets") or ()), format, inputs is not None))
    if not groups:
        raise CheckpointError(f"{where}: its quantization_config has no config_groups, so nothing says what is quantized")
    cache = quantization.get("kv_cache_scheme")
    return Scheme("compressed-tensors", tuple(groups), tuple(quantization.get("ignore") or ()), _is_fp8_cache(where, cache))


def _is_fp8_cache(where: str, cache: Any) -> bool:
    if not cache:
        return False
    is_fp8 = (
        cache.upper() == "FP8"
        if isinstance(cache, str)
        else (
            cache.get("num_bits") == 8
            and cache.get("type") == "float"
            and cache.get("strategy", "tensor") == "tensor"
            and not cache.get("dynamic")
        )
    )
    if not is_fp8:
        raise CheckpointError(f"{where}: asks for the KV cache {cache}; allowed: FP8 with one static scale a layer, or none")
    return True


def disagreements(one: Scheme, other: Scheme) -> list[str]:
    """What two configurations of one checkpoint say differently."""
    formats = [sorted({(format, activations) for _, format, activations in scheme.groups}) for scheme in (one, other)]
    left_alone = [sorted(set(scheme.ignored)) for scheme in (one, other)]
    said = [
        ("formats and whether inputs are quantized", formats[0], formats[1]),
        ("what is left alone", left_alone[0], left_alone[1] or left_alone[0]),  # some writers list it in one of them only
        ("an FP8 KV cache", one.kv_cache, other.kv_cache),
    ]
    return [f"{what}: {ours} and {theirs}; engines read one or the other" for what, ours, theirs in said if ours != theirs]


def as_scale(where: str, name: str, stored: Tensor, *, inverse: bool) -> Tensor:
    """A stored scalar as a () float32 that decodes; CheckpointError unless it is one positive finite float32.

    BF16 and FP16 scalars, which some writers of FP8 layers store, are the same number in FP32.
    """
    if stored.dtype not in (torch.float32, torch.bfloat16, torch.float16) or stored.numel() != 1:
        raise CheckpointError(f"{where}: {name} is {stored.dtype} {tuple(stored.shape)}; it must be one float32")
    scale = stored.reshape(()).float()
    if not 0 < float(scale) < float("inf"):
        raise CheckpointError(f"{where}: {name} is {float(scale):g}; a scale is positive and finite")
    return 1.0 / scale if inverse else scale
