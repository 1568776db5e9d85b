"""How far a candidate is from its teacher on fixed text: KL, CE, perplexity and top-1 agreement with errors.

Figures are kept as sums a sequence, so that any two candidates on the same text can be compared sequence by sequence.
Standard errors are over sequences: tokens of one sequence are far from independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qad.batch import Batch
from qad.clustered import ratio_with_stderr
from qad.errors import NonFiniteError
from qad.kernels import checking_once
from qad.losses import token_divergence


@dataclass(frozen=True)
class SequenceDivergence:
    """One sequence: per-token KL in nats, and sums of CE (nats) and of top-1 agreements, over some of its tokens."""

    kl: tuple[float, ...]
    ce_sum: float
    top1_sum: float

    @property
    def n_tokens(self) -> int:
        return len(self.kl)


@dataclass(frozen=True)
class Divergence:
    """Means a token over a text. kl, ce in nats; kl_stderr over sequences, None for fewer than two of them."""

    kl: float
    kl_stderr: float | None
    kl_p50: float
    kl_p99: float
    ce: float
    ppl: float
    top1: float
    n_tokens: int
    n_sequences: int


@torch.no_grad()
def final_hidden(model: Any, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Last hidden states (sequences, tokens, width) of `model`, batch by batch."""
    for batch in batches:
        with checking_once():
            hidden = model.base_model(**batch.to(model.device).inputs)
        yield hidden.last_hidden_state


def measure(
    candidate_hidden: Iterable[Tensor],
    candidate_head: Tensor,
    teacher_hidden: Iterable[Tensor],
    teacher_head: Tensor,
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[list[SequenceDivergence], list[SequenceDivergence]]:
    """Divergence of each sequence over its response tokens, and over all its tokens but the first.

    Args:
        candidate_hidden, teacher_hidden: as `final_hidden` yields them for `batches`.
        candidate_head, teacher_head: (vocabulary, width).
    Raises:
        NonFiniteError: a KL or CE that is not finite.
    """
    response: list[SequenceDivergence] = []
    everything: list[SequenceDivergence] = []
    for candidate, teacher, given in zip(candidate_hidden, teacher_hidden, batches, strict=True):
        batch = given.to(candidate.device)
        for row in range(len(batch.input_ids)):
            length = int(batch.attention_mask[row].sum())
            tokens = token_divergence(
                candidate[row, : length - 1],
                candidate_head,
                teacher[row, : length - 1],
                teacher_head,
                batch.input_ids[row, 1:length],
            )
            if not bool(torch.isfinite(tokens.kl).all() and torch.isfinite(tokens.ce).all()):
                raise NonFiniteError(
                    f"sequence {len(everything)}: KL or CE is NaN or infinite; the candidate's logits overflow"
                )
            mask = batch.loss_mask[row, 1:length]
            for found, chosen in ((response, mask), (everything, torch.ones_like(mask))):
                found.append(
                    SequenceDivergence(
                        tuple(tokens.kl[chosen].tolist()),
                        float(tokens.ce[chosen].double().sum()),
                        float(tokens.top1[chosen].sum()),
                    )
                )
        on_batch()
    return response, everything


def summarize(sequences: list[SequenceDivergence]) -> Divergence:
    """Token-weighted means over sequences that have tokens (ValueError if none has)."""
    used = [sequence for sequence in sequences if sequence.n_tokens]
    if not used:
        raise ValueError("no sequence has a token to measure")
    kl = torch.tensor([value for sequence in used for value in sequence.kl], dtype=torch.float64)
    n_tokens = len(kl)
    ce = sum(sequence.ce_sum for sequence in used) / n_tokens
    mean, stderr = ratio_with_stderr([sum(s.kl) for s in used], [s.n_tokens for s in used])
    return Divergence(
        kl=mean,
        kl_stderr=stderr,
        kl_p50=float(kl.quantile(0.5)),
        kl_p99=float(kl.quantile(0.99)),
        ce=ce,
        ppl=math.exp(ce),
        top1=sum(sequence.top1_sum for sequence in used) / n_tokens,
        n_tokens=n_tokens,
        n_sequences=len(used),
    )
