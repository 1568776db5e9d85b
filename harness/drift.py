"""What moved between two runs of a suite, or two variants of one: KL and scores that differ by more than chance. No torch.

Everything is paired: scores by question (`harness.paired`, sign-flip permutation over clusters), KL by held-out sequence (t over clusters).
Of all comparisons that are made together, those count that Holm's correction leaves at P_VALUE: of the nights in which nothing changed, one in
twenty tells of a shift. What cannot be paired is said, never compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from harness.controls import is_control
from harness.errors import StoreError
from harness.paired import holm, paired_difference
from harness.pairs import cluster_of, same_sequence
from qad.clustered import ratio_over_clusters

if TYPE_CHECKING:
    from harness.evidence import RunEvidence

P_VALUE = 0.05


@dataclass(frozen=True)
class Shift:
    """One figure of `variant`, now less before: `what` is a task, in points, or "KL", in nats a token. p: two-sided, before Holm."""

    variant: str
    what: str
    change: float
    stderr: float | None
    p: float

    def __str__(self) -> str:
        digits, unit = (3, "") if self.what == "KL" else (1, " points")
        error = "" if self.stderr is None else f" ±{self.stderr:.{digits}f}"
        return f"{self.what} {self.change:+.{digits}f}{error}{unit}"


@dataclass(frozen=True)
class Drift:
    """shifts: beyond the noise, the surest first. n_compared: figures that were compared. refused: why others were not, as sentences."""

    shifts: tuple[Shift, ...]
    n_compared: int
    refused: tuple[str, ...]

    def sentence(self, *, names_variants: bool = True) -> str:
        """In one line what moved."""
        still = self.n_compared - len(self.shifts)
        rest = f"{still} figure{'s' if still > 1 else ''} within the noise" if still else ""
        moved = ", ".join(f"{shift.variant} {shift}" if names_variants else str(shift) for shift in self.shifts)
        told = "; ".join(part for part in (moved, rest) if part) or "nothing could be compared"
        return told + (f"; not compared: {'; '.join(self.refused)}" if self.refused else "")

    def as_record(self) -> dict[str, Any]:
        return {
            "shifts": [asdict(shift) for shift in self.shifts],
            "n_compared": self.n_compared,
            "refused": list(self.refused),
        }


def drift(before: RunEvidence, after: RunEvidence, *, variants: Iterable[tuple[str, str]]) -> Drift:
    """What moved from `before` to `after`, of the variants that are given as (its name before, its name after)."""
    found: list[Shift] = []
    refused: list[str] = []
    for old, new in variants:
        for task in dict.fromkeys([*before.tasks, *after.tasks]):
            _into(found, refused, _score_shift(before, after, old, new, task))
        _into(found, refused, _kl_shift(before, after, old, new))
    adjusted = holm([shift.p for shift in found])
    kept = [shift for shift, p in zip(found, adjusted, strict=True) if p <= P_VALUE]
    return Drift(tuple(sorted(kept, key=lambda shift: shift.p)), len(found), tuple(refused))


def _into(found: list[Shift], refused: list[str], result: Shift | str | None) -> None:
    if isinstance(result, Shift):
        found.append(result)
    elif result is not None:
        refused.append(result)


def _score_shift(before: RunEvidence, after: RunEvidence, old: str, new: str, task: str) -> Shift | str | None:
    """The change in a task, or why there is none to tell; None where neither has the task, and of a control, which has no scores."""
    from harness.comparable import differences
    from harness.evidence import pair

    first, second = before.answers(old, task), after.answers(new, task)
    if first is None or second is None:
        return None if first is second else f"{new} {task}: only one of the two has a result"
    if is_control(first.row) or is_control(second.row):
        return None
    different = differences(after, first, second, baseline_run=None if before is after else before)
    if different:
        return f"{new} {task}: {different[0]}"
    pairs = pair(first, second).pairs
    if not pairs or not (first.is_share and second.is_share):
        return f"{new} {task}: " + ("no question in common" if not pairs else f"{first.metric} is no share")
    difference = paired_difference(pairs)
    if difference.p_permutation is None:
        return f"{new} {task}: all its questions err together, so chance cannot be told"
    stderr = None if difference.stderr is None else 100 * difference.stderr
    return Shift(new, task, 100 * difference.delta, stderr, difference.p_permutation)


def _kl_shift(before: RunEvidence, after: RunEvidence, old: str, new: str) -> Shift | str | None:
    first, second = (
        {same_sequence(row): row for row in run.sequences.get(name, ())} for run, name in ((before, old), (after, new))
    )
    if not first or not second:
        return None if not first and not second else f"{new} KL: only one of the two is measured"
    if first.keys() != second.keys():
        return f"{new} KL: measured on other sequences"
    pairs = [(row, first[key]) for key, row in second.items()]
    try:
        change, stderr = ratio_over_clusters(
            [a["kl_sum"] - b["kl_sum"] for a, b in pairs], [a["n_tokens"] for a, _ in pairs], [cluster_of(a) for a, _ in pairs]
        )
    except (KeyError, ValueError) as error:
        raise StoreError(
            f"{after.folder / 'diagnostics_sequences.jsonl'}: a row of {new} cannot be compared ({error})"
        ) from error
    if stderr is None:
        return f"{new} KL: one sequence, so chance cannot be told"
    return Shift(new, "KL", change, stderr, _two_sided(change, stderr, len({cluster_of(a) for a, _ in pairs}) - 1))


def _two_sided(change: float, stderr: float, degrees: int) -> float:
    """The p-value of Student's t; where all clusters moved alike, nothing is left to chance."""
    from scipy.special import stdtr

    if not stderr:
        return 0.0 if change else 1.0
    return 2 * float(stdtr(degrees, -abs(change) / stderr)) if math.isfinite(change) else 1.0
