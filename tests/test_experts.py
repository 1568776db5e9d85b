"""Experts opened into linear layers: the same numbers, the names of files, nothing held twice; what is not understood is named."""

import copy
import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from harness.known_models import known_model
from qad.building import native_class
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.errors import CheckpointError, RecipeError
from qad.experts import EXPERT, OpenExperts, open_experts, opened_experts, unopened
from qad.layouts import LAYOUTS, configs, read_scheme
from qad.recipe import Recipe, Targets, groups_of, match
from qad.stored_names import loaded_names, stored_tensors
from tests.moe_models import LEAVES, MOE, batch, ids, layers_of_experts, moe_folder, never_routed_to, tiny_moe


def opened(model):
    found = copy.deepcopy(model)
    open_experts(found)
    return found


def stack_gradient(gradients, name):
    """The gradient that the stacks have for the weight of one opened expert; of any other parameter its own."""
    match_ = EXPERT.match(name.removesuffix(".weight"))
    if match_ is None:
        return gradients[name].grad
    layer, index, leaf = match_["layer"], int(match_["index"]), match_["projection"]
    if leaf == "down_proj" or f"{layer}.up_proj" in gradients:
        return gradients[f"{layer}.{leaf}"].grad[index]
    return gradients[f"{layer}.gate_up_proj"].grad[index].chunk(2)[("gate_proj", "up_proj").index(leaf)]


@pytest.mark.parametrize("model_type", [*MOE, "mixtral", "olmoe", "deepseek_v3"])
def test_opened_experts_have_the_logits_of_the_eager_stacks_bit_for_bit(model_type):
    model = tiny_moe(model_type)
    found = opened(model)
    assert not unopened(found) and len(opened_experts(found)) == 2
    for inputs in ({"input_ids": ids()}, batch()):
        assert torch.equal(found(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("model_type", MOE)
def test_gradients_are_those_of_the_stacks_and_zero_for_an_expert_that_got_no_token(model_type):
    model = tiny_moe(model_type, torch.float64)
    never_routed_to(model, 3)
    found = opened(model)
    for each in (model, found):
        each(input_ids=ids(), use_cache=False).logits.square().sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in found.named_parameters():
        assert torch.allclose(parameter.grad, stack_gradient(gradients, name), rtol=1e-9, atol=1e-9), name
    idle = found.get_submodule(f"{layers_of_experts(model_type)[0]}.3")
    assert all(parameter.grad.eq(0).all() for parameter in idle.parameters())


def test_gradients_of_experts_without_a_gate_are_equal_bit_for_bit_in_bf16():
    model = tiny_moe("nemotron_h")
    found = opened(model)
    for each in (model, found):
        each(input_ids=ids(), use_cache=False).logits.square().sum().backward()
    gradients = dict(model.named_parameters())
    assert all(torch.equal(parameter.grad, stack_gradient(gradients, name)) for name, parameter in found.named_parameters())


@pytest.mark.parametrize("model_type", [*MOE, "mixtral", "olmoe", "deepseek_v3"])
def test_opened_experts_have_in_files_the_names_that_transformers_writes(model_type, tmp_path):
    model = tiny_moe(model_type)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    found = opened(model)
    stored = stored_tensors(found, found.state_dict())
    assert set(stored) == set(written)
    assert all(own is not None and torch.equal(tensor, written[name]) for name, (own, tensor) in stored.items())
    assert set(loaded_names(found, written).values()) == set(found.state_dict())
    if model_type == "nemotron_h":
        assert "backbone.layers.1.mixer.experts.7.up_proj.weight" in written
    if model_type == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.7.w3.weight" in written


@pytest.mark.parametrize("model_type", MOE)
def test_the_opened_weights_are_the_slices_of_the_stacks_and_nothing_is_copied(model_type):
    model = tiny_moe(model_type)
    storages = {p.untyped_storage().data_ptr() for name, p in model.named_parameters() if ".experts." in name}
    open_experts(model)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inside = [m for experts in opened_experts(model).values() for m in experts.modules() if isinstance(m, nn.Linear)]
    assert len(inside) == 2 * 8 * len(LEAVES[model_type]) and len(linears) > len(inside)
    assert {m.weight.untyped_storage().data_ptr() for m in inside} == storages
    assert len({m.weight.data_ptr() for m in inside}) == len(inside)
    version = inside[1].weight._version
    with torch.no_grad():
        inside[0].weight.zero_()
    assert inside[1].weight._version == version and bool(inside[1].weight.any())


@pytest.mark.parametrize("model_type", MOE)
def test_a_checkpoint_is_loaded_with_open_experts_whether_its_files_hold_stacks_or_single_experts(model_type, tmp_path):
    model = tiny_moe(model_type)
    single = moe_folder(tmp_path / "single", model_type)
    stacked = moe_folder(tmp_path / "stacked", model_type)
    assert any(".experts.0.up_proj.weight" in name for name in load_file(single / "model.safetensors"))
    save_file(model.state_dict(), stacked / "model.safetensors", {"format": "pt"})
    expected = model(input_ids=ids(), use_cache=False).logits
    for folder in (single, stacked):
        loaded = load_checkpoint(folder)
        assert loaded.kernels == {"linear": "bf16", "experts": "bf16", "kv_cache": "bf16"}
        assert list(opened_experts(loaded.model)) == layers_of_experts(model_type)
        assert torch.equal(loaded.model(input_ids=ids(), use_cache=False).logits, expected)
        n_bytes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in loaded.model.parameters()}
        assert sum(n_bytes.values()) == sum(p.numel() * p.element_size() for p in loaded.model.parameters())


def test_a_checkpoint_without_one_of_its_experts_is_refused(tmp_path):
    folder = moe_folder(tmp_path / "moe", "nemotron_h")
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.layers.1.mixer.experts.2.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit NemotronHForCausalLM.*experts.down_proj"):
        load_checkpoint(folder)
    folder = moe_folder(tmp_path / "gated", "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.gate_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be made into those of Qwen3MoeForCausalLM.*each needs every projection"):
        load_checkpoint(folder)


def test_a_hybrid_that_was_published_with_code_is_loaded_without_it_unless_that_is_trusted(tmp_path):
    folder = moe_folder(tmp_path / "hybrid", "nemotron_h")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_old.OldConfig", "AutoModelForCausalLM": "modeling_old.OldForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    for name in ("configuration_old.py", "modeling_old.py"):
        (folder / name).write_text('raise RuntimeError("the code of the checkpoint ran")')
    assert type(load_checkpoint(folder).model).__module__.startswith("transformers.models.nemotron_h")
    with pytest.raises(RuntimeError, match="the code of the checkpoint ran"):
        load_checkpoint(folder, trust_remote_code=True)


def test_experts_of_another_kind_stay_as_they_are_and_a_recipe_for_them_is_refused_by_name():
    model = tiny_moe("gpt_oss")
    open_experts(model)
    assert unopened(model) == {f"model.layers.{i}.mlp.experts": "GptOssExperts: its experts have biases" for i in range(2)}
    with pytest.raises(
        RecipeError, match=r"layers.0.mlp.experts: experts held as 3-D .*GptOssExperts: its experts have biases"
    ):
        match(model, Recipe())


def test_experts_that_files_hold_as_stacks_stay_as_they_are_and_a_recipe_is_refused_before_any_work(tmp_path):
    folder = moe_folder(tmp_path / "granite", "granitemoe")
    assert "model.layers.0.block_sparse_moe.input_linear.weight" in load_file(folder / "model.safetensors")
    model = load_checkpoint(folder).model
    name = "model.layers.{}.block_sparse_moe.experts"
    reason = "GraniteMoeExperts: its files hold stacks, whose export is not available"
    assert unopened(model) == {name.format(i): reason for i in range(2)}
    with pytest.raises(RecipeError, match=rf"layers\.0\.block_sparse_moe\.experts: experts held as 3-D .*\({reason}\)"):
        match(model, Recipe())
    expected = tiny_moe("granitemoe")(input_ids=ids(), use_cache=False).logits
    assert torch.equal(model(input_ids=ids(), use_cache=False).logits, expected)
    write_checkpoint(tmp_path / "again", model, targets=None, companions=folder, record={})
    assert torch.equal(load_checkpoint(tmp_path / "again").model(input_ids=ids(), use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_transposed": True}, "transposed"),
        ({"is_concatenated": False}, "interleaved"),
        (
            {"extra": nn.Parameter(torch.zeros(1))},
            "its parameters are down_proj, extra, gate_up_proj, not down_proj, gate_up_proj",
        ),
    ],
)
def test_what_is_not_understood_about_experts_is_said(change, reason):
    model = tiny_moe("qwen3_moe")
    for key, value in change.items():
        setattr(model.model.layers[0].mlp.experts, key, value)
    open_experts(model)
    assert reason in unopened(model)["model.layers.0.mlp.experts"]
    assert isinstance(model.model.layers[1].mlp.experts, OpenExperts)


def test_experts_with_a_gate_of_their_own_are_not_opened():
    model = tiny_moe("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.__class__ = type("ClampedExperts", (type(experts),), {"_apply_gate": lambda self, x: x})
    open_experts(model)
    assert unopened(model) == {"model.layers.0.mlp.experts": "ClampedExperts: its gate is one of its own, not act(gate) * up"}


def test_nano_3_is_opened_on_the_real_shapes_in_seconds():
    known = known_model("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    assert known is not None
    config, architecture = native_class(dict(known.config))
    with torch.device("meta"):
        model = architecture._from_config(config)
    began = time.process_time()
    open_experts(model)
    targets = match(model, Recipe())
    assert time.process_time() - began < 20
    experts = [group for group in targets.groups if group.experts is not None]
    assert len(experts) == 23 * 128 * 2
    assert len({group.input_name for group in experts}) == 23 * 2
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(31.6e9, rel=0.02)


def test_a_configuration_that_names_six_thousand_layers_is_read_in_seconds():
    names = [f"model.layers.{i}.mixer.experts.{j}.{p}" for i in range(23) for j in range(128) for p in ("up_proj", "down_proj")]
    members = {name: ("fp8" if ".layers.2." in name else "nvfp4") for name in names if ".layers.1." not in name}
    excluded = tuple(name for name in names if name not in members)
    targets = Targets(groups_of(members, tuple(names)), excluded)
    for layout in LAYOUTS:
        config, _ = configs(layout, targets, activations=True)
        began = time.process_time()
        scheme = read_scheme("here", {"quantization_config": config}, None)
        found = {name: scheme.group_of(name) for name in names}
        assert time.process_time() - began < 5
        assert found == {name: (members[name], True) if name in members else None for name in names}
