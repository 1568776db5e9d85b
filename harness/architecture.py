"""What a model is made of, as plain values: its weights with names and shapes, and what each layer computes. No torch.

Read from a configuration by `harness.architecture_sizes`; memory, time and disk are derived from it by `harness.memory_model`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from harness.hardware import BF16, FP8_BYTES

Kind = Literal["linear", "experts", "embedding", "head", "other", "vision"]
"""Classes of weights. A recipe quantizes "linear" and "experts", and "head" where it does not exclude it; "other" is norms, routers,
convolutions, biases, states."""


@dataclass(frozen=True)
class Weight:
    """A parameter of a model. active: the share of it that one token is multiplied with (experts: those it is routed to)."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    active: float = 1.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """What a pattern of a recipe is held against."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Attention:
    """heads and kv_heads of head_dim. has_norms: queries and keys are normed.

    latent: numbers a token that the cache of all heads holds in place of keys and values (MLA, arXiv 2412.19437); 0 without.
    """

    heads: int
    kv_heads: int
    head_dim: int
    has_norms: bool = False
    latent: int = 0


@dataclass(frozen=True)
class Mlp:
    """inner: its width. gated: whether it has a gate beside the way up."""

    inner: int
    gated: bool


@dataclass(frozen=True)
class Experts:
    """`count` of them, each `inner` wide, of which a token goes to `active`; width: of their input. shared: of what all tokens take."""

    count: int
    active: int
    inner: int
    width: int
    gated: bool
    shared: int = 0


@dataclass(frozen=True)
class Mamba:
    """A Mamba-2 mixer: heads of head_dim, groups with a state of `state`, a convolution over `kernel` tokens, chunks of `chunk`."""

    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int
    chunk: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.groups * self.state


Part = Attention | Mlp | Experts | Mamba


@dataclass(frozen=True)
class Layer:
    """A decoder block: what checkpointing and sharding take as one. Each of its parts has a norm before it."""

    parts: tuple[Part, ...]
    weights: tuple[Weight, ...]

    @property
    def size(self) -> int:
        return sum(weight.size for weight in self.weights)


@dataclass(frozen=True)
class Architecture:
    """A whole model. outside: embeddings, output head, final norm, vision. notes: what of it is an estimate. is_fp8: released so, not in BF16."""

    model_type: str
    width: int
    vocabulary: int
    context: int
    layers: tuple[Layer, ...]
    outside: tuple[Weight, ...]
    notes: tuple[str, ...] = ()
    is_fp8: bool = False

    @property
    def weights(self) -> Iterator[Weight]:
        yield from self.outside
        for layer in self.layers:
            yield from layer.weights

    @cached_property
    def size(self) -> int:
        """Parameters; a tied output head counts once."""
        return sum(weight.size for weight in self.weights)

    @cached_property
    def stored_bytes(self) -> int:
        """Of the release: two bytes a parameter, or one of each in a linear layer where it is in FP8."""
        eights = sum(w.size for w in self.weights if w.kind in ("linear", "experts")) if self.is_fp8 else 0
        return BF16 * self.size - (BF16 - FP8_BYTES) * eights

    @cached_property
    def active(self) -> float:
        """Parameters that a token is multiplied with: all but the embedding (where it is no head too) and the experts not taken."""
        is_tied = not any(weight.kind == "head" for weight in self.outside)
        return sum(w.size * w.active for w in self.weights if w.kind != "vision" and (w.kind != "embedding" or is_tied))

    @property
    def outside_size(self) -> int:
        return sum(weight.size for weight in self.outside)

    @property
    def has_experts(self) -> bool:
        return any(weight.kind == "experts" for weight in self.weights)

    def parts(self, kind: type[Part]) -> list[Any]:
        """The parts of one kind, layer by layer."""
        return [part for layer in self.layers for part in layer.parts if isinstance(part, kind)]

    @cached_property
    def speaker(self) -> str:
        """What the names of a language model inside of a larger one begin with: patterns may leave it out. Empty for a language model."""
        head = next((weight.module for weight in self.outside if weight.kind == "head"), "")
        return head.removesuffix("lm_head")
