"""Planned memory beside the measured increase on a CPU: configurations above 1 GiB, each in a process of its own.

    python bench/plan_memory.py [--only NAME] [--runs N] [--as-it-is]

The increase is the peak of resident memory (VmHWM, reset through /proc) minus what was resident after imports and a first small call of
every kernel. Random Llamas and one with experts, random tokens. Linux with glibc only.

What is planned is what tensors take. glibc's malloc keeps what is freed below a threshold that it raises to 32 MiB by itself, in holes that
larger tensors do not fit in: on a CPU a training then holds up to 1.4 times its tensors. So the processes that measure fix the
threshold at 1 MiB, above which memory goes back at once; --as-it-is leaves malloc alone, and shows the holes. oneDNN keeps compiled products
by shape, and each expert computes another number of tokens: some 0.1 GiB that no tensor takes, and no GPU; they keep one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.architecture import Architecture
from harness.architecture_sizes import architecture_of
from harness.hardware import BF16, GIB
from harness.memory_model import CHUNK_TOKENS, Answering, Moment, Training, of_loading, worst
from harness.planned_recipe import quantized_by
from harness.schema import Quantization
from qad.batch import Batch
from qad.distill import Settings, train
from qad.experts import open_experts
from qad.losses import Objective, chunked_loss
from qad.optimization import Optimization
from qad.quantize import quantize_model
from qad.recipe import Recipe, match

QUANTIZED = Quantization.model_validate({"calibration": {"data": "text"}})
STATUS = Path("/proc/self/status")
RETURNING = {
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**20),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
}
WITHIN = 0.15
"""How far a plan may be from what is measured, as a share of it."""


def config_of(hidden: int, layers: int, vocabulary: int, **more: int) -> dict[str, Any]:
    """The configuration of a Llama with heads of 64 and an MLP four times as wide."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64}
    return {"model_type": "llama", "max_position_embeddings": 8192, **sizes, **heads, **more}


def experts_of(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """The configuration of a Qwen3-MoE: in each layer 8 experts twice as wide, of which a token goes to 4."""
    experts = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 2 * hidden, "norm_topk_prob": True}
    return {**config_of(hidden, layers, vocabulary), "model_type": "qwen3_moe", **experts}


def build(config: dict[str, Any]) -> Any:
    """The model with random weights in BF16, its experts opened as `qad.building` does."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    finally:
        torch.set_default_dtype(default)
    open_experts(model)
    return model


class Configuration:
    """Something with a planned need; `prepare` is not measured, `run` is."""

    def planned(self) -> Moment:
        raise NotImplementedError

    def prepare(self, scratch: Path) -> None:
        """Nothing, unless a file is needed."""

    def run(self, scratch: Path) -> None:
        raise NotImplementedError


class Loading(Configuration):
    """A BF16 checkpoint of 1.3 GiB is read."""

    config = config_of(2048, 9, 16384)

    def planned(self) -> Moment:
        return of_loading(architecture_of(self.config, "config"))

    def prepare(self, scratch: Path) -> None:
        from qad.checkpoint import write_checkpoint

        (scratch / "none").mkdir()
        write_checkpoint(scratch / "model", build(self.config), targets=None, companions=scratch / "none", record={})

    def run(self, scratch: Path) -> None:
        from qad.checkpoint import load_checkpoint

        load_checkpoint(scratch / "model")


class Trained(Configuration):
    """Two optimizer steps of a random Llama against a teacher of its kind, on random tokens."""

    def __init__(
        self,
        config: dict[str, Any],
        *,
        rows: int,
        tokens: int,
        loss: str = "kl",
        checkpointing: bool = False,
        n_batches: int = 1,
    ) -> None:
        self.config, self.rows, self.tokens, self.loss = config, rows, tokens, loss
        self.checkpointing, self.n_batches = checkpointing, n_batches

    def planned(self) -> Moment:
        architecture = architecture_of(self.config, "config")
        training = Training(
            student=architecture,
            teacher=architecture if self.loss != "ce" else None,
            quantized=quantized_by(architecture, QUANTIZED),
            rows=self.rows,
            tokens=self.tokens,
            n_batches=self.n_batches,
            loss=self.loss,
            activation_checkpointing=self.checkpointing,
            is_cpu=True,
        )
        return worst(training.moments())

    def run(self, scratch: Path) -> None:
        student = build(self.config)
        teacher = build(self.config) if self.loss != "ce" else None
        targets = match(student, Recipe())
        quantize_model(student, Recipe(), {group.input_name: 8.0 for group in targets.groups})
        ids = torch.randint(0, self.config["vocab_size"], (self.rows, self.tokens))
        batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
        settings = Settings(optimization=Optimization(lr=1e-6), activation_checkpointing=self.checkpointing)
        train(student, teacher, [[batch] * self.n_batches] * 2, settings, objective=Objective(self.loss))  # type: ignore[arg-type]


class Loss(Configuration):
    """The loss alone, with a vocabulary of 524,288."""

    def __init__(self, tokens: int, width: int, vocabulary: int) -> None:
        self.tokens, self.width, self.vocabulary = tokens, width, vocabulary

    def planned(self) -> Moment:
        from harness.activations import chunk_bytes

        one = Architecture("llama", self.width, self.vocabulary, 0, (), ())
        heads = 2 * BF16 * self.vocabulary * self.width
        chunk = chunk_bytes(one, loss="kl", tokens=self.tokens, chunk=CHUNK_TOKENS)
        return Moment("loss", {"heads": heads, "logits": chunk})

    def run(self, scratch: Path) -> None:
        heads = [torch.randn(self.vocabulary, self.width, dtype=torch.bfloat16) for _ in range(2)]
        hidden = [torch.randn(self.tokens, self.width, dtype=torch.bfloat16) for _ in range(2)]
        labels = torch.randint(0, self.vocabulary, (self.tokens,))
        loss, _ = chunked_loss(
            Objective("kl"),
            hidden[0].requires_grad_(),
            heads[0],
            labels,
            teacher_hidden=hidden[1],
            teacher_head=heads[1],
            n_tokens=self.tokens,
        )
        loss.backward()


class Generated(Configuration):
    """A batch of the engine in process: long prompts, a few new tokens."""

    config = config_of(256, 4, 2048, num_attention_heads=32, num_key_value_heads=32, head_dim=128)
    rows, prompt, new = 20, 1000, 3

    def planned(self) -> Moment:
        architecture = architecture_of(self.config, "config")
        return worst(Answering(model=architecture, rows=self.rows, prompt=self.prompt, new=self.new).moments())

    def run(self, scratch: Path) -> None:
        from harness.engines import Request, Sampling
        from harness.engines.hf import HfEngine
        from qad.checkpoint import Loaded

        class Words:
            def decode(self, token_ids: list[int], **named: Any) -> str:
                return " ".join(map(str, token_ids))

        loaded = Loaded(build(self.config), {"linear": "bf16", "kv_cache": "bf16"}, None)
        engine = HfEngine(loaded, Words(), eos_ids={self.config["vocab_size"] - 1}, args={"batch_size": self.rows})
        sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=self.new, until=())
        generator = torch.Generator().manual_seed(0)
        requests = [
            Request(
                token_ids=tuple(torch.randint(0, self.config["vocab_size"] - 1, (self.prompt,), generator=generator).tolist()),
                sampling=sampling,
            )
            for _ in range(self.rows)
        ]
        list(engine.answer(requests))


CONFIGURATIONS: dict[str, Callable[[], Configuration]] = {
    "load a BF16 checkpoint": Loading,
    "QAT, masters and optimizer": lambda: Trained(config_of(1024, 9, 8192), rows=1, tokens=64, loss="ce"),
    "QAD, masters, optimizer, teacher": lambda: Trained(config_of(1024, 6, 8192), rows=1, tokens=64),
    "QAD, 64 × 512 tokens": lambda: Trained(config_of(128, 4, 1024), rows=64, tokens=512),
    "QAD, 16 × 2048 tokens": lambda: Trained(config_of(128, 4, 1024), rows=16, tokens=2048),
    "QAD, 112 × 1024 tokens, checkpointing": lambda: Trained(
        config_of(128, 4, 1024), rows=112, tokens=1024, checkpointing=True
    ),
    "QAD, 6 × 512 tokens of a wider model": lambda: Trained(config_of(512, 8, 8192), rows=6, tokens=512),
    "QAD of experts, 16 × 1024 tokens": lambda: Trained(experts_of(128, 4, 1024), rows=16, tokens=1024),
    "QAD of experts, masters and optimizer": lambda: Trained(experts_of(512, 6, 4096), rows=1, tokens=64),
    "loss, 524,288 words": lambda: Loss(384, 64, 524_288),
    "KV cache, 20 × 1000 tokens": Generated,
}


def resident(kind: str) -> int:
    """VmRSS or VmHWM (the peak) in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def measure(name: str, scratch: Path) -> int:
    """The peak increase of one configuration in this process, in bytes."""
    configuration = CONFIGURATIONS[name]()
    Trained(config_of(64, 1, 64), rows=1, tokens=16, loss="kl").run(scratch)  # compiles kernels, starts threads
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    configuration.run(scratch)
    return resident("VmHWM") - before


def in_its_own_process(name: str, scratch: Path, *, as_it_is: bool) -> int:
    command = [sys.executable, __file__, "--measure", name, "--scratch", str(scratch)]
    surroundings = os.environ | ({} if as_it_is else RETURNING)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=surroundings)
    return int(json.loads(done.stdout.splitlines()[-1]))


def report(name: str, measured: list[int]) -> bool:
    """Print a row; whether the plan is within the limit."""
    need = CONFIGURATIONS[name]().planned()
    found = statistics.median(measured)
    ratio = need.total / found
    spread = "" if len(measured) == 1 else f" ({min(measured) / GIB:.2f} to {max(measured) / GIB:.2f})"
    verdict = "" if abs(ratio - 1) <= WITHIN else " OFF"
    print(f"| {name} | {need.name} | {need.total / GIB:.2f} | {found / GIB:.2f}{spread} | {ratio:.2f}{verdict} |", flush=True)
    return not verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CONFIGURATIONS, help="this configuration alone")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--as-it-is", action="store_true", help="leave malloc as the surroundings have it")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.scratch)))
        return
    print("| configuration | worst moment | planned, GiB | measured increase, GiB | planned / measured |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    is_good = True
    for name in [options.only] if options.only else CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as scratch:
            CONFIGURATIONS[name]().prepare(Path(scratch))
            measured = [in_its_own_process(name, Path(scratch), as_it_is=options.as_it_is) for _ in range(options.runs)]
        is_good &= report(name, measured)
    if not is_good:
        sys.exit(f"a plan is more than {WITHIN:.0%} from what was measured")


if __name__ == "__main__":
    main()
