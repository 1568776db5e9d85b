"""The language backbone of a model, found by its structure: which linear layers read text, and where its hidden states are.

A vision-language model is a decoder beside parts that turn images into embeddings: a vision tower, a projector. Only the decoder
and the output head are quantized. They are found without names, from the inside out:

- the *speaker* is the outermost module that has an output head: the model itself, or a causal language model that remote code holds;
- the *decoder* is the smallest module around its token embedding that also holds a stack of blocks with linear layers;
- a part inside the decoder with a stack of its own, beside stacks that the decoder holds itself, is a tower too.

A model of text alone is one part; all of it is the backbone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qad.errors import RecipeError

_TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache"}


@dataclass(frozen=True)
class Backbone:
    """speaker, decoder: names of these modules, "" for the model itself. linears: names of the linear layers that read text, the output
    head among them. outside: names of those of vision towers and projectors. Both in the model's order."""

    speaker: str
    decoder: str
    linears: tuple[str, ...]
    outside: tuple[str, ...]


def backbone_of(model: nn.Module) -> Backbone:
    """What of `model` reads text.

    Raises:
        RecipeError: a model of several parts whose decoder cannot be told from them.
    """
    linears = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    found = _speaker(model)
    decoder = None if found is None else _decoder(*found)
    if found is None or decoder is None:
        if _has_several_configurations(model):
            raise RecipeError(
                f"{type(model).__name__}: its language backbone is not to be found: "
                + (
                    "no part has an output head"
                    if found is None
                    else "no stack of decoder blocks goes with the token embedding"
                )
                + "; such a model is not available in this version"
            )
        return Backbone("", "", linears, ())
    name, module = decoder
    towers = [_join(name, child) for child in _towers_inside(module)]
    head = _name_of(model, found[1].get_output_embeddings())
    inside = tuple(n for n in linears if n == head or (is_in(n, name) and not any(is_in(n, tower) for tower in towers)))
    outside = tuple(n for n in linears if n not in inside)
    if not (towers or _has_several_configurations(model) or _has_models_outside(model, name)):
        return Backbone("", "", linears, ())
    return Backbone(found[0], name, inside, outside)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that holds the decoder blocks; the model itself where it has one part."""
    return model.get_submodule(backbone_of(model).decoder)


def last_hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The hidden states (sequences, tokens, width) that the output head reads, for the inputs of `Batch.inputs`.

    A model without a base model of its own (remote code around a causal language model) is called whole where there are images.
    """
    if model.base_model is not model:
        return model.base_model(**inputs).last_hidden_state
    inner = speaker_of(model).base_model
    if set(inputs) <= _TEXT_INPUTS:
        return inner(**inputs).last_hidden_state
    kept: list[Tensor] = []
    handle = inner.register_forward_hook(lambda module, given, output: kept.append(output.last_hidden_state))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return kept[-1]


def head_of(model: Any) -> Tensor:
    """The weight (vocabulary, width) of the output head."""
    return speaker_of(model).get_output_embeddings().weight


def speaker_of(model: Any) -> Any:
    """The outermost part that has an output head. RecipeError where none has."""
    found = _speaker(model)
    if found is None:
        raise RecipeError(f"{type(model).__name__}: no part of it has an output head; only language models can be quantized")
    return found[1]


def _speaker(model: nn.Module) -> tuple[str, Any] | None:
    for name, module in model.named_modules():
        head = getattr(module, "get_output_embeddings", None)
        if head is not None and isinstance(head(), nn.Linear):
            return name, module
    return None


def _decoder(speaker_name: str, speaker: Any) -> tuple[str, nn.Module] | None:
    """The smallest module around the token embedding that also holds a stack of blocks, by its name in the whole model."""
    embedding = speaker.get_input_embeddings()
    around = _name_of(speaker, embedding)
    while around:
        around = around.rpartition(".")[0]
        module = speaker.get_submodule(around)
        if any(True for _ in _stacks(module)):
            return _join(speaker_name, around), module
    return None


def _towers_inside(decoder: nn.Module) -> list[str]:
    children = dict(decoder.named_children())
    own = {name for name, child in children.items() if _is_stack(child)}
    return [name for name, child in children.items() if own and name not in own and any(True for _ in _stacks(child))]


def _stacks(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for inner in module.modules() if _is_stack(inner))


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(
        isinstance(inner, nn.Linear) for block in module for inner in block.modules() if inner is not block
    )


def _has_several_configurations(model: Any) -> bool:
    config = getattr(model, "config", None)
    return config is not None and hasattr(config, "get_text_config") and config.get_text_config() is not config


def _has_models_outside(model: nn.Module, decoder: str) -> bool:
    """Whether a model of its own, with linear layers, stands beside the decoder."""
    from transformers import PreTrainedModel

    return any(
        isinstance(module, PreTrainedModel)
        and not is_in(name, decoder)
        and not is_in(decoder, name)
        and any(isinstance(inner, nn.Linear) for inner in module.modules())
        for name, module in model.named_modules()
    )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def is_in(name: str, parent: str) -> bool:
    """Whether the module `name` is `parent` or inside it; everything is inside ""."""
    return not parent or name == parent or name.startswith(f"{parent}.")


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent and name else parent or name
