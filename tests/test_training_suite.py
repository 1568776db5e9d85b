"""Training settings of a suite, by the real command: selection, packing, learned scales, another teacher, bad surroundings."""

import json
import re
from pathlib import Path

import pytest
from conftest import build_tiny_model
from typer.testing import CliRunner

from harness.cli import app
from harness.models import folder_fingerprint
from harness.store import Store

SHORT = """
schema = 1
name = "short"

[model]
path = "{model}"

[quantization]
calibration = {{ data = "text", samples = 4 }}

[data.text]
source = "builtin"
seq_len = 256

[training]
tokens = 2_400
batch_size = 2
lr = 1e-3
loss_on = "assistant"

[[variant]]
name = "bf16"
method = "bf16"

{variants}

[engine]
kind = "hf"

[diagnostics]
data = "text"
samples = 4
"""


@pytest.fixture(autouse=True)
def text(text_at_hand):
    text_at_hand(256)


def run(tmp_path: Path, model: Path, variants: str):
    suite = tmp_path / "short.toml"
    suite.write_text(SHORT.format(model=model, variants=variants))
    return CliRunner().invoke(app, ["run", str(suite), "--results", str(tmp_path / "results")])


def variants_of(tmp_path: Path) -> dict:
    (about,) = (tmp_path / "results" / "short").glob("*/run.json")
    return {variant["name"]: variant for variant in json.loads(about.read_text())["variants"]}


def test_packing_learned_scales_another_teacher_and_two_seeds_train_from_one_ptq(tmp_path, tiny_model):
    other = build_tiny_model(tmp_path / "other", seed=1)
    done = run(
        tmp_path,
        tiny_model,
        f"""
[[variant]]
name = "packed"
method = "qad"
seeds = [0, 1]
training = {{ packing = true, micro_batch_size = 1, schedule = "cosine", activation_checkpointing = true }}

[[variant]]
name = "learned"
method = "qad"
quantization = {{ block_scales = "learned" }}
training = {{ lr_groups = [{{ match = "*.block_scale", lr = 3e-2 }}], optimizer = "adafactor" }}

[[variant]]
name = "scales"
method = "qad"
quantization = {{ block_scales = "learned" }}
training = {{ train = "scales", validate_every = 2, validation_samples = 2, select = "best_val" }}

[[variant]]
name = "taught"
method = "qad"
loss = "kl_ce"
ce_weight = 0.25
teacher = {{ path = "{other}" }}
training = {{ train = "all" }}
""",
    )
    assert done.exit_code == 0, done.output
    found = variants_of(tmp_path)
    trained = {name: variant for name, variant in found.items() if variant["method"] == "qad"}
    assert set(trained) == {"packed-seed0", "packed-seed1", "learned", "scales", "taught"}
    assert len({variant["start_digest"] for variant in trained.values()}) == 1
    assert [name for name, variant in found.items() if "teacher_fingerprint" in variant] == ["taught"]
    assert found["taught"]["teacher_fingerprint"] == folder_fingerprint(other, Store(tmp_path / "store"))
    assert trained["packed-seed0"]["budget"]["steps"] <= trained["learned"]["budget"]["steps"]
    assert trained["packed-seed0"]["last_loss"] != trained["packed-seed1"]["last_loss"]
    assert trained["scales"]["codes_changed"] == 0 < trained["scales"]["block_scales_changed"]
    assert trained["learned"]["codes_changed"] > 0 and trained["learned"]["block_scales_changed"] > 0
    assert trained["scales"]["selection"]["select"] == "best_val"
    assert trained["packed-seed0"]["budget"]["tokens"] >= 2400
    names = {name: variant["trainable"]["names"] for name, variant in trained.items()}
    assert all(name.endswith(".block_scale") for name in names["scales"])
    assert "model.embed_tokens.weight" in names["taught"] and "model.norm.weight" in names["taught"]
    assert {name.rpartition(".")[2] for name in names["learned"]} == {"weight", "block_scale"}


def test_the_best_of_k_is_judged_on_tasks_that_the_record_names(tmp_path, tiny_model):
    done = run(
        tmp_path,
        tiny_model,
        """
[[variant]]
name = "best"
method = "qad"
training = { select = "best_of_k", candidates = 2, select_tasks = ["mini_choice"], validate_every = 1, validation_samples = 2 }
""",
    )
    assert done.exit_code == 0, done.output
    best = variants_of(tmp_path)["best"]
    selection = best["selection"]
    assert selection["tasks"] == ["mini_choice"] and len(selection["judged"]) == 2
    scores = {row["step"]: row["scores"]["mini_choice"] for row in selection["judged"]}
    assert scores[selection["step"]] == max(scores.values())
    losses = {row["step"]: row["loss"] for row in selection["judged"]}
    validated = {
        row["step"]: row["validation_loss"]
        for path in (tmp_path / "cache" / "stages").glob("*/files/training.jsonl")
        for row in map(json.loads, path.read_text().splitlines())
        if "validation_loss" in row
    }
    assert sorted(validated.values())[:2] == sorted(losses.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "training = { tokens = 300, batch_size = 64 }",
            r"training\.tokens 300 is less than one optimizer step.*batch_size is 64",
        ),
        ("training = { tokens = 90_000_000 }", r"lack [\d,]+ of the 90,000,000 asked for"),
        (
            'training = { lr_groups = [{ match = "*.bloc_scale", lr = 1e-4 }] }',
            r'lr_groups: "\*\.bloc_scale" matches none of the \d+ trained parameters',
        ),
        ('teacher = { path = "package:x/y.gguf" }', r"teacher\.path: package:x/y\.gguf: a GGUF file cannot teach"),
        ('teacher = { path = "no/such" }', r"teacher\.revision: no/such is no folder and is not in the mirror"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_measured(tmp_path, tiny_model, settings, message):
    done = run(tmp_path, tiny_model, f'[[variant]]\nname = "qad"\nmethod = "qad"\n{settings}\n')
    assert done.exit_code == 2, done.output
    assert re.search(message, done.stderr), done.stderr
    assert (
        not list((tmp_path / "results").glob("short/*/tasks.jsonl"))
        or not json.loads(next((tmp_path / "results").glob("short/*/table.json")).read_text())["rows"][0]["diagnostics"]
    )


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path, tiny_model):
    other = build_tiny_model(tmp_path / "other", seed=1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 16}))
    done = run(tmp_path, tiny_model, f'[[variant]]\nname = "qad"\nmethod = "qad"\nteacher = {{ path = "{other}" }}\n')
    assert done.exit_code == 2
    assert "another vocabulary" in done.stderr
