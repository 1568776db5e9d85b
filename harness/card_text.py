"""The text of a model card: front matter that the hub reads, results with their errors, recipe, serving, limits. No torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.card_metadata import front_matter_of
from harness.controls import CONTROL, is_control
from harness.licence import NOT_FOUND
from harness.models import public_name
from harness.table_against import difference_text, ratio_text
from harness.table_cells import MISSING, marks, number, score_text, with_error
from harness.table_notes import FLAGS

if TYPE_CHECKING:
    from harness.card import Subject

_METHODS = {
    "ptq": "rounded to NVFP4 without training (PTQ)",
    "qat": "trained with the quantization in the loop, with cross entropy against labels (QAT)",
    "qad": "trained with the quantization in the loop, with the KL divergence to the BF16 model as its loss (QAD, arXiv 2601.20088)",
    "checkpoint": "quantized elsewhere; how is not known here",
}
_COLUMNS = ("task", "BF16", "this checkpoint", "difference, points", "recovery, %", "questions")


def card_text(subject: Subject) -> str:
    """README.md of the copy: everything in it is from the run folder, the export and the base's licence."""
    parts = (
        [f"# {subject.name}", "", *_summary(subject)],
        ["## Results", "", *_results(subject)],
        ["## How it was made", "", *_recipe(subject)],
        ["## What stayed in BF16", "", *_left_alone(subject)],
        ["## How to serve it", "", *_serving(subject)],
        ["## Licence", "", _licence(subject)],
        ["## How to make it again", "", *_reproduction(subject)],
        ["## Limits", "", *(f"- {limit}" for limit in _limits(subject))],
    )
    return "\n".join([front_matter_of(subject), "", *(line for part in parts for line in (*part, ""))])


def _summary(subject: Subject) -> list[str]:
    row, base = subject.row, subject.base_name
    size = f"{row['checkpoint_bytes'] / 1e6:,.1f} MB of weights, {row['bits_per_weight']:.2f} bits a weight"
    lines = [
        f"`{base}` in NVFP4, NVIDIA's 4-bit float format, {_METHODS[row['method']]}. {size}, scales and unquantized layers included."
    ]
    verdict = subject.verdict
    if verdict is None:
        return [*lines, "", "No release gate has judged this checkpoint."]
    reasons = "".join(f"\n- {reason}" for reason in verdict["reasons"])
    policy = str(verdict["policy"].get("source", "suite"))
    source = "the policy of its suite" if policy == "suite" else f"the policy `{Path(policy).name}`"
    return [*lines, "", f"Release gate: **{verdict['verdict']}** against {verdict['baseline']}, by {source}.{reasons}"]


def _results(subject: Subject) -> list[str]:
    rows = [_task_row(subject, name, task) for name, task in subject.row["tasks"].items()]
    table = [
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + " --- |" * len(_COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    notes = [
        "Scores: percent ± standard error over questions. Difference to BF16 and recovery (this checkpoint / BF16) are of the same questions, "
        "with 95 % intervals over them, related questions as clusters."
    ]
    notes += _refusals(subject) + _provenance_of_scores(subject) + _divergence(subject)
    return [*(table if rows else ["No task was scored."]), "", *(f"- {note}" for note in notes)]


def _task_row(subject: Subject, name: str, task: dict[str, Any]) -> tuple[str, ...]:
    baseline = subject.baseline["tasks"].get(name) if subject.baseline else None
    found = subject.differences.get(name)
    is_compared = found is not None and not found["refused"]
    metric = task["metrics"][task["primary"]]
    repeats = task["repeats"] or 1
    n = f"{task['n_questions'] or metric['n_scored']:,}" + (f" × {repeats}" if repeats > 1 else "")
    return (
        f"{name} ({CONTROL})" if is_control(task) else name,
        MISSING if baseline is None else score_text(baseline["metrics"][baseline["primary"]]) + marks(baseline),
        score_text(metric) + marks(task),
        difference_text(found) if is_compared and found else MISSING,
        ratio_text(found["recovery"]) if is_compared and found else MISSING,
        n + (f", {task['n_missing']:,} answers missing" if task["n_missing"] else ""),
    )


def _refusals(subject: Subject) -> list[str]:
    return [
        f"Not compared with BF16: {name}. {' '.join(row['refused'])}"
        for name, row in subject.differences.items()
        if row["refused"]
    ]


def _provenance_of_scores(subject: Subject) -> list[str]:
    """Kernels, seeds, and what the marks of scores mean."""
    tasks = subject.row["tasks"]
    kernels = ", ".join(dict.fromkeys(str(task["kernels"].get("linear")) for task in tasks.values()))
    seeds = sorted({str(task["seed"]) for task in subject.about["resolved"].get("tasks", ()) if "seed" in task})
    training = (subject.variant.get("training") or {}).get("seed")
    drawn = [f"sampling seed {', '.join(seeds)}"] if seeds else []
    drawn += [] if training is None else [f"training seed {training}"]
    experts = ", ".join(dict.fromkeys(str(found) for task in tasks.values() if (found := task["kernels"].get("experts"))))
    kernels += f"; experts by: {experts}" if experts else ""
    notes = (
        [f"Quantized linear layers were computed by: {kernels}" + ("; " + ", ".join(drawn) if drawn else "") + "."]
        if tasks
        else []
    )
    if any(task["is_partial"] for task in tasks.values()):
        notes.append("* partial: the first questions of the task alone.")
    if any(task["chose_checkpoint"] for task in tasks.values()):
        notes.append("† this task chose the checkpoint among several: its score is optimistic and no evidence.")
    flags = dict.fromkeys(flag for task in tasks.values() for flag in task["flags"] or ())
    notes += [f"‡ {_of_flag(tasks, flag)}: {FLAGS.get(flag, flag)}." for flag in flags]
    cut = [f"{name} {100 * task['incomplete_rate']:.1f} %" for name, task in tasks.items() if task["incomplete_rate"]]
    return notes + ([f"Incomplete answers, scored 0: {', '.join(cut)}."] if cut else [])


def _of_flag(tasks: dict[str, Any], flag: str) -> str:
    return ", ".join(name for name, task in tasks.items() if flag in (task["flags"] or ()))


def _divergence(subject: Subject) -> list[str]:
    diagnostics = subject.row["diagnostics"]
    if not diagnostics:
        return []
    found = diagnostics["response"]
    return [
        f"KL(BF16 ‖ this checkpoint) {with_error(found['kl'], found['kl_stderr'], 3)} nats a token, cross entropy {number(found['ce'], 3)}, "
        f"the BF16 model's most likely token first in {number(100 * found['top1'], 1)} %: over {found['n_tokens']:,} response tokens of "
        f"{found['n_sequences']:,} sequences."
    ]


def _recipe(subject: Subject) -> list[str]:
    variant, found = subject.variant, subject.variant.get("quantization")
    if not found:
        return ["This checkpoint was made elsewhere; its recipe is what its own configuration says."]
    calibration = found["calibration"]
    what = "weights and activations (W4A4)" if found["activations"] else "weights alone (W4A16)"
    lines = [
        f"- Quantized: {what} of {len(variant.get('quantized', ())):,} linear layers, in blocks of 16 values that share an E4M3 scale; scale "
        f"rule {found['scale_rule']}, tensor scales {found['tensor_scale']}.",
        *([f"- In FP8: {', '.join(f'`{pattern}`' for pattern in found['fp8'])}."] if found["fp8"] else []),
        f"- KV cache: {found['kv_cache'].upper()}.",
        f"- Calibrated on {calibration['samples']:,} sequences of `{calibration['data']}`{_source(subject, calibration['data'])}, headroom "
        f"{calibration['headroom']:g}.",
        f"- Layout: {subject.exported['layout']}{_relabelled(subject)}.",
    ]
    return lines + _training(subject)


def _training(subject: Subject) -> list[str]:
    variant = subject.variant
    budget, training = variant.get("budget"), variant.get("training")
    if not budget or not training:
        return ["- No training."]
    selection = variant.get("selection") or {}
    again = f", which was read {budget['epochs_read']} times" if budget["epochs_read"] > 1 else ""
    return [
        f"- Trained on `{variant['data']}`{_source(subject, variant['data'])}{again}: {budget['steps']:,} steps, {budget['tokens']:,} tokens, "
        f"{budget['loss_tokens']:,} of them in the loss ({training['loss_on']}), batches of {training['batch_size']}, lr {budget['lr']:g}, "
        f"{training['optimizer']}, {training['train']} weights.",
        f"- Loss: {_loss(variant)}. Checkpoint: {selection.get('select', 'last')}"
        + (f" (step {selection['step']:,} of {selection['steps']:,})." if "step" in selection else "."),
    ]


def _loss(variant: dict[str, Any]) -> str:
    objective = variant.get("objective") or {}
    given = (variant.get("teacher") or {}).get("path")
    teacher = public_name(given) if given else "the BF16 model itself"
    if objective.get("loss") == "ce":
        return "cross entropy against the labels"
    rest = ", ".join(f"{key} {value}" for key, value in objective.items() if key != "loss")
    return f"{objective.get('loss', 'unknown')} to {teacher}" + (f" ({rest})" if rest else "")


def _source(subject: Subject, name: str | None) -> str:
    """Where a data section of the suite comes from, in brackets."""
    section = (subject.about["resolved"].get("data") or {}).get(name) or {}
    where = public_name(section["path"]) if section.get("path") else section.get("source")
    return f" ({where})" if where else ""


def _relabelled(subject: Subject) -> str:
    scored = (subject.variant.get("quantization") or {}).get("layout")
    if scored in (None, subject.exported["layout"]):
        return ", as scored"
    changed = subject.exported["scales_changed"]
    return f"; scored as {scored}, the codes are the same" + (
        f", {changed:,} scales differ in their last bit" if changed else ""
    )


def _left_alone(subject: Subject) -> list[str]:
    excluded = _summarized(subject.variant.get("excluded") or ())
    listed = ", ".join(excluded[:20]) + (f" and {len(excluded) - 20:,} more" if len(excluded) > 20 else "")
    if not subject.variant.get("quantization"):
        return ["What the configuration of the checkpoint leaves alone."]
    lines = [
        f"Everything but the quantized linear layers: embeddings, norms{', and of the linear layers ' + listed if excluded else ''}."
    ]
    kept = subject.variant.get("kept")
    if kept:
        lines += [
            "",
            f"{kept['parameters']:,} parameter tensors are those of the BF16 model, bit for bit (sha256 `{kept['digest'][:16]}`).",
        ]
    return lines


def _summarized(names: Sequence[str]) -> list[str]:
    """Names of layers, in their order; those that differ in numbers alone, as the layers of a stack do, in one entry with their count."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return [f"`{members[0]}`" if len(members) == 1 else f"`{pattern}` ({len(members):,})" for pattern, members in alike.items()]


def _serving(subject: Subject) -> list[str]:
    found = subject.variant.get("quantization") or {}
    kernels = {str(task["kernels"].get("linear")) for task in subject.row["tasks"].values()}
    flags = ["--kv-cache-dtype", "fp8"] if found.get("kv_cache") == "fp8" else []
    flags += ["--trust-remote-code"] if subject.about["resolved"]["model"].get("trust_remote_code") else []
    flags += ["--linear-backend", "marlin"] if kernels == {"w4a16"} and found.get("activations") else []
    experts = {task["kernels"].get("experts") for task in subject.row["tasks"].values()}
    flags += ["--moe-backend", "marlin"] if experts == {"w4a16"} and found.get("activations") else []
    lines = [
        "```",
        shlex.join(["vllm", "serve", ".", "--served-model-name", subject.name, *flags]),
        "```",
        "",
        f"in this folder. vLLM finds the quantization in config.json (layout {subject.exported['layout']}); no flag names it. Native FP4 needs "
        "a GPU that has FP4 units; on others vLLM computes with 4-bit weights and 16-bit activations, which gives other numbers.",
    ]
    if "marlin" in flags:
        asked = "`--linear-backend marlin`" + (" and `--moe-backend marlin` ask" if "--moe-backend" in flags else " asks")
        lines.append(f"The scores above are of 4-bit weights with 16-bit activations, which {asked} for.")
    return lines


def _licence(subject: Subject) -> str:
    licence = subject.licence
    if licence is None:
        return f"{NOT_FOUND[0].upper()}{NOT_FOUND[1:]}."
    name = f" ({licence.name})" if licence.name else ""
    return f"That of the base model: {licence.id}{name}, as its {licence.found_in} says."


def _reproduction(subject: Subject) -> list[str]:
    about, name = subject.about, subject.variant["name"]
    git = (about.get("provenance") or {}).get("git") or {}
    version = ((about.get("provenance") or {}).get("packages") or {}).get("qad-harness")
    revision = (
        f" at {git['revision'][:12]}{', with changes that are not committed' if git.get('is_dirty') else ''}"
        if git.get("revision")
        else ""
    )
    run = f"results/{about['suite']}/<run id>"
    layout = subject.exported["layout"]
    return [
        "```",
        f"harness run {about['suite']}.toml    # the suite of run {about['run']}, plan {about['plan']}",
        f"harness export {run} --variant {name} --out DIR --layout {layout}",
        f"harness card {run} --variant {name} --out DIR",
        "```",
        "",
        f"with qad-harness {version or 'of an unknown version'}{revision}. `every_eval_ever/` holds the scores for machines.",
    ]


def _limits(subject: Subject) -> list[str]:
    kernels = {str(task["kernels"].get("linear")) for task in subject.row["tasks"].values()}
    limits = [f"{note.rstrip('.')}." for note in subject.about["model"]["notes"]]
    if any("native" not in kernel.split("+") for kernel in kernels):
        limits.append(
            f"Not scored with native FP4 kernels ({', '.join(sorted(kernels))}): those round in other places, scores may differ."
        )
    limits.append(
        "The intervals are over questions: they hold neither other prompts nor, where it was trained, another training."
    )
    limits.append("What was not measured is not known: other tasks, other languages, longer contexts, safety.")
    return limits
