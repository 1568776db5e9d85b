"""The numba kernels behind `qad.scales`; imported only when numba is there. IEEE FP32, no fast-math, so no contraction."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from qad._numba import _E4M3, _round_e2m1

f32 = np.float32


@njit(inline="always")
def _squared_error(magnitudes, code, weights, tensor_scale, terms):
    scale = _E4M3[code]
    combined = scale * tensor_scale
    for i in range(16):
        scaled = magnitudes[i] / combined
        error = _round_e2m1(min(scaled, f32(6.0))) - scaled
        terms[i] = error * error
    if weights.shape[0]:
        for i in range(16):
            terms[i] = terms[i] * weights[i]
    for i in range(8):
        terms[i] = terms[i] + terms[i + 8]
    for i in range(4):
        terms[i] = terms[i] + terms[i + 4]
    return ((terms[0] + terms[2]) + (terms[1] + terms[3])) * (scale * scale)


@njit(nogil=True)
def better_of(magnitudes, first, second, tensor_scale, out):
    """`out` (B,): the second code where its error is strictly smaller, else the first; magnitudes (B * 16,)."""
    none, terms, scale = np.empty(0, np.float32), np.empty(16, np.float32), f32(tensor_scale)
    for block in range(len(out)):
        values = magnitudes[block * 16 : block * 16 + 16]
        of_first = _squared_error(values, first[block], none, scale, terms)
        of_second = _squared_error(values, second[block], none, scale, terms)
        out[block] = second[block] if of_second < of_first else first[block]


@njit(nogil=True)
def search(magnitudes, start, importance, tensor_scale, n_up, out):
    """`scales._search` from the codes `start` (B,); magnitudes (B * 16,), importance (K,), or (0,) for none."""
    terms, scale = np.empty(16, np.float32), f32(tensor_scale)
    n_columns = importance.shape[0]
    for block in range(len(out)):
        values = magnitudes[block * 16 : block * 16 + 16]
        column = (block * 16) % n_columns if n_columns else 0
        weights = importance[column : column + 16] if n_columns else importance
        code = start[block]
        best = code
        best_error = _squared_error(values, code, weights, scale, terms)
        for candidate in range(code + 1, min(code + n_up, 126) + 1):
            error = _squared_error(values, candidate, weights, scale, terms)
            if error < best_error:
                best, best_error = candidate, error
        at = 0
        for i in range(16):
            if values[i] > values[at]:
                at = i
        largest = values[at] / scale
        for candidate in range(code - 1, 0, -1):
            excess = max(largest - f32(6.0) * _E4M3[candidate], f32(0.0))
            bound = excess * excess
            if n_columns:
                bound = bound * weights[at]
            if not bound < best_error:
                break
            error = _squared_error(values, candidate, weights, scale, terms)
            if error < best_error:
                best, best_error = candidate, error
        out[block] = best


@njit(nogil=True)
def gptq_columns(columns, scale, factor, scaled, errors):
    """GPTQ within a block of columns (N, B), which it changes: `scaled` is what was rounded, `errors` what it cost; all (N, B).

    scale (N, B / 16); factor (B, B), the upper Cholesky factor of the inverse Hessian. Rows know nothing of each other.
    """
    for row in range(columns.shape[0]):
        for i in range(columns.shape[1]):
            column_scale = scale[row, i // 16]
            target = columns[row, i] / column_scale
            scaled[row, i] = target
            rounded = np.copysign(_round_e2m1(min(abs(target), f32(6.0))), target)
            error = (columns[row, i] - rounded * column_scale) / factor[i, i]
            errors[row, i] = error
            for j in range(i + 1, columns.shape[1]):
                columns[row, j] -= error * factor[i, j]
