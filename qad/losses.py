"""Full-vocabulary losses from hidden states and output heads, in chunks over tokens.

Memory is O(chunk x vocabulary), never [tokens, vocabulary]; the gradient to the student's hidden states is formed in the
forward pass. The heads are frozen here: no gradient reaches them. Logits are products in the model's type, as the model
itself computes them; everything after is FP32.

Forward KL at temperature 1, a token: sum_v p_teacher(v) (log p_teacher(v) - log p_student(v)), in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Objective = Literal["kl", "ce"]
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class TokenDivergence:
    """Per-token figures of a student against its teacher, each (tokens,) float32; top1 is 1 where both argmax agree."""

    kl: Tensor
    ce: Tensor
    top1: Tensor


@torch.no_grad()
def token_divergence(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> TokenDivergence:
    """KL(teacher || student), cross entropy of the student against `labels`, and top-1 agreement, token by token.

    Args:
        student_hidden, teacher_hidden: (tokens, width) final hidden states, after the last norm.
        student_head, teacher_head: (vocabulary, width).
        labels: (tokens,) int64, the next tokens.
    """
    kl, ce, top1 = [], [], []
    for part in _chunks(len(labels)):
        student = _log_probabilities(student_hidden[part], student_head)
        teacher = _log_probabilities(teacher_hidden[part], teacher_head)
        kl.append(_kl(student, teacher))
        ce.append(-student.gather(1, labels[part, None]).squeeze(1))
        top1.append((student.argmax(dim=1) == teacher.argmax(dim=1)).float())
    return TokenDivergence(torch.cat(kl), torch.cat(ce), torch.cat(top1))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        labels: Tensor,
        n_tokens: int,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for part in _chunks(len(labels)):
            student = _log_probabilities(hidden[part], head)
            if teacher_hidden is None or teacher_head is None:
                loss -= student.gather(1, labels[part, None]).sum()
                logits_gradient = student.exp_()
                logits_gradient.scatter_add_(
                    1, labels[part, None], torch.full_like(labels[part, None], -1, dtype=torch.float32)
                )
            else:
                teacher = _log_probabilities(teacher_hidden[part], teacher_head)
                loss += _kl(student, teacher).sum()
                logits_gradient = student.exp_().sub_(teacher.exp_())
            gradient[part] = (logits_gradient / n_tokens).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return loss / n_tokens

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None, None


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, *, n_tokens: int) -> Tensor:
    """Sum of -log p_student(label) over `labels`, divided by `n_tokens`: the valid tokens of the optimizer step."""
    return _ChunkedLoss.apply(hidden, head, None, None, labels, n_tokens)


def forward_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor, *, n_tokens: int
) -> Tensor:
    """Sum of KL(teacher || student) over the tokens given, divided by `n_tokens`; shapes as in `token_divergence`."""
    return _ChunkedLoss.apply(hidden, head, teacher_hidden, teacher_head, labels, n_tokens)


def _chunks(n_tokens: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK_TOKENS) for start in range(0, n_tokens, CHUNK_TOKENS))


def _log_probabilities(hidden: Tensor, head: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ head.T).float(), dim=1)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum(dim=1)
