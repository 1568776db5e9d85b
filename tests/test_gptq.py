"""GPTQ against its slow definition, rounding cells, and training that starts from every rule's checkpoint bit for bit."""

import pytest
import torch
from training_checks import KL, batches_for, one_each, settings

from qad import gptq, nvfp4
from qad.calibrate import calibrate, second_moments
from qad.cells import nearest_in_cell
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.distill import train
from qad.errors import CalibrationError, CheckpointError, NonFiniteError, RecipeError
from qad.gptq import gptq_codes
from qad.masters import Masters
from qad.modules import encoding_digest, quantized_linears
from qad.nvfp4 import Packed, decode_e2m1, encode_e2m1, pack
from qad.packed import read_encodings
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from qad.scales import amax_block_scales, tensor_scale_for

FROZEN = {
    "amax": Recipe(block_scales="frozen"),
    "mse": Recipe(scale_rule="mse", block_scales="frozen"),
    "gptq weighted": Recipe(scale_rule="gptq", scale_weighting="second_moment", block_scales="frozen"),
    "mse weighted": Recipe(scale_rule="mse", scale_weighting="second_moment", block_scales="frozen"),
    "four_over_six": Recipe(scale_rule="four_over_six", block_scales="frozen"),
    "gptq": Recipe(scale_rule="gptq", block_scales="frozen"),
    "gptq, odd scale": Recipe(scale_rule="gptq", block_scales="frozen", scale_multiplier=1.37),
    "gptq, W4A16": Recipe(scale_rule="gptq", block_scales="frozen", activations=False),
}


def layer(*, rows: int = 24, width: int = 160, tokens: int = 400, seed: int = 0):
    """A weight, the scales of its elements, and inputs whose columns are correlated."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * 0.05
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(tokens, width, generator=generator) @ (torch.eye(width) + 2 * mixing)
    tensor_scale = tensor_scale_for(float(weight.abs().max()), power_of_two=True)
    return weight, amax_block_scales(weight, tensor_scale).float() * tensor_scale, inputs


def slow_gptq(weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """One column after another: rounded, its error moved by the inverse Hessian of the columns that remain, in float64."""
    w = weight.double().clone()
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(h[i:, i:])
        s = scale[:, i // 16]
        codes[:, i] = encode_e2m1((w[:, i] / s).float())
        error = (w[:, i] - decode_e2m1(codes[:, i]) * s) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
    return codes


def output_error(codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, inputs: torch.Tensor) -> float:
    decoded = decode_e2m1(codes) * scale.repeat_interleave(16, dim=1)
    return float(((inputs @ (decoded - weight).T) ** 2).sum())


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_gptq_equals_its_slow_definition_across_its_blocks_of_columns(monkeypatch, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(gptq.kernels, "backend", lambda device: backend)
    weight, scale, inputs = layer()
    found = gptq_codes(weight, scale, inputs.T @ inputs)
    expected = slow_gptq(weight, scale, inputs.T @ inputs, gptq.DAMPING)
    # a column that lands within FP32 of a midpoint may go the other way, and then what follows it in the row
    assert (found != expected).any(dim=1).sum() <= 1


def test_gptq_lowers_the_error_of_the_output_on_text_it_has_not_seen():
    weight, scale, inputs = layer(tokens=2000)
    seen, unseen = inputs[:1000], inputs[1000:]
    nearest = encode_e2m1(weight / scale.repeat_interleave(16, dim=1))
    found = gptq_codes(weight, scale, seen.T @ seen)
    assert output_error(found, weight, scale, unseen) < 0.7 * output_error(nearest, weight, scale, unseen)


def test_with_uncorrelated_inputs_and_in_dead_columns_gptq_rounds_to_the_nearest():
    weight, scale, inputs = layer()
    nearest = encode_e2m1(weight / scale.repeat_interleave(16, dim=1))
    assert torch.equal(gptq_codes(weight, scale, torch.eye(160)), nearest)
    inputs[:, [3, 77, 159]] = 0.0
    found = gptq_codes(weight, scale, inputs.T @ inputs)
    assert torch.equal(found[:, [3, 77, 159]], nearest[:, [3, 77, 159]])
    assert not torch.equal(found, nearest)
    assert torch.equal(gptq_codes(weight, scale, torch.zeros(160, 160)), nearest)


def test_a_hessian_with_nan_is_named():
    weight, scale, inputs = layer()
    inputs[5, 7] = float("nan")
    with pytest.raises(NonFiniteError, match="the Hessian of some layer holds NaN"):
        gptq_codes(weight, scale, inputs.T @ inputs, name="some layer")


@pytest.mark.parametrize("tensor_scale", [2.0**-10, 0.0007, 3.1e-5])
def test_the_nearest_number_of_a_cell_encodes_to_its_code_and_is_the_number_itself_where_it_can_be(tensor_scale):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(tensor_scale)
    x = torch.randn(64, 64, generator=generator) * 4 * tensor_scale * 100
    x[0, :8] = 0.0
    block_scale = (torch.rand(64, 4, generator=generator) * 200 + 0.01).to(torch.float8_e4m3fn)
    codes = torch.randint(0, 16, x.shape, generator=generator).to(torch.uint8)
    encoding = Packed(pack(codes), block_scale, scale)
    found = nearest_in_cell(x, encoding)
    assert torch.equal(nvfp4.quantize(found, block_scale, scale).packed, encoding.packed)
    own = nvfp4.quantize(x, block_scale, scale)
    assert torch.equal(nearest_in_cell(x, own), x)
    # a step of FP32 or four towards x and the code is another one: found lies at the border
    step = (x - found).sign() * found.abs().clamp(min=1e-7 * tensor_scale) * 2e-6
    outside = nvfp4.quantize(found + step, block_scale, scale)
    moved = (found != x) & (codes != 8)
    assert bool((nvfp4.unpack(outside.packed) != codes)[moved].all())


def test_ties_belong_to_the_even_code_and_the_outermost_cells_have_no_outer_border():
    scale, one = torch.tensor(1.0), torch.ones(1, 1).to(torch.float8_e4m3fn)
    codes = torch.tensor([[2, 1, 7, 7, 15, 0, 8, 10, 5, 6, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    x = torch.tensor([[0.1, 2.0, 99.0, 0.0, -99.0, -3.0, 3.0, 5.0, 9.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0]])
    found = nearest_in_cell(x, Packed(pack(codes), one, scale))[0].tolist()
    assert found[0] == 0.75 and found[2] == 99.0 and found[4] == -99.0 and found[9] == 3.5 and found[10] == pytest.approx(0.2)
    assert 0.7499 < found[1] < 0.75 and 5.0 < found[3] < 5.0001 and 3.4999 < found[8] < 3.5
    assert found[5] == 0.0 and -1e-7 < found[6] < 0.0 and found[7] == -0.75


def test_a_scale_too_small_for_cells_in_fp32_is_refused_with_a_name():
    one = torch.full((1, 1), 2.0**-9).to(torch.float8_e4m3fn)
    codes = torch.full((1, 16), 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="some weight: 16 values cannot be moved"):
        nearest_in_cell(torch.zeros(1, 16), Packed(pack(codes), one, torch.tensor(2.0**-140)), name="some weight")


def quantized(folder, recipe: Recipe, **options):
    """The model in `folder` quantized by `recipe`, its teacher, modules, batches, and what they were quantized with."""
    teacher, student = load_checkpoint(folder).model, load_checkpoint(folder).model
    batches = batches_for(3, vocabulary=teacher.config.vocab_size)
    inputs = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches]
    amax = calibrate(teacher, recipe, inputs) if recipe.activations else None
    if not options:
        moments = second_moments(teacher, recipe, inputs) if recipe.scale_weighting != "none" else None
        options = {"second_moments": moments, "batches": inputs if recipe.scale_rule == "gptq" else None}
    return teacher, student, quantize_model(student, recipe, amax, **options), batches


@pytest.mark.parametrize("recipe", FROZEN.values(), ids=FROZEN)
def test_frozen_training_starts_at_the_checkpoint_keeps_its_block_scales_and_changes_codes(tiny_model, recipe):
    teacher, student, modules, batches = quantized(tiny_model, recipe)
    start = encoding_digest(modules)
    scales = {name: module.encoding.block_scale.view(torch.uint8).clone() for name, module in modules.items()}
    originals = {f"{name}.weight": module.original.float() for name, module in modules.items()}
    masters = Masters(student)
    masters.project()
    assert encoding_digest(modules) == start
    inside = [torch.equal(master, originals[name]) for name, master in masters.named.items()]
    assert all(inside) == (recipe.scale_rule != "gptq")  # the other rules round to the nearest: the master is the weight
    teacher, student, modules, batches = quantized(tiny_model, recipe)
    assert encoding_digest(modules) == start
    done, _ = train(student, teacher, one_each(batches), settings(), objective=KL)
    assert done.block_scales_changed == 0.0 < done.codes_changed < 1.0
    for name, module in modules.items():
        assert torch.equal(module.encoding.block_scale.view(torch.uint8), scales[name])
        assert torch.equal(module.weight, nvfp4.dequantize(module.encoding))


def test_amax_that_recomputes_its_block_scales_changes_them(tiny_model):
    teacher, student, _, batches = quantized(tiny_model, Recipe())
    done, _ = train(student, teacher, one_each(batches), settings(), objective=KL)
    assert done.block_scales_changed > 0


@pytest.mark.parametrize("name", ["mse weighted", "gptq", "four_over_six"])
def test_a_model_that_starts_from_a_checkpoint_has_its_digest_without_choosing_again(tiny_model, tmp_path, name):
    recipe = FROZEN[name]
    _, student, modules, _ = quantized(tiny_model, recipe)
    write_checkpoint(tmp_path / "ptq", student, targets=match(student, recipe), companions=tiny_model, record={})
    _, again, started, _ = quantized(tiny_model, recipe, start=read_encodings(tmp_path / "ptq"))
    assert encoding_digest(started) == encoding_digest(modules)
    Masters(again).project()
    assert encoding_digest(started) == encoding_digest(modules)
    with pytest.raises(CheckpointError, match=r"q_proj: the checkpoint to start from has no codes of it"):
        quantized(tiny_model, recipe, start={})


def test_hessians_stay_within_their_memory_in_the_models_order_and_later_ones_see_earlier_codes(tiny_model, monkeypatch):
    recipe = FROZEN["gptq"]
    portions, original = [], gptq._hessians

    def spy(model, groups, modules, batches):
        found = original(model, groups, modules, batches)
        portions.append({name: hessian.clone() for name, hessian in found.items()})
        return found

    monkeypatch.setattr(gptq, "_hessians", spy)
    runs = {}
    for limit in (1, 100_000, 1 << 30):
        _, student, modules, batches = quantized(tiny_model, Recipe())
        inputs = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches]
        portions.clear()
        groups = match(load_checkpoint(tiny_model).model, recipe).groups
        gptq.refine(student, groups, modules, inputs, hessian_bytes=limit)
        assert [name for portion in portions for name in portion] == [group.name for group in groups]
        assert all(len(p) == 1 or sum(h.numel() * 4 for h in p.values()) <= limit for p in portions)
        runs[limit] = (
            len(portions),
            {name: h for portion in portions for name, h in portion.items()},
            encoding_digest(modules),
        )
    assert [runs[limit][0] for limit in runs] == [8, 3, 1]
    alone, together = runs[1][1], runs[1 << 30][1]
    assert {name for name in alone if torch.equal(alone[name], together[name])} == {"model.layers.0.self_attn.qkv_proj"}
    assert runs[1][2] != runs[1 << 30][2]


def test_more_passes_over_the_batches_than_are_allowed_are_refused_before_the_first(tiny_model, monkeypatch):
    _, student, modules, _ = quantized(tiny_model, Recipe())
    groups = match(load_checkpoint(tiny_model).model, FROZEN["gptq"]).groups
    before = encoding_digest(modules)
    monkeypatch.setattr(gptq, "MOST_PASSES", 7)
    monkeypatch.setattr(gptq, "_hessians", lambda *given: pytest.fail("a pass was begun"))
    with pytest.raises(
        CalibrationError, match=r"would take 8 passes .*at most 7 are allowed: choose another scale_rule .*exclude"
    ):
        gptq.refine(student, groups, modules, [], hessian_bytes=1)
    assert encoding_digest(modules) == before


def test_too_many_passes_are_refused_before_a_layer_is_quantized(tiny_model, monkeypatch):
    model = load_checkpoint(tiny_model).model
    monkeypatch.setattr(gptq, "MOST_PASSES", 0)
    with pytest.raises(CalibrationError, match=r"would take 1 passes .*at most 0 are allowed"):
        quantize_model(model, FROZEN["gptq"], {}, batches=[])
    assert not quantized_linears(model)


@pytest.mark.parametrize("activations", [True, False])
def test_a_hessian_is_the_sum_over_what_serving_multiplies_by_without_padding(tiny_model, activations):
    recipe = Recipe(scale_rule="gptq", block_scales="frozen", activations=activations)
    _, student, modules, batches = quantized(tiny_model, recipe)
    name = "model.layers.1.mlp.down_proj"
    (group,) = [g for g in match(load_checkpoint(tiny_model).model, recipe).groups if g.name == name]
    inputs = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches]
    seen = []
    handle = modules[name].register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        for given in inputs:
            student.base_model(**given, use_cache=False)
    handle.remove()
    expected = torch.zeros(128, 128)
    for x, batch in zip(seen, batches, strict=True):
        if activations:
            x = nvfp4.fake_quantize(x, modules[name].input_quantizer.tensor_scale)
        rows = x[batch.attention_mask.bool()].float()
        expected += rows.T @ rows
    found = gptq._hessians(student, [group], modules, inputs)[name]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))
    quarter = gptq._hessians(student, [group], modules, inputs[:1])[name]
    assert not torch.allclose(quarter, expected, rtol=0.1)


def test_skipping_the_first_token_leaves_it_out_of_amax_and_of_second_moments(tiny_model):
    model = load_checkpoint(tiny_model).model
    (batch,) = batches_for(1, vocabulary=model.config.vocab_size)
    inputs = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}]
    seen = {}
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, x: seen.update(x=x[0]))
    with torch.no_grad():
        model.base_model(**inputs[0])
    handle.remove()
    name = "model.layers.0.self_attn.qkv_proj"
    for skip in (False, True):
        mask = batch.attention_mask.bool().clone()
        mask[:, 0] &= not skip
        x = seen["x"][mask].float()
        assert calibrate(model, Recipe(), inputs, skip_first_token=skip)[name] == float(x.abs().max())
        found = second_moments(model, Recipe(), inputs, skip_first_token=skip)[name]
        assert torch.allclose(found, x.square().mean(0), rtol=1e-5)
    assert bool(batch.attention_mask[:, 0].all())


def test_what_a_rule_needs_and_has_not_is_an_error_that_names_it(tiny_model):
    with pytest.raises(CalibrationError, match=r'scale_weighting = "second_moment" needs the second moment of its inputs'):
        quantized(tiny_model, FROZEN["mse weighted"], batches=None)
    with pytest.raises(CalibrationError, match='"gptq" rounds by what calibration batches do'):
        quantized(tiny_model, FROZEN["gptq"], batches=None)
    with pytest.raises(CalibrationError, match="no calibration batch reached"):
        quantized(tiny_model, FROZEN["gptq"], batches=[])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_rule": "mse"}, 'scale_rule "mse" takes block_scales = "frozen"'),
        ({"scale_rule": "mean", "block_scales": "frozen"}, "scale_rule 'mean': allowed: amax, mse, four_over_six, gptq"),
        ({"scale_weighting": "second_moment"}, 'no effect with scale_rule "amax"'),
        ({"scale_multiplier": 0.5}, "must be 1 or more, found 0.5"),
        ({"scale_multiplier": float("nan")}, "must be 1 or more, found nan"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**settings)
