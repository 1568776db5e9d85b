"""Suites of a made-up wind tunnel and finished runs of them, with scores that a test chooses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sample_runs import sample, write_run

from harness.resolved import sections_of, settings_of
from harness.suite import ResolvedVariant, Suite, load_suite

TASKS = ("mini_math", "mini_recall")
SUITE = """
schema = 1
name = "{name}"

[model]
path = "made/{model}"
revision = "{revision}"

[quantization]
calibration = {{ data = "text", samples = 8 }}

[data.text]
source = "builtin"
seq_len = 512

[training]
tokens = 6000
batch_size = 4
lr = {lr}
loss_on = "assistant"
{variants}
{tasks}
[sampling]
temperature = 0.6

[engine]
kind = "hf"

[diagnostics]
data = "text"
samples = 12
"""
FOUR = {"bf16": "", "ptq": "", "qat": "seeds = [0, 1, 2]", "qad": "seeds = [0, 1, 2]"}
N_QUESTIONS, REPEATS, N_SEQUENCES = 60, 2, 20
Share = Callable[[ResolvedVariant, str], float]


def write_suite(
    folder: Path,
    name: str = "tunnel",
    *,
    variants: Mapping[str, str] = FOUR,
    tasks: tuple[str, ...] = TASKS,
    model: str = "rl",
    lr: float = 1e-3,
    more: str = "",
    task_keys: str = "repeats = 2",
) -> Path:
    """A suite file; variants: keys of each, whose method is its name up to a dash."""
    parts = [f'\n[[variant]]\nname = "{v}"\nmethod = "{v.split("-")[0]}"\n{keys}\n' for v, keys in variants.items()]
    asked = [f'[[task]]\nname = "{task}"\n{task_keys}\n' for task in tasks]
    text = SUITE.format(name=name, model=model, revision="0" * 40, lr=lr, variants="".join(parts), tasks="\n".join(asked))
    path = folder / f"{name}.toml"
    path.write_text(text + more)
    return path


def shares(values: Mapping[str, float]) -> Share:
    """The share of right answers of each variant, by the name it was declared under, in every task."""
    return lambda variant, task: values[variant.group]


def make_run(
    results: Path,
    suite_path: Path,
    share: Share,
    *,
    run: str = "20260101-000000-00000000",
    kl: Mapping[str, float] | None = None,
    n_questions: int = N_QUESTIONS,
    changes: Mapping[str, Any] | None = None,
    rows: Mapping[Any, dict[str, Any]] | None = None,
) -> Path:
    """A finished run of the suite file. share: the chance that a question is right. kl: by declared name. changes: of run.json."""
    suite = load_suite(suite_path)
    samples = {
        (variant.name, task.name): _samples(suite, variant, task.name, share(variant, task.name), n_questions)
        for variant in suite.variants
        for task in suite.tasks
    }
    about = {
        "suite": suite.name,
        "plan": "plan-" + suite.name,
        "model": {"path": suite.model.path, "fingerprint": f"hub:{suite.model.path}@{suite.model.revision}", "notes": []},
        "resolved": {**_plain(sections_of(suite)), "gate": None, "reference": None},
    }
    records = {variant.name: _plain(settings_of(variant)) | _budget(variant) for variant in suite.variants}
    sequences = [row for variant in suite.variants for row in _sequences(variant, (kl or {}).get(variant.group, 0.01))]
    kernels = {v.name: {"linear": _kernel(v), "kv_cache": "bf16"} for v in suite.variants}
    of_rows = {name: {"kernels": kernel} for name, kernel in kernels.items()}
    for key, value in (rows or {}).items():
        of_rows[key] = of_rows.get(key, {}) | value
    return write_run(
        results / suite.name / run,
        samples,
        variant_changes=records,
        about_changes=about | dict(changes or {}),
        row_changes=of_rows,
        diagnostics=[{"variant": name, "kernels": kernel} for name, kernel in kernels.items()],
        sequences=sequences,
    )


def _samples(suite: Suite, variant: ResolvedVariant, task: str, share: float, n: int) -> list[dict[str, Any]]:
    """Difficulties are of the question, luck is of variant, question and repeat; a seed moves its share by some points."""
    trained = variant.is_trained
    moved = share + (random.Random(f"{suite.name} {variant.name}").uniform(-0.02, 0.02) if trained else 0.0)
    found = []
    for doc in range(n):
        difficulty = random.Random(f"{task} {doc}").random()
        for repeat in range(REPEATS):
            luck = random.Random(f"{suite.name} {variant.name} {task} {doc} {repeat}").random()
            is_right = (difficulty if luck < 0.7 else luck) < moved
            found.append(sample(doc, float(is_right), task=task, repeat=repeat))
    return found


def _sequences(variant: ResolvedVariant, kl: float) -> list[dict[str, Any]]:
    found = []
    for number in range(N_SEQUENCES):
        n_tokens = 20 + number
        luck = random.Random(f"{variant.name} {number}").uniform(0.9, 1.1)
        value = 0.0 if variant.method == "bf16" else kl * luck
        sums = {"kl_sum": n_tokens * value, "ce_sum": n_tokens * (2 + value), "top1_sum": n_tokens * (1 - value)}
        found.append({"variant": variant.name, "sequence": number, "n_tokens": n_tokens, **sums})
    return found


def _kernel(variant: ResolvedVariant) -> str:
    if variant.quantization is None:
        return "bf16"
    return "w4a4_emulation" if variant.quantization.activations else "w4a16"


def _budget(variant: ResolvedVariant) -> dict[str, Any]:
    return {"budget": {"tokens": variant.training.tokens, "steps": 3}} if variant.training is not None else {}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
