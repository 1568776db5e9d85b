"""What would decide a check that is INCONCLUSIVE: about how many repeats or questions, if the damage is what it looks like. No torch.

The observed damage is taken for the true one, and its distance to the margin has to be decided with 80 % power, as planned (`harness.power`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from harness.paired import pooled_damage_moments
from harness.power import POWER, Spread, assumed_spread, expected, planned_with, spread_from

if TYPE_CHECKING:
    from harness.evidence import Pairing
    from harness.paired import QuestionPair

_MOST_REPEATS, _MOST_QUESTIONS = 1024, 1_000_000


def would_decide(pairing: Pairing, *, margin: float, alpha: float) -> str:
    """What would decide one task, in words. margin: in points."""
    damages = [pair.baseline - pair.candidate for pair in pairing.pairs]
    n, room = len(damages), abs(margin / 100 - math.fsum(damages) / len(damages))
    measured = spread_from([b.scores for b, _ in pairing.questions], [c.scores for _, c in pairing.questions])
    repeats = min(len(c.scores) for _, c in pairing.questions)
    discordance = min(1.0, math.fsum(damage**2 for damage in damages) / n)
    cube = _cube(damages) * (1 if margin / 100 > math.fsum(damages) / n else -1)
    needs = _Needs(room, alpha, measured or assumed_spread(), discordance if measured is None else None, cube)
    ways = [_at_least(needs.questions(repeats), n, "questions")]
    if measured is not None:
        n_clusters = len({pair.cluster for pair in pairing.pairs})
        ways.insert(0, _at_least(needs.repeats(n, n_clusters), repeats, "repeats of each question"))
    return _sentence(ways)


def would_decide_pooled(tasks: Sequence[Sequence[QuestionPair]], *, margin: float, alpha: float) -> str:
    """What would decide the mean over tasks, as a multiple of what was asked. margin: in points."""
    of = pooled_damage_moments(tasks)
    room = margin / 100 - of.mean.item()
    of = of if room > 0 else of.mirrored()

    def decides(tenths: int) -> bool:
        times = tenths / 10
        more = replace(of, square=of.square / times, cube=of.cube / times**2, jump=of.jump / times, degrees=of.degrees * times)
        return planned_with(more, alpha).smallest() <= abs(room)

    tenths = _fewest(decides, 10 * _MOST_REPEATS)
    return _sentence([None if tenths is None else f"about {max(tenths, 11) / 10:.2g} times as many answers"])


class _Needs:
    """How much it takes to decide `room`, a share. discordance: of greedy answers, which repeats do not help. cube: third moment of a question."""

    def __init__(self, room: float, alpha: float, spread: Spread, discordance: float | None, cube: float) -> None:
        self.room, self.alpha, self.spread, self.discordance, self.cube = room, alpha, spread, discordance, cube

    def questions(self, repeats: int) -> int | None:
        return _fewest(lambda n: self._decides(n, repeats, n), _MOST_QUESTIONS)

    def repeats(self, n: int, n_clusters: int) -> int | None:
        return _fewest(lambda repeats: self._decides(n, repeats, n_clusters), _MOST_REPEATS)

    def _decides(self, n: int, repeats: int, n_clusters: int) -> bool:
        of = expected(
            n,
            repeats,
            self.spread,
            n_clusters=n_clusters,
            is_greedy=self.discordance is not None,
            discordance=self.discordance,
        )
        return planned_with(replace(of, cube=np.array(self.cube / n**2)), self.alpha).smallest() <= self.room


def _cube(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 3 for value in values) / len(values)


def _fewest(decides: Callable[[int], bool], most: int) -> int | None:
    found = bisect_left(range(1, most + 1), True, key=decides) + 1
    return None if found > most else found


def _at_least(n: int | None, had: int, what: str) -> str | None:
    """None where no number does. Where as many as there were should do, chance was against it."""
    return None if n is None else f"about {max(n, had + 1):,} {what}"


def _sentence(ways: Sequence[str | None]) -> str:
    possible = [way for way in ways if way is not None]
    if not possible:
        return "what was observed is too close to the margin for any number of answers to decide"
    return f"if the damage is what it looks like, {' or '.join(possible)} would decide with {100 * POWER:g} % power"
