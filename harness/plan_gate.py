"""What `harness plan` says of the gate: the size of its tasks as prepared, what earlier answers varied by, margins and power. No torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.done import find_done
from harness.errors import StoreError
from harness.evidence import RunEvidence, open_run_evidence, pair
from harness.plan_power import FLIPS, NOT_PREPARED, Asked, GateOutlook, Outlook, Variation, gate_outlook
from harness.power import POWER, assumed_spread, spread_from
from harness.prepared import read_questions
from harness.records import read_json
from harness.tasks.sizes import MINI_TASKS, REQUESTS_A_QUESTION, n_questions

if TYPE_CHECKING:
    from harness.plan import Plan, Stage
    from harness.schema_gate import Gate
    from harness.store import Store


def gate_lines(plan: Plan, store: Store, policy: Gate, *, source: str, results: Path) -> list[str]:
    """What the policy can decide with this suite, and what that rests on, in lines.

    Args:
        source: of the policy, a path or "suite". results: where earlier runs of the suite are, of which the newest finished one is read.
    """
    prepared = {stage.task.name: stage for stage in plan.stages if stage.kind == "prepare" and stage.task is not None}
    asked = {name: _asked(prepared[name], store) for name in (task.name for task in policy.task) if name in prepared}
    baseline = policy.baseline or plan.suite.baseline.name
    variations, told = _estimates(results / plan.suite.name, policy, asked, baseline)
    outlook = gate_outlook(policy, asked, variations)
    greedy_guess = [size for name, size in asked.items() if size and size.is_greedy and name not in variations]
    how = f"harness prepare {shlex.quote(str(plan.suite.path))}"
    where = f"gate of {'the suite' if source == 'suite' else source}: {policy.candidate or 'a candidate'} against {baseline}"
    scenarios = f", where {_percent(FLIPS)} of greedy answers flip" if greedy_guess else ""
    return [
        f"{where}; margins in points, decided with {100 * POWER:g} % power{scenarios}, if the candidate is as good as the baseline",
        *(_check_line(check, how) for check in outlook.checks),
        _go_line(outlook),
        *_what_it_rests_on(asked, variations, told),
    ]


def _asked(prepare: Stage, store: Store) -> Asked | None:
    """What the suite will ask in a task; None where it has to be prepared to know."""
    task = prepare.task
    assert task is not None
    found = find_done(prepare, store)
    if found is not None:
        about = read_json(found.folder / "task.json")
        clusters = [question.cluster for question in read_questions(found.folder) if question.excluded is None]
        n_clusters, is_control = len(set(clusters)), task.pictures == "grey"
        return Asked(len(clusters), n_clusters, task.repeats, about["is_greedy"], about["is_partial"], is_control)
    if task.own_name not in MINI_TASKS or task.path is not None:
        return None
    n, limit = n_questions(task.own_name), task.limit
    n_asked = n if limit is None else min(limit, n)
    is_greedy = task.own_name in REQUESTS_A_QUESTION or not task.sampling.get("temperature")
    return Asked(n_asked, n_asked, task.repeats, is_greedy, n_asked < n, task.pictures == "grey")


def _estimates(
    runs: Path, policy: Gate, asked: Mapping[str, Asked | None], baseline: str
) -> tuple[dict[str, Variation], list[str]]:
    """By task what the answers of the newest finished run varied by, and lines about the runs that were looked at."""
    told: list[str] = []
    for path in sorted(runs.glob("*/run.json"), reverse=True):
        try:
            run = open_run_evidence(path.parent)
            if not run.is_finished or run.about.get("rehearsal") or baseline not in run.variants:
                continue
            found = {
                name: variation
                for name, size in asked.items()
                if size is not None and (variation := _variation(run, policy, name, size, baseline)) is not None
            }
        except StoreError as error:
            told.append(f"run {path.parent.name} is not looked at: {error}")
            continue
        if found:
            whose = f"{policy.candidate} against {baseline}" if policy.candidate in run.variants else baseline
            told.append(f"estimated from run {path.parent.name} ({whose}): {', '.join(found)}")
            return found, told
    return {}, told


def _variation(run: RunEvidence, policy: Gate, task: str, asked: Asked, baseline: str) -> Variation | None:
    """What the answers to a task varied by in a run; None where it does not show."""
    ours = run.answers(baseline, task)
    theirs = run.answers(policy.candidate, task) if policy.candidate in run.variants and policy.candidate != baseline else None
    if ours is None or not ours.is_share:
        return None
    pairing = None if theirs is None or not theirs.is_share else pair(ours, theirs)
    if asked.is_greedy:
        if pairing is None or not pairing.pairs:
            return None
        flips = math.fsum((p.candidate - p.baseline) ** 2 for p in pairing.pairs) / len(pairing.pairs)
        return Variation(assumed_spread(), (max(flips, 1 / len(pairing.pairs)),), "run")
    if pairing is None:
        spread = spread_from([question.scores for question in ours.questions.values()])
    else:
        spread = spread_from([b.scores for b, _ in pairing.questions], [c.scores for _, c in pairing.questions])
    return None if spread is None else Variation(spread, source="run")


def _check_line(check: Outlook, how: str) -> str:
    """how: what makes tasks ready."""
    head = f"  {check.name} ({check.tier}): margin {_points([check.margin])}"
    if check.reason is not None:
        if check.power:
            return f"{head}; {check.asked}: {check.reason}, so it never PASSes"
        return f"{head}; {check.reason}{f': {how}' if check.reason == NOT_PREPARED else ''}"
    does = "does not FAIL" if check.tier == "supporting" else "PASSes"
    needed = "" if all(a <= check.margin for a in check.smallest) else f"; the margin takes {_either(check.needed)}"
    return f"{head}; {check.asked} decide {_points(check.smallest)}{needed}; {does} with {_percent(check.power)}"


def _go_line(outlook: GateOutlook) -> str:
    if outlook.go is None:
        unknown = [check.name for check in outlook.checks if check.tier != "advisory" and not check.power]
        return f"joint power of GO: not known without {', '.join(unknown)}"
    low = " (below 80 %: more questions or repeats, or wider margins)" if min(outlook.go) < POWER else ""
    most = _percent(outlook.go).replace("over 99", "100")
    return f"joint power of GO: at most {most} (ceilings not counted){low}; checks taken as independent, evidence as in order"


def _what_it_rests_on(asked: Mapping[str, Asked | None], variations: Mapping[str, Variation], told: Sequence[str]) -> list[str]:
    sizes = {name: size for name, size in asked.items() if size is not None}
    guessed = [name for name in sizes if name not in variations]
    lines = list(told)
    for name, variation in variations.items():
        measured: Any = f"{_percent(variation.flips)} of answers flip" if sizes[name].is_greedy else variation.spread
        if not sizes[name].is_greedy:
            measured = f"variance {variation.spread.within:.3f} within a question, {variation.spread.effect:.4f} between ({variation.spread.source})"
        lines.append(f"  {name}: {measured}")
    greedy, sampled = ([name for name in guessed if sizes[name].is_greedy is kind] for kind in (True, False))
    if greedy:
        lines.append(f"assumed: {_percent(FLIPS)} of greedy answers flip ({', '.join(greedy)})")
    if sampled:
        lines.append(f"{assumed_spread().source} ({', '.join(sampled)})")
    return lines


def _points(margins: Sequence[float]) -> str:
    return _either([f"{100 * margin:.1f}" for margin in margins])


def _percent(shares: Sequence[float]) -> str:
    return _either([f"{100 * share:.0f}" if share <= 0.99 else "over 99" for share in shares]) + " %"


def _either(texts: Sequence[str]) -> str:
    """One text where all scenarios agree, else their numbers with what is common behind them."""
    numbers, units = zip(*(text.partition(" ")[::2] for text in dict.fromkeys(texts)), strict=True)
    return " / ".join(numbers) + f" {units[0]}".rstrip() if len(set(units)) == 1 else " / ".join(dict.fromkeys(texts))
