"""A suite of a model with experts, from BF16 to a trained checkpoint: what the run says and records of experts."""

import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from harness.cli import app
from qad.verify import verify
from tests.moe_models import layers_of_experts, tiny_moe

LAYERS = layers_of_experts("nemotron_h")


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A hybrid with experts, with the tokenizer of the tiny model; expert 3 of its second layer of experts is never chosen."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json"))
    model = tiny_moe("nemotron_h", vocab_size=512)
    model.get_submodule("model.layers.4.mixer.gate").e_score_correction_bias[3] = -1000.0
    model.save_pretrained(folder)
    return folder


def test_a_run_from_bf16_to_qad_counts_the_experts_that_calibration_never_reached(folder, tiny_suite, tiny_model, tmp_path):
    text = tiny_suite.read_text().replace(str(tiny_model), str(folder))
    text = re.sub(r"\[\[task\]\]\n.*\nlimit = 8\n", "", text).replace("seq_len = 512", "seq_len = 128")
    text = (
        text.replace("tokens = 6000", "tokens = 600")
        .replace("samples = 12", "samples = 2")
        .replace("samples = 8", "samples = 4")
    )
    text = text.replace(
        "[quantization]\n", '[quantization]\nexclude = ["lm_head"]\nexclude_layers = { before_attention = true }\n'
    )
    text = re.sub(r'\[\[variant\]\]\nname = "qat"\nmethod = "qat"\n', "", text)
    tiny_suite.write_text(text)
    done = CliRunner().invoke(app, ["run", str(tiny_suite), "--results", str(tmp_path / "results")])
    assert done.exit_code == 0, done.output
    assert "1 experts of 1 layers were never routed to, and take the scales of the others" in " ".join(done.output.split())
    (about,) = (tmp_path / "results").glob("tiny/*/run.json")
    variants = {variant["name"]: variant for variant in json.loads(about.read_text())["variants"]}
    for name in ("ptq", "qad"):
        assert variants[name]["unrouted_experts"] == {LAYERS[1]: 1}  # the first layer of experts stays in BF16
    assert "unrouted_experts" not in variants["bf16"]
    assert (
        sum(".experts." in name for name in variants["ptq"]["excluded"]) == 16
    )  # the layer before attention is one of experts
    exported = [path.parent for path in (tmp_path / "cache" / "stages").glob("*/**/quantization_record.json")]
    assert len(exported) == 2
    for packed in exported:
        assert (
            json.loads((packed / "quantization_record.json").read_text())["unrouted_experts"]
            == variants["ptq"]["unrouted_experts"]
        )
        assert verify(packed).problems == ()


def test_the_router_of_the_made_model_never_chooses_that_expert(folder):
    from qad.checkpoint import load_checkpoint

    gate = load_checkpoint(folder).model.get_submodule("model.layers.4.mixer.gate")
    chosen = gate(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))[2]
    assert 3 not in chosen.unique()
