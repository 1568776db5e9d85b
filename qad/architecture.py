"""What transformers says about the architecture of a checkpoint, on shapes without weights: its tensors and linear layers.

Everything is given under the names that files use (`qad.stored_names`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from qad.backbone import backbone_of
from qad.building import native_class
from qad.errors import RecipeError
from qad.experts import open_experts
from qad.stored_names import loaded_names, stored_tensors


@dataclass(frozen=True)
class Architecture:
    """The architecture that a configuration describes. stored: the names of all tensors in its files, or those they decode to."""

    model: nn.Module
    stored: frozenset[str]

    @cached_property
    def own(self) -> dict[str, str]:
        """The name in the model of every stored tensor."""
        return loaded_names(self.model, self.stored)

    @cached_property
    def in_files(self) -> dict[str, str]:
        """The name in files of every tensor of the model; for one that they lack, what transformers would write."""
        found = {own: stored for stored, own in self.own.items()}
        tensors = self.model.state_dict()
        written = {own: stored for stored, (own, _) in stored_tensors(self.model, tensors).items() if own is not None}
        return {name: found.get(name, written.get(name, name)) for name in tensors}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the model."""
        return {self.in_files[name]: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @cached_property
    def are_floats(self) -> dict[str, bool]:
        """Whether a tensor holds numbers that are no integers."""
        return {self.in_files[name]: tensor.is_floating_point() for name, tensor in self.model.state_dict().items()}

    @cached_property
    def linears(self) -> dict[str, str]:
        """The linear layers: their names in files, with those in the model."""
        names = (name for name, module in self.model.named_modules() if isinstance(module, nn.Linear))
        return {self._layer(name): name for name in names}

    @cached_property
    def attention(self) -> set[str]:
        """The attention layers of the language backbone."""
        try:
            linears: Iterable[str] = backbone_of(self.model).linears
        except RecipeError:
            linears = self.linears.values()
        return {self._layer(name).rpartition(".")[0] for name in linears if name.endswith(".k_proj")}

    @cached_property
    def tied(self) -> set[str]:
        """Tensors that need not be stored, since they are the same as another one that is."""
        names = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(self.in_files[name])
        return {name for same in names.values() for name in same if any(other in self.stored for other in same)}

    def _layer(self, name: str) -> str:
        return self.in_files.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")


def architecture_of(config: dict[str, Any], stored: Iterable[str]) -> Architecture | None:
    """The architecture of the content of a config.json; None where transformers does not know it, or lacks a package for it."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        model_config, architecture = native_class(plain)
        with torch.device("meta"):
            model = architecture._from_config(model_config)
            open_experts(model)
            return Architecture(model, frozenset(stored))
    except (KeyError, ValueError, AttributeError, ImportError):
        return None
