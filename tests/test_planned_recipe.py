"""What the planner takes for quantized is what the core matches, by names alone: patterns, positions, and where a run would end."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from harness import planned_recipe
from harness.architecture_sizes import architecture_of
from harness.known_models import FOLDER, read_known_model
from harness.planned_recipe import fp8_by, gptq_passes, mistakes_of, quantized_by
from harness.schema import Quantization
from harness.suite import load_suite
from harness.time_and_disk import checkpoint_bytes
from qad import gptq
from qad.errors import RecipeError
from qad.exceptions import LayerExceptions, excluded_by_position
from qad.experts import open_experts
from qad.nvfp4 import BLOCK_SIZE
from qad.recipe import FUSED, Recipe, match
from tests.test_architecture_sizes import HYBRID, TINY

DENSE = {**HYBRID, "hybrid_override_pattern": "M-*-M*", "num_hidden_layers": 6}
LLAMA = {**TINY, "model_type": "llama", "num_hidden_layers": 3}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CALIBRATION = {"data": "text", "samples": 8}


def section(**given) -> Quantization:
    return Quantization.model_validate({"calibration": CALIBRATION, **given})


def matched(config, quantization: Quantization) -> set[str]:
    """Names of the weights that the core quantizes of the model that transformers builds; RecipeError where it ends."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    layers = quantization.exclude_layers
    positions = () if layers is None else excluded_by_position(model, LayerExceptions(**layers.model_dump()))
    targets = match(model, Recipe(exclude=(*quantization.exclude, *positions), fp8=quantization.fp8))
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in targets.members)
    return {f"{name}.weight" for name in targets.members}


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (LLAMA, {}),
        (LLAMA, {"exclude": ("lm_head", "*.self_attn.*")}),
        (LLAMA, {"exclude_layers": {"first": 1}}),
        (LLAMA, {"exclude": ("lm_head", "model.layers.0.*"), "exclude_layers": {"first": 1, "last": 1}}),
        ({**LLAMA, "tie_word_embeddings": True}, {}),
        (DENSE, {"exclude_layers": {"first": 2, "last": 2}}),
        (DENSE, {"exclude": ("lm_head", "*.mixer.[qkvo]_proj"), "exclude_layers": {"before_attention": True}}),
    ],
)
def test_the_planner_takes_for_quantized_what_the_core_matches(config, given):
    quantization, architecture = section(**given), architecture_of(config, "config.json")
    assert quantized_by(architecture, quantization) == matched(config, quantization)
    assert mistakes_of(architecture, quantization) == []
    assert quantized_by(architecture, None) == frozenset()


@pytest.mark.parametrize(
    ("config", "given", "line"),
    [
        (LLAMA, {"exclude": ("lm_head", "*.conv1d")}, 'exclude: "*.conv1d" matches nothing of this model'),
        (LLAMA, {"fp8": ("*.mixer.*",)}, 'fp8: "*.mixer.*" matches nothing of this model'),
        (
            LLAMA,
            {"fp8": ("*.1.*.q_proj",)},
            "fp8: splits model.layers.1.self_attn.qkv_proj over two formats: q_proj FP8, k_proj NVFP4",
        ),
        (
            LLAMA,
            {"exclude": ("lm_head", "*.self_attn.*"), "fp8": ("*.q_proj",)},
            "fp8: matches model.layers.0.self_attn.q_proj, which",
        ),
        (
            LLAMA,
            {"exclude_layers": {"first": 1}, "fp8": ("*.self_attn.*",)},
            "fp8: matches model.layers.0.self_attn.q_proj, which",
        ),
        (
            {**LLAMA, "intermediate_size": 90},
            {},
            "exclude: model.layers.0.mlp.down_proj: input width 90 is not a multiple of 16",
        ),
        (LLAMA, {"fp8": ("model.*",)}, "fp8: leaves nothing for NVFP4"),
        (LLAMA, {"exclude": ("*",)}, "exclude: leaves nothing to quantize"),
        (LLAMA, {"exclude": ("lm_head", "*.1.*.q_proj")}, "exclude: splits model.layers.1.self_attn.qkv_proj, of which q_proj"),
        (
            {**LLAMA, "tie_word_embeddings": True},
            {"exclude": ("*.q_proj", "*.k_proj", "*.v_proj")},
            "exclude: lm_head shares its",
        ),
        (LLAMA, {"exclude_layers": {"first": 2, "last": 1}}, "exclude_layers: all 3 layers would stay in BF16"),
        (LLAMA, {"exclude_layers": {"before_attention": True}}, "exclude_layers.before_attention: no layer without attention"),
    ],
)
def test_a_section_that_would_end_a_run_is_said_and_does_end_it(config, given, line):
    quantization = section(**given)
    said = mistakes_of(architecture_of(config, "config.json"), quantization)
    assert any(each.startswith(f"quantization.{line}") and each.endswith(": the run would end with it") for each in said)
    with pytest.raises(RecipeError):
        matched(config, quantization)


def test_layers_in_fp8_are_those_of_the_core_and_take_a_byte_a_weight():
    quantization, architecture = section(fp8=("*.self_attn.*",)), architecture_of(LLAMA, "config.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
    groups = match(model, Recipe(exclude=quantization.exclude, fp8=quantization.fp8)).groups
    fp8, quantized = fp8_by(architecture, quantization), quantized_by(architecture, quantization)
    assert fp8 == {f"{name}.weight" for group in groups if group.format == "fp8" for name in group.members}
    assert mistakes_of(architecture, quantization) == []
    eights = sum(weight.size for weight in architecture.weights if "self_attn" in weight.name)
    more = checkpoint_bytes(architecture, quantized, fp8) - checkpoint_bytes(architecture, quantized)
    assert eights and more == (1 - 0.5625) * eights


def test_experts_are_linear_layers_of_their_own_that_patterns_and_positions_name():
    architecture = architecture_of(HYBRID, "config.json")
    names = quantized_by(architecture, section(exclude=("lm_head", "model.layers.0.*")))
    assert {name.removeprefix("model.layers.").removesuffix(".weight") for name in names} == {
        *(f"1.mixer.experts.{index}.{leaf}_proj" for index in range(4) for leaf in ("up", "down")),
        *(f"{layer}.{leaf}_proj" for layer in ("1.mixer.shared_experts", "3.mixer") for leaf in ("up", "down")),
        *(f"2.mixer.{leaf}_proj" for leaf in "qkvo"),
        *("4.mixer.in_proj", "4.mixer.out_proj"),
    }
    by_position = quantized_by(architecture, section(exclude_layers={"before_attention": True}))
    assert by_position and not any(name.startswith("model.layers.1.") for name in by_position)


def test_a_gate_without_its_way_up_is_a_split_group_in_experts_too():
    config = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    said = mistakes_of(architecture_of(config, "config.json"), section(exclude=("lm_head", "*.experts.1.up_proj")))
    assert said[0] == (
        "quantization.exclude: splits model.layers.0.mlp.experts.1.gate_up_proj, of which up_proj would stay; exclude all of it or nothing: "
        "the run would end with it"
    )


MIXTURE = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("config", "given", "line"),
    [
        (
            MIXTURE,
            {"exclude": ("lm_head", "model.layers.1.mlp.experts.3.*")},
            'exclude: splits the experts of model.layers.1.mlp.experts: model.layers.1.mlp.experts.0.gate_proj NVFP4, model.layers.1.mlp.experts.3.gate_proj BF16; name all of them, "model.layers.1.mlp.experts.*", or none',
        ),
        (
            MIXTURE,
            {"fp8": ("*.experts.*.down_proj",)},
            "fp8: splits the experts of model.layers.0.mlp.experts: model.layers.0.mlp.experts.0.gate_proj NVFP4, model.layers.0.mlp.experts.0.down_proj FP8",
        ),
        (HYBRID, {"exclude": ("lm_head", "*.experts.0.*")}, "exclude: splits the experts of model.layers.1.mixer.experts: "),
    ],
    ids=["one expert", "one projection", "a hybrid"],
)
def test_some_experts_of_a_layer_alone_would_end_a_run_and_do(config, given, line):
    from qad.errors import SplitError
    from qad.experts import open_experts

    said = mistakes_of(architecture_of(config, "config.json"), section(**given))
    assert len(said) == 1 and said[0].startswith(f"quantization.{line}") and said[0].endswith(": the run would end with it")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    open_experts(model)
    recipe = Recipe(**{"exclude": ("lm_head",), **given})
    with pytest.raises(SplitError, match="the experts of a layer"):
        match(model, recipe)
    whole = section(exclude=("lm_head", "*.experts.*"))
    assert mistakes_of(architecture_of(config, "config.json"), whole) == []


def test_a_language_model_inside_of_another_is_named_with_and_without_what_is_before_it():
    config = {"model_type": "vlm", "llm_config": LLAMA, "vision_config": {"args": {"model": "vit_huge"}}}
    architecture = architecture_of(config, "config.json")
    for exclude in (("lm_head", "model.layers.0.*"), ("language_model.lm_head", "language_model.model.layers.0.*")):
        quantization = section(exclude=exclude)
        assert mistakes_of(architecture, quantization) == []
        names = quantized_by(architecture, quantization)
        assert names and all(".layers.0." not in name and "lm_head" not in name for name in names)


@pytest.mark.parametrize(
    ("name", "suite"), [("nemotron-nano-9b-v2", "nemotron-nano-v2"), ("nemotron-3-nano-30b-a3b", "nemotron-3-nano")]
)
def test_the_planner_leaves_out_what_the_released_checkpoint_leaves_out(name, suite):
    known = read_known_model(FOLDER / f"{name}.json")
    architecture = architecture_of(known.config, "config.json")
    suite_file = FOLDER.parent.parent / "suites" / f"{suite}.toml"
    quantization = next(each.quantization for each in load_suite(suite_file).variants if each.quantization)
    assert mistakes_of(architecture, quantization) == []
    quantized = quantized_by(architecture, quantization)
    candidates = [weight for weight in architecture.weights if weight.kind in ("linear", "experts", "head")]
    left = {weight.module.replace("model.", "backbone.", 1) for weight in candidates if weight.name not in quantized}
    assert left == {each for each in known.released["exclude_modules"] if not each.endswith(".conv1d")}


def test_fused_groups_and_the_bounds_of_gptq_are_those_of_the_core():
    assert (planned_recipe._FUSED, planned_recipe._BLOCK) == (FUSED, BLOCK_SIZE)
    assert (planned_recipe._HESSIAN_BYTES, planned_recipe._MOST_PASSES) == (gptq.HESSIAN_BYTES, gptq.MOST_PASSES)


@pytest.mark.parametrize("width", [64, 2048])
@pytest.mark.parametrize("config", [LLAMA, DENSE, HYBRID, {**LLAMA, **EXPERTS}])
def test_the_passes_of_gptq_are_counted_as_the_core_takes_them(config, width):
    config = {**config, "hidden_size": width}
    quantization, architecture = section(), architecture_of(config, "config.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    open_experts(model)
    portions = gptq.require_few_passes(model, match(model, Recipe()).groups)
    assert gptq_passes(architecture, quantized_by(architecture, quantization)) == len(portions)
    assert (len(portions) > 1) == (width > 64)


def test_gptq_over_thousands_of_experts_is_a_mistake_and_over_the_rest_of_the_model_is_none():
    known = read_known_model(FOLDER / "nemotron-3-nano-30b-a3b.json")
    architecture = architecture_of(known.config, "config.json")
    gptq_of = {"scale_rule": "gptq", "block_scales": "frozen"}
    (said,) = mistakes_of(architecture, section(**gptq_of))
    assert 'quantization.scale_rule: "gptq" would take 3,' in said and "at most 500" in said and "the run would end" in said
    assert mistakes_of(architecture, section(exclude=("lm_head", "*.experts.*"), **gptq_of)) == []
    assert mistakes_of(architecture, section()) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"exclude_layers": {"first": 3}}, ["exclude_layers: all 3 layers would stay in BF16; lower first (3) or last (0): "]),
        (
            {"exclude_layers": {"first": 400}},
            ["exclude_layers.first: found 400; the model has 3 layers: ", "exclude_layers: all 3 layers would stay in BF16; "],
        ),
        ({"exclude": ("*",)}, ["exclude: leaves nothing to quantize; narrow the patterns: "]),
        ({"exclude": ("*.q_proj",)}, ["exclude: splits model.layers.0.self_attn.qkv_proj, of which q_proj would stay; exclude all of it or nothing"]),
        ({"fp8": ("*.q_proj",)}, ["fp8: splits model.layers.0.self_attn.qkv_proj over two formats: q_proj FP8, k_proj NVFP4, v_proj NVFP4; give all"]),
    ],
)  # fmt: skip
def test_each_mistake_is_told_once_with_what_to_do_and_blames_what_made_it(given, told):
    found = mistakes_of(architecture_of(LLAMA, "config.json"), section(**({"exclude": ("lm_head",)} | given)))
    assert len(found) == len(told) and all(
        line.startswith(f"quantization.{each}") for line, each in zip(found, told, strict=True)
    ), found
