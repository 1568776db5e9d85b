"""What has masters, where their gradients come from, and what a projection does to the model."""

import pytest
import torch
from training_checks import CE, KL, batches_for, inputs_of, one_each, quantized, run, settings

from qad import fp8, nvfp4
from qad.batch import Batch
from qad.distill import Pair, train
from qad.errors import TrainingError
from qad.masters import Masters, restore
from qad.modules import encoding_digest
from qad.recipe import Recipe
from qad.scales import amax_block_scales

FP8 = Recipe(fp8=("*.down_proj",))
LEARNED = {
    "amax": Recipe(block_scales="learned"),
    "mse": Recipe(scale_rule="mse", block_scales="learned"),
    "gptq": Recipe(scale_rule="gptq", block_scales="learned"),
    "amax, scale no power of two": Recipe(block_scales="learned", power_of_two=False),
    "with FP8 layers": Recipe(block_scales="learned", fp8=("*.down_proj",)),
    "W4A16": Recipe(block_scales="learned", activations=False),
}


def made(folder, recipe, **options):
    extra = {"batches": inputs_of(batches_for(3, vocabulary=512))} if recipe.scale_rule == "gptq" else {}
    return quantized(folder, recipe, **extra, **options)


def backward(student, teacher, masters, batches, objective=KL, n_tokens=None):
    """Gradients of the sum over `batches` on the masters."""
    n_tokens = n_tokens or sum(batch.n_loss_tokens for batch in batches)
    for batch in batches:
        Pair(student, teacher, objective)(batch, n_tokens)[0].backward()
    masters.collect()


def encoded_by_hand(master, module):
    """What a master encodes to under the rules, in plain torch."""
    if module.format == "fp8":
        return fp8.quantize(master, module.tensor_scale)
    scales = module.frozen_block_scale
    scales = amax_block_scales(master, module.tensor_scale) if scales is None else scales
    return nvfp4.quantize(master, scales, module.tensor_scale)


def require_projected(masters, modules):
    """Every encoding is that of its master, every live weight is decoded from it, other parameters are rounded masters."""
    for name, module in modules.items():
        decode = fp8.dequantize if module.format == "fp8" else nvfp4.dequantize
        assert torch.equal(module.weight, decode(module.encoding))
        master = masters.named.get(f"{name}.weight")
        if master is not None:
            expected = encoded_by_hand(master.detach(), module)
            assert all(torch.equal(a, b) for a, b in zip(module.encoding.tensors(), expected.tensors(), strict=True))


@pytest.mark.parametrize("recipe", [Recipe(), FP8, *LEARNED.values()], ids=["plain", "fp8", *LEARNED])
@pytest.mark.parametrize("kind", ["quantized", "all", "scales"])
def test_every_kind_starts_at_ptq_and_ends_with_a_model_that_is_what_its_masters_encode_to(tiny_model, recipe, kind):
    teacher, student, modules, batches = made(tiny_model, recipe)
    start = encoding_digest(modules)
    inputs = {name: module.input_quantizer for name, module in modules.items()}
    expected = float(Pair(student, teacher, KL)(batches[0], 1)[1].objective) / batches[0].n_loss_tokens
    learned = recipe.block_scales == "learned"
    given = settings(lr=1e-3, train=kind, learned_scales=learned)
    done, masters = train(student, teacher, one_each(batches[:2]), given, objective=KL)
    assert done.steps[0].loss == expected
    assert encoding_digest(modules) != start
    assert all(master.dtype is torch.float32 for master in masters.named.values())
    require_projected(masters, modules)
    assert all(module.input_quantizer is inputs[name] for name, module in modules.items())
    assert set(done.trainable) == set(masters.named)
    has_weights, has_scales = f"{next(iter(modules))}.weight" in masters.named, any("block_scale" in n for n in masters.named)
    assert (has_weights, has_scales) == (kind != "scales", learned or kind == "scales")


def test_training_all_moves_norms_and_the_tied_embedding_and_live_values_are_rounded_masters(tiny_model):
    teacher, student, modules, batches = quantized(tiny_model, FP8)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    _, masters = train(student, teacher, one_each(batches[:3]), settings(lr=1e-2, train="all"), objective=KL)
    assert set(masters.named) == set(before)
    for name, live in student.named_parameters():
        assert live.dtype is torch.bfloat16
        assert not torch.equal(live, before[name]), name
        if name.removesuffix(".weight") not in modules:
            assert torch.equal(live, masters.named[name].to(torch.bfloat16))
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_a_tied_head_gets_the_gradient_of_both_its_uses_and_biases_and_norms_theirs(tiny_model):
    teacher, student, _, batches = quantized(tiny_model, Recipe(activations=False), dtype=torch.float32)
    masters = Masters(student, train="all")
    batch = batches[0]
    backward(student, teacher, masters, [batch], CE)
    found = {name: master.grad.clone() for name, master in masters.named.items()}
    masters.close()
    student.requires_grad_(True)
    logits = student(**batch.inputs).logits[:, :-1][batch.loss_mask[:, 1:]]
    torch.nn.functional.cross_entropy(logits, batch.input_ids[:, 1:][batch.loss_mask[:, 1:]]).backward()
    for name, parameter in student.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name
    unread = torch.ones(512, dtype=torch.bool)
    unread[batch.input_ids] = False
    assert bool(unread.any()) and bool(found["model.embed_tokens.weight"][unread].abs().sum() > 0)  # the part of the head


def test_gradients_of_micro_batches_add_up_in_fp32_and_are_never_kept_on_the_live_weights(tiny_model):
    teacher, student, _, batches = quantized(tiny_model)
    masters = Masters(student, train="all")
    alone = []
    for batch in batches[:3]:
        backward(student, teacher, masters, [batch], n_tokens=500)
        alone.append({name: master.grad for name, master in masters.named.items()})
        for master in masters.named.values():
            master.grad = None
    backward(student, teacher, masters, batches[:3], n_tokens=500)
    for name, master in masters.named.items():
        assert master.grad.dtype is torch.float32
        assert torch.equal(master.grad, alone[0][name] + alone[1][name] + alone[2][name]), name
    in_bfloat16 = sum(gradient[name].bfloat16() for gradient in alone for name in ["model.norm.weight"])
    assert not torch.equal(masters.named["model.norm.weight"].grad, in_bfloat16.float())
    assert all(parameter.grad is None for parameter in student.parameters())


def scale_loss(weight_gradient, master, scale):
    """The inner product of a weight's gradient with the decoded weight, as a function of scales, rounding passed straight through.

    master: (rows, blocks, 16) or codes' values where they stay; scale: (rows, blocks, 1). float64 with autograd.
    """
    ratio = (master / scale).clamp(-6, 6)
    rounded = nvfp4.decode_e2m1(nvfp4.encode_e2m1(ratio.detach().float())).double()
    code = ratio + (rounded - ratio).detach()
    return (weight_gradient * code * scale).sum()


@pytest.mark.parametrize("name", ["amax", "mse", "gptq"])
def test_the_gradient_of_a_learned_scale_is_autograds_with_round_to_nearest_passed_straight_through(tiny_model, name):
    teacher, student, modules, batches = made(tiny_model, LEARNED[name], dtype=torch.float32)
    masters = Masters(student, learned_scales=True)
    with torch.no_grad():  # some weights beyond the range of their blocks
        for layer in modules:
            masters.named[f"{layer}.weight"][:, ::7] *= 1.5
    masters.project()
    backward(student, teacher, masters, batches[:2])
    n_beyond = 0
    for layer, module in modules.items():
        weight, scale = masters.named[f"{layer}.weight"], masters.named[f"{layer}.block_scale"]
        s = (module.encoding.block_scale.double() * module.tensor_scale.double()).unsqueeze(-1).requires_grad_(True)
        master = nvfp4.blocks(weight.detach()).double()
        n_beyond += int((master.abs() > 6 * s.detach()).sum())
        scale_loss(nvfp4.blocks(weight.grad).double(), master, s).backward()
        expected = s.grad.squeeze(-1)
        assert scale.grad.dtype is torch.float32 and not scale.grad.requires_grad
        assert float((scale.grad.double() - expected).norm() / expected.norm()) < 1e-5, layer
    assert n_beyond > 100


def test_the_weights_gradient_is_the_same_whether_scales_are_learned_beside_it_or_not(tiny_model):
    teacher, student, _, batches = made(tiny_model, LEARNED["amax"])
    masters = Masters(student, learned_scales=True)
    backward(student, teacher, masters, batches[:2])
    teacher, other, _, _ = made(tiny_model, LEARNED["amax"])
    plain = Masters(other)
    backward(other, teacher, plain, batches[:2])
    for name in plain.named:
        assert torch.equal(masters.named[name].grad, plain.named[name].grad)


def test_training_scales_alone_moves_block_scales_but_no_code_and_no_other_parameter(tiny_model):
    for recipe in (Recipe(), Recipe(scale_rule="mse", block_scales="learned"), FP8):
        teacher, student, modules, batches = quantized(tiny_model, recipe)
        before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
        codes = {name: module.encoding.tensors()[0].clone() for name, module in modules.items()}
        given = settings(lr=1e-3, train="scales", learned_scales=True)
        done, masters = train(student, teacher, one_each(batches[:3]), given, objective=KL)
        assert done.codes_changed == 0.0 < done.block_scales_changed < 1.0
        assert all(torch.equal(module.encoding.tensors()[0], codes[name]) for name, module in modules.items())
        nvfp4_layers = {name for name, module in modules.items() if module.format == "nvfp4"}
        assert set(masters.named) == {f"{name}.block_scale" for name in nvfp4_layers}
        changed = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed == {f"{name}.weight" for name in nvfp4_layers}


def test_with_fixed_codes_the_gradient_of_a_scale_equals_finite_differences_of_the_loss(tiny_model):
    _, student, modules, batches = quantized(tiny_model, Recipe(activations=False), dtype=torch.float64)
    masters = Masters(student, train="scales")
    batch = Batch(batches[0].input_ids[:2, :16], batches[0].attention_mask[:2, :16], batches[0].loss_mask[:2, :16])

    def loss():
        logits, labels = student(**batch.inputs).logits[:, :-1], batch.input_ids[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    loss().backward()
    masters.collect()
    for layer in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        module, gradient = modules[layer], masters.named[f"{layer}.block_scale"].grad
        scale = module.encoding.block_scale.double() * module.tensor_scale.double()
        codes = nvfp4.blocks(nvfp4.decode_e2m1(nvfp4.unpack(module.encoding.packed))).double()
        generator = torch.Generator().manual_seed(1)
        for share in (
            1.0,
            0.5,
            0.1,
        ):  # of the blocks, each moved the way that raises the loss: a large slope, in models with FP32 parts
            chosen = torch.rand(scale.shape, generator=generator) < share
            direction = scale * gradient.sign() * chosen
            found = []
            for step in (3e-3, -3e-3):
                with torch.no_grad():
                    module.weight.copy_((codes * (scale + step * direction).unsqueeze(-1)).flatten(-2))
                    found.append(float(loss()))
            slope = (found[0] - found[1]) / 6e-3
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.01)
        with torch.no_grad():
            module.weight.copy_((codes * scale.unsqueeze(-1)).flatten(-2))


@pytest.mark.parametrize("kind", ["quantized", "scales"])
def test_learned_scales_are_never_zero_and_never_beyond_e4m3_however_far_their_masters_go(tiny_model, kind):
    _, student, modules, _ = made(tiny_model, LEARNED["amax"])
    masters = Masters(student, train=kind, learned_scales=True)
    layer, module = next(iter(modules.items()))
    scale = masters.named[f"{layer}.block_scale"]
    with torch.no_grad():
        scale[0, 0], scale[1, 0], scale[2, 0], scale[3, 0] = -1.0, 0.0, 1e6, 1e-30
    masters.project()
    assert module.encoding.block_scale.float()[:4, 0].tolist() == [2.0**-9, 2.0**-9, 448.0, 2.0**-9]
    assert bool(torch.isfinite(module.weight).all())
    assert torch.equal(module.weight, nvfp4.dequantize(module.encoding))


def test_a_large_rate_keeps_learned_scales_within_their_format(tiny_model):
    teacher, student, modules, batches = made(tiny_model, LEARNED["amax"])
    given = settings(lr=0.5, train="quantized", learned_scales=True)
    train(student, teacher, one_each(batches[:2]), given, objective=KL)
    for module in modules.values():
        scales = module.encoding.block_scale.float()
        assert bool(((scales >= 2.0**-9) & (scales <= 448)).all())


def test_a_snapshot_gives_a_fresh_model_every_value_of_the_trained_one(tiny_model):
    for kind, recipe in (
        ("quantized", FP8),
        ("all", Recipe()),
        ("scales", LEARNED["mse"]),
        ("all", LEARNED["with FP8 layers"]),
    ):
        learned = recipe.block_scales == "learned"
        teacher, student, modules, batches = quantized(tiny_model, recipe)
        _, masters = train(student, teacher, one_each(batches[:2]), settings(train=kind, learned_scales=learned), objective=KL)
        _, fresh, fresh_modules, _ = quantized(tiny_model, recipe)
        restore(fresh_modules, fresh, masters.snapshot())
        assert encoding_digest(fresh_modules) == encoding_digest(modules)
        for (name, a), (_, b) in zip(student.named_parameters(), fresh.named_parameters(), strict=True):
            assert torch.equal(a, b), name


def test_shares_of_what_changed_count_codes_one_by_one_and_scales_block_by_block(tiny_model):
    _, student, modules, _ = quantized(tiny_model, FP8)
    masters = Masters(student)
    start = {name: value.clone() for name, value in masters.encodings().items()}
    n_codes = sum(module.weight.numel() for module in modules.values())
    n_blocks = sum(module.weight.numel() // 16 for module in modules.values() if module.format == "nvfp4")
    module = next(iter(modules.values()))
    module.encoding.packed[0, 0] ^= 0x01
    module.encoding.packed[0, 1] ^= 0x11
    module.encoding.block_scale.view(torch.uint8)[0, 3] ^= 1
    modules["model.layers.0.mlp.down_proj"].encoding.codes.view(torch.uint8)[4, 4] ^= 0x80
    assert masters.changed_since(start) == pytest.approx((4 / n_codes, 1 / n_blocks))


def test_a_master_that_outgrows_its_tensor_scale_is_counted_by_block_and_its_layer_is_named(tiny_model):
    _, student, modules, _ = quantized(tiny_model, FP8)
    masters = Masters(student)
    n_blocks = sum(m.weight.numel() // (16 if m.format == "nvfp4" else 1) for m in modules.values())
    found = masters.project()
    assert (found.saturated, found.n_blocks) == (0, n_blocks)
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        masters.named[f"{name}.weight"][:3, 0:20] = 2689 * modules[name].tensor_scale
        masters.named["model.layers.0.mlp.down_proj.weight"][0, 0] = 449 * modules["model.layers.0.mlp.down_proj"].tensor_scale
    found = masters.project()
    assert (found.saturated, found.worst) == (3 * 2 + 1, name)


@pytest.mark.parametrize("recipe", [Recipe(), FP8, Recipe(block_scales="frozen")], ids=["plain", "fp8", "frozen"])
def test_weights_that_outgrow_their_scales_end_the_run_above_the_limit_only(tiny_model, recipe):
    given = settings(lr=0.3, schedule="constant", max_saturated=0.001)
    with pytest.raises(
        TrainingError,
        match=r"step \d: [\d,]+ of [\d,]+ blocks of weights lie beyond their tensor scale.* most of them in model\.layers\.\d\.\w+\.\w+; "
        r"allowed is a share of 0.001 \(training.max_saturated\): lower lr, or raise it; no checkpoint was written",
    ):
        run(tiny_model, 3, given, recipe=recipe)
    done, _, _ = run(tiny_model, 2, settings(lr=0.3, schedule="constant", max_saturated=1.0), recipe=recipe)
    assert done.steps[-1].saturated_weight_blocks > 0
    done, _, _ = run(tiny_model, 2, settings(lr=1e-4, max_saturated=0.0), recipe=recipe)
    assert done.steps[-1].saturated_weight_blocks == 0


def test_nothing_to_train_and_a_lost_original_are_refused(tiny_model):
    student = quantized(tiny_model, keep_originals=False)[1]
    with pytest.raises(ValueError, match="q_proj: its weight before quantization is gone; train only what quantize_model made"):
        Masters(student)
    with pytest.raises(TrainingError, match='train = "quantized": the model has nothing of that kind'):
        Masters(torch.nn.Linear(4, 4))


def test_training_scales_of_fp8_layers_alone_is_refused(tiny_model):
    _, student, modules, _ = quantized(tiny_model, FP8)
    for name, module in list(modules.items()):
        if module.format == "nvfp4":
            student.set_submodule(name, torch.nn.Linear(module.in_features, module.out_features, bias=False))
    with pytest.raises(TrainingError, match='train = "scales": .* no NVFP4 layer is left to train'):
        Masters(student, train="scales")
