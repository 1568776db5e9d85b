"""The half of `harness parity` that compares engines by their mean KL to the BF16 model on the same text, paired over sequences.

The difference of two engines is judged by its standard error. Beside it stand the same figures of our own model against itself in another order
of accumulation: both differences hold the rounding of our first pass, which is one draw, so that they often lean together.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from harness.batches import batch_of
from harness.data import Sequence
from harness.engines.vllm import media_of
from harness.processor import Processor
from harness.progress import Reporter
from qad import divergence
from qad.backbone import decoder_of, head_of
from qad.clustered import ratio_with_stderr
from qad.modules import QuantizedLinear, quantized_linears

MIN_RESPONSE_TOKENS = 2000
FIRST_SEQUENCES = 32
MAX_ERRORS = 3.0
"""The difference in mean KL may be this many of its standard errors."""
NARROW = 0.05
"""Its 95 % interval must be narrower than plus or minus this share of the KL; text is added until it is."""
_Z95 = 1.96


def compare_divergence(
    model: Any,
    teacher: Any,
    engine: Any,
    text: list[Sequence],
    reporter: Reporter,
    *,
    processor: Processor | None = None,
) -> dict[str, Any]:
    """Mean KL to `teacher` under both engines over the same response tokens; text is added until the interval is narrow."""
    heads = {"ours": head_of(model), "teacher": head_of(teacher)}
    pairs = {
        "ours": ("ours", "teacher"),
        "vllm": ("vllm", "teacher"),
        "reordered": ("floor", "teacher"),
        "between": ("vllm", "ours"),
        "floor": ("floor", "ours"),
    }
    rows: dict[str, list[divergence.SequenceDivergence]] = {name: [] for name in pairs}
    done = 0
    while True:
        upto = min(len(text), max(FIRST_SEQUENCES, 2 * done))
        with reporter.track(f"KL to BF16 under both engines, sequences {done + 1} to {upto}"):
            batches = [batch_of([sequence], processor) for sequence in text[done:upto]]
            states = {
                "teacher": list(divergence.final_hidden(teacher, batches)),
                "ours": list(divergence.final_hidden(model, batches)),
                "vllm": served_hidden(engine, text[done:upto], processor),
            }
            with reordered(model):
                states["floor"] = list(divergence.final_hidden(model, batches))
            for name, (candidate, against) in pairs.items():
                response, _ = divergence.measure(states[candidate], heads["ours"], states[against], heads[against], batches)
                rows[name] += response
        done = upto
        found = summarize(rows)
        if done == len(text) or (found["is_narrow"] and found["n_tokens"] >= MIN_RESPONSE_TOKENS):
            return found


def summarize(rows: dict[str, list[divergence.SequenceDivergence]]) -> dict[str, Any]:
    """Means over response tokens, and the paired difference over sequences with its standard error."""
    counts = [row.n_tokens for row in rows["ours"]]
    paired = {}
    for name in ("vllm", "reordered"):
        sums = [other.kl_sum - ours.kl_sum for other, ours in zip(rows[name], rows["ours"], strict=True)]
        paired[name] = ratio_with_stderr(sums, counts)
    difference, stderr = paired["vllm"]
    means = {name: dataclasses.asdict(divergence.summarize(found)) for name, found in rows.items()}
    width = None if stderr is None else _Z95 * stderr
    return {
        "kl": {name: {key: mean[key] for key in ("kl", "kl_stderr", "top1")} for name, mean in means.items()},
        "difference": difference,
        "stderr": stderr,
        "floor_difference": paired["reordered"][0],
        "floor_stderr": paired["reordered"][1],
        "is_within": stderr is not None and abs(difference) <= MAX_ERRORS * stderr,
        "is_narrow": width is not None and width <= NARROW * means["ours"]["kl"],
        "n_tokens": sum(counts),
        "n_sequences": len(counts),
    }


def served_hidden(engine: Any, sequences: list[Sequence], processor: Processor | None = None) -> list[Tensor]:
    """Final hidden states (1, tokens, width) of each sequence, taken inside vLLM's process."""
    asked: dict[str, Any] = {"do": "hidden", "sequences": [list(s.token_ids) for s in sequences]}
    if processor is not None:
        media = [media_of(i, s.images, processor.unexpanded(s.token_ids, s.images)) for i, s in enumerate(sequences)]
        asked["media"] = {number: about for one in media for number, about in one.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hidden.safetensors"
        engine.worker.ask(asked | {"path": str(path)})
        found = load_file(path)
    return [found[str(index)][None] for index in range(len(sequences))]


@contextmanager
def reordered(model: Any) -> Iterator[None]:
    """The same arithmetic in another order: the language model of `model` computes attention with transformers' other
    implementation, and its quantized layers add up the two halves of K in FP32.

    With power-of-two scales the products of NVFP4 operands have so few bits that FP32 sums of them are exact in any order, so
    that attention is what differs.
    """
    changed = quantized_linears(model).values()
    decoder: Any = decoder_of(model)
    attention = decoder.config._attn_implementation

    def forward(module: QuantizedLinear, x: Tensor) -> Tensor:
        x = x if module.input_quantizer is None else module.input_quantizer(x)
        half = x.shape[-1] // 2
        parts = [functional.linear(x[..., k].float(), module.weight[:, k].float()) for k in (slice(half), slice(half, None))]
        total = parts[0] + parts[1]
        return (total if module.bias is None else total + module.bias.float()).to(x.dtype)

    other = {"sdpa": "eager", "eager": "sdpa"}.get(attention, attention)  # ours, which rounds the KV cache, stays
    try:
        decoder.set_attn_implementation(other)
        for module in changed:
            module.forward = forward.__get__(module)  # type: ignore[method-assign]
        yield
    finally:
        decoder.set_attn_implementation(attention)
        for module in changed:
            del module.forward
