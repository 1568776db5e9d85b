"""`harness verify`: each planted defect is named, and checkpoints that other tools wrote raise no alarm."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from harness.cli import app
from qad.calibrate import calibrate
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.errors import CheckpointError
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from qad.verify import verify

PEERS = Path(__file__).parent / "fixtures" / "peers"
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def write(tiny_model, folder, recipe, layout):
    model = load_checkpoint(tiny_model).model
    targets = match(model, recipe)
    ids = torch.arange(3, 63).reshape(2, 30)
    amax = calibrate(model, recipe, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    quantize_model(model, recipe, amax)
    write_checkpoint(folder, model, targets=targets, companions=tiny_model, record={}, layout=layout)


@pytest.fixture(scope="session")
def sound(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    for layout in ("modelopt", "compressed-tensors"):
        write(tiny_model, folder / layout, Recipe(), layout)
        write(tiny_model, folder / f"{layout} mixed", Recipe(fp8=("*.down_proj",), kv_cache="fp8"), layout)
    return folder


@pytest.fixture
def packed(sound, tmp_path):
    return Path(shutil.copytree(sound / "modelopt", tmp_path / "packed"))


def edited(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigured(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors", "modelopt mixed", "compressed-tensors mixed"])
def test_our_own_checkpoints_have_no_problem(sound, name):
    found = verify(sound / name)
    assert found.problems == ()
    assert found.formats == ({"nvfp4": 12, "fp8": 2} if "mixed" in name else {"nvfp4": 14})
    assert found.n_left == 1 and not found.is_guessed


@pytest.mark.parametrize("name", sorted(path.name for path in PEERS.iterdir() if path.is_dir()))
def test_checkpoints_of_other_tools_raise_no_alarm(name):
    assert verify(PEERS / name).problems == ()


def scale(name, factor):
    return lambda tensors: tensors.__setitem__(name, tensors[name] * factor)


def drop(name):
    return lambda tensors: tensors.pop(name)


def block_scale(name, code):
    def change(tensors):
        codes = tensors[name].view(torch.uint8).clone()
        codes[3, 1] = code
        tensors[name] = codes.view(torch.float8_e4m3fn)

    return change


def unpacked(name):
    def change(tensors):
        packed = tensors[f"{name}.weight"]
        for part in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.weight"] = torch.zeros(packed.shape[0], packed.shape[1] * 2, dtype=torch.bfloat16)

    return change


def cast(name, dtype):
    return lambda tensors: tensors.__setitem__(name, tensors[name].to(dtype))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (scale(f"{Q}.weight_scale_2", 2), "model.layers.0.self_attn.qkv_proj: unequal weight scales"),
        (scale(f"{Q}.input_scale", 2), "model.layers.0.self_attn.qkv_proj: unequal input scales"),
        (scale(f"{DOWN}.weight_scale_2", 0), f"{DOWN}.weight_scale_2: is 0; a scale is positive and finite"),
        (scale(f"{DOWN}.input_scale", -1), f"{DOWN}.input_scale: is -"),
        (scale(f"{DOWN}.input_scale", float("nan")), f"{DOWN}.input_scale: is nan"),
        (cast(f"{DOWN}.weight_scale_2", torch.int32), f"{DOWN}.weight_scale_2: is I32 (); it must be one F32"),
        (block_scale(f"{DOWN}.weight_scale", 0x7F), f"{DOWN}.weight_scale: holds 1 NaN block scales, the first at (3, 1)"),
        (block_scale(f"{DOWN}.weight_scale", 0x00), f"{DOWN}.weight_scale: holds 1 zero block scales"),
        (block_scale(f"{DOWN}.weight_scale", 0x80), f"{DOWN}.weight_scale: holds 1 zero block scales"),
        (block_scale(f"{DOWN}.weight_scale", 0xB8), f"{DOWN}.weight_scale: holds 1 negative block scales"),
        (cast(f"{DOWN}.weight_scale", torch.float16), f"{DOWN}.weight_scale: is F16 (64, 8); NVFP4 needs F8_E4M3 (64, 8)"),
        (
            cast(f"{DOWN}.weight", torch.int8),
            f"{DOWN}.weight_scale: a scale without a packed weight: the weight of {DOWN} is I8",
        ),
        (drop(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale: missing"),
        (drop(f"{DOWN}.input_scale"), f"{DOWN}: the config says W4A4 but it has no input scale"),
        (unpacked(DOWN), f"{DOWN}: is neither quantized nor excluded"),
        (unpacked(Q), "model.layers.0.self_attn.qkv_proj: a fused group quantized in part"),
        (lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][:, :-8].contiguous()}), f"{DOWN}: decodes to (64, 112)"),
        (lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][:, :-1].contiguous()}), "126 is not a multiple of 16"),
        (drop("model.norm.weight"), "model.norm.weight: missing; the architecture has it with shape (64,)"),
        (lambda t: t.update({"model.extra.weight": torch.ones(3)}), "model.extra.weight: left over"),
        (scale("model.norm.weight", float("inf")), "model.norm.weight: holds 64 values that are NaN or infinite"),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.0)}),
            "the config has no FP8 KV cache but 1",
        ),
    ],
)
def test_each_planted_defect_of_the_tensors_is_named(packed, change, problem):
    edited(packed, change)
    found = verify(packed).problems
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda q: q["ignore"].append("model.layers.7.mlp.down_proj"),
            'excluded name "model.layers.7.mlp.down_proj" matches nothing',
        ),
        (lambda q: q["ignore"].append(DOWN), f"{DOWN}: is packed (nvfp4) but the config leaves it alone"),
        (lambda q: q["ignore"].clear(), "lm_head: is neither quantized nor excluded"),
        (lambda q: q.update(quant_algo="FP8"), f"{DOWN}: is nvfp4 but the config says fp8"),
        (lambda q: q.update(quant_algo="W4A16_NVFP4"), f"{DOWN}: the config says weights only but it has an input scale"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8, "type": "float"}), "the config asks for FP8 KV cache but 0"),
    ],
)
def test_each_planted_defect_of_the_configuration_is_named(packed, change, problem):
    reconfigured(packed, change)
    found = verify(packed).problems
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"quant_algo": "FP8"}, "disagree: formats and whether inputs are quantized: [('nvfp4', True)] and [('fp8', True)]"),
        ({"exclude_modules": ["lm_head", "model.layers.0.mlp.down_proj"]}, "disagree: what is left alone: ['lm_head'] and"),
        ({"kv_cache_quant_algo": "FP8"}, "disagree: an FP8 KV cache: False and True"),
        ({"quant_algo": "INT4"}, "hf_quant_config.json: "),
    ],
)
def test_two_configurations_that_disagree_are_named(packed, change, problem):
    path = packed / "hf_quant_config.json"
    found = json.loads(path.read_text())
    found["quantization"] |= change
    path.write_text(json.dumps(found))
    assert any(problem in line for line in verify(packed).problems), verify(packed).problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (cast("model.norm.weight", torch.int8), "model.norm.weight: is I8; what is not packed is BF16, F16, F32"),
        (
            cast("model.norm.weight", torch.float8_e4m3fn),
            "model.norm.weight: is F8_E4M3 with shape (64,); an FP8 layer has (out, in)",
        ),
        (cast(f"{DOWN}.weight_scale_2", torch.bfloat16), f"{DOWN}.weight_scale_2: is BF16 (); it must be one F32"),
        (
            lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].reshape(-1)}),
            f"{DOWN}.weight: has shape (4096,); NVFP4 needs (out, in/2)",
        ),
    ],
)
def test_wrong_types_and_shapes_are_problems_and_no_crash(packed, change, problem):
    edited(packed, change)
    assert any(problem in line for line in verify(packed).problems), verify(packed).problems


def test_experts_that_are_missing_altogether_are_named(tmp_path):
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "vocab_size": 64,
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.self_attn.o_proj"
    tensors = {f"{name}.weight": torch.zeros(32, 16, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts: missing experts: all of them" in verify(tmp_path).problems


def test_unequal_formats_in_a_group_and_missing_cache_scales_are_named(sound, tmp_path):
    folder = Path(shutil.copytree(sound / "modelopt mixed", tmp_path / "mixed"))

    def change(tensors):
        del tensors["model.layers.0.self_attn.v_proj.v_scale"]
        gate = "model.layers.0.mlp.gate_proj"
        for part in ("weight_scale_2",):
            del tensors[f"{gate}.{part}"]
        tensors[f"{gate}.weight"] = torch.zeros(128, 64).to(torch.float8_e4m3fn)
        tensors[f"{gate}.weight_scale"] = torch.tensor(1.0)

    edited(folder, change)
    found = "\n".join(verify(folder).problems)
    assert "model.layers.0.self_attn.v_proj.v_scale: missing" in found
    assert "model.layers.0.mlp.gate_up_proj: a fused group in two formats" in found


def test_tensor_parallelism_that_cuts_a_block_is_named(packed):
    assert verify(packed, tensor_parallel=4).problems == ()  # 64 / 4 = 16
    found = verify(packed, tensor_parallel=8).problems
    assert "model.layers.0.self_attn.o_proj: --tp 8 cuts its input width 64 into 8, not a multiple of 16" in found[0]
    assert not any("down_proj" in line for line in found)  # 128 / 8 = 16
    assert any("does not divide by --tp 3" in line for line in verify(packed, tensor_parallel=3).problems)


def test_a_shard_cut_short_and_an_index_that_disagrees_are_named(packed):
    path = packed / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:20]}, packed / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[20:]}, packed / "model-00002-of-00002.safetensors")
    weight_map = {n: f"model-0000{1 if i < 20 else 2}-of-00002.safetensors" for i, n in enumerate(names)}
    index = packed / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"ghost": "model-00001-of-00002.safetensors"}}))
    found = verify(packed).problems
    assert any("lists ghost, which model-00001-of-00002.safetensors does not hold" in line for line in found)
    assert any("model.safetensors: is not listed in" in line for line in found)
    path.unlink()
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert verify(packed).problems == ()
    shard = packed / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-50])
    assert "model-00002-of-00002.safetensors: cannot be read as safetensors" in verify(packed).problems[0]


def expert_tensors(n_experts, projections, widths=(64, 32)):
    tensors = {}
    for index in range(n_experts):
        for projection in projections:
            name = f"model.layers.0.mlp.experts.{index}.{projection}"
            out, width = widths if projection != "down_proj" else widths[::-1]
            tensors[f"{name}.weight"] = torch.zeros(out, width // 2, dtype=torch.uint8)
            tensors[f"{name}.weight_scale"] = torch.ones(out, width // 16).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale_2"] = torch.tensor(0.5)
            tensors[f"{name}.input_scale"] = torch.tensor(2.0)
    return tensors


@pytest.fixture
def experts(tmp_path):
    """A checkpoint of experts alone, of an architecture that transformers does not know."""
    config = {
        "model_type": "made_up",
        "num_experts": 4,
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(expert_tensors(4, ("gate_proj", "up_proj", "down_proj")), tmp_path / "model.safetensors")
    return tmp_path


E = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda t: [t.pop(k) for k in list(t) if ".experts.2." in k],
            f"{E}: missing experts: 2.down_proj, 2.gate_proj, 2.up_proj",
        ),
        (lambda t: [t.pop(k) for k in list(t) if ".experts.3.up_proj." in k], f"{E}: missing experts: 3.up_proj"),
        (scale(f"{E}.1.down_proj.input_scale", 2), f"{E}.*.down_proj: unequal input scales across its experts"),
        (scale(f"{E}.1.up_proj.input_scale", 2), f"{E}.*.gate_proj/up_proj: unequal input scales across its experts"),
        (scale(f"{E}.1.up_proj.weight_scale_2", 2), f"{E}.1: unequal weight scales"),
    ],
)
def test_defects_of_experts_are_named(experts, change, problem):
    assert verify(experts).problems == () and verify(experts).is_guessed
    edited(experts, change)
    found = verify(experts).problems
    assert any(problem in line for line in found), found


def test_weight_scales_may_differ_between_experts(experts):
    edited(experts, scale(f"{E}.1.down_proj.weight_scale_2", 2))
    assert verify(experts).problems == ()


def test_what_is_not_quantized_cannot_be_verified(tiny_model):
    with pytest.raises(CheckpointError, match="is not quantized .*nothing to verify"):
        verify(tiny_model)


def test_the_command_lists_problems_and_exits_with_1(packed):
    sound = CliRunner().invoke(app, ["verify", str(packed)])
    assert sound.exit_code == 0 and "no problems; linear layers: 14 nvfp4, 1 left alone" in sound.output
    edited(packed, scale(f"{Q}.weight_scale_2", 2))
    edited(packed, drop("model.norm.weight"))
    found = CliRunner().invoke(app, ["verify", str(packed)])
    assert found.exit_code == 1
    assert "unequal weight scales" in found.output and "model.norm.weight: missing" in found.output
    assert CliRunner().invoke(app, ["verify", str(packed / "nowhere")]).exit_code == 2
