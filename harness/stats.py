"""Means with standard errors, and what is made of several repeats of a question: pure functions on plain numbers.

Repeats of one question are no independent evidence: every figure over repeats is one number a question first, and its error is taken over
(clusters of) questions.

avg@k   the mean over questions of the mean over repeats
pass@k  the chance that at least one of k repeats is right, 1 - C(n-c, k) / C(n, k) for c right ones of n.
        Source: Chen et al. 2021, arXiv 2107.03374, section 2.1 (unbiased for independent repeats).
maj@k   the score of the answer that most of k repeats gave
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qad.clustered import ratio_with_stderr

INVALID = "[invalid]"
"""What an extraction gives where it finds no answer: it never wins a vote."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` questions and its standard error over clusters of them. No question: None, None, 0; one cluster: no error."""

    value: float | None
    stderr: float | None
    n: int


def mean_with_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float | None, float | None]:
    """The mean over questions and its standard error over clusters of questions (a cluster a question: the plain error).

    No value gives (None, None), one cluster (mean, None). ValueError if a value is NaN or infinite.
    """
    if not values:
        return None, None
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    return ratio_with_stderr([math.fsum(group) for group in groups.values()], [len(group) for group in groups.values()])


def question_means(values_by_question: Sequence[Sequence[float | None]], clusters: Sequence[Hashable]) -> Estimate:
    """avg@k: the mean over questions of the mean over the repeats that were scored.

    Every question weighs the same, however many of its repeats are missing (None); one without any is left out, and `n` says so.

    Args:
        values_by_question: for each question the scores of its repeats, in any order.
        clusters: for each question what it shares its error with; the question itself where it stands alone.
    """
    present = [[value for value in values if value is not None] for values in values_by_question]
    return _over_questions([math.fsum(values) / len(values) if values else None for values in present], clusters)


def question_pass_at_k(values_by_question: Sequence[Sequence[float | None]], clusters: Sequence[Hashable], k: int) -> Estimate:
    """pass@k over questions; one with fewer than k scored repeats is left out. ValueError for a score that is neither 0 nor 1."""
    present = [[value for value in values if value is not None] for values in values_by_question]
    if not is_binary(values_by_question):
        raise ValueError("pass@k needs scores of 0 and 1")
    return _over_questions([pass_at_k(len(values), sum(value == 1 for value in values), k) for values in present], clusters)


def question_maj_at_k(
    answers_by_question: Sequence[Sequence[str | None]],
    values_by_question: Sequence[Sequence[float | None]],
    clusters: Sequence[Hashable],
    k: int,
) -> Estimate:
    """maj@k over questions: the first k scored repeats vote; a question with fewer is left out.

    Args:
        answers_by_question: the extracted, canonical answer of each repeat beside its score; INVALID for one that is incomplete.
    """
    majorities = []
    for answers, values in zip(answers_by_question, values_by_question, strict=True):
        scored = [(answer, value) for answer, value in zip(answers, values, strict=True) if value is not None][:k]
        majorities.append(maj_at_k([a for a, _ in scored], [v for _, v in scored]) if len(scored) == k else None)
    return _over_questions(majorities, clusters)


def pass_at_k(n: int, c: int, k: int) -> float | None:
    """1 - C(n-c, k) / C(n, k): the chance that k of n repeats, drawn without replacement, hold one of the c right ones.

    None where there are fewer than k repeats. ValueError unless k >= 1 and 0 <= c <= n.
    """
    if k < 1 or not 0 <= c <= n:
        raise ValueError(f"pass@k of n = {n}, c = {c}, k = {k}: needs k >= 1 and 0 <= c <= n")
    return None if n < k else (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[float]) -> float | None:
    """The score of the answer that was given most often; None without answers.

    INVALID and None never win, however many they are; where nothing else was given the score is 0. Answers that tie share: the score is
    the mean over them, which is what a fair draw between them would score on average. Where one answer has several scores (a judge that
    wavers), its score is their mean.
    """
    if not answers:
        return None
    votes = Counter(answer for answer in answers if answer is not None and answer != INVALID)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    scores: dict[str | None, list[float]] = {}
    for answer, score in zip(answers, correct, strict=True):
        scores.setdefault(answer, []).append(score)
    return math.fsum(math.fsum(scores[answer]) / most for answer in winners) / len(winners)


def is_binary(values_by_question: Sequence[Sequence[float | None]]) -> bool:
    """Whether every score that is there is 0 or 1, so that pass@k means something."""
    return all(value in (0, 1, None) for values in values_by_question for value in values)


def _over_questions(values: Sequence[float | None], clusters: Sequence[Hashable]) -> Estimate:
    present = [(value, cluster) for value, cluster in zip(values, clusters, strict=True) if value is not None]
    return Estimate(*mean_with_stderr([value for value, _ in present], [cluster for _, cluster in present]), len(present))
