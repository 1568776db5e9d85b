"""Answers of the model on given images: the prompts that an engine gets, the sequences that become of them, and what the suite may say."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image as Pillow
from pyarrow import parquet

from harness import loading
from harness.data import SPLITS, split_of
from harness.data_checks import data_mistakes
from harness.data_stage import DataWork, make_data
from harness.engines.hf import HfEngine
from harness.engines.scripted import ScriptedEngine
from harness.errors import DataError
from harness.generation import generate
from harness.journal import Journal
from harness.processor import load_processor
from harness.schema_data import Builtin, Drawings, Jsonl, Teacher
from harness.sources import Surroundings, find_source, identity, write_source
from harness.store import Store
from harness.token_store import StoredSequences, TokenWriter
from tests.tiny_vlm import IMAGE_TOKENS

EOS, IMAGE = {2}, 3


@pytest.fixture(scope="module")
def processor(tiny_vlm):
    return load_processor(tiny_vlm)


def picture(number: int) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(number).integers(0, 256, (14, 20, 3), dtype=np.uint8))


def packed(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, format="PNG")
    return file.getvalue()


def asked_rows(folder) -> Jsonl:
    """Six rows with an image, two of them with the same one, a text-only one and a broken one."""
    rows = [{"image": [packed(n)], "q": f"What is {n}?", "a": f"reference {n}"} for n in range(5)]
    rows += [
        {"image": [packed(0)], "q": "And?", "a": "x"},
        {"image": [], "q": "no image", "a": "x"},
        {"image": [b"broken"], "q": "Q", "a": "A"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return Jsonl(source="jsonl", path=str(folder / "rows.parquet"), images="image", prompt="q", response="a", max_failed=0.5)


def taught(**keys) -> Teacher:
    return Teacher(source="teacher", engine="hf", **({"prompts": "asked", "max_tokens": 12, "temperature": 0} | keys))


def made(tmp_path, processor, sections, engine, folder="stage"):
    """The splits of the section "own", and its record."""
    source = find_source("own", sections, Store(tmp_path / "cache"))
    (tmp_path / folder).mkdir()

    def ask(section, asks, writer):
        with Journal(tmp_path / "journals", {"weights": "w", "task": "data"}) as journal:
            return generate(
                "own", section, asks, writer, engine=engine, journal=journal, on_progress=lambda *n: None, processor=processor
            )

    with TokenWriter(tmp_path / folder, salt="0 ") as writer:
        record = write_source(source, writer, Surroundings(processor.tokenizer, EOS, [], ask, processor))
    return {split: StoredSequences(tmp_path / folder, split) for split in SPLITS}, record


def every(splits):
    return [sequence for stored in splits.values() for sequence in stored]


def test_a_prompt_with_its_image_becomes_a_sequence_with_the_answer(tmp_path, processor):
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: "Fine.")
    splits, record = made(tmp_path, processor, {"own": taught(), "asked": asked_rows(tmp_path)}, engine)
    found = every(splits)
    assert record["rows"] | {"used": 8, "failed": 1, "with_images": 6, "text_only": 1} == record["rows"]
    assert record["responses"]["kept"] == 7 == len(found)
    end = "<end_of_utterance>"
    one = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
    asked = {processor.tokenizer.decode(r.token_ids): r for r in engine.asked}
    assert asked.keys() == {
        f"<|im_start|>user\n{image}{question}{end}\n<|im_start|>assistant\n"
        for image, question in [*((one, f"What is {n}?") for n in range(5)), (one, "And?"), ("", "no image")]
    }
    for sequence in found:
        text = processor.tokenizer.decode(sequence.token_ids)
        prompt, _, response = text.partition("assistant\n")
        assert response == f"Fine.{end}" and prompt + "assistant\n" in asked
        assert sequence.images == asked[prompt + "assistant\n"].images
        answered = [token for token, flag in zip(sequence.token_ids, sequence.is_response, strict=True) if flag]
        assert processor.tokenizer.decode(answered) == response
    for split, stored in splits.items():
        assert all(split_of(s.images[0].digest) == split for s in stored if s.images)


def test_a_request_holds_what_engines_expand_and_render_themselves(tmp_path, processor):
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: "Fine.")
    made(tmp_path, processor, {"own": taught(), "asked": asked_rows(tmp_path)}, engine)
    for request in engine.asked:
        if not request.images:
            assert (request.unexpanded_ids, request.messages) == ((), ())
            continue
        rendered = processor.render(request.messages)
        assert processor.encode(rendered, request.images).token_ids == request.token_ids
        assert request.unexpanded_ids.count(IMAGE) == 1 and request.token_ids.count(IMAGE) == IMAGE_TOKENS
        assert [message["role"] for message in request.messages] == ["user"]
    same = [
        request for request in engine.asked if request.images and request.images[0].open().tobytes() == picture(0).tobytes()
    ]
    assert len(same) == 2 and same[0].hash != same[1].hash


def test_an_answer_with_the_token_of_an_image_is_left_out_and_counted(tmp_path, processor):
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: "see <image>" if "What is 1" in prompt else "Fine.")
    splits, record = made(tmp_path, processor, {"own": taught(), "asked": asked_rows(tmp_path)}, engine)
    assert record["responses"]["with_an_image_token"] == 1
    assert len(every(splits)) == 6


def test_the_model_answers_by_the_image_and_the_journal_gives_the_same_again(tmp_path, tiny_vlm, processor):
    loaded = loading.load_model(tiny_vlm, trust_remote_code=False, device=torch.device("cpu"))
    engine = HfEngine(loaded, processor.tokenizer, eos_ids=EOS, args={}, processor=lambda: processor)
    rows = [{"image": packed(n), "q": "Q", "a": "A"} for n in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    prompts = Jsonl(source="jsonl", path=str(tmp_path / "rows.parquet"), images="image", prompt="q", response="a")
    sections = {"own": taught(temperature=1.0, seed=3), "asked": prompts}
    splits, record = made(tmp_path, processor, sections, engine)
    n_image_tokens = record["responses"].get("with_an_image_token", 0)
    found = every(splits)
    assert record["responses"]["kept"] + n_image_tokens == 6 and len({s.images for s in found}) == len(found)

    class Asleep(HfEngine):
        def answer(self, batch):
            pytest.fail("the model was asked again")

    again, _ = made(tmp_path, processor, sections, Asleep(loaded, processor.tokenizer, eos_ids=EOS, args={}), folder="again")
    assert every(again) == found


@pytest.mark.parametrize("has_images", [True, False])
def test_a_data_stage_journals_what_opened_images_and_trusts_the_code_that_the_suite_trusts(
    tmp_path, tiny_vlm, processor, monkeypatch, has_images
):
    trusted = []

    class Serving:
        def __init__(self, section, *, trust_remote_code):
            trusted.append(trust_remote_code)

        def require(self, folder):
            pass

        def engine(self, *given):
            return ScriptedEngine(processor.tokenizer, lambda prompt: "Fine.")

        def close(self):
            pass

    monkeypatch.setattr("harness.data_stage.Serving", Serving)
    prompts = asked_rows(tmp_path) if has_images else Builtin(source="builtin")
    store, sections = Store(tmp_path / "cache"), {"own": taught(n_prompts=8), "asked": prompts}
    stage = SimpleNamespace(
        text=find_source("own", sections, store), inputs={"model": SimpleNamespace(key="m")}, sections={"generation": {}}
    )
    given = (tiny_vlm, processor.tokenizer, None, [], tmp_path / "journals", store, processor)
    (tmp_path / "stage").mkdir()
    make_data(stage, tmp_path / "stage", DataWork(*given, trust_remote_code=True), lambda *said: None)
    (journal,) = (tmp_path / "journals").rglob("*.jsonl")
    protocol = json.loads(journal.read_text().splitlines()[0])["protocol"]
    assert ("images" in protocol) is has_images and trusted == [True]
    assert not has_images or protocol["images"]["pillow"]


def test_drawings_may_be_asked_about(tmp_path, processor):
    engine = ScriptedEngine(processor.tokenizer, lambda prompt: "Fine.")
    sections = {"own": taught(), "asked": Drawings(source="drawings", pictures=8)}
    splits, _ = made(tmp_path, processor, sections, engine)
    assert len({s.images for s in every(splits)}) == 8
    assert identity(find_source("own", sections, Store(tmp_path / "cache")))["prompts"] == {
        "source": "drawings",
        "seed": 0,
        "pictures": 8,
    }


def test_the_key_of_answers_changes_with_the_images_that_are_asked_about(tmp_path):
    keys = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(packed(len(keys)))
        (tmp_path / name / "rows.jsonl").write_text(json.dumps({"image": "p.png", "q": "Q", "a": "A"}))
        asked = Jsonl(source="jsonl", path=str(tmp_path / name / "rows.jsonl"), images="image", prompt="q", response="a")
        keys.append(identity(find_source("own", {"own": taught(), "asked": asked}, Store(tmp_path / "cache"))))
    assert keys[0]["prompts"]["images"] == "image" and keys[0] != keys[1]


# what a suite may say


def jsonl(**keys) -> Jsonl:
    return Jsonl(source="jsonl", path="rows.jsonl", **keys)


PAIR = {"prompt": "q", "response": "a", "images": "image"}


@pytest.mark.parametrize(
    ("section", "where", "message"),
    [
        (jsonl(text="t", images="image"), "data.rows.images", "has no effect with text"),
        (jsonl(**PAIR, chat=False), "data.rows.chat", "found false, with images"),
        (jsonl(**(PAIR | {"images": "q"})), "data.rows.images", '"q" is the field of the text'),
    ],
)
def test_keys_that_contradict_images_are_named(section, where, message):
    found = list(data_mistakes({"rows": section}, [("variant", "rows")]))
    assert any(key == where and message in said for key, said, _ in found), found


def test_a_model_of_text_cannot_be_asked_about_images(tmp_path, tiny_tokenizer):
    source = find_source("own", {"own": taught(), "asked": asked_rows(tmp_path)}, Store(tmp_path / "cache"))
    with TokenWriter(tmp_path) as writer, pytest.raises(DataError, match="data.asked: has images, and the model takes none"):
        write_source(source, writer, Surroundings(tiny_tokenizer, {1}, [], lambda *arguments: {}))
