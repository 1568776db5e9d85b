"""What is held against the model's configuration before a run has weights: once where it is needed, and without another's progress bars."""

import json
import os
import subprocess
import sys

import pytest

from harness.errors import SuiteError
from harness.plan import make_plan
from harness.recipe_mistakes import mistakes_at_hand, require_model
from harness.store import Store, cache_folder
from harness.suite import load_suite
from tests.test_rehearsal_checks import SMALL


def test_no_library_shows_a_progress_bar_of_its_own(tiny_suite, tmp_path):
    text = tiny_suite.read_text()
    text = text.replace(text[text.index("[training]") : text.index("[[variant]]")], "")
    begin, end = text.index('[[variant]]\nname = "qat"'), text.index("[[task]]")
    tiny_suite.write_text(text[:begin] + text[end:])
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    command = [sys.executable, "-m", "harness.cli", "prepare", str(tiny_suite), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


class Told:
    """A reporter that keeps its lines."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def of_a_model(tmp_path, config, *, trust=False):
    """A suite with one quantized variant, and a pattern that fits no model, of a folder with `config` alone."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    path = tmp_path / "wrong.toml"
    path.write_text(
        f'schema = 1\nname = "wrong"\nmodel = {{ path = "{folder}", trust_remote_code = {str(trust).lower()} }}\n'
        'quantization = { exclude = ["lm_head", "*.conv9d"], calibration = { data = "text" } }\n'
        'data = { text = { source = "builtin", seq_len = 64 } }\nengine = { kind = "hf" }\n'
        'diagnostics = { data = "text", samples = 4 }\n'
        'variant = [{ name = "bf16", method = "bf16" }, { name = "ptq", method = "ptq" }]\n'
    )
    return path


def require(path, reporter):
    store = Store(cache_folder())
    require_model(make_plan(load_suite(path), store), store, reporter)


def test_what_takes_long_is_said_and_not_done_again_after_the_last_quantization(tmp_path, monkeypatch):
    path, told = of_a_model(tmp_path, SMALL | {"num_experts_of_another_kind": 0}), Told()
    with pytest.raises(SuiteError, match="conv9d"):
        require(path, told)
    assert told.lines == ["  the recipes are held against the model's shapes, which with experts takes up to minutes"]
    monkeypatch.setattr("harness.recipe_mistakes.is_done", lambda stage, store: stage.kind == "quantize")
    require(path, told)
    assert len(told.lines) == 1


@pytest.mark.parametrize("trust", [False, True])
def test_a_model_of_remote_code_is_exempt_from_both_checks_and_one_of_a_native_class_from_neither(trust, tmp_path):
    remote = of_a_model(tmp_path, SMALL | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}, trust=trust)
    assert mistakes_at_hand(remote) == []
    require(remote, Told())


def test_a_type_whose_own_files_are_never_run_is_checked_whatever_is_trusted(tmp_path):
    block = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}}
    config = SMALL | {"model_type": "nemotron-nas", "block_configs": [block] * 4, "num_key_value_heads": None}
    path = of_a_model(tmp_path, config | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}, trust=True)
    assert any("conv9d" in line for line in mistakes_at_hand(path))
    with pytest.raises(SuiteError, match="conv9d"):
        require(path, Told())
