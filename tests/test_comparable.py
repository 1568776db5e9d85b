"""What makes two score sets not comparable: each reason is said with both values, and what may differ is let be."""

import pytest
from sample_runs import sample, write_run

from harness.comparable import differences
from harness.evidence import open_run_evidence

JUDGE = {
    "path": "judge/one",
    "revision": None,
    "weights": "w1",
    "prompt": "p1",
    "engine": {"engine": "hf"},
    "kernels": {"linear": "bf16"},
}
ENGINE = {"engine": "vllm", "version": 3, "device": "cuda-H100", "packages": {"torch": "2.13.0", "transformers": "5.17.0"}}


@pytest.fixture
def compared(tmp_path):
    """Differences between two variants in a task, given what is changed of either: sample rows, the row, the variant's record."""

    def compare(
        ours=None,
        theirs=None,
        *,
        rows=None,
        variants=None,
        names=("bf16", "ptq"),
        min_coverage=1.0,
        baseline_run=None,
        about=None,
        may_differ=(),
    ):
        usual = [sample(0), sample(1, 0.0), sample(2)]
        samples = {(names[0], "maths"): ours or usual, (names[1], "maths"): theirs or usual}
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run = open_run_evidence(write_run(folder, samples, row_changes=rows, variant_changes=variants, about_changes=about))
        first = baseline_run or run
        sides = first.answers(names[0], "maths"), run.answers(names[1], "maths")
        found = differences(run, *sides, baseline_run=baseline_run, min_coverage=min_coverage, may_differ=may_differ)
        assert all(each.endswith(".") and each[0].isupper() for each in found), "sentences"
        compare.run = run
        return found

    return compare


def test_bf16_against_a_quantized_variant_of_the_same_protocol_is_comparable(compared):
    assert compared() == []


def test_the_same_questions_asked_in_other_tokens_are_refused_and_named(compared):
    (found,) = compared(theirs=[sample(0), sample(1, requests=["a" * 64]), sample(2, requests=["b" * 64])])
    assert found == "Prompts: 2 of 3 questions were asked of bf16 and ptq in other tokens (questions 1, 2)."


def test_questions_that_only_one_was_asked_are_counted_and_named(compared):
    ours, theirs = [sample(n) for n in range(6)], [sample(0), sample(9)]
    assert compared(ours, theirs) == [
        "Questions: 5 of 6 that bf16 was asked ptq was not (questions 1, 2, 3 and 2 more).",
        "Questions: 1 of 2 that ptq was asked bf16 was not (question 9).",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scorer": "maths@1:def"}, "Scorer: maths@1:abc for bf16, maths@1:def for ptq."),
        ({"version": 2}, "Version of the task: 1 for bf16, 2 for ptq."),
        ({"unit": "plain"}, "Unit: share for bf16, plain for ptq."),
        ({"is_partial": True}, "Limit: ptq was asked the first questions of the task only, bf16 all of them."),
        ({"judge": JUDGE}, "Judge: ptq was judged by judge/one, bf16 by none."),
        ({"engine": None}, "Engine: which one answered for ptq is not recorded, for bf16 it was hf."),
        (
            {"imported": {"tool": "lm-eval"}, "scorer": "lm-eval 0.4.9"},
            "Scored elsewhere: ptq was scored by lm-eval 0.4.9 and imported, bf16 by this harness; prompts, sampling and scorers of the two "
            "cannot be held against each other.",
        ),
    ],
)
def test_what_is_scored_otherwise_is_refused_with_both_values(compared, changes, sentence):
    assert compared(rows={"ptq": changes}) == [sentence]


def test_a_limit_that_both_have_is_none_of_the_differences(compared):
    assert compared(rows={"maths": {"is_partial": True}}) == []


def test_other_numbers_of_repeats_are_refused(compared):
    twice = [sample(n, repeat=repeat) for n in range(3) for repeat in range(2)]
    assert compared(theirs=twice) == ["Repeats of a question: 1 for bf16, 2 for ptq."]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"path": "judge/two"}, "Judge's path: judge/one for bf16, judge/two for ptq."),
        ({"weights": "w2"}, "Judge's weights: w1 for bf16, w2 for ptq."),
        ({"prompt": "p2"}, "Judge's prompt: p1 for bf16, p2 for ptq."),
        ({"engine": {"engine": "vllm"}}, "Judge's engine: engine hf for bf16, engine vllm for ptq."),
    ],
)
def test_another_judge_is_refused(compared, changes, sentence):
    counts = {"n_asked": 7, "n_unparsable": 0}
    assert compared(rows={"bf16": {"judge": JUDGE | {"n_asked": 9}}, "ptq": {"judge": JUDGE | counts}}) == []
    assert compared(rows={"bf16": {"judge": JUDGE}, "ptq": {"judge": JUDGE | changes}}) == [sentence]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": "hf"}, "Kind of engine: vllm for bf16, hf for ptq."),
        ({"version": 4}, "Version of the engine: 3 for bf16, 4 for ptq."),
        ({"device": "cuda-A100"}, "Device: cuda-H100 for bf16, cuda-A100 for ptq."),
        (
            {"packages": {"torch": "2.14.0", "transformers": "5.17.0"}},
            "Packages of the engine: torch 2.13.0 for bf16, torch 2.14.0 for ptq.",
        ),
    ],
)
def test_another_engine_version_or_device_is_refused(compared, changes, sentence):
    assert compared(rows={"bf16": {"engine": ENGINE}, "ptq": {"engine": ENGINE}}) == []
    assert compared(rows={"bf16": {"engine": ENGINE}, "ptq": {"engine": ENGINE | changes}}) == [sentence]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": None}, "Engine: which one answered is recorded neither for bf16 nor for ptq; score the run again."),
        ({"engine": {}}, "Engine: which one answered is recorded neither for bf16 nor for ptq; score the run again."),
        ({"scorer": None}, "Scorer: what scored is recorded neither for bf16 nor for ptq; score the run again."),
        ({"version": None}, "Version of the task: it is recorded neither for bf16 nor for ptq; score the run again."),
    ],
)
def test_what_neither_side_records_is_not_taken_to_be_the_same(compared, changes, sentence):
    assert compared(rows={"maths": changes}) == [sentence]


def test_whether_a_judge_judged_has_to_be_recorded(compared):
    assert compared(rows={"maths": {"judge": None}}) == []
    run = compared.run
    sides = [run.answers(name, "maths") for name in ("bf16", "ptq")]
    for side in sides:
        del side.row["judge"]
    assert differences(run, *sides) == ["Judge: whether one judged is not recorded for bf16 and ptq; score the run again."]


def test_own_scores_without_what_was_asked_are_refused(compared):
    silent = [sample(0), sample(1, 0.0, requests=[]), sample(2, requests=[])]
    assert compared(theirs=silent) == [
        "Prompts: what was asked is not recorded for 2 of 3 questions of ptq (questions 1, 2); score the run again."
    ]
    assert len(compared(silent, silent)) == 2


def test_questions_that_err_together_with_other_ones_are_refused(compared):
    (found,) = compared(theirs=[sample(0), sample(1, cluster="0"), sample(2)])
    assert (
        found
        == "Clusters: 1 of 3 questions err together with other ones for bf16 than for ptq (question 1); score the run again."
    )


def test_scores_that_no_share_has_are_refused(compared):
    (found,) = compared(theirs=[sample(0), sample(1, 1.5), sample(2)])
    assert found == (
        "Unit: exact_match of ptq is recorded as a share and has a score of 1.5 (question 1); score the run again."
    )


def test_a_metric_of_which_nothing_was_asked_is_not_covered(compared):
    assert compared(rows={"maths": {"unit": "plain"}}) == []
    sides = [compared.run.answers(name, "maths") for name in ("bf16", "ptq")]
    for side in sides:
        side.row.update(n_scored=0, n_total=0)
    (found,) = differences(compared.run, *sides)
    assert found.startswith("Coverage: 0.0 %")


def test_two_quantized_variants_need_the_same_kernel_and_bf16_does_not(compared):
    kernels = {"ptq": {"kernels": {"linear": "w4a4_emulation"}}, "qad": {"kernels": {"linear": "native"}}}
    (found,) = compared(names=("ptq", "qad"), rows=kernels)
    assert found == (
        "Kernels: the linear layers of ptq: w4a4_emulation; of qad: native. Unless one of the two is BF16, the kernel has to be the same."
    )
    assert compared(names=("bf16", "qad"), rows=kernels) == []


def test_two_bf16_variants_need_the_same_kernel(compared):
    records = {"again": {"method": "bf16", "sampling_seed": 1}}
    (found,) = compared(
        names=("bf16", "again"), variants=records, rows={"again": {"kernels": {"linear": "native", "kv_cache": "bf16"}}}
    )
    assert found.startswith("Kernels: the linear layers of bf16: bf16; of again: native.")


def test_a_cache_of_another_precision_is_refused_unless_the_variants_are_about_it(compared):
    kernels = {
        "ptq": {"kernels": {"linear": "native", "kv_cache": "bf16"}},
        "qad": {"kernels": {"linear": "native", "kv_cache": "fp8"}},
    }
    (found,) = compared(names=("ptq", "qad"), rows=kernels)
    assert "the cache of keys and values of ptq: bf16; of qad: fp8" in found
    records = {"ptq": {"quantization": {"kv_cache": "bf16"}}, "qad": {"quantization": {"kv_cache": "fp8"}}}
    assert compared(names=("ptq", "qad"), rows=kernels, variants=records) == []


def test_a_class_of_layers_that_only_one_variant_has_is_said(compared):
    kernels = {"ptq": {"kernels": {"linear": "native"}}, "qad": {"kernels": {"linear": "native", "experts": "w4a16"}}}
    (found,) = compared(names=("ptq", "qad"), rows=kernels)
    assert "the experts of ptq: none; of qad: w4a16" in found


def test_other_seeds_are_fine_and_drawing_against_greedy_is_not(compared):
    hot, other = ([sample(n, seed=10 * k + n) for n in range(3)] for k in (1, 2))
    assert compared(hot, other) == []
    assert compared(hot) == ["Sampling: the answers of bf16 were drawn with seeds, those of ptq draw nothing (greedy)."]


def test_missing_answers_are_counted_by_their_reason_and_a_lower_coverage_has_to_be_asked_for(compared):
    theirs = [sample(0), sample(1, None, missing="no answer within 9 s"), sample(2, None)]
    (found,) = compared(theirs=theirs)
    assert found == (
        "Coverage: 33.3 % of the asked answers are scored by both, 100 % are required; bf16 lacks 0 of 3 and ptq lacks 2 of 3 "
        "(1 status 500, 1 timeout)."
    )
    assert compared(theirs=theirs, min_coverage=0.33) == []


def test_a_metric_without_scores_of_samples_is_covered_by_what_the_row_says(compared):
    corpus = [sample(n, metrics={"exact_match": [1.0, 2.0]}) for n in range(3)]
    rows = {"maths": {"unit": "plain", "value": 41.5, "n_scored": 3, "n_total": 3}}
    assert compared(corpus, corpus, rows=rows) == []
    rows = {"maths": rows["maths"], ("ptq", "maths"): {"n_scored": 2}}
    (found,) = compared(corpus, corpus, rows=rows)
    assert found.startswith("Coverage: 66.7 %")


def test_imported_scores_are_compared_with_imported_ones_of_the_same_scorer(compared):
    foreign = [sample(n, requests=[], imported=True) for n in range(3)]
    said = {"imported": {"tool": "lm-eval"}, "kernels": {"linear": "unknown"}, "scorer": "lm-eval 0.4.9"}
    assert compared(foreign, foreign, rows={"maths": said}) == []
    rows = {"maths": said, ("ptq", "maths"): {"scorer": "lm-eval 0.4.13"}}
    assert compared(foreign, foreign, rows=rows) == ["Scorer: lm-eval 0.4.9 for bf16, lm-eval 0.4.13 for ptq."]


def resolved(**changes):
    task = {"name": "maths", "sampling": {"temperature": 0.6}, "limit": None, "seed": 0, "path": "/a"}
    return {
        "model": {"fingerprint": changes.pop("weights", "hub:abc")},
        "resolved": {
            "model": {},
            "engine": {"kind": "hf", "args": changes.pop("args", {})},
            "judge": None,
            "tasks": [task | changes],
        },
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"seed": 4, "path": "/b"}, None),
        ({"weights": "hub:def"}, "Model: the run run0 is of the weights hub:abc, the run run1 of hub:def."),
        (
            {"sampling": {"temperature": 1.0}},
            "Settings of the task maths: sampling is temperature 0.6 in the run run0 and temperature 1.0 in the run run1.",
        ),
        ({"limit": 20}, "Settings of the task maths: limit is none in the run run0 and 20 in the run run1."),
        (
            {"args": {"batch_size": 8}},
            "Settings of the engine: args is none in the run run0 and batch_size 8 in the run run1.",
        ),
    ],
)
def test_of_another_run_model_engine_and_settings_of_the_task_are_compared(compared, changes, sentence):
    compared(about=resolved())
    assert compared(about=resolved(**changes), baseline_run=compared.run) == ([] if sentence is None else [sentence])


def test_the_weights_may_be_what_two_runs_are_compared_about(compared):
    compared(about=resolved())
    assert compared(about=resolved(weights="hub:def"), baseline_run=compared.run, may_differ=("model",)) == []
    other = resolved(weights="hub:def", args={"batch_size": 8})
    (found,) = compared(about=other, baseline_run=compared.run, may_differ=("model",))
    assert found.startswith("Settings of the engine")


def test_the_kernel_may_differ_where_activations_are_what_is_compared_and_nowhere_else(compared):
    rows = {"ptq": {"kernels": {"linear": "w4a4_emulation"}}, "w4a16": {"kernels": {"linear": "w4a16"}}}
    asked = {"ptq": {"quantization": {"activations": True}}, "w4a16": {"quantization": {"activations": False}}}
    names = ("ptq", "w4a16")
    assert compared(names=names, rows=rows, variants=asked, may_differ=("activations",)) == []
    (found,) = compared(names=names, rows=rows, variants=asked)
    assert found.startswith("Kernels: the linear layers of ptq: w4a4_emulation; of w4a16: w4a16.")
    same = {"ptq": asked["ptq"], "w4a16": asked["ptq"]}
    assert compared(names=names, rows=rows, variants=same, may_differ=("activations",)) == [found]


def test_long_values_that_begin_alike_are_told_apart(compared):
    long = "x" * 70
    (found,) = compared(rows={"bf16": {"scorer": f"{long}1"}, "ptq": {"scorer": f"{long}2"}})
    assert f"{long}1" in found and f"{long}2" in found
