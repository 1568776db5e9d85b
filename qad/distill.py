"""The one training loop. Its objective makes it QAT (cross entropy) or QAD (forward KL to the teacher).

Weights are projected, not faked: the optimizer owns an FP32 master of every quantized weight; after each step the master
is encoded and the live BF16 weight becomes the decoded value. The backward pass is ordinary; the gradient of the live
weight, accumulated in FP32, is applied to the master (straight through). Tensor scales stay as calibrated; block scales
are recomputed from the master at each projection, or frozen as PTQ left them. With frozen ones the master starts as the
original weight, moved only as far as the border of the rounding cell of its code: step 0 is the PTQ checkpoint bit for bit,
and no master sits in the middle of its cell.

Trained are the quantized weights alone: embeddings, norms and the output head keep the teacher's values.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qad.cells import nearest_in_cell
from qad.errors import TrainingError
from qad.fp8 import Fp8Packed
from qad.kernels import checking_once
from qad.losses import Objective, cross_entropy, forward_kl
from qad.modules import QuantizedLinear, encoding_digest, quantized_linears
from qad.nvfp4 import Packed


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences of one optimizer step.

    input_ids (sequences, tokens) int64; attention_mask the same, 1 for real tokens; loss_mask the same, bool, True for a
    token that is to be predicted (its prediction comes from the position before it).
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    @property
    def n_tokens(self) -> int:
        return int(self.attention_mask.sum())


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW on the FP32 masters, linear warm-up, then linear decay to zero or a constant rate."""

    lr: float
    schedule: str = "linear"
    warmup_steps: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def lr_at(self, step: int, n_steps: int) -> float:
        """The rate of `step` (from 0): warm-up reaches `lr` at step `warmup_steps` - 1."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant" or step < self.warmup_steps:
            return self.lr * warm
        return self.lr * (n_steps - step) / max(1, n_steps - self.warmup_steps)


@dataclass(frozen=True)
class Step:
    """One optimizer step: `loss` in nats a token over `n_loss_tokens`, `grad_norm` before clipping."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    n_tokens: int
    n_loss_tokens: int
    saturated_weight_blocks: int
    seconds: float


@dataclass(frozen=True)
class Training:
    """What a training run did. `start_digest` is what the masters encode to before the first step."""

    steps: tuple[Step, ...]
    start_digest: str
    codes_changed: float
    block_scales_changed: float


def train(
    student: Any,
    teacher: Any | None,
    batches: Sequence[Batch],
    optimization: Optimization,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Training:
    """Train the quantized weights of `student` in place, one optimizer step a batch.

    Args:
        student: a transformers causal LM after `quantize_model`.
        teacher: the BF16 model; None trains on cross entropy with the tokens themselves (QAT).
    Raises:
        TrainingError: a loss that is not finite, a batch without a token to predict.
    """
    objective: Objective = "ce" if teacher is None else "kl"
    masters = Masters(student)
    masters.project()
    start_digest = encoding_digest(masters.modules)
    start = masters.encodings()
    optimizer = torch.optim.AdamW(
        masters.parameters, lr=optimization.lr, betas=optimization.betas, weight_decay=optimization.weight_decay
    )
    steps = []
    for index, batch in enumerate(batches):
        began = time.perf_counter()
        lr = optimization.lr_at(index, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr
        n_loss_tokens = int(batch.loss_mask[:, 1:].sum())
        if not n_loss_tokens:
            raise TrainingError(f"step {index}: no token to predict in the batch; is the response mask empty?")
        with checking_once():
            loss = batch_loss(student, teacher, batch, n_tokens=n_loss_tokens)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"step {index}: the {objective} loss is {value}; lower lr, or look at the batch before it")
        loss.backward()
        grad_norm = float(nn.utils.clip_grad_norm_(masters.parameters, optimization.clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        saturated = masters.project()
        step = Step(index, value, lr, grad_norm, batch.n_tokens, n_loss_tokens, saturated, time.perf_counter() - began)
        steps.append(step)
        on_step(step)
    codes_changed, block_scales_changed = masters.changed_since(start)
    masters.close()
    return Training(tuple(steps), start_digest, codes_changed, block_scales_changed)


class Masters:
    """FP32 masters of the quantized weights of a model, and the way of gradients to them and of values back."""

    def __init__(self, model: Any) -> None:
        self.modules: dict[str, QuantizedLinear] = quantized_linears(model)
        model.requires_grad_(False)
        self.parameters: list[nn.Parameter] = []
        self._handles = []
        for name, module in self.modules.items():
            master = nn.Parameter(_original(name, module))
            module.weight.requires_grad_(True)
            self._handles.append(module.weight.register_post_accumulate_grad_hook(_pass_on(master)))
            self.parameters.append(master)

    def project(self) -> int:
        """Encode every master and set the live weights; returns how many blocks saturate their tensor scale."""
        pairs = zip(self.modules.items(), self.parameters, strict=True)
        return sum(module.project(master, name=f"{name}.weight") for (name, module), master in pairs)

    def encodings(self) -> list[Packed | Fp8Packed]:
        return [module.encoding for module in self.modules.values() if module.encoding is not None]

    def changed_since(self, start: list[Packed | Fp8Packed]) -> tuple[float, float]:
        """Shares of codes and of block scales that differ from an earlier `encodings()`; FP8 layers have no block scales."""
        codes = changed_codes = scales = changed_scales = 0
        for now, old in zip(self.encodings(), start, strict=True):
            difference = now.tensors()[0] ^ old.tensors()[0]
            if isinstance(now, Packed) and isinstance(old, Packed):
                changed_codes += int(((difference & 0xF) != 0).sum() + ((difference >> 4) != 0).sum())
                codes += difference.numel() * 2
                changed_scales += int((now.tensors()[1] != old.tensors()[1]).sum())
                scales += now.block_scale.numel()
            else:
                changed_codes += int((difference != 0).sum())
                codes += difference.numel()
        return changed_codes / codes, changed_scales / max(1, scales)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self.modules.values():
            module.weight.requires_grad_(False)
            module.original = None


def _original(name: str, module: QuantizedLinear) -> Tensor:
    if module.original is None:
        raise ValueError(f"{name}: its weight before quantization is gone; train only what quantize_model made in memory")
    if module.frozen_block_scale is None:
        return module.original.float()
    assert isinstance(module.encoding, Packed)
    return nearest_in_cell(module.original, module.encoding, name=f"{name}.weight")


def _pass_on(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Move the gradient of a live weight to its master, added up in FP32."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    return hook


def batch_loss(student: Any, teacher: Any | None, batch: Batch, *, n_tokens: int) -> Tensor:
    """The loss of one batch: CE without a teacher, forward KL with one; masked positions are packed out first."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    predicted = batch.loss_mask[:, 1:]
    labels = batch.input_ids[:, 1:][predicted]
    teacher_hidden = None
    if teacher is not None:
        with torch.no_grad():
            teacher_hidden = teacher.base_model(**inputs).last_hidden_state[:, :-1][predicted]
    hidden = student.base_model(**inputs).last_hidden_state[:, :-1][predicted]
    head = student.get_output_embeddings().weight
    if teacher is None or teacher_hidden is None:
        return cross_entropy(hidden, head, labels, n_tokens=n_tokens)
    return forward_kl(hidden, head, teacher_hidden, teacher.get_output_embeddings().weight, labels, n_tokens=n_tokens)
