"""Scores of a run without text, and what is read of a run: kept apart from samples, refused where they are damaged."""

import json
import shutil

import pytest
from sample_runs import sample, write_run

from harness.errors import StoreError
from harness.evidence import open_run_evidence, pair
from harness.score_files import missing_class, score_rows, scores_path, write_missing_scores


@pytest.fixture
def run(tmp_path):
    samples = {
        ("bf16", "maths"): [sample(0), sample(1, 0.0), sample(2, None)],
        ("ptq", "maths"): [sample(0), sample(1, 0.0), sample(2)],
    }
    return write_run(tmp_path / "run", samples)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_scores_hold_hashes_and_numbers_and_none_of_the_text():
    secret = "the answer is a lizard"
    row = sample(3, 1.0, cluster=secret, target=secret, response=[secret], answer={"boxed": secret}, seed=11)
    lost = sample(3, None, repeat=1, cluster=secret, missing=f"status 500: {secret}")
    (found,) = score_rows("bf16", "maths", [row, lost], "exact_match")
    assert "lizard" not in json.dumps(found)
    assert found["doc"] == 3 and found["question"] == row["question"] and len(found["cluster"]) == 16
    assert (found["scores"], found["seeds"], found["n_tokens"]) == ([1.0, None], [11, None], [7, None])
    assert (found["incomplete"], found["truncated"]) == ([False, None], [False, None])
    assert found["missing"] == [None, "status 500"]
    assert found["requests"][0] == found["requests"][1] and len(found["requests"][0]) == 64


@pytest.mark.parametrize(
    ("reason", "known"),
    [
        ("status 429: too many requests for What is 2 plus 2?", "status 429"),
        ("HTTP 500 after 5 tries", "status 500"),
        ("no answer within 60 s", "timeout"),
        ("no connection: refused", "connection"),
        ("the connection was cut: while What is 2", "connection"),
        ("not in lm-eval's results", "not in the results"),
        ("What is status 500 worth?", "other"),
    ],
)
def test_a_reason_for_a_missing_answer_is_told_as_a_class(reason, known):
    assert missing_class(reason) == known


def test_a_judge_without_a_verdict_and_a_metric_without_scores_of_samples_are_told_apart():
    judged = {"judged": {"verdict": None}, "metrics": {"exact_match": None}}
    (no_verdict,) = score_rows("bf16", "maths", [sample(0, **judged)], "exact_match")
    (corpus,) = score_rows("bf16", "maths", [sample(0, metrics={"exact_match": [1.0, 2.0]})], "exact_match")
    assert (no_verdict["scores"], no_verdict["missing"]) == ([None], ["no verdict"])
    assert (corpus["scores"], corpus["missing"]) == ([None], [None])


def test_a_question_that_the_metric_does_not_cover_has_no_scores():
    samples = [sample(0, metrics={"4096": 1.0}), sample(1, metrics={"8192": 1.0})]
    assert score_rows("bf16", "ruler", samples, "8192")[0]["doc"] == 1


def test_a_run_is_read_without_its_samples(run):
    shutil.rmtree(run / "samples")
    found = open_run_evidence(run)
    answers = found.answers("bf16", "maths")
    assert (found.baseline, found.tasks, list(found.variants)) == ("bf16", ("maths",), ["bf16", "ptq"])
    assert [question.mean for question in answers.questions.values()] == [1.0, 0.0, None]
    assert (answers.metric, answers.unit, answers.higher_is_better, answers.repeats) == ("exact_match", "share", True, 1)
    assert found.answers("qad", "maths") is None and found.answers("bf16", "sums") is None


def test_the_bf16_variant_that_draws_with_other_seeds_is_not_the_baseline(tmp_path):
    samples = {(name, "maths"): [sample(0)] for name in ("bf16_again", "bf16")}
    records = {"bf16_again": {"method": "bf16", "sampling_seed": 1}, "bf16": {"method": "bf16", "sampling_seed": None}}
    assert open_run_evidence(write_run(tmp_path / "run", samples, variant_changes=records)).baseline == "bf16"


def test_questions_that_are_asked_alike_are_told_apart_by_their_order(tmp_path):
    same = {"requests": ["a" * 64], "question": "b" * 64}
    run = write_run(tmp_path / "run", {("bf16", "maths"): [sample(0, **same), sample(1, **same), sample(2)]})
    keys = list(open_run_evidence(run).answers("bf16", "maths").questions)
    assert len(keys) == 3 and keys[1] == f"{keys[0]}#2"


def test_a_run_of_an_older_version_says_to_run_the_suite_again(run):
    shutil.rmtree(run / "scores")
    with pytest.raises(StoreError, match=r"bf16\.maths\.jsonl: missing; runs made by an older version .* run the suite again"):
        open_run_evidence(run).answers("bf16", "maths")


def test_scores_that_an_unfinished_run_has_not_written_yet_are_told_from_those_of_an_older_version(run):
    shutil.rmtree(run / "scores")
    change(run / "run.json", status="unfinished")
    with pytest.raises(StoreError, match="not there yet, the run is not finished; look again later"):
        open_run_evidence(run).answers("bf16", "maths")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "line [0-9]+ is damaged"),
        (lambda text: text.replace('"schema": 1', '"schema": 9'), "line 1 has schema 9, this version reads 1"),
        (lambda text: "".join(text.splitlines(keepends=True)[:2]), "has 2 questions, tasks.jsonl says n_questions = 3"),
        (lambda text: text.replace("[1.0]", "[0.0]"), "come to value = 0.0, tasks.jsonl says 0.5"),
        (lambda text: text.replace("[1.0]", "[NaN]"), "line 1: scores is .nan., allowed is a list of a number or null"),
        (lambda text: text.replace("[1.0]", '["high"]'), "line 1: scores is ..high.."),
        (lambda text: text.replace("[1.0]", "[1.0, 1.0]"), "has not as many of everything as repeats"),
        (lambda text: text.replace('"seeds"', '"draws"'), "line 1: lacks 'seeds'"),
    ],
)
def test_damaged_scores_are_an_error_that_names_the_file(run, damage, message):
    path = scores_path(run, "bf16", "maths")
    path.write_text(damage(path.read_text()))
    with pytest.raises(StoreError, match=f"{path}.*{message}"):
        open_run_evidence(run).answers("bf16", "maths")


def test_a_folder_that_is_no_run_says_what_to_give(tmp_path):
    with pytest.raises(
        StoreError, match="no run.json: this is no run folder, .* or its run was killed .* run the same suite again"
    ):
        open_run_evidence(tmp_path)


def test_a_folder_of_runs_names_the_newest(tmp_path):
    for name in ("20260101-000000-a", "20260103-000000-c", "20260102-000000-b", "20260104-000000-d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    with pytest.raises(
        StoreError, match="holds runs, and is none itself; give one of them, such as 20260104-000000-d, 20260103-0.*-c, 20"
    ):
        open_run_evidence(tmp_path)


def test_a_run_cut_short_of_another_schema_or_without_a_key_is_an_error(run):
    whole = (run / "run.json").read_text()
    for text, message in (
        (whole[:50], "run.json: cannot be read"),
        (json.dumps(json.loads(whole) | {"schema": 9}), "run.json: schema 9, this version reads 1"),
        (json.dumps({k: v for k, v in json.loads(whole).items() if k != "variants"}), "run.json: lacks 'variants'"),
        (json.dumps(json.loads(whole) | {"variants": [{"name": "bf16"}]}), "run.json: variant 1: lacks 'method'"),
    ):
        (run / "run.json").write_text(text)
        with pytest.raises(StoreError, match=message):
            open_run_evidence(run)


def test_a_row_that_stands_twice_is_an_error(run):
    path = run / "tasks.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(StoreError, match="bf16 in maths stands there twice"):
        open_run_evidence(run)


def test_a_run_that_is_not_finished_can_be_read_and_says_so(run):
    change(run / "run.json", status="unfinished")
    assert not open_run_evidence(run).is_finished
    change(run / "run.json", status="complete")
    assert open_run_evidence(run).is_finished


def answers_of(run, variant="bf16", task="maths"):
    return open_run_evidence(run).answers(variant, task)


def test_pairs_are_of_questions_that_both_scored_and_what_is_missing_lowers_the_coverage(run):
    found = pair(answers_of(run), answers_of(run, "ptq"))
    assert [(each.baseline, each.candidate) for each in found.pairs] == [(1.0, 1.0), (0.0, 0.0)]
    assert (found.n_expected, found.paired_by, found.coverage) == (3, "request", pytest.approx(2 / 3))
    assert [(ours.doc, theirs.doc) for ours, theirs in found.questions] == [(0, 0), (1, 1)]


def test_repeats_of_a_question_are_averaged_and_counted(tmp_path):
    ours = [sample(0, 1.0), sample(0, 0.0, repeat=1), sample(1, 1.0), sample(1, 1.0, repeat=1)]
    theirs = [sample(0, 1.0), sample(0, None, repeat=1), sample(1, 0.0), sample(1, 1.0, repeat=1)]
    run = write_run(tmp_path / "run", {("bf16", "maths"): ours, ("ptq", "maths"): theirs})
    found = pair(answers_of(run), answers_of(run, "ptq"))
    assert [(p.baseline, p.candidate, p.n_baseline, p.n_candidate) for p in found.pairs] == [(0.5, 1.0, 2, 1), (1.0, 0.5, 2, 2)]
    assert found.coverage == pytest.approx(3 / 4)


def test_questions_in_another_order_are_paired_by_what_was_asked(tmp_path):
    turned = [sample(1, 0.5) | {"doc": 0}, sample(0, 0.25) | {"doc": 1}]
    run = write_run(tmp_path / "run", {("bf16", "maths"): [sample(0), sample(1, 0.0)], ("ptq", "maths"): turned})
    assert [(p.baseline, p.candidate) for p in pair(answers_of(run), answers_of(run, "ptq")).pairs] == [(1.0, 0.25), (0.0, 0.5)]


def test_imported_answers_are_paired_by_the_source_of_the_question(tmp_path):
    foreign = [sample(7, 0.0, requests=[], imported=True, question=sample(0)["question"])]
    samples = {("bf16", "maths"): [sample(0), sample(1)], ("ptq", "maths"): foreign}
    imported = {("ptq", "maths"): {"imported": {"tool": "other"}}}
    run = write_run(tmp_path / "run", samples, row_changes=imported)
    found = pair(answers_of(run), answers_of(run, "ptq"))
    assert found.paired_by == "question" and [(p.baseline, p.candidate) for p in found.pairs] == [(1.0, 0.0)]
    assert found.coverage == pytest.approx(1 / 2)


def test_variants_that_were_asked_nothing_alike_have_no_pairs(tmp_path):
    samples = {("bf16", "maths"): [sample(0)], ("ptq", "maths"): [sample(0, requests=["c" * 64])]}
    run = write_run(tmp_path / "run", samples)
    found = pair(answers_of(run), answers_of(run, "ptq"))
    assert (found.pairs, found.n_expected, found.coverage) == ((), 2, 0.0)


def change_lines(path, changed):
    """Rewrite a file of rows: `changed` makes the new row from each, or None for none."""
    rows = [changed(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


def without(*keys):
    return lambda row: {key: value for key, value in row.items() if key not in keys}


def test_scores_of_another_variant_and_task_whose_file_has_the_same_name_are_refused(tmp_path):
    samples = {("ptq", "a.b"): [sample(0, 0.0, task="a.b")], ("ptq.a", "b"): [sample(0, 1.0, task="a.b")]}
    run = write_run(tmp_path / "run", samples)
    for row in map(json.loads, (run / "tasks.jsonl").read_text().splitlines()):
        assert scores_path(run, row["variant"], row["task"]) == run / "scores" / "ptq.a.b.jsonl"
    with pytest.raises(StoreError, match=r"has the scores of ptq\.a in b, not of ptq in a\.b; .* another one"):
        answers_of(run, "ptq", "a.b")


def test_as_many_scores_as_repeats_are_asked_of_each_question(tmp_path):
    lost = [sample(doc, None if repeat else 1.0, repeat=repeat) for doc in range(3) for repeat in range(2)]
    run = write_run(tmp_path / "run", {("bf16", "maths"): lost}, row_changes={"maths": {"repeats": 1}})
    with pytest.raises(StoreError, match="question 0 has 2 scores, tasks.jsonl says repeats = 1"):
        answers_of(run)


def test_as_many_questions_as_were_asked_have_to_be_there(tmp_path):
    run = write_run(tmp_path / "run", {("bf16", "maths"): [sample(0)]}, row_changes={"maths": {"n_questions": 1000}})
    with pytest.raises(StoreError, match=r"has 1 questions, tasks.jsonl says n_questions = 1,000"):
        answers_of(run)


def test_questions_of_subtasks_without_the_metric_are_counted_as_such(tmp_path):
    other = [sample(doc, subtask="other", metrics={"f1": 1.0}) for doc in (2, 3)]
    run = write_run(tmp_path / "run", {("bf16", "maths"): [sample(0), sample(1)]})
    change_lines(run / "tasks.jsonl", lambda row: row | {"n_questions": 2 + len(other)})
    parts = [("maths", "exact_match", 2), ("maths", "f1", 2), ("other", "f1", 2)]
    rows = [{"subtask": name, "metric": metric, "n_total": n} for name, metric, n in parts]
    whose = {"schema": 1, "variant": "bf16", "task": "maths"}
    (run / "subtasks.jsonl").write_text("".join(json.dumps(whose | row) + "\n" for row in rows))
    assert len(answers_of(run).questions) == 2
    change_lines(run / "tasks.jsonl", lambda row: row | {"n_questions": 5})
    with pytest.raises(
        StoreError, match="has 2 questions and 2 of subtasks without exact_match, tasks.jsonl says n_questions = 5"
    ):
        answers_of(run)


def test_a_question_that_stands_twice_is_an_error(run):
    path = scores_path(run, "bf16", "maths")
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(StoreError, match="question 0 stands there twice"):
        answers_of(run)


def test_scores_that_were_imported_are_marked_whatever_their_flags_say(tmp_path):
    rows = {"maths": {"imported": {"tool": "other"}, "flags": []}, ("ptq", "maths"): {"flags": ["imported"]}}
    run = write_run(tmp_path / "run", {(name, "maths"): [sample(0)] for name in ("bf16", "ptq")}, row_changes=rows)
    assert [answers_of(run, name).row["flags"] for name in ("bf16", "ptq")] == [["imported"], ["imported"]]


def test_a_variant_that_stands_twice_is_an_error(run):
    about = json.loads((run / "run.json").read_text())
    change(run / "run.json", variants=[*about["variants"], {"name": "ptq", "method": "qad"}])
    with pytest.raises(StoreError, match="run.json: the variant ptq stands there twice"):
        open_run_evidence(run)


def test_a_variant_that_was_measured_twice_is_an_error(tmp_path):
    rows = [{"variant": "ptq", "response": {"kl": kl, "kl_stderr": 0.1, "n_sequences": 9}} for kl in (0.9, 0.1)]
    run = write_run(tmp_path / "run", {("ptq", "maths"): [sample(0)]}, diagnostics=rows)
    with pytest.raises(StoreError, match="diagnostics.jsonl: the variant ptq stands there twice"):
        open_run_evidence(run)


@pytest.mark.parametrize("key", ["variant", "task", "metric", "primary", "value", "n_scored", "n_total", "is_partial"])
def test_a_row_without_what_this_version_reads_is_an_error_that_names_file_line_and_key(run, key):
    change_lines(run / "tasks.jsonl", without(key))
    with pytest.raises(StoreError, match=f"tasks.jsonl: line 1: lacks '{key}'"):
        open_run_evidence(run)


@pytest.mark.parametrize("key", ["repeats", "n_questions", "unit"])
def test_scores_are_not_read_without_how_many_were_asked_and_what_they_are(run, key):
    change_lines(run / "tasks.jsonl", without(key))
    with pytest.raises(StoreError, match=f"tasks.jsonl: bf16 in maths: lacks '{key}'"):
        answers_of(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": "high"}, "value is 'high', allowed is a number or null"),
        ({"n_total": -1}, "n_total is -1, allowed is a count"),
        ({"is_partial": None}, "is_partial is None, allowed is true or false"),
        ({"task": ["x" * 90]}, "task is .'x{57}…, allowed is text"),
    ],
)
def test_a_row_with_another_kind_of_value_is_an_error(run, changes, message):
    change_lines(run / "tasks.jsonl", lambda row: row | changes)
    with pytest.raises(StoreError, match=f"tasks.jsonl: line 1: {message}"):
        open_run_evidence(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": ["a"]}, "cluster is .'a'., allowed is text"),
        ({"n_tokens": ["many"]}, "n_tokens is .'many'., allowed is a list of a count or null"),
        ({"scores": [True]}, "scores is .True., allowed is a list of a number or null"),
        ({"requests": "abc"}, "requests is 'abc', allowed is a list of text or null"),
    ],
)
def test_a_question_with_another_kind_of_value_is_an_error(run, changes, message):
    path = scores_path(run, "bf16", "maths")
    change_lines(path, lambda row: row | changes)
    with pytest.raises(StoreError, match=f"bf16.maths.jsonl: line 1: {message}"):
        answers_of(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"response": {"kl": "low", "kl_stderr": 0.1, "n_sequences": 9}},
            "line 1: response: kl is 'low', allowed is a number or null",
        ),
        (
            {"response": {"kl": 0.1, "kl_stderr": -0.1, "n_sequences": 9}},
            "kl_stderr is -0.1, allowed is a number of at least 0",
        ),
        ({"response": {"kl": 0.1, "kl_stderr": 0.1}}, "response: lacks 'n_sequences'"),
        ({"response": "fine"}, "line 1: response is 'fine', allowed is an object or null"),
        ({"saturated_share": "none"}, "line 1: saturated_share is 'none'"),
        ({"variant": 3}, "line 1: variant is 3, allowed is text"),
    ],
)
def test_diagnostics_with_another_kind_of_value_are_an_error(tmp_path, changes, message):
    run = write_run(tmp_path / "run", {("ptq", "maths"): [sample(0)]}, diagnostics=[{"variant": "ptq"} | changes])
    with pytest.raises(StoreError, match=f"diagnostics.jsonl: .*{message}"):
        open_run_evidence(run)


@pytest.mark.parametrize("key", ["variant", "sequence", "n_tokens", "kl_sum", "ce_sum", "top1_sum"])
def test_a_sequence_without_its_figures_is_an_error(tmp_path, key):
    row = {"variant": "ptq", "sequence": 0, "n_tokens": 9, "kl_sum": 1.0, "ce_sum": 1.0, "top1_sum": 1.0}
    samples = {("ptq", "maths"): [sample(0)]}
    whole = open_run_evidence(write_run(tmp_path / "run", samples, sequences=[row]))
    assert len(whole.sequences["ptq"]) == 1
    lacking = write_run(tmp_path / "other", samples, sequences=[row | {"sequence": 1}, without(key)(row)])
    with pytest.raises(StoreError, match=f"diagnostics_sequences.jsonl: line 2: lacks '{key}'"):
        _ = open_run_evidence(lacking).sequences


def test_a_published_figure_without_its_task_is_an_error(run):
    reference = {"source": "x", "band": 2.0, "figure": [{"variant": "bf16", "value": 80.0}]}
    change(run / "run.json", resolved={"reference": reference})
    with pytest.raises(StoreError, match="run.json: resolved.reference: figure 1: lacks 'task'"):
        open_run_evidence(run)


@pytest.mark.parametrize("name", ["tasks.jsonl", "diagnostics.jsonl"])
def test_a_file_that_is_no_text_is_an_error_that_names_it(run, name):
    (run / name).write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match=f"{name}: cannot be read, it is no text"):
        open_run_evidence(run)


def clusters_of(run):
    return [each.cluster for each in pair(answers_of(run), answers_of(run, "ptq")).pairs]


@pytest.mark.parametrize("key", ["question", "requests"])
def test_questions_of_one_source_or_asked_in_the_same_tokens_are_one_cluster(tmp_path, key):
    copies = [sample(doc, cluster=str(doc)) | {key: sample(doc % 5)[key]} for doc in range(40)]
    run = write_run(tmp_path / "run", {(name, "maths"): copies for name in ("bf16", "ptq")})
    found = clusters_of(run)
    assert len(found) == 40 and len(set(found)) == 5
    assert [found[:5]] * 8 == [found[n : n + 5] for n in range(0, 40, 5)]


def test_clusters_that_share_a_question_are_joined_and_others_are_not(tmp_path):
    rows = [sample(doc, cluster=cluster) for doc, cluster in enumerate("aabbccd")]
    rows[2]["question"] = rows[1]["question"]
    rows[4]["requests"] = rows[3]["requests"]
    run = write_run(tmp_path / "run", {(name, "maths"): rows for name in ("bf16", "ptq")})
    found = clusters_of(run)
    assert len(set(found[:6])) == 1 and found[6] not in found[:6]
    questions = pair(answers_of(run), answers_of(run, "ptq")).questions
    assert [(b.cluster, c.cluster) for b, c in questions] == [(each, each) for each in found]


def test_clusters_of_questions_that_have_nothing_in_common_stay_as_they_are(tmp_path):
    rows = [sample(doc, cluster=str(doc // 2)) for doc in range(6)]
    run = write_run(tmp_path / "run", {(name, "maths"): rows for name in ("bf16", "ptq")})
    assert clusters_of(run) == [question.cluster for question in answers_of(run).questions.values()]


def test_questions_of_which_it_is_not_known_what_was_asked_are_never_paired_by_request(tmp_path):
    samples = {("bf16", "maths"): [sample(0), sample(1)], ("ptq", "maths"): [sample(0), sample(1, requests=[])]}
    run = write_run(tmp_path / "run", samples)
    found = pair(answers_of(run), answers_of(run, "ptq"))
    assert (found.paired_by, len(found.pairs)) == ("question", 2)


def test_scores_outside_zero_and_one_are_no_share_whatever_the_unit_says(tmp_path):
    run = write_run(tmp_path / "run", {("bf16", "maths"): [sample(0)], ("ptq", "maths"): [sample(0, 1.5)]})
    assert answers_of(run).is_share and not answers_of(run, "ptq").is_share


def test_scores_that_do_not_say_whose_they_are_are_written_again(run):
    path = scores_path(run, "bf16", "maths")
    whole = path.read_bytes()
    change_lines(path, without("variant", "task"))
    with pytest.raises(StoreError, match="line 1: lacks 'variant'"):
        answers_of(run)
    write_missing_scores(run)
    assert path.read_bytes() == whole
