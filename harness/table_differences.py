"""What a table says of each variant against BF16, as data: paired differences, recovery, the share of the gap that training closed. No torch.

Built from the scores of the run folder (`evidence`). A variant that was trained with several seeds is compared as the mean over them, beside
each seed: the interval is over questions, and holds nothing of what another training would come to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.comparable import differences as what_differs
from harness.evidence import Answers, Pairing, RunEvidence, pair
from harness.paired import QuestionPair, paired_difference
from harness.recovery import Ratio, gap_recovered, recovery
from harness.score_files import scores_path

_OF_TRAINING = ("block_scales",)
"""Keys of [quantization] that PTQ has too, where they change nothing."""


def differences_to_baseline(evidence: RunEvidence, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a (variant or group of seeds, task) whose scores are kept, in the order of run.json, groups last.

    `refused` says what makes the two not comparable, and then no figure is given. delta, low, high: shares, candidate less baseline.
    recovery, gap_recovered: value, low, high (None: no bound), or three times None and a reason; the gap is to the PTQ named in `start`,
    of trained variants alone.
    """
    if evidence.baseline is None:
        return []
    sides = _Sides(evidence, evidence.baseline)
    candidates = [(name, (name,)) for name in evidence.variants if name != evidence.baseline]
    candidates += [(group["label"], tuple(group["variants"])) for group in groups]
    return [
        found
        for label, members in candidates
        for task in evidence.tasks
        if (found := _difference(sides, task, label, members)) is not None
    ]


def without_scores(evidence: RunEvidence) -> list[str]:
    """Variant and task of results that cannot be compared, since their scores are not in the run folder; none where there is one side."""
    if len({variant for variant, _ in evidence.rows}) < 2:
        return []
    return [f"{variant} {task}" for variant, task in evidence.rows if not scores_path(evidence.folder, variant, task).is_file()]


@dataclass(frozen=True)
class _Sides:
    """Answers and pairs with the baseline, each read and made once. None: no result, or its scores are not kept."""

    evidence: RunEvidence
    baseline: str
    read: dict[tuple[str, str], Answers | None] = field(default_factory=dict)
    paired: dict[tuple[str, str], Pairing] = field(default_factory=dict)
    refused: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def answers(self, name: str, task: str) -> Answers | None:
        if (name, task) not in self.read:
            is_kept = scores_path(self.evidence.folder, name, task).is_file()
            self.read[name, task] = self.evidence.answers(name, task) if is_kept else None
        return self.read[name, task]

    def pairing(self, name: str, task: str) -> Pairing:
        if (name, task) not in self.paired:
            self.paired[name, task] = pair(*self._both(name, task))
        return self.paired[name, task]

    def refusals(self, name: str, task: str) -> list[str]:
        if (name, task) not in self.refused:
            self.refused[name, task] = self._refusals(*self._both(name, task))
        return self.refused[name, task]

    def _refusals(self, baseline: Answers, candidate: Answers) -> list[str]:
        found = (
            [] if baseline.unit == "share" else [f"Unit: {baseline.metric} is no share, so it has no points and no recovery."]
        )
        if baseline.higher_is_better is False:
            found.append(f"Direction: {baseline.metric} is better where it is lower.")
        return found + what_differs(self.evidence, baseline, candidate)

    def _both(self, name: str, task: str) -> tuple[Answers, Answers]:
        baseline, candidate = self.answers(self.baseline, task), self.answers(name, task)
        assert baseline is not None and candidate is not None
        return baseline, candidate


def _difference(sides: _Sides, task: str, label: str, members: tuple[str, ...]) -> dict[str, Any] | None:
    names = [name for name in members if (name, task) in sides.evidence.rows]
    if not names or any(sides.answers(name, task) is None for name in (sides.baseline, *names)):
        return None
    about: dict[str, Any] = {"candidate": label, "baseline": sides.baseline, "task": task, "n_seeds": len(names)}
    refused = list(dict.fromkeys(each for name in names for each in sides.refusals(name, task)))
    if refused:
        return about | {"refused": refused}
    pairings = [sides.pairing(name, task) for name in names]
    pairs = list(pairings[0].pairs) if len(names) == 1 else _over_seeds(pairings)
    if not pairs:
        return about | {"refused": ["Questions: none was scored for both."]}
    start, gap = _gap(sides, task, names)
    return {
        **about,
        "refused": [],
        **_figures(pairs),
        "coverage": min(pairing.coverage for pairing in pairings),
        "paired_by": pairings[0].paired_by,
        "recovery": _recovery(pairs),
        "start": start,
        "gap_recovered": gap,
    }


def _over_seeds(pairings: list[Pairing]) -> list[QuestionPair]:
    """Pairs of the questions that all seeds scored, the candidate's side being their mean."""
    by_key = [
        {ours.key: pair for (ours, _), pair in zip(pairing.questions, pairing.pairs, strict=True)} for pairing in pairings
    ]
    found = []
    for key, first in by_key[0].items():
        seeds = [pairs[key] for pairs in by_key if key in pairs]
        if len(seeds) == len(by_key):
            mean = math.fsum(seed.candidate for seed in seeds) / len(seeds)
            n = sum(seed.n_candidate for seed in seeds)
            found.append(QuestionPair(first.baseline, mean, first.cluster, first.n_baseline, n))
    return found


def _gap(sides: _Sides, task: str, names: list[str]) -> tuple[str | None, dict[str, Any] | None]:
    """The PTQ that the variants start from, and the share of its gap to the baseline that they closed; None where there is none."""
    variants = sides.evidence.variants
    trained = variants[names[0]]
    if trained["method"] not in ("qat", "qad"):
        return None, None
    plain = {name: other for name, other in variants.items() if other["method"] == "ptq" and other.get("sampling_seed") is None}
    starts = [name for name, other in plain.items() if _choice(other) == _choice(trained)]
    if not starts or sides.answers(starts[0], task) is None or sides.refusals(starts[0], task):
        return None, None
    of_start, *of_seeds = [
        {ours.key: pair for (ours, _), pair in zip(found.questions, found.pairs, strict=True)}
        for found in (sides.pairing(name, task) for name in (starts[0], *names))
    ]
    questions = []
    for key, ptq in of_start.items():
        seeds = [pairs[key].candidate for pairs in of_seeds if key in pairs]
        if len(seeds) == len(names):
            questions.append((ptq.baseline, ptq.candidate, math.fsum(seeds) / len(seeds), ptq.cluster))
    return starts[0], _finite(gap_recovered(questions))


def _figures(pairs: Sequence[QuestionPair]) -> dict[str, Any]:
    """The difference without its tests, which `compare` gives: a table is printed in less time than they take."""
    found = asdict(paired_difference(pairs, resampled=False))
    return {key: value for key, value in found.items() if key not in ("t", "bootstrap", "p_permutation", "mcnemar")}


def _recovery(pairs: Sequence[QuestionPair]) -> dict[str, Any]:
    """Scores are no less than zero, so neither is their ratio."""
    found = _finite(recovery(pairs))
    return found if found["low"] is None else found | {"low": max(0.0, found["low"])}


def _finite(ratio: Ratio) -> dict[str, Any]:
    """As JSON holds it: an interval that is open at an end has None there."""
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in asdict(ratio).items()}


def _choice(variant: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (variant.get("quantization") or {}).items() if key not in _OF_TRAINING}
