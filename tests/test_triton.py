"""The Triton kernels give the reference's bits: in Triton's interpreter on a CPU, and on a GPU where there is one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kernel_checks
import pytest
import torch

has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="Triton is not installed; it comes with torch for CUDA")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """The outcome of every check in the interpreter, which has to be chosen before Triton is imported."""
    script = Path(kernel_checks.__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parent.parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("check", kernel_checks.CHECKS)
def test_in_the_interpreter(check, interpreted):
    assert not interpreted[check], interpreted[check]


@pytest.mark.gpu
@pytest.mark.skipif(not (has_triton and torch.cuda.is_available()), reason="needs a CUDA GPU and Triton")
@pytest.mark.parametrize("check", kernel_checks.CHECKS)
def test_on_a_gpu(check):
    device = torch.device("cuda")
    assert kernel_checks.kernels.backend(device) == "triton"
    kernel_checks.CHECKS[check](device)


@pytest.mark.gpu
@pytest.mark.skipif(not (has_triton and torch.cuda.is_available()), reason="needs a CUDA GPU and Triton")
@pytest.mark.parametrize("dtype", kernel_checks.DTYPES)
def test_a_launch_that_is_tuned_gives_the_same_bits_and_counts_on_a_gpu(dtype):
    device, scale = torch.device("cuda"), torch.tensor(0.00317)
    x = kernel_checks.corners(4).clamp(-6e4, 6e4).repeat(16, 1).to(dtype)
    kernels, nvfp4 = kernel_checks.kernels, kernel_checks.nvfp4
    master = x.to(device)
    live = master if dtype is torch.bfloat16 else torch.empty(x.shape, dtype=torch.bfloat16, device=device)
    found, saturated = kernels.project(master, scale.to(device), live)
    expected = nvfp4.quantize(x, kernel_checks.amax_block_scales(x, scale), scale)
    kernel_checks.assert_same(found.packed, expected.packed, "codes")
    kernel_checks.assert_same(live, nvfp4.dequantize(expected), "live")
    kernel_checks.assert_same(kernels.dequantize(found, dtype), nvfp4.dequantize(expected, dtype), "decoded")
    kernel_checks.assert_same(kernels.fake_quantize(x.to(device), scale.to(device)), nvfp4.fake_quantize(x, scale), "fake")
    assert saturated == int((nvfp4.blocks(x).float().abs().amax(-1) > 2688 * scale).sum()) > 0


@needs_triton
def test_compiled_for_hopper_without_a_gpu_they_load_wide_and_never_contract_or_approximate():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qad import _triton

    pointers = {"x": "*i16", "out": "*i16", "live": "*i16", "packed": "*u8", "block_scale": "*u8", "counts": "*i32"}
    pointers["tensor_scale"] = "*fp32"
    constants = {"BLOCKS": 256, "GIVEN": False, "LIVE": True}
    for kernel, load, store in (
        (_triton._fake_quantize, "ld.global.v4.b32", "st.global.v4.b32"),
        (_triton._quantize, "ld.global.v4.b32", "st.global.v4.b32"),
        (_triton._dequantize, "ld.global.v2.b32", "st.global.v4.b32"),
    ):
        names = kernel.arg_names
        signature = {name: pointers.get(name, "i32" if name == "n_blocks" else "constexpr") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers}
        given = {(names.index(name),): value for name, value in constants.items() if name in names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        instructions = set(re.findall(r"^\s*(?:@%p\d+ )?([a-z][\w.]+)", compiled.asm["ptx"], re.M))
        assert {load, store} <= instructions
        assert not {name for name in instructions if re.match(r"fma|div\.(?!rn\.f32)|rcp|.*\.ftz|.*approx", name)}
