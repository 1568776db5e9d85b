"""The Triton kernels behind `qad.kernels`; imported only when a tensor is on CUDA and Triton is there.

One pass over memory each: a program takes a tile of whole blocks, [BLOCKS, 16]. Every operation is IEEE FP32 in the order of
`qad.nvfp4`: divisions are `div_rn`, multiplications are never fused with additions (`enable_fp_fusion=False`), and BF16,
E4M3 and E2M1 are rounded by integer arithmetic or by adding a magic number, so that Triton's interpreter, whose casts to BF16
and E4M3 do not round to nearest even, computes the same bits as a GPU. BF16 crosses the border as int16, E4M3 as uint8; FP16
and FP32 as themselves (a cast from FP32 to FP16 rounds to nearest even in both).

Each kernel that quantizes adds to `counts`: blocks that hold NaN or infinity (or were given a block scale that is not a positive number),
and blocks that saturate. Large tensors are launched as measured best at first use; numbers do not depend on it.
"""

# mypy: ignore-errors
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from qad.nvfp4 import BLOCK_SIZE

_LARGE = 1 << 20
"""Elements from which a launch is worth tuning."""
_SMALL_LAUNCH = {"BLOCKS": 64, "num_warps": 4}
_INTERPRETED_LAUNCH = {"BLOCKS": 4096, "num_warps": 4}
_LAUNCHES = [(64, 2), (64, 4), (128, 4), (256, 4), (256, 8), (512, 8), (1024, 8)]
"""(BLOCKS, num_warps): 4 to 64 elements a thread."""


@triton.jit
def _widen(x):
    """FP32 of FP32, FP16 or BF16 bits, exactly."""
    if x.dtype == tl.int16:
        value = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def _narrow(value, dtype: tl.constexpr):
    """FP32 rounded to FP32, FP16 or BF16 bits, ties to even."""
    if dtype == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        rounded = value.to(dtype)
    return rounded


@triton.jit
def _round_e4m3(value):
    """The E4M3 code (int32) nearest to `value` in [0, 448], ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    multiple = (value + 24576.0) - 24576.0  # of 2^-9: 24576 is 1.5 * 2^23 of them
    return tl.where(value < 0.015625, (multiple * 512.0).to(tl.int32), normal)


@triton.jit
def _decode_e4m3(code):
    """FP32 of positive E4M3 codes 0..126 (int32)."""
    normal = ((code + 960) << 20).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def _round_e2m1(magnitude):
    """The E2M1 value nearest to `magnitude` in [0, 6], ties to the even code.

    Adding and subtracting 1.5 * 2^23 steps rounds to a multiple of the step: 0.5 below 2, 1 below 4, then 2.
    """
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    magic = (exponent + 0x0B400000).to(tl.float32, bitcast=True)
    return (magnitude + magic) - magic


@triton.jit
def _code_of(rounded):
    """The E2M1 code 0..7 (int32) of one of its eight magnitudes: the FP32 exponent and first mantissa bit, counted from 1."""
    from_one = (rounded.to(tl.int32, bitcast=True) >> 22) - 252
    return tl.where(rounded < 1.0, (rounded * 2.0).to(tl.int32), from_one)


@triton.jit
def _with_sign(value, negative):
    """`value` >= 0, with its sign bit set where it is to be `negative`, zero too (Triton 3.6 negates by subtracting from 0)."""
    sign = tl.where(negative, -0x80000000, 0)
    return (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _amax(x):
    """The largest magnitude of each row, and whether the row is finite. NaN lies above infinity in bits."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    return largest.to(tl.float32, bitcast=True), largest < 0x7F800000


@triton.jit
def _count(counts, where, which: tl.constexpr):
    """Add the rows of `where` to one of the counters; free where there are none."""
    tl.atomic_add(counts + which + tl.zeros_like(where.to(tl.int32)), 1, mask=where, sem="relaxed")


@triton.jit
def _fake_quantize(x, out, tensor_scale, counts, n_blocks, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    row = tl.arange(0, BLOCKS)
    inside = row < n_blocks - first
    at = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    values = _widen(tl.load(x + first * 16 + at, mask=inside[:, None], other=0))

    inv_tensor_scale = tl.div_rn(1.0, tl.load(tensor_scale))
    amax, finite = _amax(values)
    _count(counts, inside & (finite == 0), 0)
    wanted = inv_tensor_scale * (amax * 0.16666667163372040)  # FP32 of 1/6
    block_scale = _decode_e4m3(_round_e4m3(tl.where(wanted < 448.0, wanted, 448.0)))
    combined = block_scale * tl.div_rn(1.0, inv_tensor_scale)
    inv_scale = tl.where(combined == 0.0, 0.0, tl.div_rn(1.0, combined))
    decode = tl.div_rn(block_scale, inv_tensor_scale)

    scaled = values * inv_scale[:, None]
    magnitude = tl.abs(scaled)
    magnitude = tl.where(magnitude > 0.0, magnitude, 0.0)  # a reciprocal can overflow: 0 * infinity, which becomes 0 here
    rounded = _round_e2m1(tl.minimum(magnitude, 6.0))
    result = _with_sign(rounded * decode[:, None], scaled < 0.0)
    tl.store(out + first * 16 + at, _narrow(result, out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _quantize(
    x,
    packed,
    block_scale,
    live,
    tensor_scale,
    counts,
    n_blocks,
    GIVEN: tl.constexpr,
    LIVE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    row = tl.arange(0, BLOCKS)
    inside = row < n_blocks - first
    at = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    values = _widen(tl.load(x + first * 16 + at, mask=inside[:, None], other=0))

    scale = tl.load(tensor_scale)
    amax, finite = _amax(values)
    if GIVEN:
        code = tl.load(block_scale + first + row, mask=inside, other=1).to(tl.int32)
        positive = (code > 0) & (code < 127)
        _count(counts, inside & ((finite & positive) == 0), 0)
        code = tl.where(positive, code, 1)
    else:
        _count(counts, inside & (finite == 0), 0)
        wanted = tl.div_rn(amax, scale * 6.0)
        wanted = tl.where(wanted == 0.0, 1.0, wanted)
        wanted = tl.where(wanted > 0.001953125, wanted, 0.001953125)
        code = _round_e4m3(tl.where(wanted < 448.0, wanted, 448.0))
        tl.store(block_scale + first + row, code.to(tl.uint8), mask=inside)
    _count(counts, inside & finite & (amax > scale * 2688.0), 1)

    combined = (_decode_e4m3(code) * scale)[:, None]
    scaled = tl.div_rn(values, combined)
    rounded = _round_e2m1(tl.minimum(tl.abs(scaled), 6.0))
    codes = _code_of(rounded) | tl.where(scaled < 0.0, 8, 0)
    low, high = tl.split(tl.reshape(codes, (BLOCKS, 8, 2)))
    pair_at = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(packed + first * 8 + pair_at, (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
    if LIVE:
        result = _with_sign(rounded * combined, scaled < 0.0)
        tl.store(live + first * 16 + at, _narrow(result, live.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dequantize(packed, block_scale, out, tensor_scale, n_blocks, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    row = tl.arange(0, BLOCKS)
    inside = row < n_blocks - first
    pair_at = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    pairs = tl.load(packed + first * 8 + pair_at, mask=inside[:, None], other=0).to(tl.int32)
    codes = tl.reshape(tl.join(pairs & 15, pairs >> 4), (BLOCKS, 16))
    magnitude = codes & 7
    from_one = ((magnitude + 252) << 22).to(tl.float32, bitcast=True)
    values = _with_sign(tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, from_one), codes > 7)

    code = tl.load(block_scale + first + row, mask=inside, other=0).to(tl.int32)
    scale = tl.where((code & 127) == 127, float("nan"), _decode_e4m3(code & 127))
    scale = _with_sign(scale, code > 127) * tl.load(tensor_scale)
    at = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    result = _narrow(values * scale[:, None], out.dtype.element_ty)
    tl.store(out + first * 16 + at, result, mask=inside[:, None])


def fake_quantize(x, tensor_scale):
    """`nvfp4.fake_quantize` of a contiguous tensor: the result and `counts`, on the device; waits for nothing."""
    out, counts = torch.empty_like(x), _counts(x)
    launch_fake_quantize(x, out, tensor_scale, counts)
    return out, counts


def quantize(x, packed, block_scale, live, tensor_scale, given):
    """`nvfp4.quantize` into `packed`, with the block scales that are `given`, or else written by the amax rule.

    All contiguous; `live` (BF16) receives the decoded values unless it is None. Returns (bad, saturated) block counts.
    """
    counts = _counts(x)
    if live is not None and live.data_ptr() == x.data_ptr():
        x = x.clone()  # tuning runs the kernel more than once
    launch_quantize(x, packed, block_scale, live, tensor_scale, counts, given)
    bad, saturated = counts.tolist()
    return bad, saturated


def dequantize(packed, block_scale, tensor_scale, dtype):
    """`nvfp4.dequantize` of contiguous tensors."""
    out = torch.empty(*packed.shape[:-1], packed.shape[-1] * 2, dtype=dtype, device=packed.device)
    launch_dequantize(packed, block_scale, out, tensor_scale)
    return out


def launch_fake_quantize(x, out, tensor_scale, counts):
    """Start `fake_quantize` into `out`; adds to `counts` (2,) int32 and waits for nothing."""
    _launch(_fake_quantize, x.numel(), _crossing(x), _crossing(out), tensor_scale.to(x.device), counts)


def launch_quantize(x, packed, block_scale, live, tensor_scale, counts, given):
    """Start `quantize`; adds to `counts` (2,) int32 and waits for nothing."""
    target = x if live is None else live.detach()
    tensors = [_crossing(each) for each in (x, packed, block_scale, target)]
    _launch(_quantize, x.numel(), *tensors, tensor_scale.to(x.device), counts, GIVEN=given, LIVE=live is not None)


def launch_dequantize(packed, block_scale, out, tensor_scale):
    """Start `dequantize` into `out`."""
    _launch(_dequantize, out.numel(), packed, _crossing(block_scale), _crossing(out), tensor_scale.to(packed.device))


def _crossing(x):
    return x.view({torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}.get(x.dtype, x.dtype))


def _counts(x):
    return torch.zeros(2, dtype=torch.int32, device=x.device)


def _launch(kernel, size, *arguments, **constants):
    n_blocks = size // BLOCK_SIZE
    is_compiled = isinstance(kernel, triton.runtime.JITFunction)
    launch = _SMALL_LAUNCH if is_compiled else _INTERPRETED_LAUNCH
    if is_compiled and size >= _LARGE:
        kernel, launch = _tuned(kernel), {}
    with torch.cuda.device_of(arguments[0]):
        kernel[lambda meta: (triton.cdiv(n_blocks, meta["BLOCKS"]),)](
            *arguments, n_blocks, **constants, **launch, enable_fp_fusion=False
        )


@cache
def _tuned(kernel):
    """`kernel` with the launch that is measured best, once for each combination of types in a process."""
    counters = ["counts"] if "counts" in kernel.arg_names else None
    configurations = [triton.Config({"BLOCKS": blocks}, num_warps=warps) for blocks, warps in _LAUNCHES]
    keys = [name for name in ("GIVEN", "LIVE") if name in kernel.arg_names]
    return triton.autotune(configurations, key=keys, reset_to_zero=counters)(kernel)
