"""Whether intervals cover and gates err as rarely as they say: simulated benchmarks of which the truth is known.

    OMP_NUM_THREADS=1 python bench/verdict_simulation.py [--benchmarks 2000] [--seed 1] [--csv FILE]

Each cell draws that many benchmarks of a baseline and a candidate whose true damage is known, and asks the harness's own rule
(`harness.intervals`, called on arrays) for the 95 % interval of the baseline's mean and of the difference, and for the decision of a gate whose
margin is exactly the true damage. Prints the worst cells and every check that does not hold, and exits 1 if there is one.

A cell: questions; mean score of the baseline; discordance, the share of questions in which two single answers differ; damage; repeats with what the
discordance is made of; clusters.

single    one answer each; a question is lost, won, or the same. Differences that last over repeats are the same numbers.
sampled   8 repeats; all discordance is sampling: some questions are a coin toss, in the candidate with a shifted coin.
mixed     8 repeats; half of the discordance lasts, and with it the damage; half is coin tosses.

Questions of a cluster take, with probability sqrt(0.2), what their cluster drew: any two of them correlate by 0.2.

And the worst that clusters can do: a share of them is lost whole, every answer of each, while the others differ without pattern or not at all.
The share is such that none of it shows in 1 of 2 to 1 of 50 benchmarks.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from harness.intervals import Array, Moments, exact_interval, moments, p_below, upper_bound
from harness.paired import pooled_moments
from harness.power import INTRACLUSTER, POWER, Spread, expected, planned

QUESTIONS = (30, 100, 500)
MEANS = (0.1, 0.5, 0.9, 0.98)
DISCORDANCES = (0.02, 0.05, 0.1, 0.2)
DAMAGES = (0.0, 0.25, 0.5, 1.0)
"""As shares of the discordance; at 1 every question that differs is lost."""
KINDS = ("single", "sampled", "mixed")
CLUSTERS = (None, 30)
REPEATS = 8
WHOLE_CLUSTERS = ((30, 3), (30, 10), (30, 17), (60, 4), (100, 5), (185, 2))
"""Clusters, and questions of each."""
WHOLE_LOST = (0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Clusters that are lost whole, on average; 5 % of them as well."""
WHOLE_FLIPS = ((0.0, 1), (0.1, 1), (0.05, 8), (0.2, 8))
"""Share of the other answers that differ, as often lost as won, and repeats."""
ALPHA = 0.05
COVERAGE = 0.93
WIDE = 0.985


@dataclass(frozen=True)
class Cell:
    """A kind of benchmark. discordance, damage: shares of the questions."""

    questions: int
    mean: float
    discordance: float
    damage: float
    kind: str
    clusters: int | None

    def shares(self) -> tuple[float, float, float, float] | None:
        """Shares of questions lost, won, tossed, and the tilt of the toss; None where no benchmark is like that."""
        rho, damage = self.discordance, self.damage
        if self.kind == "sampled":
            ratio = rho / damage if damage else math.inf
            tilt = (ratio - math.sqrt(ratio**2 - 1)) / 2 if damage else 0.0
            lasting, tossed = 0.0, damage / (2 * tilt) if damage else 2 * rho
        else:
            lasting = rho if self.kind == "single" else rho / 2
            tilt, tossed = 0.0, 2 * (rho - lasting)
        moved = damage if self.kind != "sampled" else 0.0
        lost, won = (lasting + moved) / 2, (lasting - moved) / 2
        right = lost + tossed * (0.5 + tilt)
        feasible = won >= 0 and right <= self.mean + 1e-12 and won + tossed - (right - lost) <= 1 - self.mean + 1e-12
        return (lost, won, tossed, tilt) if feasible else None

    def planned_margin(self) -> float:
        """What the planner promises for an identical candidate, knowing the truth: a share."""
        lost, won, tossed, _ = self.shares() or (0.0, 0.0, 0.0, 0.0)
        spread, is_greedy = Spread(tossed / 4, lost + won, "the truth"), self.kind == "single"
        repeats = 1 if is_greedy else REPEATS
        of = expected(
            self.questions, repeats, spread, n_clusters=self.clusters, is_greedy=is_greedy, discordance=self.discordance
        )
        return planned([of], ALPHA).smallest()


@dataclass(frozen=True)
class Outcome:
    """Shares of benchmarks: intervals that cover, decisions at a margin that is the true damage, and of identical candidates at the margin
    that the planner promises. widths: mean, of the interval and of the plain t interval, in points."""

    mean_coverage: float
    mean_width: float
    mean_t_width: float
    delta_coverage: float
    delta_width: float
    delta_t_width: float
    t_coverage: float
    pass_at_margin: float
    fail_at_margin: float
    t_pass_at_margin: float
    planned_margin: float | None
    pass_identical: float | None


def cells() -> Iterator[Cell]:
    """Every cell of the campaign that can exist; 30 questions in 30 clusters are no other than 30 questions."""
    for n, mean, rho, damage, kind, clusters in itertools.product(QUESTIONS, MEANS, DISCORDANCES, DAMAGES, KINDS, CLUSTERS):
        cell = Cell(n, mean, rho, rho * damage, kind, clusters)
        if clusters != n and cell.shares() is not None:
            yield cell


def cluster_starts(cell: Cell) -> NDArray[np.intp]:
    """Where clusters begin: as equal as they can be."""
    count = cell.clusters or cell.questions
    return np.arange(count) * cell.questions // count


def draw(cell: Cell, benchmarks: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Question means of baseline and candidate, (benchmarks, questions) each, clusters side by side."""
    shares = cell.shares()
    assert shares is not None, cell
    lost, won, tossed, tilt = shares
    shape = (benchmarks, cell.questions)
    place = rng.random(shape)
    if cell.clusters:
        starts = cluster_starts(cell)
        sizes = np.diff(np.append(starts, cell.questions))
        shared = np.repeat(rng.random((benchmarks, cell.clusters)), sizes, axis=1)
        place = np.where(rng.random(shape) < math.sqrt(INTRACLUSTER), shared, place)
    right = cell.mean - lost - tossed * (0.5 + tilt)
    lost_to, won_to, tossed_to, right_to = np.cumsum([lost, won, tossed, right])
    is_lost, is_won = place < lost_to, (place >= lost_to) & (place < won_to)
    is_tossed = (place >= won_to) & (place < tossed_to)
    is_right = (place >= tossed_to) & (place < right_to)
    baseline, candidate = (is_lost | is_right).astype(float), (is_won | is_right).astype(float)
    if tossed:
        count = int(is_tossed.sum())
        baseline[is_tossed] = rng.binomial(REPEATS, 0.5 + tilt, count) / REPEATS
        candidate[is_tossed] = rng.binomial(REPEATS, 0.5 - tilt, count) / REPEATS
    return baseline, candidate


def mean_bounds(cell: Cell, values: Array, of: Moments) -> tuple[Array, Array]:
    """The 95 % intervals as `mean_interval` makes them."""
    if cell.kind == "single" and not cell.clusters:
        table = np.array([exact_interval(count, cell.questions) for count in range(cell.questions + 1)])
        low, high = table[values.sum(axis=-1).astype(int)].T
        return low, high
    return np.maximum(0, -upper_bound(of.mirrored(), 0.025)), np.minimum(1, upper_bound(of, 0.025))


def simulate(cell: Cell, benchmarks: int, rng: np.random.Generator) -> Outcome:
    """Draw the cell's benchmarks and count."""
    baseline, candidate = draw(cell, benchmarks, rng)
    starts = cluster_starts(cell)
    mean, damage = moments(baseline, starts), moments(baseline - candidate, starts)
    low, high = mean_bounds(cell, baseline, mean)
    lower, upper = -upper_bound(damage.mirrored(), 0.025), upper_bound(damage, 0.025)
    half = -stdtrit(len(starts) - 1, 0.025)
    one_sided = -stdtrit(len(starts) - 1, ALPHA)
    root = np.sqrt(damage.square)
    promised = identical = None
    if not cell.damage:
        promised = cell.planned_margin()
        identical = float((upper_bound(damage, ALPHA) <= promised).mean())
    return Outcome(
        mean_coverage=covers(low, cell.mean, high),
        mean_width=100 * float((high - low).mean()),
        mean_t_width=200 * half * float(np.sqrt(mean.square).mean()),
        delta_coverage=covers(lower, cell.damage, upper),
        delta_width=100 * float((upper - lower).mean()),
        delta_t_width=200 * half * float(root.mean()),
        t_coverage=covers(damage.mean - half * root, cell.damage, damage.mean + half * root),
        **judged(damage, cell.damage),
        t_pass_at_margin=float((damage.mean + one_sided * root <= cell.damage).mean()),
        planned_margin=promised and 100 * promised,
        pass_identical=identical,
    )


@dataclass(frozen=True)
class Whole:
    """A kind of benchmark whose damage comes in whole clusters. damage: the share of clusters that is lost. flips: of the other answers."""

    clusters: int
    size: int
    damage: float
    flips: float
    repeats: int


def wholes() -> Iterator[Whole]:
    for (clusters, size), (flips, repeats) in itertools.product(WHOLE_CLUSTERS, WHOLE_FLIPS):
        for damage in sorted({0.05, *(lost / clusters for lost in WHOLE_LOST)}):
            yield Whole(clusters, size, damage, flips, repeats)


def simulate_whole(whole: Whole, benchmarks: int, rng: np.random.Generator) -> dict[str, float]:
    """Coverage of the difference, and decisions at a margin that is the true damage."""
    shape = (benchmarks, whole.clusters * whole.size)
    lost = np.repeat(rng.random((benchmarks, whole.clusters)) < whole.damage, whole.size, axis=1)
    up, down = (rng.binomial(whole.repeats, whole.flips / 2, shape) for _ in range(2))
    found = moments(np.where(lost, 1.0, (up - down) / whole.repeats), np.arange(whole.clusters) * whole.size)
    return judged(found, whole.damage) | {"delta_coverage": coverage(found, whole.damage)}


def judged(found: Moments, damage: float) -> dict[str, float]:
    """Decisions at a margin that is the true damage."""
    return {
        "pass_at_margin": float((p_below(found, damage) <= ALPHA).mean()),
        "fail_at_margin": float((p_below(found.mirrored(), -damage) <= ALPHA).mean()),
    }


def coverage(found: Moments, damage: float) -> float:
    return covers(-upper_bound(found.mirrored(), 0.025), damage, upper_bound(found, 0.025))


@dataclass(frozen=True)
class Pool:
    """Tasks of a pooled endpoint, one a cell; its damage is their mean."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def damage(self) -> float:
        return math.fsum(cell.damage for cell in self.cells) / len(self.cells)


def pools() -> Iterator[Pool]:
    """Three tasks of unlike size, damaged alike or the smallest alone; ten small ones."""
    for rho, share, kind, clusters in itertools.product(DISCORDANCES, DAMAGES, KINDS, CLUSTERS):
        alike = tuple(Cell(n, 0.5, rho, rho * share, kind, clusters if clusters != n else None) for n in QUESTIONS)
        least = (alike[0], *(Cell(n.questions, 0.5, rho, 0.0, kind, n.clusters) for n in alike[1:]))
        for name, tasks in (("alike", alike), ("smallest alone", least), ("ten of 30", alike[:1] * 10)):
            if all(cell.shares() is not None for cell in tasks) and not (name == "ten of 30" and clusters):
                yield Pool(name, tasks)


def simulate_pool(pool: Pool, benchmarks: int, rng: np.random.Generator) -> dict[str, float]:
    """Coverage of the pooled interval, and decisions at a margin that is the true pooled damage."""
    tasks = []
    for cell in pool.cells:
        baseline, candidate = draw(cell, benchmarks, rng)
        tasks.append(moments(baseline - candidate, cluster_starts(cell)))
    of = pooled_moments(tasks)
    return judged(of, pool.damage) | {"pooled_coverage": coverage(of, pool.damage)}


def covers(low: Array, truth: float, high: Array) -> float:
    return float(((low <= truth + 1e-12) & (truth - 1e-12 <= high)).mean())


def error_of(share: float, benchmarks: int) -> float:
    """Three Monte Carlo standard errors."""
    return 3 * math.sqrt(share * (1 - share) / benchmarks)


def broken(outcome: dict[str, float | None], benchmarks: int) -> list[str]:
    """Which of the promises a cell's figures break."""
    limits = {
        name: COVERAGE - error_of(COVERAGE, benchmarks)
        for name in outcome
        if name.endswith("_coverage") and name != "t_coverage"
    }
    said = [f"{name} {outcome[name]:.4f} < {low:.4f}" for name, low in limits.items() if (outcome[name] or 0.0) < low]
    most = ALPHA + error_of(ALPHA, benchmarks)
    said += [
        f"{name} {outcome[name]:.4f} > {most:.4f}"
        for name in ("pass_at_margin", "fail_at_margin")
        if (outcome[name] or 0.0) > most
    ]
    least = POWER - error_of(POWER, benchmarks)
    found = outcome.get("pass_identical")
    if found is not None and found < least:
        said.append(f"pass_identical {found:.4f} < {least:.4f}")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", help="write every cell there")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    rows = [{**asdict(cell), **asdict(simulate(cell, options.benchmarks, rng))} for cell in cells()]
    pooled = [
        {
            "tasks": pool.name,
            **asdict(pool.cells[0]),
            "pooled_damage": pool.damage,
            **simulate_pool(pool, options.benchmarks, rng),
        }
        for pool in pools()
    ]
    whole = [{**asdict(cell), **simulate_whole(cell, options.benchmarks, rng)} for cell in wholes()]
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows + pooled + whole for key in row)))
            writer.writeheader()
            writer.writerows(rows + pooled + whole)
    report(rows, pooled, whole)
    failures = [(row, said) for row in rows + pooled + whole if (said := broken(row, options.benchmarks))]
    for row, said in failures:
        print("BROKEN", describe(row), "; ".join(said))
    kinds = f"{len(rows)} cells, {len(pooled)} pools and {len(whole)} that lose whole clusters"
    print(f"{kinds}, of {options.benchmarks} benchmarks: {len(failures)} break a promise")
    return 1 if failures else 0


def report(rows: list[dict], pooled: list[dict], whole: list[dict]) -> None:
    for title, name, pick, among in (
        ("lowest coverage of the mean", "mean_coverage", min, rows),
        ("lowest coverage of the difference", "delta_coverage", min, rows),
        ("the plain t interval's lowest coverage", "t_coverage", min, rows),
        ("most GO at the margin", "pass_at_margin", max, rows),
        ("the plain t bound's most GO at the margin", "t_pass_at_margin", max, rows),
        ("most NO-GO at the margin", "fail_at_margin", max, rows),
        (
            "least GO of identical candidates at the planned margin",
            "pass_identical",
            min,
            [r for r in rows if r["pass_identical"] is not None],
        ),
        ("lowest coverage of the pooled difference", "pooled_coverage", min, pooled),
        ("most GO of a pool at the margin", "pass_at_margin", max, pooled),
        ("lowest coverage of a difference with clusters lost whole", "delta_coverage", min, whole),
        ("most GO at the margin with clusters lost whole", "pass_at_margin", max, whole),
    ):
        row = pick(among, key=lambda row: row[name])
        print(f"{title}: {row[name]:.4f} at {describe(row)}")
    for name in ("mean", "delta"):
        wide = [row for row in rows if row[f"{name}_coverage"] > WIDE]
        print(
            f"{name}: {len(wide)} of {len(rows)} cells cover above {WIDE:.1%}; coverage, width and the plain t width in points:"
        )
        for row in wide:
            print(f"  {row[f'{name}_coverage']:.4f} {row[f'{name}_width']:7.3f} {row[f'{name}_t_width']:7.3f}  {describe(row)}")


def describe(row: dict) -> str:
    if "flips" in row:
        return f"{row['clusters']} clusters of {row['size']}, {row['damage']:.1%} lost whole, {row['flips']:.0%} of flips, {row['repeats']} repeats"
    clusters = f", {row['clusters']} clusters" if row["clusters"] else ""
    tasks = f"{row['tasks']}: " if "tasks" in row else ""
    return f"{tasks}n {row['questions']}, mean {row['mean']}, discordance {row['discordance']:.0%}, damage {100 * row['damage']:.2f}, {row['kind']}{clusters}"


if __name__ == "__main__":
    sys.exit(main())
