"""Fixtures: a tiny Llama with a tokenizer and chat template of its own, no network, a cache of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Torch reads it when it is imported, and so does every process that a test starts. Two workers whose threads wait for each other
on two cores spend three times the processor time; what differs between one thread and several has tests of its own."""
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

MIRROR = os.environ.get("HARNESS_MIRROR")
"""The mirror of the surroundings, for tests on real sets; every test runs without the variable."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

LONGEST_FIRST = (
    "test_bench.py",
    "test_quickstart_model.py",
    "test_end_to_end.py",
    "test_scale_suites.py",
    "test_training_suite.py",
    "test_vllm_server.py",
    "test_ranks.py",
    "test_resume.py",
    "test_evaluation_kills.py",
    "test_nightly.py",
    "test_rehearse.py",
    "test_evaluation.py",
    "test_training.py",
    "test_twins_served.py",
    "test_vllm.py",
    "test_vllm_images.py",
    "test_vllm_suite.py",
    "test_vlm_models.py",
    "test_vlm_training.py",
)
"""Files of long tests: begun last, they would keep one of two processes busy alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else len(LONGEST_FIRST))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a test tried to reach the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HARNESS_MIRROR", raising=False)
    return tmp_path / "cache"


def build_tiny_model(folder: Path, *, seed: int = 0, hidden: int = 64) -> Path:
    """Write a random two-layer Llama with a byte-level tokenizer trained on Python's manual."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from harness.builtin import natural_texts

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(natural_texts()[:20], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|start|>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained vision-language model."""
    from tests.tiny_vlm import build_tiny_vlm

    return build_tiny_vlm(tmp_path_factory.mktemp("tiny_vlm") / "model")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def variants(*methods: str) -> str:
    """A variant of each method, named after it."""
    return "\n".join(f'[[variant]]\nname = "{method}"\nmethod = "{method}"\n' for method in methods)


SUITE = (
    """
schema = 1
name = "tiny"

[model]
path = "{model}"

[quantization]
calibration = {{ data = "text", samples = 8 }}

[data.text]
source = "builtin"
seq_len = 512

[training]
tokens = 6000
batch_size = 4
lr = 1e-3
loss_on = "assistant"

"""
    + variants("bf16", "ptq", "qat", "qad")
    + """
[[task]]
name = "mini_math"
limit = 8

[[task]]
name = "mini_choice"
limit = 8

[engine]
kind = "hf"
args = {{ batch_size = 8 }}

[diagnostics]
data = "text"
samples = 12
"""
)


@pytest.fixture
def tiny_suite(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SUITE.format(model=tiny_model))
    return path


ONLY_TEXT = """
schema = 1
name = "text"

[model]
path = "{model}"

[data.text]
source = "builtin"
seq_len = {seq_len}

[[variant]]
name = "bf16"
method = "bf16"

[engine]
kind = "hf"

[diagnostics]
data = "text"
samples = 2
"""


@pytest.fixture(scope="session")
def text_stages(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The stored stages of the builtin text in the tiny model's tokens, made by the real command once for each seq_len."""
    made: dict[int, Path] = {}

    def make(seq_len: int) -> Path:
        if seq_len in made:
            return made[seq_len]
        from typer.testing import CliRunner

        from harness.cli import app

        root = tmp_path_factory.mktemp(f"text-{seq_len}")
        (root / "text.toml").write_text(ONLY_TEXT.format(model=tiny_model, seq_len=seq_len))
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("HARNESS_CACHE", str(root / "cache"))
            done = CliRunner().invoke(app, ["run", str(root / "text.toml"), "--results", str(root / "results")])
        assert done.exit_code == 0, done.output
        for record in (root / "cache" / "stages").glob("*/stage.json"):
            if json.loads(record.read_text())["kind"] != "data":
                shutil.rmtree(record.parent)
        made[seq_len] = root / "cache" / "stages"
        return made[seq_len]

    return make


@pytest.fixture
def text_at_hand(own_cache: Path, text_stages: Callable[[int], Path]) -> Callable[..., None]:
    """Puts the builtin text of a seq_len into the cache of the test: half the time of a short run is its tokenization."""

    def copy(seq_len: int = 512) -> None:
        shutil.copytree(text_stages(seq_len), own_cache / "stages", dirs_exist_ok=True)

    return copy
