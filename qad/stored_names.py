"""What the tensors of a model are called in files: transformers renames many of an image-text model's when it loads them.

Serving engines know the names of files, so those are what a checkpoint is written with, in its tensors and in its configuration. In
memory, recipes and records name modules as the model does. Both directions ask transformers, by the renamings that it applies
itself in `from_pretrained` and `save_pretrained` (5.17, `core_model_loading.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def stored_tensors(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str | None, Tensor]]:
    """`tensors`, by their names in `model`, as they are stored: the name in files, with the name in the model and the tensor.

    The name in the model is None where loading does more than rename, so that what is stored is another tensor. The order is that of
    `tensors`, such ones last.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own = {id(tensor): name for name, tensor in tensors.items()}
    reverted = {id(tensor): (name, tensor) for name, tensor in revert_weight_conversion(model, dict(tensors)).items()}
    kept = {reverted[i][0]: (name, tensors[name]) for i, name in own.items() if i in reverted}
    return kept | {name: (None, tensor) for i, (name, tensor) in reverted.items() if i not in own}


def stored_layers(model: Any) -> dict[str, str]:
    """The names in files of the modules of `model` that have a weight."""
    named = {name: own for name, (own, _) in stored_tensors(model, model.state_dict()).items() if own is not None}
    return {own.removesuffix(".weight"): name.removesuffix(".weight") for name, own in named.items() if own.endswith(".weight")}


def loaded_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The names in `model` of tensors that files call `stored`; what it has no place for keeps some name.

    Converters make stacks of experts: where these are opened, renaming alone finds the place of each.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    own = model.state_dict()
    prefix = model.base_model_prefix
    attempts: tuple[tuple[list[Any], list[Any]], ...] = ((renamings, converters), (renamings, []), ([], []))
    found = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed = [rename_source_key(name, *attempt, prefix, own)[0] for attempt in attempts]
        found[name] = next((each for each in renamed if each in own), renamed[0])
    return found


def loaded_layers(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The names in `model` of modules that files call `stored`, each of which has a weight."""
    weights = loaded_names(model, [f"{name}.weight" for name in stored])
    return {name.removesuffix(".weight"): own.removesuffix(".weight") for name, own in weights.items()}
