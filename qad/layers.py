"""What is done to a model layer by layer before it is trained: activation checkpointing, compilation, sharding.

The layers are the decoder blocks that the model's class names (`_no_split_modules`). A vision tower and a projector, which are frozen
unless everything is trained, are sharded as part of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from qad import ranks
from qad.backbone import decoder_of
from qad.errors import TrainingError
from qad.experts import opened_experts
from qad.modules import input_quantizers


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder blocks of a transformers model, without those of a vision tower. TrainingError where its class names none."""
    decoder: Any = decoder_of(model)
    names = {*(model._no_split_modules or ()), *(getattr(decoder, "_no_split_modules", None) or ())}
    found = [module for module in decoder.modules() if type(module).__name__ in names]
    if not found:
        raise TrainingError(
            f"{type(model).__name__} does not say what its layers are (_no_split_modules): activation checkpointing, compile and "
            "sharding need them; train it on one device without these"
        )
    return found


def checkpoint_activations(model: Any) -> None:
    """Keep only the inputs of each layer for the backward pass, which computes the layer again."""
    for layer in layers_of(model):
        layer.forward = _recomputed(layer.forward)


def compile_layers(model: Any) -> None:
    """Compile each layer with torch.compile; input quantizers and experts stay as they are, between the compiled parts.

    Before `checkpoint_activations`, if that is wanted too: torch.compile leaves what checkpointing wraps as it is, and says nothing.
    """
    for quantizer in input_quantizers(model):
        quantizer.forward = torch.compiler.disable(quantizer.forward)  # type: ignore[method-assign]
    for experts in opened_experts(model).values():  # which of them run depends on the tokens
        experts.forward = torch.compiler.disable(experts.forward)  # type: ignore[method-assign]
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward)


def shard(whole: nn.Module, student: Any, teacher: Any | None) -> None:
    """Spread `whole`, the module in whose forward both models are called, over all ranks with FSDP2, layer by layer.

    Live parameters of the student become FP32 shards: gathered in the type that the student computes in, their
    gradients reduced in FP32. The teacher is frozen, and keeps its type: what is trained in one group must have one.
    """
    if teacher is not None:
        teacher.requires_grad_(False)
    mesh = init_device_mesh(ranks.device().type, (ranks.world_size(),))
    types = {parameter.dtype for model in (student, teacher) if model is not None for parameter in model.parameters()}
    if len(types) > 1:
        raise TrainingError(
            f"{type(student).__name__}: its parameters have several types ({', '.join(sorted(map(str, types)))}), which sharding would "
            "compute in one: train it on one rank"
        )
    (compute,) = types
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for model in (student, teacher):
        if model is not None:
            for layer in layers_of(model):
                if model is student:
                    layer.float()  # layer by layer, so that no rank holds a second whole copy
                fully_shard(layer, mesh=mesh, mp_policy=policy)
    student.float()
    fully_shard(whole, mesh=mesh, mp_policy=policy)


def _recomputed(forward: Any) -> Any:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return run
