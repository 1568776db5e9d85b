"""A scaled suite is a suite by the ordinary rules, says what differs, and keeps what a rehearsal is for."""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import variants
from test_rehearse import CONFIG as REAL

from harness.data import split_of
from harness.errors import SuiteError
from harness.plan import make_plan
from harness.rehearsal import CONTEXT, MAX_TOKENS, N_QUESTIONS, scale
from harness.rehearsal_data import QUOTAS, write_data
from harness.rehearsal_pictures import write_set
from harness.rehearsal_rows import MADE
from harness.rehearsal_static import check_statically
from harness.schema_data import Hub, Jsonl
from harness.scorers import SCORERS
from harness.store import Store
from harness.suite import load_suite
from harness.task_files import config_of, metadata_of
from harness.tasks.needs import missing

SUITES = sorted(
    [*Path("suites").glob("*.toml"), *Path("suites/released").glob("*.toml"), *Path("suites/ablations").glob("*.toml")]
)


@pytest.fixture(params=SUITES, ids=lambda path: str(path.relative_to("suites")))
def path(request):
    return request.param


def test_every_suite_is_scaled_to_a_suite_with_the_same_variants_and_tasks(path, tmp_path):
    scaled = scale(path, tmp_path)
    original, suite = scaled.original, scaled.suite
    assert suite.is_rehearsal and not original.is_rehearsal
    assert [(v.group, v.method) for v in suite.variants] == [(v.group, v.method) for v in original.variants]
    left_out = {line.split(":")[0].removeprefix("task ") for line in scaled.left_out}
    assert [t.name for t in suite.tasks] == [t.name for t in original.tasks if t.name not in left_out]
    assert {name: type(section) for name, section in suite.data.items()} == {
        name: type(section) for name, section in original.data.items()
    }


def test_every_suite_keeps_its_recipes_and_objectives(path, tmp_path):
    scaled = scale(path, tmp_path)
    for before, after in zip(scaled.original.variants, scaled.suite.variants, strict=True):
        assert after.objective == before.objective
        if before.quantization is not None:
            assert after.quantization.model_dump(exclude={"calibration"}) == before.quantization.model_dump(
                exclude={"calibration"}
            )
            assert after.quantization.calibration.headroom == before.quantization.calibration.headroom
        if before.training is not None:
            kept = {
                "lr",
                "schedule",
                "optimizer",
                "betas",
                "loss_on",
                "train",
                "packing",
                "activation_checkpointing",
                "lr_groups",
            }
            assert after.training.model_dump(include=kept) == before.training.model_dump(include=kept)


def test_every_scaled_suite_is_small(path, tmp_path):
    suite = scale(path, tmp_path).suite
    assert all(task.limit <= N_QUESTIONS and task.repeats <= 2 for task in suite.tasks)
    assert all(task.sampling.get("max_tokens", MAX_TOKENS) <= MAX_TOKENS for task in suite.tasks)
    for variant in suite.variants:
        if variant.training is not None:
            assert variant.training.tokens <= 1200 and variant.training.batch_size <= 4 and variant.training.warmup_steps <= 1
    for engine in (suite.engine, *([suite.judge.engine] if suite.judge else [])):
        assert engine.args.get("max_model_len", CONTEXT) <= CONTEXT
        assert not {"tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization"} & engine.args.keys()


def test_tasks_that_choose_a_checkpoint_are_asked_in_short_too(path, tmp_path):
    scaled = scale(path, tmp_path / "work")
    seeing = {"vision_config": {"hidden_size": 16}} if scaled.suite.model.kind == "image-text" else {}
    for twin in scaled.twins:
        twin.folder.mkdir(parents=True)
        (twin.folder / "config.json").write_text(json.dumps(seeing))
        (twin.folder / "model.safetensors").write_text(twin.path + twin.role)
    stages = make_plan(scaled.suite, Store(tmp_path / "cache"), missing=[]).stages
    chosen_by = [role.task for stage in stages if stage.kind == "select" for role in stage.inputs.values() if role.task]
    wanted = [
        name
        for v in scaled.suite.variants
        if v.training and v.training.select == "best_of_k"
        for name in v.training.select_tasks
    ]
    assert len(chosen_by) == len(wanted)
    assert all(task.limit <= N_QUESTIONS and task.sampling.get("max_tokens", MAX_TOKENS) <= MAX_TOKENS for task in chosen_by)


def test_no_model_but_a_twin_is_named_in_a_scaled_suite(path, tmp_path):
    scaled = scale(path, tmp_path)
    folders = {str(twin.folder) for twin in scaled.twins}
    named = [scaled.suite.model, *([scaled.suite.judge] if scaled.suite.judge else [])]
    named += [variant.teacher for variant in scaled.suite.variants if variant.teacher]
    paths = [each.path for each in named] + [v.path for v in scaled.suite.variants if v.path]
    assert set(paths) == folders and not any(getattr(each, "revision", None) for each in named)


ONE = (
    """
schema = 1
name = "one"

[model]
path = "someone/model"
revision = "0123456789abcdef0123456789abcdef01234567"

[quantization]
exclude = ["lm_head", "{pattern}"]
calibration = {{ data = "text" }}

[data.text]
source = "builtin"

"""
    + variants("bf16", "ptq")
    + """
[[task]]
name = "{task}"

[sampling]
temperature = 0.6
max_tokens = 1024

[engine]
kind = "vllm"
kernels = "native"

[diagnostics]
data = "text"

[gate]
candidate = "ptq"
kernels = ["native"]

[[gate.task]]
name = "livecodebench_v6"
margin = 5.0
tier = "critical"
"""
)
CONFIG = REAL | {"vocab_size": 512}
"""With the vocabulary of the tiny model, whose tokenizer it is read beside."""


def one(tmp_path, pattern="*.down_proj", task="gpqa_diamond"):
    path = tmp_path / "one.toml"
    path.write_text(ONE.format(pattern=pattern, task=task))
    return path


def test_a_layer_named_by_number_is_looked_for_in_the_real_model_and_not_in_the_twin(tmp_path, tiny_model):
    scaled = scale(one(tmp_path, "model.layers.20.mlp.down_proj"), tmp_path)
    assert all(v.quantization is None or v.quantization.exclude == ("lm_head",) for v in scaled.suite.variants)
    assert any("model.layers.20.mlp.down_proj by number" in line for line in scaled.changes)
    assert not check_statically(scaled.original, CONFIG, tiny_model)[1]
    beyond = scale(one(tmp_path, "model.layers.24.mlp.down_proj"), tmp_path).original
    _, (problem,) = check_statically(beyond, CONFIG, tiny_model)
    assert "ptq" in problem and "model.layers.24.mlp.down_proj" in problem


def test_a_gate_on_a_task_that_the_suite_does_not_run_is_said(tmp_path, tiny_model):
    lines, problems = check_statically(load_suite(one(tmp_path)), CONFIG, tiny_model)
    assert any("gate: livecodebench_v6 is no task of the suite" in line for line in lines) and not problems


def test_tasks_that_cannot_be_rehearsed_here_are_named_with_the_reason(tmp_path, monkeypatch):
    scaled = scale(one(tmp_path, task="arc_easy"), tmp_path)
    assert scaled.left_out == ("task arc_easy: a task of lm-eval's, whose rows come from the hub",)
    assert not scaled.suite.tasks and scaled.suite.diagnostics is not None
    monkeypatch.setattr("harness.rehearsal.missing", lambda task: "no sentence model" if task == "ifeval" else None)
    assert scale(one(tmp_path, task="ifeval"), tmp_path).left_out == ("task ifeval: no sentence model",)


def test_a_suite_of_which_nothing_can_be_rehearsed_is_an_error(tmp_path):
    path = one(tmp_path, task="arc_easy")
    path.write_text(path.read_text().replace('[diagnostics]\ndata = "text"\n', ""))
    with pytest.raises(SuiteError, match="nothing of it can be rehearsed on this machine: task arc_easy"):
        scale(path, tmp_path)


@pytest.mark.parametrize("device", ["cpu-x86_64", "cuda NVIDIA B200"])
def test_native_kernels_are_emulated_on_a_cpu_alone_and_the_gate_follows(device, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.rehearsal.vllm_device_kind", lambda: device)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    suite = scale(one(tmp_path), tmp_path).suite
    wanted = "w4a4_emulation" if device.startswith("cpu") else "native"
    admitted = ("w4a4_emulation", "w4a16") if device.startswith("cpu") else ("native",)
    assert (suite.engine.kind, suite.engine.kernels, suite.gate.kernels) == ("vllm", wanted, admitted)


def test_a_model_with_experts_is_answered_by_hf_on_a_cpu_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.rehearsal.vllm_device_kind", lambda: "cpu-x86_64")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    scaled = scale(one(tmp_path), tmp_path, with_experts=["someone/model"])
    assert scaled.suite.engine.kind == "hf" and scaled.suite.gate.kernels == ("w4a4_emulation", "w4a16")
    assert any(
        'engine: "hf" in place of "vllm": on a CPU vLLM has no NVFP4 kernel for experts' in line for line in scaled.changes
    )


HUB = Hub(source="hub", path="a/b", messages="turns", images="shown", where={"kind": ("good",)}, seq_len=256)


def written(section, mirror, store):
    found = write_data({"d": section}, mirror, store, taken=set())
    (file,) = (mirror / found.paths["d"]).rglob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()], found.said, file.parent


def test_a_split_that_the_mirror_lacks_is_a_problem_and_rows_are_made_in_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "mirror" / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("{}\n")
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    section = Hub(source="hub", path="a/b", prompt="q", response="a", seq_len=256)
    found = write_data({"d": section}, tmp_path / "made", Store(tmp_path / "cache"), taken={"a/b"})
    assert ["the mirror has no files of the split 'train'" in problem for problem in found.problems] == [True]
    assert "made rows" in found.said[0] and found.paths == {"d": "a/b-rows"}


def test_made_rows_have_the_columns_that_a_section_names_and_fill_every_split(tmp_path):
    section = Hub(source="hub", path="a/b", prompt="q", response="a", where={"kind": ("good", "better")}, seq_len=256)
    rows, said, _ = written(section, tmp_path, Store(tmp_path / "cache"))
    assert all(set(row) == {"q", "a", "kind"} and row["kind"] in ("good", "better") for row in rows)
    splits = Counter(split_of(row["q"].strip()) for row in rows)
    assert splits == Counter(QUOTAS) and "made rows, so its columns are not checked" in said[0]


@pytest.mark.parametrize("named", ["rows[1].jsonl", "row*.jsonl", ".", "nothing.jsonl"])
def test_rows_of_a_file_of_the_users_are_found_by_any_absolute_path(named, tmp_path):
    lines = (json.dumps({"q": f"What is {i}?", "a": str(i)}) + "\n" for i in range(300))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rows[1].jsonl").write_text("".join(lines))
    section = Jsonl(source="jsonl", path=str(tmp_path / "own" / named), prompt="q", response="a", seq_len=256)
    found = write_data({"d": section}, tmp_path / "made", Store(tmp_path / "cache"), taken=set())
    assert ("made rows" if "nothing" in named else section.path) in found.said[0] and not found.problems


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_made_answers_are_references_that_scorers_read(scorer, tmp_path):
    section = Hub(source="hub", path="a/b", prompt="q", response="a", seq_len=256)
    rows, _, _ = written(section, tmp_path, Store(tmp_path / "cache"))
    assert all(SCORERS[scorer](row["a"], "no idea") is False and SCORERS[scorer](row["a"], row["a"]) for row in rows)


def test_made_rows_with_pictures_name_files_beside_them(tmp_path):
    rows, _, folder = written(HUB, tmp_path, Store(tmp_path / "cache"))
    assert len(rows) == sum(QUOTAS.values())
    assert all((folder / name).is_file() for row in rows for name in row["shown"])


def test_rows_of_the_mirror_are_shortened_and_keep_what_they_lack(tmp_path, monkeypatch):
    folder = tmp_path / "mirror" / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "revision.txt").write_text("c" * 40)
    real = [
        {"q": f"Question {i}? " * 200, "kind": "good" if i % 2 else "bad", "other": "x" * 5000, "reply": "y"}
        for i in range(2000)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in real))
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    section = Hub(source="hub", path="a/b", prompt="q", response="a", where={"kind": ("good",)}, seq_len=256)
    rows, said, made = written(section, tmp_path / "made", Store(tmp_path / "cache"))
    assert "the mirror's a/b" in said[0] and (made / "revision.txt").read_text() == "c" * 40
    assert all(len(row["q"]) <= 141 and "a" not in row and "other" not in row for row in rows)
    assert sum(row["kind"] == "good" for row in rows) >= len(rows) - 1
    assert (folder / "train.jsonl").read_text().count("\n") == 2000, "the user's mirror is never written to"


@pytest.mark.parametrize("task", ["ai2d", "chartqa", "mmmu", "ocrbench"])
def test_made_rows_with_pictures_are_a_whole_set_for_its_task(task, tmp_path, monkeypatch):
    write_set(tmp_path, task)
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path))
    module, function = config_of(task)["custom_dataset"].split(".")
    made = getattr(importlib.import_module(f"harness.tasks.{module}"), function)(n_rows=metadata_of(task)["n_rows"])
    assert len(made["test"]) == metadata_of(task)["n_rows"] and not any(made["test"]["excluded"])
    assert len(set(made["test"]["source_question"])) == len(made["test"])


def test_a_training_chosen_by_tasks_that_cannot_be_asked_here_is_chosen_by_its_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.rehearsal.missing", lambda task: "not here" if task == "aime24" else None)
    path = tmp_path / "suite.toml"
    text = Path("suites/ablations/acereason_losses.toml").read_text()
    path.write_text(text.replace('select_tasks = ["aime24", "aime25"]', 'select_tasks = ["aime24"]'))
    scaled = scale(path, tmp_path)
    assert {v.training.select for v in scaled.suite.variants if v.training} == {"best_val"}
    assert any("no task of select_tasks can be asked here" in line for line in scaled.changes)


@pytest.mark.parametrize("task", sorted(MADE))
def test_made_rows_of_a_benchmark_are_taken_by_its_task(task, tmp_path, monkeypatch):
    if missing(task) is not None:
        pytest.skip(missing(task))
    MADE[task](tmp_path)
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path))
    module, function = config_of(task)["custom_dataset"].split(".")
    made = getattr(importlib.import_module(f"harness.tasks.{module}"), function)(n_rows=metadata_of(task).get("n_rows"))
    assert len(made["test"]) == metadata_of(task).get("n_rows", 4)
