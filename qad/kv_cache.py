"""The FP8 KV cache: keys and values rounded to E4M3 with one calibrated scale each, as the serving engine stores them.

Keys and values are intercepted where transformers hands them to the attention function: keys after the rotary embedding,
both with all cached positions. Rounding is idempotent at a fixed scale, so rounding the cached part again changes nothing.
The gradient passes straight through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qad.backbone import backbone_of, decoder_of, is_in
from qad.errors import RecipeError
from qad.straight_through import FakeQuantize

ATTENTION = "qad_kv_cache"
"""Name under which the intercepting attention function is registered with transformers."""


class KvCacheQuantizer(nn.Module):
    """Rounds the keys and values of one attention layer to FP8."""

    k_scale: Tensor
    v_scale: Tensor

    def __init__(self, name: str, k_scale: Tensor, v_scale: Tensor) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("k_scale", k_scale, persistent=False)
        self.register_buffer("v_scale", v_scale, persistent=False)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._round(key, self.k_scale, "keys"), self._round(value, self.v_scale, "values")

    def _round(self, x: Tensor, scale: Tensor, what: str) -> Tensor:
        return FakeQuantize.apply(x, scale, "fp8", f"{what} of {self.name}")


class _Recorder(nn.Module):
    """Keeps the largest magnitudes of keys and values, padding left out."""

    def __init__(self) -> None:
        super().__init__()
        self.k_amax = self.v_amax = torch.tensor(0.0)
        self.mask: Tensor | None = None
        self.seen = False

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = True
        self.k_amax, self.v_amax = self._larger(self.k_amax, key), self._larger(self.v_amax, value)
        return key, value

    def _larger(self, amax: Tensor, x: Tensor) -> Tensor:
        valid = x if self.mask is None else x.transpose(1, 2)[self.mask]
        return torch.maximum(amax, valid.abs().amax().float())


def attention_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the attention layers of the language backbone: the modules with a key and a value projection. RecipeError if there is none."""
    decoder = backbone_of(model).decoder
    found = tuple(
        name
        for name, module in model.named_modules()
        if is_in(name, decoder) and hasattr(module, "k_proj") and hasattr(module, "v_proj")
    )
    if not found:
        raise RecipeError(
            f'kv_cache = "fp8": {type(model).__name__} has no attention layer with k_proj and v_proj; remove kv_cache'
        )
    return found


def install(model: Any, scales: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Round keys and values of the attention layers named in `scales` (k_scale, v_scale: () float32)."""
    _intercept(model)
    for name, (k_scale, v_scale) in scales.items():
        model.get_submodule(name).kv_cache = KvCacheQuantizer(name, k_scale, v_scale)


def kv_cache_quantizers(model: nn.Module) -> dict[str, KvCacheQuantizer]:
    """The KV cache quantizers of `model` by the name of their attention layer."""
    return {module.name: module for module in model.modules() if isinstance(module, KvCacheQuantizer)}


@contextmanager
def recording(model: Any, names: tuple[str, ...]) -> Iterator[dict[str, _Recorder]]:
    """While it lasts, keys and values of the named layers are recorded; `mask` of a recorder leaves padding out."""
    decoder: Any = decoder_of(model)
    before = decoder.config._attn_implementation
    recorders = {name: _Recorder() for name in names}
    if names:
        _intercept(model)
    for name, recorder in recorders.items():
        model.get_submodule(name).kv_cache = recorder
    try:
        yield recorders
    finally:
        for name in names:
            del model.get_submodule(name).kv_cache
        if names:
            decoder.set_attn_implementation(before)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kv_cache = getattr(module, "kv_cache", None)
    if kv_cache is not None:
        key, value = kv_cache(key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _intercept(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    decoder: Any = decoder_of(model)
    if not decoder._can_set_attn_implementation():
        raise RecipeError(
            f'kv_cache = "fp8": the attention of {type(decoder).__name__} does not go through transformers\' attention '
            "interface, so its keys and values cannot be rounded; remove kv_cache"
        )
    decoder.set_attn_implementation(ATTENTION)
