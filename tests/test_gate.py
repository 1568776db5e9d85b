"""The rules of the release gate: GO has to be earned, and everything that was ever sold as GO without evidence is refused."""

import dataclasses
import random
import re

import numpy as np
import pytest
from gate_evidence import answers, diagnostics_row, policy, right, run_of

from harness.gate import Check, as_record, decide, judge_run, worst
from harness.gate_checks import NOTED
from harness.gate_tasks import correct_supporting, verdict_of
from harness.intervals import moments, upper_bound

BF16 = answers("bf16", "maths", right(500, 400))


def judged(candidate=None, rule=None, name="ptq", baseline=BF16, **run):
    """The verdict on a candidate that answers as BF16 does, unless told otherwise."""
    candidate = answers(name, "maths", right(500, 400)) if candidate is None else candidate
    return judge_run(run_of([each for each in (baseline, candidate) if each], **run), rule or policy(), candidate=name)


def check_of(verdict, name):
    return next(check for check in verdict.checks if check.name == name)


def reasons_of(verdict):
    return "\n".join(verdict.reasons)


def test_a_candidate_that_answers_as_bf16_does_on_enough_questions_is_go():
    verdict = judged()
    assert verdict.verdict == "GO"
    assert (
        "maths: no change (80.0 against 80.0); with 95 % confidence at most 0.7 points of damage, within the margin of 3"
        in reasons_of(verdict)
    )
    assert "(500 questions)" in reasons_of(verdict)


def test_a_candidate_that_lost_more_than_the_margin_is_no_go():
    verdict = judged(answers("ptq", "maths", right(500, 340)))
    assert verdict.verdict == "NO-GO"
    assert "12.0 points worse (68.0 against 80.0)" in reasons_of(verdict) and "beyond the margin of 3" in reasons_of(verdict)


def test_a_candidate_near_the_margin_is_open_and_is_told_how_many_questions_would_decide():
    verdict = judged(answers("ptq", "maths", right(500, 391)))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "which leaves the margin of 3 open" in reasons_of(verdict)
    assert "questions would decide with 80 % power" in reasons_of(verdict)


def test_with_repeats_it_is_also_told_how_many_of_those_would_decide():
    draws = random.Random(5)
    ours, theirs = ([[float(draws.random() < 0.5) for _ in range(4)] for _ in range(300)] for _ in range(2))
    verdict = judged(
        answers("ptq", "maths", theirs), baseline=answers("bf16", "maths", ours), rule=policy({"name": "maths", "margin": 2.0})
    )
    assert verdict.verdict == "INCONCLUSIVE"
    assert "300 questions × 4 repeats" in reasons_of(verdict)
    assert re.search(r"about [\d,]+ repeats of each question or about [\d,]+ questions would decide", reasons_of(verdict))


def test_all_answers_alike_on_thirty_questions_are_no_proof_of_equality():
    verdict = judged(answers("ptq", "maths", right(30)), baseline=answers("bf16", "maths", right(30)))
    assert verdict.verdict == "INCONCLUSIVE"
    assert check_of(verdict, "maths").figures["damage_high"] > 9


def test_a_better_candidate_passes_and_is_never_an_anomaly():
    verdict = judged(answers("ptq", "maths", right(500, 460)))
    assert verdict.verdict == "GO"
    assert "12.0 points better" in reasons_of(verdict)


NEVER_GO = {
    "unfinished": ({"about": {"status": "unfinished"}}, "the run: the run is unfinished"),
    "no status": ({"about": {"status": None}}, "without a status"),
    "rehearsal": ({"about": {"rehearsal": True}}, "is a rehearsal"),
    "perhaps a rehearsal": ({"about": {"rehearsal": None}}, "may be a rehearsal"),
    "no candidate": ({"name": "qad", "candidate": answers("ptq", "maths", right(500))}, "has no variant qad"),
    "no answers": ({"candidate": answers("ptq", "other", right(500))}, "ptq has no result in maths"),
    "no baseline": ({"baseline": None}, "there is no baseline"),
    "baseline without the task": ({"baseline": answers("bf16", "other", right(9))}, "bf16 has no result in maths"),
    "partial": ({"candidate": answers("ptq", "maths", right(500), row={"is_partial": True})}, "first 500 questions only"),
    "partial unknown": ({"candidate": answers("ptq", "maths", right(500), row={"is_partial": None})}, "questions only"),
    "another kernel": (
        {"candidate": answers("ptq", "maths", right(500, 400), row={"kernels": {"linear": "w4a16"}})},
        "computed with w4a16; admitted: kernels = w4a4_emulation",
    ),
    "a mixture": (
        {"candidate": answers("ptq", "maths", right(500, 400), row={"kernels": {"linear": "w4a16+w4a4_emulation"}})},
        "computed with w4a16",
    ),
    "no kernel": ({"candidate": answers("ptq", "maths", right(500, 400), row={"kernels": {}})}, "unknown kernels"),
    "kernels null": ({"candidate": answers("ptq", "maths", right(500, 400), row={"kernels": None})}, "unknown kernels"),
    "not quantized after all": (
        {"candidate": answers("ptq", "maths", right(500, 400), row={"kernels": {"linear": "bf16"}})},
        "computed with bf16; admitted: kernels = w4a4_emulation",
    ),
    "a quantized BF16": (
        {"baseline": answers("bf16", "maths", right(500, 400), row={"kernels": {"linear": "w4a16"}})},
        "admitted: BF16, as nothing of it is quantized",
    ),
    "chose its checkpoint": (
        {"variants": {"ptq": {"selection": {"select": "best_of_k", "tasks": ["maths"]}}}},
        "maths chose the checkpoint of ptq",
    ),
    "was to choose its checkpoint": (
        {"variants": {"ptq": {"training": {"select": "best_of_k", "select_tasks": ["maths"]}}}},
        "maths chose the checkpoint of ptq",
    ),
    "chose its checkpoint in a way of its own": (
        {"variants": {"ptq": {"selection": {"select": "best", "tasks": ["maths"]}}}},
        "maths chose the checkpoint of ptq",
    ),
    "chose the baseline": (
        {"variants": {"bf16": {"selection": {"select": "best_of_k", "tasks": ["maths"]}}}},
        "maths chose the checkpoint of bf16",
    ),
    "imported": (
        {"candidate": answers("ptq", "maths", right(500, 400), row={"flags": ["imported"]})},
        "'imported', and the policy does not admit that (admit_imported = true would)",
    ),
    "imported and not marked": (
        {
            "candidate": answers("ptq", "maths", right(500, 400), row={"imported": {"tool": "x"}}),
            "baseline": answers("bf16", "maths", right(500, 400), row={"imported": {"tool": "x"}}),
        },
        "'imported', and the policy does not admit that (admit_imported = true would)",
    ),
    "unverified": (
        {"candidate": answers("ptq", "maths", right(500, 400), row={"flags": ["unverified"]})},
        "admit_unverified = true would",
    ),
    "unverified baseline": (
        {"baseline": answers("bf16", "maths", right(500, 400), row={"flags": ["unverified"]})},
        "bf16's score is marked 'unverified'",
    ),
    "a control with grey pictures": (
        {
            "candidate": answers("ptq", "maths", right(500, 400), row={"flags": ["grey pictures"]}),
            "baseline": answers("bf16", "maths", right(500, 400), row={"flags": ["grey pictures"]}),
            "rule": policy(admit_imported=True, admit_unverified=True),
        },
        "Control: maths shows grey pictures, so its figures are no scores",
    ),
    "an unknown flag": (
        {
            "candidate": answers("ptq", "maths", right(500, 400), row={"flags": ["from a dream"]}),
            "rule": policy(admit_imported=True, admit_unverified=True),
        },
        "'from a dream', which no policy admits",
    ),
    "no flags": (
        {"candidate": answers("ptq", "maths", right(500, 400), row={"flags": None})},
        "does not say whether it is verified",
    ),
    "another judge": (
        {"candidate": answers("ptq", "maths", right(500, 400), row={"judge": {"path": "x", "prompt": "p"}})},
        "Judge: ptq was judged by x, bf16 by none",
    ),
    "another scorer": ({"candidate": answers("ptq", "maths", right(500, 400), row={"scorer": "maths@2"})}, "Scorer: "),
    "no share": (
        {
            "candidate": answers("ptq", "maths", right(500, 400), row={"unit": "plain"}),
            "baseline": answers("bf16", "maths", right(500, 400), row={"unit": "plain"}),
        },
        "exact_match is no share",
    ),
    "not what a share is": ({"candidate": answers("ptq", "maths", [[1.5]] * 500)}, "is no share"),
    "lower is better": (
        {
            "candidate": answers("ptq", "maths", right(500, 400), row={"higher_is_better": False}),
            "baseline": answers("bf16", "maths", right(500, 400), row={"higher_is_better": False}),
        },
        "exact_match is better when lower",
    ),
    "direction unknown": (
        {"candidate": answers("ptq", "maths", right(500, 400), row={"higher_is_better": None})},
        "not known to be better when higher",
    ),
    "missing answers": (
        {"candidate": answers("ptq", "maths", [*right(499, 399), [None]])},
        "99.8 % of the asked answers are scored by both, 100 % are required",
    ),
    "few questions": ({"rule": policy(min_questions=501)}, "500 questions answered by both, of at least 501"),
    "few clusters": (
        {
            "candidate": answers("ptq", "maths", right(500, 400), n_clusters=19),
            "baseline": answers("bf16", "maths", right(500, 400), n_clusters=19),
        },
        "19 clusters answered by both, of at least 20",
    ),
    "other questions": (
        {"candidate": answers("ptq", "maths", right(450, 400))},
        "Questions: 50 of 500 that bf16 was asked ptq was not",
    ),
    "no question": ({"candidate": answers("ptq", "maths", [])}, "Questions: 500 of 500"),
    "a task that is not there": (
        {"rule": policy({"name": "maths"}, {"name": "mathss", "tier": "supporting"})},
        "the run has no task mathss; did you mean maths?",
    ),
    "no diagnostics": ({"rule": policy(max_kl=1.0)}, "KL: not measured: the run has no [diagnostics] of ptq"),
}


@pytest.mark.parametrize("case", NEVER_GO)
def test_it_is_never_go_and_says_why(case):
    given, reason = NEVER_GO[case]
    verdict = judged(**given)
    assert verdict.verdict == "INCONCLUSIVE"
    assert reason in reasons_of(verdict)


NVFP4 = {"activations": True, "fp8": [], "kv_cache": "bf16"}


@pytest.mark.parametrize(
    ("quantization", "kernels", "reason"),
    [
        (NVFP4, {"kv_cache": "bf16", "experts": "w4a4_emulation"}, None),
        (NVFP4, {"experts": "w4a16"}, "computed with w4a16 (experts); admitted: kernels = bf16, w4a4_emulation"),
        (NVFP4, {"experts": None}, "computed with unknown kernels (experts)"),
        (NVFP4, {"experts": "w4a16+w4a4_emulation"}, "computed with w4a16 (experts); admitted: kernels = bf16, w4a4_emulation"),
        (NVFP4, {"experts": "bf16"}, None),  # left alone by the recipe: what ships is in BF16 there
        (NVFP4, {"linear": "bf16", "experts": "w4a4_emulation"}, None),
        (NVFP4, {"linear": "bf16", "experts": "bf16"}, "computed with bf16; admitted: kernels = w4a4_emulation"),
        (NVFP4, {"linear": "bf16", "experts": "w4a16"}, "computed with w4a16 (experts); admitted: kernels = w4a4_emulation"),
        (NVFP4, {"kv_cache": "fp8"}, "computed with fp8 (kv_cache); admitted: bf16"),
        (NVFP4, {"kv_cache": "unknown"}, "computed with unknown kernels (kv_cache)"),
        (NVFP4, {"linear_fp8": "w8a16"}, "computed with w8a16 (linear_fp8); admitted: FP8 times FP8"),
        (NVFP4 | {"fp8": ["*"]}, {"linear_fp8": "w8a8_emulation"}, None),
        (NVFP4 | {"fp8": ["*"]}, {"linear_fp8": "CutlassFP8ScaledMMLinearKernel"}, None),
        (NVFP4 | {"fp8": ["*"]}, {"linear_fp8": "MarlinFP8ScaledMMLinearKernel"}, "MarlinFP8ScaledMMLinearKernel (linear_fp8)"),
        (NVFP4 | {"fp8": ["*"]}, {}, "computed with unknown kernels (linear_fp8)"),
        (NVFP4 | {"fp8": ["*"]}, {"linear": "bf16", "linear_fp8": "w8a8_emulation", "experts": "w4a4_emulation"}, None),
        (NVFP4 | {"fp8": ["*"]}, {"experts": "w8a8_emulation"}, None),  # then no other layer has to be FP8
        (
            NVFP4 | {"fp8": ["*"]},
            {"experts": "w8a16"},
            "w8a16 (experts); admitted: kernels = bf16, w4a4_emulation, or FP8 times FP8",
        ),
        (NVFP4, {"experts": "w8a8_emulation"}, "w8a8_emulation (experts); admitted: kernels = bf16, w4a4_emulation"),
        (
            NVFP4 | {"fp8": ["*"]},
            {"linear": "bf16", "experts": "w8a8_emulation"},
            "computed with bf16; admitted: kernels = w4a4",
        ),
        (None, {"experts": "w8a8_emulation"}, None),
        (NVFP4 | {"kv_cache": "fp8"}, {"kv_cache": "fp8_emulation"}, None),
        (NVFP4 | {"kv_cache": "fp8"}, {"kv_cache": "fp8"}, None),
        (NVFP4 | {"kv_cache": "fp8"}, {"kv_cache": "bf16"}, "computed with bf16 (kv_cache); admitted: fp8 or fp8_emulation"),
        (NVFP4 | {"kv_cache": "fp8"}, {}, "computed with unknown kernels (kv_cache)"),
        (NVFP4, {"vision": "bf16"}, "names kernels of 'vision', a class of modules that is not known here"),
        (None, {"kv_cache": "fp8"}, None),
        (None, {"kv_cache": "int4"}, "computed with int4 (kv_cache)"),
    ],
)
def test_every_class_of_modules_is_computed_as_the_variant_says(quantization, kernels, reason):
    candidate = answers("ptq", "maths", right(500, 400), row={"kernels": {"linear": "w4a4_emulation"} | kernels})
    verdict = judged(candidate, variants={"ptq": {"quantization": quantization}})
    assert verdict.verdict == ("INCONCLUSIVE" if reason else "GO")
    assert (reason or "no change") in reasons_of(verdict)


@pytest.mark.parametrize("kernels", [{"kv_cache": "fp8"}, {"linear_fp8": "w8a8_emulation"}, {"experts": "native"}])
def test_nothing_of_a_bf16_baseline_is_computed_quantized(kernels):
    verdict = judged(baseline=answers("bf16", "maths", right(500, 400), row={"kernels": {"linear": "bf16"} | kernels}))
    assert verdict.verdict == "INCONCLUSIVE"
    assert f"({next(iter(kernels))}); admitted: BF16, as nothing of it is quantized" in reasons_of(verdict)


def test_a_run_without_any_task_is_inconclusive():
    run = run_of([], variants={"bf16": {}, "ptq": {}})
    verdict = judge_run(run, policy(), candidate="ptq")
    assert verdict.verdict == "INCONCLUSIVE" and "the run has no task maths; it has none" in reasons_of(verdict)


@pytest.mark.parametrize("flag", [*NOTED, *(f"judge {flag}" for flag in NOTED)])
def test_merged_input_scales_are_noted_and_no_reason_against_a_score(flag):
    verdict = judged(answers("ptq", "maths", right(500, 400), row={"flags": [flag]}))
    assert verdict.verdict == "GO"
    assert check_of(verdict, "maths").reasons[-1] == f"noted: ptq's score is marked {flag!r}"
    damaged = judged(answers("ptq", "maths", right(500, 300), row={"flags": [flag]}))
    assert damaged.verdict == "NO-GO" and "noted: ptq's score" in reasons_of(damaged)
    other = judged(answers("ptq", "maths", right(500, 400), row={"flags": [flag, "judged by hand"]}))
    assert other.verdict == "INCONCLUSIVE" and "marked 'judged by hand', which no policy admits" in reasons_of(other)


def test_merged_input_scales_are_noted_behind_a_ceiling_too():
    flagged = {"ptq": diagnostics_row(0.1, 0.001) | {"flags": list(NOTED)}}
    run = run_of([BF16, answers("ptq", "maths", right(500, 400))], diagnostics=flagged)
    verdict = judge_run(run, policy(max_kl=0.2), candidate="ptq")
    assert verdict.verdict == "GO"
    assert check_of(verdict, "KL").reasons[-1] == f"noted: the KL of ptq is marked {NOTED[0]!r}"


def test_merged_input_scales_of_its_tasks_are_noted_behind_a_pooled_endpoint_too():
    run = run_of([BF16, answers("ptq", "maths", right(500, 400), row={"flags": list(NOTED)})])
    verdict = judge_run(run, policy(pooled={"margin": 3.0}), candidate="ptq")
    assert check_of(verdict, "pooled").reasons[-1] == f"noted: ptq's score is marked {NOTED[0]!r}"


def test_a_withdrawn_run_is_never_go():
    run = run_of([BF16, answers("ptq", "maths", right(500, 400))])
    verdict = judge_run(run, policy(), candidate="ptq", withdrawn="a wrong prompt")
    assert verdict.verdict == "INCONCLUSIVE" and "the run was invalidated: a wrong prompt" in reasons_of(verdict)


def test_a_variant_against_itself_is_neither_go_nor_no_go():
    verdict = judge_run(run_of([BF16]), policy(), candidate="bf16")
    assert verdict.verdict == "INCONCLUSIVE" and "bf16 is compared with itself" in reasons_of(verdict)


@pytest.mark.parametrize(("candidate", "baseline"), [("ptq", "ptq-again"), ("ptq-again", "ptq"), ("ptq-again", "ptq-third")])
def test_the_same_quantized_weights_asked_twice_are_never_go(candidate, baseline):
    held = [answers(name, "maths", right(500, 400)) for name in (candidate, baseline)]
    seeds = {"ptq-again": {"sampling_seed": 1}, "ptq-third": {"sampling_seed": 2}}
    run = run_of(held, variants={name: seeds.get(name, {}) for name in (candidate, baseline)})
    verdict = judge_run(run, policy(), candidate=candidate, baseline=baseline)
    assert verdict.verdict == "INCONCLUSIVE"
    assert f"{candidate} has the weights of {baseline}, so the two differ by chance alone" in reasons_of(verdict)


@pytest.mark.parametrize(("n_right", "verdict"), [(80, "INCONCLUSIVE"), (100, "INCONCLUSIVE"), (120, "GO")])
def test_where_the_baseline_has_no_more_than_the_margin_to_lose_nothing_passes(n_right, verdict):
    """5 % right is not more than a margin of 5 points; 6 % is, with 2,000 questions."""
    held = {name: answers(name, "maths", right(2000, n_right)) for name in ("bf16", "ptq")}
    found = judged(held["ptq"], baseline=held["bf16"], rule=policy({"name": "maths", "margin": 5.0}))
    assert found.verdict == verdict
    if verdict != "GO":
        assert "a candidate that answers nothing right would pass, too" in reasons_of(found)
    collapsed = judged(
        answers("ptq", "maths", right(2000, 0)), baseline=held["bf16"], rule=policy({"name": "maths", "margin": 5.0})
    )
    assert collapsed.verdict != "GO"


def test_nor_does_the_pooled_endpoint():
    held = [answers(name, task, right(2000, 80)) for name in ("bf16", "ptq") for task in "ab"]
    tasks = [{"name": task, "tier": "advisory", "margin": 5.0} for task in "ab"]
    verdict = judge_run(run_of(held), policy(*tasks, pooled={"margin": 5.0}), candidate="ptq")
    assert verdict.verdict == "INCONCLUSIVE" and "pooled: the baseline's own score is" in reasons_of(verdict)
    assert judge_run(run_of(held), policy(*tasks, pooled={"margin": 3.0}), candidate="ptq").verdict == "GO"


def test_two_checkpoints_from_elsewhere_are_compared_only_where_unequal_budgets_are_admitted():
    held = [answers(name, "maths", right(500, 400)) for name in ("checkpoint", "checkpoint-b")]
    run = run_of(held, variants={name: {"path": name} for name in ("checkpoint", "checkpoint-b")})
    verdict = judge_run(run, policy(), candidate="checkpoint", baseline="checkpoint-b")
    assert verdict.verdict == "INCONCLUSIVE" and "on an unknown number of tokens" in reasons_of(verdict)
    rule = policy(admit_unequal_budgets=True)
    assert judge_run(run, rule, candidate="checkpoint", baseline="checkpoint-b").verdict == "GO"


def test_bf16_with_other_seeds_is_go_where_there_is_enough_of_it_and_asks_for_no_kernel():
    again = answers("bf16-again", "maths", right(500, 400))
    measured = diagnostics_row(0.0, 0.0, kernels={"linear": "bf16"}, saturated_share=None)
    run = run_of([BF16, again], variants={"bf16-again": {"sampling_seed": 1}}, diagnostics={"bf16": measured})
    assert judge_run(run, policy(max_saturated_share=0.1, max_kl=0.1), candidate="bf16-again").verdict == "GO"


def test_damning_scores_without_evidence_are_no_no_go():
    bad = answers("ptq", "maths", right(500, 0), row={"flags": ["unverified"]})
    verdict = judged(bad)
    assert verdict.verdict == "INCONCLUSIVE"
    assert check_of(verdict, "maths").figures["delta"] == -80


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        (
            {"flags": ["imported"], "imported": {}, "kernels": {"linear": "unknown"}, "higher_is_better": None},
            {"admit_imported": True},
        ),
        ({"flags": ["unverified"], "kernels": {"linear": "unverified w4a4_emulation"}}, {"admit_unverified": True}),
        ({"flags": ["unverified", "no fingerprint"], "kernels": {"linear": "unverified"}}, {"admit_unverified": True}),
    ],
)
def test_what_is_not_proven_is_go_only_where_the_policy_admits_it(row, keys):
    candidate = answers("ptq", "maths", right(500, 400), row=row | ({"imported": {"tool": "x"}} if "imported" in row else {}))
    base = answers("bf16", "maths", right(500, 400), row=candidate.row | {"variant": "bf16"})
    assert judged(candidate, baseline=base).verdict == "INCONCLUSIVE"
    assert judged(candidate, baseline=base, rule=policy(**keys)).verdict == "GO"
    other = {"admit_imported", "admit_unverified"} - set(keys)
    assert judged(candidate, baseline=base, rule=policy(**dict.fromkeys(other, True))).verdict == "INCONCLUSIVE"


def test_an_admitted_endpoint_that_claims_another_kernel_is_not_go():
    candidate = answers(
        "ptq", "maths", right(500, 400), row={"flags": ["unverified"], "kernels": {"linear": "unverified w4a16"}}
    )
    verdict = judged(candidate, rule=policy(admit_unverified=True))
    assert verdict.verdict == "INCONCLUSIVE" and "unverified w4a16; admitted" in reasons_of(verdict)


BUDGET = {"tokens": 1000, "steps": 10, "lr": 1e-4}


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (BUDGET | {"lr": 1e-2}, "GO"),
        (BUDGET | {"tokens": 2000}, "INCONCLUSIVE"),
        (BUDGET | {"steps": 20}, "INCONCLUSIVE"),
        (None, "INCONCLUSIVE"),
    ],
)
def test_two_trained_variants_are_compared_at_equal_tokens_and_steps_unless_admitted(other, verdict):
    held = [answers("qat", "maths", right(500, 400)), answers("qad", "maths", right(500, 400))]
    run = run_of(held, variants={"qat": {"budget": BUDGET}, "qad": {"budget": other}})
    assert judge_run(run, policy(), candidate="qad", baseline="qat").verdict == verdict
    assert judge_run(run, policy(admit_unequal_budgets=True), candidate="qad", baseline="qat").verdict == "GO"


def test_two_trained_variants_of_unknown_cost_are_not_compared():
    held = [answers("qat", "maths", right(500, 400)), answers("qad", "maths", right(500, 400))]
    assert judge_run(run_of(held), policy(), candidate="qad", baseline="qat").verdict == "INCONCLUSIVE"


def test_the_training_of_a_checkpoint_from_elsewhere_is_unknown():
    held = [answers("checkpoint", "maths", right(500, 400)), answers("qad", "maths", right(500, 400))]
    run = run_of(held, variants={"qad": {"budget": BUDGET}})
    verdict = judge_run(run, policy(), candidate="qad", baseline="checkpoint")
    assert verdict.verdict == "INCONCLUSIVE" and "checkpoint on an unknown number of tokens" in reasons_of(verdict)


def test_one_trained_variant_against_bf16_has_no_budget_to_match():
    held = [BF16, answers("qad", "maths", right(500, 400))]
    assert judge_run(run_of(held, variants={"qad": {"budget": BUDGET}}), policy(), candidate="qad").verdict == "GO"


def reference(value, **changes):
    figure = {"variant": "bf16", "task": "maths", "value": value}
    return {"about": {"resolved": {"reference": {"source": "a card", "band": 2.0, "figure": [figure | changes]}}}}


def test_a_baseline_within_the_band_of_a_published_figure_is_no_obstacle():
    verdict = judged(**reference(81.9))
    assert verdict.verdict == "GO" and check_of(verdict, "BF16 in maths").verdict == "PASS"


@pytest.mark.parametrize("value", [82.1, 77.9])
def test_a_baseline_outside_the_band_makes_every_verdict_inconclusive(value):
    verdict = judged(answers("ptq", "maths", right(500, 0)), **reference(value))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "BF16 in maths: suspect baseline: ours is 80.0, published is" in reasons_of(verdict)
    tasks = [check for check in verdict.checks if check.kind == "task"]
    assert [check.verdict for check in tasks] == ["INCONCLUSIVE"]
    assert tasks[0].reasons[0].startswith("does not count: suspect baseline")


def test_a_part_of_a_task_is_not_compared_with_a_published_figure_and_that_is_said():
    verdict = judged(baseline=answers("bf16", "maths", right(500, 0), row={"is_partial": True}), **reference(80.0))
    check = check_of(verdict, "BF16 in maths")
    assert (check.tier, check.verdict) == ("advisory", "INCONCLUSIVE")
    assert "only the first 500 questions of maths were asked (limit): not compared with the published 80" in check.reasons[0]


@pytest.mark.parametrize(
    ("value", "n_missing", "verdict"),
    [(80.0, 5, "GO"), (82.5, 5, "INCONCLUSIVE"), (78.5, 5, "INCONCLUSIVE"), (80.0, 40, "INCONCLUSIVE")],
)
def test_missing_answers_of_the_baseline_count_as_wrong_and_as_right_beside_a_published_figure(value, n_missing, verdict):
    half = n_missing // 2
    scores = [*right(400 - half, 400 - half), *[[None]] * n_missing, *right(100 - n_missing + half, 0)]
    found = judged(baseline=answers("bf16", "maths", scores), rule=policy(min_coverage=0.9), **reference(value))
    assert found.verdict == verdict
    assert "by what the missing answers would have been, published is" in check_of(found, "BF16 in maths").reasons[0]


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        (
            {"metric": "by_step"},
            "BF16 in maths by_step",
            "the published figure of maths is of by_step, and what is judged of exact_match: not compared with the published 10",
        ),
        (
            {"task": "diagnostics", "metric": "ce"},
            "BF16 in CE",
            "ce is in nats, and the band in points: not compared with the published 10",
        ),
    ],
)
def test_a_published_figure_of_another_metric_or_in_nats_is_not_held_against_a_score_and_that_is_said(changes, name, reason):
    verdict = judged(**reference(10.0, **changes))
    check = check_of(verdict, name)
    assert verdict.verdict == "GO" and (check.tier, check.reasons) == ("advisory", (reason,))


def test_a_published_figure_that_names_the_metric_in_the_table_is_held_against_it():
    assert judged(**reference(10.0, metric="exact_match")).verdict == "INCONCLUSIVE"


def test_a_published_figure_of_nobody_is_named_and_makes_the_baseline_suspect():
    verdict = judged(**reference(80.0, variant="BF16"))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "a published figure is of BF16, and the run has no such variant or method; did you mean bf16?" in reasons_of(verdict)


def test_the_published_figure_is_held_against_bf16_also_where_the_baseline_is_another_variant():
    held = [BF16, answers("ptq", "maths", right(500, 400)), answers("qad", "maths", right(500, 400))]
    verdict = judge_run(run_of(held, **reference(60.0)), policy(), candidate="qad", baseline="ptq")
    assert verdict.verdict == "INCONCLUSIVE" and "suspect baseline" in reasons_of(verdict)


def test_a_published_figure_of_another_variant_is_no_matter_of_the_baseline():
    verdict = judged(**reference(10.0, variant="ptq"))
    assert verdict.verdict == "GO" and not [check for check in verdict.checks if check.kind == "sanity"]


def several(ptq, *tasks, **keys):
    """A verdict over tasks of 500 questions, of which BF16 has 400 right, and PTQ as many as are named."""
    held = [BF16]
    for name, n_right in ptq.items():
        held += [answers("bf16", name, right(500, 400)), answers("ptq", name, right(500, n_right))]
    return judge_run(run_of(held), policy(*tasks, **keys), candidate="ptq")


def test_an_advisory_fail_decides_nothing():
    tasks = ({"name": "a"}, {"name": "b", "tier": "advisory"})
    verdict = several({"a": 400, "b": 0}, *tasks)
    assert verdict.verdict == "GO" and check_of(verdict, "b").verdict == "FAIL"


def test_a_supporting_fail_is_no_go():
    assert several({"a": 400, "b": 300}, {"name": "a"}, {"name": "b", "tier": "supporting"}).verdict == "NO-GO"


def test_an_undecided_supporting_task_is_no_obstacle_and_is_named():
    verdict = several({"a": 400, "b": 386}, {"name": "a"}, {"name": "b", "tier": "supporting"})
    assert verdict.verdict == "GO" and "undecided, but no FAIL: b" in reasons_of(verdict)


def test_a_supporting_task_without_evidence_is_an_obstacle():
    verdict = several({"a": 400}, {"name": "a"}, {"name": "b", "tier": "supporting"})
    assert verdict.verdict == "INCONCLUSIVE" and "b: the run has no task b" in reasons_of(verdict)


def test_a_supporting_fail_that_holm_takes_back_is_undecided_and_says_so():
    names = "bcdefghijk"
    tasks = ({"name": "a"}, *({"name": name, "tier": "supporting"} for name in names))
    ptq = dict.fromkeys(names, 400) | {"a": 400, "b": 374}
    alone = several(ptq, *tasks[:2])
    assert (alone.verdict, check_of(alone, "b").verdict) == ("NO-GO", "FAIL")
    verdict = several(ptq, *tasks)
    assert verdict.verdict == "GO"
    assert check_of(verdict, "b").verdict == "INCONCLUSIVE"
    assert (
        "alone it would be a FAIL" in check_of(verdict, "b").reasons[-1]
        and "among 10 supporting checks" in check_of(verdict, "b").reasons[-1]
    )
    figures = check_of(verdict, "b").figures
    assert figures["p_beyond_margin"] < 0.05 < figures["p_beyond_margin_holm"] == pytest.approx(10 * figures["p_beyond_margin"])


def test_holm_leaves_checks_without_evidence_out():
    born = Check("x", "task", "supporting")
    assert correct_supporting([born], [None]) == [born]


def test_a_critical_fail_is_no_go_beside_a_critical_task_that_is_missing():
    assert several({"a": 0}, {"name": "a"}, {"name": "b"}).verdict == "NO-GO"


def test_a_pooled_endpoint_decides_what_single_tasks_leave_open():
    tasks = [{"name": name, "tier": "advisory", "margin": 2.0} for name in "abcd"]
    ptq = {"a": 394, "b": 406, "c": 395, "d": 405}
    verdict = several(ptq, *tasks, pooled={"margin": 2.0})
    assert {check_of(verdict, name).verdict for name in "ac"} == {"INCONCLUSIVE"}
    assert verdict.verdict == "GO"
    assert "pooled: no change on average over 4 tasks" in reasons_of(verdict) and "(2,000 questions)" in reasons_of(verdict)


def test_a_pooled_endpoint_is_of_all_its_tasks_or_none():
    tasks = [{"name": name, "tier": "advisory"} for name in "abc"]
    verdict = several({"a": 400, "b": 400}, *tasks, pooled={"margin": 2.0})
    assert verdict.verdict == "INCONCLUSIVE" and "pooled: no evidence in c" in reasons_of(verdict)
    assert several({"a": 400, "b": 400}, *tasks, pooled={"margin": 2.0, "tasks": ("a", "b")}).verdict == "GO"


def test_a_pooled_endpoint_says_what_would_decide_it():
    verdict = several(
        {"a": 394, "b": 390}, {"name": "a", "tier": "advisory"}, {"name": "b", "tier": "advisory"}, pooled={"margin": 2.0}
    )
    assert verdict.verdict == "INCONCLUSIVE" and "times as many answers would decide" in reasons_of(verdict)


@pytest.mark.parametrize(
    ("row", "verdict", "reason"),
    [
        (diagnostics_row(0.10), "GO", ""),
        (diagnostics_row(0.30), "NO-GO", "at least 0.283, beyond the ceiling of 0.2 (100 sequences)"),
        (diagnostics_row(0.19), "INCONCLUSIVE", "which leaves the ceiling of 0.2 open"),
        (diagnostics_row(0.10, None), "INCONCLUSIVE", "has no value or no error"),
        (diagnostics_row(0.10, n=19), "INCONCLUSIVE", "over 19 sequences, of at least 20"),
        (diagnostics_row(kernels={"linear": "w4a16"}), "INCONCLUSIVE", "the KL of ptq was computed with w4a16"),
        (diagnostics_row(kernels={}), "INCONCLUSIVE", "unknown kernels"),
        (diagnostics_row(tasks={"maths": {"flags": ["imported"]}}), "INCONCLUSIVE", "the KL of ptq is marked 'imported'"),
        (diagnostics_row(flags=["unverified"]), "INCONCLUSIVE", "the KL of ptq is marked 'unverified'"),
        (diagnostics_row(-5.0, 0.0), "INCONCLUSIVE", "they are no amounts: found -5.0, 0.0 over 100"),
        (diagnostics_row(0.3, -1.0), "INCONCLUSIVE", "no amounts"),
        (diagnostics_row(0.1, float("nan")), "INCONCLUSIVE", "no amounts"),
        (diagnostics_row("0.1"), "INCONCLUSIVE", "no amounts"),
        (diagnostics_row(n="100"), "INCONCLUSIVE", "no amounts"),
    ],
)
def test_kl_is_held_against_its_ceiling_with_its_error(row, verdict, reason):
    found = judged(rule=policy(max_kl=0.2), diagnostics={"ptq": row})
    assert found.verdict == verdict and reason in reasons_of(found)


@pytest.mark.parametrize(
    ("share", "variant", "verdict"),
    [
        (0.001, {}, "GO"),
        (0.02, {}, "NO-GO"),
        (None, {}, "INCONCLUSIVE"),
        (-1, {}, "INCONCLUSIVE"),
        (2, {}, "INCONCLUSIVE"),
        (float("nan"), {}, "INCONCLUSIVE"),
        (None, {"quantization": {"activations": False}}, "GO"),
        (None, {"quantization": {"activations": True}}, "INCONCLUSIVE"),
    ],
)
def test_the_saturated_share_has_a_ceiling_where_activations_are_quantized(share, variant, verdict):
    row = diagnostics_row(saturated_share=share)
    found = judged(rule=policy(max_saturated_share=0.01), diagnostics={"ptq": row}, variants={"ptq": variant})
    assert found.verdict == verdict


def changed(of, **changes):
    """Answers with other fields in each question: by name a function of its number."""
    questions = {
        key: dataclasses.replace(question, **{name: make(i) for name, make in changes.items()})
        for i, (key, question) in enumerate(of.questions.items())
    }
    return dataclasses.replace(of, questions=questions)


@pytest.mark.parametrize(
    ("n_incomplete", "verdict"), [(0, "GO"), (5, "GO"), (15, "INCONCLUSIVE"), (60, "NO-GO"), (None, "INCONCLUSIVE")]
)
def test_incomplete_answers_have_a_ceiling(n_incomplete, verdict):
    cut = changed(
        answers("ptq", "maths", right(500, 400)),
        incomplete=lambda i: (None if n_incomplete is None and i else i < (n_incomplete or 0),),
    )
    assert judged(cut, rule=policy(max_incomplete_rate=0.04)).verdict == verdict


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [
        (lambda i: (10,), "GO"),
        (lambda i: (5,), "GO"),
        (lambda i: (11 + i % 3,), "NO-GO"),
        (lambda i: (100 if i == 0 else 10 + i % 2,), "INCONCLUSIVE"),
        (lambda i: (None if i == 3 else 10,), "INCONCLUSIVE"),
        (lambda i: ("10",), "INCONCLUSIVE"),
        (lambda i: (-10,), "INCONCLUSIVE"),
    ],
)
def test_the_growth_of_answers_has_a_ceiling(tokens, verdict):
    longer = changed(answers("ptq", "maths", right(500, 400)), n_tokens=tokens)
    assert judged(longer, rule=policy(max_length_growth=0.06)).verdict == verdict


def test_a_ceiling_of_the_policy_is_not_asked_of_a_task_that_generates_nothing_and_its_own_is():
    held = [
        changed(each, incomplete=lambda i: (None,), truncated=lambda i: (None,), n_tokens=lambda i: (None,))
        for each in (BF16, answers("ptq", "maths", right(500, 400)))
    ]
    run = run_of(held)
    assert judge_run(run, policy(max_incomplete_rate=0.1, max_length_growth=0.1), candidate="ptq").verdict == "GO"
    own = judge_run(run, policy({"name": "maths", "max_incomplete_rate": 0.1}), candidate="ptq")
    assert own.verdict == "INCONCLUSIVE" and "maths: incomplete answers: not measured" in reasons_of(own)


def test_where_text_was_generated_a_ceiling_does_not_vanish():
    held = [changed(each, incomplete=lambda i: (None,)) for each in (BF16, answers("ptq", "maths", right(500, 400)))]
    verdict = judge_run(run_of(held), policy(max_incomplete_rate=0.1), candidate="ptq")
    assert verdict.verdict == "INCONCLUSIVE" and "maths: incomplete answers: not measured" in reasons_of(verdict)


def test_where_the_baseline_is_beyond_a_ceiling_too_it_is_no_regression():
    def half(name):
        return changed(answers(name, "maths", right(500, 400)), incomplete=lambda i: (i % 2 == 0,))

    rule = policy(max_incomplete_rate=0.2)
    null = run_of([half("bf16"), half("bf16-again")], variants={"bf16-again": {"sampling_seed": 1}})
    verdict = judge_run(null, rule, candidate="bf16-again")
    assert verdict.verdict == "INCONCLUSIVE" and "the baseline itself is beyond it (50 %)" in reasons_of(verdict)
    assert judged(half("ptq"), rule=rule).verdict == "NO-GO"
    rows = {name: diagnostics_row(saturated_share=0.02) for name in ("ptq", "qad")}
    run = run_of([answers(name, "maths", right(500, 400)) for name in rows], diagnostics=rows)
    verdict = judge_run(run, policy(max_saturated_share=0.01), candidate="qad", baseline="ptq")
    assert verdict.verdict == "INCONCLUSIVE" and "the baseline itself is beyond it (2 %)" in reasons_of(verdict)


def test_ceilings_of_an_advisory_task_are_advisory():
    held = [answers("bf16", name, right(500, 400)) for name in "ab"] + [answers("ptq", "a", right(500, 400))]
    held.append(changed(answers("ptq", "b", right(500, 400)), incomplete=lambda i: (True,)))
    rule = policy({"name": "a"}, {"name": "b", "tier": "advisory"}, max_incomplete_rate=0.1)
    verdict = judge_run(run_of(held), rule, candidate="ptq")
    assert verdict.verdict == "GO" and check_of(verdict, "b: incomplete answers").verdict == "FAIL"


def test_own_settings_of_a_task_come_before_those_of_the_policy():
    strict = policy({"name": "maths", "min_questions": 501, "min_coverage": 0.5, "alpha": 0.01})
    check = check_of(judged(rule=strict), "maths")
    assert check.figures["alpha"] == 0.01 and check.verdict == "INCONCLUSIVE"
    lax = policy({"name": "maths", "min_questions": 10, "min_coverage": 0.5}, min_questions=501, min_coverage=1.0)
    assert judged(answers("ptq", "maths", [*right(499, 399), [None]]), rule=lax).verdict == "GO"


def test_tasks_that_the_policy_does_not_name_are_listed():
    held = [BF16, answers("ptq", "maths", right(500, 400)), answers("ptq", "spare", right(5))]
    assert judge_run(run_of(held), policy(), candidate="ptq").unnamed == ("spare",)


def test_a_check_is_born_inconclusive_and_nothing_at_all_is_inconclusive():
    assert Check("x", "task", "critical").verdict == "INCONCLUSIVE"
    assert decide([])[0] == "INCONCLUSIVE" and worst([]) == "INCONCLUSIVE"
    assert decide([Check("the run", "evidence", "critical", "PASS", has_evidence=True)])[0] == "INCONCLUSIVE"
    assert decide([Check("KL", "ceiling", "critical", "PASS", has_evidence=True)])[0] == "INCONCLUSIVE"
    assert decide([Check("x", "task", "critical", "PASS")])[0] == "INCONCLUSIVE", "a PASS without evidence"


def test_a_fail_beside_what_is_no_evidence_is_no_no_go():
    assert decide([Check("the run", "evidence", "critical"), Check("x", "task", "critical", "FAIL")])[0] == "INCONCLUSIVE"


def test_a_bound_that_is_no_number_decides_nothing():
    assert verdict_of(float("nan"), float("nan"), 0.1) == "INCONCLUSIVE"


def test_the_worst_of_several_verdicts_counts_and_the_record_is_plain():
    run = run_of([BF16, answers("ptq", "maths", right(500, 400)), answers("qad", "maths", right(500, 300))])
    verdicts = [judge_run(run, policy(), candidate=name) for name in ("ptq", "qad")]
    record = as_record(verdicts, run, "a.toml")
    assert [each["verdict"] for each in record["candidates"]] == ["GO", "NO-GO"]
    assert (record["schema"], record["suite"], record["run"], record["verdict"]) == (1, "hand", "r", "NO-GO")
    assert record["policy"]["source"] == "a.toml" and record["policy"]["task"][0]["margin"] == 3.0


@pytest.mark.parametrize(("n_lost", "margin"), [(4, 2.0), (10, 4.0)])
def test_as_many_questions_as_it_is_told_would_decide_do(n_lost, margin):
    verdict = judged(
        answers("ptq", "maths", right(500, 400 - n_lost)), rule=policy({"name": "maths", "margin": margin}, alpha=0.01)
    )
    said = int(re.search(r"about ([\d,]+) questions", reasons_of(verdict))[1].replace(",", ""))
    share = n_lost / 500
    drawn_again = np.random.default_rng(1).choice([1.0, 0.0], size=(1000, said), p=[share, 1 - share])
    passed = (upper_bound(moments(drawn_again, np.arange(said)), 0.01) <= margin / 100).mean()
    assert 0.7 < passed < 0.95 and said > 500
