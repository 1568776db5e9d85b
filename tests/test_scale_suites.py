"""A suite that compares scale rules on a tiny model, run as a user runs it, in process."""

import json
import re
import shutil
import sys

import pytest
from conftest import SUITE

from harness import cli

VARIANTS = """
[[variant]]
name = "bf16"
method = "bf16"

[[variant]]
name = "ptq"
method = "ptq"

[[variant]]
name = "x1.3"
method = "ptq"
quantization = { scale_multiplier = 1.3 }

[[variant]]
name = "weighted"
method = "ptq"
quantization = { scale_rule = "mse", scale_weighting = "second_moment" }

[[variant]]
name = "gptq"
method = "ptq"
quantization = { scale_rule = "gptq" }

[[variant]]
name = "six"
method = "ptq"
quantization = { scale_rule = "four_over_six" }

[[variant]]
name = "blind"
method = "ptq"
quantization = { calibration = { skip_first_token = true, headroom = 0.05, max_saturated = 1.0, max_overshoot = 1e9 } }

[[variant]]
name = "qad-gptq"
method = "qad"
quantization = { scale_rule = "gptq" }

[[variant]]
name = "qad-frozen"
method = "qad"
quantization = { block_scales = "frozen" }

"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, text_stages):
    """(run.json, table.json, table.md) of the suite."""
    root = tmp_path_factory.mktemp("scale-rules")
    text = re.sub(r"\[\[task\]\][^\[]*", "", SUITE.format(model=tiny_model)).replace("tokens = 6000", "tokens = 3000")
    head, _, tail = text.partition("[[variant]]")
    tail = tail[tail.index("[engine]") :]
    (root / "tiny.toml").write_text(head + VARIANTS + tail.replace("samples = 12", "samples = 4"))
    shutil.copytree(text_stages(512), root / "cache" / "stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(root / "cache"))
        patch.setattr(sys, "argv", ["harness", "run", str(root / "tiny.toml"), "--results", str(root / "results")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    (folder,) = (root / "results" / "tiny").iterdir()
    return (
        *(json.loads((folder / name).read_text()) for name in ("run.json", "table.json")),
        (folder / "table.md").read_text(),
    )


def test_training_starts_from_the_checkpoint_of_its_rule_and_keeps_its_block_scales(run):
    variants = {variant["name"]: variant for variant in run[0]["variants"]}
    digests = {name: variants[name].get("start_digest") for name in variants}
    assert digests["qad-gptq"] == digests["gptq"]
    assert digests["qad-frozen"] == digests["ptq"]
    assert len({digests[name] for name in ("ptq", "x1.3", "weighted", "gptq", "six", "blind")}) == 6
    for name in ("qad-gptq", "qad-frozen"):
        assert variants[name]["block_scales_changed"] == 0.0 < variants[name]["codes_changed"]
    assert variants["gptq"]["quantization"]["block_scales"] == "frozen"


def test_the_amax_checkpoint_is_quantized_once_for_ptq_and_frozen_training(run):
    kinds = [stage["kind"] for stage in run[0]["stages"]]
    assert (kinds.count("calibrate"), kinds.count("quantize"), kinds.count("train")) == (3, 6, 2)


def test_the_table_prints_each_rule_beside_the_noise_floor_and_the_saturated_share(run):
    table, text = run[1], run[2]
    (floor,) = table["scale_rules"]["noise_floors"]
    assert (floor["variants"], floor["n"]) == (["ptq", "x1.3"], 2)
    assert [pair["candidate"] for pair in table["scale_rules"]["comparisons"]] == ["weighted", "gptq", "six"]
    assert "Noise floor of scale rules (amax): KL " in text
    assert text.count("standard deviation") == 4
    assert re.search(r"blind: [\d.]+ % of activation blocks saturate", text)
