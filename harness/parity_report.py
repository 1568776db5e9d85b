"""The lines that `harness parity` prints of its record. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def report(record: dict[str, Any], path: Path) -> list[str]:
    """The lines of the command's table."""
    kl, modules = record["kl"], record["modules"]
    n_held = sum(module["holds"] for module in modules.values())
    worst = max(modules, key=lambda name: modules[name]["worst_of_allowed"]["vllm"])
    figures = kl["kl"]
    errors = {name: "–" if kl[name] is None else f"{kl[name]:.5f}" for name in ("stderr", "floor_stderr")}
    return [
        f"checkpoint            {record['checkpoint']} ({record['fingerprint'][:16]})",
        f"kernels               vLLM {record['vllm']}: {record['kernels']['vllm']['linear']}; native FP4: {record['native_fp4']}",
        *(f"note                  {note}" for note in record["notes"]),
        f"modules that hold     {n_held} of {len(modules)}; the nearest to its limit: {worst}, "
        f"{100 * modules[worst]['worst_of_allowed']['vllm']:.0f} % of it",
        f"KL to BF16, ours      {figures['ours']['kl']:.4f}  (±{figures['ours']['kl_stderr'] or 0:.4f} over sequences)",
        f"KL to BF16, vLLM      {figures['vllm']['kl']:.4f}",
        f"difference, paired    {kl['difference']:+.5f} ± {errors['stderr']} over {kl['n_sequences']} sequences, {kl['n_tokens']:,} tokens",
        f"  ours, reordered     {kl['floor_difference']:+.5f} ± {errors['floor_stderr']}  (our own model in another order of accumulation)",
        f"KL between engines    {figures['between']['kl']:.4f}  (self-noise floor: {figures['floor']['kl']:.4f})",
        f"verdict               {record['verdict']}",
        f"stored in             {path}",
    ]
