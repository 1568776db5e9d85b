"""How many bytes a token costs in each part of a model: kept for the backward pass, and held for a moment while it is computed.

Derived from what transformers' classes (5.17) compute in BF16 with `sdpa` attention and what autograd keeps of it, operation by
operation; h is the width of the model, a and k those of queries and of keys, f that of an MLP. Norms compute in FP32 and keep
that copy. Frozen weights keep no input. The input of a fused group is kept once, quantized or not. Experts are those of `qad.experts`, opened
and computed one after the other; vLLM's are fused. Mamba is counted as its fused kernels would keep it, which is an estimate: plain torch, which
takes over where these are not installed, keeps more.
"""

from __future__ import annotations

from harness.architecture import Architecture, Attention, Experts, Layer, Mamba, Mlp, Part
from harness.hardware import BF16, FP32, INT64

_UNEVEN = 2.0
"""How many times its even share of the tokens an expert computes at once, at most. Assumed: no source."""


def kept(architecture: Architecture, layer: Layer, *, packed: int = 0, trains_norms: bool = False) -> float:
    """Bytes a token that autograd keeps of a layer.

    packed: tokens of a row where documents share it; then `sdpa` has a mask, which it makes numbers of for each layer, and is given keys
        and values repeated for every head. trains_norms: norms have gradients too.
    """
    h = architecture.width
    norm = FP32 * h + (BF16 * h if trains_norms else 0)
    return sum(norm + _kept(part, h, packed=packed) for part in layer.parts)


def _kept(part: Part, h: int, *, packed: int) -> float:
    if isinstance(part, Attention):
        a, k = part.heads * part.head_dim, part.kv_heads * part.head_dim
        keys = a if packed else k
        normed = FP32 * (a + k) if part.has_norms else 0
        # input; rotated queries and keys, values; result with its log-sums; input of the way out
        return BF16 * h + normed + BF16 * (a + 2 * keys) + BF16 * a + FP32 * part.heads + BF16 * a + BF16 * packed
    if isinstance(part, Mlp):
        return BF16 * h + _kept_mlp(part)
    if isinstance(part, Experts):
        # input; MLP; its result, and that with its share, which `index_add` keeps; which token and which place, twice
        one = (BF16 + BF16 + _sums(part)) * part.width + _kept_mlp(Mlp(part.inner, part.gated)) + 4 * INT64
        shared = BF16 * h + _kept_mlp(Mlp(part.shared, part.gated)) if part.shared else 0
        latent = BF16 * (h + part.width) if part.width != h else 0  # inputs of the ways into and out of it
        return FP32 * part.count + part.active * one + shared + latent
    states = FP32 * part.heads * part.head_dim * part.state / part.chunk
    projected = BF16 * (part.inner + part.convolved + part.heads)
    # input, projection, convolution, states at the borders of chunks, result of the scan, the norm with its gate, input of the way out
    return BF16 * h + projected + BF16 * part.convolved + states + BF16 * part.inner + 3 * FP32 * part.inner + BF16 * part.inner


def _sums(part: Experts) -> int:
    """Bytes of a number in which results of experts are added up."""
    return BF16 if part.gated else FP32


def _kept_mlp(part: Mlp) -> float:
    """Gate before and after its function, the way up, the input of the way down; without a gate: relu, and the input of the way down."""
    return (4 if part.gated else 2) * BF16 * part.inner


def in_backward(architecture: Architecture, layer: Layer) -> float:
    """Bytes a token of gradients that are alive at once while a layer is computed backwards, beyond what it kept.

    The last part comes first, and what it kept is gone when those before it are computed. A norm: five tensors in FP32 and one in BF16
    of its width. An MLP: gradients of product, gate and way up, less the input of the way down, which is given free.
    """
    h = architecture.width
    norm, freed, most = 5 * FP32 * h + BF16 * h, 0.0, 0.0
    for part in reversed(layer.parts):
        most = max(most, _inner_backward(part) - freed)
        freed += _kept(part, h, packed=0)
        most = max(most, norm - freed)
        freed += FP32 * h
    return most


def _inner_backward(part: Part) -> float:
    if isinstance(part, Attention):
        return 3 * BF16 * (part.heads + part.kv_heads) * part.head_dim
    if isinstance(part, Mlp):
        return (2 if part.gated else 1) * BF16 * part.inner
    if isinstance(part, Experts):
        # of one expert: gradients of its result, weighed and not, of its MLP and its input; of all: of the sum, the input so far and one more
        one = (2 * BF16 + _sums(part)) * part.width + _inner_backward(Mlp(part.inner, part.gated))
        of_all = (_sums(part) + 2 * BF16) * part.width + _at_once(part) * one
        return max(of_all, _inner_backward(Mlp(part.shared, part.gated)))
    return 3 * FP32 * part.inner


def _at_once(part: Experts) -> float:
    """The share of the tokens that one expert computes at once."""
    return min(1.0, _UNEVEN * part.active / part.count)


def in_forward(architecture: Architecture, *, is_cached: bool = False, is_fused: bool = False) -> float:
    """Bytes a token that are alive at once in a forward pass without gradients: stream, input, and the widest part.

    is_cached: keys and values are counted where they are kept. is_fused: all experts are computed at once, as vLLM does.
    """
    h = architecture.width
    widest: float = 2 * FP32 * h  # a norm
    for layer in architecture.layers:
        for part in layer.parts:
            if isinstance(part, Attention):
                a, k = part.heads * part.head_dim, part.kv_heads * part.head_dim
                # queries, keys, values, while the first or the second is rotated; the layer's own keys and values are in the cache too
                found: float = BF16 * (max(4 * a + 2 * k, 2 * a + 5 * k) - (2 * k if is_cached else 0))
            elif isinstance(part, Mlp):
                found = BF16 * (3 if part.gated else 2) * part.inner
            elif isinstance(part, Experts) and is_fused:
                found = BF16 * (part.active * (2 * part.width + 3 * part.inner) + 3 * part.shared)
            elif isinstance(part, Experts):
                # the sum, who takes which token (one-hot), and of one expert input, quantized, gate, its function, way up, product
                one = BF16 * (2 * part.width + (4 if part.gated else 3) * part.inner)
                routed = _sums(part) * part.width + INT64 * part.active * part.count + _at_once(part) * one
                found = max(routed, BF16 * 3 * part.shared)
            else:
                found = BF16 * (3 * part.inner + 2 * part.convolved) + FP32 * 2 * part.inner
            widest = max(widest, found)
    return 2 * BF16 * h + widest


def mask_bytes(rows: int, tokens: int) -> float:
    """Of the mask that keeps the documents of packed rows apart: a byte for each pair of tokens, once for all layers and heads."""
    return rows * tokens * tokens


def cache_bytes(architecture: Architecture, *, is_fp8: bool = False, gpus: int = 1) -> tuple[float, float]:
    """Keys and values: bytes a token; and bytes a sequence of Mamba's states (FP32) and convolutions, which do not grow.

    gpus: that share each layer. On each of them; one has a key head at least, so that heads are held several times where they are fewer, and
        all hold a latent of all heads.
    """
    each = 1 if is_fp8 else BF16
    a_token = sum(
        each * (part.latent or 2 * max(1.0, part.kv_heads / gpus) * part.head_dim) for part in architecture.parts(Attention)
    )
    a_sequence = sum(
        FP32 * part.heads * part.head_dim * part.state + BF16 * part.convolved * (part.kernel - 1)
        for part in architecture.parts(Mamba)
    )
    return a_token, a_sequence / gpus


def chunk_bytes(architecture: Architecture, *, loss: str, tokens: int, chunk: int) -> float:
    """Logits of a chunk of tokens in the loss; a chunk is gone before the next one is made.

    Logits and probabilities in FP32, of the teacher too where there is one, and their product; without a teacher, the gradient in BF16.
    """
    each = 5 * FP32 if loss != "ce" else 2 * FP32 + BF16
    return min(tokens, chunk) * architecture.vocabulary * each
