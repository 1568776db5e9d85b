"""Batches of sequences with images: what a model is called with, what is never in the loss, packing that keeps images with their text."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from harness import batches as batches_module
from harness.batches import (
    Inputs,
    TrainingSteps,
    batch_of,
    batches_by_length,
    batches_of,
    inputs_of,
    packed_batch,
    validation_batches,
)
from harness.data import Sequence
from harness.diagnostics import _compared
from harness.dialogues import Turn, render_dialogue
from harness.images import Image, keep_picture
from harness.processor import load_processor
from harness.schema import Training
from harness.stages import Workbench
from qad import distill, divergence, ranks
from qad.calibrate import calibrate
from qad.checkpoint import load_checkpoint
from qad.distill import Pair, train
from qad.modules import encoding_digest
from qad.quantize import quantize_model
from qad.recipe import Recipe
from tests.tiny_vlm import IMAGE_TOKENS
from tests.training_checks import KL, Recorder, settings

IMAGE = 3


@pytest.fixture(scope="module")
def processor(tiny_vlm):
    return load_processor(tiny_vlm)


@pytest.fixture(scope="module")
def model(tiny_vlm):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny_vlm, dtype=torch.float32).eval()


class Stored(list):
    @property
    def lengths(self):
        return np.array([len(sequence) for sequence in self])


@pytest.fixture(scope="module")
def sequences(processor, tmp_path_factory) -> Stored:
    """Of one image, of none, of two and of one."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    images = [keep_picture(Pillow.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)), folder) for _ in range(4)]
    shown = [(images[0],), (), (images[1], images[2]), (images[3],)]
    turns = [
        [Turn("what", "a thing")],
        [Turn("hello", "yes")],
        [Turn("these?", "two"), Turn("sure?", "yes")],
        [Turn("more", "none")],
    ]
    made = zip(turns, shown, strict=True)
    return Stored(render_dialogue(processor.tokenizer, t, {2}, processor=processor, images=given) for t, given in made)


def pixels_of(processor, sequence, which=0):
    return processor.model_inputs([[sequence.images[which]]], torch.full((1, IMAGE_TOKENS), IMAGE))["pixel_values"][0, 0]


def test_a_batch_holds_the_images_in_the_order_of_their_tokens(sequences, processor):
    batch = batch_of(list(sequences), processor)
    assert torch.equal(batch.is_image, batch.input_ids == IMAGE)
    assert batch.is_image.sum(1).tolist() == [IMAGE_TOKENS, 0, 2 * IMAGE_TOKENS, IMAGE_TOKENS]
    found = batch.inputs["pixel_values"].flatten(0, 1)
    found = found[found.flatten(1).any(1)]  # the model leaves out what fills up samples of fewer images
    places = [(0, 0), (2, 0), (2, 1), (3, 0)]
    assert torch.equal(found, torch.stack([pixels_of(processor, sequences[i], k) for i, k in places]))
    assert set(inputs_of(batch)) == {"input_ids", "attention_mask", *batch.make_image_inputs()} <= set(batch.inputs)


def test_a_row_is_the_same_alone_and_among_rows_with_more_images_or_none(sequences, processor, model):
    with torch.no_grad():
        together = model(**batch_of(list(sequences), processor).inputs).logits
        for row, sequence in zip(together, sequences, strict=True):
            alone = model(**batch_of([sequence], processor).inputs).logits[0]
            torch.testing.assert_close(row[: len(sequence)], alone, atol=1e-5, rtol=1e-4)


def test_another_image_is_another_answer(sequences, processor, model):
    first, last = sequences[0], sequences[3]
    swapped = Sequence(first.token_ids, first.is_response, last.images)
    with torch.no_grad():
        one, other = (model(**batch_of([given], processor).inputs).logits for given in (first, swapped))
    assert float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_tokens_that_stand_for_an_image_are_never_in_the_loss(sequences, processor, loss_on):
    (batch,) = validation_batches(sequences, loss_on, processor)
    assert not (batch.loss_mask & batch.is_image).any()
    expected = [sum(s.is_response) if loss_on == "assistant" else len(s) - s.token_ids.count(IMAGE) for s in sequences]
    assert batch.loss_mask.sum(1).tolist() == expected
    marked = [Sequence(s.token_ids, (True,) * len(s), s.images) for s in sequences]
    assert not (packed_batch([marked], processor).loss_mask & packed_batch([marked], processor).is_image).any()


def test_sequences_without_images_are_the_batch_that_they_are_without_a_processor(sequences, processor):
    text = [sequences[1], sequences[1]]
    plain, found = batch_of(text), batch_of(text, processor)
    assert found.is_image is None and not found.image_inputs
    assert all(torch.equal(getattr(plain, key), getattr(found, key)) for key in ("input_ids", "attention_mask", "loss_mask"))


def test_images_without_a_processor_are_an_error(sequences):
    with pytest.raises(ValueError, match="sequences with images need the processor of the model"):
        batch_of(list(sequences))


def test_packed_documents_have_the_logits_that_they_have_alone(sequences, processor, model):
    rows = [[sequences[2], sequences[1], sequences[0]], [sequences[3]]]
    batch = packed_batch(rows, processor)
    with torch.no_grad():
        packed = model(**batch.inputs).logits
        for row, documents in zip(packed, rows, strict=True):
            start = 0
            for document in documents:
                alone = model(**batch_of([document], processor).inputs).logits[0]
                torch.testing.assert_close(row[start : start + len(document)], alone, atol=1e-5, rtol=1e-4)
                start += len(document)


def test_an_image_of_one_document_changes_no_logit_of_another(sequences, processor, model):
    first, others = sequences[0], [sequences[1], sequences[2]]
    swapped = Sequence(first.token_ids, first.is_response, sequences[3].images)
    with torch.no_grad():
        before, after = (model(**packed_batch([[given, *others]], processor).inputs).logits[0] for given in (first, swapped))
    assert torch.equal(before[len(first) :], after[len(first) :])
    assert not torch.equal(before[: len(first)], after[: len(first)])


def steps_of(sequences, processor, **training):
    given = Training(
        **({"lr": 1e-3, "loss_on": "assistant", "tokens": int(sequences.lengths.sum()), "batch_size": 2} | training)
    )
    return TrainingSteps(sequences, given, seq_len=int(2 * sequences.lengths.max()), processor=processor)


@pytest.mark.parametrize("packing", [False, True])
def test_training_reads_every_image_with_its_text(sequences, processor, packing):
    steps = steps_of(sequences, processor, packing=packing, batch_size=1)
    seen = [batch for step in steps for batch in step]
    n_images = sum(len(s.images) for s in sequences)
    pixels = [each for batch in seen if batch.is_image is not None for each in batch.inputs["pixel_values"].flatten(0, 1)]
    assert len(pixels) == n_images == sum(int((b.input_ids == IMAGE).sum()) for b in seen) // IMAGE_TOKENS
    by_start = {s.token_ids[:40]: s for s in sequences}
    for batch in [] if packing else seen:
        sequence = by_start[tuple(batch.input_ids[0, :40].tolist())]
        for place in range(len(sequence.images)):
            assert torch.equal(batch.inputs["pixel_values"].flatten(0, 1)[place], pixels_of(processor, sequence, place))


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_the_budget_counts_the_loss_tokens_of_the_batches_and_opens_no_image(sequences, processor, loss_on, monkeypatch):
    steps = steps_of(sequences, processor, loss_on=loss_on)
    expected = sum(batch.n_loss_tokens for step in steps for batch in step)
    monkeypatch.setattr(type(processor), "model_inputs", lambda *arguments: pytest.fail("an image was opened"))
    assert steps.budget["loss_tokens"] == expected > 0
    steps.require_loss_tokens()


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The digests of the images that were opened, in order."""
    found: list[str] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda image: found.append(image.digest) or original(image))
    return found


def digests(sequences) -> list[str]:
    return [image.digest for sequence in sequences for image in sequence.images]


def test_counting_and_moving_a_batch_opens_no_image_and_each_call_makes_its_pixels_anew(sequences, processor, opened):
    many = Stored(list(sequences) * 40)
    batches = batches_of(many, processor)
    order, by_length = batches_by_length(many, processor)
    assert len(batches) > 3 and len(by_length) > 3
    for batch in [*batches, *by_length, *(batch for step in steps_of(many, processor) for batch in step)]:
        assert batch.n_tokens >= batch.n_loss_tokens > 0
        assert batch.to(torch.device("meta")).without_loss().input_ids.is_meta
    assert sum(len(batch.input_ids) for batch in batches) == len(many) == len(order) and not opened
    moved = batches[0].to(torch.device("meta"))
    assert moved.is_image.is_meta and moved.inputs["pixel_values"].is_meta
    assert torch.equal(batches[0].inputs["pixel_values"], batches[0].inputs["pixel_values"])
    assert opened == 3 * digests(many[: len(batches[0].input_ids)])


@pytest.fixture
def pair(tiny_vlm, sequences, processor):
    """BF16 teacher, student quantized after calibration with images."""
    teacher, student = (load_checkpoint(tiny_vlm).model for _ in range(2))
    amax = calibrate(teacher, Recipe(), Inputs(batches_of(sequences, processor), torch.device("cpu")))
    quantize_model(student, Recipe(), amax)
    return teacher, student


def test_a_step_and_a_validation_open_each_image_once_for_student_and_teacher_together(sequences, processor, pair, opened):
    teacher, student = pair
    held_out = validation_batches(sequences[2:], "assistant", processor)
    steps = steps_of(sequences, processor, micro_batch_size=1, batch_size=4)
    opened.clear()
    seen = []
    watcher = Recorder(on_step=lambda step: seen.append(list(opened)))
    train(student, teacher, steps, settings(validate_every=1), objective=KL, held_out=held_out, watcher=watcher)
    assert len(seen) == len(steps) == 1 and sorted(seen[0]) == sorted(digests(sequences))
    assert opened[len(seen[0]) :] == digests(sequences[2:])


def test_of_two_ranks_each_opens_the_images_of_its_own_share(sequences, processor, pair, opened, monkeypatch):
    teacher, student = pair
    (step,) = (steps_of(sequences, processor, micro_batch_size=1, batch_size=4),)
    opened.clear()
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    found = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        for _, batch in distill._share(step[0]):
            Pair(student, teacher, KL)(batch, 1)
        found.append(list(opened))
        opened.clear()
    shares = [[batch.is_image for batch in step[0][rank::2]] for rank in range(2)]
    n_images = [sum(int(each.sum()) for each in share if each is not None) // IMAGE_TOKENS for share in shares]
    assert [len(each) for each in found] == n_images
    assert sorted(found[0] + found[1]) == sorted(digests(sequences))


def test_diagnostics_open_each_image_once_for_each_model_that_reads_it(sequences, processor, pair, opened):
    teacher, student = pair
    loaded = {
        name: SimpleNamespace(model=model, kernels="torch") for name, model in (("model", teacher), ("checkpoint", student))
    }

    @contextmanager
    def track(label):
        yield lambda done, total, text: None

    bench = SimpleNamespace(
        load=lambda stage: loaded[stage.key], teacher_hidden={}, reporter=SimpleNamespace(track=track), reader=processor
    )
    inputs = {name: SimpleNamespace(key=name) for name in loaded}
    stage = SimpleNamespace(label="v: diagnostics", inputs=inputs)
    batches = batches_of(sequences, processor)
    every = sorted(digests(sequences))
    for passes in (2, 1):  # the teacher's states are kept for the second variant
        opened.clear()
        _compared(bench, stage, batches, divergence.measure)
        assert sorted(opened) == sorted(every * passes)


def test_gptq_makes_the_pixels_of_one_batch_at_a_time(sequences, processor, pair, tiny_vlm, opened, monkeypatch):
    monkeypatch.setattr(batches_module, "FORWARD_TOKENS", 1)
    calibration = SimpleNamespace(sections={"samples": len(sequences)})
    stage = SimpleNamespace(
        quantization=SimpleNamespace(scale_weighting=None, scale_rule="gptq"),
        inputs={"calibration": calibration, "data": None},
    )
    bench = SimpleNamespace(sequences=lambda data, split, samples: sequences, reader=processor)
    opened.clear()
    choices = Workbench._choices(bench, stage)
    assert not opened and len(choices["batches"]) == len(sequences)
    teacher, _ = pair
    recipe = Recipe(scale_rule="gptq", block_scales="frozen")
    given = {"lazy": choices["batches"], "held": list(choices["batches"])}
    found = {}
    for name, inputs in given.items():
        opened.clear()
        student = load_checkpoint(tiny_vlm).model
        modules = quantize_model(student, recipe, calibrate(teacher, recipe, given["held"]), batches=inputs)
        found[name] = encoding_digest(modules)
        assert opened == (digests(sequences) if name == "lazy" else [])
    assert found["lazy"] == found["held"]


def test_the_images_of_each_sequence_are_a_sample_of_their_own_in_the_order_of_their_tokens(
    processor, sequences, model, monkeypatch
):
    images = [sequence.images for sequence in sequences]
    ids = torch.full((len(images), 2 * IMAGE_TOKENS), 0)
    for row, shown in enumerate(images):
        ids[row, : IMAGE_TOKENS * len(shown)] = IMAGE
    together = [image for shown in images for image in shown]
    called = []
    original = processor._processor
    monkeypatch.setattr(processor, "_processor", lambda **given: called.append(given) or original(**given))
    nested = processor.model_inputs(images, ids)
    assert [len(sample) for sample in called[0]["images"]] == [1, 2, 1] == [t.count("<image>") for t in called[0]["text"]]
    one_list = processor.model_inputs([together], ids)
    assert nested["pixel_values"].shape[:2] == (3, 2) and one_list["pixel_values"].shape[:2] == (1, 4)
    with torch.no_grad():  # the model leaves out what fills up the samples
        found, expected = (model.model.get_image_features(**each).pooler_output for each in (nested, one_list))
    assert len(found) == 4 and torch.equal(found, expected)
    called.clear()
    packed_batch([list(sequences)], processor).make_image_inputs()
    assert [len(sample) for sample in called[0]["images"]] == [1, 2, 1]
