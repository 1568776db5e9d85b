"""The standard error of a ratio over clusters; plain Python, no torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence


def ratio_with_stderr(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) and its standard error over the pairs, which are the clusters (None for fewer than two).

    se^2 = n/(n-1) * sum_i (sums_i - mean * counts_i)^2 / (sum counts)^2.  Source: Cochran, Sampling Techniques, 6.4.
    Raises ValueError if nothing was counted or a sum is not finite.
    """
    total = sum(counts)
    if not total:
        raise ValueError("nothing was counted")
    if not all(map(math.isfinite, sums)):
        raise ValueError("a sum is NaN or infinite")
    mean = math.fsum(sums) / total
    n = len(sums)
    if n < 2:
        return mean, None
    squares = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, math.sqrt(n / (n - 1) * squares) / total


def ratio_over_clusters(
    sums: Sequence[float], counts: Sequence[int], clusters: Sequence[Hashable]
) -> tuple[float, float | None]:
    """As `ratio_with_stderr`, where pairs of one cluster count as one; a cluster a pair gives the same, bit for bit."""
    groups: dict[Hashable, list[int]] = {}
    for index, cluster in enumerate(clusters):
        groups.setdefault(cluster, []).append(index)
    whole = [math.fsum(sums[i] for i in members) for members in groups.values()]
    return ratio_with_stderr(whole, [sum(counts[i] for i in members) for members in groups.values()])
