"""The quantized linear layer: one quantization a group, straight-through gradients, exact live weights."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qad import nvfp4
from qad.errors import CalibrationError, NonFiniteError
from qad.modules import encoding_digest, input_quantizers
from qad.quantize import quantize_model
from qad.recipe import Recipe

AMAX = {"qkv_proj": 4.0, "o_proj": 4.0}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(32, 32, bias=False, dtype=torch.bfloat16))

    def forward(self, x):
        return self.o_proj(self.q_proj(x) + self.k_proj(x) * self.v_proj(x))


def quantized(recipe: Recipe | None = None) -> Attention:
    torch.manual_seed(0)
    model = Attention()
    quantize_model(model, recipe or Recipe(exclude=()), AMAX)
    return model


def x_like_activations(seed: int = 1, **options) -> torch.Tensor:
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_(**options)


def test_the_input_of_a_fused_group_is_quantized_once_and_released():
    model = quantized()
    with torch.no_grad():
        model(x_like_activations(requires_grad=False))
        model(x_like_activations(2, requires_grad=False))
    for quantizer in input_quantizers(model):
        assert quantizer.quantizations == 2
        assert quantizer._result is None


def test_under_activation_checkpointing_it_is_once_a_forward_and_once_a_recomputation():
    model = quantized()
    checkpoint(model, x_like_activations(), use_reentrant=False).sum().backward()
    assert [quantizer.quantizations for quantizer in input_quantizers(model)] == [2, 2]


def test_another_input_or_a_changed_one_is_never_given_the_old_result():
    model = quantized()
    quantizer = model.q_proj.input_quantizer
    x, y = (x_like_activations(seed, requires_grad=False) for seed in (1, 2))
    with torch.no_grad():
        model.q_proj(x)
        assert torch.equal(quantizer(y), nvfp4.fake_quantize(y, quantizer.tensor_scale))
        first = quantizer(x)
        x.mul_(2)
        assert not torch.equal(quantizer(x), first)


def test_inference_tensors_are_quantized_each_time():
    model = quantized()
    with torch.inference_mode():
        x = x_like_activations(requires_grad=False) * 1
        model.q_proj(x)
        x.mul_(2)
        expected = nvfp4.fake_quantize(x, model.q_proj.input_quantizer.tensor_scale)
        assert torch.equal(model.k_proj.input_quantizer(x), expected)


def test_the_gradient_passes_the_quantizations_straight_through():
    model = quantized()
    x = x_like_activations()
    model.o_proj.weight.requires_grad_(True)
    model.o_proj(x).float().square().sum().backward()
    xq = nvfp4.fake_quantize(x.detach(), model.o_proj.input_quantizer.tensor_scale).requires_grad_(True)
    weight = model.o_proj.weight.detach().clone().requires_grad_(True)
    nn.functional.linear(xq, weight).float().square().sum().backward()
    assert torch.equal(x.grad, xq.grad)
    assert torch.equal(model.o_proj.weight.grad, weight.grad)


def test_live_weights_decode_their_encoding_and_a_group_shares_its_scale():
    model = quantized()
    scales = {float(getattr(model, name).tensor_scale) for name in ("q_proj", "k_proj", "v_proj")}
    assert len(scales) == 1
    for name in ("q_proj", "o_proj"):
        module = getattr(model, name)
        assert torch.equal(module.weight, nvfp4.dequantize(module.encoding))


def test_w4a16_leaves_inputs_alone():
    model = quantized(Recipe(activations=False, exclude=()))
    assert input_quantizers(model) == []
    x = x_like_activations(requires_grad=False)
    assert torch.equal(model.q_proj(x), nn.functional.linear(x, model.q_proj.weight))


def test_the_digest_tells_a_single_changed_code():
    model = quantized()
    modules = {name: getattr(model, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    before = encoding_digest(modules)
    model.o_proj.encoding.packed[0, 0] ^= 1
    assert encoding_digest(modules) != before


def test_a_group_that_was_never_calibrated_and_a_nan_weight_are_errors_with_a_name():
    with pytest.raises(CalibrationError, match="o_proj: activations are quantized but calibration has no record"):
        quantize_model(Attention(), Recipe(exclude=()), {"qkv_proj": 1.0})
    with pytest.raises(CalibrationError, match="o_proj.*an amax of 0"):
        quantize_model(Attention(), Recipe(exclude=()), {"qkv_proj": 1.0, "o_proj": 0.0})
    model = Attention()
    model.k_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"k_proj\.weight.*\(3, 4\)"):
        quantize_model(model, Recipe(exclude=()), AMAX)
