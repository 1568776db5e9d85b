"""GO, whatever the policy and the evidence: every condition of it holds, found again here without the gate's own functions."""

import math
import random
from dataclasses import replace

from gate_evidence import answers, diagnostics_row, policy, run_of
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from harness.evidence import pair
from harness.gate import judge_run
from harness.paired import damage_bound, p_inferior, pooled_damage_bound
from harness.power import assumed_spread, expected, planned

TASKS = ("a", "b", "c")
KERNELS = ("w4a4_emulation", "native", "w4a16", "w4a16+native", "unverified native", "unverified", "unknown", "bf16", "", None)
FLAGS = ((), ("imported",), ("unverified",), ("kernels unverified",), ("no fingerprint",), ("odd",), None)
ODD_ROWS = (
    [{"kernels": {"linear": kernel}} for kernel in KERNELS],
    [{"flags": None if flags is None else list(flags)} for flags in FLAGS],
    [
        {"flags": ["imported"], "imported": {}, "kernels": {"linear": "unknown"}},
        {"flags": ["unverified"], "kernels": {"linear": "unverified native"}},
    ],
    [{"judge": {"path": "x", "prompt": "p"}}, {"scorer": "s@2"}, {"unit": "plain"}],
    [{"is_partial": True}, {"is_partial": None}, {"higher_is_better": False}, {"higher_is_better": None}],
    [{"engine": None}, {"scorer": None}, {"version": None}, {"repeats": 2}],
)
KINDS = ("row", "rows", "rows", "rows", "scores", "scores", "run", "variant", "variant", "diagnostics")
"""Of what may be odd about a run."""
ODD_SCORES = ("none", "one", "few", "some missing", "many missing", "bad", "worse", "no share", "absent")
ODD_QUESTIONS = ("copied", "copied", "other clusters", "not asked")
ODD_RUNS = (
    *({"status": value} for value in ("unfinished", None)),
    *({"rehearsal": value} for value in (True, None)),
    {"resolved": {"reference": {"source": "x", "band": 3.0, "figure": [{"variant": "bf16", "task": "a", "value": 10.0}]}}},
)
ODD_VARIANTS = (
    {"selection": {"select": "best_of_k", "tasks": ["a"]}},
    {"selection": {"select": "best_val", "tasks": []}},
    {"budget": {"tokens": 200, "steps": 5}},
    {"budget": {"tokens": 100, "steps": 6}},
    {"budget": None},
)


@st.composite
def policies(draw):
    names = draw(st.lists(st.sampled_from(TASKS), min_size=1, unique=True))
    tasks = [
        {
            "name": name,
            "margin": draw(st.sampled_from([4.0, 10.0, 30.0])),
            "tier": draw(st.sampled_from(["critical", "supporting", "advisory"])),
            **draw(st.sampled_from([{}, {"alpha": 0.2}, {"min_questions": 5, "min_clusters": 2}, {"min_coverage": 0.9}])),
        }
        for name in names
    ]
    pooled = {} if any(task["tier"] == "critical" for task in tasks) and draw(st.booleans()) else {"pooled": {"margin": 8.0}}
    return policy(
        *tasks,
        **pooled,
        kernels=draw(st.sampled_from([("w4a4_emulation",), ("native", "w4a4_emulation")])),
        max_kl=draw(st.sampled_from([None, 0.2])),
        max_saturated_share=draw(st.sampled_from([None, 0.01])),
        min_questions=draw(st.sampled_from([30, 100])),
        admit_imported=draw(st.booleans()),
        admit_unverified=draw(st.booleans()),
        admit_unequal_budgets=draw(st.booleans()),
    )


def scored(variant, task, row, oddity, *, seed):
    """Answers of a variant; 80 % right, the same ones as every other variant unless they are odd."""
    noise = random.Random(seed)
    n = {"none": 0, "one": 1, "few": 25}.get(oddity, 120)
    missing = {"some missing": 0.03, "many missing": 0.3}.get(oddity, 0.0)
    lost = {"worse": 0.05, "bad": 0.5}.get(oddity, 0.0)
    scores = [[None if noise.random() < missing else float(i % 5 > 0 and noise.random() >= lost)] for i in range(n)]
    if oddity == "no share":
        scores[0][0] = 1.5
    found = answers(variant, task, scores, row=row)
    odd = {
        "copied": lambda q: replace(q, question=f"{task} {q.doc % 15}"),
        "other clusters": lambda q: replace(q, cluster=str(q.doc // 2)),
        "not asked": lambda q: replace(q, requests=()),
    }.get(oddity)
    return replace(found, questions={key: odd(q) for key, q in found.questions.items()}) if odd else found


@st.composite
def runs(draw):
    """A run that could be GO, with up to three things about it that are odd."""
    baseline, candidate = draw(st.sampled_from(["bf16", "bf16", "qat"])), draw(st.sampled_from(["ptq", "qad"]))
    rows = {(variant, task): {} for variant in (baseline, candidate) for task in TASKS}
    oddities = dict.fromkeys(rows, "")
    about = {"resolved": {"reference": {"source": "x", "band": 3.0, "figure": []}}}
    records = {name: {"budget": {"tokens": 100, "steps": 5}} for name in (baseline, candidate)}
    diagnostics = {candidate: diagnostics_row(0.1)}
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)):
        where = draw(st.sampled_from(sorted(rows)))
        if kind == "row":
            rows[where] |= draw(st.sampled_from(draw(st.sampled_from(ODD_ROWS))))
        elif kind == "rows":
            odd = draw(st.sampled_from(draw(st.sampled_from(ODD_ROWS))))
            rows = {key: row | odd if key[0] == where[0] else row for key, row in rows.items()}
        elif kind == "scores":
            odd = draw(st.sampled_from(ODD_SCORES + ODD_QUESTIONS))
            for variant in (baseline, candidate) if draw(st.booleans()) else (where[0],):
                oddities[variant, where[1]] = odd
        elif kind == "run":
            about |= draw(st.sampled_from(ODD_RUNS))
        elif kind == "variant":
            records[where[0]] = draw(st.sampled_from([*(records[where[0]] | odd for odd in ODD_VARIANTS), None])) or {}
        else:
            odd = draw(
                st.sampled_from([diagnostics_row(0.19), diagnostics_row(0.5), diagnostics_row(saturated_share=0.5), None])
            )
            diagnostics = {candidate: odd} if odd else {}
    seed = draw(st.integers(0, 1000))
    kept = [where for where in rows if oddities[where] != "absent" and records[where[0]]]
    held = [scored(*where, rows[where], oddities[where], seed=seed) for where in kept]
    variants = {name: record for name, record in records.items() if record}
    return run_of(held, variants=variants, about=about, diagnostics=diagnostics), baseline, candidate


def is_admitted(linear, flags, rule):
    """Whether figures of the candidate with this kernel and these flags may be used."""
    allowed = {*rule.kernels}
    if rule.admit_unverified:
        allowed |= {"unverified", *(f"unverified {kernel}" for kernel in rule.kernels)}
    if rule.admit_imported and "imported" in flags:
        allowed |= {"unknown", "", None}
    return all(part in allowed for part in (linear.split("+") if linear else [linear])) and are_admitted(flags, rule)


def are_admitted(flags, rule):
    known = {"imported"} if rule.admit_imported else set()
    known |= {"unverified", "kernels unverified", "no fingerprint"} if rule.admit_unverified else set()
    return set(flags) <= known


def assert_usable(run, rule, task, baseline, candidate):
    """That two score sets may decide anything."""
    ours, theirs = run.answers(baseline, task.name), run.answers(candidate, task.name)
    assert ours is not None and theirs is not None
    for each in (ours, theirs):
        assert are_admitted(each.row["flags"], rule)
        assert each.unit == "share" and each.row["is_partial"] is False
        assert each.higher_is_better is not False
        assert each.is_imported or (each.row["engine"] and each.row["scorer"] and each.row["version"])
        assert each.is_imported or all(len(q.requests) == len(q.scores) for q in each.questions.values())
        assert all(0 <= score <= 1 for q in each.questions.values() for score in q.scores if score is not None)
        selection = run.variants[each.variant].get("selection") or {}
        assert task.name not in selection.get("tasks", ())
    assert is_admitted(theirs.row["kernels"]["linear"], theirs.row["flags"], rule)
    for key in ("judge", "scorer", "repeats", "n_questions"):
        assert ours.row[key] == theirs.row[key]
    pairing = pair(ours, theirs)
    assert pairing.coverage >= (task.min_coverage or rule.min_coverage)
    assert len(pairing.pairs) >= (task.min_questions or rule.min_questions)
    assert len({each.cluster for each in pairing.pairs}) >= (task.min_clusters or rule.min_clusters)
    assert len({question.question for question, _ in pairing.questions}) >= (task.min_clusters or rule.min_clusters)
    groups = [{(q.key, q.cluster) for q in side.questions.values()} for side in (ours, theirs)]
    assert groups[0] == groups[1], "questions err together with others on the other side"
    n_scored = sum(ours.questions[b.key].n_scored for b, _ in pairing.questions)
    assert n_scored >= (task.min_coverage or rule.min_coverage) * len(ours.questions) * ours.row["repeats"]
    return pairing.pairs


def assert_all_of_go(run, rule, baseline, candidate):
    assert run.about["status"] == "complete" and run.about["rehearsal"] is False
    assert {baseline, candidate} <= set(run.variants) and baseline != candidate
    records = [run.variants[name] for name in (baseline, candidate)]
    if {record["method"] for record in records} <= {"qat", "qad"} and not rule.admit_unequal_budgets:
        assert records[0]["budget"] == records[1]["budget"]
        assert records[0]["budget"] is not None
    for figure in run.about["resolved"]["reference"]["figure"]:
        row = run.rows.get(("bf16", figure["task"]))
        comparable = row and row["value"] is not None and row["is_partial"] is False and row["unit"] == "share"
        if comparable and row["n_scored"] == row["n_total"]:
            assert abs(100 * row["value"] - figure["value"]) <= run.about["resolved"]["reference"]["band"]
    found, supporting = {}, []
    pooled_names = [task.name for task in rule.task] if rule.pooled else []
    for task in rule.task:
        if task.tier != "advisory" or task.name in pooled_names:
            found[task.name] = assert_usable(run, rule, task, baseline, candidate)
        alpha = task.alpha or rule.alpha
        if task.tier == "critical":
            assert damage_bound(found[task.name], alpha=alpha)[1] <= task.margin / 100
        elif task.tier == "supporting":
            supporting.append((p_inferior(found[task.name], margin=task.margin / 100), alpha))
    # after Bonferroni, which is stricter than Holm in what it calls a FAIL, none of them is one
    assert not any(p * len(supporting) < alpha * 0.999 for p, alpha in supporting)
    if rule.pooled:
        assert pooled_damage_bound([found[name] for name in pooled_names], alpha=rule.alpha)[1] <= rule.pooled.margin / 100
    assert rule.pooled or any(task.tier == "critical" for task in rule.task)
    row = run.diagnostics.get(candidate)
    if rule.max_kl is not None:
        assert row["response"]["kl"] + 1.6 * row["response"]["kl_stderr"] <= rule.max_kl
    if rule.max_saturated_share is not None:
        assert row["saturated_share"] is not None and row["saturated_share"] <= rule.max_saturated_share


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(policies(), runs())
def test_go_means_that_every_condition_holds(rule, made):
    run, baseline, candidate = made
    verdict = judge_run(run, rule, candidate=candidate, baseline=baseline)
    event(verdict.verdict)
    if verdict.verdict == "GO":
        assert_all_of_go(run, rule, baseline, candidate)
    assert verdict.reasons, "a verdict without a reason"
    assert all(check.reasons for check in verdict.checks), "a check without a reason"
    for check in verdict.checks:
        assert check.has_evidence or check.verdict == "INCONCLUSIVE"
        assert all(math.isfinite(value) for value in check.figures.values() if isinstance(value, float))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(100, 400), st.sampled_from([1, 4]), st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 0.9, 0.98, 1.0]))
def test_the_null_is_never_no_go(n, repeats, seed, mean):
    """The same answers drawn twice: by chance a FAIL of a margin of 2 points is far rarer than alpha."""
    draw = random.Random(seed)
    chances = [min(1.0, max(0.0, mean + draw.uniform(-0.1, 0.1))) for _ in range(n)]
    held = [
        answers(variant, "maths", [[float(draw.random() < p) for _ in range(repeats)] for p in chances])
        for variant in ("bf16", "bf16-again")
    ]
    run = run_of(held, variants={"bf16-again": {"sampling_seed": 1}})
    verdict = judge_run(run, policy({"name": "maths", "margin": 10.0}), candidate="bf16-again")
    assert verdict.verdict in ("GO", "INCONCLUSIVE")


def drawn(n, *, p_lost, p_won, seed):
    """A benchmark of single answers: a share of questions is lost, another won."""
    draw = random.Random(seed)
    ours, theirs = [], []
    for _ in range(n):
        chance = draw.random()
        before = 1.0 if chance < p_lost else 0.0 if chance < p_lost + p_won else float(draw.random() < 0.7)
        ours.append([before])
        theirs.append([1.0 - before if chance < p_lost + p_won else before])
    return answers("bf16", "maths", ours), answers("ptq", "maths", theirs)


def share_of_go(n_benchmarks, rule, **drawing):
    found = [judge_run(run_of(drawn(**drawing, seed=seed)), rule, candidate="ptq") for seed in range(n_benchmarks)]
    return sum(verdict.verdict == "GO" for verdict in found) / n_benchmarks


def test_a_candidate_exactly_at_the_margin_is_go_in_at_most_alpha_of_benchmarks():
    rule = policy({"name": "maths", "margin": 5.0})
    assert share_of_go(200, rule, n=100, p_lost=0.10, p_won=0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_a_candidate_as_good_as_the_baseline_is_go_in_four_of_five_benchmarks_with_the_planned_margin():
    n, discordance = 200, 0.10
    of = expected(n, 1, assumed_spread(), is_greedy=True, discordance=discordance)
    margin = 100 * planned([of], 0.05).smallest(0.8)
    rule = policy({"name": "maths", "margin": margin})
    found = share_of_go(200, rule, n=n, p_lost=discordance / 2, p_won=discordance / 2)
    assert found >= 0.8 - 3 * math.sqrt(0.8 * 0.2 / 200)
    assert found < 0.95, "the planner promises what the gate delivers, not much less"
