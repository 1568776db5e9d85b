"""Fast paths, bit-equal to `qad.nvfp4`, chosen by device; without them the reference runs and `backend` says so.

CPU: numba, compiled at first use, on row slices in a few Python threads (the kernels release the GIL, so numba's own
thread pool and torch's never compete). E4M3 and BF16 are rounded by integer arithmetic on bit patterns.
No kernel for CUDA yet: the reference runs there.
"""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qad import nvfp4
from qad.nvfp4 import BLOCK_SIZE, Packed
from qad.scales import amax_block_scales

_SMALLEST_SLICE = 1 << 16
"""Elements below which a second thread costs more than it saves."""


@cache
def backend(device: torch.device) -> str:
    """The name of what computes on `device`: "numba" or "torch"."""
    return "numba" if device.type == "cpu" and importlib.util.find_spec("numba") is not None else "torch"


def fake_quantize(x: Tensor, tensor_scale: Tensor, *, name: str = "activation") -> Tensor:
    """`nvfp4.fake_quantize`; the fast path takes contiguous BF16 on a CPU."""
    if x.dtype is not torch.bfloat16 or backend(x.device) != "numba" or x.shape[-1] % BLOCK_SIZE or not x.numel():
        return nvfp4.fake_quantize(x, tensor_scale, name=name)
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    source, target = _bits(x, torch.int16, "uint16"), _bits(out, torch.int16, "uint16")
    kernel = _numba().fake_quantize
    bad = _in_slices(lambda lo, hi: kernel(source[lo:hi], target[lo:hi], float(tensor_scale)), len(source))
    if any(bad):
        nvfp4.require_finite(x, name)
    return out


def project(master: Tensor, tensor_scale: Tensor, live: Tensor, *, name: str = "weight") -> tuple[Packed, int]:
    """Encode `master` with amax block scales and write `bf16(decode(encoding))` into `live`, in place.

    Args:
        master: (N, K) float32 or bfloat16, finite.
        tensor_scale: () float32.
        live: (N, K) bfloat16, overwritten.
    Returns:
        The encoding, and how many blocks saturate: their amax lies above 2688 * tensor_scale.
    Raises:
        NonFiniteError: `master` holds NaN or infinity.
    """
    if backend(master.device) != "numba" or not live.is_contiguous() or live.dtype is not torch.bfloat16:
        encoding = nvfp4.quantize(master, amax_block_scales(master, tensor_scale), tensor_scale, name=name)
        live.copy_(nvfp4.dequantize(encoding, live.dtype))
        limit = nvfp4.E2M1_MAX * nvfp4.E4M3_MAX * tensor_scale
        return encoding, int((nvfp4.blocks(master).abs().amax(dim=-1) > limit).sum())
    rows, width = master.shape
    packed = torch.empty(rows, width // 2, dtype=torch.uint8)
    block_scale = torch.empty(rows, width // BLOCK_SIZE, dtype=torch.uint8)
    source = master.detach().float().contiguous().view(-1).numpy()
    target = _bits(live.detach(), torch.int16, "uint16")
    codes, scales = packed.view(-1).numpy(), block_scale.view(-1).numpy()
    kernel = _numba().project

    def work(lo: int, hi: int) -> tuple[int, int]:
        block = slice(lo // BLOCK_SIZE, hi // BLOCK_SIZE)
        return kernel(source[lo:hi], target[lo:hi], codes[lo // 2 : hi // 2], scales[block], float(tensor_scale))

    counts = _in_slices(work, len(source))
    if any(bad for bad, _ in counts):
        nvfp4.require_finite(master, name)
    encoding = Packed(packed, block_scale.view(torch.float8_e4m3fn), tensor_scale)
    return encoding, sum(saturated for _, saturated in counts)


def _bits(x: Tensor, as_type: torch.dtype, numpy_type: str) -> Any:
    return x.view(-1).view(as_type).numpy().view(numpy_type)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="qad-kernels")


def _in_slices(work: Any, size: int) -> list[Any]:
    """Call `work(lo, hi)` on slices of whole blocks that cover `size`, in threads where it pays."""
    threads = min(torch.get_num_threads(), max(1, size // _SMALLEST_SLICE))
    if threads == 1:
        return [work(0, size)]
    step = -(-size // threads // BLOCK_SIZE) * BLOCK_SIZE
    return list(_pool().map(lambda lo: work(lo, min(lo + step, size)), range(0, size, step)))


@cache
def _numba() -> Any:
    from qad import _numba as compiled

    return compiled
