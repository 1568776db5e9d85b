"""What the memory model counts is what the code keeps: activations by what autograd saves, constants by the modules that own them."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from harness import activations, batches, diagnostics, memory_model, stage_needs
from harness.architecture_sizes import architecture_of
from harness.engines import hf, vllm
from harness.hardware import BF16, CODE_BYTES, FP32
from harness.memory_model import Answering, Moment, Training, with_slack, worst
from harness.planned_recipe import quantized_by
from harness.schema import Quantization
from qad import losses

QUANTIZED = Quantization.model_validate({"calibration": {"data": "text"}})

TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "intermediate_size": 160}
DENSE = {**TINY, "num_hidden_layers": 3, "head_dim": 16}
ROWS, TOKENS = 2, 48


def saved(config, *, packed=False):
    """Bytes that autograd keeps of a quantized student's forward pass, weights and what all layers share left out, by layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qad.experts import open_experts
    from qad.masters import Masters
    from qad.quantize import quantize_model
    from qad.recipe import Recipe, match

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(torch.bfloat16).eval()
    open_experts(model)
    targets = match(model, Recipe())
    quantize_model(model, Recipe(), {group.input_name: 8.0 for group in targets.groups})
    Masters(model)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    ids = torch.randint(0, 96, (ROWS, TOKENS))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if packed:
        half = torch.arange(TOKENS // 2).repeat(2).expand(ROWS, -1)
        inputs = {"input_ids": ids, "position_ids": half, "use_cache": False}
    found, by_layer = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address is used again
        return tensor

    def count(module, arguments, output):
        by_layer.append(sum(n for n, _ in found.values()))

    for layer in model.base_model.layers:
        layer.register_forward_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(**inputs)
    return [after - before for before, after in itertools.pairwise(by_layer)]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_what_is_kept_of_a_layer_is_what_autograd_saves(model_type):
    config = {**DENSE, "model_type": model_type}
    architecture = architecture_of(config, "config.json")
    expected = activations.kept(architecture, architecture.layers[1]) * ROWS * TOKENS
    assert saved(config)[1] == pytest.approx(expected, rel=0.02)


def test_packed_rows_keep_keys_and_values_for_every_head_and_a_mask_of_numbers_for_every_layer():
    config = {**DENSE, "model_type": "llama"}
    architecture = architecture_of(config, "config.json")
    expected = activations.kept(architecture, architecture.layers[1], packed=TOKENS) * ROWS * TOKENS
    assert saved(config, packed=True)[1] == pytest.approx(expected, rel=0.02)


def test_an_mlp_without_a_gate_keeps_its_input_what_relu_leaves_and_the_square():
    config = {
        **TINY,
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "*-*-",
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 16,
    }
    architecture = architecture_of(config, "config.json")
    expected = [activations.kept(architecture, layer) * ROWS * TOKENS for layer in architecture.layers]
    assert saved(config) == pytest.approx(expected[1:], rel=0.02)


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 160}


def test_what_is_kept_of_experts_is_what_autograd_saves():
    config = {**DENSE, **EXPERTS, "model_type": "qwen3_moe"}
    architecture = architecture_of(config, "config.json")
    expected = activations.kept(architecture, architecture.layers[1]) * ROWS * TOKENS
    assert saved(config)[1] == pytest.approx(expected, rel=0.02)


def test_what_is_kept_of_experts_without_a_gate_is_added_up_in_fp32():
    config = {
        **TINY,
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "*E*E",
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 128,
    }
    architecture = architecture_of(config, "config.json")
    expected = [activations.kept(architecture, layer) * ROWS * TOKENS for layer in architecture.layers]
    assert saved(config) == pytest.approx(expected[1:], rel=0.03)


def test_constants_that_other_modules_own_are_theirs():
    assert memory_model.CHUNK_TOKENS == losses.CHUNK_TOKENS
    assert memory_model.FORWARD_TOKENS == batches.FORWARD_TOKENS
    assert stage_needs.HF_BATCH == hf.DEFAULT_BATCH_SIZE
    assert (stage_needs.VLLM_CONTEXT, stage_needs.VLLM_SEQUENCES) == (vllm.DEFAULT_MAX_MODEL_LEN, vllm.DEFAULT_MAX_NUM_SEQS)
    assert stage_needs.VLLM_STEP_TOKENS == vllm.MIN_BATCHED_TOKENS
    assert stage_needs.TEACHER_MEMORY == diagnostics.TEACHER_MEMORY_BYTES


def training(**changes) -> Training:
    architecture = architecture_of({**DENSE, "model_type": "llama"}, "config.json")
    given = {"student": architecture, "teacher": architecture, "quantized": quantized_by(architecture, QUANTIZED)}
    return Training(**{**given, "rows": ROWS, "tokens": TOKENS, **changes})


@pytest.fixture(scope="module")
def bench():
    """The benchmark that holds plans against resident memory, with small models."""
    spec = importlib.util.spec_from_file_location("plan_memory", Path(__file__).parent.parent / "bench" / "plan_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Trained(module.config_of(64, 1, 64), rows=1, tokens=16).run(None)  # compiles what has to be
    return module


def allocated(configuration) -> int:
    """The most that torch's tensors take at once while it runs, by the allocations that torch reports."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        configuration.run(None)
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [n for _, n in sorted((event.start_ns(), event.nbytes()) for event in events)]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize(
    "how",
    [
        {"rows": 4, "tokens": 128},
        {"rows": 4, "tokens": 128, "n_batches": 2},
        {"rows": 8, "tokens": 128, "checkpointing": True},
        {"rows": 4, "tokens": 128, "loss": "ce"},
        {"rows": 1, "tokens": 8},
    ],
    ids=["plain", "two batches", "checkpointing", "cross entropy", "few tokens"],
)
def test_the_worst_moment_of_a_training_takes_what_torch_allocates(bench, how):
    configuration = bench.Trained(bench.config_of(64, 3, 256), **how)
    assert configuration.planned().total == pytest.approx(allocated(configuration), rel=0.05)


@pytest.mark.parametrize("how", [{}, {"checkpointing": True}], ids=["plain", "checkpointing"])
def test_the_worst_moment_of_a_training_of_experts_takes_what_torch_allocates(bench, how):
    configuration = bench.Trained(bench.experts_of(64, 3, 256), rows=8, tokens=128, **how)
    assert configuration.planned().total == pytest.approx(allocated(configuration), rel=0.07)


def test_the_worst_moment_of_a_batch_of_answers_takes_what_torch_allocates(bench):
    configuration = bench.Generated()
    configuration.config, configuration.rows, configuration.prompt = bench.config_of(64, 4, 256), 4, 200
    assert configuration.planned().total == pytest.approx(allocated(configuration), rel=0.07)


def at(found: Training, name: str) -> Moment:
    return next(moment for moment in found.moments() if moment.name == name)


def test_what_stays_of_a_training_is_student_teacher_codes_masters_and_two_moments_of_the_optimizer():
    one = training()
    size, quantized = one.student.size, one.sizes["quantized"]
    assert size == 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160 + 128) + 2 * 96 * 64 + 64
    assert quantized == 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160)
    items = at(one, "optimizer step").items
    assert items["student"] == items["teacher"] == 2 * size
    assert items["codes, now and at the start"] == 2 * 0.5625 * quantized
    assert (items["FP32 masters"], items["FP32 gradients"], items["optimizer state"]) == (
        4 * quantized,
        4 * quantized,
        8 * quantized,
    )


def test_ranks_share_masters_gradients_and_states_and_gather_what_lies_outside_the_layers():
    one, four = at(training(), "optimizer step").items, at(training(ranks=4), "optimizer step").items
    assert four["FP32 masters"] == one["FP32 masters"] / 4
    assert four["student"] == 2 * one["student"] / 4  # its shards are FP32
    assert four["embeddings and heads, gathered"] == 2 * BF16 * (2 * 96 * 64 + 64)


def test_other_kinds_of_training_own_other_numbers():
    quantized = training().sizes["quantized"]
    assert training(train="all").n_masters == training().student.size
    assert training(train="scales").n_masters == quantized / 16
    assert training(learned_scales=True).n_masters == quantized * 17 / 16
    assert at(training(optimizer="adafactor"), "optimizer step").items["optimizer state"] == 0
    assert at(training(teacher=None, loss="ce"), "loss").items["teacher"] == 0


def test_layers_in_fp8_have_a_byte_a_weight_of_codes_and_no_block_scales_to_learn():
    one = training()
    eights = frozenset(name for name in one.quantized if ".mlp." in name)
    found, n = training(fp8=eights, learned_scales=True), 3 * 3 * 64 * 160
    codes = at(found, "optimizer step").items["codes, now and at the start"]
    assert codes == 2 * (n + 0.5625 * (one.sizes["quantized"] - n))
    assert found.n_masters == one.sizes["quantized"] + (one.sizes["quantized"] - n) / 16
    difference = memory_model.of_training_host(found, 2) - memory_model.of_training_host(one, 2)
    assert difference == pytest.approx(2 * (1 - 0.5625) * n)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer_at_a_time():
    last = "backward pass, layer 2"
    with_all, with_inputs = at(training(), last), at(training(activation_checkpointing=True), last)
    one = activations.kept(training().student, training().student.layers[0]) * ROWS * TOKENS
    inputs = 3 * BF16 * 64 * ROWS * TOKENS
    assert with_all.items["activations"] - with_inputs.items["activations"] == pytest.approx(2 * one - inputs)


def test_the_gradients_of_a_single_batch_grow_while_activations_go_and_those_of_several_are_there_from_the_start():
    single, several = training(), training(n_batches=2)
    grown = [at(single, f"backward pass, layer {i}").items for i in (2, 1, 0)]
    assert [round(items["FP32 gradients"] / (4 * single.sizes["quantized"]), 2) for items in grown] == [0.33, 0.67, 1.0]
    assert grown[0]["activations"] > grown[1]["activations"] > grown[2]["activations"]
    assert at(several, "backward pass, layer 2").items["FP32 gradients"] == 4 * single.sizes["quantized"]


def test_packed_rows_need_a_mask_of_all_pairs():
    found = at(training(is_packed=True), "loss").items["mask"]
    assert found == ROWS * TOKENS * TOKENS


def test_the_loss_holds_one_chunk_of_logits_however_many_there_are():
    architecture = training().student
    sizes = {tokens: activations.chunk_bytes(architecture, loss="kl", tokens=tokens, chunk=128) for tokens in (64, 128, 129)}
    assert sizes == {64: 64 * 96 * 20, 128: 128 * 96 * 20, 129: 128 * 96 * 20}
    assert activations.chunk_bytes(architecture, loss="ce", tokens=129, chunk=128) == 128 * 96 * 10


def test_a_cache_grows_by_keys_and_values_and_states_of_mamba_do_not_grow():
    dense = training().student
    assert activations.cache_bytes(dense) == (3 * 2 * 2 * 32, 0)
    assert activations.cache_bytes(dense, is_fp8=True) == (3 * 2 * 32, 0)
    config = {**TINY, "model_type": "nemotron_h", "hybrid_override_pattern": "M*", "head_dim": 16, "mamba_num_heads": 4}
    hybrid = architecture_of({**config, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16}, "config.json")
    assert activations.cache_bytes(hybrid) == (2 * 2 * 32, FP32 * 128 * 16 + BF16 * (128 + 2 * 2 * 16) * 3)


def test_a_batch_of_answers_is_largest_at_its_prompts_or_at_its_last_token():
    model = training().student
    long = Answering(model=model, rows=4, prompt=8, new=4000)
    assert worst(long.moments()).name == "last token"
    assert worst(dataclasses.replace(long, prompt=4000, new=1).moments()).name == "prompts"
    cache = long.moments()[1].items["KV cache"]
    assert cache == 4 * 4008 * 3 * 2 * 2 * 32


def test_a_gpu_holds_more_than_its_tensors():
    moment = with_slack(Moment("now", {"model": 100.0}), ranks=2)
    assert moment.items["model"] == 100 and moment.items["allocator"] == pytest.approx(5) and moment.items["NCCL"] > 0
    assert "NCCL" not in with_slack(Moment("now", {"model": 100.0})).items
    assert moment.largest[0][0] == "NCCL"


def test_a_code_takes_nine_sixteenths_of_a_byte():
    assert CODE_BYTES == 0.5625
