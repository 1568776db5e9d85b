"""Memory and size of an export: a random Llama is quantized and written; the peak increase over the BF16 weights is printed.

    python bench/export_memory.py [--layers N]        (9 layers: 1.2 GiB of BF16 weights)

The increase is the peak of resident memory during quantization and export minus what was resident before, so that the model
itself is not counted. Linux only: the peak is reset through /proc.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qad.checkpoint import write_checkpoint
from qad.layouts import LAYOUTS, NAMES, Layout
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from qad.tensor_files import TensorFiles

STATUS = Path("/proc/self/status")


def resident(kind: str) -> int:
    """VmRSS or VmHWM (the peak) in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def build(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16, vocab_size=4096
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def stored_bytes_a_weight(folder: Path, layout: str) -> float:
    """Bytes of codes and scales over the quantized weights that they decode to."""
    files, names = TensorFiles(folder), NAMES[layout]
    layers = [key.removesuffix(names.codes) for key in files.where if key.endswith(names.codes) and files.dtype(key) == "U8"]
    stored = sum(files.n_bytes(layer + suffix) for layer in layers for suffix in names.all if layer + suffix in files.where)
    return stored / sum(2 * files.n_bytes(layer + names.codes) for layer in layers)


def measure(layout: Layout, layers: int) -> None:
    model = build(layers)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    targets = match(model, Recipe())
    amax = {group.name: 8.0 for group in targets.groups}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as scratch:
        quantize_model(model, Recipe(), amax, keep_originals=False)
        write_checkpoint(Path(scratch) / "out", model, targets=targets, companions=Path(scratch), record={}, layout=layout)
        increase = resident("VmHWM") - before
        size = stored_bytes_a_weight(Path(scratch) / "out", layout)
    print(f"| {layout} | {weights / 2**30:.2f} | {increase / 2**30:.2f} | {increase / weights:.2f} | {size:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--layout", choices=LAYOUTS, help="one layout; without, each in a process of its own")
    arguments = parser.parse_args()
    if arguments.layout:
        measure(arguments.layout, arguments.layers)
        return
    print("| layout | BF16 weights, GiB | peak increase, GiB | ratio | bytes a quantized weight |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for layout in LAYOUTS:
        command = [sys.executable, __file__, "--layers", str(arguments.layers), "--layout", layout]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
