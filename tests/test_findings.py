"""Claims held against runs: verdicts, figures, the report, and every way in which a claim cannot be decided."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from findings_runs import FOUR, N_SEQUENCES, make_run, shares, write_suite
from typer.testing import CliRunner

from harness import accepted, claim_runs
from harness.claims import load_claims
from harness.cli import app
from harness.compare import compare_runs
from harness.errors import StoreError, SuiteError
from harness.evidence import open_run_evidence
from harness.findings import decide, find, together
from harness.findings_text import figure_text, render_markdown
from harness.leaderboard.findings import RECORD
from harness.models import resolve_model
from harness.paired import holm
from harness.schema import Model
from harness.store import Store, cache_folder
from harness.toml_file import read_toml

CLAIM = """
[[claim]]
id = "{id}"
topic = "1. Distributions"
text = "QAD scores above QAT"
source = "arXiv 0000.00000, T1"
"""
COMPARISON = """
[[claim.comparison]]
suite = "{suite}"
{of}
candidate = "{candidate}"
baseline = "{baseline}"
expects = "{expects}"
{more}
"""


def comparison(candidate="qad", baseline="qat", expects="higher", *, suite="tunnel", of='tasks = ["mini_math"]', more=""):
    return COMPARISON.format(suite=suite, of=of, candidate=candidate, baseline=baseline, expects=expects, more=more)


def claims_file(folder, *comparisons, ids=None, tail="", head="schema = 1\n"):
    """A file with a claim for each comparison, or one claim with all of them."""
    names = ids or ["one"]
    groups = [comparisons] if len(names) == 1 else [(each,) for each in comparisons]
    parts = [CLAIM.format(id=name) + "".join(group) for name, group in zip(names, groups, strict=True)]
    path = folder / "claims.toml"
    path.write_text(head + "".join(parts) + tail)
    return path


def call(*arguments):
    return CliRunner().invoke(app, ["findings", *map(str, arguments)])


def flat(result):
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A suite of the RL model and one of the SFT model, with a run of each: QAT loses what RL put in."""
    folder = tmp_path_factory.mktemp("made")
    kl = {"ptq": 0.1, "qat": 0.3, "qad": 0.02, "bf16": 0.0}
    for name, values in (
        ("tunnel", {"bf16": 0.8, "ptq": 0.6, "qat": 0.3, "qad": 0.78}),
        ("tunnel-sft", {"bf16": 0.5, "ptq": 0.4, "qat": 0.5, "qad": 0.5}),
    ):
        suite = write_suite(folder, name, model=name)
        make_run(folder / "results", suite, shares(values), kl=kl)
    return folder


@pytest.fixture
def here(made, tmp_path):
    """The same in a folder of the test's own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def found_in(folder, *comparisons, **keys):
    return find(load_claims(claims_file(folder, *comparisons, **keys)), folder / "results")


def only(record):
    (claim,) = record["claims"]
    (each,) = claim["comparisons"]
    return each


def test_a_difference_has_its_cells_interval_parts_and_p(here):
    each = only(found_in(here, comparison()))
    assert each["verdict"] == "agrees" and each["unit"] == "points" and each["n_units"] == 60 and each["repeats"] == [2]
    assert [(c["variant"], c["method"], c["seeds"], c["tokens"]) for c in each["cells"]] == [
        ("qad", "qad", [0, 1, 2], 6000),
        ("qat", "qat", [0, 1, 2], 6000),
    ]
    assert each["difference"] == pytest.approx(each["cells"][0]["value"] - each["cells"][1]["value"], abs=1e-3)
    assert 20 < each["low"] < each["difference"] < each["high"] < 80 and each["p"] < 0.001
    assert each["seeds_are_paired"] and each["stderr_questions"] > 0 and each["stderr_seeds"] > 0


def test_where_nothing_was_trained_the_interval_is_that_of_compare_and_has_no_seeds(here):
    each = only(found_in(here, comparison("ptq", "bf16", "lower")))
    run = open_run_evidence(next((here / "results" / "tunnel").iterdir()))
    (task,) = compare_runs(run, "bf16", "ptq", ["mini_math"]).tasks
    expected = [100 * value for value in (task.difference.delta, task.difference.low, task.difference.high)]
    assert [each["difference"], each["low"], each["high"]] == pytest.approx(expected, rel=1e-5)
    assert each["stderr_seeds"] is None and [cell["seeds"] for cell in each["cells"]] == [[], []]


def test_figures_over_tokens_are_in_nats_and_top1_in_points(here):
    kl = only(found_in(here, comparison(of='metric = "kl"', expects="lower")))
    assert kl["unit"] == "nats a token" and kl["n_units"] == N_SEQUENCES and kl["repeats"] is None
    assert kl["cells"][0]["value"] == pytest.approx(0.02, rel=0.1) and kl["verdict"] == "agrees"
    assert only(found_in(here, comparison(of='metric = "top1"')))["difference"] == pytest.approx(28, rel=0.1)
    assert only(found_in(here, comparison("bf16", "qad", "lower", of='metric = "kl"')))["cells"][0]["high"] == 0


def test_a_difference_of_differences_crosses_suites_whose_models_differ(here):
    more = 'minus = { suite = "tunnel-sft", candidate = "qat", baseline = "ptq" }'
    each = only(found_in(here, comparison("qat", "ptq", "lower", more=more)))
    assert [cell["suite"] for cell in each["cells"]] == ["tunnel", "tunnel", "tunnel-sft", "tunnel-sft"]
    values = [cell["value"] for cell in each["cells"]]
    assert each["difference"] == pytest.approx(values[0] - values[1] - values[2] + values[3], abs=1e-3)
    assert each["verdict"] == "agrees" and each["seeds_are_paired"]


def test_a_baseline_of_another_suite_is_asked_the_same_questions(here):
    each = only(found_in(here, comparison("bf16", "bf16", more='baseline_suite = "tunnel-sft"\nmargin = 10')))
    assert each["verdict"] == "agrees" and each["difference"] > 10


def test_several_tasks_are_one_mean(here):
    each = only(found_in(here, comparison(of='tasks = ["mini_math", "mini_recall"]')))
    assert each["n_units"] == 120 and each["repeats"] == [2]


@pytest.mark.parametrize(
    ("expects", "margin", "low", "high", "verdict"),
    [
        ("higher", 0, 0.1, 2, "agrees"),
        ("higher", 0, 0, 2, "cannot tell"),
        ("higher", 0, -2, -0.1, "disagrees"),
        ("higher", 10, 8, 9, "disagrees"),
        ("higher", 10, 11, 12, "agrees"),
        ("lower", 0, -2, -0.1, "agrees"),
        ("lower", 0, 0.1, 2, "disagrees"),
        ("lower", 1, -2, -0.5, "cannot tell"),
        ("equal", 1, -0.9, 0.9, "agrees"),
        ("equal", 1, 0.5, 1.5, "cannot tell"),
        ("equal", 1, 1.1, 1.5, "disagrees"),
        ("equal", 1, -3, -1.1, "disagrees"),
        ("equal", 1, -3, 3, "cannot tell"),
        ("not lower", 1, -0.9, 5, "agrees"),
        ("not lower", 1, -1.1, 5, "cannot tell"),
        ("not lower", 1, -3, -1.1, "disagrees"),
        ("not higher", 1, -5, 0.9, "agrees"),
        ("not higher", 1, -5, 1.1, "cannot tell"),
        ("not higher", 1, 1.1, 3, "disagrees"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(expects, margin, low, high, verdict):
    assert decide(expects, margin, low, high) == verdict


def test_a_claim_agrees_with_all_of_its_comparisons_and_disagrees_with_any(here):
    assert together(["agrees", "agrees"]) == "agrees"
    assert together(["agrees", "cannot tell"]) == "cannot tell"
    assert together(["agrees", "cannot tell", "disagrees"]) == "disagrees"
    assert together([]) == "not tested"
    record = found_in(here, comparison(), comparison("bf16", "qat", "lower"))
    assert [each["verdict"] for each in record["claims"][0]["comparisons"]] == ["agrees", "disagrees"]
    assert record["claims"][0]["verdict"] == "disagrees"


def test_a_suite_without_scores_has_a_line_for_each_and_no_empty_table(here):
    record = found_in(here, comparison())
    record["scores"] = [{"suite": "tunnel", "columns": [], "without": ["mini_math: partial"]}]
    text = render_markdown(record, "findings")
    assert "\n\n- tunnel, mini\\_math: partial\n" in text and "| tunnel | seeds |" not in text


def test_what_is_compared_is_named_shortly():
    said = {("a_b",): "a_b", ("gpqa", "aime"): "mean of gpqa and aime", ("a", "b", "c"): "mean of 3 tasks"}
    assert {tasks: figure_text({"tasks": list(tasks)}) for tasks in said} == said


def test_holms_p_is_over_all_comparisons_of_the_file(here):
    record = found_in(here, comparison(), comparison("qad", "bf16"), comparison("ptq", "bf16"), ids=["a", "b", "c"])
    found = [each for claim in record["claims"] for each in claim["comparisons"]]
    assert record["n_comparisons"] == 3
    assert [each["p_holm"] for each in found] == pytest.approx(holm([each["p"] for each in found]), rel=1e-4)


def test_the_command_writes_markdown_json_and_a_copy_for_the_leaderboard(here):
    path = claims_file(here, comparison(), comparison("ptq", "bf16", "lower"), ids=["one", "two"])
    out = here / "docs" / "findings.md"
    result = call(path, "--results", here / "results", "--out", out)
    assert result.exit_code == 0, result.output
    assert "agrees one" in flat(result) and "2 comparisons in 2 claims: agrees 2." in flat(result)
    record = json.loads(out.with_suffix(".json").read_text())
    assert out.read_text() == render_markdown(record, "findings")
    assert (here / "results" / RECORD).read_text() == out.with_suffix(".json").read_text()
    text = out.read_text()
    (scores,) = record["scores"]
    assert {cell["variant"] for cell in scores["columns"][0]["cells"]} == {"bf16", "ptq", "qat", "qad"} and not scores[
        "without"
    ]
    assert [each["name"] for each in scores["columns"]][-2:] == ["kl", "ce"]
    (difference,) = record["claims"][0]["comparisons"]
    for cell in difference["cells"]:
        assert cell["value"] == next(
            each["value"] for each in scores["columns"][0]["cells"] if each["variant"] == cell["variant"]
        )
    for said in (
        "60 questions × 2",
        "3, 3 (paired)",
        "–, –",
        "not corrected",
        "2 comparisons in 2 claims",
        "tunnel/20260101",
    ):
        assert said in text
    before = {name: (here / "docs" / name).read_bytes() for name in ("findings.md", "findings.json")}
    assert call(path, "--results", here / "results", "--out", out).exit_code == 0
    assert before == {name: (here / "docs" / name).read_bytes() for name in before}, "the same runs, the same bytes"


def test_one_claim_is_decided_alone_and_written_only_where_that_is_asked_for(here, monkeypatch):
    monkeypatch.chdir(here)
    path = claims_file(here, comparison(), comparison("ptq", "nothing"), ids=["one", "broken"])
    result = call(path, "--claim", "one")
    assert result.exit_code == 0 and flat(result).endswith("1 comparison in 1 claim: agrees 1.")
    assert not (here / "docs").exists() and not (here / "results" / RECORD).exists()
    assert call(path, "--claim", "one", "--out", "docs/part.md").exit_code == 0
    assert "Generated by `harness findings" in (part := (here / "docs" / "part.md").read_text()) and " --claim one`" in part
    assert not (here / "results" / RECORD).exists()
    assert 'no claim "ones"; did you mean one? Known: broken, one' in flat(call(path, "--claim", "ones"))


def test_an_untested_claim_says_why(here):
    path = claims_file(here, comparison())
    path.write_text(path.read_text() + CLAIM.format(id="vl") + 'untested = "There is no picture model here."\n')
    record = find(load_claims(path), here / "results")
    assert record["claims"][1]["verdict"] == "not tested"
    assert "Not tested: There is no picture model here." in render_markdown(record, "findings")


LINES = """
[[trajectory]]
id = "along"
title = "Scores along training"
suite = "along"
tasks = ["mini_math"]
metrics = ["kl"]
start = "ptq"
levels = ["bf16"]
line = [
  { name = "QAT", variants = ["qat-1", "qat-2"] },
  { name = "QAD", variants = ["qad-1", "qad-2"] },
]
"""
ALONG = {
    "bf16": "",
    "ptq": "",
    **{f"{m}-{n}": f"seeds = [0, 1, 2]\ntraining = {{ tokens = {n * 5000} }}" for m in ("qat", "qad") for n in (1, 2)},
}


def test_a_trajectory_is_a_table_and_a_figure(here):
    suite = write_suite(here, "along", variants=ALONG)
    values = {"bf16": 0.8, "ptq": 0.6, "qat-1": 0.5, "qat-2": 0.4, "qad-1": 0.7, "qad-2": 0.75}
    make_run(here / "results", suite, shares(values))
    path = claims_file(here, comparison(), tail=LINES)
    out = here / "docs" / "findings.md"
    assert call(path, "--results", here / "results", "--out", out).exit_code == 0
    panels = json.loads(out.with_suffix(".json").read_text())["trajectories"][0]["panels"]
    assert [(panel["name"], panel["unit"]) for panel in panels] == [("mini_math", "points"), ("kl", "nats a token")]
    assert [point["tokens"] for point in panels[0]["lines"][0]["points"]] == [0, 5000, 10000]
    assert panels[0]["levels"][0]["variant"] == "bf16" and panels[0]["levels"][0]["tokens"] is None
    svg = (here / "docs" / "findings-along.svg").read_bytes()
    assert b"<svg" in svg and "![Scores along training](findings-along.svg)" in out.read_text()
    assert "| QAD | 10,000 |" in out.read_text() and "| QAT | 0 |" in out.read_text()
    assert call(path, "--results", here / "results", "--out", out).exit_code == 0
    assert (here / "docs" / "findings-along.svg").read_bytes() == svg


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({'"qat-2"]': '"qat-3"]'}, 'no variant "qat-3" in the suite along'),
        (
            {'["qat-1", "qat-2"]': '["qat-2", "qat-1"]'},
            "budgets have to grow from one variant to the next; found qat-2 10,000, qat-1 5,000",
        ),
        (
            {'["qat-1", "qat-2"]': '["ptq", "qat-2"]'},
            "ptq is not trained, so it has no budget; give it as start or among levels",
        ),
        ({'tasks = ["mini_math"]': "", 'metrics = ["kl"]': ""}, "it shows nothing; give tasks or metrics"),
        ({'suite = "along"': 'suite = "alnog"'}, 'no suite "alnog" beside the file of claims; did you mean along?'),
    ],
)
def test_a_trajectory_names_what_is_there_and_grows(here, changed, said):
    write_suite(here, "along", variants=ALONG)
    lines = LINES
    for old, new in changed.items():
        lines = lines.replace(old, new)
    result = call(claims_file(here, comparison(), tail=lines), "--results", here / "results", "--out", here / "f.md")
    assert result.exit_code == 2 and said in flat(result)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            comparison(suite="tunel"),
            'comparison[0].suite: no suite "tunel" beside the file of claims; did you mean tunnel? Known: tunnel, tunnel-sft',
        ),
        (comparison("qda"), 'comparison[0].candidate: no variant "qda" in the suite tunnel'),
        (comparison("qadd"), "did you mean qad? Known: bf16, ptq, qad, qat"),
        (comparison(baseline="qta"), 'comparison[0].baseline: no variant "qta" in the suite tunnel'),
        (comparison(of='tasks = ["mini_maths"]'), 'comparison[0].tasks: no task "mini_maths" in the suite tunnel'),
        (comparison(of='tasks = ["mini_maths"]'), "did you mean mini_math? Known: mini_math, mini_recall"),
        (comparison(of='metric = "kll"'), "claim[0].comparison[0].metric: found 'kll'; did you mean kl? Allowed: ce, kl, top1"),
        (comparison(of=""), "comparison[0]: needs tasks or metric, since the file has no tasks for all"),
        (comparison(of='metric = "kl"\ntasks = ["mini_math"]'), "found tasks and metric; a comparison is in one of the two"),
        (comparison(of='tasks = ["mini_math", "mini_math"]'), "one of them twice"),
        (comparison(baseline="qad"), 'candidate and baseline are both "qad" of tunnel; name two'),
        (comparison(expects="equal"), 'margin: missing or 0; expects = "equal" needs one'),
        (comparison(expects="not lower"), 'margin: missing or 0; expects = "not lower" needs one'),
        (comparison(expects="more"), "expects: found 'more'. Allowed: equal, higher, lower, not higher, not lower"),
        (comparison(more="margin = -1"), "margin: found -1; input should be greater than or equal to 0"),
        (comparison(more='reason = "none"'), "comparison[0].reason: unknown key"),
        (comparison("qad-seed1"), '"qad-seed1" of the suite tunnel is trained with 1 seed;'),
        (comparison("qad-seed1"), "tunnel.toml seeds = [0, 1, 2, 3, 4] and run it: harness run"),
        (comparison(more='minus = { candidate = "qat", baseline = "pqt" }'), 'comparison[0].minus.baseline: no variant "pqt"'),
    ],
)
def test_a_mistake_in_the_file_says_where_what_and_what_to_do(here, given, said):
    path = claims_file(here, given)
    result = call(path, "--results", here / "results", "--out", here / "f.md")
    assert result.exit_code == 2 and said in flat(result) and f"{path}: " in result.output.replace("\n", "")
    assert not (here / "f.md").exists()


def test_a_claim_needs_a_source_an_id_of_its_own_and_something_that_decides_it(here):
    path = claims_file(here, comparison())
    for old, new, said in (
        ('source = "arXiv 0000.00000, T1"\n', "", "claim[0].source: missing; it is required"),
        ('source = "arXiv 0000.00000, T1"', 'source = " "', "claim[0].source: found ' '"),
        ('id = "one"', 'id = "one"\nuntested = "no"', "needs either [[claim.comparison]] or untested"),
    ):
        other = here / "other.toml"
        other.write_text(path.read_text().replace(old, new))
        result = call(other, "--results", here / "results", "--out", here / "f.md")
        assert result.exit_code == 2 and said in flat(result)
    again = claims_file(here, comparison(), comparison(), ids=["one", "one"])
    assert 'claim: the id "one" is repeated' in flat(call(again, "--results", here / "results", "--out", here / "f.md"))


def test_all_mistakes_of_a_file_are_said_at_once_and_a_missing_suite_once(here):
    path = claims_file(here, comparison("qda"), comparison(suite="tunel"), comparison(suite="tunel"))
    said = flat(call(path, "--results", here / "results", "--out", here / "f.md"))
    assert 'no variant "qda"' in said and said.count('no suite "tunel"') == 1 and "comparison[1].suite and 1 more" in said


def test_tasks_of_the_file_are_those_of_comparisons_that_name_none(here):
    head = 'schema = 1\ntasks = ["mini_math", "mini_recall"]\n'
    assert only(found_in(here, comparison(of=""), head=head))["tasks"] == ["mini_math", "mini_recall"]
    assert only(found_in(here, comparison(), head=head))["tasks"] == ["mini_math"]
    assert only(found_in(here, comparison(of='metric = "kl"'), head=head))["tasks"] is None


def test_a_missing_file_of_claims_or_results_folder_is_said(here):
    path = claims_file(here, comparison())
    assert "there is no such file of claims; did you mean" in flat(call(here / "clams.toml"))
    assert "there is no such folder" in flat(call(path, "--results", here / "resluts", "--out", here / "f.md"))
    assert "ends with .md" in flat(call(path, "--results", here / "results", "--out", here / "f.json"))


def test_two_suites_of_one_name_are_refused(here):
    shutil.copy(here / "tunnel.toml", here / "copy.toml")
    result = call(claims_file(here, comparison()), "--results", here / "results", "--out", here / "f.md")
    assert result.exit_code == 2 and 'name: "tunnel" is that of' in flat(result)


@pytest.mark.parametrize(("seeds", "said"), [("", "1 seed;"), ("seeds = [4]", "1 seed;"), ("seeds = [0, 1]", "2 seeds;")])
def test_a_cell_with_few_seeds_is_refused_before_any_run_is_read(here, seeds, said):
    write_suite(here, "single", variants={**FOUR, "qad": seeds})
    result = call(claims_file(here, comparison(suite="single")), "--results", here / "results", "--out", here / "f.md")
    assert result.exit_code == 2
    assert f'candidate: "qad" of the suite single is trained with {said} nothing said of it has an interval' in flat(result)
    assert "spread over at least 3: give its [[variant]] in" in flat(result) and not (here / "f.md").exists()


def test_a_suite_that_asks_the_first_questions_only_decides_nothing(here):
    write_suite(here, "short", task_keys="limit = 8")
    result = call(claims_file(here, comparison(suite="short")), "--results", here / "results", "--out", here / "f.md")
    assert result.exit_code == 2 and "mini_math: the suite short asks its first 8 questions only; remove limit from" in flat(
        result
    )


def problem(here, given=None):
    result = call(claims_file(here, given or comparison()), "--results", here / "results", "--out", here / "f.md")
    assert result.exit_code == 2 and not (here / "f.md").exists(), result.output
    return flat(result)


def run_json(here, suite="tunnel"):
    return next((here / "results" / suite).glob("*/run.json"))


def edit(path, **changes):
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | changes))


def test_without_a_finished_run_the_command_that_makes_one_is_said(here):
    shutil.rmtree(here / "results" / "tunnel")
    assert "no finished run of the suite tunnel; run it: harness run" in problem(here)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rehearsal": True}, "(1 is a rehearsal, whose figures say nothing of the model)"),
        ({"status": "unfinished"}, "(1 is unfinished)"),
    ],
)
def test_a_run_that_decides_nothing_is_counted_by_its_kind(here, changes, said):
    edit(run_json(here), **changes)
    assert said in problem(here)


def test_a_withdrawn_run_decides_nothing(here):
    accepted.invalidate(run_json(here).parent, reason="wrong weights")
    assert "(1 is withdrawn)" in problem(here)


def test_an_older_finished_run_stands_behind_a_newer_rehearsal(here):
    newer = here / "results" / "tunnel" / "20270101-000000-00000000"
    shutil.copytree(run_json(here).parent, newer)
    edit(newer / "run.json", rehearsal=True)
    record = found_in(here, comparison())
    assert record["suites"][0]["place"] == "tunnel/20260101-000000-00000000"


def test_a_run_of_another_suite_than_the_file_is_now_is_stale_and_says_what_changed(here):
    write_suite(here, "tunnel", model="tunnel", lr=2e-3)
    found = problem(here)
    assert (
        "stale, the suite" in found
        and "variant qat-seed0: training.lr is 0.002 in the file, 0.001 in the run" in found.replace("qad-seed0", "qat-seed0")
    )
    assert "and 3 more; put the file back, or run it: harness run" in found


def test_an_older_run_of_the_suite_as_it_is_now_stands_before_a_newer_stale_one(here):
    newer = here / "results" / "tunnel" / "20270101-000000-00000000"
    shutil.copytree(run_json(here).parent, newer)
    about = json.loads((newer / "run.json").read_text())
    about["resolved"]["engine"]["args"] = {"batch_size": 2}
    (newer / "run.json").write_text(json.dumps(about))
    assert found_in(here, comparison())["suites"][0]["place"] == "tunnel/20260101-000000-00000000"


def test_a_run_of_other_weights_than_lie_there_now_is_stale(here):
    about = json.loads(run_json(here).read_text())
    edit(run_json(here), model=about["model"] | {"fingerprint": "f" * 40})
    assert "has the weights hub:made/tun now, ffffffffffff in the run" in problem(here)


def test_a_variant_that_a_run_left_out_is_said(here):
    about = json.loads(run_json(here).read_text())
    edit(run_json(here), variants=[v for v in about["variants"] if v["name"] != "qad-seed2"])
    assert "the file has the variant qad-seed2, the run has not" in problem(here)


def test_other_questions_are_refused_and_named(here):
    suite = here / "tunnel-sft.toml"
    shutil.rmtree(here / "results" / "tunnel-sft")
    make_run(here / "results", suite, shares(dict.fromkeys(FOUR, 0.5)), n_questions=50)
    said = problem(here, comparison("bf16", "bf16", more='baseline_suite = "tunnel-sft"'))
    assert "not comparable." in said and "Questions: 10 of 60 that bf16 was asked bf16 was not" in said


def test_missing_answers_and_partial_rows_are_refused(here):
    suite = here / "tunnel.toml"
    for row, said in (
        ({"is_partial": True}, "was asked the first questions of mini_math only (limit), which decides no claim"),
        ({"scorer": "other@2"}, "Scorer:"),
    ):
        shutil.rmtree(here / "results" / "tunnel")
        make_run(here / "results", suite, shares(dict.fromkeys(FOUR, 0.5)), rows={("qad-seed1", "mini_math"): row})
        assert said in problem(here)


def test_another_kernel_is_refused_unless_the_claim_is_about_activations(here):
    suite = write_suite(here, "formats", variants={**FOUR, "ptq-w4a16": "quantization = { activations = false }"})
    make_run(here / "results", suite, shares({**dict.fromkeys(FOUR, 0.5), "ptq-w4a16": 0.6}))
    assert only(found_in(here, comparison("ptq-w4a16", "ptq", suite="formats")))["difference"] > 0
    assert only(found_in(here, comparison("ptq-w4a16", "ptq", suite="formats", of='metric = "kl"')))["n_units"] == N_SEQUENCES
    shutil.rmtree(here / "results" / "formats")
    native = {"kernels": {"linear": "native", "kv_cache": "bf16"}}
    make_run(here / "results", suite, shares({**dict.fromkeys(FOUR, 0.5), "ptq-w4a16": 0.6}), rows={"ptq": native})
    assert "Kernels: the linear layers of" in problem(here, comparison("qad", "ptq", suite="formats"))


def test_other_sequences_are_refused(here):
    path = run_json(here).parent / "diagnostics_sequences.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["n_tokens"] += 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = problem(here, comparison("qat", "ptq", of='metric = "kl"'))
    assert "were measured on different sequences; give both suites the same data and [diagnostics]" in said
    path.unlink()
    path.write_text("")
    assert "were not measured; give" in problem(here, comparison(of='metric = "kl"'))


def test_text_of_another_suite_has_to_be_the_same_by_its_settings_too(here):
    minus = 'minus = { suite = "other", candidate = "qad", baseline = "ptq" }'
    suite = write_suite(here, "other")
    make_run(here / "results", suite, shares(dict.fromkeys(FOUR, 0.5)))
    of = 'metric = "kl"'
    assert only(found_in(here, comparison("qad", "ptq", of=of, more=minus)))["n_units"] == N_SEQUENCES
    shutil.rmtree(here / "results" / "other")
    suite.write_text(suite.read_text().replace("seq_len = 512", "seq_len = 256"))
    make_run(here / "results", suite, shares(dict.fromkeys(FOUR, 0.5)))
    assert "were measured on other sequences, [data] differs; make the suites alike" in problem(
        here, comparison("qad", "ptq", of=of, more=minus)
    )


def test_kl_measured_with_two_kernels_is_refused_unless_one_is_of_bf16(here):
    path = run_json(here).parent / "diagnostics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    native = [row | {"kernels": {"linear": "native"}} if row["variant"] == "ptq" else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in native))
    of = 'metric = "kl"'
    assert only(found_in(here, comparison("ptq", "bf16", of=of)))["difference"] > 0
    said = problem(here, comparison("qad", "ptq", of=of))
    assert "were measured with the kernels" in said and "run both on one machine" in said


def test_seeds_that_two_cells_of_one_data_set_share_in_part_are_refused(here):
    write_suite(here, "mixed", variants={**FOUR, "qad": "seeds = [1, 2, 3]"})
    make_run(here / "results", here / "mixed.toml", shares(dict.fromkeys(FOUR, 0.5)))
    said = problem(here, comparison(suite="mixed"))
    assert "qad of mixed has the seeds 1, 2, 3, qat of mixed 0, 1, 2" in said.replace(
        "qat of mixed has the seeds 0, 1, 2, qad of mixed 1, 2, 3", "qad of mixed has the seeds 1, 2, 3, qat of mixed 0, 1, 2"
    )
    assert "give both the same seeds, or none in common" in said


def test_every_comparison_that_cannot_be_made_is_named_at_once(here):
    (run_json(here).parent / "diagnostics_sequences.jsonl").write_text("")
    result = call(
        claims_file(here, comparison(of='metric = "kl"'), comparison(of='metric = "ce"'), ids=["one", "two"]),
        "--results",
        here / "results",
        "--out",
        here / "f.md",
    )
    assert 'claim "one": comparison[0]' in flat(result) and 'claim "two": comparison[0]' in flat(result)


def test_questions_that_are_all_one_cluster_bound_nothing(here):
    run = run_json(here).parent
    for path in (run / "scores").glob("*.jsonl"):
        rows = [json.loads(line) | {"cluster": "same"} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "all questions are one cluster, which bounds nothing" in problem(here)


def test_budgets_of_their_own_are_said(here):
    suite = write_suite(here, "along", variants=ALONG)
    make_run(here / "results", suite, shares(dict.fromkeys(ALONG, 0.5)))
    each = only(found_in(here, comparison("qad-2", "qad-1", suite="along")))
    assert each["notes"] == ["training budgets differ: qad-2 of along 10,000 tokens, qad-1 of along 5,000 tokens"]


def test_findings_import_nothing_heavy_but_for_a_figure(here):
    path = claims_file(here, comparison())
    code = (
        "import sys\nfrom harness.cli import app\n"
        f"try: app(['findings', {str(path)!r}, '--results', {str(here / 'results')!r}, '--out', {str(here / 'f.md')!r}])\n"
        "finally: print(sorted({'torch', 'lm_eval', 'transformers', 'matplotlib', 'scipy.stats', 'zstandard'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.splitlines()[-1] == "[]" and "Findings:" in found.stdout


REAL = """
schema = 1
name = "real"

[model]
path = "{model}"

[quantization]
calibration = {{ data = "text", samples = 8 }}

[data.text]
source = "builtin"
seq_len = 512

[training]
tokens = 1500
batch_size = 2
lr = 1e-3
loss_on = "assistant"

[[variant]]
name = "bf16"
method = "bf16"

[[variant]]
name = "ptq"
method = "ptq"

[[variant]]
name = "qad"
method = "qad"
seeds = [0, 1, 2]

[engine]
kind = "hf"

[diagnostics]
data = "text"
samples = 8
"""


def test_a_run_that_the_real_command_made_is_of_its_suite_until_the_file_changes(tmp_path, tiny_model, text_at_hand):
    text_at_hand()
    suite = tmp_path / "real.toml"
    suite.write_text(REAL.format(model=tiny_model))
    done = CliRunner().invoke(app, ["run", str(suite), "--results", str(tmp_path / "results")])
    assert done.exit_code == 0, done.output
    each = only(found_in(tmp_path, comparison("qad", "ptq", suite="real", of='metric = "kl"')))
    run = next((tmp_path / "results" / "real").glob("*/run.json")).parent
    kl = {
        row["variant"]: row["response"]["kl"] for row in map(json.loads, (run / "diagnostics.jsonl").read_text().splitlines())
    }
    expected = sum(kl[f"qad-seed{seed}"] for seed in range(3)) / 3 - kl["ptq"]
    assert each["difference"] == pytest.approx(expected, rel=1e-4) and each["low"] < each["high"]
    suite.write_text(REAL.format(model=tiny_model).replace("lr = 1e-3", "lr = 2e-3"))
    of = 'metric = "kl"'
    assert "training.lr is 0.002 in the file, 0.001 in the run" in problem(
        tmp_path, comparison("qad", "ptq", suite="real", of=of)
    )
    suite.write_text(REAL.format(model=tiny_model))
    about = json.loads((run / "run.json").read_text())
    edit(run / "run.json", model=about["model"] | {"fingerprint": "0" * 64})
    assert "has the weights" in problem(tmp_path, comparison("qad", "ptq", suite="real", of=of))


def test_a_teacher_that_is_another_now_is_stale_and_a_folder_that_was_changed_decides_nothing(tmp_path):
    def made(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
        return Model(path=str(tmp_path / name))

    student, teacher = made("student"), made("teacher")
    suite = SimpleNamespace(model=student, variants=[SimpleNamespace(name=f"qad-seed{n}", teacher=teacher) for n in range(3)])
    store = Store(cache_folder())
    now, taught = (resolve_model(model, store).fingerprint for model in (student, teacher))
    about = {
        "model": {"fingerprint": now},
        "variants": [{"name": f"qad-seed{n}", "teacher_fingerprint": taught} for n in range(3)],
    }
    assert list(claim_runs._other_weights(suite, about)) == []
    (tmp_path / "teacher" / "model.safetensors").write_text("another")
    (change,) = claim_runs._other_weights(suite, about)
    assert change.startswith(f"model {teacher.path} has the weights ") and change.endswith(f"now, {taught[:12]} in the run")
    (tmp_path / "student" / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    with pytest.raises(StoreError, match=r"model\.safetensors: has the digest .*: it was changed since the model was made"):
        list(claim_runs._other_weights(suite, about))


CLAIMS = Path(__file__).parent.parent / "suites" / "windtunnel" / "claims.toml"


def mistakes(path):
    try:
        load_claims(path)
    except SuiteError as error:
        return str(error).splitlines()
    return []


def test_the_claims_of_the_wind_tunnel_are_legal_and_fit_its_suites():
    """All seven of the paper are among them."""
    assert mistakes(CLAIMS) == []
    claims = read_toml(CLAIMS, what="file of claims", example="")["claim"]
    assert {claim["topic"][:2] for claim in claims} >= {f"{n}." for n in range(1, 8)}
    assert all(claim.get("comparison") for claim in claims), "all are put to the test"
