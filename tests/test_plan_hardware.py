"""`harness plan --gpu` says what a suite needs of machines before anything is downloaded, and what to change where it does not fit."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from harness.architecture_sizes import architecture_of
from harness.cli import app
from harness.errors import ModelError, SuiteError
from harness.hardware import BANDWIDTH_SHARE, GPUS, TRAINING_SHARE, TRAINING_SHARE_EXPERTS, Cluster, cluster_of
from harness.memory_model import Training, of_quantization_host
from harness.model_config import config_of
from harness.models import Source
from harness.plan import Stage
from harness.plan_hardware import hardware_outlook
from harness.planned_recipe import quantized_by
from harness.schema import Quantization
from harness.schema import Training as TrainingSettings
from harness.store import Store
from harness.task_costs import new_tokens
from harness.task_settings import plain_task
from harness.time_and_disk import (
    Generation,
    checkpoint_bytes,
    generation_hours,
    reading_hours,
    resume_bytes,
    training_hours,
    validation_hours,
)
from tests.test_gguf_config import write_gguf

HEX = "0" * 39 + "1"
QUANTIZED = Quantization.model_validate({"calibration": {"data": "text"}})
SMALL = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
SEVENTY = {**SMALL, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
SUITE = """
schema = 1
name = "planned"
[model]
path = "org/model"
revision = "{hex}"
[quantization]
exclude = {exclude}
calibration = {{ data = "text", samples = 8 }}
[data.text]
source = "hub"
path = "org/data"
revision = "{hex}"
messages = "messages"
seq_len = {seq_len}
[training]
tokens = 100_000_000
batch_size = {batch_size}
micro_batch_size = {micro_batch_size}
lr = 1e-6
loss_on = "all"
{training}
[[variant]]
name = "bf16"
method = "bf16"
[[variant]]
name = "qad"
method = "qad"
[[task]]
name = "aime25"
repeats = 2
sampling = {{ temperature = 0.6, max_tokens = 1000 }}
[engine]
{engine}
[diagnostics]
data = "text"
samples = 8
"""
DEFAULTS = {
    "exclude": '["lm_head"]',
    "seq_len": 2048,
    "batch_size": 64,
    "micro_batch_size": 1,
    "training": "",
    "kernels": "w4a4_emulation",
    "args": "max_model_len = 8192",
}


def written(**changes) -> str:
    """The suite, its parts as in DEFAULTS but for `changes`; vLLM's settings have no effect beside an `engine`."""
    given = {**DEFAULTS, **changes}
    given.setdefault("engine", 'kind = "vllm"\nkernels = "{kernels}"\nargs = {{ {args} }}'.format(**given))
    return SUITE.format(hex=HEX, **given)


@pytest.fixture
def planned(tmp_path):
    """The lines for a suite of a model of the hub that is not here, by its configuration, and whether all of it fits."""

    def plan(config, gpu="h100", count=8, nodes=1, **changes):
        suite, file = tmp_path / "planned.toml", tmp_path / "config.json"
        suite.write_text(written(**changes))
        file.write_text(json.dumps(config))
        found = hardware_outlook(suite, Cluster(GPUS[gpu], count, nodes), config=file)
        return "\n".join(found.lines), found.fits

    return plan


def row(text: str, label: str) -> str:
    """What is said of one stage: its line, and the lines of problems and changes below it."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"  {label} "))
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith("      "))
    return "\n".join(lines[start:end])


def test_a_model_with_room_fits_and_the_figures_are_marked_as_not_verified(planned):
    text, fits = planned(SMALL)
    assert (
        fits
        and text.splitlines()[-1] == "the GPUs fit; NOT compared: the 68 GB of host memory that a node needs (--host-memory)"
    )
    assert "hardware: 8 × H100 SXM 80 GB; nothing of it is verified on such a machine" in text
    assert "model: llama, 1.50 billion parameters, 2.8 GiB in BF16" in text
    assert "quantized: 64.9% of the parameters, in 112 weights; excluded: lm_head" in text
    for label in (
        "calibrate",
        "quantize",
        "qad: train",
        "qad: train, export",
        "diagnostics",
        "answers, BF16",
        "answers, quantized",
    ):
        assert " fits " in row(text, label)


def test_trainings_over_several_gpus_are_told_how_they_are_started(planned, tmp_path):
    said = "trainings over {} GPUs take torchrun, else they run on one: "
    suite = tmp_path / "planned.toml"
    assert said.format(8) + f"torchrun --nproc-per-node 8 --module harness run {suite} (docs/multi-gpu.md)" in planned(SMALL)[0]
    text, _ = planned(SMALL, nodes=2, count=4)
    assert said.format(8) + "on each node: torchrun --nnodes 2 --rdzv-backend c10d" in text and "--nproc-per-node 4" in text
    assert "torchrun" not in planned(SMALL, count=1)[0]


def test_the_largest_contributors_come_first(planned):
    text, _ = planned(SMALL, seq_len=32768)
    said = row(text, "qad: train").split(": ", 2)[2].splitlines()[0]
    sizes = [float(item.rsplit(" ", 1)[1]) for item in said.split(", ") if item[-1].isdigit()][:4]
    assert len(sizes) == 4 and sizes == sorted(sizes, reverse=True) and said.startswith("activations")


def test_the_contributors_add_up_to_what_is_needed(planned):
    lines = [
        line for line in planned(SMALL, seq_len=32768)[0].splitlines() if " GiB  fits " in line or " GiB  DOES NOT" in line
    ]
    assert len(lines) == 7 and any(", rest " in line for line in lines)
    for line in lines:
        parts = [item.rsplit(" ", 1)[1] for item in line.split(": ", 2)[-1].split(", ")]
        total = float(line.partition(" of ")[0].split()[-1])
        assert sum(float(part) for part in parts if part[0].isdigit()) == pytest.approx(total, abs=0.05 * 6), line


def test_a_training_that_does_not_fit_is_told_the_least_that_helps(planned):
    text, fits = planned(SMALL, micro_batch_size=8, seq_len=8192)
    assert not fits and "DOES NOT FIT" in row(text, "qad: train")
    assert "change: training.micro_batch_size = 4" in row(text, "qad: train")
    text, _ = planned(SMALL, count=1, micro_batch_size=1, seq_len=40960)
    assert "change: training.activation_checkpointing = true: " in row(text, "qad: train")


def test_a_training_that_needs_more_nodes_is_told_how_many(planned):
    text, _ = planned(SEVENTY)
    said = row(text, "qad: train")
    assert "DOES NOT FIT" in said and "change: needs 4 nodes of 8 GPUs, with training.activation_checkpointing = true" in said
    assert " fits " in row(planned(SEVENTY, nodes=4, training="activation_checkpointing = true")[0], "qad: train")
    assert "DOES NOT FIT" in row(planned(SEVENTY, nodes=3, training="activation_checkpointing = true")[0], "qad: train")


def test_where_no_number_of_nodes_helps_larger_gpus_are_named(planned):
    text, _ = planned({**SEVENTY, "num_hidden_layers": 160}, batch_size=8, seq_len=32768)
    said = row(text, "qad: train")
    assert (
        "no number of nodes helps on H100 SXM 80 GB, up to a rank for each of the 8 sequences of a step; lower the seq_len"
        in said
    )


def test_what_one_gpu_does_is_not_helped_by_more_of_them(planned):
    text, fits = planned(SEVENTY, nodes=64, training="activation_checkpointing = true")
    assert not fits
    assert "change: one GPU does it, however many there are: h200 or b200 or b300 has room" in row(text, "calibrate")
    assert "b200 or b300 has room" in row(text, "quantize")
    assert "change: one GPU does it, and none that is known has room" in row(text, "diagnostics")


def test_vllm_is_told_over_how_many_gpus_its_weights_fit(planned):
    said = row(planned(SEVENTY)[0], "answers, BF16")
    assert "change: engine.args.tensor_parallel_size = 2" in said
    assert " fits " in row(planned(SEVENTY, args="tensor_parallel_size = 2")[0], "answers, BF16")
    assert "is more than the 4 GPUs of a node" in row(
        planned(SEVENTY, count=4, args="tensor_parallel_size = 8")[0], "answers, BF16"
    )


def test_a_model_that_does_not_divide_by_the_gpus_of_a_copy_is_a_problem(planned):
    config = {**SEVENTY, "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 18944}
    text, fits = planned(config, args="tensor_parallel_size = 3", gpu="b200")
    said = row(text, "answers, BF16")
    assert not fits and "engine.args.tensor_parallel_size = 3: does not divide 28 heads, 4 key heads, an MLP of 18,944" in said
    assert "; allowed for this model: 1, 2, 4\n" in said + "\n"
    for args in ("tensor_parallel_size = 2", "tensor_parallel_size = 4"):
        assert "does not divide" not in planned(config, args=args, gpu="b200")[0]
    odd = {**SEVENTY, "num_hidden_layers": 160, "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 292}
    said = row(planned(odd)[0], "answers, BF16")
    assert "change: engine.args.tensor_parallel_size = 4" in said
    assert "no tensor_parallel_size of this node helps" in row(planned({**odd, "num_hidden_layers": 320})[0], "answers, BF16")


def test_a_context_that_cannot_hold_an_answer_is_a_problem(planned):
    text, fits = planned(SMALL, args="max_model_len = 1000")
    for label in ("answers, BF16", "answers, quantized"):
        said = row(text, label)
        assert (
            not fits
            and "aime25: answers of 1,000 tokens (max_tokens) leave no room for a prompt in engine.args.max_model_len = 1,000"
            in said
        )
    assert planned(SMALL, args="max_model_len = 1001")[1]
    long = '[[task]]\nname = "aa_lcr"\nsampling = { temperature = 0.6, max_tokens = 1000 }\n[judge]\npath = "org/model"\n'
    long += f'revision = "{HEX}"\n'
    long += 'max_tokens = 900\n[judge.engine]\nkind = "vllm"\nargs = { max_model_len = 900 }'
    text, _ = planned(SMALL, training=long, args="max_model_len = 113_000")
    assert "leave no room for a prompt of about 113,300 tokens in engine.args.max_model_len = 113,000" in row(
        text, "answers, BF16"
    )
    assert (
        "aa_lcr: answers of 900 tokens (max_tokens) leave no room for a prompt in judge.engine.args.max_model_len = 900"
        in row(text, "judge")
    )
    text, fits = planned({**SMALL, "max_position_embeddings": 900}, engine='kind = "hf"')
    assert not fits and "leave no room for a prompt in the model's context = 900" in row(text, "answers, BF16")


def test_kernels_that_hold_decoded_weights_need_as_much_as_bf16(planned):
    def weights(label, kernels):
        return float(row(planned(SEVENTY, kernels=kernels)[0], label).split("weights ")[1].split(",")[0])

    bf16 = weights("answers, BF16", "native")
    assert weights("answers, quantized", "w4a4_emulation") == bf16
    assert weights("answers, quantized", "native") == pytest.approx(
        0.30 * bf16, abs=0.01 * bf16
    )  # embeddings and head stay BF16


def test_a_checkpoint_that_was_made_elsewhere_is_as_large_as_its_files(planned, tmp_path):
    from harness.store import write_json

    folder = tmp_path / "released"
    folder.mkdir()
    write_json(folder / "config.json", {})
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(120 * 2**20)
    other = f'[[variant]]\nname = "released"\nmethod = "checkpoint"\npath = "{folder}"'
    text, _ = planned(SMALL, training=other, gpu="b200", kernels="native")
    assert "weights 0.1" in row(text, "answers, checkpoint") and "weights 1.5" in row(text, "answers, quantized")


def test_the_cache_of_a_model_with_fewer_key_heads_than_gpus_is_held_several_times(planned):
    def cache(heads, gpus):
        args = f"tensor_parallel_size = {gpus}, max_model_len = 131072"
        said = row(planned({**SMALL, "num_key_value_heads": heads}, args=args)[0], "answers, BF16")
        return float(said.split("KV cache of one sequence ")[1].split(",")[0])

    assert [cache(8, gpus) for gpus in (1, 2, 4, 8)] == [4.0, 2.0, 1.0, 0.5]
    assert [cache(2, gpus) for gpus in (1, 2, 4, 8)] == [1.0, 0.5, 0.5, 0.5]


def test_a_checkpoint_whose_files_are_not_here_is_said_to_be_counted_as_bf16(planned):
    other = f'[[variant]]\nname = "released"\nmethod = "checkpoint"\npath = "org/released"\nrevision = "{HEX}"'
    text, _ = planned(SMALL, training=other, gpu="b200", kernels="native")
    assert "note: released: counted as large as the model, at most: its files are not here" in text
    assert "weights 2.8" in row(text, "answers, checkpoint")


def hours(text: str, label: str) -> float:
    """GPU-hours of what has the label."""
    return next(float(line.split()[0].replace(",", "")) for line in text.splitlines() if f"  {label} (" in line)


def test_the_hours_of_the_whole_machine_are_beside_those_at_work(planned):
    text, _ = planned(SEVENTY, gpu="b200", nodes=8)
    (said,) = [line for line in text.splitlines() if line.startswith("time: ")]
    wall, paid, idle = (float(said.split()[i].rstrip("%").replace(",", "")) for i in (1, 8, -2))
    rows = [line for line in text.splitlines() if " hours on " in line]
    took = [line.partition("(")[2].split() for line in rows]
    assert wall == pytest.approx(sum(float(each[0].replace(",", "")) for each in took), abs=0.05 * len(rows))
    assert "GPU-hours of 64 GPUs, of which" in said and paid == pytest.approx(64 * wall, abs=4)
    at_work = sum(float(line.split()[0].replace(",", "")) for line in rows)
    assert f"GPU-hours at work: {at_work:,.1f}"[:-2] in text and idle == pytest.approx(100 * (1 - at_work / paid), abs=1)
    assert 10 < idle < 90
    text, _ = planned(SEVENTY, gpu="b200", count=1)
    assert "GPU-hours: " in text and "idle" not in text


def test_validations_and_the_share_of_the_peak_are_printed_with_the_hours(planned):
    often = "validate_every = 10\nvalidation_samples = 64"
    plain, checked = planned(SEVENTY, gpu="b200")[0], planned(SEVENTY, gpu="b200", training=often)[0]
    (said,) = [line for line in checked.splitlines() if "  qad: train (" in line]
    share = 1 - hours(plain, "qad: train") / hours(checked, "qad: train")
    assert 0.02 < share < 0.5 and f" hours on 8 GPUs; {share:.0%} of it validations)" in said
    assert "validations)" not in plain
    assert f" (trainings at {TRAINING_SHARE:.0%} of the BF16 peak, assumed), of which" in checked


def test_choosing_among_candidates_costs_the_answers_of_each_of_them(planned):
    choice = 'validate_every = 10\nselect = "best_of_k"\ncandidates = {}\nselect_tasks = ["math500"]'
    text, _ = planned(SEVENTY, gpu="b200", training=choice.format(7))
    tokens = int(text.split("tokens to generate: ")[1].split()[0].replace(",", ""))
    assert tokens == 2 * 30 * 2 * 1000 + 7 * 500 * new_tokens(plain_task("math500", None, None))
    fewer, _ = planned(SEVENTY, gpu="b200", training=choice.format(5))
    label = "qad: select, at most"
    assert hours(text, label) == pytest.approx(7 / 5 * hours(fewer, label), abs=0.2) and hours(fewer, label) > 1
    assert " fits " in row(text, "qad: select, export")


def test_a_judge_is_counted_by_its_own_model_and_the_length_of_a_verdict(planned, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.plan_hardware.n_requests", lambda prepared, store: 100)
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "config.json").write_text(json.dumps(SEVENTY))
    (judge / "model.safetensors").write_bytes(b"")
    section = (
        f'[judge]\npath = "{judge}"\nmax_tokens = 500\n[judge.engine]\nkind = "vllm"\nargs = {{ tensor_parallel_size = 4 }}\n'
    )
    asked = section + '[[task]]\nname = "aa_lcr"\nsampling = { temperature = 0.6, max_tokens = 1000 }'
    text, _ = planned(SMALL, training=asked)
    tokens = int(text.split("tokens to generate: ")[1].split()[0].replace(",", ""))
    assert tokens == 2 * 100 * 2 * 1000 + 2 * 100 * (1000 + 500)
    assert hours(text, "judge") > 0 and "4 GPUs" in row(text, "judge")


def test_prompts_of_a_hundred_thousand_tokens_are_counted_as_such(planned, monkeypatch):
    monkeypatch.setattr("harness.plan_hardware.n_requests", lambda prepared, store: 10_000)

    def took(task):
        asked = f'[[task]]\nname = "{task}"\nsampling = {{ temperature = 0.6, max_tokens = 1000 }}'
        return hours(planned(SEVENTY, gpu="h200", args="max_model_len = 262144", training=asked)[0], "answers of bf16")

    short, long = took("gpqa_diamond"), took("aa_lcr")
    read = reading_hours(architecture_of(SEVENTY, "config.json"), 10_000 * (113_300 - 1024), GPUS["h200"])
    assert long - short > 0.9 * read > 10  # their cache is read with every token, besides


def test_answers_take_as_long_as_the_rows_that_have_room_at_once(planned):
    def took(heads, sequences):
        args = f"max_model_len = 131072, max_num_seqs = {sequences}"
        text, _ = planned({**SEVENTY, "num_key_value_heads": heads, "num_hidden_layers": 32}, gpu="h200", args=args)
        told = row(text, "answers, BF16").partition("note: ")[2].partition(" ")[0]
        return told, hours(text, "answers of bf16")

    room, full = took(8, 64)
    assert 1 < int(room) < 20 and took(8, int(room)) == ("", full) and took(8, 64 // 64)[1] > full


def test_copies_of_a_model_share_the_answers(planned):
    def took(args):
        text, _ = planned(SEVENTY, gpu="a100", args=f"max_num_seqs = 1, {args}")
        (said,) = [line for line in text.splitlines() if "  answers of bf16 (" in line]
        return text, float(said.split("(")[1].split()[0]), said.rpartition(" on ")[2]

    _, alone, on_two = took("tensor_parallel_size = 2")
    text, shared, on_eight = took("tensor_parallel_size = 2, data_parallel_size = 4")
    assert (on_two, on_eight) == ("2 GPUs)", "8 GPUs)") and "8 GPUs, serving" in row(text, "answers, BF16")
    assert alone > 0.5 and shared == pytest.approx(alone / 4, abs=0.07)


def test_serving_says_of_how_many_tokens_its_activations_are(planned):
    def activations(args):
        found = re.search(
            r"activations of ([0-9,]+) tokens ([0-9.]+)", row(planned(SEVENTY, gpu="b300", args=args)[0], "answers, BF16")
        )
        return found[1], float(found[2])

    tokens, whole = activations("max_model_len = 131072")
    assert tokens == "131,072"  # a prompt is computed as a whole
    tokens, parts = activations("max_model_len = 131072, max_num_batched_tokens = 8192")
    assert tokens == "8,192" and whole == pytest.approx(16 * parts, rel=0.1)


def test_the_engine_in_process_is_planned_with_its_batches_on_one_gpu(planned):
    def took(rows):
        text, _ = planned(SEVENTY, engine=f'kind = "hf"\nargs = {{ batch_size = {rows} }}', gpu="b300")
        assert "1 GPU, " in row(text, "answers, BF16")
        return hours(text, "answers of bf16")

    assert took(1) > 2 * took(8) > 0


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200"])
def test_native_kernels_are_a_problem_of_a_gpu_without_fp4_units(planned, gpu):
    text, fits = planned(SMALL, gpu=gpu, kernels="native")
    said = row(text, "answers, quantized")
    assert not fits and "NOT POSSIBLE" in said and "has no FP4 units" in said
    assert 'set engine.kernels and gate.kernels to "w4a4_emulation"' in said
    assert " fits " in row(text, "answers, BF16")
    assert planned(SMALL, gpu=gpu, kernels="w4a4_emulation")[1] and planned(SMALL, gpu="b200", kernels="native")[1]


def test_what_has_room_and_cannot_be_done_is_told_apart_from_what_does_not_fit(planned):
    text, _ = planned(SMALL, kernels="native", micro_batch_size=8, seq_len=16384)
    assert "NOT POSSIBLE" in row(text, "answers, quantized") and "DOES NOT FIT" in row(text, "qad: train")
    assert text.splitlines()[-2:] == ["does NOT fit: qad: train", "NOT possible: answers, quantized"]
    assert planned(SEVENTY)[0].splitlines()[-1].startswith("does NOT fit: answers, BF16; diagnostics; calibrate; quantize; ")


def test_too_few_batches_for_the_ranks_and_an_optimizer_that_ranks_cannot_share_are_said_now(planned):
    said = row(planned(SMALL, batch_size=64, micro_batch_size=16)[0], "qad: train")
    assert "a step has 4 batches for 8 ranks: set training.micro_batch_size = 8 or less" in said
    said = row(planned({**SMALL, "num_hidden_layers": 2}, batch_size=4, micro_batch_size=4)[0], "qad: train")
    assert "; or raise training.batch_size" in said and "no number of nodes helps" not in said
    said = row(planned(SMALL, training='optimizer = "adafactor"')[0], "qad: train")
    assert 'optimizer = "adafactor" does not work over several ranks; use "adamw"' in said
    assert " fits " in row(planned(SMALL, count=1, training='optimizer = "adafactor"')[0], "qad: train")


def test_more_ranks_than_a_step_has_sequences_are_told_how_many_can_work(planned):
    said = row(planned(SMALL, nodes=32)[0], "qad: train")
    assert "a step has 64 sequences for 256 ranks, and each rank needs one" in said
    assert "change: use at most 8 nodes of 8 GPUs, with the suite as it is: " in said and "no number of nodes" not in said
    assert " fits " in row(planned(SMALL, nodes=8)[0], "qad: train")
    said = row(planned(SMALL, batch_size=4, micro_batch_size=4)[0], "qad: train")
    assert "use at most 4 of the GPUs of one node, with training.micro_batch_size = 1: " in said
    huge = {**SEVENTY, "num_hidden_layers": 400}
    said = row(planned(huge, batch_size=4, training="activation_checkpointing = true")[0], "qad: train")
    assert "use at most" not in said and "no number of nodes helps" in said


def test_a_pattern_that_matches_nothing_or_everything_is_said_now(planned):
    text, _ = planned(SMALL, exclude='["lm_head", "*.conv1d"]')
    assert 'quantization.exclude: "*.conv1d" matches nothing of this model; near names: ' in text
    assert "quantization.exclude: leaves nothing to quantize" in planned(SMALL, exclude='["*"]')[0]


def test_the_host_needs_room_for_each_process_of_a_training_and_for_a_model_that_is_quantized(planned):
    model = architecture_of(SMALL, "c")
    n = sum(weight.size for weight in model.weights if weight.name in quantized_by(model, QUANTIZED))
    one = 2 * model.size + 2.5625 * n
    host = next(line for line in planned(SMALL)[0].splitlines() if line.startswith("host memory:"))
    expected = (
        f"host memory: {8 * (one + 2 * model.size) / 1e9:,.0f} GB on each node, before a training is on its GPUs (8 processes)"
    )
    assert host == expected
    assert of_quantization_host(model, quantized_by(model, QUANTIZED), frozenset()) == one


def test_what_takes_next_to_no_time_has_one_line(planned):
    text, _ = planned(SMALL, gpu="b200")
    said = text.partition("GPU-hours at work: ")[2]
    assert "  less than 0.05 each: " in said and "calibrate, at most" in said and " 0.0  " not in said


def test_layers_that_stay_by_position_are_not_among_the_quantized(planned):
    text, _ = planned(SMALL, exclude='["lm_head"]\nexclude_layers = { first = 2, last = 2 }')
    assert "quantized: 48.7% of the parameters, in 84 weights; excluded: lm_head, first = 2, last = 2" in text


def test_tokens_to_generate_are_counted_by_the_rows_of_the_task_where_it_is_not_prepared(planned):
    text, _ = planned(SMALL)
    assert f"tokens to generate: {2 * 30 * 2 * 1000:,} at most" in text  # two variants, 30 questions, two answers


def test_nothing_heavy_is_imported():
    code = "import sys, harness.plan_hardware; print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_takes_its_operations_over_a_share_of_the_peak():
    model = architecture_of({**SMALL, "num_hidden_layers": 1}, "c")
    quantized = quantized_by(model, QUANTIZED)
    one = Training(student=model, teacher=model, quantized=quantized, rows=1, tokens=1000)
    trained = sum(w.size for w in model.weights if w.name in quantized)
    looked = 4 * 2048 * 500
    operations = 2 * (2 * model.active + trained) + 3 * looked + 2 * model.active + looked
    expected = 1e6 * operations / (TRAINING_SHARE * 989e12) / 3600
    assert training_hours(one, 1_000_000, GPUS["h100"]) == pytest.approx(expected)
    assert model.active == model.size - 128256 * 2048  # all but the embedding


def test_validations_read_the_held_out_sequences_with_student_and_teacher_so_often():
    model = architecture_of({**SMALL, "num_hidden_layers": 1}, "c")
    one = Training(student=model, teacher=model, quantized=quantized_by(model, QUANTIZED), rows=1, tokens=1000)
    given = {"tokens": 101_000, "batch_size": 4, "lr": 1e-6, "loss_on": "all", "validation_samples": 6}
    settings = TrainingSettings.model_validate({**given, "validate_every": 10})
    n_tokens = 3 * 6 * 1000  # of 26 steps, after 10, 20 and the last
    operations = 2 * (2 * model.active + 4 * 2048 * 500)
    expected = n_tokens * operations / (TRAINING_SHARE * 989e12) / 3600
    assert validation_hours(one, settings, GPUS["h100"]) == pytest.approx(expected)
    assert validation_hours(one, TrainingSettings.model_validate(given), GPUS["h100"]) == 0


def test_the_share_of_experts_is_that_of_the_published_training():
    """8.4e9 tokens in 735 GPU-hours of 2.5e15 operations a second, 3e9 weights a token, eight operations each."""
    reached = 8 * 3e9 * 8.4e9 / (735 * 3600 * 2.5e15)
    assert reached == pytest.approx(TRAINING_SHARE_EXPERTS, abs=0.005)


def test_generation_reads_weights_and_caches_for_every_token():
    model = architecture_of(SMALL, "c")
    given = Generation(model=model, requests=10, prompt=0, new=100, rows=5, gpus=2, weight_bytes=1e9)
    a_token = 16 * 2 * 2 * 8 * 64
    seconds = (1e9 + 5 * 50 * a_token) / (BANDWIDTH_SHARE * 3.35e12 * 2)
    assert generation_hours(given, GPUS["h100"]) == pytest.approx(2 * (10 * 100 / 5) * seconds / 3600)
    copied = dataclasses.replace(given, requests=40, copies=4)
    assert generation_hours(copied, GPUS["h100"]) == pytest.approx(4 * generation_hours(given, GPUS["h100"]))


def test_a_checkpoint_and_what_a_training_goes_on_from_take_disk():
    model = architecture_of(SMALL, "c")
    quantized = quantized_by(model, QUANTIZED)
    packed = sum(w.size for w in model.weights if w.name in quantized)
    assert checkpoint_bytes(model, quantized) == 2 * (model.size - packed) + 0.5625 * packed
    one = Training(student=model, teacher=model, quantized=quantized, rows=1, tokens=8, ranks=4)
    assert resume_bytes(one) == 2 * 12 * packed


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("h300", 8, None), r"--gpu h300: not known\. Known: a100, h100, h200, b200, b300"),
        (("h100", None, None), r"--count: missing; say how many GPUs a node has beside --gpu h100"),
        (("h100", 0, None), r"--count 0: allowed are 1 to 16 GPUs of a node"),
        (("h100", 8, 0), r"--nodes 0: allowed are 1 to 1024 nodes"),
        (("h100", 8, 1, 0.0), r"--host-memory 0: allowed are more than 0, and at most 100,000 GB of a node"),
        ((None, None, None, 512.0), r"--host-memory: has no effect without --gpu; name one"),
        ((None, 8, None), r"--count: has no effect without --gpu; name one\. Known: a100"),
    ],
)
def test_machines_that_make_no_sense_are_refused(asked, message):
    with pytest.raises(SuiteError, match=message):
        cluster_of(*asked[:3], host_gb=asked[3] if len(asked) > 3 else None)
    assert cluster_of(None, None) is None and cluster_of("H100", 8, None) == Cluster(GPUS["h100"], 8, 1)


def test_a_hub_model_that_is_not_here_needs_its_configuration_alone(tmp_path):
    suite = tmp_path / "planned.toml"
    suite.write_text(written())
    with pytest.raises(ModelError, match=r"org/model at 0+1: its config\.json is neither .*--config"):
        hardware_outlook(suite, Cluster(GPUS["h100"], 8))


def test_nothing_is_fetched_of_a_hub_model_without_a_revision(tmp_path, monkeypatch):
    suite = tmp_path / "planned.toml"
    text = written().replace(f'path = "org/model"\nrevision = "{HEX}"', 'path = "org/model"')
    suite.write_text(text)
    monkeypatch.setattr("harness.model_config.fetch_config", lambda model: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=r"org/model: has no revision, so nothing .*--config"):
        hardware_outlook(suite, Cluster(GPUS["h100"], 8))


@pytest.mark.parametrize("form", ["my/big", "./big", "{}/big"])
def test_a_folder_with_nothing_but_its_configuration_is_planned_by_it(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    path = form.format(tmp_path)
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / path / "config.json").write_text(json.dumps(SMALL))
    suite = tmp_path / "planned.toml"
    suite.write_text(written().replace(f'path = "org/model"\nrevision = "{HEX}"', f'path = "{path}"'))
    text = "\n".join(hardware_outlook(suite, Cluster(GPUS["h100"], 8)).lines)
    assert "model: llama, 1.50 billion parameters" in text


def test_a_gguf_model_is_planned_from_its_metadata_and_once_converted_from_its_config(tmp_path):
    store = Store(tmp_path / "cache")
    write_gguf(tmp_path / "m.gguf")
    stage = Stage("model", "model", {"fingerprint": "x"}, source=Source(tmp_path, "m.gguf", "x", "package p"))
    found = config_of(stage, store)
    assert (found.fields["hidden_size"], found.fields["model_type"]) == (64, "llama")
    assert found.note is not None and "m.gguf: planned from its metadata, in BF16 as it will be converted" in found.note
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    folder = Stage("model", "model", {"fingerprint": "x"}, source=Source(tmp_path, None, "x", "folder"))
    assert config_of(folder, store).fields == SMALL


def test_the_command_prints_the_plan_of_stages_and_of_machines_and_ends_with_1_where_something_does_not_fit(tmp_path):
    suite, config = tmp_path / "planned.toml", tmp_path / "config.json"
    suite.write_text(written())
    config.write_text(json.dumps(SMALL))
    command = ["plan", str(suite), "--gpu", "h100", "--count", "8", "--config", str(config)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "to do" in done.stdout and "the GPUs fit; NOT compared: the " in done.stdout.splitlines()[-1]
    config.write_text(json.dumps(SEVENTY))
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "does NOT fit: " in done.stdout
    config.write_text(json.dumps({**SMALL, "model_type": "mystery"}))
    assert CliRunner().invoke(app, command).exit_code == 2
    assert CliRunner().invoke(app, ["plan", str(suite), "--gpu", "h1"]).exit_code == 2


@pytest.mark.parametrize(("given", "status"), [("60", 1), ("70", 0)])
def test_host_memory_is_compared_where_it_is_given(tmp_path, given, status):
    suite, config = tmp_path / "planned.toml", tmp_path / "config.json"
    suite.write_text(written())
    config.write_text(json.dumps(SMALL))
    command = ["plan", str(suite), "--gpu", "h100", "--count", "8", "--config", str(config), "--host-memory", given]
    done = CliRunner().invoke(app, command)
    said = f"host memory: 68 GB on each node, before a training is on its GPUs (8 processes), of {given} GB: "
    assert done.exit_code == status and said + ("fits" if status == 0 else "DOES NOT FIT") in done.stdout
    last = "the GPUs fit, and so does host memory" if status == 0 else "does NOT fit: host memory"
    assert done.stdout.splitlines()[-1] == last


def test_a_section_that_would_end_a_run_ends_the_command_with_2_though_the_gpus_fit(tmp_path):
    suite, config = tmp_path / "planned.toml", tmp_path / "config.json"
    suite.write_text(written(exclude='["lm_head", "*.q_proj"]'))
    config.write_text(json.dumps(SMALL))
    done = CliRunner().invoke(app, ["plan", str(suite), "--gpu", "b200", "--count", "8", "--config", str(config)])
    assert done.exit_code == 2 and "the GPUs fit" in done.stdout
    told = done.stderr.partition("to mend before a run:")[2]
    assert "quantization.exclude: splits model.layers.0.self_attn.qkv_proj, of which q_proj would stay" in told


def test_what_is_missing_is_said_beside_an_architecture_that_cannot_be_planned(tmp_path):
    suite, config = tmp_path / "planned.toml", tmp_path / "config.json"
    text = written().replace(f'path = "org/data"\nrevision = "{HEX}"', 'path = "org/data"')
    suite.write_text(text)
    config.write_text(json.dumps({**SMALL, "model_type": "mystery"}))
    done = CliRunner().invoke(app, ["plan", str(suite), "--gpu", "b200", "--count", "8", "--config", str(config)])
    assert done.exit_code == 2
    assert "data.text.revision: missing; org/data" in done.stderr and "model_type 'mystery' is not known" in done.stderr


def test_a_model_of_the_hub_that_is_not_here_is_planned_from_the_configuration_kept_with_the_harness(tmp_path):
    suite = tmp_path / "planned.toml"
    known = "nvidia/NVIDIA-Nemotron-Nano-9B-v2"
    suite.write_text(written().replace("org/model", known))
    text = "\n".join(hardware_outlook(suite, Cluster(GPUS["h200"], 8)).lines)
    assert f"note: {known}: from the configuration kept with the harness (fields as NVIDIA-NeMo/Megatron-Bridge" in text
    assert f"; it is of 6533e8de2c68e4536bf7c411d7a3ce5734111476, the suite asks for {HEX}" in text
    assert "model: nemotron_h, 8.89 billion parameters" in text


def test_the_models_own_configuration_goes_before_the_one_that_is_kept(tmp_path, monkeypatch):
    known, suite = "nvidia/NVIDIA-Nemotron-Nano-9B-v2", tmp_path / "planned.toml"
    suite.write_text(written().replace("org/model", known))
    cached = tmp_path / "config.json"
    cached.write_text(json.dumps(SMALL))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked, **named: str(cached))
    text = "\n".join(hardware_outlook(suite, Cluster(GPUS["h200"], 8)).lines)
    assert "kept with the harness" not in text and "model: llama, 1.50 billion parameters" in text
