"""Whether vLLM on this machine computes exported twins of the paper's architectures as we do: `harness parity` for each.

    python bench/twins_serve.py [--results DIR] [--max-sequences 256] [--models NAME ...] [--seeds 1]

A twin (harness/twins.py) has the class and the kinds of layers of the model that it stands for, few of them, and random weights. It is
calibrated on the builtin text, quantized to W4A4 (all linear layers but the output head), exported in both layouts in turn, and compared: each fused
module on equal inputs, the mean KL to BF16 paired over sequences, three standard errors. Experts are left out: vLLM computes NVFP4 ones on
CUDA GPUs alone, and those without a gate not even in BF16 on a CPU.

One set of weights cannot tell a lean of an engine from chance: which codes of four bits flip where two engines round BF16 in other places is an
accident of the weights. With `--seeds N` every twin is made with N seeds of them, and the mean difference must lie within three of its
standard errors too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from harness import loading
from harness.batches import batches_of, inputs_of
from harness.builtin import builtin_sequences
from harness.known_models import known_model
from harness.parity import run_parity
from harness.parity_divergence import MAX_ERRORS
from harness.parity_report import report
from harness.progress import Reporter
from harness.twins import write_twin
from qad.calibrate import calibrate
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.layouts import Layout
from qad.quantize import quantize_model
from qad.recipe import Recipe, match

MODELS = {
    "llama": None,
    "acereason (qwen2)": "nvidia/AceReason-Nemotron-1.1-7B",
    "nano v2 (nemotron_h)": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "super (DeciLM)": "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
}
"""Ids of committed configurations; of Llama one is written here."""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds of the weights, from 0 on")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds: found {given.seeds}; ask for 1 or more")
    loading.quiet_libraries()
    records: dict[str, list[dict[str, Any]]] = {}
    for place, name in enumerate(given.models):
        layout: Layout = "compressed-tensors" if place % 2 else "modelopt"
        records[name] = [compare(name, layout, given.results, given.max_sequences, seed) for seed in range(given.seeds)]
    print()
    for name, found in records.items():
        print(*summary(name, found), sep="\n")
    all_hold = all(record["verdict"] == "PASS" for found in records.values() for record in found)
    sys.exit(0 if all_hold and not any(leans(found) for found in records.values()) else 1)


def compare(name: str, layout: Layout, results: Path, max_sequences: int, seed: int) -> dict[str, Any]:
    """The record of `harness parity` of one twin. seed: of its weights."""
    path = MODELS[name]
    known = None if path is None else known_model(path)
    reporter = Reporter(Console())
    with tempfile.TemporaryDirectory() as scratch:
        twin = write_twin(LLAMA if known is None else known.config, Path(scratch) / "twin", seed=seed)
        reporter.say(f"{name}, seed {seed}: {twin.model_class}, {'; '.join(twin.notes)}; layout {layout}")
        packed = quantize(twin.folder, Path(scratch) / "packed", layout)
        record, stored = run_parity(
            packed,
            twin.folder,
            kernels="w4a4_emulation",
            results=results,
            seq_len=None,
            max_sequences=max_sequences,
            reporter=reporter,
        )
    print(*report(record, stored), sep="\n")
    return record


def summary(name: str, records: list[dict[str, Any]]) -> list[str]:
    """A line for each seed, and one for their mean where there are several."""
    lines = []
    for seed, record in enumerate(records):
        n_held, kl = sum(module["holds"] for module in record["modules"].values()), record["kl"]
        error = "–" if kl["stderr"] is None else f"{kl['stderr']:.5f}"
        lines.append(
            f"{name:22} seed {seed}: {n_held} of {len(record['modules'])} modules hold; KL to BF16 {kl['kl']['ours']['kl']:.4f} (ours), "
            f"{kl['kl']['vllm']['kl']:.4f} (vLLM), difference {kl['difference']:+.5f} ± {error} over {kl['n_sequences']} "
            f"sequences, {kl['n_tokens']:,} tokens: {record['verdict']}"
        )
    if len(records) > 1 and (found := mean_over_seeds(records)) is not None:
        mean, stderr, spread = found
        said = "leans" if leans(records) else "does not lean"
        lines.append(
            f"{name:22} {len(records)} seeds: mean difference {mean:+.5f} ± {stderr:.5f}, {said}; the differences are {spread:.1f} of their errors"
        )
    return lines


def mean_over_seeds(records: list[dict[str, Any]]) -> tuple[float, float, float] | None:
    """The mean of the differences, its standard error, and the root mean square of the differences over their errors: about 1 where
    chance of the text explains them. None if a record has no error, or one of zero.

    The standard error is the larger of two: what the errors over sequences come to, and what the spread over seeds does (the weights
    share in it, all sequences alike). Of few seeds the second alone would often be too small.
    """
    kls = [record["kl"] for record in records]
    if not all(kl["stderr"] for kl in kls):
        return None
    n, found = len(kls), [kl["difference"] for kl in kls]
    of_text = math.sqrt(math.fsum(kl["stderr"] ** 2 for kl in kls)) / n
    of_seeds = statistics.stdev(found) / math.sqrt(n) if n > 1 else 0.0
    ratios = [(kl["difference"] / kl["stderr"]) ** 2 for kl in kls]
    return statistics.fmean(found), max(of_text, of_seeds), math.sqrt(statistics.fmean(ratios))


def leans(records: list[dict[str, Any]]) -> bool:
    """Whether the mean difference over seeds is beyond MAX_ERRORS of its standard errors."""
    found = mean_over_seeds(records)
    return found is not None and abs(found[0]) > MAX_ERRORS * found[1]


def quantize(original: Path, folder: Path, layout: Layout) -> Path:
    """The twin in W4A4, its inputs calibrated on eight texts."""
    model, recipe, tokenizer = load_checkpoint(original).model, Recipe(), loading.load_tokenizer(original)
    text = builtin_sequences(tokenizer, seq_len=192, seed=0, eos_ids=loading.eos_ids(original, tokenizer))["calibration"][:8]
    amax = calibrate(model, recipe, [inputs_of(batch) for batch in batches_of(text)])
    targets = match(model, recipe)
    quantize_model(model, recipe, amax, keep_originals=False)
    write_checkpoint(folder, model, targets=targets, companions=original, record={}, layout=layout)
    return folder


if __name__ == "__main__":
    main()
