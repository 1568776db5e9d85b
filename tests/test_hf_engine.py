"""The engine in process: it changes nothing of its model, and nothing of the model's repository changes its answers."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from harness import loading
from harness.engines import Request, Sampling
from harness.engines.hf import MERGED_INPUTS, HfEngine
from harness.gate_checks import NOTED
from harness.stages import Workbench
from harness.table_notes import FLAGS
from qad.checkpoint import load_checkpoint

GREEDY = Sampling(max_tokens=12, until=())
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)
HOSTILE = {
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.01,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "max_length": 3,
    "min_new_tokens": 40,
    "num_beams": 3,
    "suppress_tokens": list(range(256, 512)),
    "forced_eos_token_id": 5,
    "eos_token_id": list(range(512)),
}
"""Each of these would show in the answers if it acted."""


def engine_of(folder, tokenizer, batch_size=4):
    return HfEngine(load_checkpoint(folder), tokenizer, eos_ids={1}, args={"batch_size": batch_size})


@pytest.fixture(scope="module")
def engine(tiny_model, tiny_tokenizer):
    return engine_of(tiny_model, tiny_tokenizer)


def batch_of(tokenizer, sampling, n=4):
    texts = [f"Question {i}: how much is {i} and {i + 1}?" + " Please." * i for i in range(n)]
    seeds = [None if sampling.temperature == 0 else 11 + i for i in range(n)]
    return [
        Request(token_ids=tuple(tokenizer(text)["input_ids"]), sampling=sampling, seed=seed)
        for text, seed in zip(texts, seeds, strict=True)
    ]


def tokens_of(engine, batch):
    found = dict(engine.answer(batch))
    return [found[place].token_ids for place in range(len(batch))]


def test_the_engine_leaves_weights_ties_and_logits_as_they_were(tiny_model, tiny_tokenizer):
    loaded = load_checkpoint(tiny_model)
    model, ids = loaded.model, torch.tensor([tiny_tokenizer("Some text to look at.")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits.clone()
    weights = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    engine = HfEngine(loaded, tiny_tokenizer, eos_ids={1}, args={})
    batch = batch_of(tiny_tokenizer, SAMPLED)
    tokens_of(engine, batch)
    list(engine.answer([Request(token_ids=batch[0].token_ids, continuation=(5, 6))]))
    assert engine.model is model
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == weights.keys()
    assert all(after[name].data_ptr() == at and torch.equal(after[name], was) for name, (at, was) in weights.items())
    assert after["lm_head.weight"].data_ptr() == after["model.embed_tokens.weight"].data_ptr()  # a tied pair stays one


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_what_was_asked_before(engine, tiny_model, tiny_tokenizer, sampling):
    batch = batch_of(tiny_tokenizer, sampling)
    fresh = tokens_of(engine_of(tiny_model, tiny_tokenizer), batch)
    for other in (GREEDY, SAMPLED, dataclasses.replace(SAMPLED, top_k=3, max_tokens=30)):
        tokens_of(engine, batch_of(tiny_tokenizer, other, n=7))
    list(engine.answer([Request(token_ids=batch[0].token_ids, continuation=(5, 6))]))
    assert tokens_of(engine, batch) == fresh
    assert len({len(tokens) for tokens in fresh}) > 1 or max(map(len, fresh)) == sampling.max_tokens


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_hostile_generation_config_changes_nothing(engine, tiny_model, tiny_tokenizer, tmp_path, sampling):
    folder = tmp_path / "hostile"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(json.dumps(HOSTILE))
    batch = batch_of(tiny_tokenizer, sampling)
    expected = tokens_of(engine, batch)
    assert tokens_of(engine_of(folder, tiny_tokenizer), batch) == expected


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_what_a_loaded_model_says_of_generation_changes_nothing(engine, tiny_model, tiny_tokenizer, sampling):
    loaded = load_checkpoint(tiny_model)
    loaded.model.generation_config = GenerationConfig.from_dict(HOSTILE)
    batch = batch_of(tiny_tokenizer, sampling)
    hostile = HfEngine(loaded, tiny_tokenizer, eos_ids={1}, args={"batch_size": 4})
    assert tokens_of(hostile, batch) == tokens_of(engine, batch)


def test_merged_input_scales_are_said_when_a_checkpoint_is_read_and_marked_in_every_row(
    tiny_model, tiny_tokenizer, monkeypatch
):
    loaded = dataclasses.replace(load_checkpoint(tiny_model), merged_inputs=("a.experts.up_proj", "b.experts.up_proj", "c"))
    monkeypatch.setattr(loading, "load_model", lambda *args, **options: loaded)
    said = []
    bench = SimpleNamespace(
        plan=SimpleNamespace(suite=SimpleNamespace(model=SimpleNamespace(trust_remote_code=False))),
        reporter=SimpleNamespace(say=said.append),
    )
    assert Workbench._read(bench, tiny_model, torch.device("cpu")) is loaded
    assert len(said) == 1 and "a.experts.up_proj, b.experts.up_proj and 1 more: several input scales" in said[0]
    engine = HfEngine(loaded, tiny_tokenizer, eos_ids={1}, args={})
    assert engine.flags == (MERGED_INPUTS,) and MERGED_INPUTS in FLAGS and MERGED_INPUTS in NOTED
    assert engine_of(tiny_model, tiny_tokenizer).flags == ()
    assert loading.notes_of(load_checkpoint(tiny_model)) == []
