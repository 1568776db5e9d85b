"""What stands in a table beside scores: differences to BF16, published figures, speed; and the formats that it is written in."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from sample_runs import sample, write_run

from harness.paired import QuestionPair, paired_difference
from harness.speed import tokens_per_second
from harness.table_against import NOT_COMPARED
from harness.table_cells import signed
from harness.table_latex import as_latex, escape
from harness.tables import Grid, build_grid, build_table, print_grid, render, write_tables

RIGHT = {"bf16": 30, "ptq": 20, "qat": 22, "qad": 25}
"""Of 40 questions the first so many are right."""


def answers(right: int, task: str = "maths", n: int = 40) -> list[dict]:
    return [sample(doc, float(doc < right), task=task) for doc in range(n)]


def compared(folder: Path, right: dict[str, int] = RIGHT, **changes) -> dict:
    return build_table(write_run(folder / "r", {(name, "maths"): answers(n) for name, n in right.items()}, **changes))


def difference(table: dict, candidate: str) -> dict:
    (found,) = [row for row in table["differences"] if row["candidate"] == candidate]
    return found


def block(table: dict) -> dict[str, tuple[str, ...]]:
    (against,) = [grid for grid in build_grid(table).below if grid.title.startswith("Against")]
    return {row[0]: row[1:] for row in against.rows}


def test_every_variant_is_held_against_bf16_on_the_same_questions(tmp_path):
    table = compared(tmp_path)
    found = difference(table, "qad")
    pairs = [QuestionPair(float(doc < 30), float(doc < 25), str(doc)) for doc in range(40)]
    expected = paired_difference(pairs)
    assert (found["delta"], found["low"], found["high"]) == (expected.delta, expected.low, expected.high)
    assert found["delta"] == pytest.approx(-5 / 40)
    assert (found["worse"], found["better"], found["n_questions"], found["coverage"]) == (5, 0, 40, 1.0)
    assert found["recovery"]["value"] == pytest.approx(25 / 30)
    assert (found["start"], found["gap_recovered"]["value"]) == ("ptq", pytest.approx(0.5))
    assert found["recovery"]["low"] < 25 / 30 < found["recovery"]["high"]
    assert difference(table, "ptq")["gap_recovered"] is difference(table, "ptq")["start"] is None
    cells = block(table)["qad: maths"]
    assert cells[0].startswith("−12.5 [−") and cells[1].startswith("83.3 [") and cells[2].startswith("50 [")
    assert cells[3:] == ("0.0 % (0.0)", "5/0")
    assert any(
        "gap closed = (variant − ptq) / (bf16 − ptq)" in note and "maths 40." in note for note in build_grid(table).notes
    )


def test_the_gap_is_to_the_ptq_of_the_same_quantization_and_not_to_a_null(tmp_path):
    right = {"bf16": 30, "null": 10, "w4a16": 28, "ptq": 20, "qad": 25}
    quantization = {"scale_rule": "amax", "activations": True, "block_scales": "recomputed"}
    changes = {name: {"quantization": quantization} for name in ("ptq", "qad")}
    changes["qad"] = {"quantization": quantization | {"block_scales": "frozen"}}
    changes["w4a16"] = {"method": "ptq", "quantization": quantization | {"activations": False}}
    changes["null"] = {"method": "ptq", "quantization": quantization, "sampling_seed": 1}
    found = difference(compared(tmp_path, right, variant_changes=changes), "qad")
    assert (found["start"], found["gap_recovered"]["value"]) == ("ptq", pytest.approx(0.5))


def test_rows_stand_in_the_order_of_the_literature_whatever_was_made_first(tmp_path):
    right = {"qad": 25, "ptq": 20, "bf16": 30, "qat": 22, "mine": 21}
    table = compared(tmp_path, right, variant_changes={"mine": {"method": "checkpoint"}})
    assert [row[0] for row in build_grid(table).rows] == ["bf16", "mine", "ptq", "qat", "qad"]
    assert list(block(table)) == ["mine: maths", "ptq: maths", "qat: maths", "qad: maths"]
    assert [row["variant"] for row in csv.DictReader(io.StringIO(render(table, "csv")))] == [
        "bf16",
        "mine",
        "ptq",
        "qat",
        "qad",
    ]


def test_what_is_not_comparable_has_no_figure_and_a_reason(tmp_path):
    table = compared(tmp_path, row_changes={"ptq": {"scorer": "maths@2:def"}})
    refused = difference(table, "ptq")
    assert set(refused) == {"candidate", "baseline", "task", "n_seeds", "refused"} and "maths@2:def" in refused["refused"][0]
    assert block(table)["ptq: maths"][:3] == (NOT_COMPARED, "–", "–")
    assert any(note.startswith("Not compared with BF16: ptq in maths. Scorer") for note in build_grid(table).notes)
    assert difference(table, "qad")["gap_recovered"] is None  # its start cannot be held against BF16
    line = next(row for row in csv.DictReader(io.StringIO(render(table, "csv"))) if row["variant"] == "ptq")
    assert line["maths.delta"] == line["maths.recovery"] == ""


def test_a_figure_that_is_no_share_has_no_points(tmp_path):
    table = compared(tmp_path, row_changes={"maths": {"unit": "plain"}})
    assert difference(table, "qad")["refused"][0].startswith("Unit: exact_match is no share")


def test_a_run_without_scores_keeps_its_table_and_says_what_is_missing(tmp_path):
    run = write_run(tmp_path / "r", {(name, "maths"): answers(n) for name, n in RIGHT.items()})
    (run / "scores" / "qad.maths.jsonl").unlink()
    table = build_table(run)
    assert "qad: maths" not in block(table) and "qat: maths" in block(table)
    assert any("scores/ lacks them" in note and note.endswith(": qad maths.") for note in build_grid(table).notes)
    for path in (run / "scores").iterdir():
        path.unlink()
    grid = build_grid(build_table(run))
    assert not grid.below and any("scores/ lacks them" in note and note.endswith("results of this run.") for note in grid.notes)
    assert not any("scores/" in note for note in build_grid(compared(tmp_path / "alone", {"bf16": 3})).notes)


def test_a_ratio_over_what_may_be_zero_is_undefined_and_says_so(tmp_path):
    table = compared(tmp_path, {"bf16": 0, "ptq": 0, "qad": 1})
    assert difference(table, "qad")["recovery"]["value"] is None
    assert block(table)["qad: maths"][1:3] == ("undefined", "undefined")
    notes = [note for note in build_grid(table).notes if note.startswith("Undefined, since ")]
    assert any("recovery of qad in maths" in note for note in notes)
    json.dumps(table, allow_nan=False)


def test_seeds_are_held_against_bf16_as_their_mean(tmp_path):
    right = {"bf16": 30, "ptq": 20, "qad-0": 24, "qad-1": 26}
    seeds = {f"qad-{seed}": {"method": "qad", "group": "qad", "seed": seed} for seed in (0, 1)}
    table = compared(tmp_path, right, variant_changes=seeds)
    mean = difference(table, "qad (2 seeds)")
    assert (mean["delta"], mean["n_seeds"]) == (pytest.approx(-5 / 40), 2)
    assert mean["gap_recovered"]["value"] == pytest.approx(0.5)
    assert difference(table, "qad-0")["delta"] == pytest.approx(-6 / 40)
    assert list(block(table)) == ["ptq: maths", "qad (2 seeds): maths"]
    line = list(csv.DictReader(io.StringIO(render(table, "csv"))))[-1]
    assert (line["variant"], float(line["maths.delta"])) == ("qad (2 seeds)", mean["delta"])


def test_the_footnote_tells_kernels_questions_and_seeds(tmp_path):
    resolved = {"resolved": {"model": {"thinking": None}, "tasks": [{"name": "maths", "seed": 3}]}}
    table = compared(tmp_path, variant_changes={"qad": {"training": {"seed": 7}}}, about_changes=resolved)
    notes = build_grid(table).notes
    assert "Seeds: sampling 3; training qad 7." in notes
    assert any("ptq, qat, qad: w4a4_emulation" in note for note in notes)
    assert any("questions: maths 40." in note for note in notes)


REFERENCE = {
    "source": "A paper, table 3.",
    "band": 3.0,
    "figure": [
        {"variant": "bf16", "task": "maths", "value": 79.0, "table": "Table 3", "verified": "first-hand"},
        {"variant": "qad", "task": "maths", "value": 62.0, "table": None, "verified": "single translation"},
        {"variant": "qad", "task": "elsewhere", "value": 50.0, "table": "T9", "verified": "cross-checked"},
    ],
}


def published(folder: Path, right: dict[str, int] = RIGHT, **changes) -> dict:
    resolved = {"resolved": {"model": {"thinking": None}, "reference": REFERENCE}}
    return compared(folder, right, about_changes=resolved, **changes)


def test_published_figures_have_rows_of_their_own_with_source_and_our_difference(tmp_path):
    table = published(tmp_path)
    grid = build_grid(table)
    rows = {row[0]: row[1] for row in grid.rows}
    assert (rows["published bf16"], rows["published qad"]) == ("79.0 (−4.0)", "62.0 (+0.5)")
    ours = {(each["variant"], each["task"]): each for each in table["published"]}
    assert ours["bf16", "maths"]["difference"] == pytest.approx(-4.0) and ours["bf16", "maths"]["is_outside_band"] is True
    assert ours["qad", "maths"]["is_outside_band"] is False and ours["qad", "elsewhere"]["difference"] is None
    (note,) = [note for note in grid.notes if note.startswith("Published")]
    assert note.startswith("Published: A paper, table 3, percent as published; difference") and "nats" not in note
    assert any(note.startswith("Suspect: bf16 maths −4.0 points") for note in grid.notes)
    line = next(row for row in csv.DictReader(io.StringIO(render(table, "csv"))) if row["variant"] == "published bf16")
    assert (line["method"], line["source"], float(line["maths.value"])) == ("published", "A paper, table 3.", 0.79)
    assert float(line["maths.published_difference"]) == pytest.approx(-0.04)


def test_every_format_shows_value_table_and_flag_of_each_published_figure(tmp_path):
    table = published(tmp_path)
    shown = [
        ("bf16: maths", "79.0", "Table 3", "first-hand", "75.0", "−4.0"),
        ("qad: maths", "62.0", "–", "single translation", "62.5", "+0.5"),
        ("qad: elsewhere", "50.0", "T9", "cross-checked", "–", "–"),
    ]
    grid = build_grid(table)
    (below,) = [each for each in grid.below if each.title == "Published figures"]
    assert below.rows == tuple(shown)
    lines = re.split(r"\n", printed(grid, 100))
    assert all(any(line.split() == " ".join(row).split() for line in lines) for row in shown)
    assert all("| " + " | ".join(row) + " |" in render(table, "md") for row in shown)
    assert r"bf16: maths & 79.0 & Table 3 & first-hand & 75.0 & $-$4.0 \\" in render(table, "tex")
    written = {line["variant"]: line for line in csv.DictReader(io.StringIO(render(table, "csv")))}
    for variant, task, value, where, flag in (
        ("bf16", "maths", 0.79, "Table 3", "first-hand"),
        ("qad", "maths", 0.62, "", "single translation"),
        ("qad", "elsewhere", 0.5, "T9", "cross-checked"),
    ):
        line = written[f"published {variant}"]
        assert float(line[f"{task}.value"]) == value
        assert (line[f"{task}.published_table"], line[f"{task}.published_verified"]) == (where, flag)


def with_metrics(folder: Path) -> dict:
    """A run with a second metric, KL and CE, and published figures of them."""
    flags = {"table": "T1", "verified": "cross-checked"}
    figures = [
        {"variant": "qad", "task": "maths", "metric": "by_step", "value": 70.0, **flags},
        {"variant": "qad", "task": "maths", "metric": "of_nobody", "value": 71.0, **flags},
        {"variant": "qad", "task": "diagnostics", "metric": "kl", "value": 0.004, **flags},
        {"variant": "qad", "task": "diagnostics", "metric": "ce", "value": 0.416, **flags},
        {"variant": "ptq", "task": "diagnostics", "metric": "kl", "value": 0.3, **flags},
    ]
    resolved = {"resolved": {"model": {"thinking": None}, "reference": {"source": "A paper", "band": 3.0, "figure": figures}}}
    response = {"kl": 0.0155, "kl_stderr": 0.001, "ce": 0.410, "n_sequences": 9, "n_tokens": 900}
    measured = {"variant": "qad", "kernels": {"linear": "w4a4_emulation"}, "response": response}
    samples = {(name, "maths"): answers(n) for name, n in RIGHT.items()}
    run = write_run(folder / "m", samples, about_changes=resolved, diagnostics=[measured])
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    rows += [row | {"metric": "by_step", "value": 0.8} for row in rows if row["variant"] == "qad"]
    (run / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_table(run)


def test_a_published_figure_of_another_metric_is_held_against_that_metric_and_one_of_diagnostics_against_ours_in_nats(tmp_path):
    table = with_metrics(tmp_path)
    grid = build_grid(table)
    (below,) = [each for each in grid.below if each.title == "Published figures"]
    assert [(*row[:2], *row[4:]) for row in below.rows] == [
        ("qad: maths by_step", "70.0", "80.0", "+10.0"),
        ("qad: maths of_nobody", "71.0", "–", "–"),
        ("qad: KL", "0.004", "0.015", "+0.011"),
        ("qad: CE", "0.416", "0.410", "−0.006"),
        ("ptq: KL", "0.300", "–", "–"),
    ]
    assert not any(row[0].startswith("published") for row in grid.rows)  # none is of what stands in the table
    assert any("KL and CE in nats a token" in note for note in grid.notes)
    (suspect,) = [note for note in grid.notes if note.startswith("Suspect")]
    assert suspect.startswith("Suspect: qad maths by_step +10.0 points") and "KL" not in suspect
    line = {each["variant"]: each for each in csv.DictReader(io.StringIO(render(table, "csv")))}["published qad"]
    assert (line["maths.by_step.value"], line["maths.by_step.published_verified"]) == ("0.7", "cross-checked")
    assert (line["kl"], line["ce"], line["kl.published_table"], line["maths.value"]) == ("0.004", "0.416", "T1", "")
    assert float(line["kl.published_difference"]) == pytest.approx(0.0115)


@pytest.mark.parametrize("change", [{"is_partial": True}, {"unit": "plain"}])
def test_a_published_figure_is_of_the_whole_task_in_percent_and_held_against_nothing_else(tmp_path, change):
    table = published(tmp_path, row_changes={"maths": change})
    assert [each["difference"] for each in table["published"]] == [None] * 3
    assert {row[0]: row[1] for row in build_grid(table).rows}["published bf16"] == "79.0"


def test_a_published_method_that_several_variants_have_is_compared_with_none_of_them(tmp_path):
    right = {"bf16": 30, "qad-a": 25, "qad-b": 26}
    table = published(tmp_path, right, variant_changes={name: {"method": "qad"} for name in ("qad-a", "qad-b")})
    assert {row[0]: row[1] for row in build_grid(table).rows}["published qad"] == "62.0"


def test_without_published_figures_nothing_is_said_of_any(tmp_path):
    table = compared(tmp_path)
    assert table["published"] == []
    assert "ublished" not in render(table, "md")


def stage(variant: str, n_tokens: int | None, seconds: float = 2.0, kind: str = "evaluate") -> dict:
    generated = None if n_tokens is None else {"n_tokens": n_tokens, "seconds": seconds}
    return {"kind": kind, "variant": variant, "generated": generated, "label": f"{variant}: maths", "inputs": {}}


def test_speed_is_tokens_over_seconds_of_what_generates(tmp_path):
    stages = [stage("a", 100), stage("a", 300, 6.0), stage("a", 0, 50.0), stage("b", 7), stage("a", None, kind="judge")]
    assert tokens_per_second(stages, "a") == pytest.approx(400 / 8)
    assert tokens_per_second(stages, "nobody") is None
    assert tokens_per_second([*stages, stage("a", None)], "a") is None  # a resumed one: its seconds are of fewer tokens
    assert tokens_per_second([stage("a", 0)], "a") is None
    old = {"kind": "evaluate", "label": "a: maths"}
    assert tokens_per_second([old], "a") is None


def test_the_column_of_speeds_is_there_where_one_is_known(tmp_path):
    table = compared(tmp_path, about_changes={"stages": [stage("bf16", 2469), stage("ptq", None)]})
    grid = build_grid(table)
    speeds = {row[0]: row[grid.columns.index("tok/s")] for row in grid.rows}
    assert speeds == {"bf16": "1,234.5", "ptq": "–", "qat": "–", "qad": "–"}
    assert any(note.startswith("tok/s: ") and "no measurement of speed" in note for note in grid.notes)
    without = build_grid(compared(tmp_path / "none"))
    assert "tok/s" not in without.columns and not any("tok/s" in note for note in without.notes)


OLD_COLUMNS = (
    "variant,method,maths.value,maths.stderr,maths.n_scored,maths.n_total,maths.incomplete_rate,maths.chose_checkpoint,"
    "maths.sd_over_seeds,kl,kl_stderr,kl_p50,kl_p99,ce,ppl,top1,n_tokens,n_sequences,checkpoint_bytes,bits_per_weight,tokens_trained,"
    "group,seed,n_seeds,kl_sd_over_seeds,ce_sd_over_seeds,ppl_sd_over_seeds,top1_sd_over_seeds"
)


def test_every_line_of_the_csv_of_a_rehearsal_says_so_and_no_other_has_the_column(tmp_path):
    table = published(tmp_path)
    assert "rehearsal" not in render(table, "csv")
    lines = list(csv.DictReader(io.StringIO(render(table | {"rehearsal": True}, "csv"))))
    assert len(lines) > 2 and all(line["rehearsal"] == "true" for line in lines)


def test_columns_of_the_csv_are_only_ever_added(tmp_path):
    header = render(published(tmp_path), "csv").splitlines()[0]
    assert header.startswith(OLD_COLUMNS + ",tokens_per_second,maths.delta,maths.delta_low,maths.delta_high,maths.recovery,")


def test_a_run_folder_has_the_table_in_every_format(tmp_path):
    run = write_run(tmp_path / "r", {("bf16", "maths"): answers(30), ("ptq", "maths"): answers(20)})
    write_tables(run)
    assert json.loads((run / "table.json").read_text())["differences"][0]["candidate"] == "ptq"
    for style in ("md", "csv", "tex"):
        assert (run / f"table.{style}").read_text() == render(build_table(run), style)


def latex_problems(text: str) -> list[str]:
    """What pdflatex would stumble over in the fragments that are written here."""
    found = []
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    depth, environments = 0, []
    for token in re.finditer(r"\\(begin|end)\{(\w+)\}|\\[a-zA-Z]+|\\.|.", body, re.DOTALL):
        kind, name, whole = token.group(1), token.group(2), token.group()
        if kind == "begin":
            environments.append(name)
        elif kind == "end" and (not environments or environments.pop() != name):
            found.append(f"{name} ends and did not begin")
        elif whole in "{}":
            depth += 1 if whole == "{" else -1
        elif whole in "%#_^~" or (whole == "&" and environments[-1:] != ["tabular"]):
            found.append(f"a bare {whole}")
        elif ord(whole[0]) > 127:
            found.append(f"{whole} is no ASCII")
        if depth < 0:
            found.append("a brace too many")
    for spec, inside in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", body, re.DOTALL):
        rows = [line for line in inside.splitlines() if line.endswith(r"\\")]
        found += [f"{row}: not {len(spec)} cells" for row in rows if len(re.findall(r"(?<!\\)&", row)) != len(spec) - 1]
        found += [f"{row}: opens an argument" for row in rows if row.lstrip().startswith("[")]
    if len(re.findall(r"(?<!\\)\$", body)) % 2:
        found.append("mathematics that does not end")
    return found + [f"{name} does not end" for name in environments] + (["a brace does not close"] if depth else [])


@pytest.mark.parametrize(
    "broken",
    [
        "a_b",
        "50 %",
        r"\begin{table}",
        r"\end{table}",
        "{",
        "}",
        "$x",
        "−",
        r"\begin{tabular}{lr}" + "\na \\\\\n" + r"\end{tabular}",
    ],
)
def test_the_check_of_latex_finds_what_is_wrong(broken):
    assert latex_problems(broken)


def test_latex_is_whole_and_everything_in_it_is_escaped(tmp_path):
    table = published(tmp_path)
    table["suite"] = r"a_b {50 % & more} $x^2$ ~ \input{/etc/passwd} # <tag> | [x]"
    text = as_latex(build_grid(table))
    assert latex_problems(text) == []
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 3 and r"\usepackage{booktabs}" in text
    assert r"published bf16 & 79.0 ($-$4.0)" in text and r"30.0" not in text and r"75.0 $\pm$10.0" in text
    assert r"\input" not in text and r"\textbackslash{}input\{/etc/passwd\}" in text


def test_each_character_with_a_meaning_in_latex_is_written_as_itself():
    assert escape("a_b & 5 % #1 {x}") == r"a\_b \& 5 \% \#1 \{x\}"
    assert escape("−0.5 ±1 × ‖ † ‡ ~^\\") == (
        r"$-$0.5 $\pm$1 $\times$ $\Vert$ \textdagger{} \textdaggerdbl{} \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


def printed(grid: Grid, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_grid(grid, console)
    return console.file.getvalue()


def test_the_block_fits_a_terminal_of_100_columns_however_many_tasks_there_are(tmp_path):
    tasks = [f"task_{number}" for number in range(10)]
    right = {"bf16": 38, "ptq": 3, "qad": 21}
    run = write_run(tmp_path / "r", {(name, task): answers(n, task) for name, n in right.items() for task in tasks})
    against = build_grid(build_table(run)).below[0]
    text = printed(Grid(against.title, against.columns, against.rows, ()), 100)
    assert text.count("lost/won") == 1 and max(map(len, text.splitlines())) <= 100
    narrow = printed(Grid(against.title, against.columns, against.rows, ()), 50)
    assert narrow.count("qad: task_9") > 1 and max(map(len, narrow.splitlines())) <= 50


def test_text_in_brackets_is_printed_and_no_markup():
    assert "[bold]x[/bold]" in printed(Grid("[red]t", ("a", "b"), (("[bold]x[/bold]", "1"),), ("n",)), 80)


def test_points_have_a_sign_and_nothing_has_no_minus():
    assert (signed(-0.04), signed(-1.25), signed(3.0)) == ("+0.0", "−1.2", "+3.0")
    assert (signed(-0.0004, 3), signed(-0.0125, 3)) == ("+0.000", "−0.013")


def test_a_table_needs_neither_torch_nor_scipys_slow_parts():
    code = "import sys, harness.tables; print([name for name in ('torch', 'scipy.stats', 'lm_eval', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
