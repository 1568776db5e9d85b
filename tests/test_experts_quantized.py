"""Quantized experts: scales per expert and per projection, experts that no token reaches, both layouts, verification, training."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from harness.kept import kept_digests
from qad import nvfp4
from qad.calibrate import calibrate, second_moments
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.errors import CalibrationError, CheckpointError, RecipeError
from qad.exceptions import LayerExceptions, excluded_by_position
from qad.experts import EXPERT, open_experts
from qad.export import copy_checkpoint
from qad.footprint import footprint
from qad.layouts import LAYOUTS
from qad.modules import encoding_digest, quantized_linears
from qad.nvfp4 import E2M1_MAX, E4M3_MAX
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from qad.verify import verify
from tests.moe_models import LEAVES, MOE, batch, ids, layers_of_experts, moe_folder, never_routed_to, tiny_moe

RULES = {
    "amax": Recipe(),
    "mse": Recipe(scale_rule="mse", block_scales="frozen"),
    "weighted": Recipe(scale_rule="mse", scale_weighting="second_moment", block_scales="frozen"),
    "gptq": Recipe(scale_rule="gptq", block_scales="frozen"),
}


def unquantized(model_type, unrouted=None):
    model = tiny_moe(model_type)
    if unrouted is not None:
        never_routed_to(model, unrouted)
    open_experts(model)
    return model


def quantized(model_type, recipe=None, *, unrouted=None, **options):
    """The model, quantized, and its layers by name."""
    recipe = recipe or Recipe()
    model = unquantized(model_type, unrouted)
    batches = [batch(seed=seed) for seed in range(2)]
    amax = calibrate(model, recipe, batches) if recipe.activations else None
    if recipe.scale_weighting == "second_moment":
        options["second_moments"] = second_moments(model, recipe, batches)
    if recipe.scale_rule == "gptq":
        options["batches"] = batches
    return model, quantize_model(model, recipe, amax, **options)


def written(folder, model_type, recipe=None, *, layout="modelopt"):
    """A packed checkpoint and the model in memory."""
    recipe = recipe or Recipe()
    model, _ = quantized(model_type, recipe)
    targets = match(unquantized(model_type), recipe)
    source = moe_folder(folder.with_name(f"{folder.name}-bf16"), model_type)
    write_checkpoint(folder, model, targets=targets, companions=source, record={}, layout=layout)
    return model


@pytest.mark.parametrize("model_type", MOE)
def test_experts_share_an_input_scale_a_projection_and_have_weight_scales_of_their_own(model_type):
    model = unquantized(model_type)
    groups = [group for group in match(model, Recipe()).groups if group.experts is not None]
    first = "gate_up_proj" if model_type == "qwen3_moe" else "up_proj"
    layer = layers_of_experts(model_type)[0]
    assert [g.name for g in groups[:2]] == [f"{layer}.0.{first}", f"{layer}.0.down_proj"]
    assert {g.input_name for g in groups} == {f"{e}.{p}" for e in layers_of_experts(model_type) for p in (first, "down_proj")}
    with torch.no_grad():
        for leaf in LEAVES[model_type]:
            model.get_parameter(f"{layer}.2.{leaf}.weight").mul_(16)
    recipe = Recipe(power_of_two=False)
    amax = calibrate(model, recipe, [batch()])
    modules = quantize_model(model, recipe, amax)
    for layer in layers_of_experts(model_type):
        for leaf in LEAVES[model_type]:
            own = [modules[f"{layer}.{i}.{leaf}"] for i in range(8)]
            assert len({float(m.input_quantizer.tensor_scale) for m in own}) == 1
            assert len({float(m.tensor_scale) for m in own}) > 1
        if model_type == "qwen3_moe":
            gates, ups = ([modules[f"{layer}.{i}.{p}_proj"] for i in range(8)] for p in ("gate", "up"))
            for gate, up in zip(gates, ups, strict=True):
                assert gate.tensor_scale == up.tensor_scale and gate.input_quantizer is up.input_quantizer
                assert float(gate.tensor_scale) == pytest.approx(
                    max(float(m.original.abs().max()) for m in (gate, up)) / (E2M1_MAX * E4M3_MAX)
                )


@pytest.mark.parametrize("model_type", MOE)
def test_the_record_is_the_largest_input_over_all_experts_of_a_layer_without_padding(model_type):
    model = unquantized(model_type)
    amax = calibrate(model, Recipe(), [batch()])
    seen = {}

    def hook(name):
        return lambda module, inputs: seen.setdefault(name, []).append(float(inputs[0].abs().max()))

    for name, _ in [(n, m) for n, m in model.named_modules() if EXPERT.match(n)]:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    given = batch()
    for row, length in enumerate(given["attention_mask"].sum(dim=1).tolist()):
        model(input_ids=given["input_ids"][row : row + 1, :length], use_cache=False)
    for layer in layers_of_experts(model_type):
        for leaf in ("up_proj", "down_proj"):
            largest = max(max(seen.get(f"{layer}.{i}.{leaf}", [0.0])) for i in range(8))
            key = f"{layer}.gate_up_proj" if leaf == "up_proj" and model_type == "qwen3_moe" else f"{layer}.{leaf}"
            assert amax[key] == pytest.approx(largest, rel=0.02)
    assert amax.unrouted_experts == dict.fromkeys(layers_of_experts(model_type), 0)
    garbage = copy.deepcopy(given)
    garbage["input_ids"][-1, 20:] = ids(1, 20, seed=9)
    assert calibrate(model, Recipe(), [garbage]) == amax


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model_type", MOE)
def test_an_expert_that_no_token_reaches_is_counted_and_takes_the_scales_that_the_rule_says(model_type, rule):
    recipe = RULES[rule]
    model = unquantized(model_type, unrouted=3)
    batches = [batch(seed=seed) for seed in range(2)]
    first, second = layers_of_experts(model_type)
    assert calibrate(model, recipe, batches).unrouted_experts == {first: 1, second: 0}
    model, modules = quantized(model_type, recipe, unrouted=3)
    for leaf in LEAVES[model_type]:
        idle, other = (modules[f"{first}.{i}.{leaf}"] for i in (3, 0))
        assert idle.input_quantizer.tensor_scale == other.input_quantizer.tensor_scale
        scales = idle.encoding.block_scale
        if rule in ("amax", "gptq"):  # GPTQ has nothing to go by: every weight is rounded to the nearest
            nearest = nvfp4.quantize(idle.original, scales, idle.tensor_scale)
            assert torch.equal(idle.encoding.packed, nearest.packed)
    if rule == "gptq":
        moved = modules[f"{first}.0.down_proj"]
        nearest = nvfp4.quantize(moved.original, moved.encoding.block_scale, moved.tensor_scale)
        assert not torch.equal(moved.encoding.packed, nearest.packed)
    if rule == "weighted":
        moments = second_moments(unquantized(model_type, unrouted=3), recipe, batches)
        group = "gate_up_proj" if model_type == "qwen3_moe" else "up_proj"
        others = torch.stack([moments[f"{first}.{i}.{group}"] for i in range(8) if i != 3])
        idle = moments[f"{first}.3.{group}"]
        assert bool((idle <= others.amax(0)).all() and (idle >= others.amin(0)).all() and (idle > 0).all())


def test_a_layer_none_of_whose_experts_is_reached_ends_calibration():
    model = unquantized("qwen3_moe")
    padding = {"input_ids": ids(1, 8), "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    model.model.layers[1].mlp.experts.forward = lambda x, index, weights: x
    with pytest.raises(CalibrationError, match=r"layers.1.mlp.experts: calibration reached none of its 8 experts.*exclude"):
        calibrate(model, Recipe(), [padding])


@pytest.mark.parametrize("exclude", ["*.experts.3.*", "*.experts.*.down_proj"])
def test_a_recipe_that_splits_the_experts_of_a_layer_is_refused(exclude):
    with pytest.raises(RecipeError, match=r"experts: the recipe splits the experts of a layer: .* bf16; .* nvfp4; .*exclude"):
        match(unquantized("qwen3_moe"), Recipe(exclude=("lm_head", exclude)))


def test_patterns_and_positions_name_experts():
    model = unquantized("nemotron_h")
    last = excluded_by_position(model, LayerExceptions(last=1))
    assert sum(".experts." in name for name in last) == 16
    by_position = match(model, Recipe(exclude=("lm_head", *last)))
    by_pattern = match(model, Recipe(exclude=("lm_head", "model.layers.4.*")))
    assert by_position == by_pattern
    assert not any(name.startswith("model.layers.4.") for name in by_position.members)
    fp8 = match(model, Recipe(fp8=("*.mixer.experts.*",)))
    assert {g.format for g in fp8.groups if g.experts} == {"fp8"} and {g.format for g in fp8.groups if not g.experts} == {
        "nvfp4"
    }


def by_hand(stacks, layer, modules, x, index, weights, model_type):
    """The experts' product from stacks of decoded weights, the inputs quantized by the reference."""
    total = torch.zeros_like(x, dtype=weights.dtype if model_type == "nemotron_h" else x.dtype)
    *first, down = LEAVES[model_type]
    scale = {leaf: modules[f"{layer}.0.{leaf}"].input_quantizer.tensor_scale for leaf in (first[0], down)}
    for expert in range(8):
        token, position = torch.where(index == expert)
        if not len(token):
            continue
        inputs = nvfp4.fake_quantize(x[token], scale[first[0]])
        products = [functional.linear(inputs, stacks[leaf][expert]) for leaf in first]
        hidden = functional.silu(products[0]) * products[1] if len(products) == 2 else functional.relu(products[0]).square()
        out = functional.linear(nvfp4.fake_quantize(hidden, scale[down]), stacks[down][expert])
        order = (out * weights[token, position, None]).to(total.dtype)
        total.index_add_(0, token, order)
    return total.to(x.dtype)


@pytest.mark.parametrize("model_type", MOE)
def test_the_fake_quantized_product_is_that_of_the_stacks_of_decoded_weights_bit_for_bit(model_type):
    model, modules = quantized(model_type)
    for layer in layers_of_experts(model_type):
        stacks = {
            leaf: torch.stack([nvfp4.dequantize(modules[f"{layer}.{i}.{leaf}"].encoding, torch.bfloat16) for i in range(8)])
            for leaf in LEAVES[model_type]
        }
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(50, 64, generator=generator).to(torch.bfloat16)
        index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(50)])
        weights = torch.rand(50, 2, generator=generator)
        weights = weights if model_type == "nemotron_h" else weights.to(torch.bfloat16)
        found = model.get_submodule(layer)(x, index, weights)
        assert torch.equal(found, by_hand(stacks, layer, modules, x, index, weights, model_type))
        assert not torch.equal(found, tiny_moe(model_type).get_submodule(layer)(x, index, weights))


@pytest.mark.parametrize("model_type", MOE)
def test_transformers_stacks_of_decoded_weights_with_quantized_inputs_have_the_logits_of_ours_in_w4a16(model_type):
    """The stacks of the model as transformers has it, set to the decoded weights, against ours."""
    model, modules = quantized(model_type, Recipe(activations=False))
    stacks = tiny_moe(model_type)
    with torch.no_grad():
        for name, module in modules.items():
            decoded = nvfp4.dequantize(module.encoding, torch.bfloat16)
            found = EXPERT.match(name)
            if found is None:
                stacks.get_parameter(f"{name}.weight").copy_(decoded)
                continue
            layer, index, leaf = stacks.get_submodule(found["layer"]), int(found["index"]), found["projection"]
            if leaf == "down_proj" or model_type == "nemotron_h":
                getattr(layer, leaf)[index].copy_(decoded)
            else:
                layer.gate_up_proj[index].chunk(2)[leaf == "up_proj"].copy_(decoded)
    assert torch.equal(model(input_ids=ids(), use_cache=False).logits, stacks(input_ids=ids(), use_cache=False).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", MOE)
def test_a_packed_checkpoint_comes_back_bit_for_bit_is_sound_and_has_the_names_of_the_hub(model_type, layout, tmp_path):
    folder = tmp_path / "packed"
    model = written(folder, model_type, layout=layout)
    loaded = load_checkpoint(folder)
    assert loaded.kernels == {"linear": "w4a4_emulation", "experts": "w4a4_emulation", "kv_cache": "bf16"}
    for inputs in ({"input_ids": ids()}, batch()):
        assert torch.equal(loaded.model(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)
    assert verify(folder).problems == ()
    assert not verify(folder).is_guessed
    assert verify(folder).formats == {"nvfp4": len(quantized_linears(model))}
    codes = ".weight" if layout == "modelopt" else ".weight_packed"
    prefix = "backbone.layers.1.mixer" if model_type == "nemotron_h" else "model.layers.1.mlp"
    tensors = load_file(folder / "model.safetensors")
    for leaf in LEAVES[model_type]:
        assert tensors[f"{prefix}.experts.5.{leaf}{codes}"].dtype is torch.uint8
    assert tensors[f"{prefix}.gate.weight"].dtype is torch.bfloat16
    bits = footprint(folder).bits_per_weight
    assert 4.5 < bits < 16
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    assert copy_checkpoint(folder, tmp_path / "other", layout=other) == 0
    assert verify(tmp_path / "other").problems == ()
    again = load_checkpoint(tmp_path / "other").model
    assert torch.equal(again(input_ids=ids(), use_cache=False).logits, model(input_ids=ids(), use_cache=False).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", MOE)
def test_experts_in_fp8_come_back_bit_for_bit(model_type, layout, tmp_path):
    model = written(tmp_path / "packed", model_type, Recipe(fp8=("*.experts.*",)), layout=layout)
    loaded = load_checkpoint(tmp_path / "packed")
    assert loaded.kernels == {"linear": "w4a4_emulation", "experts": "w8a8_emulation", "kv_cache": "bf16"}
    assert torch.equal(loaded.model(**batch(), use_cache=False).logits, model(**batch(), use_cache=False).logits)
    assert verify(tmp_path / "packed").problems == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routers_and_convolutions_are_listed_among_what_is_left_alone(layout, tmp_path):
    written(tmp_path / "packed", "nemotron_h", layout=layout)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == [
        "lm_head",
        "backbone.layers.0.mixer.conv1d",
        "backbone.layers.1.mixer.gate",
        "backbone.layers.4.mixer.gate",
    ]


def test_compressed_tensors_name_experts_by_a_pattern_too_for_engines_call_them_otherwise(tmp_path):
    recipe = Recipe(exclude=("lm_head", "model.layers.1.mixer.experts.*"), fp8=("*.o_proj",))
    model = written(tmp_path / "packed", "nemotron_h", recipe, layout="compressed-tensors")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    by_pattern = [[p for p in g["targets"] if p.startswith("re:")] for g in config["config_groups"].values()]
    assert by_pattern == [[r"re:(?:.*\.)?layers\.4\.mixer\.experts\..*"], []]
    assert [p for p in config["ignore"] if p.startswith("re:")] == [r"re:(?:.*\.)?layers\.1\.mixer\.experts\..*"]
    assert verify(tmp_path / "packed").problems == ()
    copy_checkpoint(tmp_path / "packed", tmp_path / "modelopt", layout="modelopt")
    copy_checkpoint(tmp_path / "modelopt", tmp_path / "back", layout="compressed-tensors")
    again = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert set(again["ignore"]) == set(config["ignore"])
    for folder in ("packed", "modelopt", "back"):
        found = load_checkpoint(tmp_path / folder).model(input_ids=ids(), use_cache=False).logits
        assert torch.equal(found, model(input_ids=ids(), use_cache=False).logits)


def edited(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("model_type", MOE)
def test_damages_of_experts_are_found(model_type, tmp_path):
    folder, damaged = tmp_path / "packed", tmp_path / "damaged"
    written(folder, model_type)
    layer = layers_of_experts(model_type)[1]
    layer = layer.replace("model.", "backbone.", 1) if model_type == "nemotron_h" else layer
    first = "gate_proj/up_proj" if model_type == "qwen3_moe" else "up_proj"
    cases = {
        f"{layer}.*.down_proj: unequal input scales across its experts": lambda t: t[f"{layer}.6.down_proj.input_scale"].mul_(
            2
        ),
        f"{layer}.*.{first}: unequal input scales across its experts": lambda t: t[f"{layer}.6.up_proj.input_scale"].mul_(2),
        f"{layer}: missing experts: 6.": lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{layer}.6.")],
        f"{layer}: missing experts: 2.down_proj": lambda t: [
            t.pop(k) for k in list(t) if k.startswith(f"{layer}.2.down_proj.")
        ],
        f"{layer}: missing experts: all of them": lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{layer}.")],
        f"{layer}: experts that the architecture does not have: 8.up_proj": lambda t: t.update(
            {k.replace(".7.", ".8."): v.clone() for k, v in t.items() if k.startswith(f"{layer}.7.up_proj")}
        ),
    }
    for problem, change in cases.items():
        shutil.copytree(folder, damaged)
        edited(damaged, change)
        found = verify(damaged).problems
        assert any(line.startswith(problem) for line in found), (problem, found)
        assert len(found) <= 4, found
        shutil.rmtree(damaged)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", MOE)
def test_the_largest_of_several_input_scales_of_experts_computes_and_it_is_said(model_type, layout, tmp_path):
    folder, all_larger = tmp_path / "packed", tmp_path / "larger"
    written(folder, model_type, layout=layout)
    shutil.copytree(folder, all_larger)
    assert load_checkpoint(folder).merged_inputs == ()
    layer = layers_of_experts(model_type)[1]
    stored = layer.replace("model.", "backbone.", 1) if model_type == "nemotron_h" else layer
    suffix, factor = (".input_scale", 3.0) if layout == "modelopt" else (".input_global_scale", 1 / 3)
    projections = LEAVES[model_type][:-1]

    def larger(indices):
        return lambda tensors: [tensors[f"{stored}.{i}.{p}{suffix}"].mul_(factor) for i in indices for p in projections]

    before = load_checkpoint(folder).model(**batch(), use_cache=False).logits
    edited(folder, larger([6]))
    edited(all_larger, larger(range(8)))
    loaded, expected = load_checkpoint(folder), load_checkpoint(all_larger)
    name = "gate_up_proj" if model_type == "qwen3_moe" else "up_proj"
    assert loaded.merged_inputs == (f"{layer}.{name}",) and expected.merged_inputs == ()
    assert any("unequal input scales across its experts" in problem for problem in verify(folder).problems)
    found = loaded.model(**batch(), use_cache=False).logits
    assert torch.equal(found, expected.model(**batch(), use_cache=False).logits)
    assert not torch.equal(found, before)


def test_input_scales_that_only_some_experts_have_are_refused(tmp_path):
    folder = tmp_path / "packed"
    written(folder, "nemotron_h")
    name = "backbone.layers.4.mixer.experts.6.up_proj"
    edited(folder, lambda tensors: tensors.pop(f"{name}.input_scale"))
    (folder / "hf_quant_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    packed = [key.removesuffix(".weight_scale_2") for key in load_file(folder / "model.safetensors") if key.endswith("scale_2")]
    layers = {each: {"quant_algo": "W4A16_NVFP4" if each == name else "NVFP4"} for each in packed}
    config["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"layers.4.mixer.experts.up_proj: some of its members have an input scale and some"
    ):
        load_checkpoint(folder)


def listed_as_plain(folder, name):
    """Its configuration then leaves the layer alone."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append(name)
    (folder / "config.json").write_text(json.dumps(config))


def test_experts_quantized_in_part_are_found_and_do_not_load(tmp_path):
    written(tmp_path / "packed", "nemotron_h")
    name = "backbone.layers.4.mixer.experts.6.up_proj"

    def plain(tensors):
        for suffix in ("_scale", "_scale_2"):
            tensors.pop(f"{name}.weight{suffix}")
        tensors.pop(f"{name}.input_scale")
        tensors[f"{name}.weight"] = torch.zeros(48, 64, dtype=torch.bfloat16)

    edited(tmp_path / "packed", plain)
    found = verify(tmp_path / "packed").problems
    assert any("experts quantized in part" in line and line.endswith("not quantized are: 6.up_proj") for line in found), found
    listed_as_plain(tmp_path / "packed", name)
    with pytest.raises(
        CheckpointError,
        match=r"packed: model\.layers\.4\.mixer\.experts: the checkpoint splits the experts .*6.up_proj bf16; .*export it",
    ):
        load_checkpoint(tmp_path / "packed")


def test_an_expert_that_is_missing_where_all_stay_in_bf16_is_found(tmp_path):
    written(tmp_path / "packed", "nemotron_h", Recipe(exclude=("lm_head", "*.experts.*")))
    assert verify(tmp_path / "packed").problems == ()
    edited(tmp_path / "packed", lambda t: t.pop("backbone.layers.4.mixer.experts.6.up_proj.weight"))
    assert verify(tmp_path / "packed").problems == ("backbone.layers.4.mixer.experts: missing experts: 6.up_proj",)


@pytest.mark.parametrize("model_type", MOE)
def test_what_is_no_linear_layer_stays_bit_for_bit(model_type, tmp_path):
    before = unquantized(model_type)
    model = written(tmp_path / "packed", model_type)
    members = match(before, Recipe()).members
    expected = kept_digests(before, members)
    assert any(".gate." in name or name.endswith("gate.weight") for name in expected)
    if model_type == "nemotron_h":
        assert "model.layers.1.mixer.gate.e_score_correction_bias" in expected
    assert kept_digests(model, members) == expected == kept_digests(load_checkpoint(tmp_path / "packed").model, members)


def test_digests_name_every_expert():
    _, modules = quantized("qwen3_moe")
    before = encoding_digest(modules)
    name = "model.layers.1.mlp.experts.7.up_proj"
    modules[name].encoding.packed[0, 0] ^= 1
    assert encoding_digest(modules) != before
