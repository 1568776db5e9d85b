"""What every fast path promises, each a function of a device: `test_kernels.py` holds numba to it, `test_triton.py` Triton.

As a script (TRITON_INTERPRET=1) it runs all of them on CPU tensors in Triton's interpreter and prints a JSON object:
the name of each check and its traceback, empty where it holds.
"""

import json
import traceback

import pytest
import torch

from qad import kernels, nvfp4
from qad.errors import NonFiniteError
from qad.scales import amax_block_scales

TENSOR_SCALES = (2.0**-9, 1.0, 0.00317, 3e-5, 2.0**-126)
MAGNITUDES = (1e-6, 1e-3, 1.0, 30.0, 1e4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def corners(seed: int = 0) -> torch.Tensor:
    """Rows of five magnitudes, with zero blocks, tiny ones, outliers, the seven ties, signed zeros and subnormals."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for magnitude in MAGNITUDES:
        x = torch.randn(64, 256, generator=generator) * magnitude * torch.exp(2 * torch.randn(64, 1, generator=generator))
        x[0] = 0
        x[1, :16] = 1e-30
        x[2, 0] = 3e4
        x[3, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
        x[4, ::2] = -0.0
        x[5, ::16] = -1e-45
        x[6, ::2] = 0
        x[6, 1:16:2] = -(2.0**-131)  # its reciprocal scale overflows under the smallest tensor scale
        x[7, :16] = 7.125 - 2.0**-21  # amax / 6 lies below a tie of E4M3, amax * fp32(1/6) on it
        parts.append(x)
    return torch.cat(parts)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    wrong = bits(found) != bits(expected)
    assert found.dtype == expected.dtype and not bool(wrong.any()), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ"


def fake_quantize_has_the_bits_of_the_reference(device: torch.device) -> None:
    for dtype in DTYPES:
        x = corners().clamp(-6e4, 6e4).to(dtype)
        for tensor_scale in map(torch.tensor, TENSOR_SCALES):
            found = kernels.fake_quantize(x.to(device), tensor_scale.to(device))
            assert_same(found, nvfp4.fake_quantize(x, tensor_scale), f"{dtype}, {tensor_scale}")


def every_positive_bf16_number_can_be_the_largest_of_its_block(device: torch.device) -> None:
    x = torch.zeros(0x7F7F, 16, dtype=torch.bfloat16)
    x[:, 3] = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x[:, 5] = x[:, 3] * -0.4
    for tensor_scale in map(torch.tensor, (2.0**-3, 0.1)):
        found = kernels.fake_quantize(x.to(device), tensor_scale.to(device))
        assert_same(found, nvfp4.fake_quantize(x, tensor_scale), f"fake_quantize, {tensor_scale}")
        packed = kernels.quantize(x.to(device), tensor_scale.to(device))
        expected = nvfp4.quantize(x, amax_block_scales(x, tensor_scale), tensor_scale)
        assert_same(packed.packed, expected.packed, f"quantize, {tensor_scale}")
        assert_same(packed.block_scale, expected.block_scale, f"block scales, {tensor_scale}")


def codes_block_scales_and_live_weights_have_the_bits_of_the_reference(device: torch.device) -> None:
    for dtype in DTYPES:
        x = corners(1).clamp(-6e4, 6e4).to(dtype)
        for tensor_scale in map(torch.tensor, TENSOR_SCALES):
            live = torch.empty(x.shape, dtype=torch.bfloat16, device=device)
            found, saturated = kernels.project(x.to(device), tensor_scale.to(device), live)
            expected = nvfp4.quantize(x, amax_block_scales(x, tensor_scale), tensor_scale)
            what = f"{dtype}, {tensor_scale}"
            assert_same(found.packed, expected.packed, what)
            assert_same(found.block_scale, expected.block_scale, what)
            assert_same(live, nvfp4.dequantize(expected), what)
            assert saturated == int((nvfp4.blocks(x).float().abs().amax(-1) > 2688 * tensor_scale).sum()), what


def block_scales_that_are_given_are_kept(device: torch.device) -> None:
    x = corners(2)
    for tensor_scale in map(torch.tensor, TENSOR_SCALES):
        given = amax_block_scales(x.roll(1, 0) * 0.7, tensor_scale)
        live = torch.empty(x.shape, dtype=torch.bfloat16, device=device)
        found, _ = kernels.project(x.to(device), tensor_scale.to(device), live, block_scale=given.to(device))
        expected = nvfp4.quantize(x, given, tensor_scale)
        assert_same(found.packed, expected.packed, f"codes, {tensor_scale}")
        assert_same(found.block_scale, given, f"block scales, {tensor_scale}")
        assert_same(live, nvfp4.dequantize(expected), f"live, {tensor_scale}")


def every_code_under_every_block_scale_is_decoded_with_the_bits_of_the_reference(device: torch.device) -> None:
    scale_bits = torch.arange(256).remainder(128).clamp(max=126) + 128 * (torch.arange(256) >= 128)
    block_scale = scale_bits.to(torch.uint8).view(torch.float8_e4m3fn).repeat_interleave(32).view(-1, 1)
    packed = torch.arange(256, dtype=torch.uint8).view(32, 8).repeat(256, 1)
    for tensor_scale in map(torch.tensor, TENSOR_SCALES):
        encoding = nvfp4.Packed(packed.to(device), block_scale.to(device), tensor_scale.to(device))
        expected = nvfp4.Packed(packed, block_scale, tensor_scale)
        for dtype in DTYPES:
            assert_same(kernels.dequantize(encoding, dtype), nvfp4.dequantize(expected, dtype), f"{dtype}, {tensor_scale}")


def a_size_that_fills_no_tile_leaves_its_surroundings_alone(device: torch.device) -> None:
    around = torch.full((3, 48), 7.0, dtype=torch.bfloat16, device=device)
    master = torch.randn(1, 48, generator=torch.Generator().manual_seed(3)).to(device)
    kernels.project(master, torch.tensor(0.001, device=device), around[1:2])
    assert bool((around[::2] == 7).all()) and not bool((around[1] == 7).any())


def a_weight_can_be_projected_onto_itself(device: torch.device) -> None:
    x, tensor_scale = corners(3).bfloat16(), torch.tensor(0.00317)
    live = x.to(device, copy=True)
    found, saturated = kernels.project(live, tensor_scale.to(device), live)
    expected = nvfp4.quantize(x, amax_block_scales(x, tensor_scale), tensor_scale)
    assert_same(found.packed, expected.packed, "codes")
    assert_same(live, nvfp4.dequantize(expected), "live")
    assert saturated == int((nvfp4.blocks(x).float().abs().amax(-1) > 2688 * tensor_scale).sum()) > 0


def nan_and_infinity_raise_and_name_the_tensor(device: torch.device) -> None:
    scale = torch.tensor(1.0, device=device)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.zeros(4, 32, device=device)
        x[2, 5] = value
        for dtype in DTYPES:
            for call in (kernels.fake_quantize, kernels.quantize):
                with pytest.raises(NonFiniteError, match=r"^here: holds 1 values .* index \(2, 5\)"):
                    call(x.to(dtype), scale, name="here")


def checked_once_nan_still_raises_and_names_the_first_tensor(device: torch.device) -> None:
    scale, good = torch.tensor(1.0, device=device), torch.zeros(4, 32, device=device)
    bad = good.clone()
    bad[2, 5] = float("nan")
    seen = []
    with pytest.raises(NonFiniteError, match=r"^second: (1 of its blocks held|holds 1 values)"), kernels.checking_once():
        for name, x in (("first", good), ("second", bad), ("third", bad)):
            kernels.fake_quantize(x, scale, name=name)
            seen.append(name)
    assert seen == (["first", "second", "third"] if kernels.backend(device) == "triton" else ["first"])
    with pytest.raises(NonFiniteError, match="^alone: holds 1 values"):
        kernels.fake_quantize(bad, scale, name="alone")
    with kernels.checking_once():
        kernels.fake_quantize(good, scale)


def block_scales_that_are_not_positive_are_refused(device: torch.device) -> None:
    for value in (0.0, -1.0, float("nan")):
        given = torch.ones(4, 2)
        given[1, 1] = value
        given = given.to(torch.float8_e4m3fn).to(device)
        with pytest.raises(ValueError, match=rf"^w: block_scale holds 1 values .* index \(1, 1\): {value}; a zero block takes"):
            kernels.quantize(torch.ones(4, 32, device=device), torch.tensor(1.0, device=device), block_scale=given, name="w")


CHECKS = {
    check.__name__: check
    for check in (
        fake_quantize_has_the_bits_of_the_reference,
        every_positive_bf16_number_can_be_the_largest_of_its_block,
        codes_block_scales_and_live_weights_have_the_bits_of_the_reference,
        block_scales_that_are_given_are_kept,
        every_code_under_every_block_scale_is_decoded_with_the_bits_of_the_reference,
        a_size_that_fills_no_tile_leaves_its_surroundings_alone,
        a_weight_can_be_projected_onto_itself,
        nan_and_infinity_raise_and_name_the_tensor,
        checked_once_nan_still_raises_and_names_the_first_tensor,
        block_scales_that_are_not_positive_are_refused,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    kernels.backend = lambda device: "triton"
    outcomes = {}
    for name, check in CHECKS.items():
        try:
            check(torch.device("cpu"))
            outcomes[name] = ""
        except (Exception, pytest.fail.Exception):
            outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))
