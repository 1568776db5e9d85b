"""The paper's systems: which modules their suites quantize and leave on the real shapes, by the names in files.

Held against what the released checkpoints publish as left out, and against what the paper and NVIDIA's report say where nothing is published.
Shapes only: every model is made on the meta device, from fields that are kept in harness/known_models with their source.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from harness.known_models import FOLDER, known_model
from harness.recipes import recipe_of
from harness.schema import Quantization
from harness.suite import load_suite
from qad.building import native_class
from qad.checkpoint import _as_stored
from qad.experts import open_experts
from qad.layouts import LAYOUTS, configs
from qad.recipe import Targets, match
from qad.stored_names import stored_layers

SUITES = Path(__file__).parent.parent / "suites"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
SYSTEMS = ("acereason", "llama-nemotron-super", "nemotron-3-nano", "nemotron-nano-v2", "nemotron-nano-v2-vl")
KINDS = {"M": "linear_attention", "-": "mlp", "*": "full_attention", "E": "moe"}
PARTS = {"M": ("in", "out"), "-": ("up", "down"), "*": tuple("qkvo")}
"""The projections of a layer of `nemotron_h`, by the sign of its pattern."""


def about(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def model_of(name: str) -> nn.Module:
    """The model with experts opened, as every stage has it, without weights."""
    config, _ = native_class(about(name)["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    open_experts(model)
    return model


def quantization_of(suite: str) -> Quantization:
    """That of the quantized variants of a suite, which is one."""
    (found,) = {variant.quantization for variant in load_suite(SUITES / f"{suite}.toml").variants if variant.quantization}
    return found


@cache
def targets_of(name: str, suite: str) -> Targets:
    model = model_of(name)
    return match(model, recipe_of(quantization_of(suite), model))


@cache
def names_in_files(name: str) -> dict[str, str]:
    return stored_layers(model_of(name))


def in_files(name: str, layers: Iterable[str]) -> set[str]:
    return {names_in_files(name)[layer] for layer in layers}


def hybrid_layers(name: str) -> Iterator[str]:
    """The linear layers of a `nemotron_h` model but for its output head, as its files call them: from its pattern alone."""
    config = about(name)["config"]
    for index, sign in enumerate(config["hybrid_override_pattern"]):
        mixer = f"backbone.layers.{index}.mixer"
        if sign == "E":
            experts = [f"experts.{expert}" for expert in range(config["n_routed_experts"])]
            yield from (f"{mixer}.{part}.{side}_proj" for part in (*experts, "shared_experts") for side in ("up", "down"))
        else:
            yield from (f"{mixer}.{part}_proj" for part in PARTS[sign])


def deci_layers(name: str) -> Iterator[str]:
    """The linear layers of a DeciLM model but for its output head."""
    for index, block in enumerate(about(name)["config"]["block_configs"]):
        if not block["attention"]["no_op"]:
            yield from (f"model.layers.{index}.self_attn.{part}_proj" for part in "qkvo")
        if not block["ffn"]["no_op"]:
            yield from (f"model.layers.{index}.mlp.{part}_proj" for part in ("gate", "up", "down"))


def llama_layers(name: str) -> Iterator[str]:
    for index in range(about(name)["config"]["num_hidden_layers"]):
        yield from (f"model.layers.{index}.self_attn.{part}_proj" for part in "qkvo")
        yield from (f"model.layers.{index}.mlp.{part}_proj" for part in ("gate", "up", "down"))


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_says_where_its_fields_are_from(name):
    found = about(name)
    assert len(found["source"]) > 50 and isinstance(found["verified"], bool)
    if not found["verified"]:
        assert "not found" in found["source"]


@pytest.mark.parametrize(
    ("name", "suite"), [("nemotron-nano-9b-v2", "nemotron-nano-v2"), ("nemotron-3-nano-30b-a3b", "nemotron-3-nano")]
)
def test_a_suite_quantizes_and_leaves_the_modules_that_the_released_checkpoint_does(name, suite):
    published = set(about(name)["released"]["exclude_modules"])
    convolutions = {part for part in published if part.endswith(".conv1d")}
    targets = targets_of(name, suite)
    assert in_files(name, targets.excluded) == published - convolutions
    assert in_files(name, targets.members) == {*hybrid_layers(name), "lm_head"} - published
    assert convolutions == in_files(name, [n for n, m in model_of(name).named_modules() if isinstance(m, nn.Conv1d)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "suite", "routers"),
    [("nemotron-nano-9b-v2", "nemotron-nano-v2", 0), ("nemotron-3-nano-30b-a3b", "nemotron-3-nano", 23)],
)
def test_an_export_lists_what_the_released_checkpoint_lists_and_the_routers_beside(name, suite, routers, layout):
    """ModelOpt leaves routers alone without listing them; vLLM may build them as linear layers, so ours are named."""
    published = about(name)["released"]["exclude_modules"]
    config, _ = configs(layout, _as_stored(targets_of(name, suite), names_in_files(name)), activations=True)
    moe = [index for index, sign in enumerate(about(name)["config"]["hybrid_override_pattern"]) if sign == "E"]
    assert len(moe) == routers
    assert sorted(config["ignore"]) == sorted([*published, *(f"backbone.layers.{index}.mixer.gate" for index in moe)])


def test_nano_3_leaves_the_layers_that_the_published_configuration_names_and_quantizes_every_expert():
    name = "nemotron-3-nano-30b-a3b"
    targets = targets_of(name, "nemotron-3-nano")
    left = {f"backbone.layers.{i}.mixer.{part}_proj" for i in (4, 11, 18, 25, 32, 41) for part in ("in", "out")}
    left |= {f"backbone.layers.{i}.mixer.{part}_proj" for i in (5, 12, 19, 26, 33, 42) for part in "qkvo"}
    assert in_files(name, targets.excluded) == left | {"lm_head"}
    parts = Counter(part.split(".mixer.")[1].split(".")[0] for part in in_files(name, targets.members))
    assert parts == {"in_proj": 17, "out_proj": 17, "experts": 23 * 128 * 2, "shared_experts": 23 * 2}
    shared_inputs = {group.input_name for group in targets.groups if group.experts}
    assert len(shared_inputs) == 23 * 2  # one scale a projection across all experts of a layer
    assert not any("gate" in member for member in targets.members)  # relu2 without a gate; the router is left alone
    assert 31.0 < sum(parameter.numel() for parameter in model_of(name).parameters()) / 1e9 < 32.0


@pytest.mark.parametrize("name", ["llama-nemotron-super-v1-49b", "llama-nemotron-ultra-v1-253b"])
def test_all_linear_layers_of_a_deci_model_but_its_output_head_are_quantized(name):
    """The paper: all GEMM layers. NVIDIA published no NVFP4 checkpoint of either."""
    suite = "llama-nemotron-super" if "super" in name else "ablations/llama_nemotron_ultra_ptq"
    targets = targets_of(name, suite)
    assert about(name)["released"] is None
    assert in_files(name, targets.excluded) == {"lm_head"}
    assert in_files(name, targets.members) == set(deci_layers(name))


def test_super_has_80_blocks_of_which_49_have_attention_and_whose_sizes_make_49_billion():
    name = "llama-nemotron-super-v1-49b"
    groups = Counter(group.name.rpartition(".")[2] for group in targets_of(name, "llama-nemotron-super").groups)
    assert groups == {"qkv_proj": 49, "o_proj": 49, "gate_up_proj": 80, "down_proj": 80}
    model = model_of(name)
    assert {block.mlp.up_proj.out_features for block in model.model.layers} == {2816, 5632, 7168, 14336, 17920, 28672}
    assert 49.5e9 < sum(parameter.numel() for parameter in model.parameters()) < 50.0e9


def test_acereason_is_unverified_and_its_rule_leaves_the_output_head_alone():
    """The author: embedding and output head stay BF16. Neither its configuration nor an NVFP4 checkpoint of it was found."""
    name = "acereason-nemotron-1.1-7b"
    known, text = known_model("nvidia/AceReason-Nemotron-1.1-7B"), (SUITES / "acereason.toml").read_text()
    assert known is not None and not known.verified and known.released is None and "not found in public" in text
    targets = targets_of(name, "acereason")
    assert in_files(name, targets.excluded) == {"lm_head"}
    assert in_files(name, targets.members) == set(llama_layers(name)) and len(targets.members) == 7 * 28
    assert 7.5 < sum(parameter.numel() for parameter in model_of(name).parameters()) / 1e9 < 7.7


def test_the_vl_model_is_unverified_and_its_rule_quantizes_the_whole_backbone():
    """On the language backbone alone, the nearest native class: the whole is remote code. Towers are in tests/test_vlm_models.py.

    NVIDIA's report: all linear layers of the language backbone. The exclusions of the release were not found in public.
    """
    name = "nemotron-nano-12b-v2-vl"
    known, text = known_model("nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16"), (SUITES / "nemotron-nano-v2-vl.toml").read_text()
    assert known is not None and not known.verified and "exclude_modules" not in (known.released or {})
    assert "was not found in public: unverified" in text
    targets = targets_of(name, "nemotron-nano-v2-vl")
    assert in_files(name, targets.excluded) == {"lm_head"}
    assert in_files(name, targets.members) == set(hybrid_layers(name)) and len(targets.members) == 2 * (28 + 28) + 4 * 6
    assert 12.0 < sum(parameter.numel() for parameter in model_of(name).parameters()) / 1e9 < 12.6


def test_ablations_quantize_as_the_suite_of_their_system():
    systems = {load_suite(SUITES / f"{suite}.toml").model.path: suite for suite in SYSTEMS}
    ablations = [path.stem for path in sorted((SUITES / "ablations").glob("*.toml"))]
    of_system = {name: systems.get(load_suite(SUITES / f"ablations/{name}.toml").model.path) for name in ablations}
    held = {
        name for name, suite in of_system.items() if suite and quantization_of(f"ablations/{name}") == quantization_of(suite)
    }
    assert held == {name for name, suite in of_system.items() if suite} and len(held) == 9


def test_the_kv_cache_is_kept_as_the_release_has_it_where_that_is_known():
    assert about("nemotron-3-nano-30b-a3b")["released"]["kv_cache_quant_algo"] == "FP8"
    assert quantization_of("nemotron-3-nano").kv_cache == "fp8"
    assert len(targets_of("nemotron-3-nano-30b-a3b", "nemotron-3-nano").kv_cache) == 6
    assert about("nemotron-nano-9b-v2")["released"]["kv_cache_quant_algo"] is None
    assert quantization_of("nemotron-nano-v2").kv_cache == "bf16"


@pytest.mark.parametrize(
    ("name", "layers", "kinds"),
    [
        ("nemotron-nano-9b-v2", 56, {"linear_attention": 27, "mlp": 25, "full_attention": 4}),
        ("nemotron-3-nano-30b-a3b", 52, {"linear_attention": 23, "moe": 23, "full_attention": 6}),
        ("nemotron-nano-12b-v2-vl", 62, {"linear_attention": 28, "mlp": 28, "full_attention": 6}),
    ],
)
def test_a_hybrid_has_the_layers_that_its_pattern_says(name, layers, kinds):
    config = model_of(name).config
    assert config.num_hidden_layers == layers == len(about(name)["config"]["hybrid_override_pattern"])
    assert Counter(config.layer_types) == kinds
    assert [KINDS[sign] for sign in about(name)["config"]["hybrid_override_pattern"]] == list(config.layer_types)
