"""DeciLM models against Llama and against a computation by hand, and through everything that is done to a model here."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from harness.architecture_sizes import architecture_of
from harness.known_models import known_model
from qad import decilm
from qad.building import native_class
from qad.calibrate import calibrate
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.distill import train
from qad.errors import CheckpointError, RecipeError
from qad.exceptions import LayerExceptions, excluded_by_position
from qad.kv_cache import attention_modules
from qad.layers import checkpoint_activations
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from qad.verify import verify
from tests.training_checks import KL, batches_for, inputs_of, one_each, settings

ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": ROPE,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
NARROW, WIDE = 3.0, 9.0
"""ffn_mult of an MLP of 256, and of 512, at this hidden size."""
VARIED = ((None, NARROW), (2, WIDE), (4, None), (None, None), (1, NARROW), (None, WIDE), (2, NARROW))
"""A first block without attention, others without an MLP or without either, one, two and four key and value heads."""


def part(size, name, **other):
    """As the published models write a part: every key is there, most of them switched off."""
    return {name: None if size == "linear" else size, "no_op": size is None, "replace_with_linear": size == "linear", **other}


def config_of(blocks, **fields):
    shapes = [
        {
            "attention": part(group, "n_heads_in_group", sparsify=None, window_length=None, unshifted_sink=False),
            "ffn": part(mult, "ffn_mult", sparsify=None),
        }
        for group, mult in blocks
    ]
    about = {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "num_hidden_layers": len(blocks)}
    return {
        **about,
        **deepcopy(SIZES),
        "num_key_value_heads": None,
        "intermediate_size": None,
        "block_configs": shapes,
        **fields,
    }


def made(blocks, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config, architecture = native_class(config_of(blocks, **fields))
    return architecture._from_config(config, dtype=dtype).eval()


def llama(model, *, heads, width):
    """A Llama with `heads` key and value heads and MLPs of `width`, not yet with weights."""
    sizes = {**SIZES, "num_hidden_layers": len(model.model.layers), "num_key_value_heads": heads, "intermediate_size": width}
    return LlamaForCausalLM._from_config(LlamaConfig(**deepcopy(sizes)), dtype=model.dtype).eval()


def tokens(rows=2, length=24):
    return torch.randint(2, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_equal_blocks_it_is_llama_bit_for_bit(dtype):
    model = made([(2, NARROW)] * 3, dtype)
    same = llama(model, heads=2, width=256)
    same.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens()).logits, same(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_missing_part_is_one_whose_last_product_is_zero_bit_for_bit(dtype):
    model = made([(None, NARROW), (2, NARROW), (2, None), (None, None), (2, NARROW)], dtype)
    same = llama(model, heads=2, width=256)
    missing, unexpected = same.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[2] for name in missing} == {"0", "2", "3"}
    for name in missing:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(same.get_parameter(name))
    assert torch.equal(model(tokens()).logits, same(tokens()).logits)


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + SIZES["rms_norm_eps"]).sqrt() * weight


def rotated(x):
    """x: (heads, tokens, width) of a head, turned by the position with frequencies stretched as Llama 3.1 does."""
    width = x.shape[-1]
    angles = []
    for i in range(width // 2):
        frequency = SIZES["rope_theta"] ** (-2 * i / width)
        turns = ROPE["original_max_position_embeddings"] * frequency / (2 * math.pi)
        mixed = (turns - ROPE["low_freq_factor"]) / (ROPE["high_freq_factor"] - ROPE["low_freq_factor"])
        mixed = min(max(mixed, 0.0), 1.0)
        angles.append(frequency * (mixed + (1 - mixed) / ROPE["factor"]))
    turned = torch.arange(x.shape[1]).double()[:, None] * torch.tensor(angles).double()
    first, second = x[..., : width // 2], x[..., width // 2 :]
    cos, sin = turned.cos(), turned.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def by_hand(weights, blocks, ids):
    """The logits (tokens, vocabulary) of one text, head by head, in float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    heads, x = SIZES["num_attention_heads"], weights["model.embed_tokens.weight"][ids]
    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    for index, (group, mult) in enumerate(blocks):
        mine = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{index}.")}
        if group is not None:
            y = norm(x, mine["input_layernorm.weight"])
            if group == "linear":
                x = x + y @ mine["self_attn.linear_attn.weight"].T
            else:
                width = SIZES["hidden_size"] // heads
                q, k, v = ((y @ mine[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, width)).transpose(0, 1) for n in "qkv")
                q, k, seen = rotated(q), rotated(k), []
                assert len(k) == len(v) == heads // group
                for head in range(heads):
                    scores = q[head] @ k[head // group].T / math.sqrt(width)
                    seen.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[head // group])
                x = x + torch.cat(seen, -1) @ mine["self_attn.o_proj.weight"].T
        if mult is not None:
            y = norm(x, mine["post_attention_layernorm.weight"])
            if mult == "linear":
                x = x + y @ mine["mlp.linear_mlp.weight"].T
            else:
                gate, up, down = (mine[f"mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
                assert gate.shape[1] == {NARROW: 256, WIDE: 512}[mult]
                x = x + (nn.functional.silu(y @ gate) * (y @ up)) @ down
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("blocks", [VARIED, (("linear", NARROW), (2, "linear"), ("linear", None))])
def test_blocks_of_every_shape_are_what_a_computation_by_hand_gives(blocks):
    model, (ids,) = made(blocks), tokens(rows=1, length=60)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        expected = by_hand(model.state_dict(), blocks, ids)
        assert torch.allclose(model(ids[None]).logits[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_is_generation_without_one():
    model, ids = made(VARIED), tokens()
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, whole = (
        model.generate(ids, use_cache=use_cache, return_dict_in_generate=True, output_logits=True, **how)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, whole.sequences)
    assert torch.allclose(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)
    n_cached = sum(layer.is_initialized for layer in cached.past_key_values.layers)
    assert n_cached == 4 and cached.past_key_values.get_seq_length() == 24 + 11


def test_recomputed_activations_give_the_same_gradients():
    def gradients(change):
        model = made(VARIED).train()
        change(model)
        model(tokens(), use_cache=False).logits.square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(lambda model: None)
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    for change in (checkpoint_activations, lambda model: model.gradient_checkpointing_enable()):
        found = gradients(change)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A checkpoint as the hub has it: BF16, the published fields, an auto_map and Python files that must never run."""
    path = tmp_path_factory.mktemp("decilm") / "bf16"
    path.mkdir()
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    classes = {"AutoConfig": "configuration_decilm.DeciLMConfig", "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM"}
    config = config_of(VARIED, vocab_size=512, torch_dtype="bfloat16", auto_map=classes)
    for name in ("configuration_decilm.py", "modeling_decilm.py"):
        (path / name).write_text("raise SystemExit('ran')\n")
    (path / "config.json").write_text(json.dumps(config))
    model = made(VARIED, torch.bfloat16, vocab_size=512)
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_a_folder_that_names_code_of_its_own_loads_without_running_it(folder, trust_remote_code):
    loaded = load_checkpoint(folder, trust_remote_code=trust_remote_code).model
    assert type(loaded) is decilm.DeciLMForCausalLM and loaded.dtype is torch.bfloat16
    assert torch.equal(loaded(tokens()).logits, made(VARIED, torch.bfloat16, vocab_size=512)(tokens()).logits)


def trained(folder, recipe):
    """A student after two steps of distillation."""
    teacher, student = (load_checkpoint(folder).model for _ in range(2))
    batches = batches_for(6, vocabulary=512)
    quantize_model(student, recipe, calibrate(teacher, recipe, inputs_of(batches[:4])))
    before = student.get_parameter("model.layers.4.self_attn.q_proj.weight").clone()
    train(student, teacher, one_each(batches[4:]), settings(lr=3e-3), objective=KL)
    assert not torch.equal(student.get_parameter("model.layers.4.self_attn.q_proj.weight"), before)
    return student


def test_it_is_quantized_trained_exported_and_loaded_back_bit_for_bit(folder, tmp_path):
    recipe = Recipe(kv_cache="fp8")
    student = trained(folder, recipe)
    targets = match(load_checkpoint(folder).model, recipe)
    assert len(targets.members) == 4 * 4 + 5 * 3 and len(targets.kv_cache) == 4
    with torch.no_grad():
        expected = student(tokens()).logits
    for layout in ("modelopt", "compressed-tensors"):
        path = tmp_path / layout
        write_checkpoint(path, student, targets=targets, companions=folder, record={}, layout=layout)
        found = verify(path)
        assert found.problems == () and not found.is_guessed and found.formats == {"nvfp4": 31} and found.n_left == 1
        loaded = load_checkpoint(path)
        assert loaded.kernels == {"linear": "w4a4_emulation", "kv_cache": "fp8_emulation"}
        with torch.no_grad():
            assert torch.equal(loaded.model(tokens()).logits, expected)


def test_an_exported_configuration_says_what_the_published_one_does(folder, tmp_path):
    model = load_checkpoint(folder).model
    write_checkpoint(tmp_path / "again", model, targets=None, companions=folder, record={})
    given, written = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert {key: written[key] for key in given if key != "torch_dtype"} == {
        k: v for k, v in given.items() if k != "torch_dtype"
    }
    assert "rope_parameters" not in written and written["dtype"] == "bfloat16"
    plain, _ = native_class(config_of(VARIED, rope_scaling=None))
    assert plain.to_dict()["rope_scaling"] is None and plain.to_dict()["rope_theta"] == 500000.0


def test_an_export_names_files_of_code_only_where_they_came_along(folder, tmp_path):
    model = load_checkpoint(folder).model
    (tmp_path / "bare").mkdir()
    for name, companions in (("whole", folder), ("without", tmp_path / "bare")):
        write_checkpoint(tmp_path / name, model, targets=None, companions=companions, record={})
    whole, without = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "without"))
    assert whole["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
    assert (tmp_path / "whole" / "modeling_decilm.py").is_file() and "auto_map" not in without
    assert without == {key: value for key, value in whole.items() if key != "auto_map"}


def test_a_tensor_that_a_block_must_not_have_is_left_over(folder, tmp_path):
    model = made([(2, NARROW)] * len(VARIED), torch.bfloat16, vocab_size=512)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit DeciLMForCausalLM: .*model\.layers\.0\.input_layernorm\.weight"):
        load_checkpoint(tmp_path)


def layers_left(model, **exceptions):
    return sorted({int(name.split(".")[2]) for name in excluded_by_position(model, LayerExceptions(**exceptions))})


def test_positions_count_blocks_of_every_shape():
    model = made(VARIED)
    assert attention_modules(model) == tuple(f"model.layers.{index}.self_attn" for index in (1, 2, 4, 6))
    assert layers_left(model, before_attention=True) == [0, 5]  # and 3, which holds nothing to leave
    assert layers_left(model, first=2, last=1) == [0, 1, 6]
    with pytest.raises(RecipeError, match="nothing in there could be quantized"):
        excluded_by_position(made([(None, None), (2, NARROW)]), LayerExceptions(first=1))


SUPER, ULTRA = "nvidia/Llama-3_3-Nemotron-Super-49B-v1", "nvidia/Llama-3_1-Nemotron-Ultra-253B-v1"


@pytest.mark.parametrize(
    ("path", "billions", "attention", "mlps", "k_proj"),
    [(SUPER, 50, 49, 80, (1024, 8192)), (ULTRA, 253, 64, 81, (1024, 16384))],
)
def test_a_published_model_has_the_weights_that_are_planned_for_it(path, billions, attention, mlps, k_proj):
    fields = known_model(path).config
    config, architecture = native_class(fields)
    with torch.device("meta"):
        model = architecture._from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    planned = architecture_of(fields, path)
    assert shapes == {weight.name: weight.shape for weight in planned.weights}
    assert sum(parameter.numel() for parameter in model.parameters()) == planned.size
    assert round(planned.size / 1e9) == billions
    assert {shape for name, shape in shapes.items() if name.endswith("k_proj.weight")} == {k_proj}
    assert len(match(model, Recipe()).members) == 4 * attention + 3 * mlps


@pytest.mark.parametrize(
    ("mult", "hidden", "width"),
    [
        (5.25, 8192, 28672),
        (0.5, 8192, 2816),
        (39.0, 16384, 425984),
        (0.4875, 16384, 5376),
        (1.0, 8192, 5632),
        (3.0, 64, 256),
        (6.0, 64, 256),
        (6.1, 64, 512),
    ],
)
def test_the_width_of_an_mlp_is_cut_to_a_whole_number_and_rounded_up_to_256(mult, hidden, width):
    assert decilm.mlp_width(mult, hidden) == width


def broken(change):
    config = config_of(VARIED)
    change(config, config["block_configs"])
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, b: c.pop("block_configs"), r"block_configs: found None; allowed .* num_hidden_layers \(7\): copy"),
        (lambda c, b: b.pop(), r"block_configs: found 6 blocks; allowed .* num_hidden_layers \(7\)"),
        (lambda c, b: b.__setitem__(2, 5), r"block_configs\[2\]\.attention: found None; allowed is an object with no_op"),
        (lambda c, b: b[1].pop("ffn"), r"block_configs\[1\]\.ffn: found None; allowed is an object"),
        (lambda c, b: b[1]["attention"].update(n_heads_in_group=3), r"\[1\]\.attention\.n_heads_in_group: found 3; .*heads \(4\)"),
        (lambda c, b: b[1]["attention"].update(n_heads_in_group=0), r"\[1\]\.attention\.n_heads_in_group: found 0; allowed"),
        (lambda c, b: b[1]["attention"].update(n_heads_in_group=None), r"n_heads_in_group: found None; .* or no_op or"),
        (lambda c, b: b[1]["ffn"].update(ffn_mult=True), r"\[1\]\.ffn\.ffn_mult: found True; allowed is a number above 0"),
        (lambda c, b: b[0]["ffn"].pop("ffn_mult"), r"\[0\]\.ffn\.ffn_mult: found None; allowed"),
        (lambda c, b: b[0]["ffn"].update(no_op="yes"), r"\[0\]\.ffn\.no_op: found 'yes'; allowed: true or false"),
        (lambda c, b: b[0]["attention"].update(replace_with_linear=True), r"\[0\]\.attention: no_op and replace_with_linear are both"),
        (lambda c, b: b[1]["attention"].update(window_length=128), r"attention\.window_length: found 128; allowed in this version are no_op"),
        (lambda c, b: b[1]["ffn"].update(moe={"num_local_experts": 4}), r"\[1\]\.ffn\.moe: found \{'num_local_experts': 4\}; allowed"),
        (lambda c, b: b[1].update(parallel_blocks=[{}]), r"\[1\]\.parallel_blocks: found \[\{\}\]; allowed .* attention, ffn"),
        (lambda c, b: c.update(position_embedding_type="rope_llama4"), r"position_embedding_type: found 'rope_llama4'; .*'rope' or"),
        (lambda c, b: c.update(sliding_window=64), r"sliding_window: found 64; allowed for nemotron-nas is nothing"),
        (lambda c, b: c.update(logit_scale=0.5), r"logit_scale: found 0.5; allowed for nemotron-nas is 1.0 or nothing"),
        (lambda c, b: c.update(attention_multiplier=0.5), r"attention_multiplier: found 0.5; allowed for nemotron-nas is nothing"),
        (lambda c, b: c.update(embedding_multiplier=2.0), r"embedding_multiplier: found 2.0; allowed .* is 1.0 or nothing"),
        (lambda c, b: c.update(residual_multiplier=0.2), r"residual_multiplier: found 0.2; allowed .* is 1.0 or nothing"),
        (lambda c, b: c.update(rope_local_base_freq=1e4), r"rope_local_base_freq: found 10000.0; allowed .* is nothing"),
        (lambda c, b: c.update(partial_rotary_factor=0.5), r"partial_rotary_factor: found 0.5; allowed .* is 1.0 or nothing"),
        (lambda c, b: c.update(rope_scaling=ROPE | {"partial_rotary_factor": 0.5}), r"partial_rotary_factor: found 0.5; allowed"),
        (lambda c, b: [block["attention"].update(no_op=True) for block in b], r"block_configs: no block has attention"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_configuration_is_said_with_the_block(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(broken(change)))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as found:
        load_checkpoint(tmp_path)
    assert str(found.value).startswith(f"{tmp_path}: config.json: ")


def test_what_is_switched_off_changes_nothing_and_may_be_missing():
    bare = config_of(VARIED) | dict.fromkeys(("embedding_multiplier", "residual_multiplier", "partial_rotary_factor"), 1.0)
    for block, (group, mult) in zip(bare["block_configs"], VARIED, strict=True):
        block["attention"] = {"no_op": True} if group is None else {"n_heads_in_group": group}
        block["ffn"] = {"no_op": True} if mult is None else {"ffn_mult": mult}
    blocks, same = (native_class(config)[0].block_configs for config in (bare, config_of(VARIED)))
    assert [replace(block, given={}) for block in blocks] == [replace(block, given={}) for block in same]
