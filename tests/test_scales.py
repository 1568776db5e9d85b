"""The rules of block scales against a slow search over all E4M3 numbers in float64, and their corners."""

import importlib.util

import numpy as np
import pytest
import torch

from qad import nvfp4, scales
from qad.scales import LARGEST_BLOCK_SCALE, amax_block_scales, block_scales, nearest_e2m1, tensor_scale_for

ALL_CODES = torch.arange(1, 127, dtype=torch.uint8)


def weight(seed: int = 0, *, rows: int = 24, columns: int = 64, dtype=torch.bfloat16, scale: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)


def scale_of(x: torch.Tensor, rule: str = "mse", **options) -> torch.Tensor:
    amax = float(x.abs().max())
    return tensor_scale_for(amax, power_of_two=True, largest=6 * LARGEST_BLOCK_SCALE[rule], **options)


def block_errors(x: torch.Tensor, block_scale: torch.Tensor, tensor_scale: torch.Tensor, importance=None) -> np.ndarray:
    """Squared error of each block in float64, of what the real encoder and decoder give."""
    decoded = nvfp4.dequantize(nvfp4.quantize(x, block_scale, tensor_scale), torch.float32)
    error = (decoded.double() - x.double()).square()
    return nvfp4.blocks(error if importance is None else error * importance.double()).sum(-1).numpy()


def errors_of_all_codes(x: torch.Tensor, tensor_scale: torch.Tensor, importance=None) -> np.ndarray:
    shape = (*x.shape[:-1], x.shape[-1] // 16)
    every = [code.expand(shape).contiguous().view(torch.float8_e4m3fn) for code in ALL_CODES]
    return np.stack([block_errors(x, block_scale, tensor_scale, importance) for block_scale in every])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("multiplier", [1.0, 1.37])
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_finds_the_best_of_all_126_scales(dtype, multiplier, weighted):
    x = weight(dtype=dtype)
    x[0, :16] = 0.001  # a flat block
    x[1, :16] = torch.tensor([1.0] + [0.01] * 15).to(dtype)  # an outlier
    tensor_scale = scale_of(x, multiplier=multiplier)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1)) if weighted else None
    if weighted:
        importance[:3] = 0.0
    found = block_errors(x, block_scales(x, tensor_scale, rule="mse", importance=importance), tensor_scale, importance)
    best = errors_of_all_codes(x, tensor_scale, importance).min(axis=0)
    assert (found <= best * (1 + 1e-5) + 1e-30).all()
    amax = block_errors(x, amax_block_scales(x, tensor_scale), tensor_scale, importance)
    assert found.sum() < 0.95 * amax.sum()


def test_mse_keeps_the_amax_scale_where_nothing_is_better():
    x = torch.zeros(2, 16)
    x[1, :8] = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]) * 448
    x[1, 8:] = -x[1, :8]
    tensor_scale = torch.tensor(1.0)
    assert torch.equal(block_scales(x, tensor_scale, rule="mse").float(), torch.tensor([[1.0], [448.0]]))
    single = torch.zeros(1, 16)
    single[0, 3] = 3.0  # exact under 0.5, and under 0.75, 1, 1.5 and others too
    assert float(block_scales(single, tensor_scale, rule="mse").float()) == 0.5


def test_four_over_six_takes_four_only_where_its_error_is_strictly_smaller():
    x = weight(3)
    tensor_scale = scale_of(x, "four_over_six")
    found = block_scales(x, tensor_scale, rule="four_over_six")
    six = amax_block_scales(x, tensor_scale)
    wanted = nvfp4.blocks(x).abs().amax(-1).float() / (6 * tensor_scale)
    four = (1.5 * wanted).to(torch.float8_e4m3fn)
    is_four = block_errors(x, four, tensor_scale) < block_errors(x, six, tensor_scale)
    assert torch.equal(found.float(), torch.where(torch.from_numpy(is_four), four.float(), six.float()))
    assert 0.2 < is_four.mean() < 0.8
    tie = torch.zeros(1, 16)
    tie[0, 0] = 6.0  # exact with 6 and with 4
    assert float(block_scales(tie, torch.tensor(1.0), rule="four_over_six").float()) == 1.0


@pytest.mark.parametrize("power_of_two", [True, False])
def test_the_tensor_scale_of_four_over_six_leaves_room_for_one_and_a_half_times_the_largest_scale(power_of_two):
    x = weight(4)
    x[0, 0] = 1.0
    tensor_scale = tensor_scale_for(1.0, power_of_two=power_of_two, largest=6 * 256.0)
    assert float(tensor_scale) == (2.0**-10 if power_of_two else pytest.approx(1 / (6 * 256)))
    flat = torch.full((1, 16), 1.0)
    flat[0, 1:] = 0.75  # 3 with 4, between 4 and 6 with 6
    (largest,) = block_scales(flat, tensor_scale, rule="four_over_six").float().flatten().tolist()
    assert largest == float((torch.tensor(1.0) / (4 * tensor_scale)).to(torch.float8_e4m3fn).float()) <= 448


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")
@pytest.mark.parametrize("rule", ["mse", "weighted", "four_over_six"])
@pytest.mark.parametrize("magnitude", [1e-30, 3e-7, 1.0, 1e6])
@pytest.mark.parametrize("stretch", [1.0, 1e-4, 50.0])
def test_the_compiled_search_equals_the_reference_in_every_bit(rule, magnitude, stretch):
    x = weight(5, rows=64, dtype=torch.float32, scale=magnitude).abs()
    x[3] = 0.0
    tensor_scale = scale_of(x) * stretch
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) if rule == "weighted" else None
    name = "mse" if rule == "weighted" else rule
    expected = scales._choose(x, tensor_scale, name, importance)
    assert torch.equal(scales._choose_compiled(x, tensor_scale, name, importance), expected)


def test_rows_are_searched_alone_so_that_chunks_change_nothing(monkeypatch):
    x = weight(6, rows=33)
    whole = block_scales(x, scale_of(x), rule="mse")
    monkeypatch.setattr(scales, "_CHUNK", 100)
    assert torch.equal(block_scales(x, scale_of(x), rule="mse").view(torch.uint8), whole.view(torch.uint8))
    assert block_scales(x[:0], scale_of(x), rule="mse").shape == (0, 4)
    assert block_scales(x.reshape(3, 11, 64), scale_of(x), rule="mse").shape == (3, 11, 4)


def test_fast_rounding_of_magnitudes_is_that_of_the_codes():
    x = torch.cat([torch.linspace(0, 9, 9001), torch.tensor(scales_of_ties())])
    assert torch.equal(nearest_e2m1(x), nvfp4.decode_e2m1(nvfp4.encode_e2m1(x)))


def scales_of_ties() -> list[float]:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=np.float32)
    return np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(9))]).tolist()


def test_a_multiplier_acts_after_the_rounding_of_the_tensor_scale():
    assert float(tensor_scale_for(2688.0, power_of_two=True, multiplier=1.25)) == 1.25
    assert float(tensor_scale_for(2000.0, power_of_two=True, multiplier=1.25)) == 1.25


@pytest.mark.parametrize(
    ("rule", "importance", "message"),
    [
        ("amax", torch.ones(64), 'no effect with the rule "amax"'),
        ("four_over_six", torch.ones(64), 'no effect with the rule "four_over_six"'),
        ("mse", torch.ones(63), r"shape \(63,\), the columns are 64"),
        ("mse", torch.full((64,), -1.0), "finite and not negative"),
        ("mse", torch.full((64,), float("nan")), "finite and not negative"),
    ],
)
def test_an_importance_that_does_not_fit_is_refused(rule, importance, message):
    with pytest.raises(ValueError, match=message):
        block_scales(weight(), torch.tensor(1.0), rule=rule, importance=importance)
