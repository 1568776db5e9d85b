"""Whether what computed a figure is what a release policy admits, by class of module as engines record it. No torch.

linear, experts   NVFP4 layers: one of the policy's `kernels`; of a BF16 variant "bf16". A quantized variant may leave one of the two classes
                  in BF16, not both: which is which is read from the served modules
linear_fp8        FP8 layers, of a variant that has some: FP8 times FP8, no kernel that leaves the input in 16 bits. Experts in FP8 are still
                  "experts": of a variant that has FP8 layers the same holds for them, and they may be all that it has
kv_cache          as the variant's quantization says: "bf16", or "fp8" (in torch "fp8_emulation")

A class that is not listed here is refused. Of a checkpoint made elsewhere it is not recorded whether it has FP8 layers, nor what its cache is to
be: there each known kernel counts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.schema_gate import Gate

NOT_QUANTIZED = ("bf16",)
_NVFP4 = ("linear", "experts")
_CACHES = {"bf16": ("bf16",), "fp8": ("fp8", "fp8_emulation")}
_FP8 = re.compile(r"w8a8_emulation|(?!Marlin|Humming|XPUW8A16)\w*F[Pp]8\w*ScaledMM\w*Kernel")
"""Ours in torch, and vLLM's by their class names, but for those that only the weights of are FP8."""
_CLAIMED = "unverified"


def kernel_flaws(variant: dict[str, Any], kernels: Any, flags: Any, policy: Gate, what: str) -> Iterator[str]:
    """Why what computed a figure of the variant is not what the policy allows; nothing where it is. what: names the figure.

    What is only claimed, or not known, is admitted with the scores of endpoints and of other tools, where the policy admits those.
    """
    found = {"linear": None} | (kernels if isinstance(kernels, dict) else {})
    quantization = variant.get("quantization") or {}
    is_quantized = variant.get("method") not in NOT_QUANTIZED
    is_known = not str(found["linear"]).startswith((_CLAIMED, "unknown"))
    if is_quantized and is_known:
        has_fp8 = bool(quantization.get("fp8")) and not any(map(_is_fp8, _parts(found.get("experts"))))
        has = {"linear_fp8": has_fp8, "kv_cache": quantization.get("kv_cache") == "fp8"}
        found |= {key: None for key, is_needed in has.items() if is_needed and key not in found}
    for key, value in found.items():
        allowed = _allowed(key, variant, policy, others=[found[other] for other in _NVFP4 if other in found and other != key])
        if allowed is None:
            yield f"{what} names kernels of {key!r}, a class of modules that is not known here: {value}"
            continue
        may_be_fp8 = is_quantized and (
            key == "linear_fp8" or (key == "experts" and (not quantization or bool(quantization.get("fp8"))))
        )
        for part in _parts(value) or ["unknown"]:
            is_fp8 = may_be_fp8 and _is_fp8(part)
            if not is_fp8 and not _is_admitted(part, allowed, flags, policy, is_quantized=is_quantized):
                kernel = part if part != "unknown" else "unknown kernels"
                where = "" if key == "linear" else f" ({key})"
                yield f"{what} was computed with {kernel}{where}; admitted: {_told(key, allowed, is_quantized=is_quantized, may_be_fp8=may_be_fp8)}"
                break


def _allowed(key: str, variant: dict[str, Any], policy: Gate, *, others: list[Any]) -> Collection[str] | None:
    """The kernels of a class of modules; None for one that is not known. Of FP8 layers the names are matched, and nothing is listed.

    others: what computed the other class of NVFP4 layers, where there is one.
    """
    is_quantized = variant.get("method") not in NOT_QUANTIZED
    quantization = variant.get("quantization")
    if key in _NVFP4:
        is_left = any(part != "bf16" and not _is_fp8(part) for other in others for part in _parts(other))
        return {*(policy.kernels if is_quantized else ()), *(("bf16",) if is_left or not is_quantized else ())}
    if key == "kv_cache":
        asked = (quantization or {}).get("kv_cache", "bf16" if quantization or not is_quantized else None)
        return _CACHES.get(asked, ()) if asked is not None else [name for names in _CACHES.values() for name in names]
    return () if key == "linear_fp8" else None


def _parts(kernels: Any) -> list[str]:
    """The kernels of a class, which are joined by "+"; none where none are recorded."""
    return kernels.split("+") if isinstance(kernels, str) and kernels else []


def _is_fp8(part: str) -> bool:
    return _FP8.fullmatch(part) is not None


def _is_admitted(part: str, allowed: Collection[str], flags: Any, policy: Gate, *, is_quantized: bool) -> bool:
    if part.startswith(_CLAIMED) and policy.admit_unverified:
        claimed = part.removeprefix(_CLAIMED).strip()
        return not claimed or claimed in allowed or not is_quantized
    if part == "unknown":
        return policy.admit_imported and "imported" in (flags or ())
    return part in allowed


def _told(key: str, allowed: Collection[str], *, is_quantized: bool, may_be_fp8: bool) -> str:
    if not is_quantized:
        return "BF16, as nothing of it is quantized"
    if key == "linear_fp8":
        return "FP8 times FP8"
    if key in _NVFP4:
        return f"kernels = {', '.join(sorted(allowed))}" + (", or FP8 times FP8" if may_be_fp8 else "")
    return " or ".join(sorted(allowed))
