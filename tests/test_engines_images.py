"""Requests with images in the engine of this process: each answer from its own pictures, whatever else is in the batch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import asking
import pytest
from image_requests import build_seeing_vlm, mixed, noise, outcomes, request
from PIL import Image as Pillow
from transformers import LlamaConfig, PretrainedConfig

from harness import loading
from harness.engines import RENDERING_UNVERIFIED, Answer, Sampling, batch_digest, identity
from harness.engines.hf import HfEngine, context_length
from harness.engines.scripted import ScriptedEngine
from harness.engines.serving import Serving
from harness.engines.vllm import head_size, takes_images, vllm_options, worker_environment
from harness.errors import EngineError, ModelError, SuiteError
from harness.images import keep_image, keep_picture
from harness.journal import Journal
from harness.models import has_vision, require_kind, text_config_with_defaults
from harness.picture_prompts import context_length as prompt_context
from harness.processor import load_processor
from harness.schema import Engine
from harness.suite import load_suite
from qad.checkpoint import load_checkpoint

GREEDY = Sampling(max_tokens=8, until=())


@pytest.fixture(scope="module")
def seeing_vlm(tiny_vlm, tmp_path_factory):
    return build_seeing_vlm(tmp_path_factory.mktemp("seeing") / "model", tiny_vlm)


@pytest.fixture(scope="module")
def processor(seeing_vlm):
    return load_processor(seeing_vlm)


@pytest.fixture(scope="module")
def engine(seeing_vlm, processor):
    tokenizer = loading.load_tokenizer(seeing_vlm)
    return HfEngine(load_checkpoint(seeing_vlm), tokenizer, eos_ids={2}, args={"batch_size": 8}, processor=lambda: processor)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [keep_picture(noise(i, 20 + i), folder) for i in range(6)]


def test_every_request_of_a_mixed_batch_is_answered_from_its_own_images(engine, processor, pictures):
    batch = mixed(processor, pictures)
    together = [found.logprob for found in outcomes(engine, batch)]
    alone = [outcomes(engine, [one])[0].logprob for one in batch]
    assert together == pytest.approx(alone, abs=0.02)
    exchanged = [dataclasses.replace(batch[0], images=batch[3].images), batch[3]]
    first, last = (found.logprob for found in outcomes(engine, exchanged))
    assert abs(first - alone[0]) > 0.1 and last == pytest.approx(alone[3], abs=0.02)


def test_generation_reads_the_images_once_and_goes_on_from_the_cache(engine, processor, pictures):
    batch = mixed(processor, pictures, continuation=None, sampling=GREEDY)
    calls = []
    vision = engine.model.model.vision_model
    handle = vision.register_forward_pre_hook(lambda m, a, given: calls.append(len(given["pixel_values"])), with_kwargs=True)
    try:
        answers = outcomes(engine, batch)
    finally:
        handle.remove()
    assert calls == [8]
    for one, answer in zip(batch, answers, strict=True):
        assert isinstance(answer, Answer) and 0 < len(answer.token_ids) <= 8
        scored = dataclasses.replace(one, sampling=None, continuation=answer.token_ids)
        (likelihood,) = outcomes(engine, [scored])
        others = dataclasses.replace(scored, continuation=tuple((token + 7) % 250 + 8 for token in answer.token_ids))
        assert likelihood.logprob > outcomes(engine, [others])[0].logprob
    other = [dataclasses.replace(one, images=one.images[::-1] if len(one.images) > 1 else one.images) for one in batch]
    assert (
        [a.token_ids for a in outcomes(engine, batch)]
        == [a.token_ids for a in answers]
        != [a.token_ids for a in outcomes(engine, other)]
    )


def test_the_pixels_are_what_is_answered_from(engine, processor, pictures, tmp_path):
    one = request(processor, [pictures[0]])
    (first,) = outcomes(engine, [one])
    same = keep_image(pictures[0].read(), tmp_path)
    assert outcomes(engine, [dataclasses.replace(one, images=(same,))])[0].logprob == first.logprob
    grey = keep_picture(Pillow.new("RGB", (20, 30), (128, 128, 128)), tmp_path)
    assert abs(outcomes(engine, [dataclasses.replace(one, images=(grey,))])[0].logprob - first.logprob) > 0.1


def test_what_is_asked_covers_the_pixels_and_journals_hold_none_of_them(engine, processor, pictures, tmp_path):
    one = request(processor, [pictures[0]])
    other = dataclasses.replace(one, images=(pictures[1],))
    assert one.token_ids == other.token_ids
    assert identity(one) != identity(other) and batch_digest([one]) != batch_digest([other])
    journal = Journal(tmp_path, {"weights": "w", "task": "t"})
    with journal:
        journal.append_batch([one], outcomes(engine, [one]))
        assert journal.find_batch([one]) is not None and journal.find_batch([other]) is None
    assert len(journal.path.read_bytes()) < 1000  # a picture has 1,800 values


def test_images_for_a_model_that_was_loaded_as_one_of_text_are_refused(seeing_vlm, processor, pictures):
    engine = HfEngine(load_checkpoint(seeing_vlm), processor.tokenizer, eos_ids={2}, args={})
    assert outcomes(engine, [request(processor, [])])
    with pytest.raises(EngineError, match=r'a request with images, .* kind = "image-text"'):
        outcomes(engine, [request(processor, [pictures[0]])])


def test_prompts_of_a_processor_that_expands_images_otherwise_are_refused(engine, processor, pictures):
    one = request(processor, [pictures[0]])
    longer = dataclasses.replace(one, token_ids=(*one.token_ids, processor.image_token_id))
    with pytest.raises(ModelError, match="makes 4 tokens of 1 images, where the prompts hold 5"):
        outcomes(engine, [longer])


def test_expanded_tokens_are_brought_back_to_one_placeholder_an_image(processor, pictures):
    for one in mixed(processor, pictures):
        assert processor.unexpanded(one.token_ids, one.images) == one.unexpanded_ids
    one = request(processor, pictures[:2])
    with pytest.raises(ModelError, match=r"the 7 tokens of image [0-9a-f]{12} are not in its sequence"):
        processor.unexpanded(one.token_ids[:19], one.images)


@pytest.mark.parametrize(
    ("given", "mistake"),
    [
        ("limit_mm_per_prompt = { image = 0 }", r"allowed: a table such as \{ image = 4 \}: images a prompt, at most"),
        ("limit_mm_per_prompt = { video = 1 }", r"allowed: a table such as \{ image = 4 \}"),
        ("mm_processor_cache_gb = -1", "a number, 0 or more, in GiB"),
        ("skip_mm_profiling = true", r"engine.args.skip_mm_profiling: it is about images, and a model of kind \"text\""),
    ],
)
def test_arguments_about_images_are_held_against_what_vllm_takes_and_the_kind_of_the_model(tiny_suite, given, mistake):
    text = tiny_suite.read_text()
    text = text.replace('kind = "hf"\nargs = { batch_size = 8 }', f'kind = "vllm"\nkernels = "w4a16"\nargs = {{ {given} }}')
    tiny_suite.write_text(text)
    with pytest.raises(SuiteError, match=mistake):
        load_suite(tiny_suite)


def test_vllm_takes_no_videos_and_prepares_each_image_anew_in_the_numbers_of_the_processor(tiny_vlm, tiny_model):
    options = vllm_options(tiny_vlm, kernels=None, args={"limit_mm_per_prompt": {"image": 3}})
    assert options["limit_mm_per_prompt"] == {"video": 0, "audio": 0, "image": 3}
    assert (options["mm_processor_cache_gb"], options["mm_device_do_normalize"]) == (0, False)
    assert options["max_model_len"] == 512
    assert "limit_mm_per_prompt" not in vllm_options(tiny_model, kernels=None, args={})
    assert worker_environment("bf16", has_images=True)["QAD_VLLM_IMAGES"] == "1"
    assert worker_environment("bf16")["QAD_VLLM_IMAGES"] == ""


def test_the_plug_in_changes_image_processors_only_where_it_is_told_to(tmp_path):
    program = "import sys; from qad.vllm_plugin import register; register(); print('transformers' in sys.modules)"
    for value, expected in (("", "False"), ("1", "True")):
        environment = os.environ | {"QAD_VLLM_IMAGES": value, "QAD_VLLM_KERNELS": ""}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_a_rendering_that_is_not_proven_marks_tasks_with_images_alone(tiny_tokenizer, tmp_path):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "5")
    engine.flags = ("unverified", RENDERING_UNVERIFIED)
    prepared = asking.prepare(asking.task("mini_math", limit=2), tiny_tokenizer)
    shown = dataclasses.replace(prepared, asks=[dataclasses.replace(ask, images=("0" * 64,)) for ask in prepared.asks])
    found = [asking.evaluate("mini_math", engine, tmp_path, limit=2, prepared=each) for each in (prepared, shown)]
    assert [each.result["flags"] for each in found] == [["unverified"], ["unverified", RENDERING_UNVERIFIED]]


def test_the_configuration_of_the_language_model_has_the_defaults_that_a_repository_leaves_out():
    given = {"vision_config": {}, "text_config": {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8}}
    assert text_config_with_defaults(given)["max_position_embeddings"] == 2048 and head_size(given) == 64
    of_its_own_code = {"vision_config": {}, "llm_config": {"model_type": "unheard", "max_position_embeddings": 77}}
    assert text_config_with_defaults(of_its_own_code)["max_position_embeddings"] == 77
    assert text_config_with_defaults({"max_position_embeddings": 5}) == {"max_position_embeddings": 5}


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_whatever_a_model_calls_the_part_of_its_language_model_its_context_is_found_everywhere(tmp_path, tiny_model, key):
    given = {"model_type": "own_chat", "vision_config": {}, key: {"model_type": "llama", "max_position_embeddings": 77}}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert prompt_context(tmp_path) == vllm_options(tmp_path, kernels=None, args={})["max_model_len"] == 77
    assert Serving(Engine(kind="hf")).context_length(tmp_path) == 77
    loaded = PretrainedConfig(**{key: LlamaConfig(max_position_embeddings=77)})
    assert context_length(loaded) == context_length(PretrainedConfig(llm_config={"max_position_embeddings": 77})) == 77
    assert context_length(LlamaConfig(max_position_embeddings=5)) == 5


def test_a_configuration_that_says_no_context_is_named():
    with pytest.raises(EngineError, match="PreTrainedConfig says nowhere how many tokens .* add it to config.json"):
        context_length(PretrainedConfig())


@pytest.mark.parametrize(("tower", "sees"), [({}, True), ({"width": 8}, True), (None, False)])
def test_a_model_sees_by_one_rule(tmp_path, tower, sees):
    config = {"vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert has_vision(config) is takes_images(tmp_path) is sees and not has_vision({})
    require_kind("model.path", tmp_path, "image-text" if sees else "text")
