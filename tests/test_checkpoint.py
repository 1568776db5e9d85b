"""The packed checkpoint: what is written, that it comes back bit for bit, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qad import nvfp4
from qad.checkpoint import copy_companions, load_checkpoint, write_checkpoint
from qad.errors import CheckpointError, NonFiniteError
from qad.footprint import footprint
from qad.packed import read_encodings
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from qad.tensor_files import write_shards


@pytest.fixture
def packed(tiny_model, tmp_path):
    """A tiny packed checkpoint and the model in memory that it was written from."""
    folder = tmp_path / "packed"
    model = load_checkpoint(tiny_model).model
    targets = match(model, Recipe())
    quantize_model(model, Recipe(), {group.name: 8.0 for group in targets.groups})
    write_checkpoint(folder, model, targets=targets, companions=tiny_model, record={})
    return folder, model


def edited(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_checksums_of_the_model_it_was_made_of_do_not_go_along(tmp_path, tiny_model):
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    (source / "SHA256SUMS").write_text("of other files")
    (tmp_path / "to").mkdir()
    copy_companions(source, tmp_path / "to")
    assert (tmp_path / "to" / "tokenizer.json").exists() and not (tmp_path / "to" / "SHA256SUMS").exists()


def test_a_checkpoint_loads_back_to_identical_logits(packed):
    folder, model = packed
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        loaded = load_checkpoint(folder)
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert loaded.kernels == {"linear": "w4a4_emulation", "kv_cache": "bf16"}


def test_tensors_have_the_names_types_and_shapes_of_modelopt(packed):
    folder, _ = packed
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert tensors[f"{name}.weight"].dtype is torch.uint8
    assert tuple(tensors[f"{name}.weight"].shape) == (64, 64)
    assert tensors[f"{name}.weight_scale"].dtype is torch.float8_e4m3fn
    assert tuple(tensors[f"{name}.weight_scale"].shape) == (64, 8)
    assert tensors[f"{name}.weight_scale_2"].shape == tensors[f"{name}.input_scale"].shape == ()
    assert "lm_head.weight" not in tensors  # tied, stored once
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_algo"], config["ignore"]) == ("modelopt", "NVFP4", ["lm_head"])
    assert json.loads((folder / "hf_quant_config.json").read_text())["quantization"]["group_size"] == 16
    assert (folder / "tokenizer.json").is_file()


def test_members_of_a_fused_group_are_written_with_one_scale(packed):
    tensors = load_file(packed[0] / "model.safetensors")
    for kind in ("weight_scale_2", "input_scale"):
        assert len({float(tensors[f"model.layers.0.self_attn.{p}_proj.{kind}"]) for p in "qkv"}) == 1


def test_w4a16_has_no_input_scales_and_says_so(tiny_model, tmp_path):
    model = load_checkpoint(tiny_model).model
    recipe = Recipe(activations=False)
    targets = match(model, recipe)
    quantize_model(model, recipe, None)
    write_checkpoint(tmp_path / "w4a16", model, targets=targets, companions=tiny_model, record={})
    loaded = load_checkpoint(tmp_path / "w4a16")
    assert loaded.kernels["linear"] == "w4a16"
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)


def test_bits_a_weight_count_packed_codes_and_scales(packed):
    folder, _ = packed
    tensors = load_file(folder / "model.safetensors")
    quantized = sum(2 * t.numel() for t in tensors.values() if t.dtype is torch.uint8)
    others = sum(t.numel() for n, t in tensors.items() if t.dtype is torch.bfloat16)
    scalars = sum(t.numel() for n, t in tensors.items() if t.dtype is torch.float32)
    assert footprint(folder).bits_per_weight == pytest.approx(
        (4.5 * quantized + 16 * others + 32 * scalars) / (quantized + others)
    )
    assert footprint(folder).checkpoint_bytes == (folder / "model.safetensors").stat().st_size


def test_a_folder_without_weights_has_no_footprint(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        footprint(tmp_path)


def test_a_foreign_checkpoint_with_only_hf_quant_config_is_read(packed):
    folder, _model = packed
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(folder).kernels["linear"] == "w4a4_emulation"


def test_a_file_that_is_cut_short_is_named(packed):
    folder, _ = packed
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors.*copy it again"):
        load_checkpoint(folder)


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, make):
    return lambda tensors: tensors.__setitem__(name, make(tensors[name]))


PREFIX = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{PREFIX}.weight_scale"), "q_proj is packed but .*q_proj.weight_scale is missing"),
        (drop("model.norm.weight"), "do not fit LlamaForCausalLM.*model.norm.weight"),
        (replace("model.norm.weight", lambda t: t[:-1]), "do not fit LlamaForCausalLM.*mismatched_keys.*model.norm.weight"),
        (replace(f"{PREFIX}.weight_scale", lambda t: t.float().to(torch.float8_e5m2)), "NVFP4 needs float8_e4m3fn"),
        (replace(f"{PREFIX}.weight_scale_2", lambda t: t * 0), "weight_scale_2 is 0; a scale is positive and finite"),
        (replace(f"{PREFIX}.weight_scale_2", lambda t: t * 2), "qkv_proj: its members have different tensor scales"),
        (replace(f"{PREFIX}.input_scale", lambda t: t * 2), "qkv_proj: its members have different input scales"),
        (drop(f"{PREFIX}.input_scale"), "q_proj is nvfp4 with an input scale but its tensors are nvfp4 without one"),
    ],
)
def test_planted_defects_are_named(packed, change, message):
    folder, _ = packed
    edited(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_a_nan_scale_and_a_nan_weight_are_named(packed):
    folder, _ = packed
    edited(folder, replace("model.norm.weight", lambda t: t * float("nan")))
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight: holds 64 values"):
        load_checkpoint(folder)
    edited(folder, replace("model.norm.weight", lambda t: torch.ones(64, dtype=torch.bfloat16)))
    edited(folder, replace(f"{PREFIX}.weight_scale", lambda t: torch.full_like(t.view(torch.uint8), 0x7F).view(t.dtype)))
    with pytest.raises(NonFiniteError, match=r"q_proj\.weight_scale"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "has no config_groups, so nothing says what is quantized",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'; NVFP4 and FP8 checkpoints of modelopt and"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}},
            "quant_algo W4A8_AWQ; allowed: NVFP4",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
            "is fp8 with an input scale but its tensors are",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"a": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}},
                }
            },
            r"config_groups.a: weights \(8, 'int', 'channel'\).*read are NVFP4",
        ),
        ({"model_type": "clip"}, "model_type 'clip' is no causal language model"),
        ({"model_type": "nonsense"}, "model_type 'nonsense' is no causal language model"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "asks for remote code .*trust_remote_code = true"),
        ({"auto_map": {"AutoModel": "org/other--x.Y"}}, "remote code lies in another repository"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8}}},
            "KV cache",
        ),
    ],
)
def test_what_this_version_cannot_read_is_said(packed, config, message):
    folder, _ = packed
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_a_model_whose_logits_are_scaled_is_refused_wherever_it_is_loaded(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, logits_scaling=8.0
    )
    GraniteForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"logits of GraniteForCausalLM are not lm_head\(hidden\)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
def test_a_config_that_disagrees_with_the_tensors_about_activations_is_refused(packed, algorithm):
    folder, _ = packed
    if algorithm == "NVFP4":
        edited(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".input_scale")])
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"quant_algo": "NVFP4"', f'"quant_algo": "{algorithm}"'))
    with pytest.raises(CheckpointError, match="but its tensors are nvfp4 .*the config disagrees with the tensors"):
        load_checkpoint(folder)


def test_pickled_weights_are_never_read(packed):
    folder, _ = packed
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are never read"):
        load_checkpoint(folder)


def test_the_packed_bytes_are_those_of_the_encoding(packed):
    folder, model = packed
    tensors = load_file(folder / "model.safetensors")
    module = model.get_submodule(PREFIX)
    again = nvfp4.Packed(tensors[f"{PREFIX}.weight"], tensors[f"{PREFIX}.weight_scale"], tensors[f"{PREFIX}.weight_scale_2"])
    assert torch.equal(nvfp4.dequantize(again), module.weight)


REMOTE_CONFIG = """
from transformers import LlamaConfig


class TinyConfig(LlamaConfig):
    model_type = "tiny_remote"
"""
REMOTE_MODEL = """
from transformers import LlamaForCausalLM

from .configuration_tiny import TinyConfig


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
"""


@pytest.fixture
def remote(tiny_model, tmp_path, monkeypatch):
    """The tiny model as a repository that brings Python files of its own."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "remote"
    shutil.copytree(tiny_model, folder)
    (folder / "configuration_tiny.py").write_text(REMOTE_CONFIG)
    (folder / "modeling_tiny.py").write_text(REMOTE_MODEL)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "tiny_remote",
        "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_remote_code_runs_only_where_it_is_asked_for(remote, tiny_model):
    with pytest.raises(
        CheckpointError, match=r"asks for remote code .*it runs only where the suite says \[model\] trust_remote_code"
    ):
        load_checkpoint(remote)
    model = load_checkpoint(remote, trust_remote_code=True).model
    assert type(model).__name__ == "TinyForCausalLM"
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_checkpoint(tiny_model).model(ids).logits)


def test_remote_code_without_a_language_model_is_refused(remote):
    path = remote / "config.json"
    config = json.loads(path.read_text())
    del config["auto_map"]["AutoModelForCausalLM"]
    path.write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match="its remote code has no AutoModelForImageTextToText or AutoModelForCausalLM or AutoModel; found: AutoConfig",
    ):
        load_checkpoint(remote, trust_remote_code=True)


def test_a_packed_tensor_that_belongs_to_no_linear_layer_is_named(packed):
    folder, _ = packed

    def add(tensors):
        for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            tensors[f"model.stranger.{part}"] = tensors[f"{PREFIX}.{part}"].clone()

    edited(folder, add)
    with pytest.raises(CheckpointError, match=r"model\.stranger"):
        load_checkpoint(folder)


def test_a_model_that_is_not_quantized_has_no_codes_to_start_from(tiny_model):
    with pytest.raises(CheckpointError, match="is not quantized, so it has no codes to start from"):
        read_encodings(tiny_model)


def test_an_export_of_remote_code_keeps_its_files_and_loads_back(remote, tmp_path):
    model = load_checkpoint(remote, trust_remote_code=True).model
    targets = match(model, Recipe(activations=False))
    quantize_model(model, Recipe(activations=False), None)
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=remote, record={})
    assert (tmp_path / "out" / "modeling_tiny.py").is_file()
    loaded = load_checkpoint(tmp_path / "out", trust_remote_code=True).model
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_metadata_lies_in_one_order_so_that_equal_checkpoints_are_equal_bytes(tmp_path):
    written = set()
    for index in range(8):  # safetensors draws an order a call
        folder = tmp_path / str(index)
        folder.mkdir()
        write_shards(folder, {"a": 16}, {"a": torch.arange(4.0)}.__getitem__, metadata={"qad": "é", "b": "1", "c": "2"})
        written.add((folder / "model.safetensors").read_bytes())
        assert torch.equal(load_file(folder / "model.safetensors")["a"], torch.arange(4.0))
    (found,) = written
    header = json.loads(found[8 : 8 + int.from_bytes(found[:8], "little")])
    assert header["__metadata__"] == {"b": "1", "c": "2", "format": "pt", "qad": "é"}
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
