"""The chunked losses beside plain torch on a CPU: time and extra peak memory of one forward and backward, frozen BF16 head.

    python bench/loss_cpu.py [--tokens N] [--vocabulary N] [--hidden N] [--runs N]

Plain torch: all logits of both models, in FP32, log_softmax, the sum, backward. Equal results are asserted first. Times are
taken in turns in one process; memory in a process for each call, as the peak above what was resident before it, after a small
warm-up. Linux with glibc only: freed memory is given back first, and the peak is reset through /proc.
"""

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from qad.losses import Objective, chunked_loss

STATUS = Path("/proc/self/status")
LOSSES = ("kl", "ce")


@dataclass
class Inputs:
    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor


def build(tokens: int, vocabulary: int, width: int) -> Inputs:
    """A student near its teacher."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    head = torch.randn(vocabulary, width, generator=generator).bfloat16() * 0.1
    noise = torch.randn(tokens, width, generator=generator) * 0.1
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return Inputs(hidden.bfloat16(), head, (hidden + noise).bfloat16(), head.clone(), labels)


def plain(loss: str, x: Inputs) -> tuple[Tensor, Tensor]:
    hidden = x.hidden.detach().requires_grad_(True)
    logits = (hidden @ x.head.T).float()
    if loss == "ce":
        value = functional.cross_entropy(logits, x.labels, reduction="sum")
    else:
        with torch.no_grad():
            teacher = torch.log_softmax((x.teacher_hidden @ x.teacher_head.T).float(), dim=1)
        value = functional.kl_div(torch.log_softmax(logits, dim=1), teacher, log_target=True, reduction="sum")
    value = value / len(x.labels)
    value.backward()
    assert hidden.grad is not None
    return value.detach(), hidden.grad


def chunked(loss: str, x: Inputs) -> tuple[Tensor, Tensor]:
    hidden = x.hidden.detach().requires_grad_(True)
    teacher = {} if loss == "ce" else {"teacher_hidden": x.teacher_hidden, "teacher_head": x.teacher_head}
    value, _ = chunked_loss(Objective(loss), hidden, x.head, x.labels, **teacher, n_tokens=len(x.labels))
    value.backward()
    assert hidden.grad is not None
    return value.detach(), hidden.grad


CALLS: dict[str, Callable[[str, Inputs], tuple[Tensor, Tensor]]] = {"plain torch": plain, "chunked": chunked}


def resident(kind: str) -> int:
    """VmRSS or VmHWM (the peak) in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def extra_bytes(call: str, loss: str, shape: tuple[int, int, int]) -> int:
    """What one call needs above what was resident before it, in bytes; run in a process of its own."""
    CALLS[call](loss, build(8, 64, shape[2]))
    x = build(*shape)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory freed before would be used again, and nothing counted
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    CALLS[call](loss, x)
    return resident("VmHWM") - before


def in_its_own_process(call: str, loss: str, shape: tuple[int, int, int]) -> int:
    sizes = ["--tokens", str(shape[0]), "--vocabulary", str(shape[1]), "--hidden", str(shape[2])]
    command = [sys.executable, __file__, *sizes, "--memory-of", call, "--loss", loss]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def require_equal(loss: str, x: Inputs) -> None:
    (value, gradient), (expected, expected_gradient) = chunked(loss, x), plain(loss, x)
    error = float((gradient.float() - expected_gradient.float()).norm() / expected_gradient.float().norm())
    if not (torch.allclose(value, expected, rtol=1e-4) and error < 0.01):
        raise SystemExit(
            f"bench/loss_cpu.py: {loss}: {value} instead of {expected}, gradient {error:.1%} off; nothing was timed"
        )


def seconds(call: Callable[[str, Inputs], object], loss: str, x: Inputs) -> float:
    start = time.perf_counter()
    call(loss, x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--runs", type=int, default=7, help="runs of each call (default 7)")
    parser.add_argument("--memory-of", choices=CALLS, help="print the extra bytes of one call of --loss and end")
    parser.add_argument("--loss", choices=LOSSES, default="kl")
    arguments = parser.parse_args()
    shape = (arguments.tokens, arguments.vocabulary, arguments.hidden)
    if arguments.memory_of:
        print(extra_bytes(arguments.memory_of, arguments.loss, shape))
        return
    x = build(*shape)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {shape[0]} tokens × {shape[1]} vocabulary, hidden {shape[2]}"
    )
    print(f"{arguments.runs} runs in turns; s: median (min to max); ratio of each pair: median (min to max)\n")
    print("| loss | plain torch, s | chunked, s | time ratio | plain torch, extra MiB | chunked, extra MiB | memory ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for loss in LOSSES:
        require_equal(loss, x)
        times = [tuple(seconds(call, loss, x) for call in CALLS.values()) for _ in range(arguments.runs)]
        columns = [*zip(*times, strict=True), [ours / theirs for theirs, ours in times]]
        cells = [f"{statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})" for column in columns]
        memory = [in_its_own_process(call, loss, shape) for call in CALLS]
        cells += [f"{n_bytes / 2**20:.0f}" for n_bytes in memory] + [f"1/{memory[0] / max(1, memory[1]):.1f}"]
        print(f"| {loss} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
