"""The suites of the paper's systems: their published figures, budgets, gates, and what can be known of them without a download."""

import re
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.known_models import known_model
from harness.models import is_hub_id
from harness.paper_figures import load_paper_figures
from harness.plan import make_plan
from harness.plan_power import Asked, gate_outlook
from harness.store import Store
from harness.suite import load_suite

REPOSITORY = Path(__file__).parent.parent
MAIN = {
    "acereason": (("T3b",), 800_000_000, 1e-5),
    "llama-nemotron-super": (("T1", "T2"), 300_000_000, 1e-6),
    "nemotron-3-nano": (("T3a",), 2_500_000_000, 1e-5),
    "nemotron-nano-v2": (("T2",), 6_000_000_000, 1e-6),
    "nemotron-nano-v2-vl": (("T10",), 500_000_000, 2e-6),
}
"""By suite: the tables of its figures, the tokens and the rate that the paper states."""
MODELS = {
    "nvidia/AceReason-Nemotron-1.1-7B": "acereason-nemotron-1.1-7b",
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": "llama-nemotron-super-v1-49b",
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1_5": None,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "nemotron-3-nano-30b-a3b",
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": "nemotron-nano-9b-v2",
    "nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16": "nemotron-nano-12b-v2-vl",
    "nvidia/Llama-3_1-Nemotron-Ultra-253B-v1": "llama-nemotron-ultra-v1-253b",
    "deepseek-ai/DeepSeek-R1": "deepseek-r1-671b",
}
"""The paper's name of each model; V1.5 is none of its models."""
SIZES = {
    "aime24": (30, 30), "aime25": (30, 30), "math500": (500, 500), "gpqa_diamond": (198, 198), "ifeval": (541, 541), "aa_lcr": (98, 30),
    "ai2d": (3088, 3088), "chartqa": (2500, 2500), "docvqa": (5349, 5349), "infovqa": (2801, 2801), "ocrbench": (1000, 1000), "textvqa": (5000, 5000),
}  # fmt: skip
"""Questions and clusters; those about pictures as if no two shared one, which is more than is known."""


def suites(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((REPOSITORY / "suites" / folder).glob("*.toml"))]
    return [path for path in found if "nvidia/" in path.read_text() or "deepseek-ai/" in path.read_text()]


ALL = suites(".", "released", "ablations")
FIGURES = load_paper_figures(REPOSITORY / "docs" / "paper-figures.toml")


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY / "suites").with_suffix(""))


def published(suite) -> dict[tuple, tuple[float, str]]:
    """The `[reference]` of a suite, by table, model, variant, task and metric: value and how sure it is."""
    figures = suite.reference.figure if suite.reference else ()
    model = MODELS[suite.model.path]
    found = {(each.table, model, each.variant, each.task, each.metric): (each.value, each.verified) for each in figures}
    assert len(found) == len(figures)
    return found


def test_every_system_has_its_suite_and_nothing_else_of_the_paper_is_forgotten():
    assert {named(path) for path in suites(".")} == set(MAIN)
    assert {named(path) for path in suites("released")} == {
        f"released/{name}" for name in ("llama-nemotron-super", "nemotron-3-nano", "nemotron-nano-v2", "nemotron-nano-v2-vl")
    }
    given = {key for path in ALL for key in published(load_suite(path))}
    assert set(FIGURES) == given


@pytest.mark.parametrize("path", ALL, ids=named)
def test_every_published_figure_of_a_suite_is_that_of_the_file(path):
    given = published(load_suite(path))
    assert given == {key: (FIGURES[key].value_in_suite, FIGURES[key].verified) for key in given}
    assert given or path.name == "llama-nemotron-super.toml"


def test_a_metric_that_a_published_figure_names_is_one_of_its_task_or_of_the_diagnostics_that_the_suite_has():
    named = 0
    for suite in map(load_suite, ALL):
        for figure in suite.reference.figure if suite.reference else ():
            if figure.task == "diagnostics":
                assert suite.diagnostics is not None
            elif figure.metric is not None:
                assert f"metric: {figure.metric}\n" in (REPOSITORY / "harness/tasks" / f"{figure.task}.yaml").read_text()
                named += 1
    assert named == 4 + 4 + 2  # IFEval of Super, of Nano 9B V2, of its release


@pytest.mark.parametrize("name", MAIN)
def test_a_system_has_the_budget_and_the_rate_of_the_paper_and_all_figures_of_its_table(name):
    suite = load_suite(REPOSITORY / "suites" / f"{name}.toml")
    tables, tokens, lr = MAIN[name]
    model = MODELS[suite.model.path]
    assert set(published(suite)) == {key for key in FIGURES if key[0] in tables and key[1] == model}
    trained = [variant for variant in suite.variants if variant.is_trained]
    assert {variant.method for variant in trained} == {"qat", "qad"}
    assert {(variant.training.tokens, variant.training.lr, variant.training.schedule) for variant in trained} == {
        (tokens, lr, "cosine")
    }
    assert [variant.method for variant in suite.variants] == ["bf16", "ptq", "qad", "qat"]


def test_an_ablation_names_each_of_its_variants_as_the_paper_sets_it():
    for name in ("acereason_learning_rates", "nano_v2_learning_rates", "nano_v2_vl_learning_rates"):
        trained = [v for v in load_suite(REPOSITORY / "suites/ablations" / f"{name}.toml").variants if v.is_trained]
        assert len(trained) >= 3 and all(float(v.name.removeprefix("qad-lr-")) == v.training.lr for v in trained)
    losses = load_suite(REPOSITORY / "suites/ablations/nano_v2_losses.toml").variants
    assert {v.name: v.objective["loss"] for v in losses if v.is_trained} == {"qad-kl": "kl", "qad-mse": "mse"}
    teachers = load_suite(REPOSITORY / "suites/ablations/nano_v2_teacher.toml").variants
    assert [v.teacher.path for v in teachers if v.teacher] == ["nvidia/NVIDIA-Nemotron-Nano-12B-v2"]
    assert {v.name for v in teachers if v.is_trained and v.teacher is None} == {"qad-teacher-9b"}


@pytest.mark.parametrize("path", suites("released"), ids=named)
def test_a_released_suite_trains_and_quantizes_nothing(path):
    suite = load_suite(path)
    assert [variant.method for variant in suite.variants] == ["bf16", "checkpoint"]
    assert suite.engine.kernels == "native"


@pytest.mark.parametrize("path", ALL, ids=named)
def test_answers_and_prompts_have_room_in_what_is_served(path):
    suite = load_suite(path)
    for task in suite.tasks:
        prompt = {"aa_lcr": 132_700}.get(task.name, 8_192 if suite.model.kind == "image-text" else 2_048)
        assert task.sampling["max_tokens"] + prompt <= suite.engine.args["max_model_len"], task.name


@pytest.mark.parametrize("path", ALL, ids=named)
def test_what_is_served_is_split_over_one_node_at_most_and_its_heads_evenly(path):
    suite = load_suite(path)
    served = [(suite.model.path, suite.engine.args)]
    served += [(suite.judge.path, suite.judge.engine.args)] if suite.judge else []
    served += [(suite.model.path, data.engine_args) for data in suite.data.values() if hasattr(data, "engine_args")]
    for model, args in served:
        known = known_model(model)
        assert known is not None
        n = args.get("tensor_parallel_size", 1)
        assert n in (1, 2, 4, 8) and known.config["num_attention_heads"] % n == 0


@pytest.mark.parametrize("path", ALL, ids=named)
def test_a_plan_downloads_nothing_and_names_what_is_not_pinned(path, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    suite, text = load_suite(path), path.read_text()
    said = ""
    try:
        make_plan(suite, Store(tmp_path))
    except HarnessError as error:
        said = str(error)
    is_pinned = 'revision = "…"' not in text and "revision: not found" not in text
    needs_rows = "path: data/" in said and "there is no such file" in said  # of the user's own
    assert needs_rows or (said == "" if is_pinned else "as a hub id it needs the revision" in said), said
    models = [suite.model.path, *(variant.path for variant in suite.variants if variant.path)]
    assert all(map(is_hub_id, models))


@pytest.mark.parametrize("name", MAIN)
def test_a_gate_has_the_power_that_its_comments_state(name):
    path = REPOSITORY / "suites" / f"{name}.toml"
    suite, text = load_suite(path), path.read_text()
    asked = {
        task.name: Asked(*SIZES[task.name], task.repeats, is_greedy=not task.sampling["temperature"])
        for task in suite.tasks
        if task.name in {each.name for each in suite.gate.task}
    }
    assert suite.gate.candidate == "qad" and suite.gate.kernels == ("native",)
    assert asked.keys() == {each.name for each in suite.gate.task}
    found = gate_outlook(suite.gate, asked)
    assert min(found.go or (0.0,)) >= 0.8
    for check in found.checks:
        section = r"\[gate\.pooled\]" if check.name == "pooled" else rf'\[\[gate\.task\]\]\nname = "{check.name}"'
        (stated,) = re.findall(rf"{section}\nmargin = [\d.]+ +# ([\d. /]+)", text)
        values = [float(each) for each in stated.split("/")]
        assert values == pytest.approx([100 * each for each in check.smallest], abs=0.1), check.name
        assert check.smallest[-1] <= check.margin
    once = {task: Asked(*SIZES[task], 1, is_greedy=False) for task in asked}
    assert min(gate_outlook(suite.gate, once).go or (1.0,)) < 0.8 or name == "nemotron-nano-v2-vl"  # the check can fail
