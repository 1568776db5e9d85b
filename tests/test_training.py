"""Losses and the training loop, on numbers that can be worked out another way."""

import pytest
import torch

from qad import nvfp4
from qad.calibrate import calibrate, counting_blocks, require_unsaturated
from qad.checkpoint import load_checkpoint
from qad.distill import Batch, Masters, Optimization, batch_loss, train
from qad.divergence import final_hidden, measure, summarize
from qad.errors import CalibrationError, TrainingError
from qad.losses import CHUNK_TOKENS, cross_entropy, forward_kl, token_divergence
from qad.modules import BlockCounts, encoding_digest
from qad.quantize import quantize_model
from qad.recipe import Recipe


def hidden_and_heads(n_tokens=CHUNK_TOKENS + 37, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n_tokens, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    heads = [torch.randn(50, 16, generator=generator, dtype=torch.float64) * 0.5 for _ in range(2)]
    labels = torch.randint(0, 50, (n_tokens,), generator=generator)
    return student.to(dtype), heads[0].to(dtype), teacher.to(dtype), heads[1].to(dtype), labels


def plain_losses(student, head, teacher, teacher_head, labels):
    """The definitions in one piece, through autograd, in the type given."""
    logp = torch.log_softmax(student @ head.T, dim=1)
    logq = torch.log_softmax(teacher @ teacher_head.T, dim=1)
    return (logq.exp() * (logq - logp)).sum(1), -logp[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_chunked_losses_and_gradients_equal_the_plain_ones_across_chunks(objective):
    student, head, teacher, teacher_head, labels = hidden_and_heads()
    reference = student.clone().requires_grad_(True)
    kl, ce = plain_losses(reference, head, teacher, teacher_head, labels)
    expected = (kl if objective == "kl" else ce).sum() / 1000
    expected.backward()
    ours = student.float().requires_grad_(True)
    head, teacher, teacher_head = head.float(), teacher.float(), teacher_head.float()
    if objective == "kl":
        loss = forward_kl(ours, head, teacher, teacher_head, labels, n_tokens=1000)
    else:
        loss = cross_entropy(ours, head, labels, n_tokens=1000)
    (3 * loss).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(ours.grad.double(), 3 * reference.grad, rtol=1e-4, atol=1e-8)


def test_token_divergence_equals_the_definitions_and_is_zero_against_itself():
    student, head, teacher, teacher_head, labels = hidden_and_heads()
    kl, ce = plain_losses(student, head, teacher, teacher_head, labels)
    found = token_divergence(student.float(), head.float(), teacher.float(), teacher_head.float(), labels)
    assert torch.allclose(found.kl.double(), kl, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.ce.double(), ce, rtol=1e-5, atol=1e-6)
    agree = (student @ head.T).argmax(1) == (teacher @ teacher_head.T).argmax(1)
    assert torch.equal(found.top1.bool(), agree)
    itself = token_divergence(student.float(), head.float(), student.float(), head.float(), labels)
    assert float(itself.kl.abs().max()) == 0.0
    assert float(itself.top1.min()) == 1.0


def batches_for(n_steps: int, *, vocabulary: int, length: int = 48) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(n_steps):
        ids = torch.randint(2, vocabulary, (4, length), generator=generator)
        attention = torch.ones_like(ids)
        attention[3, length // 2 :] = 0
        found.append(Batch(ids, attention, attention.bool()))
    return found


@pytest.fixture
def pair(tiny_model):
    """A teacher, a student quantized as PTQ is, and batches."""
    teacher, student = load_checkpoint(tiny_model).model, load_checkpoint(tiny_model).model
    batches = batches_for(24, vocabulary=teacher.config.vocab_size)
    inputs = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches[:4]]
    modules = quantize_model(student, Recipe(), calibrate(teacher, Recipe(), inputs))
    return teacher, student, modules, batches


def test_calibration_sees_the_largest_input_and_leaves_padding_out(tiny_model):
    model = load_checkpoint(tiny_model).model
    (batch,) = batches_for(1, vocabulary=model.config.vocab_size)
    seen = {}
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.update(x=x[0]))
    with torch.no_grad():
        model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    found = calibrate(model, Recipe(), [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}])
    assert found["model.layers.0.mlp.down_proj"] == float(seen["x"][batch.attention_mask.bool()].abs().max())
    with pytest.raises(CalibrationError, match="reached 0 of 8 fused groups"):
        calibrate(model, Recipe(), [])


def test_too_little_headroom_saturates_and_is_refused(tiny_model):
    teacher, student = load_checkpoint(tiny_model).model, load_checkpoint(tiny_model).model
    batches = batches_for(2, vocabulary=teacher.config.vocab_size)
    inputs = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches]
    recipe = Recipe(headroom=0.05)
    quantize_model(student, recipe, calibrate(teacher, recipe, inputs))
    with counting_blocks(student) as counts:
        list(final_hidden(student, batches))
    assert counts.saturated > 0.01 * counts.total
    with pytest.raises(CalibrationError, match=r"activation blocks saturate.*raise calibration\.headroom"):
        require_unsaturated(counts, max_saturated=0.001, max_overshoot=1e9)
    require_unsaturated(counts, max_saturated=1.0, max_overshoot=1e9)


def test_one_token_far_beyond_its_scale_is_refused_where_its_share_of_blocks_is_not():
    counts = BlockCounts()
    x = torch.ones(1000, 64)
    counts.add(x, torch.tensor(1.0 / 2688), "nvfp4", "quiet")
    x[0, 0] = 30.0
    counts.add(x, torch.tensor(1.0 / 2688), "nvfp4", "loud")
    assert counts.saturated == 1 and counts.overshoot == pytest.approx(30.0, rel=1e-3)
    require_unsaturated(counts, max_saturated=0.001, max_overshoot=31.0)
    with pytest.raises(CalibrationError, match=r"input of loud reaches 30 times .* calibration.max_overshoot = 2: raise"):
        require_unsaturated(counts, max_saturated=0.001, max_overshoot=2.0)


def test_training_starts_at_ptq_and_every_projection_keeps_live_weights_decoded(pair):
    teacher, student, modules, batches = pair
    start = encoding_digest(modules)
    seen = []

    def check(step):
        seen.append(step)
        for module in modules.values():
            assert torch.equal(module.weight, nvfp4.dequantize(module.encoding))

    done = train(student, teacher, batches[:3], Optimization(lr=1e-3, warmup_steps=0), on_step=check)
    assert done.start_digest == start
    assert encoding_digest(modules) != start
    assert [step.n_tokens for step in seen] == [48 * 3 + 24] * 3
    assert 0 < done.codes_changed < 1


def test_the_master_of_a_quantized_weight_starts_at_the_original_and_encodes_to_ptq(pair, tiny_model):
    _, student, modules, _ = pair
    original = load_checkpoint(tiny_model).model
    start = encoding_digest(modules)
    masters = Masters(student)
    for (name, _), master in zip(modules.items(), masters.parameters, strict=True):
        assert torch.equal(master, original.get_submodule(name).weight.float())
    masters.project()
    assert encoding_digest(modules) == start


def test_a_tiny_learning_rate_moves_the_master_as_fp32_adamw_says_although_codes_stay(pair):
    teacher, student, _, batches = pair
    masters = Masters(student)
    before = [master.detach().clone() for master in masters.parameters]
    optimizer = torch.optim.AdamW(masters.parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    batch_loss(student, teacher, batches[0], n_tokens=100).backward()
    optimizer.step()
    for master, old in zip(masters.parameters, before, strict=True):
        moved = (master.detach() - old)[master.grad != 0]
        assert float(moved.abs().median()) == pytest.approx(1e-6, rel=0.05)


def test_gradients_of_micro_batches_add_up_in_fp32_on_the_master(pair):
    teacher, student, modules, batches = pair
    masters = Masters(student)
    for batch in batches[:2]:
        batch_loss(student, teacher, batch, n_tokens=100).backward()
    first = next(iter(modules.values()))
    assert first.weight.grad is None
    assert masters.parameters[0].grad.dtype is torch.float32
    summed = masters.parameters[0].grad.clone()
    masters.parameters[0].grad = None
    batch_loss(student, teacher, batches[0], n_tokens=100).backward()
    one = masters.parameters[0].grad.clone()
    masters.parameters[0].grad = None
    batch_loss(student, teacher, batches[1], n_tokens=100).backward()
    assert torch.equal(summed, one + masters.parameters[0].grad)


def test_only_quantized_weights_are_trained(pair):
    teacher, student, modules, batches = pair
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    train(student, teacher, batches[:2], Optimization(lr=1e-2, warmup_steps=0))
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.weight" for name in modules}


def kl_to(teacher, student, batches):
    heads = [m.get_output_embeddings().weight for m in (student, teacher)]
    response, _ = measure(final_hidden(student, batches), heads[0], final_hidden(teacher, batches), heads[1], batches)
    return summarize(response)


def test_distillation_lowers_kl_and_cross_entropy_training_raises_it(pair, tiny_model):
    teacher, student, _, batches = pair
    measured = batches[:4]
    before = kl_to(teacher, student, measured)
    train(student, teacher, batches[:4] * 12, Optimization(lr=2e-3, warmup_steps=2))
    assert kl_to(teacher, student, measured).kl < 0.9 * before.kl
    other = load_checkpoint(tiny_model).model
    inputs = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches[:4]]
    quantize_model(other, Recipe(), calibrate(teacher, Recipe(), inputs))
    train(other, None, batches[:4] * 12, Optimization(lr=2e-3, warmup_steps=2))
    assert kl_to(teacher, other, measured).kl > before.kl


def test_a_loss_that_is_not_finite_stops_with_its_step(pair):
    teacher, student, _, batches = pair
    teacher.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 0: the kl loss is nan"):
        train(student, teacher, batches[:2], Optimization(lr=1e-3))


def test_a_batch_without_a_token_to_learn_from_is_refused(pair):
    teacher, student, _, batches = pair
    empty = Batch(batches[0].input_ids, batches[0].attention_mask, torch.zeros_like(batches[0].loss_mask))
    with pytest.raises(TrainingError, match="step 1: no token to predict"):
        train(student, teacher, [batches[0], empty], Optimization(lr=1e-3))


def test_the_schedule_warms_up_and_ends_near_zero():
    linear = Optimization(lr=1.0, warmup_steps=4)
    assert [linear.lr_at(step, 10) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, pytest.approx(1 / 6)]
    assert Optimization(lr=1.0, schedule="constant", warmup_steps=0).lr_at(9, 10) == 1.0


def test_errors_of_kl_are_over_sequences_and_one_sequence_has_none(pair):
    teacher, student, _, batches = pair
    found = kl_to(teacher, student, batches[:2])
    assert found.n_sequences == 8
    assert found.n_tokens == 2 * (3 * 47 + 23)
    assert found.kl_stderr > 0
    assert kl_to(teacher, teacher, batches[:1]).kl == 0.0
    one = Batch(batches[0].input_ids[:1], batches[0].attention_mask[:1], batches[0].loss_mask[:1])
    assert kl_to(teacher, student, [one]).kl_stderr is None
