"""Results of other tools: their real field names, what is refused, and how a run lists them."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import SUITE
from sample_runs import sample, write_run
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import DataError, StoreError, SuiteError
from harness.foreign_results import read_foreign
from harness.imports import copy_imported, find_imported, import_results, sample_rows
from harness.prepared import question_digest
from harness.records import open_run, read_samples
from harness.xlsx import read_xlsx

FIXTURE = Path(__file__).parent / "fixtures" / "vlmevalkit.xlsx"
"""Written by pandas.DataFrame.to_excel with openpyxl 3.1, as VLMEvalKit does."""

LM_EVAL_FIXTURE = FIXTURE.with_name("samples_mini_math_2026-11-22T12-15-09.139098.jsonl")
"""Written by lm-eval 0.4.13: --model dummy --tasks mini_math --include_path harness/tasks --limit 3 --log_samples."""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SUITE.format(model=tmp_path / "no-model-is-needed"))
    return path


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def skills(problem: str | None, generation: str = "It is 4.", **changes) -> dict:
    row = {"generation": generation, "predicted_answer": "4", "expected_answer": "4", "symbolic_correct": True}
    return {"id": "p1", **({} if problem is None else {"problem": problem}), **row, "num_generated_tokens": 12} | changes


def lm_eval(doc_id: int, question: str, score: float, *, filter: str = "none", **changes) -> dict:
    return {
        "doc_id": doc_id,
        "doc": {"question": question, "answer": "4"},
        "target": "4",
        "arguments": {"gen_args_0": {"arg_0": f"Q: {question}\nA:", "arg_1": {"until": []}}},
        "resps": [["It is 4."]],
        "filtered_resps": ["4"],
        "filter": filter,
        "metrics": ["exact_match"],
        "doc_hash": "d",
        "prompt_hash": "p",
        "target_hash": "t",
        "exact_match": score,
    } | changes


def evaluator(problem_idx: int, reward: float, repeat: int = 0, **changes) -> dict:
    row = {
        "problem_idx": problem_idx,
        "repeat": repeat,
        "reward": reward,
        "model_response": "It is 4.",
        "extracted_answer": "4",
    }
    metadata = {"problem": f"What is {problem_idx}?", "category": "sums"}
    return (
        row
        | {"expected_answer": "4", "scoring_details": {}, "metadata": metadata, "tokens": 90, "latency_ms": 1500.0}
        | changes
    )


def rows_of(*paths: Path, tool: str = "auto") -> list[dict]:
    return sample_rows(read_foreign(list(paths), tool), "t")[0]


def test_lm_eval_samples_become_rows_with_prompt_response_and_every_filter(tmp_path):
    strict = [lm_eval(0, "2 + 2?", 0.0, filter="strict"), lm_eval(1, "3 + 3?", 1.0, filter="strict")]
    flexible = [
        lm_eval(0, "2 + 2?", 1.0, filter="flexible", filtered_resps=["four"]),
        lm_eval(1, "3 + 3?", 1.0, filter="flexible"),
    ]
    first, second = rows_of(write(tmp_path / "samples_gsm8k_2026-08-21T10-11-12.123456.jsonl", *strict, *flexible))
    assert first["metrics"] == {"exact_match,strict": 0.0, "exact_match,flexible": 1.0}
    assert first["answer"] == {"strict": "4", "flexible": "four"}
    assert (first["prompt"], first["response"], first["target"]) == ("Q: 2 + 2?\nA:", ["It is 4."], "4")
    assert first["question"] == hashlib.sha256(b"2 + 2?").hexdigest() != second["question"]
    assert (first["doc"], second["doc"], first["imported"]) == (0, 1, True)


def test_versions_and_date_come_from_the_results_that_lm_eval_wrote_beside(tmp_path):
    path = write(tmp_path / "samples_gsm8k_2026-08-21T10-11-12.123456.jsonl", lm_eval(0, "2 + 2?", 1.0))
    beside = {"lm_eval_version": "0.4.13", "model_name": "org/m", "versions": {"gsm8k": 3.0}}
    (tmp_path / "results_2026-08-21T10-11-12.123456.json").write_text(json.dumps(beside))
    wanted = {"tool_version": "0.4.13", "model": "org/m", "task_version": "3.0", "date": "2026-08-21T10:11:12"}
    assert read_foreign([path]).about == wanted


def test_which_way_is_better_comes_from_lm_eval_where_it_says_so_and_is_not_known_otherwise(suite, tmp_path):
    stamp = "2026-08-21T10-11-12.123456"
    said = {"higher_is_better": {"gsm8k": {"exact_match": False, "bits": None}}}
    (tmp_path / f"results_{stamp}.json").write_text(json.dumps(said))
    rows = [
        lm_eval(0, "2 + 2?", 0.25, filter=name) | {"bits": 0.5, "metrics": ["exact_match", "bits"]} for name in ("one", "two")
    ]
    bring(suite, tmp_path, *rows, name=f"samples_gsm8k_{stamp}.jsonl")
    bring(suite, tmp_path, skills("2 + 2?"), task="other")
    found = find_imported(tmp_path / "results", "tiny", ["ptq"], [])
    better = {row["metric"]: row["higher_is_better"] for each in found for row in each.rows()}
    assert better == {
        "exact_match,one": False,
        "exact_match,two": False,
        "bits,one": None,
        "bits,two": None,
        "symbolic_correct": None,
    }


def test_choices_that_lm_eval_weighed_have_no_response_text(tmp_path):
    row = lm_eval(
        0, "2 + 2?", 1.0, resps=[[["-1.5", "False"]], [["-0.5", "True"]]], filtered_resps=[["-1.5", "False"], ["-0.5", "True"]]
    )
    (found,) = rows_of(write(tmp_path / "samples_mmlu_x.jsonl", row))
    assert (found["response"], found["answer"], found["metrics"]) == (None, {}, {"exact_match": 1.0})


def test_each_file_of_nemo_skills_is_a_repeat_in_the_order_of_its_seeds(tmp_path):
    for seed, is_right in ((10, False), (0, True), (2, True)):
        write(tmp_path / f"output-rs{seed}.jsonl", skills("2 + 2?", symbolic_correct=is_right))
    rows = rows_of(*tmp_path.glob("*.jsonl"))
    assert [(row["repeat"], row["seed"], row["metrics"]["symbolic_correct"]) for row in rows] == [
        (0, 0, 1.0),
        (1, 2, 1.0),
        (2, 10, 0.0),
    ]
    assert rows[0]["answer"] == {"extracted": "4"} and rows[0]["n_tokens"] == 12


def test_chunks_of_one_seed_are_one_repeat(tmp_path):
    for seed, chunk in ((0, 0), (0, 1), (1, 0), (1, 1)):
        write(tmp_path / f"output-rs{seed}_chunk_{chunk}.jsonl", skills(f"{chunk} + 2?", id=chunk))
    rows = rows_of(*tmp_path.glob("*.jsonl"))
    assert [(row["doc"], row["repeat"], row["missing"]) for row in rows] == [(d, r, None) for d in (0, 1) for r in (0, 1)]


@pytest.mark.parametrize(
    ("changes", "metrics", "primary"),
    [
        (
            {"judgement": "Reasoning: same.\n**Judgement**: Yes"},
            {"judge_correct": 1.0, "symbolic_correct": 1.0},
            "judge_correct",
        ),
        ({"judgement": "INCORRECT"}, {"judge_correct": 0.0, "symbolic_correct": 1.0}, "judge_correct"),
        ({"is_correct": False}, {"symbolic_correct": 1.0, "is_correct": 0.0}, "symbolic_correct"),
        ({"symbolic_correct": None, "graded_list": [False]}, {"accuracy": 0.0}, "accuracy"),
        (
            {"symbolic_correct": None, "eval_status": [{"process_status": "completed"}, {"process_status": "error"}]},
            {"problem_accuracy": 0.0, "subtask_share": 0.5},
            "problem_accuracy",
        ),
    ],
)
def test_every_kind_of_score_that_nemo_skills_writes_is_read(tmp_path, changes, metrics, primary):
    found = read_foreign([write(tmp_path / "output.jsonl", skills("2 + 2?", **changes))])
    assert found.rows[0].scores == metrics
    assert (found.tool, found.primary) == ("nemo-skills", primary)


def test_an_answer_that_nemo_skills_could_not_extract_is_invalid_and_scored(tmp_path):
    (row,) = rows_of(write(tmp_path / "output.jsonl", skills("2 + 2?", predicted_answer=None, symbolic_correct=False)))
    assert row["answer"] == {"extracted": "[invalid]"} and row["metrics"] == {"symbolic_correct": 0.0}


def test_nemo_evaluator_rows_with_a_failure_of_its_own_are_missing_and_not_zero(tmp_path):
    broken = evaluator(1, 0.0, scoring_details={"error_category": "infra_error", "error": "502"})
    (tmp_path / "eval-1.json").write_text(
        json.dumps({"sdk_version": "0.5.0", "timestamp": "2026-09-01", "config": {"model": "m"}})
    )
    path = write(tmp_path / "results.jsonl", evaluator(0, 1.0), broken)
    found = read_foreign([path])
    assert found.about == {"tool_version": "0.5.0", "model": "m", "date": "2026-09-01"}
    first, second = sample_rows(found, "t")[0]
    assert (first["metrics"], first["missing"], first["seconds"]) == ({"reward": 1.0}, None, 1.5)
    assert (second["metrics"], second["missing"]) == ({"reward": None}, "infra_error in NeMo Evaluator")


@pytest.mark.parametrize("suffix", ["xlsx", "tsv", "csv", "jsonl"])
def test_a_scored_run_of_vlmevalkit_is_read_in_every_form(tmp_path, suffix):
    path = FIXTURE
    if suffix != "xlsx":
        import csv

        rows, path = read_xlsx(FIXTURE), tmp_path / f"m_MMBench_result.{suffix}"
        if suffix == "jsonl":
            write(path, *rows)
        else:
            with path.open("w", newline="") as file:
                names = list(dict.fromkeys(name for row in rows for name in row))
                writer = csv.DictWriter(file, names, delimiter="\t" if suffix == "tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
    found = rows_of(path)
    assert [row["metrics"] for row in found] == [{"hit": 1.0}, {"hit": 0.0}, {"hit": 1.0}]
    assert found[1]["question"] == question_digest("vlmevalkit t id 2")  # one question may be asked about many images
    assert (found[0]["response"], found[0]["target"]) == (["B. 3"], "B")
    assert found[2]["prompt"] == "Line one\nline two  with spaces "


def test_white_space_does_not_make_another_question():
    assert question_digest(" a\n b\t c ") == question_digest("a b c") != question_digest("ab c")


def test_a_repeat_that_a_question_lacks_counts_as_missing(tmp_path):
    one = write(tmp_path / "output-rs0.jsonl", skills("2 + 2?"), skills("3 + 3?"))
    two = write(tmp_path / "output-rs1.jsonl", skills("2 + 2?"))
    rows, notes = sample_rows(read_foreign([one, two]), "t")
    assert [(row["doc"], row["repeat"], row["missing"]) for row in rows] == [
        (0, 0, None),
        (0, 1, None),
        (1, 0, None),
        (1, 1, "not in nemo-skills's results"),
    ]
    assert rows[-1]["metrics"] == {"symbolic_correct": None}
    assert notes == ["1 of 4 responses are missing there"]


def test_without_texts_questions_are_known_by_the_ids_of_their_tool_and_that_is_said(tmp_path):
    path = write(tmp_path / "results.jsonl", evaluator(7, 1.0, metadata={}))
    (row,), notes = sample_rows(read_foreign([path]), "aime")
    assert row["question"] == question_digest("nemo-evaluator aime id 7")
    assert notes == ["questions are known by nemo-evaluator's own ids: paired with results of that tool alone"]


def test_questions_that_share_their_text_are_known_by_their_ids(tmp_path):
    rows = [lm_eval(i, "Which of these is right?", 1.0, doc_hash=f"hash {i}") for i in range(2)]
    found, notes = sample_rows(read_foreign([write(tmp_path / "samples_mmlu.jsonl", *rows)]), "t")
    assert [row["question"] for row in found] == [question_digest(f"lm-eval t id hash {i}") for i in range(2)]
    assert "own ids" in notes[0]


def test_a_file_that_lm_eval_wrote_is_read_and_its_questions_have_the_digests_of_ours():
    found = rows_of(LM_EVAL_FIXTURE)
    assert [row["question"] for row in found] == [question_digest(f"What is {q}?") for q in ("2 + 14", "2 + 5", "7 + 18")]
    assert found[0]["metrics"] == {"exact_match": 0.0, "unparsed": 1.0} and found[0]["response"] == ["lol"]
    assert found[0]["cluster"] == "2+14" and found[0]["target"].endswith("\\boxed{16}.")


def test_questions_that_share_their_documents_are_one_cluster(tmp_path):
    rows = rows_of(write(tmp_path / "output.jsonl", *(skills(f"q{i}", document_set_id="set 1", id=i) for i in range(2))))
    assert {row["cluster"] for row in rows} == {"set 1"}


def test_results_of_the_first_questions_alone_are_partial(tmp_path):
    path = write(tmp_path / "samples_gsm8k_2026-08-21T10-11-12.123456.jsonl", lm_eval(0, "2 + 2?", 1.0))
    for n, wanted in ((1319, True), (1, False)):
        beside = {"n-samples": {"gsm8k": {"original": n, "effective": 1}}}
        (tmp_path / "results_2026-08-21T10-11-12.123456.json").write_text(json.dumps(beside))
        assert read_foreign([path]).is_partial is wanted


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no row"),
        ([{"a": 1}], r"its first row has a; say which with --format\. Known: lm-eval, nemo-skills"),
        ([skills("q"), skills(None)], r"line 2: has no text of its question, where other rows have"),
        ([skills(None, id=None)], r"line 1: has neither the text of its question nor an id of it"),
        ([skills("q"), skills("q ")], r"line 2: the same question and repeat as .*line 1"),
        ([skills("q", symbolic_correct="yes")], r"line 1: symbolic_correct is 'yes', no number and no truth value"),
        ([skills("q", symbolic_correct=float("nan"))], r"symbolic_correct is 'nan', no number"),
        ([skills("q", symbolic_correct=None)], r"line 1: holds no score .* not the one of the generation alone"),
        (
            [skills("q", judgement="They look alike to me.")],
            r"judgement is neither Yes nor No, CORRECT nor INCORRECT: 'They look",
        ),
        ([skills("q"), skills("r", is_correct=True)], r"line 1: has no is_correct, which other rows have"),
        ([lm_eval(0, "q", 1.0), lm_eval(0, "r", 1.0)], r"line 2: document 0 is there a second time"),
        ([lm_eval(0, "q", 1.0, metrics=["bleu"], bleu=["a", "b"])], r"bleu is .* no number"),
        ([lm_eval(0, "q", 1.0, metrics=["acc"])], r"line 1: has no acc; it has doc_id"),
        ([lm_eval(0, "q", 1.0, arguments={"x": 1})], r"line 1: arguments.gen_args_0 is 'None', no object; give the file as"),
        ([lm_eval(0, "q", 1.0, arguments={"gen_args_0": "Q:"})], r"line 1: arguments.gen_args_0 is 'Q:', no object"),
        ([lm_eval(0, "q", 1.0, metrics=[])], r"line 1: metrics is '\[\]', no list of names; give the file as the evaluation"),
        ([lm_eval(0, "q", 1.0, metrics="acc")], r"line 1: metrics is 'acc', no list of names"),
        ([skills("q", graded_list=True)], r"line 1: graded_list is 'True', no list of scores"),
        ([skills("q", eval_status="completed")], r"line 1: eval_status is 'completed', no list of objects"),
        ([skills("q", eval_status=["completed"])], r"line 1: eval_status is .*, no list of objects"),
        ([evaluator(0, 1.0, repeat=-1)], r"repeat is -1; it has to be a number from 0"),
        ([{"problem_idx": 0, "reward": None, "metadata": {}}], r"line 1: has no reward"),
    ],
)
def test_results_that_are_not_understood_are_refused_with_file_and_line(tmp_path, rows, message):
    path = write(tmp_path / "r.jsonl", *rows)
    with pytest.raises(DataError, match=message) as raised:
        rows_of(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl", b'{"generation": "a"', "line 1 is no JSON .* is the file cut short"),
        ("list.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("bytes.jsonl", b"\xff\xfe", "cannot be read"),
        ("book.xlsx", b"no workbook", "cannot be read as an .xlsx workbook .* save it as .tsv"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        rows_of(tmp_path / name)


def test_a_file_that_is_not_there_and_files_of_two_tools_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: cannot be read"):
        rows_of(tmp_path / "nowhere.jsonl")
    files = write(tmp_path / "output.jsonl", skills("q")), write(tmp_path / "results.jsonl", evaluator(0, 1.0))
    with pytest.raises(DataError, match="output.jsonl of nemo-skills, results.jsonl of nemo-evaluator; import one tool's"):
        rows_of(*files)


def bring(suite: Path, tmp_path: Path, *rows: dict, variant: str = "ptq", task: str = "livecodebench", **options) -> list[str]:
    path = write(tmp_path / options.pop("name", "output.jsonl"), *rows)
    return import_results(suite, variant, task, [path], tmp_path / "results", **options)


def test_imported_results_are_kept_with_their_provenance_and_found_for_their_variant(suite, tmp_path):
    lines = bring(suite, tmp_path, skills("2 + 2?"), skills("3 + 3?", symbolic_correct=False))
    assert lines[0] == "ptq livecodebench: 2 questions × 1 from nemo-skills, symbolic_correct 50.0 %"
    (found,) = find_imported(tmp_path / "results", "tiny", ["bf16", "ptq"], ["mini_math"])
    (row,) = found.rows()
    assert (row["variant"], row["task"], row["value"], row["n_scored"], row["n_total"]) == ("ptq", "livecodebench", 0.5, 2, 2)
    assert row["flags"] == ["imported"] and row["publishable"] is False and row["kernels"] == {"linear": "unknown"}
    digest = hashlib.sha256((tmp_path / "output.jsonl").read_bytes()).hexdigest()
    assert row["imported"]["files"] == [{"name": "output.jsonl", "sha256": digest}]
    assert find_imported(tmp_path / "results", "tiny", ["bf16"], []) == []
    assert find_imported(tmp_path / "results", "other", ["ptq"], []) == []


def test_repeats_bring_pass_at_k_and_majorities(suite, tmp_path):
    answers = [("4", True), ("4", True), ("5", False)]
    files = [
        write(tmp_path / f"output-rs{i}.jsonl", skills("2 + 2?", predicted_answer=answer, symbolic_correct=is_right))
        for i, (answer, is_right) in enumerate(answers)
    ]
    import_results(suite, "ptq", "aime", files, tmp_path / "results")
    (found,) = find_imported(tmp_path / "results", "tiny", ["ptq"], [])
    values = {row["metric"]: row["value"] for row in found.rows()}
    assert values == {"symbolic_correct": pytest.approx(2 / 3), "pass@3": 1.0, "maj@3": 1.0}


def test_the_same_file_may_be_imported_again_and_another_one_not(suite, tmp_path):
    bring(suite, tmp_path, skills("2 + 2?", is_correct=False))
    bring(suite, tmp_path, skills("2 + 2?", is_correct=False), metric="is_correct")
    (found,) = find_imported(tmp_path / "results", "tiny", ["ptq"], [])
    assert found.identity[3] == "is_correct"
    with pytest.raises(
        StoreError, match=r"other results of ptq in livecodebench were imported on .*; remove it and ptq\.livecodebench\.json"
    ):
        bring(suite, tmp_path, skills("9 + 9?"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "ptg"}, SuiteError, r"--variant ptg: no such variant; did you mean ptq\? Known: bf16, ptq, qad, qat"),
        ({"task": "mini_math"}, SuiteError, "the suite runs mini_math itself"),
        ({"task": "a/b"}, SuiteError, "--task a/b: not a name"),
        ({"metric": "symbolic"}, DataError, r"no such metric; did you mean symbolic_correct\? Known: symbolic_correct"),
    ],
)
def test_names_that_the_suite_or_the_results_do_not_have_are_refused(suite, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        bring(suite, tmp_path, skills("2 + 2?"), **options)
    assert not list(tmp_path.glob("results/imported/**/*.zst"))


def test_a_task_that_the_suite_came_to_run_itself_is_not_listed_twice(suite, tmp_path):
    bring(suite, tmp_path, skills("2 + 2?"))
    with pytest.raises(SuiteError, match="results of livecodebench were imported, and the suite runs livecodebench itself"):
        find_imported(tmp_path / "results", "tiny", ["ptq"], ["livecodebench"])


def test_imported_samples_that_were_changed_since_are_refused(suite, tmp_path):
    bring(suite, tmp_path, skills("2 + 2?"))
    (samples,) = tmp_path.glob("results/imported/tiny/*.zst")
    samples.write_bytes(samples.read_bytes() + b" ")
    with pytest.raises(StoreError, match="is not what was imported"):
        find_imported(tmp_path / "results", "tiny", ["ptq"], [])


def test_a_complete_run_is_left_as_it_is_when_something_is_imported_and_a_new_one_begins(tmp_path):
    run = write_run(tmp_path / "hand" / "20260101-000000-aaaa", {("bf16", "maths"): [sample(0)]})
    assert open_run(tmp_path, "hand", "0", has_work=False) == run
    assert open_run(tmp_path, "hand", "0", has_work=False, imported=[["bf16", "t", "d", "m"]]) != run


def test_a_run_folder_holds_imported_samples_as_its_own(suite, tmp_path):
    bring(suite, tmp_path, skills("2 + 2?"))
    found = find_imported(tmp_path / "results", "tiny", ["ptq"], [])
    (row,) = copy_imported(found, tmp_path)
    assert row["metric"] == "symbolic_correct"
    assert read_samples(tmp_path / "samples" / "ptq.livecodebench.jsonl.zst")[0]["imported"]


def test_the_command_says_what_it_kept_and_refuses_in_one_message(suite, tmp_path):
    path = write(tmp_path / "output.jsonl", skills("2 + 2?"))
    command = ["import", str(suite), "--task", "lcb", "--from", str(path), "--results", str(tmp_path / "r"), "--variant"]
    result = CliRunner().invoke(app, [*command, "ptq"])
    assert result.exit_code == 0 and "1 questions × 1 from nemo-skills" in result.output
    result = CliRunner().invoke(app, [*command, "nope"])
    assert result.exit_code == 2 and "no such variant" in result.output


def test_an_imported_task_whose_files_would_be_those_of_an_own_one_is_refused(suite, tmp_path):
    both = ["ptq", "ptq.a"]
    bring(suite, tmp_path, skills("2 + 2?"), task="a.b")
    assert len(find_imported(tmp_path / "results", "tiny", both, ["c"])) == 1
    with pytest.raises(
        SuiteError, match=r"a\.b of ptq, which is imported, and task b of ptq\.a would both write samples/ptq\.a\.b"
    ):
        find_imported(tmp_path / "results", "tiny", both, ["b"])


def test_two_imported_tasks_whose_files_would_be_the_same_are_refused(suite, tmp_path):
    bring(suite, tmp_path, skills("2 + 2?"), task="a.b")
    (record,) = tmp_path.glob("results/imported/tiny/*.json")
    about = json.loads(record.read_text())
    record.write_text(json.dumps(about | {"variant": "ptq.a", "task": "b"}))  # as another suite of this name left it
    with pytest.raises(StoreError, match=r"holds results of ptq\.a in b, whose files have the same name"):
        bring(suite, tmp_path, skills("2 + 2?"), task="a.b")


def test_an_imported_file_of_another_name_than_its_record_is_refused(suite, tmp_path):
    bring(suite, tmp_path, skills("2 + 2?"))
    for path in list(tmp_path.glob("results/imported/tiny/*")):
        path.rename(path.with_name(path.name.replace("livecodebench", "other")))
    with pytest.raises(StoreError, match="its record is of ptq in livecodebench; remove both"):
        find_imported(tmp_path / "results", "tiny", ["ptq"], [])
