"""Sizes by config.json alone are those of the models that transformers builds from it, weight by weight."""

import json

import pytest
import torch

from harness.architecture import Attention, Experts, Mamba
from harness.architecture_sizes import architecture_of
from harness.errors import ModelError
from harness.model_config import read_configuration

TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "intermediate_size": 96}
HYBRID = {
    **TINY,
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*-M",
    "num_hidden_layers": 5,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
}
CONFIGS = {
    "llama": {**TINY, "model_type": "llama", "num_hidden_layers": 2},
    "llama-tied-biased": {
        **TINY,
        "model_type": "llama",
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 32,
    },
    "mistral": {**TINY, "model_type": "mistral", "num_hidden_layers": 1, "head_dim": 16},
    "qwen2": {**TINY, "model_type": "qwen2", "num_hidden_layers": 2},
    "qwen3": {**TINY, "model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 16},
    "qwen3_moe": {
        **TINY,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "deepseek_v3": {
        **TINY,
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
    },
    "hybrid": HYBRID,
    "hybrid-latent-biased": {
        **HYBRID,
        "moe_latent_size": 48,
        "mlp_bias": True,
        "use_bias": True,
        "use_conv_bias": False,
    },
    # shapes of models that are published: AceReason Nemotron 1.1 7B and the like
    "7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
    },
    "30b-a3b": {
        "model_type": "nemotron_h",
        "hidden_size": 2688,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "num_hidden_layers": 52,
        "head_dim": 128,
        "intermediate_size": 1856,
        "mamba_head_dim": 64,
        "mamba_num_heads": 64,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "n_groups": 8,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "ssm_state_size": 128,
        "vocab_size": 131072,
    },
}


def opened(shapes):
    """The same with each stack of experts as linear layers of its own, gate and way up apart."""
    found = {}
    for name, shape in shapes.items():
        parent, _, leaf = name.rpartition(".")
        if not parent.endswith(".experts"):
            found[name] = shape
            continue
        count, rows, columns = shape
        leaves = {"gate_up_proj": ("gate_proj", "up_proj")}.get(leaf, (leaf,))
        for index in range(count):
            found |= {f"{parent}.{index}.{each}.weight": (rows // len(leaves), columns) for each in leaves}
    return found


def built(config):
    """Names and shapes of the parameters of the model that transformers makes of a configuration, without weights, experts opened."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return opened({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_has_the_name_and_shape_that_transformers_gives_it(name):
    architecture = architecture_of(CONFIGS[name], "config.json")
    assert {weight.name: weight.shape for weight in architecture.weights} == built(CONFIGS[name])


def test_an_image_model_is_its_language_model_and_the_size_of_the_rest(tiny_vlm):
    architecture = architecture_of(read_configuration(tiny_vlm / "config.json").fields, "config.json")
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tiny_vlm))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    text = {weight.name: weight.shape for weight in architecture.weights if weight.kind != "vision"}
    assert text == {name: shape for name, shape in shapes.items() if "vision_model" not in name and "connector" not in name}
    assert architecture.size == sum(parameter.numel() for parameter in model.parameters())


def test_other_image_models_have_their_language_model_under_the_name_that_transformers_gives_it():
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    tower = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16)
    config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(**CONFIGS["llama"]))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    architecture = architecture_of(config.to_dict(), "config.json")
    language = {n: tuple(p.shape) for n, p in model.named_parameters() if "vision" not in n and "projector" not in n}
    assert {w.name: w.shape for w in architecture.weights if w.kind != "vision"} == language
    assert "are an estimate" in architecture.notes[0]


def blocks():
    """The blocks of Llama-3.3-Nemotron-Super-49B-v1, as its config.json lists them: (has attention, ffn_mult)."""
    dense, bare = (True, 5.25), [2.625, 2.625]
    middle = [1.3125, 2.625, 2.625, 1.3125, 5.25, 1.3125, 2.625, 1.3125, 1.3125, 1.3125]
    late = [1.3125, 1, 1, 1.3125, 1, 1, 1, 1.3125, 1.3125, 0.5, 0.5, 1, 1, 0.5, 0.5, 1, 0.5, 0.5]
    found = [(True, 2.625), *[dense] * 5, *((False, mult) for mult in bare), *[dense] * 3, (False, 3.28125), *[dense] * 30]
    return [*found, *((False, mult) for mult in middle), dense, *((False, mult) for mult in late), *[dense] * 9]


def decilm(listed):
    return {
        "model_type": "nemotron-nas",
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "vocab_size": 128256,
        "num_hidden_layers": len(listed),
        "block_configs": [
            {
                "attention": {"no_op": not has, "n_heads_in_group": 8 if has else None},
                "ffn": {"ffn_mult": mult, "no_op": mult is None},
            }
            for has, mult in listed
        ],
    }


def test_blocks_of_different_shapes_add_up_to_the_published_size():
    architecture = architecture_of(decilm(blocks()), "config.json")
    assert len(architecture.layers) == 80 and len(architecture.parts(Attention)) == 49
    assert architecture.size == 49_867_145_216  # what the hub says of its files


def test_blocks_without_attention_without_an_mlp_or_with_one_product_in_their_place_have_the_weights_that_are_left():
    config = decilm([(True, 1.0), (False, 1.0), (False, None)])
    config["block_configs"].append({"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}})
    config["num_hidden_layers"] = 4
    layers = architecture_of(config, "config.json").layers
    names = [[weight.name.split(".", 3)[3].removesuffix(".weight") for weight in layer.weights] for layer in layers]
    mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"]
    assert names == [
        [*(f"self_attn.{leaf}_proj" for leaf in "qkvo"), "input_layernorm", *mlp],
        mlp,
        [],
        ["self_attn.linear_attn", "input_layernorm", "mlp.linear_mlp", "post_attention_layernorm"],
    ]
    assert layers[0].weights[5].shape == (5632, 8192)  # 2/3 of 8192 is 5461, up to a multiple of 256


def test_a_token_is_multiplied_with_the_experts_that_it_is_routed_to():
    architecture = architecture_of(CONFIGS["30b-a3b"], "config.json")
    assert round(architecture.size / 1e9, 1) == 31.6 and round(architecture.active / 1e9, 1) == 3.2
    assert {(part.count, part.active, part.shared) for part in architecture.parts(Experts)} == {(128, 6, 3712)}
    assert len(architecture.parts(Mamba)) == 23 and len(architecture.parts(Attention)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt_bigcode"},
            r"model_type 'gpt_bigcode' is not known, .*; known: deepseek_v3, llama, mistral, .*qwen3_moe",
        ),
        ({"hidden_size": None}, r"hidden_size: missing; the size of the model depends on it"),
        ({"vocab_size": "many"}, r"vocab_size: found 'many'; allowed is a whole number"),
        ({"hybrid_override_pattern": "MX"}, r"hybrid_override_pattern: found 'MX'; allowed are the letters M \(Mamba\)"),
        ({"model_type": "nemotron-nas"}, r"block_configs: found None; allowed is one for each of num_hidden_layers"),
        ({"text_config": {**TINY, "model_type": "llama", "num_hidden_layers": 1}}, r"vision_config: says neither hidden_size"),
    ],
)
def test_a_configuration_that_says_no_size_is_refused(change, message):
    with pytest.raises(ModelError, match=rf"^c\.json: {message}"):
        architecture_of({**HYBRID, **change}, "c.json")


def test_a_block_without_a_width_is_refused():
    with pytest.raises(
        ModelError, match=r"^c\.json: block_configs\[0\]\.ffn\.ffn_mult: found 'x'; allowed is a positive number"
    ):
        architecture_of(decilm([(True, "x")]), "c.json")


def test_a_file_that_is_missing_or_damaged_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: there is no such file; give the config\.json of the model"):
        read_configuration(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON .*; copy it again"):
        read_configuration(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ModelError, match=r"config\.json: holds no object"):
        read_configuration(tmp_path / "config.json")


def test_deepseek_r1_has_its_published_parameters_and_a_cache_of_one_latent_a_token():
    from harness.activations import cache_bytes
    from harness.known_models import FOLDER, read_known_model

    model = architecture_of(read_known_model(FOLDER / "deepseek-r1.json").config, "config.json")
    assert round(model.size / 1e9) == 671 and model.active / 1e9 == pytest.approx(37, abs=0.7)  # arXiv 2412.19437: 671B, 37B
    assert model.is_fp8 and model.stored_bytes / 1e9 == pytest.approx(
        673, abs=3
    )  # linear layers in FP8, embeddings and head not
    assert cache_bytes(model) == (61 * (512 + 64) * 2, 0) == cache_bytes(model, gpus=8)
    assert "unverified" in model.notes[0]
