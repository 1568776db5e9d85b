"""The benchmarks run, compare bits first, and refuse what they cannot measure."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gate_evidence import answers, right, run_of

BENCH = Path(__file__).parent.parent / "bench"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cpu(monkeypatch):
    module = load("kernels_cpu")
    monkeypatch.setattr(module, "SHAPES", ((32, 48), (64, 16)))
    monkeypatch.setattr(sys, "argv", ["kernels_cpu.py", "--runs", "3"])
    return module


def test_the_cpu_benchmark_prints_each_call_beside_plain_torch(cpu, capsys):
    cpu.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " × " in line]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        (name, shape)
        for shape in ("32 × 48", "64 × 16")
        for name in ("fake_quantize, BF16", "project, FP32 to BF16", "quantize, FP32", "dequantize, BF16")
    ]
    assert all(float(row[4]) > 0 for row in rows)


def test_the_cpu_benchmark_times_nothing_when_bits_differ(cpu, monkeypatch, capsys):
    monkeypatch.setattr(cpu.kernels, "fake_quantize", lambda x, scale: x + 1)
    with pytest.raises(SystemExit, match=r"fake_quantize, BF16 of \(32, 48\): the bits differ; nothing was timed"):
        cpu.main()
    assert " × " not in capsys.readouterr().out


def test_the_cpu_benchmark_refuses_without_numba(cpu, monkeypatch):
    monkeypatch.setattr(cpu.kernels, "backend", lambda device: "torch")
    with pytest.raises(SystemExit, match="numba is not installed"):
        cpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure")
def test_the_gpu_benchmark_refuses_without_a_gpu():
    done = subprocess.run([sys.executable, str(BENCH / "kernels_gpu.py")], capture_output=True, text=True)
    assert done.returncode == 1 and "torch sees no CUDA device; run it on a machine with a GPU" in done.stderr
    assert not done.stdout


def test_the_export_benchmark_measures_an_increase_and_the_bytes_of_the_format(capsys):
    module = load("export_memory")
    module.measure("modelopt", 1)
    cells = [cell.strip() for cell in capsys.readouterr().out.strip().strip("|").split("|")]
    assert cells[0] == "modelopt" and float(cells[4]) == pytest.approx(0.5625, abs=1e-4)
    assert 0 < float(cells[3]) < 4


@pytest.fixture
def loss_cpu(monkeypatch):
    sizes = ["--tokens", "40", "--vocabulary", "64", "--hidden", "16", "--runs", "3"]
    monkeypatch.setattr(sys, "argv", ["loss_cpu.py", *sizes])
    return load("loss_cpu")


def test_the_loss_benchmark_prints_time_and_memory_beside_plain_torch(loss_cpu, monkeypatch, capsys):
    monkeypatch.setattr(loss_cpu, "in_its_own_process", loss_cpu.extra_bytes)
    loss_cpu.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| kl", "| ce"))]
    assert [row[0] for row in rows] == ["kl", "ce"]
    assert all(float(cell.split()[0]) >= 0 for row in rows for cell in row[1:4]) and all(len(row) == 7 for row in rows)


def test_the_loss_benchmark_counts_the_bytes_of_one_call(loss_cpu, monkeypatch):
    monkeypatch.setitem(loss_cpu.CALLS, "chunked", lambda loss, x: torch.ones(2**24))
    assert loss_cpu.extra_bytes("chunked", "kl", (8, 64, 16)) == pytest.approx(2**26, rel=0.1)


def test_the_loss_benchmark_times_nothing_when_results_differ(loss_cpu, monkeypatch, capsys):
    plain = loss_cpu.plain
    monkeypatch.setattr(loss_cpu, "chunked", lambda loss, x: tuple(1.1 * value for value in plain(loss, x)))
    with pytest.raises(SystemExit, match=r"kl: .* instead of .*, gradient 10.*% off; nothing was timed"):
        loss_cpu.main()
    assert "| kl" not in capsys.readouterr().out


def test_the_floor_of_a_step_is_the_step_with_nothing_quantized(tiny_model):
    from qad.checkpoint import load_checkpoint
    from qad.masters import Masters
    from qad.quantize import quantize_model
    from qad.recipe import Recipe

    step_cpu, model = load("step_cpu"), load_checkpoint(tiny_model).model
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    modules = quantize_model(model, Recipe(activations=False), None)
    changed = [name for name in modules if not torch.equal(modules[name].weight, original[f"{name}.weight"])]
    assert changed == list(modules)
    masters = Masters(model)
    with step_cpu.nothing_quantized():
        masters.project()
    assert all(torch.equal(modules[name].weight, original[f"{name}.weight"]) for name in modules)
    masters.project()
    assert not any(torch.equal(modules[name].weight, original[f"{name}.weight"]) for name in modules)


@pytest.mark.slow
def test_training_that_is_killed_at_a_random_moment_ends_with_identical_weights(tmp_path, text_stages, capsys):
    shutil.copytree(text_stages(512), tmp_path / "alone" / "cache" / "stages")
    assert load("kill_campaign").campaign(tmp_path, kills=1, seed=1, n_steps=8) == 1
    assert capsys.readouterr().out.count("identical weights") == 1


def test_oracles_of_a_benchmark_score_what_they_should(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_MIRROR", "")  # set for good by the script, and taken back here
    rows = list(load("oracle").campaign(tmp_path, ("gpqa_diamond",)))
    scores = {label: (scored, score, incomplete) for _, label, scored, score, incomplete, _ in rows}
    assert scores == {
        "oracle": ("198/198", "100.00%", "0.00%"),
        "oracle that thinks": ("198/198", "100.00%", "0.00%"),
        "wrong": ("198/198", "0.00%", "0.00%"),
        "never ends its thought": ("198/198", "0.00%", "100.00%"),
    }


def test_the_driver_is_timed_beside_bare_lm_eval_on_equal_scores(tmp_path, capsys, monkeypatch):
    module = load("driver_overhead")
    module.measure(tmp_path, 20, 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["lm-eval", "ours", "more"]
    monkeypatch.setattr(module, "bare", lambda tasks, engine: 0.5)
    with pytest.raises(SystemExit, match="the scores differ: .*; nothing is worth timing"):
        module.measure(tmp_path / "other", 20, 3)


@pytest.fixture
def engines_agree(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))  # where a script finds the module beside it
    spec = importlib.util.spec_from_file_location("engines_agree", BENCH / "engines_agree.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "engines_agree", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_engines_agree_as_often_as_the_yardstick_within_three_paired_errors(engines_agree, capsys):
    def answers(different):
        extracted = {str(i): "x" if i in different else str(i) for i in range(100)}
        return engines_agree.Answers(extracted, correct=0.1, truncated=0.0, mean_tokens=20.0)

    alike = {"hf 16": answers({1, 2, 3}), "hf 10": answers(set()), "vllm": answers({3, 4, 5, 6})}
    assert engines_agree.report(alike)
    agreement = engines_agree.compare(alike, ("hf 16", "vllm"), ("hf 16", "hf 10"))
    # on question 3 the pair agrees and the yardstick does not; on 4, 5 and 6 it is the other way round
    variance = (4 - 100 * 0.02**2) / 99
    assert agreement.share == 0.95 and agreement.difference == pytest.approx(-0.02)
    assert agreement.stderr == pytest.approx((variance / 100) ** 0.5)
    assert "hf 16 and vllm    agree on 0.950, -0.020 ± 0.020 against hf 16 and hf 10\n" in capsys.readouterr().out
    assert not engines_agree.report(alike | {"server": answers(range(30))})
    assert "hf 16 and server  agree on 0.730, -0.240 ± 0.049 against hf 16 and hf 10: MORE" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="different questions"):
        engines_agree.report(alike | {"server": engines_agree.Answers({"7": "7"}, 0, 0, 0)})


def test_a_comparison_runs_its_suite_by_the_command_and_reads_the_newest_run(monkeypatch, tmp_path):
    module = load("engine_runs")

    def run(command, *, check, env):
        assert check and command[1:4] == ["-m", "harness", "run"] and env["PYTHONPATH"].startswith(str(BENCH.parent))
        assert Path(command[4]).read_text() == "what to run"
        for moment in ("20260102", "20260101"):
            (Path(command[6]) / "one" / moment).mkdir(parents=True)
            (Path(command[6]) / "one" / moment / "run.json").touch()

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.run_suite("what to run", "one", tmp_path / "results") == tmp_path / "results" / "agree" / "one" / "20260102"


def test_vllm_agrees_with_hf_about_pictures_within_three_standard_errors_of_the_paired_difference(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    module = load("vision_engines_agree")
    scored = {"hf": right(200, 160), "vllm": right(200, 154), "worse": right(200, 140), "fewer": right(199, 160)}
    runs = {name: run_of([answers("ptq", "mini_ocr", scores)]) for name, scores in scored.items()}
    (close,) = module.agreements(runs["hf"], runs["vllm"])
    assert (close.first, close.second, close.n) == (0.8, 0.77, 200)
    assert (close.difference, close.stderr) == (pytest.approx(-0.03), pytest.approx(0.0121, abs=1e-4))
    assert module.report([close])
    (far,) = module.agreements(runs["hf"], runs["worse"])
    assert not module.report([close, far]) and not module.report([])
    assert capsys.readouterr().out.count("MORE THAN THREE STANDARD ERRORS") == 1
    with pytest.raises(SystemExit, match="ptq mini_ocr: the engines did not answer the same questions"):
        module.agreements(runs["hf"], runs["fewer"])


@pytest.fixture
def plan_memory(monkeypatch, tmp_path):
    module = load("plan_memory")
    module.Loading.config = module.config_of(64, 1, 64)
    monkeypatch.setattr(module, "CONFIGURATIONS", {"small": module.Loading})
    monkeypatch.setattr(sys, "argv", ["plan_memory.py"])
    return module


def test_the_memory_benchmark_prints_plans_beside_what_was_measured_and_says_which_are_off(plan_memory, monkeypatch, capsys):
    planned = plan_memory.Loading().planned().total
    monkeypatch.setattr(plan_memory, "in_its_own_process", lambda name, scratch, as_it_is: int(planned / 1.1))
    plan_memory.main()
    assert "| small | loading | 0.00 | 0.00 | 1.10 |" in capsys.readouterr().out
    monkeypatch.setattr(plan_memory, "in_its_own_process", lambda name, scratch, as_it_is: int(planned / 1.2))
    with pytest.raises(SystemExit, match="a plan is more than 15% from what was measured"):
        plan_memory.main()
    assert "| 1.20 OFF |" in capsys.readouterr().out


def test_the_memory_benchmark_measures_the_increase_of_a_call(plan_memory, monkeypatch, tmp_path):
    monkeypatch.setattr(plan_memory.Loading, "run", lambda self, scratch: torch.ones(2**26))
    monkeypatch.setattr(plan_memory.Trained, "run", lambda self, scratch: None)
    assert plan_memory.measure("small", tmp_path) == pytest.approx(2**28, rel=0.1)


def twin_records(*differences):
    figures = {"kl": {"ours": {"kl": 0.05}, "vllm": {"kl": 0.05}}, "stderr": 0.00016, "n_sequences": 32, "n_tokens": 3500}
    modules = {"a": {"holds": True}}
    return [{"modules": modules, "kl": figures | {"difference": d}, "verdict": "PASS"} for d in differences]


def test_differences_that_each_pass_are_a_lean_when_all_seeds_share_their_sign():
    bench = load("twins_serve")
    shared, mixed = twin_records(-0.0004, -0.0003, -0.00045, -0.00035), twin_records(-0.00045, 0.0004, -0.0003, 0.0002)
    assert bench.leans(shared) and not bench.leans(mixed)
    mean, stderr, spread = bench.mean_over_seeds(shared)
    assert (mean, stderr) == (pytest.approx(-0.000375), pytest.approx(0.00008)) and spread == pytest.approx(2.37, abs=0.01)
    scattered = twin_records(-0.0009, 0.0001, -0.0005, 0.00005)  # 3.9 errors over sequences; the weights explain it
    assert not bench.leans(scattered) and bench.mean_over_seeds(scattered)[1] == pytest.approx(0.000238, abs=1e-6)
    assert "4 seeds: mean difference -0.00038 ± 0.00008, leans" in bench.summary("twin", shared)[-1]
    assert "does not lean" in bench.summary("twin", mixed)[-1]
    assert len(bench.summary("twin", mixed[:1])) == 1  # of one seed there is nothing to average


@pytest.mark.parametrize(("differences", "status"), [((-0.0004,) * 4, 1), ((-0.0004, 0.0004) * 2, 0)])
def test_the_bench_of_twins_fails_by_a_lean_alone(monkeypatch, capsys, differences, status):
    bench = load("twins_serve")
    records = twin_records(*differences)
    monkeypatch.setattr(bench, "compare", lambda name, layout, results, count, seed: records[seed])
    monkeypatch.setattr(sys, "argv", ["twins_serve.py", "--models", "llama", "--seeds", "4"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == status and capsys.readouterr().out.count("seed 3: 1 of 1 modules hold") == 1


def test_the_bench_of_twins_refuses_to_compare_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["twins_serve.py", "--seeds", "0"])
    with pytest.raises(SystemExit):
        load("twins_serve").main()
    assert "--seeds: found 0; ask for 1 or more" in capsys.readouterr().err
