"""The training loop, on numbers that can be worked out another way."""

from dataclasses import replace

import pytest
import torch
from training_checks import CE, KL, Recorder, batches_for, inputs_of, kl_to, losses_of, one_each, quantized, run, same, settings

from qad import nvfp4
from qad.batch import Batch
from qad.calibrate import calibrate, counting_blocks, require_unsaturated
from qad.checkpoint import load_checkpoint
from qad.distill import train
from qad.divergence import final_hidden
from qad.errors import CalibrationError, TrainingError
from qad.masters import Masters
from qad.modules import BlockCounts, encoding_digest, input_quantizers
from qad.recipe import Recipe
from qad.scales import amax_block_scales


@pytest.fixture
def pair(tiny_model):
    """A teacher, a student quantized as PTQ is, its quantized modules, and batches."""
    return quantized(tiny_model)


def test_calibration_sees_the_largest_input_and_leaves_padding_out(tiny_model):
    model = load_checkpoint(tiny_model).model
    (batch,) = batches_for(1, vocabulary=model.config.vocab_size)
    seen = {}
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.update(x=x[0]))
    with torch.no_grad():
        model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    found = calibrate(model, Recipe(), inputs_of([batch]))
    assert found["model.layers.0.mlp.down_proj"] == float(seen["x"][batch.attention_mask.bool()].abs().max())
    with pytest.raises(CalibrationError, match="never reached 8 of 8 fused groups"):
        calibrate(model, Recipe(), [])


def test_too_little_headroom_saturates_and_is_refused(tiny_model):
    _, student, _, batches = quantized(tiny_model, Recipe(headroom=0.05))
    with counting_blocks(student) as counts:
        list(final_hidden(student, batches[:2]))
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


def test_training_starts_at_ptq_and_after_every_step_live_weights_decode_what_the_masters_encode_to(pair):
    teacher, student, modules, batches = pair
    start = encoding_digest(modules)
    first_loss = float(kl_to(teacher, student, batches[:1]).kl)
    masters_seen = []

    def check(step):
        for module in modules.values():
            assert torch.equal(module.weight, nvfp4.dequantize(module.encoding))
        masters_seen.append(encoding_digest(modules))

    seen = Recorder(on_step=check)
    done, masters = train(student, teacher, one_each(batches[:3]), settings(), objective=KL, watcher=seen)
    assert [step.n_tokens for step in seen.steps] == [48 * 3 + 24] * 3
    assert [step.n_loss_tokens for step in seen.steps] == [47 * 3 + 23] * 3
    assert done.steps[0].loss == pytest.approx(first_loss, rel=1e-5)  # step 0 is the PTQ checkpoint
    assert len({start, *masters_seen}) == 4
    assert 0 < done.codes_changed < 1 and 0 < done.block_scales_changed < 1
    for name, module in modules.items():
        master = masters.named[f"{name}.weight"]
        assert master.dtype is torch.float32
        expected = nvfp4.quantize(master, amax_block_scales(master.detach(), module.tensor_scale), module.tensor_scale)
        for ours, by_hand in zip(module.encoding.tensors(), expected.tensors(), strict=True):
            assert torch.equal(ours, by_hand)


def test_the_master_of_a_quantized_weight_starts_at_the_original_and_encodes_to_ptq(pair, tiny_model):
    _, student, modules, _ = pair
    original = load_checkpoint(tiny_model).model
    start = encoding_digest(modules)
    masters = Masters(student)
    assert list(masters.named) == [f"{name}.weight" for name in modules]
    for name, master in masters.named.items():
        assert torch.equal(master, original.get_parameter(name).float())
    masters.project()
    assert encoding_digest(modules) == start


def adamw_by_hand(master, gradients, rates, *, betas=(0.9, 0.95), eps=1e-8):
    """AdamW without weight decay, as its paper writes it, in float64."""
    x, m, v = master.double(), 0.0, 0.0
    for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = gradient.double()
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        x = x - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return x


def test_a_tiny_learning_rate_moves_the_masters_as_fp32_adamw_says_although_the_live_weights_stay(pair, monkeypatch):
    teacher, student, modules, batches = pair
    before = {f"{name}.weight": module.original.float() for name, module in modules.items()}
    start = {name: module.weight.detach().clone() for name, module in modules.items()}
    gradients = []

    def spy(parameters, clip_norm):
        gradients.append([parameter.grad.clone() for parameter in parameters])
        return torch.tensor(0.0)

    monkeypatch.setattr("qad.distill.nn.utils.clip_grad_norm_", spy)
    steps = one_each(batches[:4])
    done, masters = train(student, teacher, steps, settings(lr=1e-6, schedule="constant"), objective=KL)
    for index, (name, master) in enumerate(masters.named.items()):
        expected = adamw_by_hand(before[name], [step[index] for step in gradients], [1e-6] * 4)
        moved, wanted = master.detach().double() - before[name], expected - before[name]
        assert 1e-6 < float(wanted.abs().max()) < 5e-6
        # FP32 holds a weight to 2^-24 of its size, four times over
        assert bool(((moved - wanted).abs() <= 4 * 2.0**-24 * before[name].abs() + 1e-10).all())
    assert done.codes_changed < 0.02  # of weights that BF16 put on the very border of a rounding cell
    unchanged = [float((module.weight == start[name]).float().mean()) for name, module in modules.items()]
    assert min(unchanged) > 0.9


def test_only_quantized_weights_are_trained(pair):
    teacher, student, modules, batches = pair
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    done, _ = train(student, teacher, one_each(batches[:2]), settings(lr=1e-2), objective=KL)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.weight" for name in modules} == set(done.trainable)
    assert all(done.trainable[name] == before[name].numel() for name in changed)
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())


def test_distillation_lowers_kl_and_cross_entropy_training_raises_it(pair, tiny_model):
    teacher, student, _, batches = pair
    before = kl_to(teacher, student, batches[:4])
    steps = one_each(batches[:4] * 12)
    train(student, teacher, steps, settings(lr=2e-3, warmup_steps=2), objective=KL)
    assert kl_to(teacher, student, batches[:4]).kl < 0.9 * before.kl
    _, other, _, _ = quantized(tiny_model)
    done, _ = train(other, None, steps, settings(lr=2e-3, warmup_steps=2), objective=CE)
    assert kl_to(teacher, other, batches[:4]).kl > before.kl
    assert done.steps[-1].kl is None and done.steps[-1].loss == done.steps[-1].ce < done.steps[0].ce


def test_an_objective_with_a_teacher_and_none_given_is_refused(pair):
    _, student, _, batches = pair
    with pytest.raises(ValueError, match='loss "kl" needs a teacher'):
        train(student, None, one_each(batches[:1]), settings(), objective=KL)


def test_a_batch_without_a_token_to_learn_from_is_refused(pair):
    teacher, student, _, batches = pair
    with pytest.raises(TrainingError, match="step 1: no token to predict"):
        train(student, teacher, [[batches[0]], [batches[0].without_loss()]], settings(), objective=KL)


def test_errors_of_kl_are_over_sequences_and_one_sequence_has_none(pair):
    teacher, student, _, batches = pair
    found = kl_to(teacher, student, batches[:2])
    assert found.n_sequences == 8
    assert found.n_tokens == 2 * (3 * 47 + 23)
    assert found.kl_stderr > 0
    assert kl_to(teacher, teacher, batches[:1]).kl == 0.0
    one = Batch(batches[0].input_ids[:1], batches[0].attention_mask[:1], batches[0].loss_mask[:1])
    assert kl_to(teacher, student, [one]).kl_stderr is None


def halves(batch: Batch) -> list[Batch]:
    """A batch of four rows as one of three and one of one, with unequal numbers of tokens."""
    parts = (slice(0, 1), slice(1, 4))
    return [Batch(batch.input_ids[p], batch.attention_mask[p], batch.loss_mask[p]) for p in parts]


@pytest.mark.parametrize("kind", ["quantized", "all"])
def test_a_step_of_unequal_micro_batches_is_the_step_of_one_batch(tiny_model, kind):
    recipe = Recipe(activations=False)  # rounded activations would turn the order of sums into other codes
    runs = []
    for split in (False, True):
        teacher, student, modules, batches = quantized(tiny_model, recipe, dtype=torch.float32)
        before = {f"{name}.weight": module.original.clone() for name, module in modules.items()}
        steps = [halves(batch) if split else [batch] for batch in batches[:1]]
        given = settings(lr=1e-5, train=kind)
        done, masters = train(student, teacher, steps, given, objective=KL)
        runs.append((done, {name: masters.named[name].detach() - before[name] for name in before}))
    (whole, moved), (parts, also_moved) = runs
    assert parts.steps[0].n_loss_tokens == whole.steps[0].n_loss_tokens == 3 * 47 + 23
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-6)
    assert parts.steps[0].grad_norm == pytest.approx(whole.steps[0].grad_norm, rel=1e-5)
    for name, expected in moved.items():
        assert float((also_moved[name] - expected).norm() / expected.norm()) < 0.02  # Adam's first step is nearly a sign


def test_losses_of_micro_batches_are_weighed_by_their_tokens_not_averaged(pair):
    teacher, student, _, batches = pair
    losses = [float(kl_to(teacher, student, [part]).kl) for part in halves(batches[0])]
    tokens = [part.n_loss_tokens for part in halves(batches[0])]
    done, _ = train(student, teacher, [halves(batches[0])], settings(), objective=KL)
    expected = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
    assert done.steps[0].loss == pytest.approx(expected, rel=1e-5)
    assert done.steps[0].loss != pytest.approx(sum(losses) / 2, rel=1e-4)


def test_gradients_above_the_norm_are_cut_to_it_and_the_norm_before_is_logged(tiny_model, monkeypatch):
    norms = []

    def spy(optimizer, *arguments, **options):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    given = settings()
    for clip_norm in (1e9, 0.25):
        norms.clear()
        clipped = replace(given, optimization=replace(given.optimization, clip_norm=clip_norm))
        done, _, _ = run(tiny_model, 2, clipped)
        logged = [step.grad_norm for step in done.steps]
        assert min(logged) > 0.25
        assert norms == pytest.approx([min(norm, clip_norm) for norm in logged], rel=1e-4)


def test_validation_is_held_every_n_steps_and_after_the_last_on_the_tokens_of_all_its_batches(pair):
    teacher, student, _, batches = pair
    seen = Recorder()
    given = settings(validate_every=2)
    held_out = [*batches[10:12], *halves(batches[12])]
    done, _ = train(student, teacher, one_each(batches[:5]), given, objective=KL, held_out=held_out, watcher=seen)
    assert [found.step for found in done.validations] == [2, 4, 5]
    assert tuple(seen.validations) == done.validations
    last, expected = done.validations[-1], kl_to(teacher, student, held_out)
    assert last.validation_kl == pytest.approx(expected.kl, rel=1e-5)
    assert last.validation_ce == pytest.approx(expected.ce, rel=1e-5)
    assert last.validation_loss == last.validation_kl
    assert last.n_loss_tokens == 3 * (3 * 47 + 23)
    assert (last.codes_changed, last.block_scales_changed) == (done.codes_changed, done.block_scales_changed)


def test_validation_changes_nothing_of_the_training(tiny_model):
    plain, masters, _ = run(tiny_model, 4)
    held_out = batches_for(2, vocabulary=512)
    watched, others, _ = run(tiny_model, 4, settings(validate_every=1), held_out=held_out)
    assert losses_of(plain) == losses_of(watched)
    assert all(torch.equal(masters.named[name], others.named[name]) for name in masters.named)


def test_cross_entropy_training_validates_its_kl_too_where_it_has_a_teacher(tiny_model):
    done, _, _ = run(tiny_model, 2, settings(validate_every=2), objective=CE, held_out=batches_for(1, vocabulary=512))
    assert done.steps[0].kl is None and done.steps[0].loss == done.steps[0].ce
    assert 0 < done.validations[0].validation_kl < done.validations[0].validation_ce == done.validations[0].validation_loss


def test_validation_without_a_token_to_predict_is_refused_before_the_first_step(tiny_model):
    (batch,) = batches_for(1, vocabulary=512)
    for held_out in ([], [batch.without_loss()]):
        with pytest.raises(TrainingError, match="validate_every: the held-out batches have no token to predict"):
            run(tiny_model, 1, settings(validate_every=1), held_out=held_out)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_batch(pair):
    teacher, student, _, batches = pair
    bad = int(batches[2].input_ids[0, 5])
    teacher.set_input_embeddings(torch.nn.Embedding.from_pretrained(teacher.get_input_embeddings().weight.clone()))
    for batch in batches[:5]:
        batch.input_ids[batch.input_ids == bad] = 1
    batches[4].input_ids[1, 5] = bad
    teacher.get_input_embeddings().weight.data[bad] = float("nan")
    steps = [batches[0:2], batches[2:5]]
    with pytest.raises(
        TrainingError,
        match=r"step 1: the kl loss of batch 2 is nan; lower lr, or look at that batch; no checkpoint was written so far",
    ):
        train(student, teacher, steps, settings(), objective=KL)


def test_an_activation_that_is_not_finite_stops_with_its_step_batch_and_layer(pair):
    teacher, student, _, batches = pair

    def poison(step):
        student.model.layers[1].input_layernorm.weight.data[3] = float("nan")

    with pytest.raises(
        TrainingError, match=r"step 1, batch 0: input of model.layers.1.self_attn.qkv_proj: .*NaN.*; no checkpoint"
    ):
        train(student, teacher, one_each(batches[:3]), settings(), objective=KL, watcher=Recorder(on_step=poison))


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_a_master(pair, monkeypatch):
    teacher, student, modules, batches = pair
    start = encoding_digest(modules)
    monkeypatch.setattr("qad.distill.nn.utils.clip_grad_norm_", lambda parameters, limit: torch.tensor(float("inf")))
    with pytest.raises(
        TrainingError, match=r"step 0: the gradient's norm is inf at a loss of 0\.\d+; no checkpoint was written"
    ):
        train(student, teacher, one_each(batches[:2]), settings(), objective=KL)
    assert encoding_digest(modules) == start


class Greedy(torch.nn.Module):
    """A layer that asks for 128 TiB."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **options):
        return self.inner(*arguments, **options) + torch.empty(1 << 45).sum()


def test_too_little_memory_says_what_was_asked_for_and_which_keys_lower_it(pair):
    teacher, student, _, batches = pair
    student.model.norm = Greedy(student.model.norm)
    with pytest.raises(TrainingError) as found:
        train(student, teacher, one_each(batches[:1]), settings(), objective=KL)
    message = str(found.value)
    assert message.startswith("step 0: out of memory with batches of up to 4 x 48 tokens (")
    assert "tried to allocate 140737488355328 bytes" in message
    for key in (
        "training.micro_batch_size",
        "seq_len",
        "training.activation_checkpointing = true",
        'training.optimizer = "adafactor"',
    ):
        assert key in message


def test_other_errors_of_torch_are_not_called_a_lack_of_memory(pair):
    teacher, student, _, batches = pair
    student.model.norm = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2|must have the same dtype") as found:
        train(student, teacher, one_each(batches[:1]), settings(), objective=KL)
    assert not isinstance(found.value, TrainingError)


def quantizations(student):
    return {quantizer.group.name: quantizer.quantizations for quantizer in input_quantizers(student)}


@pytest.mark.parametrize("kind", ["quantized", "all"])
def test_activation_checkpointing_changes_no_bit_and_quantizes_inputs_a_second_time(tiny_model, kind):
    runs = []
    for checkpointing in (False, True):
        teacher, student, _, batches = quantized(tiny_model)
        given = settings(train=kind, activation_checkpointing=checkpointing)
        done, masters = train(student, teacher, one_each(batches[:3]), given, objective=KL)
        assert set(quantizations(student).values()) == {6 if checkpointing else 3}
        assert all(quantizer._result is None and quantizer._source is None for quantizer in input_quantizers(student))
        runs.append((losses_of(done), masters.snapshot()))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_validation_is_not_checkpointed(tiny_model):
    teacher, student, _, batches = quantized(tiny_model)
    given = settings(activation_checkpointing=True, validate_every=1)
    train(student, teacher, one_each(batches[:1]), given, objective=KL, held_out=batches[5:7])
    assert set(quantizations(student).values()) == {2 + 2}


def test_checkpointing_needs_a_model_that_names_its_layers(pair):
    teacher, student, _, batches = pair
    student._no_split_modules = None
    with pytest.raises(TrainingError, match="LlamaForCausalLM does not say what its layers are"):
        train(student, teacher, one_each(batches[:1]), settings(activation_checkpointing=True), objective=KL)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_find_the_same_losses_and_quantize_inputs_as_often(tiny_model, checkpointing):
    from torch._dynamo.utils import counters

    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        teacher, student, _, batches = quantized(tiny_model, dtype=torch.float32)
        del student.model.layers[1:], teacher.model.layers[1:]
        given = settings(compile=compiled, activation_checkpointing=checkpointing)
        done, _ = train(student, teacher, one_each(batches[:3]), given, objective=KL)
        assert set(quantizations(student).values()) == {6 if checkpointing else 3}
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
        runs.append(losses_of(done))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
