"""How far a candidate is from its teacher on fixed text: KL, CE, perplexity and top-1 agreement with errors.

Figures are kept for each sequence, so that any two candidates on the same text can be compared sequence by sequence.
Standard errors are over sequences, or over clusters of them such as the answers to one question: tokens of one sequence
are far from independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qad.backbone import last_hidden
from qad.batch import Batch
from qad.clustered import ratio_over_clusters
from qad.errors import NonFiniteError
from qad.kernels import checking_once
from qad.losses import token_divergence


@dataclass(frozen=True, eq=False)
class SequenceDivergence:
    """Some tokens of one sequence, in order: KL and CE in nats and top-1 agreement (0 or 1), each (tokens,) float32 on the CPU."""

    kl: Tensor
    ce: Tensor
    top1: Tensor

    @property
    def n_tokens(self) -> int:
        return len(self.kl)

    @property
    def kl_sum(self) -> float:
        return math.fsum(self.kl.tolist())

    @property
    def ce_sum(self) -> float:
        return float(self.ce.double().sum())

    @property
    def top1_sum(self) -> float:
        return float(self.top1.double().sum())

    def at(self, places: slice | Tensor) -> SequenceDivergence:
        """Some of its tokens: a slice of them, or those that a mask (tokens,) bool marks."""
        return SequenceDivergence(self.kl[places], self.ce[places], self.top1[places])


@dataclass(frozen=True)
class Divergence:
    """Means a token over a text. kl, ce in nats; kl_stderr over sequences or their clusters, None for fewer than two of them."""

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
            hidden = last_hidden(model, batch.to(model.device).inputs)
        yield hidden


def measure(
    candidate_hidden: Iterable[Tensor],
    candidate_head: Tensor,
    teacher_hidden: Iterable[Tensor],
    teacher_head: Tensor,
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[list[SequenceDivergence], list[SequenceDivergence]]:
    """Divergence of each sequence over its response tokens, and over all its tokens but the first and those that stand for an image.

    Args:
        candidate_hidden, teacher_hidden: as `final_hidden` yields them for `batches`.
        candidate_head, teacher_head: (vocabulary, width).
    Raises:
        NonFiniteError: a KL or CE that is not finite.
    """
    response: list[SequenceDivergence] = []
    everything: list[SequenceDivergence] = []
    for found, mask in _sequences(
        candidate_hidden, candidate_head, teacher_hidden, teacher_head, batches, on_batch, response_alone=False
    ):
        everything.append(found)
        response.append(found.at(mask))
    return response, everything


def measure_responses(
    candidate_hidden: Iterable[Tensor],
    candidate_head: Tensor,
    teacher_hidden: Iterable[Tensor],
    teacher_head: Tensor,
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> list[SequenceDivergence]:
    """As `measure`, over response tokens alone: prompts, which may be long, cost no product with a head."""
    rows = _sequences(candidate_hidden, candidate_head, teacher_hidden, teacher_head, batches, on_batch, response_alone=True)
    return [found for found, _ in rows]


def _sequences(
    candidate_hidden: Iterable[Tensor],
    candidate_head: Tensor,
    teacher_hidden: Iterable[Tensor],
    teacher_head: Tensor,
    batches: Iterable[Batch],
    on_batch: Callable[[], None],
    *,
    response_alone: bool,
) -> Iterator[tuple[SequenceDivergence, Tensor]]:
    """Row by row: the divergence of its text tokens but the first, or of its response alone, and which of them are response."""
    place = 0
    for candidate, teacher, given in zip(candidate_hidden, teacher_hidden, batches, strict=True):
        batch = given.to(candidate.device)
        for row in range(len(batch.input_ids)):
            length = int(batch.attention_mask[row].sum())
            mask = batch.predicted[row, : length - 1]
            used = mask if response_alone else batch.is_text[row, 1:length]
            tokens = token_divergence(
                candidate[row, : length - 1][used],
                candidate_head,
                teacher[row, : length - 1][used],
                teacher_head,
                batch.input_ids[row, 1:length][used],
            )
            if not bool(torch.isfinite(tokens.kl).all() and torch.isfinite(tokens.ce).all()):
                raise NonFiniteError(f"sequence {place}: KL or CE is NaN or infinite; the candidate's logits overflow")
            yield SequenceDivergence(tokens.kl.cpu(), tokens.ce.cpu(), tokens.top1.cpu()), mask[used].cpu()
            place += 1
        on_batch()


def summarize(sequences: Sequence[SequenceDivergence], clusters: Sequence[Hashable] | None = None) -> Divergence:
    """Token-weighted means over sequences that have tokens (ValueError if none has).

    clusters: of each sequence, where related ones (answers to one question) are one observation for the error.
    """
    found = list(zip(sequences, range(len(sequences)) if clusters is None else clusters, strict=True))
    used = [(sequence, cluster) for sequence, cluster in found if sequence.n_tokens]
    if not used:
        raise ValueError("no sequence has a token to measure")
    kl = torch.cat([sequence.kl for sequence, _ in used]).double()
    n_tokens = len(kl)
    ce = sum(sequence.ce_sum for sequence, _ in used) / n_tokens
    sums, counts = [sum(s.kl.tolist()) for s, _ in used], [s.n_tokens for s, _ in used]
    mean, stderr = ratio_over_clusters(sums, counts, [cluster for _, cluster in used])
    p50, p99 = _quantiles(kl, 0.5, 0.99)
    return Divergence(
        kl=mean,
        kl_stderr=stderr,
        kl_p50=p50,
        kl_p99=p99,
        ce=ce,
        ppl=math.exp(ce),
        top1=sum(sequence.top1_sum for sequence, _ in used) / n_tokens,
        n_tokens=n_tokens,
        n_sequences=len(used),
    )


def _quantiles(values: Tensor, *shares: float) -> list[float]:
    """Quantiles with linear interpolation, as torch.quantile, which refuses more than 2^24 values."""
    ordered = values.sort().values
    places = torch.tensor(shares, dtype=torch.float64) * (len(values) - 1)
    below = places.floor().long()
    return torch.lerp(ordered[below], ordered[places.ceil().long()], places - below).tolist()
