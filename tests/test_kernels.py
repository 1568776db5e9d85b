"""The fast paths give the reference's bits, and everything runs without numba."""

import subprocess
import sys

import pytest
import torch

from qad import kernels, nvfp4
from qad.errors import NonFiniteError
from qad.scales import amax_block_scales

TENSOR_SCALES = [2.0**-9, 1.0, 0.00317, 3e-5]


def spread_out(seed: int, magnitude: float) -> torch.Tensor:
    """Rows of very different sizes with a zero block, a tiny one, an outlier, ties and signed zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 256, generator=generator) * magnitude * torch.exp(2 * torch.randn(300, 1, generator=generator))
    x[0] = 0
    x[1, :16] = 1e-30
    x[2, 0] = 3e4
    x[3, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x[4, ::2] = -0.0
    return x


@pytest.mark.parametrize("tensor_scale", TENSOR_SCALES)
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 30.0, 1e4])
def test_fake_quantize_equals_the_reference_in_every_bit(magnitude, tensor_scale):
    x, scale = spread_out(0, magnitude).bfloat16(), torch.tensor(tensor_scale)
    assert kernels.backend(x.device) == "numba"
    expected, found = nvfp4.fake_quantize(x, scale), kernels.fake_quantize(x, scale)
    assert torch.equal(expected.view(torch.int16), found.view(torch.int16))


@pytest.mark.parametrize("tensor_scale", TENSOR_SCALES)
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 30.0, 1e4])
def test_projection_equals_the_reference_in_codes_scales_and_live_weight(magnitude, tensor_scale):
    master, scale = spread_out(1, magnitude), torch.tensor(tensor_scale)
    live = torch.empty(master.shape, dtype=torch.bfloat16)
    found, saturated = kernels.project(master, scale, live)
    expected = nvfp4.quantize(master, amax_block_scales(master, scale), scale)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.block_scale.view(torch.uint8), expected.block_scale.view(torch.uint8))
    assert torch.equal(live.view(torch.int16), nvfp4.dequantize(expected).view(torch.int16))
    assert saturated == int((nvfp4.blocks(master).abs().amax(-1) > 2688 * scale).sum())


def test_every_positive_bf16_number_as_the_largest_of_its_block():
    bits = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16)
    x = torch.zeros(len(bits), 16, dtype=torch.bfloat16)
    x[:, 0] = bits.view(torch.bfloat16)
    x[:, 1] = x[:, 0] * 0.4
    for tensor_scale in (torch.tensor(2.0**-3), torch.tensor(0.1)):
        expected, found = nvfp4.fake_quantize(x, tensor_scale), kernels.fake_quantize(x, tensor_scale)
        assert torch.equal(expected.view(torch.int16), found.view(torch.int16))


def test_the_fast_paths_raise_on_nan_and_name_the_tensor():
    x = torch.zeros(4, 32)
    x[2, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="an input: holds 1"):
        kernels.fake_quantize(x.bfloat16(), torch.tensor(1.0), name="an input")
    with pytest.raises(NonFiniteError, match=r"w: holds 1 values.*\(2, 5\)"):
        kernels.project(x, torch.tensor(1.0), torch.empty(4, 32, dtype=torch.bfloat16), name="w")


def test_the_core_runs_without_numba_and_names_its_backend():
    code = """
import sys
sys.modules["numba"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
import torch
from qad import calibrate, checkpoint, distill, divergence, kernels, losses, modules, nvfp4, recipe, scales
x = torch.randn(8, 64).bfloat16()
assert kernels.backend(x.device) == "torch"
assert torch.equal(kernels.fake_quantize(x, torch.tensor(0.01)), nvfp4.fake_quantize(x, torch.tensor(0.01)))
live = torch.empty_like(x)
kernels.project(x, torch.tensor(0.01), live)
extra = {n.split(".")[0] for n in sys.modules} & {"harness", "lm_eval", "datasets", "scipy", "rich", "pydantic", "typer", "llvmlite"}
assert not extra, extra
print("ran")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ran", done.stderr
