"""The format: codes, ties, corners, properties. Truth is a slow definition in float64, not the code under test."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qad import nvfp4
from qad.errors import NonFiniteError
from qad.scales import amax_block_scales, tensor_scale_for

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}


def slow_e2m1(x: float) -> float:
    """Nearest magnitude; of two equally near, the one with the even code."""
    distances = [abs(abs(x) - m) for m in MAGNITUDES]
    best = min(range(8), key=lambda code: (distances[code], code % 2))
    return float(np.copysign(MAGNITUDES[best], x))


def quantized(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    encoding = nvfp4.quantize(x, amax_block_scales(x, tensor_scale), tensor_scale)
    return nvfp4.dequantize(encoding, torch.float32)


@pytest.mark.parametrize(("midpoint", "value"), TIES.items())
def test_each_of_the_seven_ties_goes_to_the_even_code(midpoint, value):
    found = nvfp4.decode_e2m1(nvfp4.encode_e2m1(torch.tensor([midpoint, -midpoint])))
    assert found.tolist() == [value, -value]


def test_encoding_agrees_with_the_slow_definition_everywhere():
    x = torch.linspace(-8, 8, 6401)
    found = nvfp4.decode_e2m1(nvfp4.encode_e2m1(x))
    assert found.tolist() == [slow_e2m1(v) for v in x.tolist()]


def test_all_sixteen_codes_decode_to_themselves():
    codes = torch.arange(16, dtype=torch.uint8)
    again = nvfp4.encode_e2m1(nvfp4.decode_e2m1(codes))
    assert again.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]  # -0 is encoded as 0


def test_a_negative_number_that_rounds_to_zero_has_code_8_and_zeros_have_code_0():
    assert nvfp4.encode_e2m1(torch.tensor([-0.1, -0.0, 0.0, 0.1])).tolist() == [8, 0, 0, 0]


def test_packing_puts_the_even_index_in_the_low_nibble():
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert nvfp4.pack(codes).tolist() == [0x21, 0x43]
    assert nvfp4.unpack(nvfp4.pack(codes)).tolist() == codes.tolist()


def test_an_all_zero_block_decodes_to_zeros_with_the_scale_of_modelopt():
    x = torch.zeros(1, 32)
    x[0, 16:] = 1.0
    scales = amax_block_scales(x, tensor_scale_for(1.0, power_of_two=True))
    assert float(scales[0, 0].float()) == 1.0
    assert quantized(x, tensor_scale_for(1.0, power_of_two=True))[0, :16].tolist() == [0.0] * 16


def test_an_underflowing_weight_block_keeps_the_smallest_scale_and_an_activation_block_becomes_zero():
    x = torch.full((1, 16), 1e-9)
    tensor_scale = torch.tensor(1.0)
    assert float(amax_block_scales(x, tensor_scale).float()) == 2.0**-9
    assert nvfp4.fake_quantize(x, tensor_scale).tolist() == [[0.0] * 16]


def test_a_block_above_the_tensor_scale_saturates_at_2688_tensor_scales():
    tensor_scale = torch.tensor(2.0**-10)
    x = torch.full((1, 16), 100.0)
    assert nvfp4.fake_quantize(x, tensor_scale).max() == 2688 * 2.0**-10
    assert quantized(x, tensor_scale).max() == 2688 * 2.0**-10


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_raise_and_name_the_tensor_and_the_place(bad):
    x = torch.zeros(2, 16)
    x[1, 3] = bad
    with pytest.raises(NonFiniteError, match=r"layer\.weight: holds 1 values.*\(1, 3\)"):
        nvfp4.quantize(x, amax_block_scales(torch.ones(2, 16), torch.tensor(1.0)), torch.tensor(1.0), name="layer.weight")
    with pytest.raises(NonFiniteError, match="some input"):
        nvfp4.fake_quantize(x, torch.tensor(1.0), name="some input")


def test_a_width_that_is_no_multiple_of_16_is_refused():
    with pytest.raises(ValueError, match="20, not a multiple of 16"):
        nvfp4.fake_quantize(torch.ones(1, 20), torch.tensor(1.0))


def test_weights_agree_with_a_slow_float64_definition():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((4, 64)) * np.exp(rng.standard_normal((4, 1)) * 3), dtype=torch.float32)
    tensor_scale = tensor_scale_for(float(x.abs().max()), power_of_two=True)
    found = quantized(x, tensor_scale)
    for row, result in zip(x.tolist(), found.tolist(), strict=True):
        for start in range(0, 64, 16):
            block = row[start : start + 16]
            wanted = max(map(abs, block)) / 6 / float(tensor_scale)
            scale = float(torch.tensor(min(max(wanted, 2**-9), 448.0)).to(torch.float8_e4m3fn).float()) * float(tensor_scale)
            assert result[start : start + 16] == [slow_e2m1(v / scale) * scale for v in block]


BLOCKS = hnp.arrays(np.float32, (2, 16), elements=st.floats(-100, 100, width=32, allow_subnormal=False))


@settings(max_examples=150, deadline=None)
@given(BLOCKS)
def test_quantizing_twice_with_the_same_scales_changes_nothing(values):
    x = torch.tensor(values)
    tensor_scale = tensor_scale_for(float(x.abs().max()), power_of_two=True)
    scales = amax_block_scales(x, tensor_scale)
    once = nvfp4.dequantize(nvfp4.quantize(x, scales, tensor_scale), torch.float32)
    assert torch.equal(once, nvfp4.dequantize(nvfp4.quantize(once, scales, tensor_scale), torch.float32))


@settings(max_examples=150, deadline=None)
@given(BLOCKS)
def test_both_quantizers_are_odd_functions(values):
    x = torch.tensor(values)
    tensor_scale = tensor_scale_for(float(x.abs().max()), power_of_two=True)
    assert torch.equal(quantized(-x, tensor_scale), -quantized(x, tensor_scale))
    assert torch.equal(nvfp4.fake_quantize(-x, tensor_scale), -nvfp4.fake_quantize(x, tensor_scale))


@settings(max_examples=150, deadline=None)
@given(BLOCKS)
def test_power_of_two_tensor_scales_make_every_decoded_value_exact_in_bf16(values):
    x = torch.tensor(values)
    tensor_scale = tensor_scale_for(float(x.abs().max()), power_of_two=True)
    encoding = nvfp4.quantize(x, amax_block_scales(x, tensor_scale), tensor_scale)
    assert torch.equal(nvfp4.dequantize(encoding).float(), nvfp4.dequantize(encoding, torch.float32))


@pytest.mark.parametrize(("amax", "scale"), [(2688.0, 1.0), (2689.0, 2.0), (1344.0, 0.5), (1.0, 2.0**-11), (0.0, 1.0)])
def test_tensor_scales_are_rounded_up_to_powers_of_two(amax, scale):
    assert float(tensor_scale_for(amax, power_of_two=True)) == scale


def test_plain_tensor_scales_are_amax_over_2688_and_bad_amax_is_refused():
    assert float(tensor_scale_for(5.0, power_of_two=False)) == float(torch.tensor(5.0) / 2688)
    with pytest.raises(ValueError, match="finite and not negative"):
        tensor_scale_for(float("nan"), power_of_two=True)
