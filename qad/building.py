"""From a configuration and tensors to a transformers model: which class it is, and what is refused.

A class is transformers' own (a causal language model, or an image-text model), the one that `qad.decilm` has for "nemotron-nas", or
comes from the Python files beside the configuration, where the caller allows that.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qad import nvfp4
from qad.backbone import head_of, last_hidden, speaker_of
from qad.errors import CheckpointError, memory_asked_for
from qad.experts import open_experts
from qad.remote_code import runs_remote_code

_REMOTE_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")
"""Where remote code may say its class, the first that it has. AutoModel is where models of several parts often stand."""


def native_class(config: dict[str, Any]) -> tuple[Any, Any]:
    """Configuration object and model class that transformers, or `qad.decilm`, has for the content of a config.json.

    A type that it knows both as a causal language model and as an image-text model is what `architectures` says, else the latter.
    KeyError or ValueError where it knows neither; CheckpointError for a "nemotron-nas" model that is not available.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if config.get("model_type") == "nemotron-nas":
        from qad import decilm

        decilm.register()
    model_config = AutoConfig.for_model(**copy.deepcopy(config))  # which adds to nested fields
    mappings = (AutoModelForImageTextToText._model_mapping, AutoModelForCausalLM._model_mapping)
    known = [found for mapping in mappings if (found := mapping.get(type(model_config), None)) is not None]
    if not known:
        raise KeyError(config.get("model_type"))
    named = [found for found in known if found.__name__ in (config.get("architectures") or ())]
    return model_config, (named or known)[0]


def build(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], trust_remote_code: bool) -> Any:
    """The model of `config` with `tensors`, in BF16 and in evaluation mode; experts are opened (`qad.experts`).

    `tensors` is emptied: experts would be in memory twice.

    Raises:
        CheckpointError: a class that is not known or not allowed, a package that it needs is missing, tensors that do not fit it.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    from transformers import GenerationConfig

    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            nvfp4.require_finite(tensor.float(), f"{folder}: {name}")
    try:
        if runs_remote_code(config, trust_remote_code):
            model_config, architecture = _remote_code(folder, config, trust_remote_code)
        else:
            model_config, architecture = _native(folder, config)
        model, report = _filled(folder, architecture, model_config, tensors)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: its model needs a package that is not installed ({reason}); install it beside this one"
        ) from error
    problems = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(key)}
    if problems:
        raise CheckpointError(f"{folder}: its tensors do not fit {architecture.__name__}: {problems}")
    tensors.clear()
    open_experts(model)
    model.generation_config = GenerationConfig()
    _require_plain_head(folder, model.eval())
    return model


def _filled(folder: Path, architecture: Any, model_config: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """The model with `tensors`, and transformers' report of what did not fit."""
    try:
        model, report = architecture.from_pretrained(
            None,
            config=model_config,
            state_dict=tensors,
            dtype=torch.bfloat16,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused by name
        )
        return model, report
    except RuntimeError as error:
        if memory_asked_for(error) is not None:
            raise
        raise CheckpointError(
            f"{folder}: its tensors cannot be made into those of {architecture.__name__}: some are missing or have other shapes (of "
            "experts, each needs every projection); copy it again, or run harness verify on it"
        ) from error


def _native(folder: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    try:
        return native_class(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: model_type {config.get('model_type')!r} is no causal language model and no image-text model that "
            "transformers knows natively"
        ) from error


def _remote_code(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    """Configuration and model class from the Python files in `folder`, and from nowhere else."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    classes = config["auto_map"]
    elsewhere = sorted(str(c) for c in classes.values() if "--" in str(c))
    if elsewhere:
        raise CheckpointError(
            f"{folder}: its remote code lies in another repository ({elsewhere[0]}), which nothing pins; not read"
        )
    if not trust_remote_code:
        raise CheckpointError(
            f"{folder}: asks for remote code (auto_map: {', '.join(sorted(classes))}); it runs only where the suite says "
            "[model] trust_remote_code = true and the model is a folder or a hub id with its revision"
        )
    asked_for = next((name for name in _REMOTE_CLASSES if name in classes), None)
    if asked_for is None:
        raise CheckpointError(
            f"{folder}: its remote code has no {' or '.join(_REMOTE_CLASSES)}; found: {', '.join(sorted(classes))}"
        )
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    return model_config, get_class_from_dynamic_module(classes[asked_for], str(folder))


@torch.no_grad()
def _require_plain_head(folder: Path, model: Any) -> None:
    """Losses and diagnostics apply the output head to hidden states themselves: refuse a model that does more than that."""
    inputs = {"input_ids": _plain_ids(model), "use_cache": False}
    caller = model if model.base_model is not model else speaker_of(model)
    if not torch.equal(caller(**inputs).logits, last_hidden(model, inputs) @ head_of(model).T):
        raise CheckpointError(
            f"{folder}: the logits of {type(model).__name__} are not lm_head(hidden): they are scaled, capped or biased; "
            "such a model is not available in this version"
        )


def _plain_ids(model: Any) -> Tensor:
    """Eight tokens that are text: (1, 8) int64. Others, such as that of an image, may be replaced by a model."""
    special = {value for key, value in model.config.to_dict().items() if "token" in key and isinstance(value, int)}
    return torch.tensor([[token for token in range(len(head_of(model))) if token not in special][:8]])
