"""The recipe of the embedded vision-language model: what it builds, trains on and resumes."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from harness.tasks.drawing_kinds import EVALUATED
from harness.tasks.drawings import SIDE, side_of, side_of_word
from harness.tasks.mini_pictures import blinded, rows
from qad.image_processors import allow_without_torchvision
from recipes.embedded_vlm import build, train
from recipes.embedded_vlm.batches import LONGEST, NOTES, Encoder, normalized, seen_batch, training_batch
from recipes.embedded_vlm.train import Course, Settings, Training, accuracies, answer_logits

SHARES = (0.2, 0.2, 0.2, 0.2, 0.2)
SMALL = {
    "VISION": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1},
    "TEXT": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
}


@pytest.fixture(scope="module", autouse=True)
def pillow_processors():
    allow_without_torchvision()


@pytest.fixture(scope="module")
def tokenizer():
    return build.build_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("embedded-vlm")
    build.save(path, build.build_model(tokenizer, 0).to(torch.bfloat16), build.build_processor(tokenizer))
    return path


@pytest.fixture
def small(monkeypatch):
    for name, sizes in SMALL.items():
        monkeypatch.setattr(build, name, getattr(build, name) | sizes)
    monkeypatch.setattr(train, "LOG_EVERY", 2)


def dialogue(row, answer=None):
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
    return [asked] if answer is None else [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def test_its_weights_fit_into_twelve_megabytes_and_its_shapes_into_blocks(folder):
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert text["vocab_size"] < 2000
    for width in (
        text["hidden_size"],
        text["intermediate_size"],
        vision["hidden_size"],
        vision["intermediate_size"],
        text["vocab_size"],
    ):
        assert width % 16 == 0
    assert {text["head_dim"], vision["hidden_size"] // vision["num_attention_heads"]} <= {32, 64}


def test_it_loads_from_its_folder_and_answers_about_a_picture(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    processor = AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    (row,) = rows("mini_ocr", n=1)
    prompt = processor.apply_chat_template(dialogue(row), add_generation_prompt=True)
    inputs = processor(text=prompt, images=[row["image"]], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == build.IMAGE_TOKENS
    assert inputs["pixel_values"].shape == (1, 1, 3, SIDE, SIDE)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert inputs["input_ids"].shape[1] < generated.shape[1] <= inputs["input_ids"].shape[1] + 4
    assert processor.batch_decode(generated)[0].startswith(prompt.split("<image>")[0])


def test_a_picture_of_another_size_and_mode_becomes_one_tile(folder):
    from PIL import Image

    processor = AutoProcessor.from_pretrained(folder)
    wide = Image.new("L", (300, 120), 200)
    inputs = processor(text="<image>", images=[wide], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 1, 3, SIDE, SIDE)


def test_every_byte_has_a_token_and_capitals_and_digits_their_own(tokenizer):
    assert len(tokenizer) <= build.VOCABULARY
    text = "What does the tea cost? ÄÖ €\t\x00 KAMO48 {x}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("KAMO48") == list("KAMO48")
    assert len(tokenizer.tokenize("What is the total?")) <= 6


def test_two_builds_are_the_same(tokenizer):
    assert build.build_tokenizer().get_vocab() == tokenizer.get_vocab()
    first, second = (build.build_model(tokenizer, 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_sees_the_tokens_and_pixels_that_the_processor_gives(tokenizer, folder):
    processor = AutoProcessor.from_pretrained(folder)
    encoder = Encoder(tokenizer)
    for row in (rows(task, n=1)[0] for task in EVALUATED):
        ids, predicted = encoder.turns([(row["question"], row["answer"])], LONGEST)
        text = processor.apply_chat_template(dialogue(row, row["answer"]))
        whole = processor(text=text, images=[row["image"]], return_tensors="pt")
        assert [*ids, *tokenizer.encode("\n")] == whole["input_ids"][0].tolist()
        prompt = processor.apply_chat_template(dialogue(row), add_generation_prompt=True)
        asked = processor(text=prompt, images=[row["image"]])["input_ids"][0]
        assert asked == ids[: len(asked)] and predicted == [False] * len(asked) + [True] * (len(ids) - len(asked))
        pixels = normalized(np.asarray(row["image"])[None])
        assert torch.allclose(pixels, torch.as_tensor(whole["pixel_values"])[0], atol=1e-6)


def test_later_turns_follow_as_the_template_has_them(tokenizer):
    turns = [("What is the name?", "KAMO"), ("What is the age?", "7")]
    ids, predicted = Encoder(tokenizer).turns(turns, LONGEST)
    messages = [
        {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages[0]["content"] = "<image>" + messages[0]["content"]
    text = tokenizer.apply_chat_template(messages, tokenize=False).replace("<image>", build.PICTURE)
    assert ids == tokenizer.encode(text.removesuffix("\n"))
    answers = tokenizer.decode([token for token, is_answer in zip(ids, predicted, strict=True) if is_answer])
    assert answers == "KAMO<end_of_utterance>7<end_of_utterance>"


def test_questions_that_do_not_fit_are_left_out_but_one_is_always_asked(tokenizer):
    encoder = Encoder(tokenizer)
    turns = [("What is the name?", "KAMO"), ("What is the age?", "7")]
    alone = encoder.turns(turns[:1], LONGEST)
    assert encoder.turns(turns, len(alone[0]) + 3) == alone == encoder.turns(turns, 1)


def test_a_batch_is_decided_by_its_seed_and_step(tokenizer):
    def made(**changed):
        return training_batch(Encoder(tokenizer), **{"seed": 0, "step": 5, "n": 6, "shares": SHARES} | changed)

    first, again = made(), made()
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.pixels, again.pixels)
    assert first.input_ids.shape[1] <= LONGEST and first.pixels.shape == (6, 1, 3, SIDE, SIDE)
    assert bool(first.answers.any(dim=1).all())
    for other in (made(step=6), made(seed=1)):
        assert not torch.equal(first.pixels, other.pixels)


def test_what_is_seen_is_what_is_asked_about():
    seen, again = (seen_batch(seed=0, step=5, n=6, shares=SHARES) for _ in range(2))
    assert torch.equal(seen.pixels, again.pixels)
    assert seen.notes.keys() == NOTES.keys()
    for name, n in NOTES.items():
        assert torch.equal(seen.notes[name], again.notes[name])
        assert seen.notes[name].shape == (6, 64) and 0 < seen.notes[name].max() < n
    assert torch.equal(seen.notes["owner"] > 0, (seen.notes["owner"] > 0) & (seen.notes["what"] > 0))


def test_no_held_out_word_is_answered_in_training(tokenizer):
    encoder = Encoder(tokenizer)
    batches = [training_batch(encoder, seed=0, step=step, n=32, shares=SHARES) for step in range(4)]
    answers = [
        word
        for batch in batches
        for word in tokenizer.decode(batch.input_ids[batch.answers]).split(build.END)
        if word.isalpha() and word.isupper() and len(word) > 1
    ]
    assert len(answers) > 60
    assert {side_of_word(word) for word in answers} == {"train"}
    assert any(side_of(f"not a word {word}") == "held-out" for word in answers)


def test_a_model_is_right_where_it_would_say_the_answer_by_itself(small, tokenizer):
    """Against greedy decoding, of a model that has learned one answer by heart."""
    (row,) = rows("mini_ocr", n=1)
    model, encoder = build.build_model(tokenizer, 0), Encoder(tokenizer)
    batch = training_batch(encoder, seed=0, step=0, n=1, shares=SHARES)
    processor = build.build_processor(tokenizer)
    ids, predicted = encoder.turns([(row["question"], row["answer"])], LONGEST)
    batch = type(batch)(torch.tensor([ids]), torch.tensor([predicted]), normalized(np.asarray(row["image"])[None]).unsqueeze(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    assert accuracies(model, encoder, {"it": [row]})["it"]["seeing"] == 0
    for _ in range(60):
        logits, labels = answer_logits(model, batch)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    assert accuracies(model, encoder, {"it": [row, row | {"answer": "KAM"}]})["it"]["seeing"] == 0.5
    prompt = processor.apply_chat_template(dialogue(row), add_generation_prompt=True)
    inputs = processor(text=prompt, images=[row["image"]], return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(said, skip_special_tokens=True) == row["answer"]


def test_the_grey_picture_reaches_the_model(tokenizer):
    """An Idefics3 drops pictures whose normalized pixels are all zero."""
    (row,) = blinded(rows("mini_ocr", n=1))
    pixels = build.build_processor(tokenizer).image_processor([row["image"]], return_tensors="pt")["pixel_values"]
    assert (pixels.to(torch.bfloat16) != 0).all()


def run(folder, **changed):
    look, read = Course(3, lr=1e-3, warm_up=1, pages=(0.3, 0.1)), Course(3, lr=1e-3, warm_up=1, pages=(0.3, 0.1))
    settings = Settings(**{"look": look, "read": read, "pictures_a_step": 3} | changed)
    return Training(folder, settings, checkpoint_every=1, validate_every=4, n_validation=2)


def log(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds_a_step"} for record in records]


def test_a_training_that_was_stopped_ends_as_one_that_was_not(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "rows", lambda task, n=2, **kept: rows(task, n=n, **kept))
    assert run(tmp_path / "whole").go()
    assert not run(tmp_path / "parts").go(seconds=0)
    for killed_at in (3, 5):
        with monkeypatch.context() as killed:
            killed.setattr(Training, "_one_step", lambda self, at=killed_at: 1 / 0 if self.step == at else ONE_STEP(self))
            with pytest.raises(ZeroDivisionError):
                run(tmp_path / "parts").go()
    resumed = run(tmp_path / "parts")
    assert resumed.step == 5 and resumed.go()
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert [record["step"] for record in log(tmp_path / "whole") if "loss" in record] == [2, 4, 6]
    assert log(tmp_path / "whole")[-1]["tasks"].keys() == EVALUATED.keys()
    again = run(tmp_path / "whole")
    assert again.step == 6 and again.go() and log(tmp_path / "whole") == log(tmp_path / "parts")


ONE_STEP = Training._one_step


def test_a_folder_keeps_to_its_settings(small, tmp_path):
    run(tmp_path)
    with pytest.raises(
        SystemExit, match=r"recipe\.json: this folder holds a training with other settings; take its settings, or another"
    ):
        run(tmp_path, clip=0.5)


def test_the_learning_rate_warms_up_and_falls_to_its_last():
    course = Course(1000, warm_up=100, lr=1.0, last_lr=0.1, pages=(0.4, 0.1))
    assert course.lr_at(0) == 0.01 and course.lr_at(100) == 1.0 and course.lr_at(1000) == pytest.approx(0.1)
    assert course.lr_at(550) == pytest.approx(0.55)
    assert [round(course.pages_at(step), 3) for step in (0, 250, 500, 1000)] == [0.4, 0.25, 0.1, 0.1]


def test_charts_and_diagrams_are_read_more_often_in_the_end():
    course = Course(10, lr=1.0, warm_up=1, pages=(0.4, 0.1))
    settings = Settings(look=course, read=course, late=(0.3, 0.2, 0.4, 0.1))
    assert settings.shares_at(7) == pytest.approx([0.1, *[0.225] * 4])
    assert settings.shares_at(12) == pytest.approx([0.28, *[0.18] * 4])
    assert settings.shares_at(15) == pytest.approx([0.1, 0.27, 0.18, 0.36, 0.09])
    assert all(sum(settings.shares_at(step)) == pytest.approx(1) for step in range(20))


def test_a_stage_trains_its_own_weights_alone(small, tmp_path):
    training = run(tmp_path)
    weights = {name: each.clone() for name, each in training.model.state_dict().items()}

    def changed():
        return {name for name, each in training.model.state_dict().items() if not torch.equal(each, weights[name])}

    training.go(seconds=0)
    assert changed() and all(name.startswith("model.vision_model.") for name in changed())
    while training.step < 3:
        training.go(seconds=0)
    weights = {name: each.clone() for name, each in training.model.state_dict().items()}
    training.go(seconds=0)
    assert {name.split(".")[1] for name in changed()} == {"connector", "text_model", "weight"}
