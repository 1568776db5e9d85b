"""Questions that show pictures: documents as plain data, pictures made canonical one by one, prompts, what is left out, the grey control."""

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import pyarrow
import pytest
from PIL import Image

from harness import evaluate, evaluation
from harness.answers import recorded_answers
from harness.batches import batch_of
from harness.controls import GREY_FLAG
from harness.engines import RENDERING_UNVERIFIED
from harness.engines.serving import Serving
from harness.errors import EngineError, SuiteError, TaskError
from harness.images import keep_picture
from harness.picture_asks import PictureTask
from harness.picture_documents import documents
from harness.picture_prompts import PicturePrompts
from harness.prepared import Prepared, read_prepared, write_prepared
from harness.processor import load_processor
from harness.provenance import _version
from harness.schema import Engine
from harness.schema_evaluation import Thinking
from harness.suite import load_suite
from harness.table_notes import FLAGS
from harness.task_about import TRAPS
from harness.task_settings import task_of
from harness.tasks.pictures import open_picture
from tests import asking
from tests.seeing import SeeingEngine, digest_of_file, known_answers, pixels_digest
from tests.tiny_vlm import IMAGE_TOKENS

HEAD = "<|im_start|>user\n{}<end_of_utterance>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor(tiny_vlm):
    return load_processor(tiny_vlm)


def drawn(shade, size=(20, 10)):
    return Image.new("RGB", size, (shade, 0, 0))


def header(width, height):
    """A PNG file that says it is that large, and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    said = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + said + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


ROWS = """
import pathlib
import datasets

def rows(**metadata):
    folder = pathlib.Path(__file__).parent
    features = datasets.Features({
        "number": datasets.Value("int64"), "question": datasets.Value("string"), "answer": datasets.Value("string"),
        "image": datasets.Image(), "more": datasets.List(datasets.Image()),
    })
    found = sorted(folder.glob("*.picture"))
    table = [{"number": i, "question": f"Which is {i}?", "answer": f"answer {i}",
              "image": {"bytes": path.read_bytes() or None, "path": None}, "more": []} for i, path in enumerate(found)]
    table = [row | ({"image": None} if row["image"]["bytes"] is None else {}) for row in table]
    return {"test": datasets.Dataset.from_list(table, features=features)}

def shown(doc):
    return [doc["image"]]

def no_list(doc):
    return doc["image"]

def twice(doc):
    return [doc["image"], doc["image"].rotate(90, expand=True)]

def many(doc):
    return [doc["image"]] * 200 if doc["number"] == 1 else [doc["image"]]

def broken_code(doc):
    return [doc["no such column"]]

def by_name(doc):
    return "picture.png"

def score(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""
TASK = """
task: {name}
custom_dataset: !function see.rows
test_split: test
output_type: generate_until
doc_to_image: {image}
doc_to_text: '{text}'
doc_to_target: '{{{{answer}}}}'
generation_kwargs: {{until: [], max_gen_toks: 20, do_sample: false}}
process_results: !function see.score
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder, pictures, *, name="see", image="[image]", text="<image>{{question}}", extra=""):
    """A user's task with a question about each of these files; an empty one is a row without its picture."""
    folder.mkdir(exist_ok=True)
    (folder / "see.py").write_text(ROWS)
    (folder / "see.yaml").write_text(TASK.format(name=name, image=image, text=text) + extra)
    for number, picture in enumerate(pictures):
        file = folder / f"{number:03}.picture"
        if isinstance(picture, bytes):
            file.write_bytes(picture)
        else:
            picture.save(file, "PNG")
    return asking.task(name, path=folder / "see.yaml")


def prepare(asked, processor, tmp_path, folder="model"):
    return asking.prepare(asked, processor, folder, images=tmp_path / "images")


# -- documents and prompts


def test_a_document_with_an_open_picture_becomes_plain_data_and_its_picture_a_file_of_that_name(processor, tmp_path):
    made = prepare(write_task(tmp_path / "task", [drawn(200), drawn(100)]), processor, tmp_path)
    digests = [pixels_digest(drawn(shade)) for shade in (200, 100)]
    assert [question.fields["image"] for question in made.questions] == [{"image": digest} for digest in digests]
    assert json.loads(json.dumps([question.fields for question in made.questions]))
    assert [ask.images for ask in made.asks] == [(digest,) for digest in digests]
    assert [ask.image_sizes for ask in made.asks] == [((20, 10),)] * 2
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(digests)
    assert made.about["pictures"] == "shown"


def test_a_prompt_is_the_models_chat_with_its_images_expanded(processor, tmp_path):
    made = prepare(write_task(tmp_path / "task", [drawn(200)]), processor, tmp_path)
    (ask,) = made.asks
    assert ask.prompt == HEAD.format("<image>Which is 0?")
    assert ask.messages == (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which is 0?"}]},
    )  # fmt: skip
    assert ask.token_ids.count(processor.image_token_id) == IMAGE_TOKENS
    assert ask.unexpanded_ids.count(processor.image_token_id) == 1
    whole = processor.encode(ask.prompt, [keep_picture(drawn(200), tmp_path / "again")])
    assert (ask.token_ids, ask.unexpanded_ids) == (whole.token_ids, whole.unexpanded_ids)
    assert ask.sampling.max_tokens == 20


@pytest.mark.parametrize(
    ("image", "text", "prompt"),
    [
        ("!function see.twice", "A <image> or <image>?", "A <image> or <image>?"),
        ("!function see.twice", "Which?", "<image><image>Which?"),
        ("!function see.no_list", "Which?<image>", "Which?<image>"),
    ],
)
def test_images_stand_in_the_places_of_the_marks_or_first(processor, tmp_path, image, text, prompt):
    (ask,) = prepare(write_task(tmp_path / "task", [drawn(9)], image=image, text=text), processor, tmp_path).asks
    assert ask.prompt == HEAD.format(prompt)
    turned = (pixels_digest(drawn(9)), pixels_digest(drawn(9, (10, 20))))
    assert ask.images == turned[: prompt.count("<image>")]


def test_a_system_prompt_and_the_arguments_of_the_template_are_rendered_as_for_text(processor, tmp_path):
    asked = replace(write_task(tmp_path / "task", [drawn(9)]), system_prompt="Be short.")
    asked = replace(asked, thinking=Thinking(template_args={"named": 1}))
    (ask,) = prepare(asked, processor, tmp_path).asks
    assert ask.prompt.startswith("<|im_start|>system\nBe short.<end_of_utterance>\n<|im_start|>user\n<image>Which")
    assert ask.messages[0] == {"role": "system", "content": "Be short."}
    assert ask.template_args == ask.request().template_args == {"named": 1}
    (tmp_path / "stored").mkdir()
    write_prepared(tmp_path / "stored", Prepared({}, [], [ask]))
    assert read_prepared(tmp_path / "stored").asks == [ask]


def with_template(tiny_vlm, tmp_path, template):
    """A processor with another chat template."""
    made = load_processor(tiny_vlm)
    made._processor.chat_template = made.tokenizer.chat_template = template
    return made


LISTS_ALONE = (
    "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)


def test_a_template_that_leaves_out_a_text_that_is_no_list_is_given_lists(tiny_vlm, tmp_path):
    processor = with_template(tiny_vlm, tmp_path, LISTS_ALONE)
    asked = replace(write_task(tmp_path / "task", [drawn(9)]), system_prompt="Be short.")
    (ask,) = prepare(asked, processor, tmp_path).asks
    assert ask.prompt == "system:Be short.\nuser:<image>Which is 0?\n"
    text = asking.prepare(asking.task("mini_math", limit=1), processor)
    assert text.asks[0].prompt.startswith("user:")
    assert "+" in text.asks[0].prompt


def test_a_template_that_leaves_out_a_text_either_way_leaves_out_the_question(tiny_vlm, tmp_path):
    processor = with_template(tiny_vlm, tmp_path, "{% for m in messages %}<image>{% endfor %}")
    with pytest.raises(TaskError, match=r"no question to ask \(left out: .*its chat template leaves out a text of the chat"):
        prepare(write_task(tmp_path / "task", [drawn(9)]), processor, tmp_path)


def test_without_a_chat_template_the_prompt_is_plain_text(tiny_vlm, tmp_path):
    processor = load_processor(tiny_vlm)
    processor._chats.chat_template = processor.tokenizer.chat_template = None
    (ask,) = prepare(write_task(tmp_path / "task", [drawn(9)], text="See <image>: {{question}}"), processor, tmp_path).asks
    assert (ask.prompt, ask.messages) == ("See <image>: Which is 0?", ())
    assert ask.token_ids.count(processor.image_token_id) == IMAGE_TOKENS


CHOICES = "doc_to_choice: [' yes', ' no way']\n"


def test_the_likelihoods_of_choices_are_asked_behind_the_pictures(processor, tmp_path):
    asked = write_task(tmp_path / "task", [drawn(9)], extra=CHOICES)
    config = (tmp_path / "task/see.yaml").read_text()
    config = config.replace("generate_until", "multiple_choice").replace("'{{answer}}'", "'0'").replace("process_results: !function see.score\n", "")  # fmt: skip
    (tmp_path / "task/see.yaml").write_text(config.replace("exact_match", "acc"))
    made = prepare(asked, processor, tmp_path)
    assert [ask.option for ask in made.asks] == [" yes", " no way"] or [ask.option for ask in made.asks] == [
        "  yes",
        "  no way",
    ]
    for ask in made.asks:
        assert ask.prompt == "<image>Which is 0?"
        assert processor.tokenizer.decode(ask.continuation) == ask.option
        assert ask.token_ids.count(processor.image_token_id) == IMAGE_TOKENS
        assert ask.images == (pixels_digest(drawn(9)),)
    engine = SeeingEngine(processor, None, likelihood=lambda prompt, option: float(option.endswith("yes")))
    found = asking.evaluate("see", engine, tmp_path / "journals", prepared=made, path=asked.path, images=tmp_path / "images")
    assert found.value("acc") == 1


def test_a_prepared_task_is_read_back_as_it_was_written(processor, tmp_path):
    made = prepare(write_task(tmp_path / "task", [drawn(9), drawn(8)]), processor, tmp_path)
    write_prepared(tmp_path, made)
    assert read_prepared(tmp_path).asks == made.asks


def test_a_question_is_told_apart_by_its_pictures_and_questions_about_one_err_together(processor, tmp_path):
    same = "Which?"
    made = prepare(write_task(tmp_path / "task", [drawn(9), drawn(8), drawn(9)], text=same), processor, tmp_path).questions
    assert len({question.question for question in made}) == 2
    assert made[0].cluster == made[2].cluster != made[1].cluster


def test_pictures_are_opened_here_one_document_at_a_time_and_never_by_lm_eval(processor, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a picture was opened with its row")

    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    opened = []
    monkeypatch.setattr("harness.picture_documents.open_picture", lambda data: opened.append(data) or open_picture(data))
    asked = write_task(tmp_path / "task", [drawn(shade) for shade in range(5)])
    done = []
    made = asking.prepare(
        asked, processor, images=tmp_path / "images", on_progress=lambda *now: done.append((*now, len(opened)))
    )
    assert len(made.asks) == 5
    assert done == [(n, 5, n) for n in range(1, 6)]
    part = prepare(replace(asked, limit=2), processor, tmp_path)
    assert (len(part.asks), len(opened), part.about["is_partial"]) == (2, 7, True)


# -- what is left out


def test_one_broken_picture_costs_one_question_and_is_named(processor, tmp_path):
    bomb, wide = header(30_000, 30_000), header(40_000, 10)
    animated = tmp_path / "two.gif"
    drawn(1).save(animated, save_all=True, append_images=[drawn(2)])
    grey16 = Image.new("I;16", (4, 4), 257 * 100)
    files = [drawn(200), b"no picture", b"", wide, bomb, animated.read_bytes(), grey16]
    cmyk = tmp_path / "cmyk.jpg"
    Image.new("CMYK", (8, 8)).save(cmyk)
    files.append(cmyk.read_bytes())
    made = prepare(write_task(tmp_path / "task", files), processor, tmp_path)
    left_out = {each["doc"]: each["reason"] for each in made.about["excluded"]}
    assert list(left_out) == [1, 2, 3, 4]
    for doc, reason in {
        1: "no picture that can be read",
        2: "it has no picture",
        3: "40,000 × 10",
        4: "900000000 pixels",
    }.items():
        assert reason in left_out[doc]
    assert [ask.doc for ask in made.asks] == [0, 5, 6, 7]
    assert made.asks[1].images == (digest_of_file(animated.read_bytes()),)
    assert made.asks[2].images == (pixels_digest(Image.new("RGB", (4, 4), (100, 100, 100))),)
    assert made.asks[3].images == (digest_of_file(cmyk.read_bytes()),)
    known = known_answers([(ask.images, f"Which is {ask.doc}?", f"answer {ask.doc}") for ask in made.asks])
    path = tmp_path / "task/see.yaml"
    found = asking.evaluate("see", SeeingEngine(processor, known), tmp_path / "j", prepared=made, path=path, images=tmp_path / "images")  # fmt: skip
    assert found.value("exact_match") == 1
    assert found.result["n_questions"] == 4
    assert [each["doc"] for each in found.result["excluded"]] == [1, 2, 3, 4]


def test_a_picture_is_stored_as_its_file_where_engines_can_read_that(processor, tmp_path):
    drawn(9).save(tmp_path / "nine.jpg")
    data = (tmp_path / "nine.jpg").read_bytes()
    (ask,) = prepare(write_task(tmp_path / "task", [data]), processor, tmp_path).asks
    assert (tmp_path / "images" / ask.images[0]).read_bytes() == data


@pytest.mark.parametrize(
    ("image", "text", "reason"),
    [
        ("!function see.shown", "<image> or <image>?", "its text has 2 marks <image> and it has 1 pictures"),
        ("!function see.broken_code", "Which?", r"its picture cannot be had \(KeyError: 'no such column'\)"),
        (
            "!function see.by_name",
            "Which?",
            "doc_to_image gives str; allowed: pictures of Pillow's, or the bytes of their files",
        ),
    ],
)
def test_a_task_of_which_nothing_can_be_asked_says_why(processor, tmp_path, image, text, reason):
    with pytest.raises(TaskError, match=rf"task see: it has no question to ask \(left out: {reason}\)"):
        prepare(write_task(tmp_path / "task", [drawn(9)], image=image, text=text), processor, tmp_path)


def test_more_pictures_than_the_model_holds_leave_out_that_question(processor, tmp_path, tiny_vlm):
    asked = write_task(tmp_path / "task", [drawn(9), drawn(8)], image="!function see.many", text="Which?")
    made = prepare(asked, processor, tmp_path, tiny_vlm)
    (left_out,) = made.about["excluded"]
    assert left_out["doc"] == 1
    assert left_out["reason"].startswith("its prompt with 200 pictures is 1,425")
    assert left_out["reason"].endswith(" tokens, the model holds 512")


@pytest.mark.parametrize(("limit", "kind", "is_held"), [(1, "vllm", True), (2, "vllm", False), (1, "hf", False)])
def test_a_question_with_more_pictures_than_vllm_is_told_to_take_ends_a_run_before_it_asks(
    processor, tmp_path, limit, kind, is_held
):
    asked = write_task(tmp_path / "task", [drawn(9), drawn(8)], image="!function see.twice", text="<image> or <image>?")
    (tmp_path / "made").mkdir()
    write_prepared(tmp_path / "made", prepare(asked, processor, tmp_path))
    serving = Serving(Engine(kind=kind, args={"limit_mm_per_prompt": {"image": limit}} if kind == "vllm" else {}))
    bench = SimpleNamespace(
        folder_of=lambda stage: tmp_path / "made", context_length=lambda stage: None, max_images=serving.max_images
    )
    stage = SimpleNamespace(inputs={"task": None}, sections={"repeats": 1})
    if not is_held:
        evaluation.check(bench, stage)
        return
    with pytest.raises(EngineError, match="see, question 0: 2 images, and engine.args.limit_mm_per_prompt takes 1 in a prompt"):
        evaluation.check(bench, stage)


def test_a_picture_that_the_processor_does_not_take_leaves_out_its_question(processor, tmp_path, monkeypatch):
    real = processor._processor.__class__.__call__

    def refuse(self, text=None, images=None, **options):
        if images and images[0][0].size == (3, 3):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return real(self, text=text, images=images, **options)

    monkeypatch.setattr(processor._processor.__class__, "__call__", refuse)
    made = prepare(write_task(tmp_path / "task", [drawn(9), drawn(8, (3, 3))]), processor, tmp_path)
    (left_out,) = made.about["excluded"]
    assert left_out["reason"] == "its processor does not take 1 images (3 × 3): absolute aspect ratio must be smaller than 200"


def test_examples_with_pictures_and_texts_scored_whole_are_refused(processor, tmp_path):
    asked = write_task(tmp_path / "task", [drawn(9), drawn(8)], extra="num_fewshot: 1\n")
    with pytest.raises(TaskError, match="num_fewshot = 1: lm-eval gives no pictures of its examples; copy its file with 0"):
        prepare(asked, processor, tmp_path)
    asked = write_task(tmp_path / "task", [drawn(9)], extra="doc_to_audio: [image]\n")
    with pytest.raises(TaskError, match="needs sound"):
        prepare(asked, processor, tmp_path)


# -- text alone


def test_a_task_of_text_is_asked_of_a_model_that_sees_without_images(processor):
    made = asking.prepare(asking.task("mini_math", limit=3), processor)
    assert "pictures" not in made.about
    for ask in made.asks:
        assert (ask.images, ask.unexpanded_ids, ask.messages) == ((), (), ())
        assert ask.prompt.startswith("<|im_start|>user\n")
        assert list(ask.token_ids) == processor.tokenizer(ask.prompt, add_special_tokens=False)["input_ids"]


def test_a_text_that_holds_what_stands_for_an_image_is_left_out(processor, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": q, "a": "x"}) + "\n" for q in ("What?", "What is <image>?")))
    (tmp_path / "plain.yaml").write_text(
        "task: plain\ndataset_path: json\noutput_type: generate_until\ntest_split: train\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        f"dataset_kwargs: {{data_files: '{tmp_path / 'rows.jsonl'}'}}\ngeneration_kwargs: {{until: []}}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    made = asking.prepare(asking.task("plain", path=tmp_path / "plain.yaml"), processor)
    assert [ask.doc for ask in made.asks] == [0]
    assert made.about["excluded"] == [
        {"doc": 1, "reason": "its text holds what stands for an image in this model's prompts"}
    ]  # fmt: skip


# -- the grey control


def test_grey_pictures_are_of_the_same_size_and_leave_out_the_same_questions(processor, tmp_path):
    asked = write_task(tmp_path / "task", [drawn(9, (30, 7)), b"broken", drawn(8)])
    grey = replace(asked, name="see-grey", pictures="grey")
    shown, made = prepare(asked, processor, tmp_path), prepare(grey, processor, tmp_path / "grey")
    wanted = [pixels_digest(Image.new("RGB", size, (128, 128, 128))) for size in ((30, 7), (20, 10))]
    assert [ask.images for ask in made.asks] == [(digest,) for digest in wanted]
    assert [ask.prompt for ask in made.asks] == [ask.prompt for ask in shown.asks]
    assert [question.question for question in made.questions] == [question.question for question in shown.questions]
    assert made.about["excluded"] == shown.about["excluded"]
    assert (made.about["name"], made.about["pictures"]) == ("see-grey", "grey")
    assert made.about["notes"] == [
        "see-grey shows a grey picture in place of each: what is known without looking, no score of the task"
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "grey/images").iterdir()} == set(wanted)


def test_a_grey_task_is_scored_as_its_own_task_under_its_other_name(processor, tmp_path):
    asked = replace(write_task(tmp_path / "task", [drawn(9)]), name="see-grey", pictures="grey")
    made = prepare(asked, processor, tmp_path)
    engine = SeeingEngine(processor, lambda seen, prompt: "answer 0")
    found = asking.evaluate(
        "see-grey", engine, tmp_path / "j", prepared=made, path=asked.path, pictures="grey", images=tmp_path / "images"
    )
    assert found.value("exact_match") == 1
    assert found.result["flags"] == [GREY_FLAG]
    assert {GREY_FLAG, RENDERING_UNVERIFIED} <= FLAGS.keys()
    engine_record = {**found.answers.about, "flags": found.result["flags"]}
    _, again = evaluation.score_task(
        asking.task("see-grey", path=asked.path, pictures="grey"),
        made.about,
        made.questions,
        found.samples,
        engine_record,
    )
    assert again["flags"] == [GREY_FLAG]
    assert found.samples[0]["task"] == "see-grey"
    assert found.samples[0]["scorer"].startswith("see@")


def test_only_a_grey_task_has_other_keys_and_its_record_is_read_back():
    plain, grey = asking.task("ai2d"), asking.task("ai2d-grey", pictures="grey")
    assert "pictures" not in plain.asked
    assert (grey.asked["pictures"], grey.own_name) == ("grey", "ai2d")
    assert task_of(plain.record) == plain
    assert task_of(json.loads(json.dumps(grey.record))) == grey


def test_grey_pictures_of_a_task_without_any_are_refused(processor):
    with pytest.raises(TaskError, match='task mini_math: shows no pictures, so pictures = "grey" has no effect; remove it'):
        asking.prepare(asking.task("mini_math-grey", pictures="grey", limit=1), processor)


SUITE = """
schema = 1
name = "see"
[model]
path = "{model}"
[[variant]]
name = "bf16"
method = "bf16"
[engine]
kind = "hf"
"""


def test_a_suite_refuses_grey_pictures_of_a_task_without_any_and_one_task_twice(tmp_path):
    suite = tmp_path / "suite.toml"
    head = SUITE.format(model=tmp_path)
    suite.write_text(head + '[[task]]\nname = "mini_math"\npictures = "grey"\n')
    with pytest.raises(SuiteError, match=r"task\[0\].pictures: has no effect on mini_math, which shows none; remove it"):
        load_suite(suite)
    suite.write_text(head + '[[task]]\nname = "x"\npictures = "grey"\n' * 2)
    with pytest.raises(SuiteError, match='the name "x-grey" is repeated'):
        load_suite(suite)
    suite.write_text(head + '[[task]]\nname = "x"\npictures = "gray"\n')
    with pytest.raises(SuiteError, match=r"task\[0\].pictures"):
        load_suite(suite)


def test_diagnostics_are_not_measured_on_answers_to_a_control(tmp_path):
    suite = tmp_path / "suite.toml"
    asked = '[[task]]\nname = "x"\npictures = "grey"\n'
    suite.write_text(SUITE.format(model=tmp_path) + asked + '[diagnostics]\non = "answers"\nsamples = 2\n')
    with pytest.raises(
        SuiteError, match=r"needs a \[\[task\]\] whose answers are generated \(x: a control with grey pictures\)"
    ):
        load_suite(suite)


def test_one_suite_asks_a_task_with_its_pictures_and_with_grey_ones(tmp_path):
    suite = tmp_path / "suite.toml"
    suite.write_text(SUITE.format(model=tmp_path) + '[[task]]\nname = "x"\n[[task]]\nname = "x"\npictures = "grey"\n')
    assert [(task.name, task.own_name) for task in load_suite(suite).tasks] == [("x", "x"), ("x-grey", "x")]


# -- the answers as data


def test_recorded_answers_hand_on_the_images_of_their_prompts(processor, tmp_path):
    asked = write_task(tmp_path / "task", [drawn(9), drawn(8)])
    made = prepare(asked, processor, tmp_path)
    engine = SeeingEngine(processor, lambda seen, prompt: "an answer")
    found = asking.evaluate("see", engine, tmp_path / "j", prepared=made, path=asked.path, images=tmp_path / "images")
    answers, counts = recorded_answers("see", made, found.answers.rows, 10, tmp_path / "images")
    assert counts["n_answers"] == 2
    for answer, ask in zip(answers, made.asks, strict=True):
        assert [image.digest for image in answer.sequence.images] == list(ask.images)
        assert pixels_digest(answer.sequence.images[0].open()) == ask.images[0]
        assert answer.prompt == ask.token_ids
    assert answers[0].about["answer"] != answers[1].about["answer"]


def test_recorded_answers_leave_out_those_with_the_token_of_an_image(processor, tmp_path):
    asked = write_task(tmp_path / "task", [drawn(9), drawn(8)])
    made = prepare(asked, processor, tmp_path)
    engine = SeeingEngine(processor, lambda seen, prompt: "see <image>" if seen == made.asks[0].images else "fine")
    found = asking.evaluate("see", engine, tmp_path / "j", prepared=made, path=asked.path, images=tmp_path / "images")
    token = processor.image_token_id
    assert [token in row["token_ids"][0] for row in found.answers.rows] == [True, False]
    answers, counts = recorded_answers("see", made, found.answers.rows, 10, tmp_path / "images", image_token=token)
    assert [answer.doc for answer in answers] == [1] and counts["n_with_image_token"] == 1
    batch_of([answer.sequence for answer in answers], processor)


def test_the_journal_of_questions_about_pictures_knows_what_opened_them_and_no_other_does(processor, tmp_path, monkeypatch):
    asked = write_task(tmp_path / "task", [drawn(9)])
    made = prepare(asked, processor, tmp_path)
    text = replace(made, asks=[replace(ask, images=(), unexpanded_ids=(), messages=()) for ask in made.asks])

    def answered(prepared):
        engine = SeeingEngine(processor, lambda seen, prompt: "fine")
        found = asking.evaluate("see", engine, tmp_path / "j", prepared=prepared, path=asked.path, images=tmp_path / "images")
        return found.answers.about["journal"], found.answers.about["protocol"], len(engine.asked)

    shown, untouched = answered(made), answered(text)
    assert set(shown[1]["images"]) == {"pillow", "torchvision"} and "images" not in untouched[1]
    monkeypatch.setattr("harness.provenance._version", lambda name: "99" if name == "pillow" else _version(name))
    again = answered(made)
    assert again[0] != shown[0] and again[2] == shown[2] > 0  # asked anew
    assert answered(text)[0] == untouched[0]


# -- lm-eval's own tasks


def write_mmmu(mirror):
    """MMMU as its own organisation publishes it: a folder a subject, pictures in seven columns, the options as text."""
    features = {"id": datasets.Value("string"), "question": datasets.Value("string"), "options": datasets.Value("string")}
    features |= {f"image_{i}": datasets.Image() for i in range(1, 8)}
    features |= {"answer": datasets.Value("string"), "question_type": datasets.Value("string")}
    rows = [
        {
            "question": "What is <image 1>?",
            "options": "['x', 'y <image 2>']",
            "answer": "B",
            "question_type": "multiple-choice",
        },
        {"question": "Compare <image 2>, <image 1>, <image 2>.", "options": "[]", "answer": "seven", "question_type": "open"},
        {"question": "Broken <image 1>?", "options": "['x', 'y']", "answer": "A", "question_type": "multiple-choice"},
        {"question": "What is <image 1>?", "options": "['x', 'y']", "answer": "A", "question_type": "multiple-choice"},
    ]
    for i, row in enumerate(rows):
        row |= {"id": f"validation_Accounting_{i}"} | {f"image_{n}": None for n in range(3, 8)}
        row |= {"image_1": drawn(10 * i + 1), "image_2": drawn(10 * i + 2)}
    rows[2]["image_1"] = {"bytes": b"broken", "path": None}
    rows[3]["image_1"] = None
    folder = mirror / "MMMU/MMMU"
    (folder / "Accounting").mkdir(parents=True)
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    made.to_parquet(folder / "Accounting" / "validation-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: Accounting\n  data_files:\n  - split: validation\n    path: Accounting/validation-*\n---\n"
    )


def test_lm_evals_own_mmmu_is_asked_with_its_pictures_in_its_order_and_scored(processor, tmp_path, monkeypatch):
    write_mmmu(tmp_path / "mirror")
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    path = Path(lm_eval.__file__).parent / "tasks/mmmu/mmmu_accounting.yaml"
    made = prepare(asking.task("mmmu_val_accounting", path=path), processor, tmp_path)
    left_out = {each["doc"]: each["reason"] for each in made.about["excluded"]}
    assert list(left_out) == [2, 3]
    assert left_out[2].startswith("no picture that can be read")
    assert left_out[3] == "it has no picture"
    assert [ask.images for ask in made.asks] == [
        (pixels_digest(drawn(1)), pixels_digest(drawn(2))),
        (pixels_digest(drawn(12)), pixels_digest(drawn(11)), pixels_digest(drawn(12))),
    ]
    assert made.asks[1].prompt.startswith("<|im_start|>user\nCompare <image>, <image>, <image>.")
    assert made.questions[0].fields["image_1"] == {"image": pixels_digest(drawn(1))}
    known = known_answers([(made.asks[0].images, "What is", "(B)"), (made.asks[1].images, "Compare", "It is seven.")])
    engine = SeeingEngine(processor, known)
    found = asking.evaluate("mmmu_val_accounting", engine, tmp_path / "j", prepared=made, path=path, images=tmp_path / "images")
    assert found.value("acc") == 1
    nothing = SeeingEngine(processor, lambda seen, prompt: "I cannot say")
    drawn_twice = [
        asking.evaluate("mmmu_val_accounting", nothing, tmp_path / name, prepared=made, path=path, images=tmp_path / "images")
        for name in ("once", "again")
    ]
    assert len({each.value("acc") for each in drawn_twice}) == 1  # its scorer guesses, and guesses alike


def test_a_row_may_name_pictures_among_its_data_and_no_others(tmp_path):
    folder = tmp_path / "data"
    (folder / "test").mkdir(parents=True)
    for path in (tmp_path / "private.png", folder / "test" / "a.png"):
        drawn(9).save(path)
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    features = datasets.Features({"image": datasets.Image(decode=False)})
    packed = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})

    def made(rows, **keys):
        config = SimpleNamespace(task="x", **({"dataset_path": None, "dataset_kwargs": None} | keys))
        return list(documents(SimpleNamespace(config=config, eval_docs=rows)))

    names = [
        str(tmp_path / "private.png"),
        str(folder / "link.png"),
        f"{folder}/../private.png",
        str(folder / "none.png"),
        "a\0",
        None,
    ]
    rows = [{"image": {"bytes": None, "path": name}} for name in names]
    table = pyarrow.table({"image": pyarrow.array([row["image"] for row in rows], packed)})
    found = made(datasets.Dataset(table).cast(features), dataset_kwargs={"data_files": {"test": f"{folder}/*.parquet"}})
    assert all("is outside the folders of the data" in each.lacking for each in found[:3])
    assert ["no such picture" in each.lacking for each in found[3:]] == [True, True, False]
    assert found[5].lacking == "neither the bytes of a picture nor a path"
    own = datasets.load_dataset("imagefolder", data_dir=str(folder), split="test", cache_dir=str(tmp_path / "cache"))
    for keys in ({"dataset_path": "imagefolder", "dataset_kwargs": {"data_dir": str(folder)}}, {"dataset_path": str(folder)}):
        (document,) = made(own, **keys)
        assert document.lacking is None and document.fields == {"image": {"image": pixels_digest(drawn(9))}}


def test_what_is_known_of_lm_evals_own_task_is_said(processor, tmp_path):
    asked = write_task(tmp_path / "task", [drawn(9)], name="mmmu_val_seen")
    (task,) = evaluate.load_tasks(asked, {}).values()
    shows = PictureTask(
        task, asked, PicturePrompts(processor, None, {}), None, tmp_path / "images", is_chat=True, is_stock=True
    )
    notes = []
    shows.ask(0, notes, lambda done, total: None)
    assert notes == [TRAPS["mmmu"]]


def test_a_gate_of_a_suite_does_not_judge_a_control(tmp_path):
    suite = tmp_path / "suite.toml"
    asked = '[[task]]\nname = "x"\n[[task]]\nname = "x"\npictures = "grey"\n[gate]\nkernels = ["native"]\n'
    judged = '[[gate.task]]\nname = "{}"\nmargin = 3.0\ntier = "critical"\n'
    suite.write_text(SUITE.format(model=tmp_path) + asked + judged.format("x"))
    assert load_suite(suite).gate is not None
    suite.write_text(SUITE.format(model=tmp_path) + asked + judged.format("x") + judged.format("x-grey"))
    with pytest.raises(SuiteError, match=r"gate.task\[1\].name: x-grey is a control with grey pictures, and no score to judge"):
        load_suite(suite)
