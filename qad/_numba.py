"""The numba kernels behind `qad.kernels`; imported only when numba is there.

Every operation is IEEE FP32 in the order of `qad.nvfp4` (no fast-math, so no contraction); float types that numba lacks
are bit patterns: BF16 as uint16, E4M3 as uint8.

Each process compiles what it calls (half a second to one and a half a kernel) and keeps nothing on disk. Numba's own disk
cache replaces its index before the code that the index names, and numbers that code without a lock: a process that starts
beside another, on another kind of CPU or after an edit, can run code that is not its own. It also refuses to be imported
where no folder can be written.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import float32, njit, types, uint32
from numba.extending import intrinsic

f32 = np.float32
_E4M3 = np.zeros(256, dtype=np.float32)
for _code in range(127):
    _exponent, _mantissa = _code >> 3, _code & 7
    _E4M3[_code] = _mantissa * 2.0**-9 if _exponent == 0 else (8 + _mantissa) * 2.0 ** (_exponent - 10)
_E4M3[127] = np.nan
_E4M3[128:] = -_E4M3[:128]
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], dtype=np.float32)

_INV_6 = f32(1.0 / 6.0)
_STEP_HALF, _STEP_ONE, _STEP_TWO = f32(6291456.0), f32(12582912.0), f32(25165824.0)
"""Adding and subtracting 1.5 * 2^23 * step rounds to a multiple of `step`, ties to even."""


@intrinsic
def _as_float(typing_context, bits):
    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return float32(types.uint32), build


@intrinsic
def _as_bits(typing_context, value):
    def build(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return uint32(types.float32), build


@njit(inline="always")
def _round_e4m3(value):
    """The E4M3 code nearest to `value` in [0, 448], ties to even."""
    if value < f32(0.015625):
        return uint32(np.rint(value * f32(512.0)))
    bits = _as_bits(value)
    return ((bits + uint32(0x7FFFF) + ((bits >> uint32(20)) & uint32(1))) >> uint32(20)) - uint32(960)


@njit(inline="always")
def _round_e2m1(magnitude):
    """The E2M1 value nearest to `magnitude` in [0, 6], ties to the even code."""
    magic = _STEP_HALF if magnitude < f32(2.0) else (_STEP_ONE if magnitude < f32(4.0) else _STEP_TWO)
    return (magnitude + magic) - magic


@njit(inline="always")
def _bf16_bits(value):
    """The BF16 bits nearest to a finite `value`, ties to even."""
    bits = _as_bits(value)
    return np.uint16((bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16))


@njit(nogil=True)
def fake_quantize(source, target, tensor_scale):
    """`nvfp4.fake_quantize` of BF16 bits; returns how many blocks held NaN or infinity."""
    inv_tensor_scale = f32(1.0) / f32(tensor_scale)
    inv_inv = f32(1.0) / inv_tensor_scale
    bad = 0
    for start in range(0, source.shape[0], 16):
        block = source[start : start + 16]
        out = target[start : start + 16]
        largest = np.uint16(0)
        for i in range(16):
            largest = max(largest, block[i] & np.uint16(0x7FFF))
        if largest >= np.uint16(0x7F80):
            bad += 1
            largest = np.uint16(0)
        amax = _as_float(uint32(largest) << uint32(16))
        block_scale = _E4M3[_round_e4m3(min(inv_tensor_scale * (amax * _INV_6), f32(448.0)))]
        combined = block_scale * inv_inv
        inv_scale = f32(0.0) if combined == f32(0.0) else f32(1.0) / combined
        decode = block_scale / inv_tensor_scale
        for i in range(16):
            bits = uint32(block[i])
            scaled = _as_float((bits & uint32(0x7FFF)) << uint32(16)) * inv_scale
            result = _bf16_bits(_round_e2m1(min(scaled, f32(6.0))) * decode) | np.uint16(bits & uint32(0x8000))
            out[i] = result if scaled > f32(0.0) else np.uint16(0)  # zero too for 0 * infinity: a reciprocal that overflows
    return bad


@njit(nogil=True)
def quantize(source, packed, block_scales, live, tensor_scale, given):
    """`nvfp4.quantize` of FP32; decodes to BF16 bits too unless `live` is empty; returns (bad, saturated) block counts.

    Block scales are read where they are `given`, else written by the amax rule. A bad block holds NaN or infinity, or was
    given a block scale that is not a positive number.
    """
    scale = f32(tensor_scale)
    six_scale = f32(6.0) * scale
    limit = f32(2688.0) * scale
    decodes = live.shape[0] > 0
    codes = np.empty(16, np.uint8)
    bad = 0
    saturated = 0
    for start in range(0, source.shape[0], 16):
        largest = f32(0.0)
        finite = True
        for i in range(16):
            magnitude = abs(source[start + i])
            finite = finite and magnitude <= f32(3.4028234663852886e38)
            largest = max(largest, magnitude)
        if not given:
            wanted = largest / six_scale
            if wanted == f32(0.0):
                wanted = f32(1.0)
            block_scales[start // 16] = _round_e4m3(min(max(wanted, f32(0.001953125)), f32(448.0))) if finite else 1
        code = block_scales[start // 16]
        if not finite or code == 0 or code > 126:
            bad += 1
            continue
        if largest > limit:
            saturated += 1
        combined = _E4M3[code] * scale
        for i in range(16):
            scaled = source[start + i] / combined
            rounded = _round_e2m1(min(abs(scaled), f32(6.0)))
            if rounded < f32(2.0):
                step = rounded * f32(2.0)
            elif rounded < f32(4.0):
                step = rounded + f32(2.0)
            else:
                step = rounded * f32(0.5) + f32(4.0)
            negative = scaled < f32(0.0)
            codes[i] = np.uint8(step) | np.uint8(8 if negative else 0)
            if decodes:
                live[start + i] = _bf16_bits(-(rounded * combined) if negative else rounded * combined)
        for i in range(8):
            packed[start // 2 + i] = codes[2 * i] | np.uint8(codes[2 * i + 1] << 4)
    return bad, saturated


def _dequantize_with(rounded):
    @njit(nogil=True)
    def dequantize(packed, block_scales, target, tensor_scale):
        values = np.empty(16, np.float32)
        for block in range(block_scales.shape[0]):
            scale = _E4M3[block_scales[block]] * f32(tensor_scale)
            for i in range(8):
                pair = packed[block * 8 + i]
                values[2 * i] = _E2M1[pair & 15]
                values[2 * i + 1] = _E2M1[pair >> 4]
            for i in range(16):
                target[block * 16 + i] = rounded(values[i] * scale)

    return dequantize


@njit(inline="always")
def _unchanged(value):
    return value


dequantize_to_bf16 = _dequantize_with(_bf16_bits)
"""`nvfp4.dequantize` to BF16 bits."""
dequantize_to_f32 = _dequantize_with(_unchanged)
"""`nvfp4.dequantize` to FP32."""
