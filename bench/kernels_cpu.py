"""The CPU kernels beside plain torch, in turns in one run: median, min and max of n runs each, and the ratio of the medians.

    python bench/kernels_cpu.py [--runs N]

Equal bits are asserted before anything is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qad import kernels, nvfp4
from qad.scales import amax_block_scales

SHAPES = ((4096, 576), (4096, 1536), (8192, 8192))
"""SmolLM2's two widths over 4,096 tokens, and a large matrix."""
TENSOR_SCALE = torch.tensor(2.0**-9)


def plain_quantize(x: Tensor) -> nvfp4.Packed:
    return nvfp4.quantize(x, amax_block_scales(x, TENSOR_SCALE), TENSOR_SCALE)


def plain_project(x: Tensor, live: Tensor) -> nvfp4.Packed:
    encoding = plain_quantize(x)
    live.copy_(nvfp4.dequantize(encoding))
    return encoding


def pairs(shape: tuple[int, int]) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """By name: a call in plain torch and the same call of the fast path, each returning a tensor to compare."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    activation, live, encoding = x.bfloat16(), torch.empty(shape, dtype=torch.bfloat16), plain_quantize(x)
    return {
        "fake_quantize, BF16": (
            lambda: nvfp4.fake_quantize(activation, TENSOR_SCALE),
            lambda: kernels.fake_quantize(activation, TENSOR_SCALE),
        ),
        "project, FP32 to BF16": (
            lambda: plain_project(x, live).packed,
            lambda: kernels.project(x, TENSOR_SCALE, live)[0].packed,
        ),
        "quantize, FP32": (lambda: plain_quantize(x).packed, lambda: kernels.quantize(x, TENSOR_SCALE).packed),
        "dequantize, BF16": (lambda: nvfp4.dequantize(encoding), lambda: kernels.dequantize(encoding)),
    }


def seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="runs of each call (default 9)")
    runs = parser.parse_args().runs
    if kernels.backend(torch.device("cpu")) != "numba":
        raise SystemExit("bench/kernels_cpu.py: numba is not installed, so there is no fast path to measure: pip install numba")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {runs} runs in turns; ms: median (min to max)\n")
    print("| call | shape | plain torch | numba | ratio | numba, G elements/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        for name, (plain, fast) in pairs(shape).items():
            if not torch.equal(plain().view(torch.uint8), fast().view(torch.uint8)):
                raise SystemExit(f"bench/kernels_cpu.py: {name} of {shape}: the bits differ; nothing was timed")
            times = [(seconds(plain), seconds(fast)) for _ in range(runs)]
            columns = [[1e3 * t for t in column] for column in zip(*times, strict=True)]
            medians = [statistics.median(column) for column in columns]
            cells = [f"{m:.1f} ({min(c):.1f} to {max(c):.1f})" for m, c in zip(medians, columns, strict=True)]
            rate = shape[0] * shape[1] / medians[1] / 1e6
            print(f"| {name} | {shape[0]} × {shape[1]} | {' | '.join(cells)} | {medians[0] / medians[1]:.1f} | {rate:.2f} |")


if __name__ == "__main__":
    main()
