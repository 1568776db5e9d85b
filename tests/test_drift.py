"""What moved between two runs, and what is only chance."""

import pytest
from sample_runs import sample, write_run

from harness.drift import drift
from harness.errors import StoreError
from harness.evidence import open_run_evidence


def a_run(results, name, *, right, n=200, sequences=(), **more):
    """A run of one task with n questions, of which the first `right` by variant are answered."""
    samples = {
        (variant, "maths"): [sample(doc, 1.0 if doc < n_right else 0.0) for doc in range(n)]
        for variant, n_right in right.items()
    }
    rows = [
        {"variant": variant, "sequence": index, "n_tokens": 10, "kl_sum": kl, "ce_sum": 1.0, "top1_sum": 5.0}
        for variant, values in dict(sequences).items()
        for index, kl in enumerate(values)
    ]
    return open_run_evidence(write_run(results / "hand" / name, samples, sequences=rows, **more))


def moved(before, after, *names):
    return drift(before, after, variants=[(name, name) for name in names])


def test_a_score_and_a_kl_that_moved_by_more_than_chance_are_named_with_their_errors(tmp_path):
    before = a_run(tmp_path, "a", right={"ptq": 150}, sequences={"ptq": [1.0, 2.0, 3.0, 2.0]})
    after = a_run(tmp_path, "b", right={"ptq": 100}, sequences={"ptq": [3.1, 4.0, 5.1, 3.9]})
    found = moved(before, after, "ptq")
    assert {(shift.what, round(shift.change, 3)) for shift in found.shifts} == {("maths", -25.0), ("KL", 0.202)}
    assert found.n_compared == 2 and not found.refused
    assert "ptq maths -25.0 ±3.1 points" in found.sentence()
    assert "ptq KL +0.202 ±0.005" in found.sentence()


def test_runs_that_are_alike_have_not_moved(tmp_path):
    runs = [a_run(tmp_path, name, right={"bf16": 150, "ptq": 120}, sequences={"ptq": [1.0, 2.0]}) for name in "ab"]
    found = moved(*runs, "bf16", "ptq")
    assert found.sentence() == "3 figures within the noise"
    assert [shift.p for shift in found.shifts] == []


def test_a_few_flips_among_many_questions_are_chance(tmp_path):
    before, after = a_run(tmp_path, "a", right={"ptq": 150}), a_run(tmp_path, "b", right={"ptq": 147})
    assert moved(before, after, "ptq").sentence() == "1 figure within the noise"


def test_what_would_count_alone_does_not_count_among_many(tmp_path):
    names = [f"v{number}" for number in range(9)]
    before = a_run(tmp_path, "a", right=dict.fromkeys(["ptq", *names], 150))
    after = a_run(tmp_path, "b", right=dict.fromkeys(names, 150) | {"ptq": 143})  # 7 flips one way: p = 2 / 128
    assert [shift.variant for shift in moved(before, after, "ptq").shifts] == ["ptq"]
    together = moved(before, after, "ptq", *names)
    assert (together.shifts, together.n_compared) == ((), 10)


def test_a_variant_is_held_against_bf16_of_its_own_run(tmp_path):
    run = a_run(tmp_path, "a", right={"bf16": 150, "ptq": 90}, sequences={"bf16": [0.0] * 4, "ptq": [4.0, 4.1, 3.9, 4.0]})
    found = drift(run, run, variants=[("bf16", "ptq")])
    assert "ptq maths -30.0" in found.sentence() and "ptq KL +0.400" in found.sentence()
    assert "ptq" not in found.sentence(names_variants=False)


def test_what_cannot_be_paired_is_said_and_not_compared(tmp_path):
    before = a_run(tmp_path, "a", right={"ptq": 150}, sequences={"ptq": [1.0, 2.0]})
    scorer = {"ptq": {"scorer": "maths@2:def"}}
    after = a_run(tmp_path, "b", right={"ptq": 100}, sequences={"ptq": [1.0, 2.0, 3.0]}, row_changes=scorer)
    found = moved(before, after, "ptq")
    assert (found.shifts, found.n_compared) == ((), 0)
    assert found.sentence().startswith(
        "nothing could be compared; not compared: ptq maths: Scorer: maths@1:abc for ptq, maths@2:def"
    )
    assert "ptq KL: measured on other sequences" in found.sentence()


def test_what_one_run_alone_has_is_said(tmp_path):
    before = a_run(tmp_path, "a", right={"ptq": 150}, sequences={"ptq": [1.0, 2.0]})
    after = a_run(tmp_path, "b", right={"bf16": 150, "ptq": 150})
    found = moved(before, after, "bf16", "ptq")
    assert found.refused == ("bf16 maths: only one of the two has a result", "ptq KL: only one of the two is measured")


@pytest.mark.parametrize(
    ("changes", "sequences", "message"),
    [
        ({"cluster": "one"}, [1.0, 2.0], "ptq maths: all its questions err together, so chance cannot be told"),
        ({}, [1.0], "ptq KL: one sequence, so chance cannot be told"),
    ],
)
def test_where_chance_cannot_be_told_nothing_is_claimed(tmp_path, changes, sequences, message):
    runs = []
    for name, score in (("a", 1.0), ("b", 0.0)):
        samples = {("ptq", "maths"): [sample(doc, score, **changes) for doc in range(20)]}
        rows = [
            {"variant": "ptq", "sequence": index, "n_tokens": 10, "kl_sum": kl + score, "ce_sum": 1.0, "top1_sum": 5.0}
            for index, kl in enumerate(sequences)
        ]
        runs.append(open_run_evidence(write_run(tmp_path / "hand" / name, samples, sequences=rows)))
    found = moved(*runs, "ptq")
    assert message in found.refused
    assert message.split(":")[0] not in {f"{shift.variant} {shift.what}" for shift in found.shifts}


def test_a_metric_that_is_no_share_is_not_given_in_points(tmp_path):
    rows = {"ptq": {"unit": "words"}}
    before, after = (a_run(tmp_path, name, right={"ptq": 150}, row_changes=rows) for name in "ab")
    assert moved(before, after, "ptq").refused == ("ptq maths: exact_match is no share",)


def test_sequences_without_their_kl_are_an_error_that_names_the_file(tmp_path):
    runs = [a_run(tmp_path, name, right={"ptq": 150}, sequences={"ptq": [1.0, 2.0]}) for name in "ab"]
    path = runs[1].folder / "diagnostics_sequences.jsonl"
    path.write_text(path.read_text().replace('"kl_sum"', '"kl"'))
    with pytest.raises(StoreError, match=r"diagnostics_sequences\.jsonl: line 1: lacks 'kl_sum'"):
        moved(*runs, "ptq")
