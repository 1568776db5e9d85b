"""Where ModelOpt, compressed-tensors and torchao encode a weight differently from `qad`, corner by corner.

    .venv-peers/bin/python -m peers.differences > tests/fixtures/differences.json
    .venv/bin/python -m peers.differences --paste       # the table, from that file, into docs/design/numerics.md

Every tool gets the same BF16 tensor and the same tensor scale. Its codes and block scales are decoded in float64 as
`code * block_scale * tensor_scale`, so that what differs is the encoding alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peers.conformance import by_modelopt
from peers.corners import SCALES, Case, corners
from qad import nvfp4
from qad.scales import amax_block_scales, tensor_scale_for

REPOSITORY = Path(__file__).parent.parent
FIGURES = REPOSITORY / "tests" / "fixtures" / "differences.json"
DOCUMENT = REPOSITORY / "docs" / "design" / "numerics.md"
BEGIN, END = "<!-- differences: begin -->", "<!-- differences: end -->"
RANDOM_TENSORS = 64


def by_compressed_tensors(x: Tensor, tensor_scale: Tensor) -> nvfp4.Packed:
    """The block scales of its min-max observers, then its compressor."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme("NVFP4", ["Linear"])
    global_scale = (1 / tensor_scale).reshape(1)
    low, high = nvfp4.blocks(x).aminmax(dim=-1)
    block_scale, _ = calculate_qparams(low, high, scheme.weights, global_scale)
    module = {"weight": x, "weight_scale": block_scale, "weight_global_scale": global_scale}
    found = NVFP4PackedCompressor.compress(module, scheme)
    return nvfp4.Packed(found["weight_packed"], found["weight_scale"], tensor_scale)


def by_torchao(x: Tensor, tensor_scale: Tensor) -> nvfp4.Packed:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    block_scale, packed = nvfp4_quantize(x, nvfp4.BLOCK_SIZE, tensor_scale)
    return nvfp4.Packed(packed, block_scale, tensor_scale)


TOOLS: dict[str, tuple[str, Callable[[Tensor, Tensor], nvfp4.Packed]]] = {
    "ModelOpt export": ("nvidia-modelopt", by_modelopt),
    "compressed-tensors": ("compressed-tensors", by_compressed_tensors),
    "torchao": ("torchao", by_torchao),
}


def cases() -> Iterator[tuple[str, list[Case]]]:
    """Every corner, and for two choices of tensor scale random tensors with rows of many sizes; all in BF16."""
    for corner in corners():
        yield corner.name, [Case(corner.name, corner.x.bfloat16(), corner.tensor_scale)]
    for choice in SCALES[:2]:
        generator = torch.Generator().manual_seed(2)
        yield (
            f"{RANDOM_TENSORS} random tensors, tensor scale {choice}",
            [_random(choice, generator) for _ in range(RANDOM_TENSORS)],
        )


def _random(choice: str, generator: torch.Generator) -> Case:
    x = torch.randn(16, 512, generator=generator) * torch.exp(torch.randn(16, 1, generator=generator))
    x = x.bfloat16()
    return Case(choice, x, tensor_scale_for(float(x.abs().max()), power_of_two=choice == SCALES[0]))


def decoded(encoding: nvfp4.Packed) -> Tensor:
    """(rows, K/16, 16) float64."""
    codes = nvfp4.blocks(nvfp4.decode_e2m1(nvfp4.unpack(encoding.packed))).double()
    return codes * encoding.block_scale.double().unsqueeze(-1) * encoding.tensor_scale.double()


def difference(cases: list[Case], quantize: Callable[[Tensor, Tensor], nvfp4.Packed]) -> dict[str, float]:
    """Share of codes and of block scales that differ, and the largest difference of a value relative to its block's amax."""
    codes, scales, values = [], [], []
    for case in cases:
        ours = nvfp4.quantize(case.x, amax_block_scales(case.x, case.tensor_scale), case.tensor_scale)
        theirs = quantize(case.x.clone(), case.tensor_scale)
        codes.append((nvfp4.unpack(ours.packed) != nvfp4.unpack(theirs.packed)).flatten())
        scales.append((ours.block_scale.view(torch.uint8) != theirs.block_scale.view(torch.uint8)).flatten())
        amax = nvfp4.blocks(case.x).abs().amax(-1, keepdim=True).double()
        values.append(((decoded(ours) - decoded(theirs)).abs() / torch.where(amax == 0, 1.0, amax)).max())
    shares = {"codes": float(torch.cat(codes).double().mean()), "scales": float(torch.cat(scales).double().mean())}
    return {**shares, "values": float(max(values))}


def measure() -> dict[str, Any]:
    """Versions of the tools, and a row a name of `cases` with the differences of each."""
    rows = [
        {
            "name": name,
            "n": sum(case.x.numel() for case in tensors),
            **{tool: difference(tensors, quantize) for tool, (_, quantize) in TOOLS.items()},
        }
        for name, tensors in cases()
    ]
    return {"versions": {tool: version(package) for tool, (package, _) in TOOLS.items()}, "rows": rows}


def render(figures: dict[str, Any]) -> str:
    """The table in Markdown."""
    heads = [f"{tool} {figures['versions'][tool]}" for tool in TOOLS]
    lines = [f"| BF16 weights | n | {' | '.join(heads)} |", "| --- |" + " --- |" * (1 + len(TOOLS))]
    for row in figures["rows"]:
        cells = [_cell(row[tool]) for tool in TOOLS]
        lines.append(f"| {row['name']} | {row['n']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, float]) -> str:
    if not any(found.values()):
        return "equal"
    values = f"values ≤ {found['values']:.2g} amax" if found["values"] else "values equal"
    shares = [f"{kind} {_percent(found[kind])}" for kind in ("codes", "scales") if found[kind]]
    return "; ".join([values, *shares])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def paste() -> None:
    """Write the table of the recorded figures into the document, between its markers."""
    head, rest = DOCUMENT.read_text().split(BEGIN)
    _, tail = rest.split(END)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{render(json.loads(FIGURES.read_text()))}{END}{tail}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--paste"]:
        paste()
    else:
        print(json.dumps(measure(), indent=1))
