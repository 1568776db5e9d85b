"""What a rehearsal finds without weights: recipes that do not fit the real architecture."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from harness.architecture_sizes import architecture_of
from harness.known_models import known_model
from harness.planned_recipe import gptq_passes, quantized_by
from harness.rehearsal_checks import Share, check_recipes
from harness.suite import load_suite

REPOSITORY = Path(__file__).parent.parent
SMALL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


def suite_of(name: str):
    return load_suite(REPOSITORY / "suites" / f"{name}.toml")


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


def small_suite(folder: Path, *, kind: str = "text", variants: tuple = (), **quantization):
    variants = ({"name": "bf16", "method": "bf16"}, {"name": "ptq", "method": "ptq"}, *variants)
    given = {
        "schema": 1,
        "name": "small",
        "model": {"path": "org/model", "revision": "0" * 40, "kind": kind},
        "quantization": {"exclude": ["lm_head"], "calibration": {"data": "text"}} | quantization,
        "data": {"text": {"source": "builtin", "seq_len": 64}},
        "engine": {"kind": "hf"},
        "diagnostics": {"data": "text", "samples": 4},
    }
    lines = [f"{key} = {toml(value)}" for key, value in given.items()]
    lines.append(f"variant = [{', '.join(map(toml, variants))}]")
    path = folder / "small.toml"
    path.write_text("\n".join(lines))
    return load_suite(path)


def checked(folder: Path, **quantization):
    (recipe,) = check_recipes(small_suite(folder, **quantization), SMALL).recipes
    return recipe


def test_the_layers_that_a_recipe_quantizes_and_leaves_are_counted_by_name(tmp_path):
    recipe = checked(tmp_path, fp8=["*.down_proj"], kv_cache="fp8")
    assert recipe.problem is None
    assert recipe.formats == {"nvfp4": 6 * 4, "fp8": 4} and recipe.quantized == 28
    assert (recipe.left, recipe.kv_cache) == (1, 4)
    assert recipe.shares[0] == Share("q_proj", 4, 0) and recipe.shares[-1] == Share("lm_head", 0, 1)


@pytest.mark.parametrize(
    ("quantization", "problem"),
    [
        ({"exclude": ["lm_head", "*.mixer.[qkvo]_proj"]}, 'exclude pattern "*.mixer.[qkvo]_proj" matches no linear layer'),
        ({"exclude": ["*"]}, "leaves no linear layer to quantize"),
        ({"exclude": ["lm_head", "*.q_proj"]}, "splits a fused group"),
        ({"fp8": ["*.up_proj"]}, "splits a fused group over two formats"),
        ({"fp8": ["*_porj"]}, 'fp8 pattern "*_porj" matches no linear layer'),
        ({"exclude_layers": {"before_attention": True}}, "every layer has attention"),
        ({"exclude_layers": {"first": 2, "last": 2}}, "all 4 layers of model.layers would stay in BF16"),
    ],
)
def test_a_recipe_that_would_end_the_run_is_found_with_the_reason(quantization, problem, tmp_path):
    recipe = checked(tmp_path, **quantization)
    assert problem in recipe.problem and recipe.quantized == recipe.left == 0


def test_a_problem_names_the_variants_that_have_it(tmp_path):
    other = {"name": "other", "method": "ptq", "quantization": {"exclude": ["lm_head", "*.k_proj"]}}
    same = {"name": "same", "method": "ptq", "quantization": {"tensor_scale": "amax"}}
    found = check_recipes(small_suite(tmp_path, variants=(other, same)), SMALL)
    assert [recipe.variants for recipe in found.recipes] == [("ptq", "same"), ("other",)]
    assert len(found.problems) == 1 and found.problems[0].startswith(
        "other: model.layers.0.self_attn.qkv_proj: the recipe splits"
    )


def test_an_architecture_that_cannot_be_built_is_named_and_not_called_right(tmp_path):
    found = check_recipes(small_suite(tmp_path), {"model_type": "unheard-of"})
    assert found.model_class is None and not found.recipes and "model_type 'unheard-of' cannot be built here" in found.unchecked


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"hidden_size": "64"}, "'hidden_size'"),
        ({"vocab_size": None}, "'vocab_size'"),
        ({"layer_types": ["odd"] * 4}, "layer_types"),
        ({"num_attention_heads": 0}, "division"),
        ({"intermediate_size": -4}, "negative dimension -4"),
    ],
)
def test_a_configuration_that_is_no_model_is_said_to_be_unchecked(wrong, reason, tmp_path):
    found = check_recipes(small_suite(tmp_path), SMALL | wrong)
    assert found.model_class is None and "cannot be built here" in found.unchecked and reason in found.unchecked


def test_the_language_model_alone_is_said_to_be_all_that_is_checked_of_a_model_that_sees(tmp_path):
    found = check_recipes(small_suite(tmp_path, kind="image-text"), SMALL)
    assert found.recipes[0].quantized == 28 and "the language model alone" in found.unchecked


def test_a_suite_without_a_recipe_has_nothing_to_check():
    suite = suite_of("released/nemotron-nano-v2")
    found = check_recipes(suite, known_model(suite.model.path).config)
    assert found.recipes == () and found.unchecked == "no variant of the suite is quantized here"


@pytest.mark.parametrize(
    ("name", "quantized", "left", "kv_cache"),
    [
        ("acereason", 7 * 28, 1, 0),
        ("nemotron-nano-v2", 2 * (27 + 25) - 8, 8 + 1 + 4 * 4, 0),
        ("nemotron-nano-v2-vl", 2 * (28 + 28) + 4 * 6, 1, 0),
        ("llama-nemotron-super", 4 * 49 + 3 * 80, 1, 0),
    ],
)
def test_the_recipes_of_the_paper_fit_the_real_architectures(name, quantized, left, kv_cache):
    suite = suite_of(name)
    found = check_recipes(suite, known_model(suite.model.path).config)
    assert found.problems == []
    (recipe,) = found.recipes
    assert (recipe.quantized, recipe.left, recipe.kv_cache) == (quantized, left, kv_cache)


def test_among_thousands_of_experts_a_wrong_pattern_and_gptq_are_found_and_the_right_recipe_counted():
    suite = suite_of("nemotron-3-nano")
    wrong = [variant for variant in suite.variants if variant.name == "ptq"]
    given = wrong[0].quantization.model_copy(update={"exclude": ("lm_head", "*.experts.7.gate_proj")})
    variants = tuple(replace(each, quantization=given) if each in wrong else each for each in suite.variants)
    (qat,) = (variant for variant in variants if variant.name == "qat")
    by_gptq = qat.quantization.model_copy(update={"scale_rule": "gptq", "block_scales": "frozen"})
    variants = (*variants, replace(qat, name="gptq", quantization=by_gptq))
    found = check_recipes(replace(suite, variants=variants), known_model(suite.model.path).config)
    assert len(found.problems) == 2 and found.problems[0].startswith("ptq: ")
    assert re.match(r'gptq: scale_rule "gptq" would take 3024 passes .*at most 500 are allowed: choose', found.problems[1])
    assert '"*.experts.7.gate_proj" matches no linear layer' in found.problems[0]
    architecture = architecture_of(known_model(suite.model.path).config, "config.json")
    assert gptq_passes(architecture, quantized_by(architecture, by_gptq)) == 3024
    right = found.recipes[1]
    assert right.quantized == 2 * 17 + 2 * 23 + 2 * 23 * 128
    assert (right.left, right.kv_cache) == (1 + 4 * 6 + 2 * 6, 6)
    assert Share("experts.*.up_proj", 23 * 128, 0) in right.shares and Share("in_proj", 17, 6) in right.shares
