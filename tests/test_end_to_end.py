"""The real commands on a tiny model, in process and out of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard
from sample_runs import sample, write_run

from harness import cli
from harness.errors import HarnessError

REPOSITORY = Path(__file__).parent.parent


def harness(monkeypatch, *arguments: object) -> int:
    """Run the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """A finished run of the tiny suite: (suite, results, run folder, cache)."""
    from conftest import SUITE

    root = tmp_path_factory.mktemp("finished")
    suite = root / "tiny.toml"
    suite.write_text(SUITE.format(model=tiny_model))
    environment = os.environ | {"HARNESS_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", "run", str(suite), "--results", str(root / "results")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (root / "results" / "tiny").iterdir()
    assert done.stdout.strip().splitlines()[-1] == f"Results: {run}"
    return suite, root / "results", run, root / "cache"


@pytest.fixture
def same_cache(finished, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(finished[3]))
    return finished


def test_a_run_writes_everything_that_is_promised(finished):
    run = finished[2]
    about = json.loads((run / "run.json").read_text())
    assert (about["schema"], about["status"], about["suite"]) == (1, "complete", "tiny")
    assert about["provenance"]["packages"]["torch"]
    assert {stage["label"] for stage in about["stages"]} >= {"data text", "calibrate", "quantize", "qat: train", "qad: train"}
    table = json.loads((run / "table.json").read_text())
    assert [row["variant"] for row in table["rows"]] == ["bf16", "ptq", "qat", "qad"]
    for row in table["rows"]:
        for name, primary in (("mini_math", "exact_match"), ("mini_choice", "acc")):
            task = row["tasks"][name]
            assert task["primary"] == primary
            assert set(task["metrics"][primary]) == {"value", "stderr", "n_scored", "n_total", "unit", "higher_is_better"}
            assert task["metrics"][primary]["n_scored"] == 8
        for part in ("response", "all"):
            assert set(row["diagnostics"][part]) == {
                "kl",
                "kl_stderr",
                "kl_p50",
                "kl_p99",
                "ce",
                "ppl",
                "top1",
                "n_tokens",
                "n_sequences",
            }
        samples = zstandard.decompress((run / "samples" / f"{row['variant']}.mini_math.jsonl.zst").read_bytes())
        assert len(samples.splitlines()) == 8
    for name in ("qat", "qad"):
        assert all((run / "training" / f"{name}.{kind}").stat().st_size for kind in ("jsonl", "svg", "png"))
    scores, against = (run / "table.md").read_text().split("**Against bf16**")
    assert scores.count("\n| ") == 6  # the head, the rule below it, four variants
    assert against.count("\n| ") == 8  # three of them in two tasks
    assert (run / "table.tex").read_text().count("\\midrule") == 2
    assert (run / "table.csv").read_text().splitlines()[0].startswith("variant,method,mini_math.value")


def test_rows_say_which_way_is_better_and_which_engine_answered(finished):
    rows = [json.loads(line) for line in (finished[2] / "tasks.jsonl").read_text().splitlines()]
    better = {(row["task"], row["metric"]): row["higher_is_better"] for row in rows}
    assert better == {
        ("mini_math", "exact_match"): True,
        ("mini_math", "unparsed"): False,
        ("mini_choice", "acc"): True,
    }
    assert {row["engine"]["engine"] for row in rows} == {"hf"} and all(row["engine"]["packages"]["torch"] for row in rows)
    assert {row["sampling_seed"] for row in rows} == {0}


def test_scores_without_text_are_what_two_variants_are_compared_by(copied_run, monkeypatch, capsys):
    shutil.rmtree(copied_run / "samples")
    assert harness(monkeypatch, "compare", copied_run, "bf16", "ptq") == 0
    assert "Compared all 2 tasks." in capsys.readouterr().out
    scores = [json.loads(line) for line in (copied_run / "scores" / "ptq.mini_math.jsonl").read_text().splitlines()]
    assert len(scores) == 8 and all(len(row["requests"][0]) == 64 and row["seeds"] == [None] for row in scores)


def test_a_finished_run_that_lacks_scores_gets_them_when_the_suite_is_run_again(same_cache, monkeypatch):
    suite, results, run, _ = same_cache
    before = {path.name: path.read_bytes() for path in (run / "scores").iterdir()}
    shutil.rmtree(run / "scores")
    assert harness(monkeypatch, "run", suite, "--results", results) == 0
    assert {path.name: path.read_bytes() for path in (run / "scores").iterdir()} == before and len(before) == 8


def test_the_variants_relate_as_they_must(finished):
    table = json.loads((finished[2] / "table.json").read_text())
    rows = {row["variant"]: row for row in table["rows"]}
    assert rows["bf16"]["diagnostics"]["response"]["kl"] == 0.0
    assert rows["bf16"]["diagnostics"]["response"]["top1"] == 1.0
    assert rows["ptq"]["diagnostics"]["response"]["kl"] > 0
    assert rows["bf16"]["bits_per_weight"] == 16.0
    assert rows["ptq"]["bits_per_weight"] == rows["qad"]["bits_per_weight"]
    assert rows["qat"]["budget"]["tokens"] == rows["qad"]["budget"]["tokens"] >= 6000
    for name in ("qat", "qad"):
        assert 0 < rows[name]["codes_changed"] < 1
        assert rows[name]["tasks"]["mini_math"]["kernels"]["linear"] == "w4a4_emulation"
    about = json.loads((finished[2] / "run.json").read_text())
    digests = {variant["start_digest"] for variant in about["variants"] if variant["method"] != "bf16"}
    assert len(digests) == 1
    pairs = {(pair["candidate"], pair["baseline"]) for pair in table["paired_kl"]}
    assert pairs == {("qad", "ptq"), ("qad", "qat"), ("qat", "ptq")}


def test_the_same_suite_again_does_nothing_loads_no_model_and_says_so(same_cache):
    suite, results, run, _ = same_cache
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code = (
        "import sys; from harness import cli\n"
        f"sys.argv = ['harness', 'run', {str(suite)!r}, '--results', {str(results)!r}]\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'lm_eval', 'transformers', 'numba', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "nothing to do, all" in done.stdout
    assert done.stdout.strip().endswith("[]")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_table_is_printed_again_without_the_cache(finished, monkeypatch, capsys, tmp_path):
    run = finished[2]
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "nothing here"))
    for style in ("json", "md", "csv"):
        assert harness(monkeypatch, "table", run, "--format", style) == 0
        assert capsys.readouterr().out == (run / f"table.{style}").read_text()
    assert harness(monkeypatch, "table", run) == 0
    printed = capsys.readouterr().out
    assert "qad" in printed
    assert "Native FP4: not measured" in printed


def test_questions_are_inspected_without_the_cache(finished, monkeypatch, capsys, tmp_path):
    run = finished[2]
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "nothing here"))
    assert harness(monkeypatch, "inspect", run) == 0
    assert "compared with bf16" in capsys.readouterr().out
    assert harness(monkeypatch, "inspect", run, "--task", "mini_choice", "--question", "0") == 0
    printed = capsys.readouterr().out
    assert "is the capital of" in printed and "choice 0: log-likelihood" in printed and "qad" in printed
    assert harness(monkeypatch, "inspect", run, "--html", tmp_path / "page.html") == 0
    assert "mini_math, question 0" in (tmp_path / "page.html").read_text()


def test_no_file_of_a_run_but_what_was_asked_and_answered_holds_text_of_questions(finished):
    files = [path for path in finished[2].rglob("*") if path.is_file()]
    text = b"is the capital of"
    assert any(text in zstandard.decompress(path.read_bytes()) for path in files if path.suffix == ".zst")
    assert not [path for path in files if path.suffix != ".zst" and text in path.read_bytes()]
    assert {path.relative_to(finished[2]).parts[0] for path in files if path.suffix == ".zst"} == {"samples", "tasks"}


def test_results_that_were_scored_elsewhere_join_the_next_run_with_a_mark(same_cache, monkeypatch, capsys, tmp_path):
    suite, results = same_cache[0], tmp_path / "results"
    assert harness(monkeypatch, "run", suite, "--results", results) == 0
    (first,) = (results / "tiny").iterdir()
    before = {path: path.read_bytes() for path in first.rglob("*.json*")}
    rows = [{"problem": f"Secret {i}", "generation": "x", "graded_list": [i < 3]} for i in range(4)]
    (tmp_path / "output-rs0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    importing = ["import", suite, "--variant", "ptq", "--task", "lcb", "--from", tmp_path / "output-rs0.jsonl"]
    assert harness(monkeypatch, *importing, "--results", results) == 0
    assert harness(monkeypatch, "run", suite, "--results", results) == 0
    assert harness(monkeypatch, "run", suite, "--results", results) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in first.rglob("*.json*")} == before  # a complete run stays as it was
    (second,) = set((results / "tiny").iterdir()) - {first}
    table = json.loads((second / "table.json").read_text())
    by_name = {row["variant"]: row["tasks"] for row in table["rows"]}
    assert by_name["ptq"]["lcb"]["metrics"]["accuracy"]["value"] == 0.75 and "lcb" not in by_name["qad"]
    assert by_name["ptq"]["lcb"]["flags"] == ["imported"]
    shown = (second / "table.md").read_text()
    assert "‡" in shown and "lcb of ptq: scored by another tool and imported" in shown
    assert json.loads((second / "run.json").read_text())["imported"][0]["tool"] == "nemo-skills"
    assert len((second / "scores" / "ptq.lcb.jsonl").read_text().splitlines()) == 4
    assert all("Secret" not in path.read_text() for path in second.iterdir() if path.is_file())


@pytest.fixture
def copied_run(finished, monkeypatch, tmp_path) -> Path:
    """A copy of the finished run, and no cache."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "no cache"))
    return Path(shutil.copytree(finished[2], tmp_path / "run"))


def test_scoring_again_gives_the_same_figures_without_cache_or_model(copied_run, monkeypatch, capsys):
    names = ("tasks.jsonl", "table.csv")
    before = {name: (copied_run / name).read_text() for name in names}
    assert harness(monkeypatch, "score", copied_run) == 0
    assert "bf16 mini_math:" in capsys.readouterr().out
    assert {name: (copied_run / name).read_text() for name in names} == before
    assert len(json.loads((copied_run / "run.json").read_text())["rescored"]) == 1


def test_a_changed_scorer_scores_the_recorded_answers_anew(copied_run, monkeypatch, capsys):
    path = copied_run / "samples" / "bf16.mini_math.jsonl.zst"
    rows = [json.loads(line) for line in zstandard.decompress(path.read_bytes()).decode().splitlines()]
    for row in rows:  # what another scorer would have said
        row |= {"metrics": {"exact_match": 1.0, "unparsed": 0.0}, "scorer": "another scorer"}
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert harness(monkeypatch, "score", copied_run) == 0
    assert re.search(r"bf16 mini_math: .* \(scorer another scorer -> mini_math@1:\w+\)", capsys.readouterr().out)
    rows = [json.loads(line) for line in zstandard.decompress(path.read_bytes()).decode().splitlines()]
    assert {row["scorer"].partition(":")[0] for row in rows} == {"mini_math@1"}
    assert any(row["metrics"]["exact_match"] == 0.0 for row in rows)


def test_a_run_without_its_samples_cannot_be_scored_again(copied_run, monkeypatch, capsys):
    shutil.rmtree(copied_run / "samples")
    assert harness(monkeypatch, "score", copied_run) == 2
    assert "what was asked and answered is not kept; run the suite again" in capsys.readouterr().err


def test_missing_responses_end_with_status_4_and_the_same_command_fills_them(
    tiny_suite, text_at_hand, monkeypatch, capsys, tmp_path
):
    from harness.engines import Failure
    from harness.engines.hf import HfEngine

    answer = HfEngine.answer

    def sulking(self, batch):
        for place, outcome in answer(self, batch):
            yield place, Failure("it sulked") if place == 0 else outcome

    monkeypatch.setattr(HfEngine, "answer", sulking)
    results = tmp_path / "results"
    assert harness(monkeypatch, "run", tiny_suite, "--only", "bf16", "--results", results) == 4
    printed = capsys.readouterr().out
    assert re.search(r"bf16 mini_math: \d+ responses are missing; the same command asks for them", printed)
    (run,) = (results / "tiny").iterdir()
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert all(row["n_scored"] < row["n_total"] and row["n_missing"] for row in rows)
    monkeypatch.setattr(HfEngine, "answer", answer)
    assert harness(monkeypatch, "run", tiny_suite, "--only", "bf16", "--results", results) == 0
    assert [path.name for path in (results / "tiny").iterdir()] == [run.name]
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert all(row["n_scored"] == row["n_total"] and not row["n_missing"] for row in rows)


def test_every_part_of_the_surroundings_is_named_by_doctor(monkeypatch, capsys):
    assert harness(monkeypatch, "doctor") == 0
    printed = capsys.readouterr().out
    for what in ("package torch", "GPU", "FP4 units", "vLLM", "mirror", "CPU kernels"):
        assert what in printed


def test_plan_says_what_is_stored_and_how_much_there_is_to_do(same_cache, monkeypatch, capsys, tiny_suite):
    suite = same_cache[0]
    assert harness(monkeypatch, "plan", suite) == 0
    printed = capsys.readouterr().out
    assert "stages are stored" in printed
    assert "to do" not in printed
    assert "qad: train (6,000 tokens, 4 sequences a step, lr 0.001)" in printed
    assert "bf16: mini_choice (32 requests)" in printed


def test_a_checkpoint_made_elsewhere_gives_the_same_figures_as_the_variant_it_came_from(same_cache, monkeypatch, tmp_path):
    suite, _results, run, cache = same_cache
    about = json.loads((run / "run.json").read_text())
    key = next(stage["key"] for stage in about["stages"] if stage["label"] == "quantize")
    foreign = tmp_path / "foreign"
    shutil.copytree(cache / "stages" / key / "files", foreign)
    text = suite.read_text()
    head, rest = text.split('[[variant]]\nname = "ptq"')
    tail = rest[rest.index("[[task]]") :]
    head = re.sub(r"\[quantization\].*?(?=\[data)", "", head, flags=re.S)
    head = re.sub(r"\[training\].*?(?=\[\[variant)", "", head, flags=re.S)
    made = tmp_path / "made.toml"
    made.write_text(
        f'{head}[[variant]]\nname = "elsewhere"\nmethod = "checkpoint"\npath = "{foreign}"\n\n{tail}'.replace(
            '"tiny"', '"made"', 1
        )
    )
    assert harness(monkeypatch, "run", made, "--results", tmp_path / "results") == 0
    (other,) = (tmp_path / "results" / "made").iterdir()
    rows = {row["variant"]: row for row in json.loads((other / "table.json").read_text())["rows"]}
    ours = {row["variant"]: row for row in json.loads((run / "table.json").read_text())["rows"]}
    assert rows["elsewhere"]["tasks"] == ours["ptq"]["tasks"]
    assert rows["elsewhere"]["diagnostics"] == ours["ptq"]["diagnostics"]
    assert rows["elsewhere"]["checkpoint_bytes"] == ours["ptq"]["checkpoint_bytes"]


def test_a_stage_rebuilt_with_other_bytes_invalidates_what_came_after(same_cache, tmp_path, monkeypatch):
    from harness.plan import make_plan
    from harness.run import find_done
    from harness.store import Store
    from harness.suite import load_suite

    copy = tmp_path / "cache"
    shutil.copytree(same_cache[3], copy, copy_function=shutil.copy2)
    store = Store(copy)
    stages = {stage.label: stage for stage in make_plan(load_suite(same_cache[0]), store).stages}
    calibration = stages["calibrate"]
    assert find_done(stages["quantize"], store) is not None
    record = json.loads((copy / "stages" / calibration.key / "stage.json").read_text())
    with store.writing(calibration.key, {k: record[k] for k in ("kind", "inputs", "sections")}) as folder:
        (folder / "input_amax.json").write_text("{}")
    assert find_done(stages["quantize"], store) is None
    assert find_done(stages["bf16: mini_math"], store) is not None


TORCH_FREE = """
import sys
from harness import cli
sys.argv = ["harness", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(sorted({"torch", "lm_eval", "transformers", "numba", "vllm", "datasets", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.parametrize("verb", ["--help", "plan", "table", "inspect"])
def test_help_plan_table_and_inspect_import_neither_torch_nor_lm_eval(verb, same_cache):
    arguments = {"--help": [], "plan": [same_cache[0]], "table": [same_cache[2]], "inspect": [same_cache[2]]}[verb]
    done = subprocess.run([sys.executable, "-c", TORCH_FREE, verb, *map(str, arguments)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_the_torch_free_check_can_fail():
    code = TORCH_FREE.replace("from harness import cli", "import torch; from harness import cli")
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.stdout.strip().endswith("['torch']")


def edited(suite: Path, old: str, new: str) -> Path:
    text = suite.read_text()
    assert old in text
    suite.write_text(text.replace(old, new, 1))
    return suite


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[model]\npath = ", '[model]\npath = "/no/such/model"\n#', r"model\.path: /no/such/model: no such folder"),
        ("[quantization]", '[quantization]\nexclude = ["lm_haed"]', '"lm_haed" matches no linear layer'),
        ("[quantization]", '[quantization]\nexclude = ["lm_head", "*.k_proj"]', "qkv_proj: the recipe splits a fused group"),
        ("[quantization]", "[quantization]\nexclude = []", "lm_head: shares its weight with the embedding"),
        ("tokens = 6000", "tokens = 900_000", r"the training split holds .* tokens; 1 pass over it lack .* of the 900,000"),
        ("samples = 8 }", "samples = 8_000 }", "the calibration split has .* sequences, 8000 are asked for"),
        ("samples = 8 }", "samples = 8, headroom = 0.01 }", r"activation blocks saturate .* raise calibration\.headroom"),
    ],
)
def test_mistakes_that_only_the_model_can_show_are_one_message_and_status_2(
    tiny_suite, text_at_hand, tmp_path, monkeypatch, capsys, old, new, message
):
    text_at_hand()
    if old.startswith("[model]"):
        text = re.sub(r'\[model\]\npath = ".*"', '[model]\npath = "/no/such/model"', tiny_suite.read_text())
        tiny_suite.write_text(text)
    else:
        edited(tiny_suite, old, new)
    edited(tiny_suite, '[[task]]\nname = "mini_math"\nlimit = 8\n', "")
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results") == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert "Traceback" not in printed.err


def test_a_model_width_that_is_no_multiple_of_16_is_named(tmp_path, tiny_suite, tiny_model, monkeypatch, capsys):
    from conftest import build_tiny_model

    odd = build_tiny_model(tmp_path / "odd", hidden=40)
    edited(tiny_suite, str(tiny_model), str(odd))
    assert harness(monkeypatch, "run", tiny_suite, "--only", "ptq", "--results", tmp_path / "results") == 2
    assert re.search(r"input width 40 is not a multiple of 16.*to exclude", capsys.readouterr().err)


def test_a_nan_weight_is_named(tmp_path, tiny_suite, tiny_model, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    edited(tiny_suite, str(tiny_model), str(broken))
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results") == 2
    assert re.search(r"layers\.1\.mlp\.up_proj\.weight: holds 1 values that are NaN", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"), [("vocabulary", "another vocabulary"), ("tokenizer", "its tokenizer cannot be loaded")]
)
def test_a_foreign_checkpoint_that_cannot_be_compared_is_refused_before_the_first_score(
    tiny_suite, tiny_model, tmp_path, monkeypatch, capsys, change, message
):
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_model, foreign)
    if change == "vocabulary":
        tokenizer = json.loads((foreign / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        for path in foreign.glob("tokenizer*"):
            path.unlink()
    edited(tiny_suite, 'name = "ptq"\nmethod = "ptq"', f'name = "other"\nmethod = "checkpoint"\npath = "{foreign}"')
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "bf16: mini_math" not in printed.out


def test_a_results_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path, tiny_suite, monkeypatch, capsys):
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("cat")
    assert harness(monkeypatch, "run", tiny_suite, "--results", other) == 2
    assert "not a results folder of this harness" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["cat.jpg"]
    assert harness(monkeypatch, "run", tiny_suite, "--results", other / "cat.jpg") == 2
    assert "is a file; give a folder" in capsys.readouterr().err


def test_a_truncated_or_future_run_is_named_by_table(finished, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished[2], copy)
    (copy / "run.json").write_text((copy / "run.json").read_text()[:100])
    assert harness(monkeypatch, "table", copy) == 2
    assert f"{copy / 'run.json'}: cannot be read" in capsys.readouterr().err
    (copy / "run.json").write_text('{"schema": 99}')
    assert harness(monkeypatch, "table", copy) == 2
    assert "schema 99, this version reads 1" in capsys.readouterr().err
    assert harness(monkeypatch, "table", tmp_path / "nowhere") == 2
    capsys.readouterr()
    for text, message in (("{}", "schema None"), ('{"schema": 1}', "lacks 'variants'")):
        (copy / "run.json").write_text(text)
        assert harness(monkeypatch, "table", copy) == 2
        assert message in capsys.readouterr().err


PHASES = {
    "plan": "harness.plan_to_run.make_plan",
    "data": "harness.builtin.builtin_sequences",
    "calibrate": "harness.stages.calibrate",
    "quantize": "harness.stages.quantize_model",
    "export": "harness.stages.write_checkpoint",
    "train": "qad.distill.train",
    "answer": "harness.engines.hf.HfEngine.answer",
    "diagnostics": "qad.divergence.measure",
    "table": "harness.run.build_table",
}


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_each_phase_is_status_130_and_keeps_what_was_finished(
    phase, tiny_suite, finished, text_at_hand, tmp_path, monkeypatch, capsys
):
    if phase == "table":  # the last: every stage before it is that of the finished run
        shutil.copytree(finished[3] / "stages", tmp_path / "cache" / "stages", copy_function=shutil.copy2)
    elif phase not in ("plan", "data"):
        text_at_hand()

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PHASES[phase], interrupt)
        assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results") == 130
    printed = capsys.readouterr()
    assert printed.err.strip().splitlines()[-1].startswith("interrupted; finished stages")
    assert "Traceback" not in printed.err
    kept = list((tmp_path / "cache" / "stages").glob("*")) if phase != "plan" else []
    assert not [path for path in kept if path.name.startswith(".partial")]
    assert all((path / "stage.json").is_file() for path in kept)
    if phase == "table":
        assert {path.name for path in kept} == {path.name for path in (finished[3] / "stages").glob("*")}
    if phase == "train":
        assert len(kept) >= 8
        (run,) = (tmp_path / "results" / "tiny").iterdir()
        policy = tmp_path / "policy.toml"
        policy.write_text(
            'schema = 1\nkernels = ["w4a4_emulation"]\n[[task]]\nname = "mini_math"\nmargin = 3\ntier = "critical"\n'
        )
        assert harness(monkeypatch, "advise", run, "--policy", policy) == 3
        advice = capsys.readouterr().out
        assert "of the first 8 questions only (limit)" in advice and "unfinished" not in advice


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_ends_the_process_with_130_and_the_next_run_finishes(
    number, tiny_suite, text_at_hand, tmp_path, monkeypatch, capsys
):
    text_at_hand()
    text = tiny_suite.read_text()
    for name in ("qat", "qad"):
        text = text.replace(f'[[variant]]\nname = "{name}"\nmethod = "{name}"\n', "")
    tiny_suite.write_text(text[: text.index("[training]")] + text[text.index("[[variant]]") :])
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "harness.cli", "run", str(tiny_suite), "--results", str(tmp_path / "results")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if "ptq: mini_math" in line:  # the stage after quantize, which is stored by now
            process.send_signal(number)
            break
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert (
        errors.strip().splitlines()[-1]
        == "interrupted; finished stages and responses are kept, the same command goes on from them"
    )
    assert "Traceback" not in errors
    (record,) = (tmp_path / "results" / "tiny").glob("*/run.json")
    assert json.loads(record.read_text())["status"] != "complete"
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results") == 0
    assert "quantize:" not in capsys.readouterr().out


def trained_stage(cache: Path) -> Path:
    (found,) = (
        path.parent for path in (cache / "stages").glob("*/stage.json") if json.loads(path.read_text())["kind"] == "train"
    )
    return found


def test_sigterm_in_training_leaves_a_checkpoint_and_status_130_and_the_next_run_ends_with_the_same_weights(
    tiny_suite, text_at_hand, tmp_path, monkeypatch
):
    import torch
    from safetensors.torch import load_file

    text_at_hand()

    text = tiny_suite.read_text().replace(
        "tokens = 6000\nbatch_size = 4", "tokens = 24_000\nbatch_size = 1\ncheckpoint_every = 4"
    )
    text = re.sub(r'\[\[variant\]\]\nname = "qat"\nmethod = "qat"\n', "", text)
    begin, end = text.index("[[task]]"), text.index("[engine]")
    tiny_suite.write_text(text[:begin] + text[end:])
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "harness.cli", "run", str(tiny_suite), "--results", str(tmp_path / "results")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(cache.glob("unfinished/*/step-*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    stopped = re.search(
        r"harness: stopped after step (\d+) of (\d+); the checkpoint after step \1 is kept, and the same command", errors
    )
    assert stopped and "Traceback" not in errors, errors
    shutil.copytree(cache, tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone" / "unfinished")
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results") == 0
    resumed = json.loads((trained_stage(cache) / "stage.json").read_text())["result"]
    assert (resumed["resumed_at"], resumed["selection"]["steps"]) == tuple(map(int, stopped.groups()))
    assert not list(cache.glob("unfinished/*"))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "alone"))
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "others") == 0
    alone = json.loads((trained_stage(tmp_path / "alone") / "stage.json").read_text())["result"]
    assert alone.pop("resumed_at") is None and resumed.pop("resumed_at")
    assert resumed == alone
    ours, theirs = (load_file(trained_stage(root) / "files" / "model.safetensors") for root in (cache, tmp_path / "alone"))
    assert ours.keys() == theirs.keys()
    as_bytes = [{name: t.contiguous().reshape(-1).view(torch.uint8) for name, t in each.items()} for each in (ours, theirs)]
    assert all(torch.equal(as_bytes[0][name], as_bytes[1][name]) for name in ours)


def test_a_bug_keeps_its_traceback(tiny_suite, monkeypatch):
    def fail(path):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("harness.run.load_suite", fail)
    monkeypatch.setattr(sys, "argv", ["harness", "run", str(tiny_suite)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_checkpoint_that_does_not_load_back_to_the_same_logits_is_an_error(tiny_suite, text_at_hand, tmp_path, monkeypatch):
    import torch

    from harness import loading

    load = loading.load_model

    def load_another(folder, **options):
        loaded = load(folder, **options)
        if (folder / "hf_quant_config.json").is_file():
            with torch.no_grad():
                loaded.model.model.norm.weight.mul_(1.5)
        return loaded

    monkeypatch.setattr("harness.stages.loading.load_model", load_another)
    from rich.console import Console

    from harness.progress import Reporter
    from harness.run import run_suite

    text_at_hand()
    with pytest.raises(HarnessError, match="does not reproduce the model in memory"):
        run_suite(tiny_suite, tmp_path / "results", ("ptq",), Reporter(Console()))


def test_the_scored_checkpoint_is_exported_in_either_layout(same_cache, monkeypatch, capsys, tmp_path):
    run = same_cache[2]
    assert harness(monkeypatch, "export", run, "--variant", "qad", "--out", tmp_path / "qad") == 0
    assert "layout: modelopt" in capsys.readouterr().out
    about = {v["name"]: v for v in json.loads((run / "run.json").read_text())["variants"]}
    stored = same_cache[3] / "stages" / about["qad"]["checkpoint"]["stage"] / "files" / "model.safetensors"
    assert (tmp_path / "qad" / "model.safetensors").read_bytes() == stored.read_bytes()
    assert harness(monkeypatch, "verify", tmp_path / "qad") == 0
    other = ("--layout", "compressed-tensors")
    assert harness(monkeypatch, "export", run, "--variant", "qad", "--out", tmp_path / "ct", *other) == 0
    assert "layout: compressed-tensors" in capsys.readouterr().out
    assert harness(monkeypatch, "verify", tmp_path / "ct") == 0
    assert harness(monkeypatch, "export", run, "--variant", "bf16", "--out", tmp_path / "bf16") == 0
    assert (tmp_path / "bf16" / "config.json").is_file()
    assert (tmp_path / "qad" / "tokenizer.json").is_file()
    assert not (tmp_path / "qad" / "training.jsonl").exists()


def test_a_card_is_written_into_a_copy_in_either_layout_and_into_no_other_copy(same_cache, monkeypatch, capsys, tmp_path):
    run = same_cache[2]
    for layout in ("modelopt", "compressed-tensors"):
        out = tmp_path / layout
        assert harness(monkeypatch, "export", run, "--variant", "qad", "--out", out, "--layout", layout) == 0
        assert harness(monkeypatch, "card", run, "--variant", "qad", "--out", out) == 0
        text = (out / "README.md").read_text()
        assert "mini_math" in text and f"Layout: {layout}" in text and "of 14 linear layers" in text
        assert harness(monkeypatch, "verify", out) == 0
    capsys.readouterr()
    assert harness(monkeypatch, "card", run, "--variant", "ptq", "--out", tmp_path / "modelopt") == 2
    assert "is a copy of qad of run tiny" in capsys.readouterr().err
    about = {v["name"]: v for v in json.loads((run / "run.json").read_text())["variants"]}
    stored = same_cache[3] / "stages" / about["qad"]["checkpoint"]["stage"] / "files"
    before = sorted(path.name for path in stored.iterdir())
    assert harness(monkeypatch, "card", run, "--variant", "qad", "--out", stored) == 2
    assert sorted(path.name for path in stored.iterdir()) == before


def test_the_speed_of_answering_is_in_the_table_of_a_run_that_was_not_interrupted(finished):
    rows = {row["variant"]: row["tokens_per_second"] for row in json.loads((finished[2] / "table.json").read_text())["rows"]}
    assert set(rows) == {"bf16", "ptq", "qat", "qad"} and all(speed > 0 for speed in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variant", "nobody"), "has no variant 'nobody'. Known: bf16, ptq, qad, qat"),
        (("--variant", "qad", "--layout", "gguf"), "--layout gguf: unknown. Known: modelopt, compressed-tensors"),
        (("--variant", "bf16", "--layout", "modelopt"), "is not quantized, so it has no layout"),
    ],
)
def test_an_export_that_cannot_be_is_refused_and_leaves_nothing(same_cache, monkeypatch, capsys, tmp_path, arguments, message):
    assert harness(monkeypatch, "export", same_cache[2], "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_without_the_cache_says_how_to_get_it_back(finished, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "empty"))
    assert harness(monkeypatch, "export", finished[2], "--variant", "qad", "--out", tmp_path / "out") == 2
    assert "is not in the cache" in capsys.readouterr().err


MIXED = """
schema = 1
name = "mixed"

[model]
path = "{model}"

[quantization]
layout = "compressed-tensors"
fp8 = ["*.down_proj"]
kv_cache = "fp8"
calibration = {{ data = "text", samples = 8 }}

[data.text]
source = "builtin"
seq_len = 512

[training]
tokens = 2000
batch_size = 4
lr = 1e-3
loss_on = "assistant"

[[variant]]
name = "bf16"
method = "bf16"

[[variant]]
name = "foreign"
method = "checkpoint"
path = "{foreign}"

[[variant]]
name = "ptq"
method = "ptq"

[[variant]]
name = "qad"
method = "qad"

[engine]
kind = "hf"

[diagnostics]
data = "text"
samples = 6
"""


def test_a_mixed_recipe_with_an_fp8_cache_runs_beside_a_checkpoint_of_the_other_layout(
    same_cache, monkeypatch, tmp_path, tiny_model
):
    foreign = tmp_path / "foreign"
    assert harness(monkeypatch, "export", same_cache[2], "--variant", "ptq", "--out", foreign) == 0
    suite = tmp_path / "mixed.toml"
    suite.write_text(MIXED.format(model=tiny_model, foreign=foreign))
    assert harness(monkeypatch, "run", suite, "--results", tmp_path / "results") == 0
    (run,) = (tmp_path / "results" / "mixed").iterdir()
    rows = {row["variant"]: row for row in json.loads((run / "table.json").read_text())["rows"]}
    assert rows["foreign"]["diagnostics"]["kernels"] == {"linear": "w4a4_emulation", "kv_cache": "bf16"}
    for name in ("ptq", "qad"):
        assert rows[name]["diagnostics"]["kernels"] == {
            "linear": "w4a4_emulation",
            "linear_fp8": "w8a8_emulation",
            "kv_cache": "fp8_emulation",
        }
    assert rows["qad"]["diagnostics"]["response"]["kl"] < rows["ptq"]["diagnostics"]["response"]["kl"]
    assert "FP8 layers: ptq, qad: w8a8_emulation. KV cache: ptq, qad: fp8_emulation." in (run / "table.md").read_text()
    assert harness(monkeypatch, "export", run, "--variant", "qad", "--out", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "quantization_record.json").read_text())
    assert (record["layout"], record["recipe"]["fp8"]) == ("compressed-tensors", ["*.down_proj"])
    assert record["objective"] == {"loss": "kl", "temperature": 1.0}
    assert record["training"]["seed"] == 0 and record["packages"]["torch"]
    assert set(record["inputs"]) == {"model", "calibration", "start", "data"} and all(record["inputs"].values())


THREE_POINTS = """
schema = 1
kernels = ["w4a4_emulation"]
{keys}

[[task]]
name = "mini_math"
margin = 3
tier = "critical"

[[task]]
name = "mini_choice"
margin = 3
tier = "critical"
"""


def judged(monkeypatch, run, folder, *arguments, keys=""):
    """Exit status of `harness gate` with a policy of 3 points, and what it wrote."""
    folder.mkdir()
    (folder / "policy.toml").write_text(THREE_POINTS.format(keys=keys))
    status = harness(monkeypatch, "gate", run, "--policy", folder / "policy.toml", "--out", folder / "out", *arguments)
    return status, json.loads((folder / "out" / "verdict.json").read_text())["candidates"][0]


def test_the_gate_reads_a_run_of_the_real_command_and_calls_eight_questions_no_evidence(finished, monkeypatch, tmp_path):
    run = finished[2]
    assert json.loads((run / "run.json").read_text())["rehearsal"] is False
    status, verdict = judged(
        monkeypatch, run, tmp_path / "ptq", "--candidate", "ptq", keys="min_questions = 5\nmin_clusters = 5"
    )
    assert (status, verdict["verdict"]) == (3, "INCONCLUSIVE")
    reasons = {check["name"]: check["reasons"] for check in verdict["checks"]}
    assert reasons["the run"] == ["the run is complete"] and reasons["the variants"] == ["ptq is compared with bf16"]
    assert reasons["mini_math"] == [
        "bf16's score is of the first 8 questions only (limit)",
        "ptq's score is of the first 8 questions only (limit)",
    ], "and nothing is wrong with its kernels, its flags or its pairing"
    status, verdict = judged(monkeypatch, run, tmp_path / "bf16", "--candidate", "bf16")
    assert status == 3 and verdict["reasons"][0].startswith("the variants: bf16 is compared with itself")


def test_the_gate_tells_ptq_that_lost_much_from_bf16_that_was_asked_twice(monkeypatch, tmp_path):
    """A run in the shape of the quickstart: BF16 has 40 % right, asked again 40 % too, of which 12 questions are others; PTQ has 15 %."""
    right = {"bf16": range(80), "bf16-again": range(12, 92), "ptq": range(30)}
    samples = {
        (name, task): [sample(doc, float(doc in mine), task=task) for doc in range(200)]
        for name, mine in right.items()
        for task in ("mini_math", "mini_choice")
    }
    variants = {"bf16-again": {"method": "bf16", "sampling_seed": 1}}
    run = write_run(tmp_path / "results" / "hand" / "r", samples, variant_changes=variants)
    status, verdict = judged(monkeypatch, run, tmp_path / "ptq", "--candidate", "ptq")
    assert (status, verdict["verdict"]) == (1, "NO-GO")
    assert len(verdict["reasons"]) == 2
    for reason, task in zip(verdict["reasons"], ("mini_math", "mini_choice"), strict=True):
        assert reason.startswith(f"{task}: 25.0 points worse (15.0 against 40.0); with 95 % confidence at least ")
        assert reason.endswith("points of damage, beyond the margin of 3 (200 questions)")
    status, verdict = judged(monkeypatch, run, tmp_path / "null", "--candidate", "bf16-again")
    assert (status, verdict["verdict"]) == (3, "INCONCLUSIVE")
    assert "no change (40.0 against 40.0)" in verdict["reasons"][0] and "leaves the margin of 3 open" in verdict["reasons"][0]
