"""Image-text models: what is found to read text, what a recipe leaves, and checkpoints under the names that engines know."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qad.backbone import backbone_of
from qad.building import native_class
from qad.calibrate import calibrate
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.errors import CheckpointError, RecipeError
from qad.export import copy_checkpoint
from qad.footprint import footprint, tensor_types
from qad.layers import layers_of
from qad.packed import read_encodings
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from qad.verify import verify
from tests.vlm_families import FAMILIES, IMAGE, PROJECTORS, build_family, images_of

LAYOUTS = ("modelopt", "compressed-tensors")
TOWER = "model.vision_model.encoder.layers.0.self_attn.q_proj.weight"


def text(n=2):
    ids = torch.arange(10, 10 + 30 * n).reshape(n, 30) % 128
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_images(name, n=2):
    """`n` sequences with an image in the middle of each."""
    length, inputs = images_of(name, n)
    ids = torch.arange(10, 10 + 30 * n).reshape(n, 30)
    ids[:, 4 : 4 + length] = IMAGE
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def quantized(folder, recipe, batches):
    """The model of a folder, quantized, with its targets."""
    model = load_checkpoint(folder).model
    targets = match(model, recipe)
    quantize_model(model, recipe, calibrate(model, recipe, batches) if recipe.activations else None)
    return model, targets


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs, use_cache=False).logits


def digests(tensors):
    return {
        name: hashlib.sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest() for name, t in tensors.items()
    }


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """The folder of a family's random model, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "bf16"
            build_family(name, made[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_that_read_text_are_those_that_a_text_runs_through(name):
    model = build_family(name)
    seen = set()
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, module_name=module_name: seen.add(module_name))
    logits(model, text())
    found = backbone_of(model)
    assert set(found.linears) == seen
    assert set(found.outside) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - seen
    assert PROJECTORS[name] in found.outside


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_quantizes_the_backbone_alone_and_lists_all_that_stays(name):
    model = build_family(name)
    targets = match(model, Recipe())
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(targets.members) | set(targets.excluded) == linears
    assert not set(targets.members) & set(targets.excluded)
    assert {"lm_head", PROJECTORS[name]} <= set(targets.excluded)
    assert {name.rpartition(".")[2] for name in targets.members} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert len(targets.members) == 14
    assert len({group.name for group in targets.groups}) == len(targets.groups) == 8
    assert len(match(model, Recipe(kv_cache="fp8")).kv_cache) == 2
    assert len(layers_of(model)) == 2


def test_a_model_of_text_alone_is_all_backbone(tiny_model):
    model = load_checkpoint(tiny_model).model
    found = backbone_of(model)
    assert (found.decoder, found.outside) == ("", ())
    assert "lm_head" in found.linears


@pytest.mark.parametrize("key", ["exclude", "fp8"])
def test_a_pattern_for_a_part_that_stays_bf16_anyway_is_refused(key):
    model = build_family("idefics3")
    patterns = {"exclude": ("lm_head", "model.vision_model.*"), "fp8": ("model.vision_model.*",)}[key]
    with pytest.raises(
        RecipeError, match=rf'{key} pattern "model.vision_model.\*" has no effect: .*outside the language backbone'
    ):
        match(model, Recipe(**{"exclude": ("lm_head",)} | {key: patterns}))


def test_a_pattern_that_reaches_into_the_backbone_takes_only_what_is_there():
    targets = match(build_family("idefics3"), Recipe(exclude=("lm_head", "*.q_proj", "*.k_proj", "*.v_proj")))
    assert len(targets.members) == 8


def test_parts_whose_decoder_is_not_to_be_found_are_refused():
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = FAMILIES["idefics3"]()
            self.head = nn.Linear(16, 16)

    with pytest.raises(RecipeError, match="Blind: its language backbone is not to be found: no part has an output head"):
        match(Blind(), Recipe())


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "modelopt") for name in FAMILIES), *((name, "compressed-tensors") for name in ("idefics3", "llava", "qwen2_vl"))],
)
def test_a_checkpoint_has_the_names_that_transformers_saves_and_comes_back_bit_for_bit(family, tmp_path, name, layout):
    folder = family(name)
    model, targets = quantized(folder, Recipe(kv_cache="fp8"), [text()])
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=folder, record={}, layout=layout)
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.kernels == {"linear": "w4a4_emulation", "kv_cache": "fp8_emulation"}
    assert torch.equal(logits(loaded.model, text()), logits(model, text()))
    found = verify(tmp_path / "out")
    assert found.problems == () and not found.is_guessed
    assert (found.formats, found.n_left) == ({"nvfp4": 14}, len(targets.excluded))

    source, stored = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    layers = set(read_encodings(tmp_path / "out"))
    assert len(layers) == 14 and {f"{layer}.weight" for layer in layers} <= set(source)
    rest = {name: tensor for name, tensor in source.items() if name.removesuffix(".weight") not in layers}
    assert digests(rest) == digests({name: stored[name] for name in rest})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    left = config["quantization_config"]["ignore"]
    assert {f"{name}.weight" for name in left} - set(source) <= {"lm_head.weight", "language_model.lm_head.weight"}  # tied
    assert not set(left) & layers


@pytest.mark.parametrize("name", ["idefics3", "llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_images_reach_calibration_and_a_loaded_checkpoint_answers_them_alike(family, tmp_path, name):
    folder = family(name)
    both = [text(), with_images(name)]
    model, targets = quantized(folder, Recipe(), both)
    inputs = with_images(name)
    changed = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    assert not torch.equal(logits(model, inputs), logits(model, changed))
    for layout in LAYOUTS:
        write_checkpoint(tmp_path / layout, model, targets=targets, companions=folder, record={}, layout=layout)
        assert torch.equal(logits(load_checkpoint(tmp_path / layout).model, inputs), logits(model, inputs))
    amax = [calibrate(load_checkpoint(folder).model, Recipe(), batches) for batches in ([text()], [with_images(name)], both)]
    assert all(amax[2][group] == max(amax[0][group], amax[1][group]) for group in amax[2])
    assert amax[1] != amax[0]


@pytest.mark.parametrize("name", ["idefics3", "llava"])
def test_a_copy_in_the_other_layout_keeps_every_tensor_of_the_tower(family, tmp_path, name):
    folder = family(name)
    model, targets = quantized(folder, Recipe(), [text()])
    write_checkpoint(tmp_path / "one", model, targets=targets, companions=folder, record={})
    assert copy_checkpoint(tmp_path / "one", tmp_path / "other", layout="compressed-tensors") == 0
    assert verify(tmp_path / "other").problems == ()
    inputs = with_images(name)
    assert torch.equal(logits(load_checkpoint(tmp_path / "other").model, inputs), logits(model, inputs))
    one, other = (json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("one", "other"))
    assert set(one["ignore"]) == set(other["ignore"])
    assert footprint(tmp_path / "one").n_weights == footprint(folder).n_weights
    types = tensor_types(tmp_path / "other")
    assert {type for name, type in types.items() if "vision" in name or "connector" in name or "projector" in name} == {"BF16"}


@pytest.mark.parametrize(
    "naming",
    [
        {"vision_tower.": "vision_tower.vision_model."},
        {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.", "vision_": "model.vision_"}
        | {"multi_modal_projector.": "model.multi_modal_projector."},
    ],
    ids=["as older transformers saved it", "as in memory"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_keeps_the_names_of_the_files_that_its_model_came_from(family, tmp_path, naming, layout):
    folder = tmp_path / "renamed"
    folder.mkdir()
    source = {}
    for name, tensor in load_file(family("llava") / "model.safetensors").items():
        old = next((old for old in naming if name.startswith(old)), "")
        source[naming.get(old, "") + name.removeprefix(old)] = tensor
    save_file(source, folder / "model.safetensors")
    (folder / "config.json").write_bytes((family("llava") / "config.json").read_bytes())
    model, targets = quantized(folder, Recipe(kv_cache="fp8"), [text()])
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=folder, record={}, layout=layout)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layers = set(read_encodings(tmp_path / "out"))
    rest = {name: tensor for name, tensor in source.items() if name.removesuffix(".weight") not in layers}
    assert digests(rest) == digests({name: stored[name] for name in rest})
    assert {f"{layer}.weight" for layer in layers} <= set(source)
    assert verify(tmp_path / "out").problems == ()
    assert torch.equal(logits(load_checkpoint(tmp_path / "out").model, text()), logits(model, text()))


def test_a_checkpoint_to_start_from_is_found_by_its_names_in_files(family, tmp_path):
    folder = family("qwen2_vl")
    model, targets = quantized(folder, Recipe(), [text()])
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=folder, record={})
    again = load_checkpoint(folder).model
    quantize_model(again, Recipe(), calibrate(again, Recipe(), [text()]), start=read_encodings(tmp_path / "out"))
    assert torch.equal(logits(again, text()), logits(model, text()))


def test_layers_that_another_writer_lists_by_their_names_in_memory_are_left_alone(family, tmp_path):
    folder = family("llava")
    model, targets = quantized(folder, Recipe(), [text()])
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=folder, record={}, layout="compressed-tensors")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert "language_model.lm_head" in config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = list(targets.excluded)
    path.write_text(json.dumps(config))
    assert torch.equal(logits(load_checkpoint(tmp_path / "out").model, text()), logits(model, text()))
    assert verify(tmp_path / "out").problems == ()


@pytest.fixture
def packed(tiny_vlm, tmp_path):
    model, targets = quantized(tiny_vlm, Recipe(activations=False), [])
    write_checkpoint(tmp_path / "packed", model, targets=targets, companions=tiny_vlm, record={})
    return tmp_path / "packed"


def test_the_files_of_the_processor_come_along(tiny_vlm, packed):
    names = {path.name for path in tiny_vlm.iterdir()} - {"model.safetensors", "config.json"}
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    for name in names:
        assert (packed / name).read_bytes() == (tiny_vlm / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[TOWER].view(-1)[3:5].fill_(float("nan")), "holds 2 values that are NaN"),
        (lambda t: t.pop(TOWER), "missing; the architecture has it"),
        (lambda t: t.update({TOWER: t[TOWER][:-1].clone()}), r"has shape \(31, 32\), the architecture has \(32, 32\)"),
        (lambda t: t.update({TOWER: t[TOWER].view(torch.uint8)}), "is packed .* but the config leaves it alone"),
    ],
)
def test_a_damaged_tensor_of_the_tower_is_found(packed, change, problem):
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, packed / "model.safetensors")
    found = verify(packed).problems
    assert any(TOWER.removesuffix(".weight") in line and re.search(problem, line) for line in found), found


def test_a_tower_that_the_configuration_calls_quantized_is_found(packed):
    for path, key in ((packed / "config.json", "quantization_config"), (packed / "hf_quant_config.json", "quantization")):
        config = json.loads(path.read_text())
        for names in ("ignore", "exclude_modules"):
            if names in config[key]:
                config[key][names] = ["lm_head"]
        path.write_text(json.dumps(config))
    assert any(
        f"{TOWER.removesuffix('.weight')}: is neither quantized nor excluded" in line for line in verify(packed).problems
    )
    with pytest.raises(CheckpointError, match="its config says that .* is quantized but its tensor is not"):
        load_checkpoint(packed)


def test_a_type_that_is_both_is_what_its_architectures_say():
    from transformers import Gemma3Config

    config = FAMILIES["gemma3"]().to_dict()
    assert isinstance(native_class(config)[0], Gemma3Config)
    assert native_class(config)[1].__name__ == "Gemma3ForConditionalGeneration"
    assert native_class(config["text_config"])[1].__name__ == "Gemma3ForCausalLM"


REMOTE_CONFIG = """
from transformers import LlamaConfig, PretrainedConfig, SiglipVisionConfig

class SeeingConfig(PretrainedConfig):
    model_type = "seeing"
    sub_configs = {"llm_config": LlamaConfig, "vision_config": SiglipVisionConfig}

    def __init__(self, llm_config=None, vision_config=None, image_token_id=5, **kwargs):
        self.llm_config = LlamaConfig(**llm_config) if isinstance(llm_config, dict) else llm_config or LlamaConfig()
        self.vision_config = SiglipVisionConfig(**vision_config) if isinstance(vision_config, dict) else vision_config or SiglipVisionConfig()
        self.image_token_id = image_token_id
        super().__init__(**kwargs)
"""
REMOTE_MODEL = """
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, SiglipVisionModel

from .configuration_seeing import SeeingConfig

class SeeingModel(PreTrainedModel):
    config_class = SeeingConfig
    _no_split_modules = ["LlamaDecoderLayer"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = SiglipVisionModel(config.vision_config)
        self.language_model = LlamaForCausalLM(config.llm_config)
        self.mlp1 = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.post_init()

    def forward(self, input_ids, pixel_values, attention_mask=None, **kwargs):
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        seen = self.mlp1(self.vision_model(pixel_values.to(embeddings.dtype)).last_hidden_state)
        where = (input_ids == self.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(where, seen.to(embeddings.dtype))
        return self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
"""


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A model of several parts that brings Python files of its own, around a causal language model."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "configuration_seeing.py").write_text(REMOTE_CONFIG)
    (folder / "modeling_seeing.py").write_text(REMOTE_MODEL)
    parts = FAMILIES["llava_onevision"]().to_dict(), FAMILIES["llava"]().to_dict()
    config = {
        "model_type": "seeing",
        "llm_config": parts[1]["text_config"],
        "vision_config": parts[0]["vision_config"],
        "auto_map": {"AutoConfig": "configuration_seeing.SeeingConfig", "AutoModel": "modeling_seeing.SeeingModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    cls = get_class_from_dynamic_module("modeling_seeing.SeeingModel", str(folder))
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).to(torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_remote_code_around_a_language_model_is_quantized_calibrated_with_images_and_exported(remote, tmp_path, layout):
    model = load_checkpoint(remote, trust_remote_code=True).model
    targets = match(model, Recipe())
    assert len(targets.members) == 14
    assert all(name.startswith("language_model.model.layers.") for name in targets.members)
    assert {"language_model.lm_head", "mlp1.1", "mlp1.3"} <= set(targets.excluded)
    length, images = images_of("llava", 2)
    ids = torch.arange(10, 70).reshape(2, 30)
    ids[:, 4 : 4 + length] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    quantize_model(model, Recipe(), calibrate(model, Recipe(), [text(), inputs]))
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=remote, record={}, layout=layout)
    assert (tmp_path / "out" / "modeling_seeing.py").is_file()
    loaded = load_checkpoint(tmp_path / "out", trust_remote_code=True).model
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    found = verify(tmp_path / "out")
    assert found.problems == () and found.is_guessed


def test_a_package_that_remote_code_lacks_is_named(remote):
    path = remote / "modeling_seeing.py"
    path.write_text("import package_that_nobody_has\n" + path.read_text())
    with pytest.raises(CheckpointError, match="needs a package that is not installed .*package_that_nobody_has"):
        load_checkpoint(remote, trust_remote_code=True)
