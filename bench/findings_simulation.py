"""Whether the intervals of `harness findings` cover: simulated experiments of which the truth is known.

    OMP_NUM_THREADS=1 python bench/findings_simulation.py [--experiments 4000] [--seed 1]

An experiment asks questions of two or four cells, each trained with several seeds or not at all. A question has a difficulty; a cell, a training seed,
and a seed in a question move it, all on the scale of log odds; answers are right or wrong, several to a question. What is asked for is the difference
that infinitely many questions and seeds would show. Each cell of the campaign draws that many experiments and asks the harness's own rule
(`harness.contrasts`, called on arrays) for its 95 % interval; beside it what was not chosen:

questions   the error over questions alone: that of these very checkpoints
seeds       a t interval over the seeds alone, as if these questions were all there are
less        the two parts added, less the part that is in both (the seeds' noise from answer to answer)

Prints a table and every check that does not hold, and exits 1 if there is one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, stdtrit

from harness.contrasts import two_sided, with_seeds
from harness.intervals import Array, moments

CONFIDENCE = 0.95
COVERAGE = {3: 0.915, 5: 0.94}
"""What every kind of experiment has to cover by its seeds, less three Monte Carlo errors."""
BETWEEN_QUESTIONS, OF_A_CELL, OF_A_SEED = 1.5, 0.5, 0.5
"""Standard deviations in log odds: between questions, of a cell in a question, of a seed in a question."""
BLOCK = 500


@dataclass(frozen=True)
class Experiment:
    """A kind of experiment. seeds: of each cell, 0 where nothing is trained. spread: over seeds, in log odds.

    paired: cells share a draw; correlation: of what one seed does to them. score: the mean that a question of middling difficulty has.
    """

    questions: int
    repeats: int
    seeds: tuple[int, ...]
    spread: float
    paired: bool
    correlation: float
    score: float

    @property
    def weights(self) -> tuple[int, ...]:
        return (1, -1) if len(self.seeds) == 2 else (1, -1, -1, 1)

    @property
    def shifts(self) -> tuple[float, ...]:
        """Of the cells, in log odds."""
        return (0.3, 0.0) if len(self.seeds) == 2 else (0.6, 0.0, 0.3, 0.0)

    def truth(self) -> float:
        """The contrast over all questions and seeds."""
        nodes, chances = np.polynomial.hermite_e.hermegauss(80)
        chances = chances / chances.sum()
        found = 0.0
        for weight, seeds, shift in zip(self.weights, self.seeds, self.shifts, strict=True):
            variance = BETWEEN_QUESTIONS**2 + OF_A_CELL**2 + (self.spread**2 + OF_A_SEED**2 if seeds else 0.0)
            found += weight * float(chances @ expit(_log_odds(self.score) + shift + math.sqrt(variance) * nodes))
        return found


@dataclass(frozen=True)
class Outcome:
    """Shares of experiments whose interval covers, and mean widths in points."""

    coverage: float
    width: float
    others: dict[str, tuple[float, float]]


def experiments() -> Iterator[Experiment]:
    """Every kind of the campaign."""
    for n, k, seeds, spread, score in itertools.product(
        (50, 200), (1, 4), ((3, 0), (5, 0), (3, 3), (5, 5), (5, 5, 5, 5)), (0.0, 0.1, 0.4), (0.3, 0.9)
    ):
        pairings = ((False, 0.0), (True, 0.0), (True, 0.8), (True, -0.8)) if min(seeds) else ((False, 0.0),)
        for paired, correlation in pairings:
            if spread or correlation == 0:
                yield Experiment(n, k, seeds, spread, paired, correlation, score)


def simulate(kind: Experiment, n: int, rng: np.random.Generator) -> Outcome:
    """Draw `n` experiments of a kind and look at the intervals."""
    blocks = [_block(kind, min(BLOCK, n - done), rng) for done in range(0, n, BLOCK)]
    truth = kind.truth()
    found = {}
    for name in blocks[0]:
        low, high = (np.concatenate([block[name][side] for block in blocks]) for side in (0, 1))
        found[name] = (float(np.mean((low <= truth) & (truth <= high))), float(100 * np.mean(high - low)))
    return Outcome(*found.pop("rule"), found)


def broken(kind: Experiment, outcome: Outcome, n: int) -> list[str]:
    """What a kind of experiment does not hold, as sentences."""
    promised = COVERAGE[max(kind.seeds)]
    least = promised - 3 * math.sqrt(promised * (1 - promised) / n)
    return [f"coverage {outcome.coverage:.3f}, below {least:.3f}"] if outcome.coverage < least else []


def _block(kind: Experiment, n: int, rng: np.random.Generator) -> dict[str, tuple[Array, Array]]:
    scores = _scores(kind, n, rng)
    values = sum(w * cell.mean(axis=1) for w, cell in zip(kind.weights, scores, strict=True))
    questions = moments(np.asarray(values), np.arange(kind.questions))
    trained = [(w, cell) for w, cell in zip(kind.weights, scores, strict=True) if cell.shape[1] > 1]
    if kind.paired:
        trained = [(1, np.asarray(sum(w * cell for w, cell in trained)))]
    parts, noise = [], np.zeros(n)
    for _, cell in trained:
        n_seeds = cell.shape[1]
        parts.append((cell.mean(axis=2).var(axis=1, ddof=1) / n_seeds, n_seeds - 1))
        rest = (
            cell - cell.mean(axis=1, keepdims=True) - cell.mean(axis=2, keepdims=True) + cell.mean(axis=(1, 2), keepdims=True)
        )
        degrees = (n_seeds - 1) * (kind.questions - 1)
        noise = noise + (rest**2).sum(axis=(1, 2)) / degrees / n_seeds / kind.questions
    found = {
        "rule": two_sided(with_seeds(questions, parts), CONFIDENCE),
        "questions": two_sided(questions, CONFIDENCE),
        "less": two_sided(with_seeds(questions, _lessened(parts, noise)), CONFIDENCE),
    }
    variance = np.asarray(sum(square for square, _ in parts))
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = variance**2 / sum(square**2 / f for square, f in parts)
    half = -stdtrit(np.nan_to_num(degrees, nan=1.0), (1 - CONFIDENCE) / 2) * np.sqrt(variance)
    return found | {"seeds": (questions.mean - half, questions.mean + half)}


def _scores(kind: Experiment, n: int, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """For each cell (experiments, seeds, questions): means over repeats."""
    difficulty = rng.normal(_log_odds(kind.score), BETWEEN_QUESTIONS, (n, 1, kind.questions))
    common = rng.normal(size=(n, max(kind.seeds), 1))
    found = []
    for weight, n_seeds, shift in zip(kind.weights, kind.seeds, kind.shifts, strict=True):
        odds = difficulty + shift + rng.normal(0, OF_A_CELL, (n, 1, kind.questions))
        if n_seeds:
            share = abs(kind.correlation)
            sign = 1 if kind.correlation >= 0 or weight > 0 else -1
            own = rng.normal(size=(n, n_seeds, 1))
            odds = odds + kind.spread * (sign * math.sqrt(share) * common[:, :n_seeds] + math.sqrt(1 - share) * own)
            odds = odds + rng.normal(0, OF_A_SEED, (n, n_seeds, kind.questions))
        found.append(rng.binomial(kind.repeats, expit(odds)) / kind.repeats)
    return found


def _lessened(parts: list[tuple[Array, int]], noise: Array) -> list[tuple[Array, int]]:
    """The variances over seeds less what noise within them adds, each at least 0."""
    total = np.asarray(sum(square for square, _ in parts))
    with np.errstate(invalid="ignore", divide="ignore"):
        kept = np.where(total > 0, np.maximum(0, total - noise) / total, 0.0)
    return [(square * kept, degrees) for square, degrees in parts]


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    problems: list[str] = []
    groups: dict[tuple[str, str, float], list[Outcome]] = {}
    for number, kind in enumerate(experiments()):
        outcome = simulate(kind, asked.experiments, np.random.default_rng([asked.seed, number]))
        problems += [f"{kind}: {problem}" for problem in broken(kind, outcome, asked.experiments)]
        pairing = ("shared draw" if kind.paired else "independent") if min(kind.seeds) else "one is not trained"
        groups.setdefault((" ".join(map(str, kind.seeds)), pairing, kind.spread), []).append(outcome)
    print(
        f"{asked.experiments:,} experiments of each of {sum(map(len, groups.values()))} kinds; coverage in percent, worst and best"
    )
    print("| seeds | trainings | spread | covers | questions alone | seeds alone | less noise | width | less noise |")
    print("| --- " * 9 + "|")
    for (seeds, pairing, spread), found in groups.items():
        cells = [_range([each.coverage for each in found])]
        cells += [_range([each.others[name][0] for each in found]) for name in ("questions", "seeds", "less")]
        widths = [sum(each.width for each in found), sum(each.others["less"][1] for each in found)]
        print(
            f"| {seeds} | {pairing} | {spread:g} | {' | '.join(cells)} | {' | '.join(f'{w / len(found):.1f}' for w in widths)} |"
        )
    print(*problems, f"{len(problems)} checks do not hold", sep="\n")
    return 1 if problems else 0


def _range(shares: list[float]) -> str:
    return f"{100 * min(shares):.1f} to {100 * max(shares):.1f}"


if __name__ == "__main__":
    sys.exit(main())
