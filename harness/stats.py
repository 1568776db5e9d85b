"""Means with standard errors: pure functions on plain numbers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from qad.clustered import ratio_with_stderr


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
