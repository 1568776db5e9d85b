"""Fast paths, bit-equal to `qad.nvfp4`, chosen by device; without them the reference runs and `backend` says so.

CUDA: one-pass Triton kernels (`qad._triton`). CPU: numba (`qad._numba`), compiled at first use, on slices of whole blocks in
a few Python threads (the kernels release the GIL, so numba's own thread pool and torch's never compete). Both round E4M3 and
BF16 by integer arithmetic on bit patterns. What a fast path does not take (its docstring says what it takes) goes to the
reference: the same bits, slower.

NaN and infinity raise at the call that meets them. On CUDA that waits for the device, except that within `checking_once`
activations are checked together at its end.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qad import nvfp4
from qad.errors import NonFiniteError
from qad.nvfp4 import BLOCK_SIZE, Packed
from qad.scales import amax_block_scales

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_SMALLEST_SLICE = 1 << 16
"""Elements below which a second thread costs more than it saves."""

_unread: list[tuple[str, Tensor]] | None = None
"""Names and counts of bad blocks still on the device, within `checking_once`."""


@cache
def backend(device: torch.device) -> str:
    """The name of what computes on `device`: "triton" (CUDA), "numba" (CPU) or, where those are not installed, "torch"."""
    wanted = {"cuda": "triton", "cpu": "numba"}.get(device.type, "torch")
    return wanted if importlib.util.find_spec(wanted) is not None else "torch"


def fake_quantize(x: Tensor, tensor_scale: Tensor, *, name: str = "activation") -> Tensor:
    """`nvfp4.fake_quantize`; fast for BF16 on a CPU, for BF16, FP16 and FP32 on CUDA."""
    on = backend(x.device) if x.dtype in _FLOATS and x.numel() and not x.shape[-1] % BLOCK_SIZE else "torch"
    if on == "torch" or (on == "numba" and x.dtype is not torch.bfloat16):
        return nvfp4.fake_quantize(x, tensor_scale, name=name)
    x = x.detach().contiguous()
    if on == "triton":
        out, counts = _triton().fake_quantize(x, tensor_scale)
        if _unread is not None:
            _unread.append((name, counts))
            return out
        bad = int(counts[0])
    else:
        out = torch.empty_like(x)
        source, target, kernel = _bits(x), _bits(out), _numba().fake_quantize
        bad = sum(_in_slices(lambda lo, hi: kernel(source[lo:hi], target[lo:hi], float(tensor_scale)), len(source)))
    if bad:
        nvfp4.require_finite(x, name)
    return out


@contextmanager
def checking_once() -> Iterator[None]:
    """Within, `fake_quantize` on CUDA does not wait to learn of NaN: all tensors are checked at the end, in one reading.

    Meant for a training step or a batch. Not to be nested; an error from within goes first.

    Raises:
        NonFiniteError: at the end, with the name of the first tensor that held NaN or infinity.
    """
    global _unread
    if _unread is not None:
        raise RuntimeError("checking_once: already within one; leave the outer one alone, it checks everything")
    _unread = []
    try:
        yield
        unread = _unread
    finally:
        _unread = None
    bad = torch.stack([counts[0].to(unread[0][1].device) for _, counts in unread]).tolist() if unread else []
    for (name, _), count in zip(unread, bad, strict=True):
        if count:
            raise NonFiniteError(
                f"{name}: {count} of its blocks held NaN or infinity, the first of {sum(map(bool, bad))} such tensors; "
                "NVFP4 encodes finite numbers only: look for the step that produced them"
            )


def quantize(x: Tensor, tensor_scale: Tensor, *, block_scale: Tensor | None = None, name: str = "tensor") -> Packed:
    """`nvfp4.quantize` with block scales that are given, or else those of the amax rule.

    Args:
        x: (..., K) of any float type, finite, K a multiple of 16; fast for BF16, FP16 and FP32.
        tensor_scale: () float32, positive.
        block_scale: (..., K/16) float8_e4m3fn, positive, kept as they are; None: `scales.amax_block_scales`.
    Raises:
        NonFiniteError: `x` holds NaN or infinity.
        ValueError: K is not a multiple of 16; `block_scale` has another shape or type, or holds zero, a negative number or NaN.
    """
    return _quantize(x, tensor_scale, block_scale, None, name)[0]


def project(
    master: Tensor, tensor_scale: Tensor, live: Tensor, *, block_scale: Tensor | None = None, name: str = "weight"
) -> tuple[Packed, int]:
    """Encode `master` as `quantize` does and write the decoded encoding into `live`, in place, in the same pass.

    Args:
        live: the shape of `master`, overwritten; fast if contiguous BF16. May be `master` itself.
    Returns:
        The encoding, and how many blocks saturate: their amax lies above 2688 * tensor_scale, whatever their block scale.
    Raises:
        as `quantize`.
    """
    if live.dtype is torch.bfloat16 and live.is_contiguous() and live.shape == master.shape:
        return _quantize(master, tensor_scale, block_scale, live, name)
    encoding, saturated = _quantize(master, tensor_scale, block_scale, None, name)
    live.copy_(dequantize(encoding, live.dtype))
    return encoding, saturated


def dequantize(encoding: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`nvfp4.dequantize`; fast to BF16, FP16 and FP32."""
    packed, block_scale = encoding.packed.contiguous(), encoding.block_scale.contiguous()
    on = backend(packed.device)
    if on == "torch" or dtype not in _FLOATS or not packed.numel():
        return nvfp4.dequantize(encoding, dtype)
    if on == "triton":
        return _triton().dequantize(packed, block_scale, encoding.tensor_scale, dtype)
    decoded = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    out = torch.empty(*packed.shape[:-1], packed.shape[-1] * 2, dtype=decoded)
    kernel = _numba().dequantize_to_bf16 if decoded is torch.bfloat16 else _numba().dequantize_to_f32
    codes, scales, target = _bits(packed), _bits(block_scale), _bits(out)

    def work(lo: int, hi: int) -> None:
        block = slice(lo // BLOCK_SIZE, hi // BLOCK_SIZE)
        kernel(codes[lo // 2 : hi // 2], scales[block], target[lo:hi], float(encoding.tensor_scale))

    _in_slices(work, len(target))
    return out.to(dtype)


def _quantize(
    x: Tensor, tensor_scale: Tensor, block_scale: Tensor | None, live: Tensor | None, name: str
) -> tuple[Packed, int]:
    """The encoding and the count of saturated blocks; `live` (contiguous BF16) receives the decoded values."""
    nvfp4.blocks(x)
    if block_scale is not None:
        _require_fitting(block_scale, x, name)
    on = backend(x.device) if x.dtype in _FLOATS and x.numel() else "torch"
    if on == "torch":
        return _quantize_plainly(x, tensor_scale, block_scale, live, name)
    x = x.detach().contiguous()
    packed = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    given = block_scale is not None
    if block_scale is None:
        block_scale = torch.empty(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=x.device)
    scales = block_scale.contiguous()
    run = _triton().quantize if on == "triton" else _quantize_by_numba
    bad, saturated = run(x, packed, scales, live, tensor_scale, given)
    if bad:
        nvfp4.require_finite(x, name)
        _require_positive(scales, name)
    return Packed(packed, block_scale, tensor_scale), saturated


def _quantize_plainly(
    x: Tensor, tensor_scale: Tensor, block_scale: Tensor | None, live: Tensor | None, name: str
) -> tuple[Packed, int]:
    if block_scale is None:
        block_scale = amax_block_scales(x, tensor_scale)
    else:
        _require_positive(block_scale, name)
    encoding = nvfp4.quantize(x, block_scale, tensor_scale, name=name)
    limit = nvfp4.E2M1_MAX * nvfp4.E4M3_MAX * tensor_scale
    saturated = int((nvfp4.blocks(x).abs().amax(dim=-1) > limit).sum())
    if live is not None:
        live.copy_(nvfp4.dequantize(encoding))
    return encoding, saturated


def _quantize_by_numba(
    x: Tensor, packed: Tensor, block_scale: Tensor, live: Tensor | None, tensor_scale: Tensor, given: bool
) -> tuple[int, int]:
    source, codes, scales = _bits(x.float()), _bits(packed), _bits(block_scale)
    target = _bits(torch.empty(0, dtype=torch.bfloat16) if live is None else live)
    kernel = _numba().quantize

    def work(lo: int, hi: int) -> tuple[int, int]:
        block = slice(lo // BLOCK_SIZE, hi // BLOCK_SIZE)
        return kernel(source[lo:hi], codes[lo // 2 : hi // 2], scales[block], target[lo:hi], float(tensor_scale), given)

    counts = _in_slices(work, len(source))
    return sum(bad for bad, _ in counts), sum(saturated for _, saturated in counts)


def _require_fitting(block_scale: Tensor, x: Tensor, name: str) -> None:
    wanted = (*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)
    if block_scale.dtype is not torch.float8_e4m3fn or block_scale.shape != wanted:
        raise ValueError(
            f"{name}: block_scale is {block_scale.dtype} of shape {tuple(block_scale.shape)}; "
            f"a tensor of shape {tuple(x.shape)} needs torch.float8_e4m3fn of shape {wanted}"
        )


def _require_positive(block_scale: Tensor, name: str) -> None:
    values = block_scale.float()
    wrong = ~(values > 0)
    if bool(wrong.any()):
        index = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{name}: block_scale holds {int(wrong.sum())} values that are not positive numbers, the first at index {index}: "
            f"{float(values[index])}; a zero block takes any positive scale, 1 for one"
        )


def _bits(x: Tensor) -> Any:
    """A flat numpy view of a contiguous tensor: floats of 16 and 8 bits as unsigned integers."""
    flat = x.detach().view(-1)
    if x.dtype is torch.bfloat16:
        return flat.view(torch.int16).numpy().view("uint16")
    return flat.view(torch.uint8).numpy() if x.dtype is torch.float8_e4m3fn else flat.numpy()


@cache
def _pool() -> ThreadPoolExecutor:
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child inherits the pool without its threads
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


@cache
def _triton() -> Any:
    from qad import _triton as compiled

    return compiled
