"""Properties of the format that hold for every input, on the reference and on the fast paths."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qad import kernels, nvfp4
from qad.errors import NonFiniteError
from qad.scales import amax_block_scales

GRID = torch.tensor(nvfp4.E2M1_VALUES, dtype=torch.float64)
EXAMPLES = settings(derandomize=True, max_examples=100, deadline=None)

ELEMENTS = st.floats(-8192, 8192, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 0.25, 1.75, -5.0, 6.0, 1e-6])
TENSORS = hnp.arrays(np.float32, (2, 32), elements=ELEMENTS).map(torch.tensor)
TENSOR_SCALES = st.floats(-24, 4).map(lambda exponent: torch.tensor(2.0**exponent, dtype=torch.float32))
"""Arbitrary ones, under which blocks of TENSORS saturate, fit, or underflow."""
CODES = hnp.arrays(np.uint8, (2, 32), elements=st.sampled_from([*range(8), *range(9, 16)])).map(torch.tensor)
BLOCK_SCALES = hnp.arrays(np.uint8, (2, 2), elements=st.integers(1, 126)).map(
    lambda x: torch.tensor(x).view(torch.float8_e4m3fn)
)


def encoded(x: Tensor, tensor_scale: Tensor) -> nvfp4.Packed:
    return nvfp4.quantize(x, amax_block_scales(x, tensor_scale), tensor_scale)


def projected(x: Tensor, tensor_scale: Tensor) -> nvfp4.Packed:
    return kernels.project(x, tensor_scale, torch.empty(x.shape, dtype=torch.bfloat16))[0]


@EXAMPLES
@given(CODES, BLOCK_SCALES, TENSOR_SCALES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_encoding_what_was_decoded_gives_the_codes_back(codes, block_scale, tensor_scale, dtype):
    grid = nvfp4.Packed(nvfp4.pack(codes), block_scale, tensor_scale)
    again = nvfp4.quantize(nvfp4.dequantize(grid, dtype), block_scale, tensor_scale)
    assert torch.equal(again.packed, grid.packed)


@EXAMPLES
@given(TENSORS, TENSOR_SCALES)
def test_in_a_block_a_larger_number_never_becomes_a_smaller_one(x, tensor_scale):
    ordered = nvfp4.blocks(x).sort(dim=-1).values.reshape(x.shape)
    weights = nvfp4.dequantize(encoded(ordered, tensor_scale), torch.float32)
    for found in (weights, nvfp4.fake_quantize(ordered, tensor_scale), kernels.fake_quantize(ordered.bfloat16(), tensor_scale)):
        assert (nvfp4.blocks(found.float()).diff(dim=-1) >= 0).all()


@EXAMPLES
@given(TENSORS, TENSOR_SCALES)
def test_a_weight_moves_by_half_a_gap_of_the_grid_at_most_unless_it_saturates(x, tensor_scale):
    encoding = encoded(x, tensor_scale)
    scale = (encoding.block_scale.double() * tensor_scale.double()).unsqueeze(-1)
    magnitude = nvfp4.blocks(x).double().abs() / scale
    found = nvfp4.blocks(nvfp4.decode_e2m1(nvfp4.unpack(encoding.packed))).double().abs()
    above = torch.searchsorted(GRID, magnitude.clamp(max=6.0)).clamp(min=1)
    half_gap = (GRID[above] - GRID[above - 1]) / 2
    rounding = 2.0**-22 * magnitude
    saturated = magnitude > 6
    assert (found[saturated] == 6).all()
    assert ((found - magnitude).abs() <= half_gap + rounding)[~saturated].all()


@EXAMPLES
@given(TENSORS, TENSOR_SCALES)
def test_the_codes_of_negated_weights_differ_in_the_sign_bit_alone_and_zeros_keep_theirs(x, tensor_scale):
    for encode in (encoded, projected):
        ours, negated = encode(x, tensor_scale), encode(-x, tensor_scale)
        assert torch.equal(ours.block_scale.view(torch.uint8), negated.block_scale.view(torch.uint8))
        flipped = torch.where(x == 0, 0, 8).to(torch.uint8)
        assert torch.equal(nvfp4.unpack(ours.packed) ^ flipped, nvfp4.unpack(negated.packed))


@EXAMPLES
@given(TENSORS, TENSOR_SCALES, st.integers(-60, 60))
def test_a_power_of_two_in_the_tensor_and_its_scale_changes_no_code_and_no_block_scale(x, tensor_scale, exponent):
    factor = 2.0**exponent
    magnitudes = torch.stack([x, x * factor])[:, x != 0].abs()
    assume(bool((magnitudes >= 2.0**-120).all()))  # below the normal numbers FP32 itself is not scaled exactly
    for encode in (encoded, projected):
        ours, scaled = encode(x, tensor_scale), encode(x * factor, tensor_scale * factor)
        assert torch.equal(ours.packed, scaled.packed)
        assert torch.equal(ours.block_scale.view(torch.uint8), scaled.block_scale.view(torch.uint8))
    for dtype in (torch.float32, torch.bfloat16):
        activation = x.to(dtype)
        for function in (nvfp4.fake_quantize, kernels.fake_quantize):
            wanted = function(activation, tensor_scale) * factor
            assert torch.equal(function(activation * factor, tensor_scale * factor), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EXAMPLES
@given(st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.integers(0, 1), st.integers(0, 31))
def test_nan_and_infinity_anywhere_raise_with_the_name_and_the_place(dtype, bad, row, column):
    x = torch.ones(2, 32, dtype=dtype)
    x[row, column] = bad
    one, live = torch.tensor(1.0), torch.empty(2, 32, dtype=torch.bfloat16)
    scales = torch.ones(2, 2).to(torch.float8_e4m3fn)
    message = rf"blocks\.3\.weight: holds 1 values that are NaN or infinite, the first at index \({row}, {column}\)"
    for quantize in (
        lambda: nvfp4.quantize(x, scales, one, name="blocks.3.weight"),
        lambda: kernels.project(x, one, live, name="blocks.3.weight"),
        lambda: nvfp4.fake_quantize(x, one, name="blocks.3.weight"),
        lambda: kernels.fake_quantize(x, one, name="blocks.3.weight"),
    ):
        with pytest.raises(NonFiniteError, match=message):
            quantize()
