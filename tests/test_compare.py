"""Comparing two variants of a run: figures, flips, what is refused, what is said, exit statuses, and what is imported for it."""

import csv
import io
import json
import math
import shutil
import subprocess
import sys

import pytest
from rich.console import Console
from sample_runs import sample, write_run
from typer.testing import CliRunner

from harness.cli import app
from harness.compare import compare_runs
from harness.compare_report import as_data, closing, lines, print_comparison, render_markdown
from harness.drift import drift
from harness.evidence import open_run_evidence
from harness.noise_floor import noise_floors
from harness.paired import holm
from harness.table_csv import as_csv
from harness.table_grid import build_grid
from harness.table_latex import as_latex
from harness.tables import build_table

N = 40


def answers(lost=(), *, task="maths", n=N, wrong=range(30, N), **changes):
    """n questions, of which the baseline gets `wrong` wrong; `lost` are wrong too."""
    return [sample(doc, 0.0 if doc in wrong or doc in lost else 1.0, task=task, **changes) for doc in range(n)]


def sequences(kl):
    """Per variant ten sequences of ten tokens with this KL, a little more in every other one."""
    return [
        {
            "variant": name,
            "sequence": number,
            "n_tokens": 10,
            "kl_sum": 10 * (value + 0.01 * (number % 2) * (value > 0)),
            "ce_sum": 10 * (2 + value),
            "top1_sum": 10 * (1 - value),
        }
        for name, value in kl.items()
        for number in range(10)
    ]


@pytest.fixture
def run(tmp_path):
    samples = {
        ("bf16", "maths"): answers(),
        ("ptq", "maths"): answers(lost=range(12)),
        ("bf16", "sums"): answers(task="sums"),
        ("ptq", "sums"): answers(lost=[0], wrong=range(31, N), task="sums"),
    }
    return write_run(tmp_path / "run", samples, sequences=sequences({"bf16": 0.0, "ptq": 0.25}))


def compare(run, baseline="bf16", candidate="ptq", tasks=(), **options):
    return compare_runs(open_run_evidence(run), baseline, candidate, tasks, **options)


def call(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def flat(result):
    return " ".join(result.output.split())


def test_values_differences_flips_and_tests_of_each_task(run):
    maths, sums = compare(run).tasks
    assert (maths.task, maths.baseline, maths.candidate) == ("maths", 30 / N, 18 / N)
    assert maths.difference.delta == pytest.approx(-12 / N)
    assert maths.difference.low < -12 / N < maths.difference.high < 0
    assert (maths.flips, sums.flips) == ((12, 0), (1, 1))
    assert (maths.n_scored, maths.n_total, maths.coverage, maths.paired_by) == ((N, N), (N, N), 1.0, "request")
    assert maths.p_test == "McNemar" and maths.p == pytest.approx(2 * 0.5**12)
    assert sums.p == 1.0 and sums.difference.low < 0 < sums.difference.high
    assert [maths.p_holm, sums.p_holm] == holm([maths.p, sums.p])
    assert maths.recovery.value == pytest.approx(18 / 30)


def test_the_pooled_difference_weighs_tasks_alike(run):
    found = compare(run)
    assert found.pooled_tasks == ("maths", "sums") and found.pooled.delta == pytest.approx(-6 / N)
    assert compare(run, tasks=["maths"]).pooled is None and compare(run, tasks=["maths", "maths"]).pooled is None


def test_kl_ce_and_top1_are_paired_over_sequences(run):
    kl, ce, top1 = compare(run).figures
    assert (kl.figure, kl.baseline, kl.n_sequences, kl.n_clusters) == ("kl", 0.0, 10, 10)
    assert kl.difference == pytest.approx(0.255) and kl.low < kl.difference < kl.high
    assert kl.high - kl.difference == pytest.approx(2.262157 * kl.stderr, rel=1e-5)  # Student's t, 9 degrees of freedom
    assert kl.stderr == pytest.approx(0.005 / math.sqrt(9))
    assert (ce.difference, top1.difference) == (pytest.approx(0.25), pytest.approx(-0.25))


def test_variants_measured_on_different_sequences_have_no_kl_difference_and_it_is_said(tmp_path):
    rows = sequences({"bf16": 0.0, "ptq": 0.25})
    rows[-1]["n_tokens"] = 11
    samples = {(name, "maths"): answers() for name in ("bf16", "ptq")}
    found = compare(write_run(tmp_path / "run", samples, sequences=rows))
    assert found.figures == () and any("measured on different sequences" in note for note in found.notes)


def test_quantized_variants_measured_with_different_kernels_have_no_kl_difference(tmp_path):
    samples = {(name, "maths"): answers() for name in ("ptq", "qad")}
    measured = [{"variant": name, "kernels": {"linear": kernel}} for name, kernel in (("ptq", "native"), ("qad", "w4a16"))]
    given = sequences({"ptq": 0.2, "qad": 0.1})
    found = compare(write_run(tmp_path / "run", samples, sequences=given, diagnostics=measured), "ptq", "qad")
    assert found.figures == () and any("measured with different kernels" in note for note in found.notes)


def test_a_task_that_is_not_comparable_is_refused_alone_and_enters_no_test_over_tasks(tmp_path):
    samples = {(name, task): answers(task=task) for task in ("maths", "sums", "facts") for name in ("bf16", "ptq")}
    samples["ptq", "maths"] = answers(lost=range(12))
    run = write_run(tmp_path / "run", samples, row_changes={("ptq", "sums"): {"scorer": "sums@2"}})
    found = compare(run)
    refused = found.tasks[1]
    assert found.refused == ("sums",) and not refused.is_comparable and refused.difference is refused.p is None
    assert refused.refusals == ("Scorer: sums@1:abc for bf16, sums@2 for ptq.",)
    assert found.pooled_tasks == ("maths", "facts") and found.pooled.n_tasks == 2
    assert found.tasks[0].p_holm == pytest.approx(2 * found.tasks[0].p), "over two tasks, not three"
    assert closing(found) == "Compared 2 of 3 tasks; refused 1: sums."
    result = call(run, "bf16", "ptq")
    assert result.exit_code == 4 and "sums: not comparable. Scorer: sums@1:abc for bf16, sums@2 for ptq." in flat(result)
    assert result.output.rstrip().endswith("Compared 2 of 3 tasks; refused 1: sums.")


def test_a_comparison_of_everything_is_status_0_and_of_nothing_2(run, tmp_path):
    assert call(run, "bf16", "ptq").exit_code == 0
    samples = {(name, "maths"): answers() for name in ("bf16", "ptq")}
    other = write_run(tmp_path / "other", samples, row_changes={("ptq", "maths"): {"version": 2}})
    result = call(other, "bf16", "ptq")
    assert result.exit_code == 2 and result.output.rstrip().endswith("Refused the only task: nothing is comparable.")


def test_a_task_that_one_variant_lacks_is_refused_and_one_that_both_lack_is_left_out(tmp_path):
    samples = {("bf16", "maths"): answers(), ("bf16", "sums"): answers(task="sums"), ("ptq", "sums"): answers(task="sums")}
    samples["qad", "facts"] = answers(task="facts")
    found = compare(write_run(tmp_path / "run", samples))
    assert [(task.task, task.refusals) for task in found.tasks] == [
        ("maths", ("Missing: ptq has no result in maths.",)),
        ("sums", ()),
    ]
    assert (found.tasks[0].baseline, found.tasks[0].candidate) == (30 / N, None)
    found = compare(open_run_evidence(tmp_path / "run").folder, tasks=["facts"])
    assert found.tasks[0].refusals == ("Missing: bf16 and ptq have no result in facts.",)


def test_variants_without_a_common_task_leave_nothing_to_compare(tmp_path):
    samples = {("bf16", "maths"): answers(), ("ptq", "sums"): answers(task="sums"), ("qad", "facts"): answers(task="facts")}
    run = write_run(tmp_path / "run", samples, variant_changes={"nobody": {}})
    path = run / "run.json"
    about = json.loads(path.read_text())
    path.write_text(
        json.dumps(about | {"variants": [*about["variants"], *({"name": name, "method": "ptq"} for name in ("one", "two"))]})
    )
    result = call(run, "one", "two")
    assert result.exit_code == 2 and "Nothing to compare: neither variant has a result in a task." in flat(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bf16", "ptp"), "candidate ptp: no such variant in this run; did you mean ptq? Known: bf16, ptq"),
        (("fp32", "ptq"), "baseline fp32: no such variant in this run. Known: bf16, ptq"),
        (("bf16", "ptq", "--task", "math"), "--task math: no such task in this run; did you mean maths? Known: maths, sums"),
        (("ptq", "ptq"), "baseline and candidate are both ptq; name two variants, such as bf16 and ptq"),
    ],
)
def test_a_name_that_the_run_does_not_have_is_an_error_with_those_it_has(run, arguments, message):
    result = call(run, *arguments)
    assert result.exit_code == 2 and message in flat(result)


def test_a_run_that_is_damaged_or_of_another_schema_or_older_is_an_error(run):
    kept = (run / "tasks.jsonl").read_text()
    for text, message in (
        (kept[:80], "line 1 is damaged"),
        (kept.replace('"schema": 1', '"schema": 7'), "line 1 has schema 7"),
    ):
        (run / "tasks.jsonl").write_text(text)
        result = call(run, "bf16", "ptq")
        assert result.exit_code == 2 and message in flat(result)
    (run / "tasks.jsonl").write_text(kept)
    shutil.rmtree(run / "scores")
    result = call(run, "bf16", "ptq")
    assert result.exit_code == 2 and "run the suite again" in flat(result)


def test_a_run_still_being_written_is_compared_and_says_so(tmp_path):
    samples = {(name, "maths"): answers() for name in ("bf16", "ptq")}
    run = write_run(tmp_path / "run", samples, about_changes={"status": "unfinished", "rehearsal": True})
    notes = " ".join(compare(run).notes)
    assert "The run run is not finished" in notes and "The run run is a rehearsal" in notes
    assert "not finished" in flat(call(run, "bf16", "ptq"))


def test_what_is_missing_is_refused_unless_a_lower_coverage_is_asked_for_and_then_counted(tmp_path):
    lossy = [sample(0, None), *answers()[1:]]
    run = write_run(tmp_path / "run", {("bf16", "maths"): answers(), ("ptq", "maths"): lossy})
    assert compare(run).refused == ("maths",)
    (found,) = compare(run, min_coverage=0.9).tasks
    assert found.n_scored == (N, N - 1) and found.difference.n_questions == N - 1
    assert (found.baseline, found.candidate) == (29 / 39, 29 / 39) and found.difference.delta == 0
    assert "39 of 40 questions are scored by both" in found.notes
    result = call(run, "bf16", "ptq", "--min-coverage", "0.9")
    assert result.exit_code == 0 and "40/40, 39/40" in result.output


def test_repeats_are_averaged_and_tested_by_permutation(tmp_path):
    ours = [sample(doc, 1.0, repeat=repeat, seed=repeat) for doc in range(N) for repeat in range(4)]
    theirs = [sample(doc, float(repeat > 0), repeat=repeat, seed=9 + repeat) for doc in range(N) for repeat in range(4)]
    (found,) = compare(write_run(tmp_path / "run", {("bf16", "maths"): ours, ("ptq", "maths"): theirs})).tasks
    assert found.difference.delta == pytest.approx(-0.25) and found.flips == (N, 0)
    assert found.p_test == "permutation" and found.difference.mcnemar is None
    assert "drawn with other seeds on each side" in found.notes


def test_a_metric_where_less_is_better_turns_flips_around_and_has_no_recovery(tmp_path):
    samples = {("bf16", "maths"): answers(lost=range(12)), ("ptq", "maths"): answers()}
    samples |= {(name, "sums"): answers(task="sums") for name in ("bf16", "ptq")}
    run = write_run(tmp_path / "run", samples, row_changes={"maths": {"higher_is_better": False}})
    found = compare(run)
    maths = found.tasks[0]
    assert maths.flips == (12, 0) and maths.difference.delta > 0 and maths.recovery is None
    assert "less is better" in maths.notes and found.pooled_tasks == ("sums",) and found.pooled is None


def test_a_metric_that_is_no_share_is_shown_without_a_test(tmp_path):
    samples = {(name, "text"): [sample(n, metrics={"exact_match": 12.5}) for n in range(3)] for name in ("bf16", "ptq")}
    rows = {"text": {"unit": "plain", "value": 12.5, "higher_is_better": False}}
    run = write_run(tmp_path / "run", samples, row_changes=rows)
    (found,) = compare(run).tasks
    assert found.is_comparable and found.difference is found.p is None and (found.baseline, found.candidate) == (12.5, 12.5)
    assert "no share of 1" in " ".join(found.notes)
    result = call(run, "bf16", "ptq")
    assert result.exit_code == 0 and "no test" in result.output and "Compared the only task." in result.output


def test_imported_scores_say_how_they_were_paired(tmp_path):
    samples = {(name, "maths"): answers(requests=[], imported=True) for name in ("bf16", "ptq")}
    said = {"imported": {"tool": "lm-eval"}, "kernels": {"linear": "unknown"}, "scorer": "lm-eval 0.4.9", "flags": ["imported"]}
    run = write_run(tmp_path / "run", samples, row_changes={"maths": said | {"higher_is_better": None}})
    (found,) = compare(run).tasks
    assert found.paired_by == "question" and found.difference.n_questions == N
    assert "scored elsewhere (lm-eval 0.4.9): paired by the source of the question" in " ".join(found.notes)
    assert "whether more is better is not recorded; taken as if it were" in found.notes


def test_what_a_reader_has_to_know_stands_below(tmp_path):
    samples = {(name, "maths"): answers() for name in ("ptq", "qat", "qad")}
    records = {
        "qat": {"budget": {"tokens": 1000, "steps": 10}},
        "qad": {"budget": {"tokens": 2000, "steps": 20}, "selection": {"select": "best_of_k", "tasks": ["maths"]}},
    }
    rows = {"maths": {"is_partial": True}, "qat": {"flags": ["unverified"]}}
    run = write_run(tmp_path / "run", samples, variant_changes=records, row_changes=rows)
    text = "\n".join(lines(compare(run, "qat", "qad")))
    assert "Training budgets differ: qat 1,000 tokens in 10 steps, qad 2,000 tokens in 20 steps." in text
    assert "maths: the first questions of the task only (limit)." in text
    assert "maths: helped to choose the checkpoint of qad, whose score is flattered." in text
    assert "maths: qat: unverified." in text


def test_bf16_twice_is_called_the_noise_floor(tmp_path):
    samples = {(name, "maths"): answers() for name in ("bf16", "again")}
    rows = {"again": {"kernels": {"linear": "bf16", "kv_cache": "bf16"}}}
    run = write_run(
        tmp_path / "run", samples, variant_changes={"again": {"method": "bf16", "sampling_seed": 1}}, row_changes=rows
    )
    found = compare(run, "bf16", "again")
    assert not found.refused and "bf16 and again have the same weights: what differs is chance" in " ".join(found.notes)


def test_a_baseline_of_another_run_is_compared_and_named(run, tmp_path):
    samples = {("bf16", "maths"): answers(), ("ptq", "maths"): answers(lost=range(3))}
    earlier = write_run(tmp_path / "earlier", samples)
    found = compare(run, "ptq", "ptq", baseline_run=open_run_evidence(earlier))
    maths, sums = found.tasks
    assert (maths.flips, found.baseline_run) == ((9, 0), "earlier") and found.figures == ()
    assert sums.refusals == ("Missing: ptq has no result in sums.",)
    result = call(run, "ptq", "ptq", "--task", "maths", "--baseline-run", earlier)
    assert result.exit_code == 0 and "baseline of run earlier" in flat(result)


def test_what_the_terminal_shows_markdown_and_json_say_too(run):
    found = compare(run)
    console = Console(width=240, record=True, file=io.StringIO())
    print_comparison(found, console)
    terminal, markdown, data = console.export_text(), render_markdown(found), json.loads(json.dumps(as_data(found)))
    for text in ("75.0", "45.0", "-30.0 [", "60.0 [", "40/40", "+0.2550 [", "<0.001", "Compared all 2 tasks."):
        assert text in terminal and text in markdown
    assert data["schema"] == 1 and data["tasks"][0]["flips"] == [12, 0] and data["tasks"][0]["difference"]["worse"] == 12
    assert data["refused"] == [] and data["pooled"]["n_tasks"] == 2 and data["figures"][0]["figure"] == "kl"
    assert json.loads(call(run, "bf16", "ptq", "--format", "json").output) == data
    assert call(run, "bf16", "ptq", "--format", "md").output == markdown


def test_brackets_and_bars_of_names_stay_text(tmp_path):
    samples = {(name, "a [red] task|b"): answers(task="a [red] task|b") for name in ("bf16", "ptq")}
    run = write_run(tmp_path / "run", samples)
    assert "a [red] task|b" in flat(call(run, "bf16", "ptq", "--task", "a [red] task|b"))
    assert "| a [red] task\\|b |" in render_markdown(compare(run))


def test_comparing_needs_no_samples_and_imports_nothing_heavy(run):
    shutil.rmtree(run / "samples")
    code = (
        "import sys\nfrom harness.cli import app\n"
        f"try: app(['compare', {str(run)!r}, 'bf16', 'ptq'])\n"
        "finally: print(sorted({'torch', 'lm_eval', 'transformers', 'matplotlib', 'scipy.stats', 'zstandard'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.splitlines()[-1] == "[]" and "Compared all 2 tasks." in found.stdout


def test_a_coverage_of_zero_cannot_be_asked_for(run):
    result = call(run, "bf16", "ptq", "--min-coverage", "0")
    assert result.exit_code == 2 and "--min-coverage" in result.output


def test_scores_that_no_share_has_are_refused_by_all_that_compares(tmp_path):
    samples = {("bf16", "maths"): [sample(n) for n in range(9)], ("bf16-again", "maths"): [sample(n, 1.5) for n in range(9)]}
    again = {"bf16-again": {"method": "bf16", "sampling_seed": 3}}
    run = write_run(tmp_path / "run", samples, variant_changes=again)
    (task,) = compare(run, "bf16", "bf16-again").tasks
    assert task.difference is None and "has a score of 1.5 (question 0)" in task.refusals[0]
    evidence = open_run_evidence(run)
    assert "has a score of 1.5" in drift(evidence, evidence, variants=[("bf16", "bf16-again")]).refused[0]
    (floor,) = noise_floors(run, evidence.about["variants"])
    assert floor["tasks"]["maths"] == {"reason": "exact_match is no share"}
    assert build_table(run)["differences"] is not None


def test_a_control_with_grey_pictures_is_no_score_for_anything_that_compares(tmp_path):
    names = ("bf16", "bf16-again", "ptq")
    samples = {(name, task): answers(task=task) for name in names for task in ("maths", "sums", "sums-grey")}
    samples["ptq", "sums-grey"] = answers(task="sums-grey", lost=range(20))
    again = {"bf16-again": {"method": "bf16", "sampling_seed": 3}}
    grey = {"sums-grey": {"flags": ["grey pictures"]}}
    run = write_run(tmp_path / "grey", samples, variant_changes=again, row_changes=grey)
    found = compare(run)
    assert found.pooled_tasks == ("maths", "sums") and found.pooled.delta == 0 and found.refused == ()
    maths, sums = found.tasks
    assert "Left out, controls with grey pictures and no scores: sums-grey." in found.notes
    assert call(run, "bf16", "ptq").exit_code == 0
    (control,) = compare(run, tasks=["sums-grey"]).tasks
    assert control.p is None and control.refusals[0].startswith("Control: sums-grey shows grey pictures")
    assert [maths.p_holm, sums.p_holm] == holm([maths.p, sums.p])
    evidence = open_run_evidence(run)
    moved = drift(evidence, evidence, variants=[("bf16", "ptq")])
    assert moved.n_compared == 2 and moved.refused == ()
    (floor,) = noise_floors(run, evidence.about["variants"])
    assert set(floor["tasks"]) == {"maths", "sums"}
    table = build_table(run)
    assert all(bool(row["refused"]) == (row["task"] == "sums-grey") for row in table["differences"])
    lines = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [line["sums-grey.control"] for line in lines] == ["true"] * 3 and "sums.control" not in lines[0]
    grid = build_grid(table)
    assert any(note.startswith("‡ sums-grey of") and "no score of the task" in note for note in grid.notes)
    assert r"\textdaggerdbl{} sums-grey of" in as_latex(grid)
