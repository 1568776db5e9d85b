"""Which layers a recipe leaves in BF16 by their position, as names of modules.

A *layer* is one of the decoder's blocks, counted from 0; of a hybrid model a block is attention, a state-space mixer or an MLP alone, each with a
number of its own. Positions are found by the structure of a model: its decoder (of a vision-language model its language backbone), the one list
of blocks in it, and the blocks that project keys and values. The output head, embeddings and a vision tower are never among them. Released
checkpoints follow the rules of arXiv 2601.20088: the first and last two layers (Nemotron Nano 9B V2), the layer before each attention layer
(Nemotron 3 Nano).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qad.backbone import decoder_of
from qad.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class LayerExceptions:
    """Layers that stay in BF16: the `first` and the `last` so many, and with `before_attention` the layer right before each attention layer.

    Raises:
        RecipeError: a number below 0, or no layer is named at all.
    """

    first: int = 0
    last: int = 0
    before_attention: bool = False

    def __post_init__(self) -> None:
        for key in ("first", "last"):
            if getattr(self, key) < 0:
                raise RecipeError(f"exclude_layers.{key}: found {getattr(self, key)}; allowed: 0 or more")
        if not (self.first or self.last or self.before_attention):
            raise RecipeError("exclude_layers names no layer; give first, last or before_attention, or remove it")


def excluded_by_position(model: Any, exceptions: LayerExceptions) -> tuple[str, ...]:
    """Names of the linear layers, those of opened experts among them, in the layers that stay, in the model's order.

    Raises:
        RecipeError: no one list of blocks is found, every layer would stay, no layer is before an attention layer, or none of what stays could be
            quantized anyway.
    """
    prefix, blocks = _blocks(model)
    has_attention = [any(hasattr(part, "k_proj") and hasattr(part, "v_proj") for part in block.modules()) for block in blocks]
    stays = set(range(exceptions.first)) | set(range(len(blocks) - exceptions.last, len(blocks)))
    if exceptions.before_attention:
        stays |= _before(has_attention, prefix)
    if not stays < set(range(len(blocks))):
        raise RecipeError(
            f"exclude_layers: all {len(blocks)} layers of {prefix} would stay in BF16; lower first ({exceptions.first}) or last "
            f"({exceptions.last})"
        )
    names = tuple(name for index in sorted(stays) for name in _quantizable(blocks[index], f"{prefix}.{index}"))
    if not names:
        raise RecipeError(
            f"exclude_layers: {prefix}.{', '.join(map(str, sorted(stays)))}: nothing in there could be quantized; remove exclude_layers"
        )
    return names


def _blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of the decoder's blocks, and its name."""
    decoder: Any = decoder_of(model)
    if decoder is model and hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
    lists = [part for part in decoder.children() if isinstance(part, nn.ModuleList)]
    if len(lists) != 1 or not len(lists[0]):
        found = f"{len(lists)} lists of modules" if len(lists) != 1 else "an empty list"
        raise RecipeError(
            f"exclude_layers: the decoder of {type(model).__name__} ({type(decoder).__name__}) has {found} where its layers should be one; "
            "name the layers by patterns in exclude"
        )
    return next(name for name, part in model.named_modules() if part is lists[0]), lists[0]


def _before(has_attention: list[bool], prefix: str) -> set[int]:
    """The layers right before an attention layer that have no attention themselves."""
    found = {index - 1 for index, has in enumerate(has_attention) if has and index > 0 and not has_attention[index - 1]}
    if not found:
        n = sum(has_attention)
        why = (
            "every layer has attention"
            if n == len(has_attention)
            else f"{n} of {len(has_attention)} layers have attention, none after another"
        )
        raise RecipeError(
            f"exclude_layers.before_attention matches no layer of {prefix}: {why}; it is for hybrid models, whose other layers stand "
            "between those of attention: remove it"
        )
    return found


def _quantizable(block: nn.Module, prefix: str) -> list[str]:
    """Names of what a recipe could quantize in a block."""
    return [f"{prefix}.{name}" for name, part in block.named_modules() if isinstance(part, nn.Linear)]
