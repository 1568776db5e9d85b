"""What a release gate will be able to decide, said before the run: margins at 80 % power, and the chance of GO. No torch.

All of it is about a candidate that is as good as the baseline. What answers vary by is assumed, or estimated from the newest finished run
of the suite: of sampled answers the spread (`harness.power`), of greedy ones the share of questions that flip. The chance of GO is the
product over the checks that decide, as if they were independent: a critical one has to PASS, a supporting one not to FAIL (before Holm,
which only helps). Ceilings and evidence are taken to be in order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.intervals import Moments
from harness.power import Planned, Spread, assumed_spread, expected, joint_power, planned

if TYPE_CHECKING:
    from harness.schema_gate import Gate, GateTask, Pooled

FLIPS = (0.10, 0.20)
"""Shares of greedy answers that are assumed to flip where nothing was measured: the cautious one last."""
NOT_PREPARED = "not prepared"
_ENOUGH = "no more"
_MOST_TENTHS = 10_000
_MOST_REPEATS = 1024
_MOST_QUESTIONS = 1_000_000


@dataclass(frozen=True)
class Asked:
    """What a suite asks in a task. is_partial: only its first questions; is_control: grey pictures. No gate admits either."""

    n_questions: int
    n_clusters: int
    repeats: int
    is_greedy: bool
    is_partial: bool = False
    is_control: bool = False


@dataclass(frozen=True)
class Variation:
    """What answers to a task vary by: the spread of sampled ones, and for each scenario the share of greedy ones that flip."""

    spread: Spread
    flips: tuple[float, ...] = FLIPS
    source: str = "assumed"


@dataclass(frozen=True)
class Outlook:
    """One check of a policy before the run. Tuples have an entry a scenario; margins are shares.

    asked: in words. smallest: what is decided with 80 % power. power: of what GO needs of it, 0.0 where `reason` says why it never gets there.
    needed: what the margin would take, in words.
    """

    name: str
    tier: str
    margin: float
    asked: str
    smallest: tuple[float, ...] = ()
    power: tuple[float, ...] = ()
    needed: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class GateOutlook:
    """A policy before the run. flips: of greedy answers, by scenario. go: the chance of GO by scenario; None where a task's size is unknown."""

    checks: tuple[Outlook, ...]
    flips: tuple[float, ...]
    go: tuple[float, ...] | None


@dataclass(frozen=True)
class _Known:
    """A task of the policy whose size is known, in one scenario."""

    asked: Asked
    variation: Variation
    flips: float

    def expected(self) -> Moments:
        """What the rule will find in it without damage."""
        return expected(
            self.asked.n_questions,
            self.asked.repeats,
            self.variation.spread,
            n_clusters=self.asked.n_clusters,
            is_greedy=self.asked.is_greedy,
            discordance=self.flips if self.asked.is_greedy else None,
        )

    def times(self, times: float, *, questions: bool) -> _Known:
        """The same with so many times as many questions (in as many times the clusters), else repeats."""
        keys = ("n_questions", "n_clusters") if questions else ("repeats",)
        return replace(self, asked=replace(self.asked, **{key: math.ceil(getattr(self.asked, key) * times) for key in keys}))


def gate_outlook(
    policy: Gate, asked: Mapping[str, Asked | None], variations: Mapping[str, Variation] | None = None
) -> GateOutlook:
    """What `policy` can decide with what is asked of each of its tasks.

    Args:
        asked: by task; None, or no entry, where it is not known.
        variations: by task, of those that were estimated.
    """
    known = {task.name: found for task in policy.task if (found := asked.get(task.name)) is not None}
    assumed = Variation(assumed_spread())
    given = {name: (variations or {}).get(name, assumed) for name in known}
    n_scenarios = max([1, *(len(given[name].flips) for name in known if known[name].is_greedy)])
    scenarios = [
        {name: _Known(known[name], given[name], given[name].flips[min(i, len(given[name].flips) - 1)]) for name in known}
        for i in range(n_scenarios)
    ]
    checks = [_task(policy, task, asked, scenarios) for task in policy.task]
    if policy.pooled is not None:
        checks.append(_pooled(policy, policy.pooled, scenarios, checks))
    deciding = [check for check in checks if check.tier != "advisory"]
    go = None
    if all(check.power for check in deciding):
        go = tuple(joint_power([check.power[i] for check in deciding]) for i in range(n_scenarios))
    flips = FLIPS if n_scenarios == len(FLIPS) else ()
    return GateOutlook(tuple(checks), flips, go)


def _task(
    policy: Gate, task: GateTask, asked: Mapping[str, Asked | None], scenarios: Sequence[Mapping[str, _Known]]
) -> Outlook:
    margin, size = task.margin / 100, asked.get(task.name)
    if size is None:
        unknown = NOT_PREPARED if task.name in asked else "no task of this suite; its scores would have to be imported"
        return Outlook(task.name, task.tier, margin, "", reason=unknown)
    born = Outlook(task.name, task.tier, margin, _size(size))
    why = _never(policy, task, size)
    if why is not None:
        return replace(born, power=(0.0,) * len(scenarios), reason=why)
    alpha = policy.alpha if task.alpha is None else task.alpha
    known = [scenario[task.name] for scenario in scenarios]
    rules = [_rule([one], alpha) for one in known]
    return replace(
        born,
        smallest=tuple(rule.smallest() for rule in rules),
        power=tuple(_power(rule, task.tier, margin) for rule in rules),
        needed=tuple(
            _ENOUGH if rule.smallest() <= margin else _needed(one, margin, alpha)
            for rule, one in zip(rules, known, strict=True)
        ),
    )


def _pooled(policy: Gate, pooled: Pooled, scenarios: Sequence[Mapping[str, _Known]], checks: Sequence[Outlook]) -> Outlook:
    """The mean over tasks, each weighing the same. It needs evidence of each of them."""
    names = pooled.tasks or tuple(task.name for task in policy.task)
    margin, alpha = pooled.margin / 100, policy.alpha if pooled.alpha is None else pooled.alpha
    without = [name for name in names if name not in scenarios[0]]
    if without:
        return Outlook("pooled", pooled.tier, margin, "", reason=f"the size of {', '.join(without)} is not known")
    n_questions = sum(scenarios[0][name].asked.n_questions for name in names)
    born = Outlook("pooled", pooled.tier, margin, f"{n_questions:,} questions of {len(names)} tasks")
    never = [check.name for check in checks if check.name in names and check.reason is not None]
    if never:
        return replace(
            born, power=(0.0,) * len(scenarios), reason=f"{', '.join(never)} is no evidence, and it needs all its tasks"
        )
    tasks = [[scenario[name] for name in names] for scenario in scenarios]
    rules = [_rule(mine, alpha) for mine in tasks]
    return replace(
        born,
        smallest=tuple(rule.smallest() for rule in rules),
        power=tuple(_power(rule, pooled.tier, margin) for rule in rules),
        needed=tuple(
            _ENOUGH if rule.smallest() <= margin else _needed_pooled(mine, margin, alpha)
            for rule, mine in zip(rules, tasks, strict=True)
        ),
    )


def _power(rule: Planned, tier: str, margin: float) -> float:
    """The chance of PASS or, of a supporting check, of anything but FAIL."""
    return rule.does_not_fail(margin) if tier == "supporting" else rule.passes(margin)


def _rule(tasks: Sequence[_Known], alpha: float) -> Planned:
    return planned([task.expected() for task in tasks], alpha)


def _never(policy: Gate, task: GateTask, asked: Asked) -> str | None:
    """Why a task cannot pass whatever is answered."""
    if asked.is_control:
        return "a control with grey pictures, which is no score"
    for what, n in (("questions", asked.n_questions), ("clusters", asked.n_clusters)):
        own = getattr(task, f"min_{what}")
        least = getattr(policy, f"min_{what}") if own is None else own
        if n < least:
            return f"{n:,} {what}, the policy wants at least {least:,}"
    return "its limit leaves only the first questions, which no gate admits" if asked.is_partial else None


def _needed(known: _Known, margin: float, alpha: float) -> str:
    """What the margin would take: repeats of sampled answers, else questions."""
    asked = known.asked

    def decides(repeats: int) -> bool:
        return _rule([replace(known, asked=replace(asked, repeats=repeats))], alpha).smallest() <= margin

    repeats = _MOST_REPEATS if asked.is_greedy else bisect_left(range(_MOST_REPEATS), 1, lo=1, key=decides)
    if repeats < _MOST_REPEATS:
        return _plural(repeats, "repeat")
    n = _questions(known, margin, alpha)
    return "more questions than there are" if n is None else f"about {n:,} questions"


def _questions(known: _Known, margin: float, alpha: float) -> int | None:
    """About how many questions, clustered as they are, decide the margin: a margin falls with their root or, of few flips, with their number."""
    times = 1.0
    for _ in range(8):
        smallest = _rule([known.times(times, questions=True)], alpha).smallest()
        times *= min(smallest / margin, 1e6) ** 1.5
        if times * known.asked.n_questions > _MOST_QUESTIONS:
            return None
    return math.ceil(times * known.asked.n_questions)


def _needed_pooled(tasks: Sequence[_Known], margin: float, alpha: float) -> str:
    """How many times as many repeats or, where all are greedy, questions the margin would take."""
    is_greedy = all(task.asked.is_greedy for task in tasks)
    what = "questions" if is_greedy else "repeats"

    def decides(tenths: int) -> bool:
        return _rule([task.times(tenths / 10, questions=is_greedy) for task in tasks], alpha).smallest() <= margin

    tenths = bisect_left(range(_MOST_TENTHS), 1, lo=10, key=decides)
    return f"more {what} than there can be" if tenths == _MOST_TENTHS else f"{tenths / 10:g} times as many {what}"


def _size(asked: Asked) -> str:
    clusters = f" in {asked.n_clusters:,} clusters" if asked.n_clusters < asked.n_questions else ""
    repeats = "" if asked.is_greedy else f" × {_plural(asked.repeats, 'repeat')}"
    return f"{asked.n_questions:,} questions{clusters}{repeats}"


def _plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"
