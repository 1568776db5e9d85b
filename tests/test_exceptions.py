"""Layers that stay in BF16 by their position, on made models of the shapes that matter, and in a suite."""

import json
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, NemotronHConfig, Qwen3MoeConfig
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import SuiteError
from harness.plan import make_plan
from harness.store import Store
from harness.suite import load_suite
from qad.backbone import backbone_of
from qad.errors import RecipeError
from qad.exceptions import LayerExceptions, excluded_by_position
from qad.experts import open_experts
from qad.recipe import Recipe, match
from tests.vlm_families import FAMILIES, build_family

WIDTHS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}


def without_weights(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    open_experts(model)
    return model


def hybrid(pattern: str):
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64}
    return without_weights(
        NemotronHConfig(hybrid_override_pattern=pattern, intermediate_size=128, **WIDTHS, **mamba, **experts)
    )


def llama(layers: int = 4):
    return without_weights(LlamaConfig(num_hidden_layers=layers, intermediate_size=128, **WIDTHS))


def layers_of(names) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in names})


def test_the_first_and_last_layers_of_a_hybrid_are_counted_over_layers_of_all_kinds():
    names = excluded_by_position(hybrid("M-M*-M-"), LayerExceptions(first=2, last=2))
    assert names == (
        "model.layers.0.mixer.in_proj",
        "model.layers.0.mixer.out_proj",
        "model.layers.1.mixer.up_proj",
        "model.layers.1.mixer.down_proj",
        "model.layers.5.mixer.in_proj",
        "model.layers.5.mixer.out_proj",
        "model.layers.6.mixer.up_proj",
        "model.layers.6.mixer.down_proj",
    )


def test_the_layer_before_each_attention_layer_stays_and_the_attention_layer_itself_is_not_among_them():
    names = excluded_by_position(hybrid("MEM*EMEM*E"), LayerExceptions(before_attention=True))
    assert layers_of(names) == [2, 7]
    assert {name.rpartition(".")[2] for name in names} == {"in_proj", "out_proj"}


def test_an_attention_layer_at_the_beginning_or_after_another_has_none_before_it():
    assert layers_of(excluded_by_position(hybrid("*M**M-"), LayerExceptions(before_attention=True))) == [1]
    with pytest.raises(RecipeError, match=r"before_attention matches no layer of model\.layers: 1 of 3 layers have attention"):
        excluded_by_position(hybrid("*M-"), LayerExceptions(before_attention=True))


def test_positions_add_up_and_a_layer_that_two_of_them_name_is_there_once():
    names = excluded_by_position(hybrid("M*M-M*-M"), LayerExceptions(first=1, last=1, before_attention=True))
    assert layers_of(names) == [0, 4, 7]
    assert len(set(names)) == len(names)


def test_experts_of_a_layer_stay_with_it_and_its_convolution_and_router_are_not_named():
    names = excluded_by_position(hybrid("EM*-"), LayerExceptions(first=2))
    assert names == (
        *(f"model.layers.0.mixer.experts.{i}.{p}_proj" for i in range(4) for p in ("up", "down")),
        "model.layers.0.mixer.shared_experts.up_proj",
        "model.layers.0.mixer.shared_experts.down_proj",
        "model.layers.1.mixer.in_proj",
        "model.layers.1.mixer.out_proj",
    )
    moe = Qwen3MoeConfig(num_hidden_layers=3, intermediate_size=128, moe_intermediate_size=32, num_experts=4, **WIDTHS)
    last = excluded_by_position(without_weights(moe), LayerExceptions(last=1))
    experts = (f"model.layers.2.mlp.experts.{i}.{p}_proj" for i in range(4) for p in ("gate", "up", "down"))
    assert last == (*(f"model.layers.2.self_attn.{p}_proj" for p in "qkvo"), *experts)


def test_a_plain_decoder_keeps_its_first_and_last_layers_as_a_whole():
    names = excluded_by_position(llama(), LayerExceptions(first=1, last=1))
    assert layers_of(names) == [0, 3]
    assert len(names) == 2 * 7


def test_what_a_position_names_is_what_a_recipe_leaves():
    model = llama()
    names = excluded_by_position(model, LayerExceptions(first=1))
    targets = match(model, Recipe(exclude=("lm_head", *names)))
    assert set(targets.excluded) == {"lm_head", *names}
    assert layers_of(targets.members) == [1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_a_vision_language_model_are_those_of_its_language_backbone(family):
    model = build_family(family)
    backbone = backbone_of(model)
    last = excluded_by_position(model, LayerExceptions(last=1))
    assert len(last) == 7 and set(last) < set(backbone.linears)
    targets = match(model, Recipe(exclude=("*lm_head", *last)))
    assert set(targets.excluded) == {*last, *backbone.outside, *(name for name in backbone.linears if name.endswith("lm_head"))}


def test_before_attention_is_refused_where_every_layer_has_attention():
    with pytest.raises(
        RecipeError, match="before_attention matches no layer of model.layers: every layer has attention.*remove it"
    ):
        excluded_by_position(llama(), LayerExceptions(before_attention=True))


@pytest.mark.parametrize("exceptions", [{"first": 4}, {"first": 2, "last": 2}, {"last": 9}])
def test_exceptions_that_leave_no_layer_are_refused(exceptions):
    with pytest.raises(RecipeError, match=r"exclude_layers: all 4 layers of model\.layers would stay in BF16; lower first"):
        excluded_by_position(llama(), LayerExceptions(**exceptions))


def test_exceptions_that_name_no_layer_are_refused():
    with pytest.raises(RecipeError, match="exclude_layers names no layer; give first, last or before_attention"):
        LayerExceptions()
    with pytest.raises(RecipeError, match=r"exclude_layers\.last: found -1; allowed: 0 or more"):
        LayerExceptions(last=-1)


def test_a_model_whose_layers_are_not_one_list_is_refused_with_the_way_out():
    model = nn.Module()
    model.early, model.late = nn.ModuleList([nn.Linear(16, 16)]), nn.ModuleList([nn.Linear(16, 16)])
    with pytest.raises(RecipeError, match=r"the decoder of Module \(Module\) has 2 lists of modules.*by patterns in exclude"):
        excluded_by_position(model, LayerExceptions(first=1))


def test_layers_without_anything_to_quantize_are_no_exception():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.LayerNorm(16), nn.Linear(16, 16)])
    with pytest.raises(RecipeError, match=r"layers\.0: nothing in there could be quantized; remove exclude_layers"):
        excluded_by_position(model, LayerExceptions(first=1))


# in a suite


def asked_for(tiny_suite, positions: str):
    tiny_suite.write_text(tiny_suite.read_text().replace("[quantization]\n", f"[quantization]\nexclude_layers = {positions}\n"))
    return tiny_suite


def stages_of(path, folder):
    return {stage.label: stage for stage in make_plan(load_suite(path), Store(folder / "cache")).stages}


def test_a_suite_without_positions_has_the_keys_that_it_had_before_there_were_any(tiny_suite, tmp_path):
    for stage in stages_of(tiny_suite, tmp_path).values():
        assert "exclude_layers" not in stage.sections.get("quantization", {}) | stage.sections.get("recipe", {})


def test_positions_are_part_of_what_identifies_calibration_and_checkpoints(tiny_suite, tmp_path):
    before = stages_of(tiny_suite, tmp_path)
    after = stages_of(asked_for(tiny_suite, "{ first = 1 }"), tmp_path)
    changed = {before[label].kind for label in before if before[label].key != after[label].key}
    assert {"calibrate", "quantize", "train"} <= changed
    assert not {"model", "data", "prepare"} & changed


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ("{}", "quantization.exclude_layers: .*names no layer; give first, last or before_attention"),
        ("{ first = -1 }", "quantization.exclude_layers.first: found -1"),
        ("{ frist = 1 }", "quantization.exclude_layers.frist: unknown key; did you mean first?"),
    ],
)
def test_a_mistake_in_the_positions_of_a_suite_is_named(tiny_suite, positions, said):
    with pytest.raises(SuiteError, match=said):
        load_suite(asked_for(tiny_suite, positions))


def test_a_run_records_every_name_that_its_positions_stand_for(tiny_suite, tmp_path, text_at_hand):
    text_at_hand()
    text = asked_for(tiny_suite, "{ last = 1 }").read_text()
    tiny_suite.write_text(re.sub(r"\[\[task\]\]\n.*\nlimit = 8\n", "", text))
    done = CliRunner().invoke(app, ["run", str(tiny_suite), "--results", str(tmp_path / "results"), "--only", "bf16,ptq"])
    assert done.exit_code == 0, done.output
    (about,) = (tmp_path / "results").glob("tiny/*/run.json")
    (ptq,) = (variant for variant in json.loads(about.read_text())["variants"] if variant["name"] == "ptq")
    assert [name.rpartition(".")[0] for name in ptq["excluded"]] == 4 * ["model.layers.1.self_attn"] + 3 * [
        "model.layers.1.mlp"
    ] + [""]


def test_positions_that_no_layer_has_end_a_run_before_anything_is_made(tiny_suite, tmp_path, text_at_hand):
    text_at_hand()
    suite = asked_for(tiny_suite, "{ before_attention = true }")
    done = CliRunner().invoke(app, ["run", str(suite), "--results", str(tmp_path / "results"), "--only", "bf16,ptq"])
    assert done.exit_code == 2
    assert "before_attention matches no layer of model.layers: every layer has attention" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*.q_porj", 'exclude pattern "*.q_porj" matches no linear layer of the model; near names: '),
        ("*", "leaves no linear layer to quantize; narrow the patterns"),
        ("*.q_proj", "model.layers.0.self_attn.qkv_proj: the recipe splits a fused group: "),
    ],
)
def test_a_pattern_that_matches_nothing_or_everything_or_splits_a_group_ends_a_run_with_what_to_do(
    tiny_suite, tmp_path, text_at_hand, pattern, said
):
    text_at_hand()
    tiny_suite.write_text(
        tiny_suite.read_text().replace("[quantization]\n", f'[quantization]\nexclude = ["lm_head", "{pattern}"]\n')
    )
    done = CliRunner().invoke(app, ["run", str(tiny_suite), "--results", str(tmp_path / "results"), "--only", "ptq"])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
