"""Full-vocabulary losses from hidden states and output heads, in chunks over tokens: one routine for training and diagnostics.

Memory is O(chunk x vocabulary), never [tokens, vocabulary]; the gradient is formed in the forward pass. Logits are
products in the model's type, as the model itself computes them; everything after is FP32, and so is the sum of a head's
gradient over the chunks. Positions that do not count are left out by the caller, before the products.

With logits z of a token, p = softmax(z), t the teacher, s the student, V the vocabulary and T the temperature, in nats:

    kl      T^2 sum_v p_t(v) (log p_t(v) - log p_s(v)), both p of z / T     d/dz_s = T (p_s - p_t)
    ce      -log p_s(label)                                                 d/dz_s = p_s - onehot(label)
    mse     sum_v (z_s(v) - z_t(v))^2 / V                                   d/dz_s = 2 (z_s - z_t) / V
    kl_ce   (1 - ce_weight) kl + ce_weight ce

Each is summed over the tokens given and divided by the tokens of the whole optimizer step, over micro-batches and ranks.
T^2 keeps the size of the gradient where T changes (Hinton et al., arXiv 1503.02531, section 2).

NaN and infinity are not looked for here: they reach the loss and the sums, which the caller checks. A bias of the output
head is not supported. Under FSDP2 this is called inside the wrapped forward, where the head is whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Loss = Literal["kl", "ce", "mse", "kl_ce"]
CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    temperature: of "kl" and of the KL in "kl_ce", for both distributions; the loss carries its square.
    ce_weight: of "kl_ce" alone, between 0 and 1, both excluded.
    """

    loss: Loss
    temperature: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss: {self.loss!r} is not known; allowed: {', '.join(get_args(Loss))}")
        has_kl = self.loss in ("kl", "kl_ce")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature} is not a positive number")
        if self.temperature != 1 and not has_kl:
            raise ValueError(f'temperature: {self.temperature} with loss "{self.loss}", which has none; use "kl" or "kl_ce"')
        if self.loss == "kl_ce" and not 0 < self.ce_weight < 1:
            raise ValueError(
                f'ce_weight: {self.ce_weight} with loss "kl_ce"; give a number between 0 and 1, or use "kl" or "ce"'
            )
        if self.loss != "kl_ce" and self.ce_weight != 0:
            raise ValueError(f'ce_weight: {self.ce_weight} with loss "{self.loss}", which has none; use "kl_ce"')

    @property
    def needs_teacher(self) -> bool:
        return self.loss != "ce"


@dataclass(frozen=True)
class LossSums:
    """Sums over the tokens given, () float64 without a gradient, on the device of the hidden states.

    objective: what is minimised, before it is divided. kl: at temperature 1, None without a teacher.
    """

    objective: Tensor
    kl: Tensor | None
    ce: Tensor


@dataclass(frozen=True)
class TokenDivergence:
    """Per-token figures of a student against its teacher, each (tokens,) float32; top1 is 1 where both argmax agree."""

    kl: Tensor
    ce: Tensor
    top1: Tensor


def chunked_loss(
    objective: Objective,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    n_tokens: float,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, LossSums]:
    """The loss, () float32, with a gradient to `hidden` and `head` where they require one; and the sums to log.

    No tokens give a loss of 0 and gradients of 0. Calls with a common `n_tokens` add up, in values and gradients.

    Args:
        hidden: (tokens, width) final hidden states, after the last norm.
        head: (vocabulary, width), whole: not a shard. Tied to the embedding, its gradient joins the embedding's.
        labels: (tokens,) int64, the next tokens.
        teacher_hidden, teacher_head: the same of the teacher, its width may differ; no gradient flows there.
        n_tokens: tokens of the whole optimizer step, over micro-batches and ranks: what the sum is divided by.
        chunk_tokens: how many tokens have logits at a time.
    Raises:
        ValueError: shapes or vocabularies that differ, a missing teacher, a sharded head, `n_tokens` not positive.
    """
    if objective.needs_teacher and teacher_hidden is None:
        raise ValueError(f'loss "{objective.loss}": no teacher_hidden; every loss but "ce" compares with a teacher')
    if not n_tokens > 0:
        raise ValueError(f"n_tokens: {n_tokens}; give the number of tokens of the optimizer step, at least 1")
    student = _Model(hidden, head)
    teacher = _teacher(teacher_hidden, teacher_head)
    _require_alike(student, teacher, labels)
    wants_hidden, wants_head = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, head))
    with torch.no_grad():
        values, kl, ce = (torch.zeros(len(labels), dtype=torch.float32, device=hidden.device) for _ in range(3))
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        head_gradient = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        for part in _chunks(len(labels), chunk_tokens):
            chunk = _Chunk(student, teacher, labels, part)
            ce[part] = chunk.ce
            if chunk.kl is not None:
                kl[part] = chunk.kl
            values[part], logits_gradient = _minimised(objective, chunk)
            logits_gradient = logits_gradient.to(head.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = logits_gradient @ head
            if head_gradient is not None:
                head_gradient += logits_gradient.T @ hidden[part]
            del chunk, logits_gradient  # before the next one is made: two would be there at once
        sums = LossSums(values.double().sum(), None if teacher is None else kl.double().sum(), ce.double().sum())
        loss = (sums.objective / n_tokens).float()
    if wants_hidden or wants_head:
        loss = _WithGradient.apply(hidden, head, loss, hidden_gradient, head_gradient, n_tokens)
    return loss, sums


@torch.no_grad()
def token_divergence(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> TokenDivergence:
    """KL(teacher || student), cross entropy of the student against `labels`, and top-1 agreement, token by token.

    The figures whose sums `chunked_loss` returns, bit for bit; arguments as there.
    """
    student, teacher = _Model(student_hidden, student_head), _Model(teacher_hidden, teacher_head)
    _require_alike(student, teacher, labels)
    kl, ce, top1 = (torch.zeros(len(labels), dtype=torch.float32, device=student_hidden.device) for _ in range(3))
    for part in _chunks(len(labels), CHUNK_TOKENS):
        chunk = _Chunk(student, teacher, labels, part)
        assert chunk.teacher is not None and chunk.kl is not None
        kl[part], ce[part] = chunk.kl, chunk.ce
        top1[part] = (chunk.student.logits.argmax(dim=1) == chunk.teacher.logits.argmax(dim=1)).float()
        del chunk
    return TokenDivergence(kl, ce, top1)


@dataclass(frozen=True)
class _Model:
    hidden: Tensor
    head: Tensor


class _Distribution:
    """Logits (chunk, vocabulary) float32, p = softmax of them; log_sum_v exp(logit) is top + log_sum, each (chunk,).

    The two are added last, so that large logits cost no digits.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.p = torch.softmax(logits, dim=1)
        self.top = logits.amax(dim=1)
        self.log_sum = -self.p.amax(dim=1).log()  # the largest p is exp(0) over the denominator


class _Chunk:
    """Both models on some of the tokens; ce and, with a teacher, kl at temperature 1, each (chunk,) float32."""

    def __init__(self, student: _Model, teacher: _Model | None, labels: Tensor, part: slice) -> None:
        self.labels = labels[part, None]
        self.student = _Distribution((student.hidden[part] @ student.head.T).float())
        self.ce = self.student.top - self.student.logits.gather(1, self.labels).squeeze(1) + self.student.log_sum
        self.teacher: _Distribution | None = None
        self.kl: Tensor | None = None
        if teacher is not None:
            self.teacher = _Distribution((teacher.hidden[part] @ teacher.head.T).float())
            self.kl = _kl(self.teacher, self.student)


def _kl(teacher: _Distribution, student: _Distribution) -> Tensor:
    weighed = (teacher.logits - student.logits).mul_(teacher.p)
    return weighed.sum(dim=1) + (student.top - teacher.top) + (student.log_sum - teacher.log_sum)


def _minimised(objective: Objective, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """The objective (chunk,) and its gradient to the student's logits (chunk, vocabulary), written over what `chunk` holds."""
    if objective.loss == "ce":
        return chunk.ce, _less_one(chunk.student.p, chunk.labels)
    assert chunk.teacher is not None and chunk.kl is not None
    if objective.loss == "mse":
        difference = chunk.student.logits.sub_(chunk.teacher.logits)
        return difference.square().mean(dim=1), difference.mul_(2 / difference.shape[1])
    if objective.temperature != 1:
        student, teacher = (_Distribution(x.logits.div_(objective.temperature)) for x in (chunk.student, chunk.teacher))
        kl = _kl(teacher, student) * objective.temperature**2
        gradient = student.p.sub_(teacher.p).mul_(objective.temperature)
    else:
        kl = chunk.kl
        gradient = torch.sub(chunk.student.p, chunk.teacher.p, out=chunk.teacher.p)
    if objective.loss == "kl":
        return kl, gradient
    weight = objective.ce_weight
    ce_gradient = _less_one(chunk.student.p, chunk.labels)
    return (1 - weight) * kl + weight * chunk.ce, gradient.mul_(1 - weight).add_(ce_gradient, alpha=weight)


def _less_one(p: Tensor, labels: Tensor) -> Tensor:
    return p.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=p.dtype))


class _WithGradient(torch.autograd.Function):
    """A loss whose gradients, times `n_tokens`, are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        loss: Tensor,
        hidden_gradient: Tensor | None,
        head_gradient: Tensor | None,
        n_tokens: float,
    ) -> Tensor:
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.n_tokens, ctx.head_dtype = n_tokens, head.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        factor = gradient / ctx.n_tokens
        hidden_gradient, head_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = (hidden_gradient.float() * factor).to(hidden_gradient.dtype)
        if head_gradient is not None:
            head_gradient = (head_gradient * factor).to(ctx.head_dtype)
        return hidden_gradient, head_gradient, None, None, None, None


def _chunks(n_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, start + chunk_tokens) for start in range(0, n_tokens, chunk_tokens))


def _teacher(hidden: Tensor | None, head: Tensor | None) -> _Model | None:
    if hidden is None and head is None:
        return None
    if hidden is None or head is None:
        raise ValueError("teacher_hidden and teacher_head: one of the two is missing; give both or neither")
    return _Model(hidden, head)


def _require_alike(student: _Model, teacher: _Model | None, labels: Tensor) -> None:
    """The shapes fit, the vocabularies are equal, nothing is sharded. ValueError otherwise."""
    tensor = sys.modules.get("torch.distributed.tensor")  # a second to import, and no DTensor exists before it is
    for who, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        if tensor is not None and any(isinstance(x, tensor.DTensor) for x in (model.hidden, model.head)):
            raise ValueError(
                f"{who}: hidden states or head are a DTensor; call the loss inside the forward pass that fully_shard wraps, "
                "where the head is whole"
            )
        if model.hidden.shape != (len(labels), model.head.shape[1]):
            raise ValueError(
                f"{who}: hidden states of shape {tuple(model.hidden.shape)} with a head of shape {tuple(model.head.shape)} and "
                f"{len(labels)} labels; allowed: (tokens, width), (vocabulary, width), (tokens,)"
            )
    if teacher is not None and len(teacher.head) != len(student.head):
        raise ValueError(
            f"the teacher's vocabulary has {len(teacher.head)} tokens, the student's {len(student.head)}; "
            "KL and MSE compare them token by token: take a teacher with the student's tokenizer"
        )
