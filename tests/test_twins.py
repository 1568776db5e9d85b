"""Twins: small models that have the structure of real ones."""

import json
from pathlib import Path

import pytest
import torch

from harness import twins
from harness.errors import ModelError
from harness.twin_configs import small_config, stretch
from harness.twins import write_twin
from qad.backbone import backbone_of
from qad.checkpoint import load_checkpoint
from qad.exceptions import LayerExceptions, excluded_by_position
from qad.image_processors import allow_without_torchvision

REPOSITORY = Path(__file__).parent.parent
WORDS = REPOSITORY / "suites" / "models" / "embedded_vlm"
"""A tokenizer that is read in no time."""
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "quantization_config": {"quant_method": "fp8"},
    "tie_word_embeddings": False,
}
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "tie_word_embeddings": True,
}
HYBRID = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "hidden_size": 4480,
    "num_hidden_layers": 56,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 15680,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "max_position_embeddings": 131072,
}
EXPERTS = HYBRID | {
    "hidden_size": 2688,
    "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "intermediate_size": 1856,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
}
CONFIGS = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "hybrid": HYBRID,
    "experts": EXPERTS,
    "qwen3_moe": {"model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94, "head_dim": 128},
    "deepseek_v3": {"model_type": "deepseek_v3"},
}


def block(width: float | None, *, heads: int | None = 8) -> dict:
    return {
        "attention": {"no_op": heads is None, "n_heads_in_group": heads},
        "ffn": {"no_op": width is None, "ffn_mult": width},
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_twin_is_of_the_class_of_its_model_and_takes_text(name, tmp_path):
    twin = write_twin(CONFIGS[name], tmp_path / "twin", tokenizer=WORDS)
    config = json.loads((twin.folder / "config.json").read_text())
    assert config["model_type"] == CONFIGS[name]["model_type"]
    assert config["architectures"] == [twin.model_class] and config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (twin.folder / "chat_template.jinja").is_file() and not (twin.folder / "processor_config.json").exists()
    model = load_checkpoint(twin.folder).model
    with torch.no_grad():
        logits = model(torch.arange(10, 30)[None]).logits
    assert 0.5 < logits.float().std() < 2.0
    assert model.config.max_position_embeddings >= 2048
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6


@pytest.mark.parametrize("name", CONFIGS)
def test_every_width_that_nvfp4_and_vllm_meet_is_a_multiple_of_64(name, tmp_path):
    model = load_checkpoint(write_twin(CONFIGS[name], tmp_path / "twin", tokenizer=WORDS).folder).model
    widths = {module.in_features for module in model.modules() if isinstance(module, torch.nn.Linear)}
    widths |= {parameter.shape[-1] for name, parameter in model.named_parameters() if "experts" in name and parameter.ndim > 1}
    assert widths and all(width % 64 == 0 for width in widths)


def test_the_same_seed_gives_the_same_files_and_another_one_other_weights(tmp_path):
    first, again, other = (
        write_twin(HYBRID, tmp_path / str(i), tokenizer=WORDS, seed=seed).folder for i, seed in enumerate((0, 0, 1))
    )
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("config", [HYBRID, EXPERTS], ids=["mlp", "experts"])
def test_positions_leave_out_layers_of_a_hybrid_twin_and_some_of_every_kind_stay(config, tmp_path):
    model = load_checkpoint(write_twin(config, tmp_path / "twin", tokenizer=WORDS).folder).model
    kinds = model.config.layers_block_type
    assert set(kinds) == {
        {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}[c] for c in config["hybrid_override_pattern"]
    }
    names = excluded_by_position(model, LayerExceptions(first=2, last=2, before_attention=True))
    left_out = {int(name.split(".")[2]) for name in names}
    assert {kinds[index] for index in set(range(len(kinds))) - left_out} == set(kinds)
    before = kinds.index("full_attention") - 1
    assert before in left_out and kinds[before] != "full_attention"


def test_layers_of_a_twin_are_a_run_of_the_layers_of_its_model():
    for config in (HYBRID, EXPERTS):
        assert small_config(config).fields["hybrid_override_pattern"] in config["hybrid_override_pattern"]


def test_a_run_of_layers_has_every_kind_in_its_interior_and_is_as_short_as_can_be():
    assert stretch("aaaaaaaaaa") == slice(0, 6)
    assert stretch("aaaaaaabaaaa") == slice(4, 10)
    assert stretch("aaaabbbbbbbbcccc") == slice(1, 15)
    assert stretch("abc") == slice(0, 3)
    assert stretch("aaaaaaaaaaaa", shapes="111111111112") == slice(6, 12)
    assert stretch("xaxaxxbxaxab", before="b") == slice(4, 11)


def test_blocks_of_differing_shape_stay_of_differing_shape():
    blocks = [
        *(block(5.25) for _ in range(10)),
        block(2.625, heads=None),
        block(None, heads=None),
        *(block(1.0) for _ in range(10)),
    ]
    config = {"model_type": "nemotron-nas", "hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 22}
    small = small_config(config | {"block_configs": blocks}).fields
    kept = small["block_configs"]
    assert small["num_hidden_layers"] == len(kept) < 10
    assert {(b["attention"]["no_op"], b["ffn"]["no_op"]) for b in kept} == {(False, False), (True, False), (True, True)}
    assert len({b["ffn"]["ffn_mult"] for b in kept} - {None}) == 2
    assert {b["attention"]["n_heads_in_group"] for b in kept} == {2, None}


def test_a_longer_context_by_a_rule_is_longer_in_the_same_proportion():
    small = small_config(LLAMA).fields
    assert small["max_position_embeddings"] == 4096
    assert small["rope_scaling"] == LLAMA["rope_scaling"] | {"original_max_position_embeddings": 256}


def test_key_heads_stay_fewer_than_query_heads_and_heads_that_do_not_fill_the_width_do_not():
    assert small_config(QWEN2).fields["num_key_value_heads"] == 2 < small_config(QWEN2).fields["num_attention_heads"] == 4
    hybrid = small_config(HYBRID).fields
    assert hybrid["num_attention_heads"] == 5 * hybrid["num_key_value_heads"] == 10
    assert hybrid["num_attention_heads"] * hybrid["head_dim"] != hybrid["hidden_size"]


def test_a_twin_of_a_tied_model_is_tied(tmp_path):
    model = load_checkpoint(write_twin(QWEN2, tmp_path / "twin", tokenizer=WORDS).folder).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_twin_of_an_image_text_model_sees(tmp_path):
    from PIL import Image
    from transformers import AutoProcessor

    twin = write_twin(HYBRID, tmp_path / "twin", kind="image-text")
    assert twin.model_class == "Idefics3ForConditionalGeneration" and "stands for 'nemotron_h'" in twin.notes[0]
    allow_without_torchvision()
    processor = AutoProcessor.from_pretrained(twin.folder)
    picture = Image.new("RGB", (200, 100), "red")
    model = load_checkpoint(twin.folder).model
    shown = processor(text="<image>what?", images=[picture], return_tensors="pt")
    grey = processor(text="<image>what?", images=[Image.new("RGB", (200, 100), "grey")], return_tensors="pt")
    with torch.no_grad():
        logits = model(**shown).logits, model(**grey).logits
    assert torch.isfinite(logits[0]).all() and not torch.equal(*logits)
    backbone = backbone_of(model)
    assert backbone.outside and all(name.startswith("model.text_model") or name == "lm_head" for name in backbone.linears)


def test_what_only_its_own_code_builds_is_stood_for_by_the_nearest_class_and_that_is_said(tmp_path):
    strange = LLAMA | {"model_type": "unheard-of", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    twin = write_twin(strange, tmp_path / "twin", tokenizer=WORDS, trust_remote_code=True)
    assert twin.model_class == "LlamaForCausalLM"
    assert twin.notes[0] == "'llama' stands for 'unheard-of', which only code of its own can build"


@pytest.mark.parametrize("kind", ["text", "image-text"])
@pytest.mark.parametrize(
    ("more", "trusts", "told"),
    [
        ({}, True, "names no code of its own"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, False, "set model.trust_remote_code = true"),
    ],
)
def test_nothing_stands_for_an_architecture_that_the_run_itself_could_not_build(kind, more, trusts, told, tmp_path):
    strange = LLAMA | {"model_type": "unheard-of"} | more
    with pytest.raises(ModelError, match=f"model_type 'unheard-of': .*{told}"):
        write_twin(strange, tmp_path / "twin", kind=kind, tokenizer=WORDS, trust_remote_code=trusts)
    assert not (tmp_path / "twin").exists()


def test_a_configuration_that_no_model_can_be_built_from_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ModelError, match="model_type 'nemotron_h': no twin of it can be made"):
        write_twin({"model_type": "nemotron_h", "hybrid_override_pattern": "M?"}, tmp_path / "twin", tokenizer=WORDS)
    assert not (tmp_path / "twin").exists()


def test_where_the_embedded_language_model_is_missing_words_are_those_of_the_embedded_image_text_model(tmp_path, monkeypatch):
    monkeypatch.setattr(twins, "_PACKAGE", "no_such_package")
    twins._stand_in.cache_clear()
    try:
        config = json.loads((write_twin(QWEN2, tmp_path / "twin").folder / "config.json").read_text())
    finally:
        twins._stand_in.cache_clear()
    assert config["vocab_size"] == 448 and config["eos_token_id"] == 2


def test_a_twin_that_sees_needs_the_folder_of_the_embedded_image_text_model(tmp_path, monkeypatch):
    monkeypatch.setattr(twins, "_EMBEDDED_VLM", tmp_path / "nowhere")
    with pytest.raises(
        ModelError, match="nowhere: there is no such folder; the twin of an image-text model takes its processor"
    ):
        write_twin(LLAMA, tmp_path / "twin", kind="image-text")
