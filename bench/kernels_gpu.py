"""The Triton kernels on a GPU beside the copy bandwidth of the same run, and beside ModelOpt's kernel where it is installed.

    python bench/kernels_gpu.py [--rows 8192] [--columns 8192] [--runs N]

A call moves the bytes that it must read and write; copy is `torch.Tensor.copy_` of the BF16 matrix. Times are of the device
(CUDA events around one call each, in turns, the cache flushed between them); "as called" adds everything that the
caller waits for, the check for NaN included. Equal bits against the reference are asserted before anything is timed.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

TARGET = 0.70
"""Of the copy bandwidth, for fake_quantize of 8192 x 8192 BF16."""


def device_seconds(call: Callable[[], Any], flush: torch.Tensor) -> float:
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def called_seconds(call: Callable[[], Any], flush: torch.Tensor) -> float:
    flush.zero_()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def calls(rows: int, columns: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """By name: a call on the device, without the reading of its flags, and the bytes that it must move."""
    from qad import _triton, nvfp4
    from qad.scales import amax_block_scales

    generator = torch.Generator(device="cuda").manual_seed(0)
    master = torch.randn(rows, columns, device="cuda", generator=generator) * 0.02
    x, tensor_scale = master.bfloat16(), torch.tensor(2.0**-9, device="cuda")
    out, live, counts = torch.empty_like(x), torch.empty_like(x), torch.zeros(2, dtype=torch.int32, device="cuda")
    expected = nvfp4.quantize(master, amax_block_scales(master, tensor_scale), tensor_scale)
    packed, scales = torch.empty_like(expected.packed), torch.empty_like(expected.block_scale)
    n, code_bytes = x.numel(), x.numel() * 9 / 16

    def same(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
        if not torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)):
            raise SystemExit(f"bench/kernels_gpu.py: {name}: the bits differ from the reference; nothing was timed")

    found: dict[str, tuple[Callable[[], Any], float]] = {
        "copy, BF16": (lambda: out.copy_(x), 4 * n),
        "fake_quantize, BF16": (lambda: _triton.launch_fake_quantize(x, out, tensor_scale, counts), 4 * n),
        "project, FP32 to BF16": (
            lambda: _triton.launch_quantize(master, packed, scales, live, tensor_scale, counts, False),
            6 * n + code_bytes,
        ),
        "quantize, FP32": (
            lambda: _triton.launch_quantize(master, packed, scales, None, tensor_scale, counts, False),
            4 * n + code_bytes,
        ),
        "dequantize, BF16": (lambda: _triton.launch_dequantize(packed, scales, out, tensor_scale), 2 * n + code_bytes),
    }
    found["fake_quantize, BF16"][0]()
    same(out, nvfp4.fake_quantize(x, tensor_scale), "fake_quantize")
    found["project, FP32 to BF16"][0]()
    same(live, nvfp4.dequantize(expected), "project")
    packed.zero_()
    scales.view(torch.uint8).zero_()
    found["quantize, FP32"][0]()
    same(packed, expected.packed, "quantize")
    same(scales, expected.block_scale, "block scales")
    found["dequantize, BF16"][0]()
    same(out, nvfp4.dequantize(expected), "dequantize")
    if importlib.util.find_spec("modelopt") is not None:
        from modelopt.torch.kernels.quantization import gemm

        if hasattr(gemm, "fp4_fake_quant_block"):  # from compute capability 8.9
            amax = tensor_scale * 2688.0
            found["ModelOpt's fake_quantize, BF16"] = (lambda: gemm.fp4_fake_quant_block(x, amax), 4 * n)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=8192, help="a multiple of 16")
    parser.add_argument("--runs", type=int, default=50, help="runs of each call (default 50)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/kernels_gpu.py: torch sees no CUDA device; run it on a machine with a GPU and torch for CUDA")
    from qad import kernels

    if kernels.backend(torch.device("cuda")) != "triton":
        raise SystemExit(
            "bench/kernels_gpu.py: Triton is not installed, so there are no kernels to measure: pip install triton"
        )
    measured = calls(arguments.rows, arguments.columns)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in measured}
    for call, _ in measured.values():
        for _ in range(3):
            call()
    for _ in range(arguments.runs):
        for name, (call, _) in measured.items():
            times[name].append(device_seconds(call, flush))
    rates = {name: [n_bytes / t / 1e9 for t in times[name]] for name, (_, n_bytes) in measured.items()}
    copy = statistics.median(rates["copy, BF16"])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.rows} × {arguments.columns}")
    print(f"{arguments.runs} runs in turns; GB/s: median (min to max)\n")
    print("| call | GB/s | share of copy |\n| --- | --- | --- |")
    for name, rate in rates.items():
        median = statistics.median(rate)
        print(f"| {name} | {median:.0f} ({min(rate):.0f} to {max(rate):.0f}) | {median / copy:.2f} |")
    share = statistics.median(rates["fake_quantize, BF16"]) / copy
    print(f"\nfake_quantize: {share:.2f} of the copy bandwidth; the target is {TARGET:.2f} at 8192 × 8192: ", end="")
    print("met" if share >= TARGET else "missed")
    x = torch.randn(arguments.rows, arguments.columns, device="cuda").bfloat16()
    scale = torch.tensor(2.0**-9, device="cuda")
    whole = statistics.median(called_seconds(lambda: kernels.fake_quantize(x, scale), flush) for _ in range(arguments.runs))
    print(f"fake_quantize as called: {4e-9 * x.numel() / whole:.0f} GB/s")


if __name__ == "__main__":
    main()
