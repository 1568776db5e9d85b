"""Asking a server about pictures: in a chat, the files as they are, and no answer to another prompt than the one that was rendered."""

from __future__ import annotations

import base64
import dataclasses
import json

import pytest
from fault_server import SECRET
from image_requests import build_seeing_vlm, noise, outcomes, request
from test_server import Asking, no_network  # noqa: F401  (loopback alone)

from harness.engines import RENDERING_UNVERIFIED, Answer, Failure, Sampling
from harness.engines.launch import require_plugin, vllm_serve
from harness.engines.server import UNVERIFIED, ServerEngine
from harness.errors import EngineError
from harness.images import keep_image, keep_picture
from harness.processor import load_processor
from tests.test_images import packed

SAMPLING = Sampling(max_tokens=5, until=("stop here",), temperature=0.7, top_p=0.9, top_k=40)


@pytest.fixture(scope="module")
def folder(tiny_vlm, tmp_path_factory):
    return build_seeing_vlm(tmp_path_factory.mktemp("seeing") / "model", tiny_vlm)


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


@pytest.fixture
def asking(folder, processor, tmp_path):
    made = Asking(folder, processor.tokenizer, tmp_path / "endpoints")
    yield made
    for one in reversed(made.open):
        one.close() if isinstance(one, ServerEngine) else one.__exit__()


@pytest.fixture
def batch(processor, tmp_path):
    """Two requests, with one picture and with two of other formats, and one without."""
    images = [keep_picture(noise(0), tmp_path / "images"), keep_image(packed(noise(1), "JPEG"), tmp_path / "images")]
    drawn = {"sampling": SAMPLING, "continuation": None}
    return [
        request(processor, images[:1], "What is it, and why does it matter to them?", seed=1000, **drawn),
        request(processor, images[::-1], "Both?", seed=1001, **drawn),
        request(processor, [], "No picture here.", seed=1002, **drawn),
    ]


def rendering(batch):
    """What a server with the model's own processor makes of the chats of a batch."""

    def render(messages):
        text = messages[0]["content"][-1]["text"]
        return next((list(one.token_ids) for one in batch if one.messages[0]["content"][-1]["text"] == text), [1, 2, 3])

    return render


def test_images_travel_as_their_files_in_a_chat_with_every_parameter(asking, batch):
    server = asking.serve(render=rendering(batch))
    found = outcomes(asking.engine(server), batch)
    assert all(isinstance(answer, Answer) and len(answer.token_ids) == 5 for answer in found)
    bodies = {body["seed"]: body for body in server.asked}
    parts = bodies[1001]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    for part, image in zip(parts, batch[1].images, strict=False):
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == f"data:{image.media_type};base64" and base64.b64decode(data) == image.read()
    assert {image.media_type for image in batch[1].images} == {"image/png", "image/jpeg"}
    text = bodies[1002]
    assert text["prompt"] == list(batch[2].token_ids) and "messages" not in text
    settings = {key: value for key, value in bodies[1000].items() if key not in ("messages", "add_generation_prompt")}
    alike = {key: value for key, value in text.items() if key not in ("prompt", "echo")}
    assert settings == alike | {"seed": 1000} and bodies[1000]["add_generation_prompt"] is True


def test_a_begun_answer_is_gone_on_with(asking, processor, batch):
    begun = dataclasses.replace(batch[0], messages=(*batch[0].messages, {"role": "assistant", "content": "It is"}))
    server = asking.serve(render=rendering(batch))
    outcomes(asking.engine(server), [begun])
    (body,) = server.asked
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_a_server_renders_a_chat_with_the_arguments_that_the_harness_rendered_it_with(asking, batch):
    def render(messages, enable_thinking=True):
        return [1, 2, 3] if enable_thinking else rendering(batch)(messages)

    server = asking.serve(render=render)
    given = dataclasses.replace(batch[0], template_args={"enable_thinking": False})
    assert given.hash == batch[0].hash and given == batch[0]
    assert isinstance(outcomes(asking.engine(server), [given])[0], Answer)
    (body,) = server.asked
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(EngineError, match="An answer to another prompt is no answer"):
        outcomes(asking.engine(server), batch[:1])
    assert "chat_template_kwargs" not in server.asked[-1]


def test_token_ids_that_the_server_returns_prove_the_rendering(asking, batch):
    engine = asking.engine(asking.serve(render=rendering(batch)))
    assert engine.flags == (UNVERIFIED,)
    assert engine.protocol["images_rendered_by"] == "server" and engine.protocol["image_prompts"] == "returned"
    assert engine.protocol["rendered_by"] == "harness"


def test_a_server_that_only_counts_tokens_is_flagged_and_its_count_compared(asking, batch):
    engine = asking.engine(asking.serve(render=rendering(batch), token_ids=False))
    assert engine.flags == (UNVERIFIED, RENDERING_UNVERIFIED) and engine.protocol["image_prompts"] == "counted"
    answers = outcomes(engine, batch[:2])
    assert all(isinstance(answer, Answer) for answer in answers)
    for fault, message in (
        ("blind", r"the server makes \d+ tokens .*, which the text alone has: it ignores the 1 images"),
        ("longer", r"the server makes \d+ tokens .* with 1 images; its chat template and processor files"),
    ):
        engine = asking.engine(asking.serve(render=rendering(batch), token_ids=False, faults=lambda n, body, f=fault: f))
        with pytest.raises(EngineError, match=message):
            outcomes(engine, batch[:1])


def test_an_answer_to_other_tokens_is_none(asking, batch):
    engine = asking.engine(asking.serve(render=rendering(batch), faults=lambda number, body: "other_ids"))
    with pytest.raises(
        EngineError,
        match=r"with 1 images that differ from token \d+ on; its chat template .* An answer to another prompt is no answer",
    ):
        outcomes(engine, batch[:1])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("silent", "no token ids of the prompt, which this server gives"),
        ("no_text", "an answer without text"),
        ("500", "status 500"),
        ("empty", "0 choices"),
    ],
)
def test_what_is_no_answer_is_asked_again_and_then_a_failure(asking, batch, fault, reason):
    server = asking.serve(render=rendering(batch), faults=lambda n, body: fault if body["seed"] == 1001 else None)
    found = outcomes(asking.engine(server, retries=1), batch)
    assert isinstance(found[1], Failure) and found[1].reason.startswith(reason)
    assert isinstance(found[0], Answer) and isinstance(found[2], Answer) and len(server.asked) == 4


def test_a_server_of_text_alone_answers_what_has_no_images_and_refuses_the_rest_by_name(asking, batch):
    engine = asking.engine(asking.serve())
    assert engine.protocol["image_prompts"] == "refused" and RENDERING_UNVERIFIED in engine.flags
    assert isinstance(outcomes(engine, batch[2:])[0], Answer)
    with pytest.raises(EngineError, match="/chat/completions: the server refuses with status 400: this model takes no images"):
        outcomes(engine, batch[:1])


def test_no_message_holds_an_image_or_the_chat_or_the_key(asking, batch, monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_KEY", SECRET)
    engine = asking.engine(asking.serve(render=rendering(batch), faults=lambda number, body: "echo"), key="SOME_KEY")
    with pytest.raises(EngineError, match=r"refuses with status 413: too large: .*\[image\].* with \[key\]") as caught:
        outcomes(engine, batch[:1])
    encoded = base64.b64encode(batch[0].images[0].read()).decode()
    assert not any(encoded[i : i + 24] in str(caught.value) for i in range(len(encoded) - 24))
    assert "matter to them" not in str(caught.value) and SECRET not in str(caught.value)
    assert "base64" not in json.dumps(engine.protocol)


def test_the_likelihood_of_a_text_after_images_is_refused(asking, processor, batch):
    engine = asking.engine(asking.serve(render=rendering(batch)))
    with pytest.raises(EngineError, match="cannot be asked of a server; leave out the tasks that need it"):
        outcomes(engine, [dataclasses.replace(batch[0], sampling=None, seed=None, continuation=(7, 8))])


def test_a_model_of_text_is_not_asked_about_images_at_the_start(tiny_model, tiny_tokenizer, tmp_path):
    asking = Asking(tiny_model, tiny_tokenizer, tmp_path / "endpoints")
    server = asking.serve()
    engine = asking.engine(server)
    assert not any("messages" in body for body in server.bodies) and "image_prompts" not in engine.protocol
    engine.close(), server.__exit__()


def test_vllm_is_given_structured_options_as_json():
    words = vllm_serve({"limit_mm_per_prompt": {"video": 0}, "mm_device_do_normalize": False})
    assert json.loads(words[words.index("--limit-mm-per-prompt") + 1]) == {"video": 0}
    assert "--no-mm-device-do-normalize" in words


def test_image_processors_of_ours_need_this_package_installed_where_torchvision_is_not(monkeypatch):
    monkeypatch.setattr("harness.engines.launch.entry_points", lambda group: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_plugin("bf16")
    with pytest.raises(EngineError, match="the image processors that do without torchvision are ours, .* install it again"):
        require_plugin("bf16", has_images=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    require_plugin("bf16", has_images=True)
