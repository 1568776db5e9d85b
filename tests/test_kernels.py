"""The fast paths give the reference's bits, and everything runs without numba."""

import itertools
import os
import signal
import subprocess
import sys

import kernel_checks
import pytest
import torch

from qad import kernels
from qad.errors import NonFiniteError


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("check", kernel_checks.CHECKS)
def test_on_a_cpu(check, backend, monkeypatch):
    if backend == "numba":
        assert kernels.backend(torch.device("cpu")) == "numba"
    monkeypatch.setattr(kernels, "backend", lambda device: backend)
    kernel_checks.CHECKS[check](torch.device("cpu"))


@pytest.mark.parametrize("check", kernel_checks.CHECKS)
def test_on_a_cpu_in_slices_of_several_threads(check, monkeypatch):
    monkeypatch.setattr(kernels, "_SMALLEST_SLICE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    kernel_checks.CHECKS[check](torch.device("cpu"))


def test_a_large_tensor_is_worked_on_by_as_many_threads_as_torch_has(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for size, slices in ((2**20, 3), (2**17, 2), (2**10, 1)):
        found = kernels._in_slices(lambda lo, hi: (lo, hi), size)
        assert len(found) == slices and found[0][0] == 0 and found[-1][1] == size
        assert all(before[1] == after[0] and not after[0] % 16 for before, after in itertools.pairwise(found))


def test_a_live_weight_that_is_not_bf16_is_decoded_in_its_own_type():
    master, live = torch.randn(4, 32), torch.empty(32, 4).t()
    encoding, _ = kernels.project(master, torch.tensor(0.003), live)
    assert torch.equal(live, kernels.dequantize(encoding, torch.float32))


def test_checking_once_is_not_nested_and_lets_an_error_from_within_pass():
    with kernels.checking_once(), pytest.raises(RuntimeError, match="already within one"), kernels.checking_once():
        pass
    with pytest.raises(KeyError), kernels.checking_once():
        raise KeyError
    with kernels.checking_once():
        pass


def test_a_width_that_is_no_multiple_of_16_is_refused():
    with pytest.raises(ValueError, match="the last dimension is 40, not a multiple of 16"):
        kernels.quantize(torch.ones(2, 40), torch.tensor(1.0))


def test_an_empty_tensor_has_an_empty_encoding():
    encoding = kernels.quantize(torch.ones(0, 32), torch.tensor(1.0))
    assert encoding.packed.shape == (0, 16) and kernels.dequantize(encoding).shape == (0, 32)


def test_projection_refuses_block_scales_of_another_shape_or_type():
    live = torch.empty(4, 32, dtype=torch.bfloat16)
    for given in (torch.ones(4, 1).to(torch.float8_e4m3fn), torch.ones(4, 2)):
        with pytest.raises(ValueError, match=r"w: block_scale is .*needs torch.float8_e4m3fn of shape \(4, 2\)"):
            kernels.project(torch.ones(4, 32), torch.tensor(1.0), live, block_scale=given, name="w")


def test_the_fast_paths_raise_on_nan_and_name_the_tensor():
    x = torch.zeros(4, 32)
    x[2, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="an input: holds 1"):
        kernels.fake_quantize(x.bfloat16(), torch.tensor(1.0), name="an input")
    with pytest.raises(NonFiniteError, match=r"w: holds 1 values.*\(2, 5\)"):
        kernels.project(x, torch.tensor(1.0), torch.empty(4, 32, dtype=torch.bfloat16), name="w")


def test_the_fast_path_of_a_cpu_keeps_nothing_on_disk(tmp_path):
    code = "import torch; from qad import kernels; kernels.fake_quantize(torch.ones(1, 16).bfloat16(), torch.tensor(1.0))"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not list(tmp_path.iterdir())


def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch
from qad import kernels
torch.set_num_threads(2)
x = torch.ones(512, 512).bfloat16()
kernels.fake_quantize(x, torch.tensor(1.0))
child = os.fork()
if not child:
    kernels.fake_quantize(x, torch.tensor(1.0))
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert started.communicate(timeout=40)[0].strip() == "7"
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)


def test_the_core_runs_without_numba_and_triton_and_names_its_backends():
    code = """
import sys
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("numba", "triton") else find(name, *rest)
sys.modules["numba"] = sys.modules["triton"] = None  # imported by whomever: not installed
import torch
from qad import calibrate, checkpoint, distill, divergence, kernels, losses, modules, nvfp4, recipe, scales
x = torch.randn(8, 64).bfloat16()
assert kernels.backend(x.device) == kernels.backend(torch.device("cuda")) == kernels.backend(torch.device("meta")) == "torch"
assert torch.equal(kernels.fake_quantize(x, torch.tensor(0.01)), nvfp4.fake_quantize(x, torch.tensor(0.01)))
live = torch.empty_like(x)
kernels.project(x, torch.tensor(0.01), live)
extra = {n.split(".")[0] for n, module in sys.modules.items() if module is not None} & {"harness", "lm_eval", "datasets", "scipy", "rich", "pydantic", "typer", "llvmlite", "triton"}
assert not extra, extra
print("ran")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ran", done.stderr
