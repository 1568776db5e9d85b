"""What stands below a table: sizes, errors, kernels, budgets, differences, what to be careful with. No torch."""

from __future__ import annotations

import json
from typing import Any

from harness.alike import alike_notes
from harness.controls import GREY_FLAG
from harness.noise_floor import noise_notes
from harness.pairs import scale_notes

SMALL_MODEL_WEIGHTS = 1_000_000_000
REHEARSED = (
    "REHEARSAL: small random models and a few made rows; these figures say that the suite works, and nothing of the model."
)
FLAGS = {
    "imported": "scored by another tool and imported; which weights and kernels answered is not proven",
    "unverified": "from an endpoint that was given; which weights and kernels answered is not proven",
    "kernels unverified": "which kernels the server computed with is not proven",
    "unverified rendering": "that the server made the prompt's tokens of the chat is proven by their number alone, not token by token",
    GREY_FLAG: "every picture was a grey one, a control of what is known without looking and no score of the task",
    "merged input scales": "the files hold several input scales for the experts of a layer, of which engines compute with the largest",
    "no fingerprint": "the endpoint gives nothing to know it by; a change of its model would not be seen",
}


def table_notes(table: dict[str, Any], names: list[str]) -> list[str]:
    """Sentences for the table as data; `names` are its tasks."""
    rows = table["rows"]
    notes = [REHEARSED] if table.get("rehearsal") else []
    notes += [f"{note}." for note in table["model"]["notes"]]
    n_weights = max((row["n_weights"] for row in rows if row["n_weights"]), default=None)
    if n_weights and n_weights < SMALL_MODEL_WEIGHTS:
        notes.append(
            f"{n_weights / 1e6:,.1f} million weights: quantization damages so small a model far more than one of a real size."
        )
    if table["status"] != "complete":
        notes.append(f"This run is {table['status']}: rows without figures are still to come.")
    if names:
        sizes = ", ".join(f"{name} {_asked(rows, name)}" for name in names)
        notes.append(f"Scores: percent ± standard error over questions, related ones as clusters; questions: {sizes}.")
    plain = [f"{name} ({metric})" for name in names if (metric := _plain_metric(rows, name))]
    if plain:
        notes.append(f"No percent, printed as it is: {', '.join(plain)}.")
    if any(row["tasks"][name]["is_partial"] for row in rows for name in row["tasks"]):
        notes.append("* partial: the suite limits this task to its first questions.")
    measured = [row for row in rows if row["diagnostics"]]
    if measured:
        notes.append(_measured_note(measured[0]["diagnostics"]))
        notes += _all_text_note(measured)
    for pair in table["paired_kl"]:
        in_errors = f", {abs(pair['difference']) / pair['stderr']:.1f} standard errors" if pair["stderr"] else ""
        over_seeds = pair["stderr_over_seeds"]
        in_errors += "" if over_seeds is None else f"; ± {over_seeds:.3f} over seeds"
        notes.append(
            f"KL {pair['candidate']} − {pair['baseline']}: {pair['difference']:+.3f} {_pm(pair['stderr'])}(paired over "
            f"{pair['n_sequences']} {pair['unit']}{in_errors})."
        )
    notes += scale_notes(table["scale_rules"], mean_kl(table))
    notes += noise_notes(table["noise_floors"])
    notes += _seed_notes(table["seed_groups"]) + _selection_notes(rows)
    notes += _flag_notes(rows)
    notes += alike_notes(table.get("scored_alike") or [])
    notes += (
        _judge_notes(rows)
        + _engine_notes(table)
        + _kernel_notes(rows)
        + _missing_notes(rows)
        + _incomplete_notes(rows)
        + _training_notes(rows)
    )
    return notes


def _asked(rows: list[dict[str, Any]], name: str) -> str:
    """How many questions a task has, and how often each was asked; several where variants differ."""
    found = []
    for task in (row["tasks"][name] for row in rows if name in row["tasks"]):
        n_questions, repeats = task["n_questions"], task["repeats"] or 1
        n = task["metrics"][task["primary"]]["n_scored"] if n_questions is None else n_questions
        found.append((n, f"{n:,} × {repeats} repeats" if repeats > 1 else f"{n:,}"))
    return "/".join(dict.fromkeys(text for _, text in sorted(found)))


def _plain_metric(rows: list[dict[str, Any]], name: str) -> str | None:
    """The first figure of a task where it is no share."""
    task = next(row["tasks"][name] for row in rows if name in row["tasks"])
    primary = str(task["primary"])
    return None if task["metrics"][primary]["unit"] == "share" else primary


def _measured_note(diagnostics: dict[str, Any]) -> str:
    """What KL and CE were measured on."""
    n = diagnostics["response"]
    what = f"KL(BF16 ‖ variant) and CE: nats a token over {n['n_tokens']:,} response tokens of {n['n_sequences']}"
    tasks = diagnostics.get("tasks")
    if tasks is None:
        n_clusters = diagnostics.get("n_clusters")
        over = "" if n_clusters in (None, n["n_sequences"]) else f", those that share an image as one ({n_clusters:,})"
        return f"{what} held-out sequences; error of KL over sequences{over}. All tokens: table.json."
    flags = sorted({flag for task in tasks.values() for flag in task["flags"]})
    flagged = f" Of these answers: {', '.join(flags)}." if flags else ""
    return (
        f"{what} BF16 answers to {n['n_questions']} questions of {', '.join(tasks)}; error of KL over questions, related ones as "
        f"clusters.{flagged} CE and top-1 by task and by position: table.json."
    )


def _all_text_note(measured: list[dict[str, Any]]) -> list[str]:
    """KL over prompts too, where images were shown: responses about images are few tokens, most of them certain."""
    found = {row["variant"]: row["diagnostics"]["all"] for row in measured if row["diagnostics"].get("n_clusters") is not None}
    listed = ", ".join(f"{name} {kl['kl']:.4f} {_pm4(kl['kl_stderr'])}" for name, kl in found.items())
    return [f"KL over all text tokens, prompts included, those that stand for an image left out: {listed}."] if found else []


def mean_kl(table: dict[str, Any]) -> dict[str, float]:
    """Mean KL over response tokens, by variant and by group of seeds, of those that were measured."""
    found = {row["variant"]: row["diagnostics"]["response"]["kl"] for row in table["rows"] if row["diagnostics"]}
    groups = {g["label"]: g["diagnostics"]["response"]["kl"]["mean"] for g in table["seed_groups"] if g["diagnostics"]}
    return found | groups


def _seed_notes(groups: list[dict[str, Any]]) -> list[str]:
    if not groups:
        return []
    seeds = "; ".join(f"{group['group']} {', '.join(map(str, group['seeds']))}" for group in groups)
    notes = [
        f"Seeds: {seeds}. The row of all seeds: mean over seeds ± its standard error over questions or sequences (seeds: standard deviation "
        "over seeds, which that error does not hold)."
    ]
    fallback = sorted(
        {f"{g['group']} {name}" for g in groups for name, task in g["tasks"].items() if task["error_is_mean_of_seeds"]}
    )
    if fallback:
        notes.append(
            f"{', '.join(fallback)}: the samples of all seeds on the same questions are not there; the error of the mean is the mean of the "
            "seeds' errors, an upper bound."
        )
    return notes


def _selection_notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    by_tasks: dict[str, list[str]] = {}
    for row in rows:
        selection = row["selection"] or {}
        chosen = [name for name, task in row["tasks"].items() if task["chose_checkpoint"]]
        if chosen:
            by_tasks.setdefault(", ".join(chosen), []).append(row["variant"])
        if selection.get("select") == "best_val":
            at = f" at step {selection['step']:,} of {selection['steps']:,}" if "step" in selection else ""
            notes.append(f"{row['variant']}: the checkpoint with the lowest validation loss{at}.")
    notes += [
        f"† {tasks}: chose the checkpoint of {', '.join(variants)} among several, so these scores are optimistic and no evidence in a gate."
        for tasks, variants in by_tasks.items()
    ]
    return notes


def _flag_notes(rows: list[dict[str, Any]]) -> list[str]:
    """What is behind the mark of scores that are not of this harness's own making from weights that it knows."""
    by_flag: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name, task in row["tasks"].items():
            for flag in task["flags"] or ():
                by_flag.setdefault(flag, {}).setdefault(name, []).append(row["variant"])
    found = [(flag, "; ".join(f"{name} of {', '.join(who)}" for name, who in tasks.items())) for flag, tasks in by_flag.items()]
    return [f"‡ {which}: {FLAGS.get(flag, flag)}." for flag, which in found]


def _judge_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Who judged which task, by which prompt, and how often its verdict was none."""
    by_judge: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for row in rows:
        for name, task in row["tasks"].items():
            if task.get("judge"):
                judge = task["judge"]
                at = f" at {judge['revision'][:12]}" if judge["revision"] else ""
                who = f"{name}: judged by {judge['path']}{at} (weights {judge['weights'][:12]}, prompt {judge['prompt']})"
                by_judge.setdefault(who, []).append((row["variant"], judge))
    notes = []
    for who, judged in by_judge.items():
        bad = [f"{name} {j['n_unparsable']} of {j['n_asked']}" for name, j in judged if j["n_unparsable"]]
        notes.append(f"{who}" + (f"; verdicts that are none, so not scored: {', '.join(bad)}." if bad else "."))
    return notes


def _engine_notes(table: dict[str, Any]) -> list[str]:
    """Which engine answered, where any task was asked here."""
    engine = table.get("engine")
    if engine is None or all(_is_imported(task) for row in table["rows"] for task in row["tasks"].values()):
        return []
    versions = [f"{name} {version}" for name, version in engine["versions"].items()]
    named = ", ".join(versions if engine["kind"] == "vllm" and versions else [engine["kind"], *versions])
    args = ", ".join(f"{key} {value}" for key, value in engine["args"].items())
    return [f"Engine: {named}{f' ({args})' if args else ''}."]


def _is_imported(task: dict[str, Any]) -> bool:
    return "imported" in (task["flags"] or ())


def _kernel_notes(rows: list[dict[str, Any]]) -> list[str]:
    linear = _by_kernel(rows, "linear")
    if not linear:
        return []
    native = native_fp4(rows)
    classes = {"experts": "Experts", "linear_fp8": "FP8 layers", "kv_cache": "KV cache"}
    others = [(what, _by_kernel(rows, part)) for part, what in classes.items()]
    return [
        " ".join(
            [
                f"Kernels of linear layers: {linear}.",
                *(f"{what}: {found}." for what, found in others if found),
                *(["Native FP4: not measured."] if native == "not measured" else []),
            ]
        )
    ]


def native_fp4(rows: list[dict[str, Any]]) -> str:
    """Whether FP4 units computed any figure, linear layers and experts alike: "measured" or "not measured"."""
    parts = [part["kernels"] for row in rows for part in (*row["tasks"].values(), row["diagnostics"]) if part]
    quantized = [[found[key] for key in ("linear", "experts") if found.get(key) not in (None, "bf16")] for found in parts]
    is_native = any(found and all("native" in kernel.split("+") for kernel in found) for found in quantized)
    return "measured" if is_native else "not measured"


def _by_kernel(rows: list[dict[str, Any]], part: str) -> str:
    """Variants by the kernel of one class of module; a BF16 cache is what everyone has and is not listed."""
    by_kernel: dict[str, list[str]] = {}
    for row in rows:
        asked = [task for task in row["tasks"].values() if not _is_imported(task)]
        measured = [found["kernels"].get(part) for found in (*asked, row["diagnostics"]) if found]
        for kernel in dict.fromkeys(measured):
            if kernel is not None and not (part == "kv_cache" and kernel == "bf16"):
                by_kernel.setdefault(kernel, []).append(row["variant"])
    return "; ".join(f"{', '.join(names)}: {kernel}" for kernel, names in by_kernel.items())


def _missing_notes(rows: list[dict[str, Any]]) -> list[str]:
    """Answers that never came; one note for those that the harness can ask for, one for those of another tool."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, task in row["tasks"].items():
            if task["n_missing"]:
                end = "" if "imported" in (task["flags"] or ()) else ": the same command asks for them again"
                n_total = task["metrics"][task["primary"]]["n_total"]
                found.setdefault(end, []).append(f"{row['variant']} {name} {task['n_missing']:,} of {n_total:,}")
    return [f"Answers that are missing, which is no 0: {', '.join(which)}{end}." for end, which in found.items()]


def _incomplete_notes(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        for name, task in row["tasks"].items():
            incomplete, cut = task["incomplete_rate"], task["truncated_rate"]
            if incomplete or cut:
                in_all = f" (cut by length, complete or not: {100 * cut:.1f} %)" if cut else ""
                found.append(f"{row['variant']} {name} {100 * (incomplete or 0):.1f} %{in_all}")
        diagnostics = row["diagnostics"] or {}
        if diagnostics.get("saturated_share"):
            overshoot = diagnostics.get("overshoot")  # runs from before it was counted have none
            factor = "" if overshoot is None else f", by up to {overshoot:.3g} times"
            found.append(
                f"{row['variant']}: {100 * diagnostics['saturated_share']:.3g} % of activation blocks saturate{factor}"
            )
    return [f"Incomplete answers (scored 0) and saturation: {'; '.join(found)}."] if found else []


def _training_notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    asked = {json.dumps(row["budget_asked"]) for row in rows if row["budget"]}
    alike: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["budget"]:
            settings = [row["group"], row["budget"]["lr"], row["budget"]["epochs_read"]]
            alike.setdefault(json.dumps(settings), []).append(row)
    for same in alike.values():
        budgets = [row["budget"] for row in same]
        again = f", data read {budgets[0]['epochs_read']} times" if budgets[0]["epochs_read"] > 1 else ""
        changed = ", ".join(f"{100 * row['codes_changed']:.1f}" for row in same)
        notes.append(
            f"{', '.join(row['variant'] for row in same)}: {_either(budgets, 'steps')} steps, {_either(budgets, 'loss_tokens')} tokens in "
            f"the loss, lr {budgets[0]['lr']:g}{again}; {changed} % of the FP4 codes differ from PTQ."
        )
    if len(asked) > 1:
        notes.append("Budgets differ between trained variants: they are not compared at equal cost.")
    return notes


def _either(budgets: list[dict[str, Any]], key: str) -> str:
    """One number where all are equal, else one each: other seeds read the texts in another order, and the last step ends elsewhere."""
    return " / ".join(dict.fromkeys(f"{budget[key]:,}" for budget in budgets))


def _pm4(stderr: float | None) -> str:
    return "" if stderr is None else f"±{stderr:.4f}"


def _pm(stderr: float | None) -> str:
    return "" if stderr is None else f"± {stderr:.3f} "
