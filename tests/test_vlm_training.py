"""Image-text models in training and measurement: images reach both models, and no token that stands for one is ever predicted."""

import dataclasses
import hashlib

import pytest
import torch

from qad.batch import Batch
from qad.calibrate import calibrate, second_moments
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.distill import Pair, train
from qad.divergence import final_hidden, measure, measure_responses, summarize
from qad.errors import TrainingError
from qad.layers import layers_of
from qad.losses import Objective
from qad.masters import names_of
from qad.modules import input_quantizers
from qad.packing import PACKABLE_WITH_IMAGES, allow_packing, require_packable, row_positions
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from tests.training_checks import CE, KL, losses_of, one_each, settings
from tests.vlm_families import IMAGE, build_family, images_of

IMAGE_TOKENS = 4


def batches_for(n, *, rows=3, length=32, name="idefics3"):
    """Random tokens around one image a row, the last row half padding; the response is the second half of each row."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(n):
        ids = torch.randint(8, 128, (rows, length), generator=generator)
        attention = torch.ones_like(ids)
        attention[rows - 1, length // 2 :] = 0
        width, inputs = images_of(name, rows)
        ids[:, 3 : 3 + width] = IMAGE
        pixels = inputs["pixel_values"]
        inputs["pixel_values"] = torch.randn(pixels.shape, generator=generator)
        response = attention.bool()
        response[:, :2] = False
        found.append(Batch(ids, attention, response, None, inputs, ids == IMAGE))
    return found


def inputs_of(batches):
    return [{"input_ids": b.input_ids, "attention_mask": b.attention_mask, **b.image_inputs} for b in batches]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vlm") / "bf16"
    build_family("idefics3", path)
    return path


def quantized(folder, recipe=None, **options):
    """Teacher, student quantized after calibration with images, and batches."""
    recipe = recipe or Recipe()
    teacher, student = (load_checkpoint(folder).model for _ in range(2))
    batches = batches_for(16)
    quantize_model(student, recipe, calibrate(teacher, recipe, inputs_of(batches[:4])), **options)
    return teacher, student, batches


def rest_digest(model):
    """sha256 of everything outside the decoder blocks and the head: the tower, the projector, the embeddings."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith(("model.text_model.layers.", "lm_head.")):
            digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def kl_to(teacher, student, batches):
    heads = [m.get_output_embeddings().weight for m in (student, teacher)]
    return summarize(measure(final_hidden(student, batches), heads[0], final_hidden(teacher, batches), heads[1], batches)[0]).kl


@torch.no_grad()
def logits(model, batch):
    return model(**batch.inputs).logits.float()


def test_distillation_on_images_lowers_kl_and_leaves_the_tower_and_the_projector_bit_for_bit(folder, tmp_path):
    teacher, student, _ = quantized(folder)
    batches = batches_for(48)
    steps, held_out = [batches[3 * i : 3 * i + 3] for i in range(13)], batches[40:]
    before, source = kl_to(teacher, student, held_out), rest_digest(teacher)
    assert rest_digest(student) == source
    done, _ = train(student, teacher, steps, settings(), objective=KL)
    assert kl_to(teacher, student, held_out) < 0.95 * before
    assert rest_digest(student) == source
    assert all(name.startswith("model.text_model.layers.") for name in done.trainable)
    targets = match(teacher, Recipe())
    for layout in ("modelopt", "compressed-tensors"):
        write_checkpoint(tmp_path / layout, student, targets=targets, companions=folder, record={}, layout=layout)
        loaded = load_checkpoint(tmp_path / layout).model
        assert rest_digest(loaded) == source
        assert torch.equal(logits(loaded, batches[0]), logits(student, batches[0]))


def test_everything_is_trained_where_a_suite_asks_for_it(folder):
    teacher, student, batches = quantized(folder)
    targets = match(teacher, Recipe())
    done, _ = train(student, teacher, one_each(batches[:3]), settings(lr=3e-3, train="all"), objective=KL)
    names = {"model.connector.modality_projection.proj.weight", "model.vision_model.encoder.layers.0.mlp.fc1.weight"}
    assert names <= set(done.trainable) == set(names_of(teacher, targets, train="all", learned_scales=False))
    for name in names:
        assert not torch.equal(student.get_parameter(name), teacher.get_parameter(name))


def test_the_loss_is_that_of_the_text_positions_by_hand(folder):
    teacher, student, batches = quantized(folder)
    (batch,) = batches[:1]
    given = logits(student, batch).log_softmax(-1), logits(teacher, batch).log_softmax(-1)
    kl, ce = [], []
    for row in range(3):
        for place in range(1, 32):
            label = int(batch.input_ids[row, place])
            if batch.loss_mask[row, place] and label != IMAGE:
                s, t = (each[row, place - 1] for each in given)
                kl.append(float((t.exp() * (t - s)).sum()))
                ce.append(-float(s[label]))
    assert bool((batch.loss_mask & batch.is_image).any())
    assert batch.n_loss_tokens == len(kl) == 30 - IMAGE_TOKENS + 30 - IMAGE_TOKENS + 14 - IMAGE_TOKENS
    for objective, by_hand in ((KL, kl), (CE, ce)):
        loss, sums = Pair(student, teacher, objective)(batch, batch.n_loss_tokens)
        assert float(loss.detach()) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-3)
        assert float(sums.kl) == pytest.approx(sum(kl), rel=1e-3)
    response, everything = measure(
        final_hidden(student, [batch]), student.lm_head.weight, final_hidden(teacher, [batch]), teacher.lm_head.weight, [batch]
    )
    assert [each.n_tokens for each in response] == [26, 26, 10]
    assert [each.n_tokens for each in everything] == [27, 27, 11]
    assert torch.cat([each.kl for each in response]).tolist() == pytest.approx(kl, rel=1e-3, abs=1e-5)
    alone = measure_responses(
        final_hidden(student, [batch]), student.lm_head.weight, final_hidden(teacher, [batch]), teacher.lm_head.weight, [batch]
    )
    assert all(torch.allclose(a.kl, b.kl, atol=1e-6) for a, b in zip(alone, response, strict=True))


def test_images_reach_the_student_and_the_teacher(folder):
    teacher, student, batches = quantized(folder)
    (batch,) = batches[:1]
    other = dataclasses.replace(batch, image_inputs={"pixel_values": batch.image_inputs["pixel_values"] + 1})
    for model in (student, teacher):
        assert not torch.equal(logits(model, batch), logits(model, other))
    losses = [Pair(student, teacher, KL)(each, batch.n_loss_tokens)[0].item() for each in (batch, other)]
    assert losses[0] != losses[1]


def test_a_batch_without_loss_and_one_on_another_device_keep_their_images(folder):
    (batch,) = batches_for(1)
    silent = batch.without_loss()
    assert silent.n_loss_tokens == 0 and silent.n_tokens == batch.n_tokens
    assert silent.inputs.keys() == batch.inputs.keys() and "pixel_values" in silent.inputs
    moved = batch.to(torch.device("meta"))
    assert moved.image_inputs["pixel_values"].is_meta and moved.is_image.is_meta
    assert moved.predicted.shape == (3, 31)


def test_text_and_images_are_mixed_in_one_step(folder):
    teacher, student, batches = quantized(folder)
    ids = torch.randint(8, 128, (3, 32), generator=torch.Generator().manual_seed(9))
    text = Batch(ids, torch.ones_like(ids), torch.ones_like(ids).bool())
    done, _ = train(student, teacher, [[batches[0], text]] * 2, settings(train="all"), objective=KL)
    assert done.steps[0].n_loss_tokens == batches[0].n_loss_tokens + 3 * 31


def test_checkpointing_changes_no_loss_and_quantizes_inputs_twice(folder):
    def run(**given):
        teacher, student, batches = quantized(folder)
        done, _ = train(student, teacher, one_each(batches[:2]), settings(**given), objective=KL)
        return losses_of(done), [quantizer.quantizations for quantizer in input_quantizers(student)]

    (plain, once), (found, twice) = run(), run(activation_checkpointing=True)
    assert found == pytest.approx(plain, rel=1e-3)
    assert once == [2] * 8 and twice == [4] * 8  # of two steps


def test_layers_are_decoder_blocks_alone(folder):
    model = load_checkpoint(folder).model
    assert {type(layer).__name__ for layer in layers_of(model)} == {"LlamaDecoderLayer"} and len(layers_of(model)) == 2


def test_gptq_rounds_by_what_images_do(folder):
    recipe = Recipe(scale_rule="gptq", block_scales="frozen")
    teacher, found = load_checkpoint(folder).model, []
    for batches in (batches_for(4), batches_for(8)[4:]):
        student = load_checkpoint(folder).model
        inputs = [{**each, "input_ids": same.input_ids} for each, same in zip(inputs_of(batches), batches_for(4), strict=True)]
        quantize_model(student, recipe, calibrate(teacher, recipe, inputs_of(batches_for(4))), batches=inputs)
        found.append(logits(student, batches_for(1)[0]))
        assert bool(torch.isfinite(found[-1]).all())
    assert not torch.equal(*found)  # the same text with other pictures


def test_the_kv_cache_is_that_of_the_decoder_and_sees_images(folder):
    recipe = Recipe(kv_cache="fp8")
    batches = batches_for(2)
    other = [dataclasses.replace(b, image_inputs={"pixel_values": 2 * b.image_inputs["pixel_values"]}) for b in batches]
    student = load_checkpoint(folder).model
    amax = [calibrate(student, recipe, inputs_of(each)) for each in (batches, other)]
    names = [f"model.text_model.layers.{i}.self_attn.{part}" for i in range(2) for part in ("k_cache", "v_cache")]
    assert {name for name in amax[0] if name.endswith("_cache")} == set(names)
    assert any(amax[0][name] != amax[1][name] for name in names)
    vision, before = (
        student.model.vision_model,
        student.model.vision_model(batches[0].image_inputs["pixel_values"][0].bfloat16()),
    )
    quantize_model(student, recipe, amax[0])
    assert student.model.text_model.config._attn_implementation == "qad_kv_cache"
    assert vision.config._attn_implementation == "sdpa" and not hasattr(vision.encoder.layers[0].self_attn, "kv_cache")
    again = vision(batches[0].image_inputs["pixel_values"][0].bfloat16())
    assert torch.equal(before.last_hidden_state, again.last_hidden_state)


def test_calibration_counts_image_positions_and_leaves_padding_out(folder):
    model = load_checkpoint(folder).model
    (batch,) = batches_for(1)
    seen = []
    handle = model.model.text_model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    logits(model, batch)
    handle.remove()
    name = "model.text_model.layers.1.mlp.down_proj"
    inside = seen[0][batch.attention_mask.bool()].float()
    assert calibrate(model, Recipe(), inputs_of([batch]))[name] == float(inside.abs().max())
    assert torch.allclose(second_moments(model, Recipe(), inputs_of([batch]))[name], inside.square().mean(0), rtol=1e-4)
    assert len(inside) == batch.n_tokens > batch.n_tokens - int(batch.is_image.sum())


@pytest.mark.parametrize("name", sorted(PACKABLE_WITH_IMAGES))
def test_a_picture_of_one_document_changes_no_logit_of_another_in_its_row(name):
    model = build_family(name).float()
    allow_packing(model)
    width, images = images_of(name, 2)
    ids = torch.arange(10, 70).reshape(1, 60)
    ids[:, 4 : 4 + width] = ids[:, 32 : 32 + width] = IMAGE
    row = {"input_ids": ids, "position_ids": row_positions([28, 32], 60)[None], "use_cache": False}
    pixels = images["pixel_values"]
    changed = pixels.clone().reshape(2, 3, 16, 16)
    changed[0] += 1
    with torch.no_grad():
        before, after = (model(**row, pixel_values=p).logits for p in (pixels, changed.reshape(pixels.shape)))
        second = pixels.reshape(2, 3, 16, 16)[1:].reshape(1, 1, 3, 16, 16) if pixels.ndim == 5 else pixels[1:]
        alone = model(input_ids=ids[:, 28:], pixel_values=second, use_cache=False).logits
    assert torch.equal(before[:, 28:], after[:, 28:])
    assert (before - after)[:, :28].abs().max() > 0.01
    assert torch.allclose(before[:, 28:], alone, atol=1e-5)


def test_an_image_text_model_that_was_not_tested_is_not_packed():
    with pytest.raises(
        TrainingError, match='model_type "qwen2_5_vl" is not known to keep packed documents apart; known: idefics3'
    ):
        require_packable(build_family("qwen2_5_vl"))


def test_cross_entropy_on_images_is_trained_too(folder):
    _, student, batches = quantized(folder)
    done, _ = train(student, None, [batches[:4]] * 6, settings(lr=3e-3), objective=Objective("ce"))
    assert losses_of(done)[-1] < losses_of(done)[0]
