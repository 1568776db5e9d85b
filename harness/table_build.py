"""The table of a run as data, from the row files of the run folder alone: it can be made again after the cache is gone. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.alike import scored_alike
from harness.errors import StoreError
from harness.evidence import RunEvidence, open_run_evidence
from harness.noise_floor import noise_floors
from harness.null_variants import without_nulls
from harness.pairs import paired_kl, scale_rules
from harness.provenance import VLLM_PACKAGES
from harness.published import published_figures
from harness.records import SCHEMA, read_lines, read_samples
from harness.samples import samples_path
from harness.score_files import scores_path
from harness.seeds import merge_seeds, seed_groups
from harness.selection import selection_tasks
from harness.speed import tokens_per_second
from harness.table_differences import differences_to_baseline, without_scores
from harness.table_notes import mean_kl, native_fp4

READING_ORDER = ("bf16", "checkpoint", "ptq", "qat", "qad")
"""Methods from top to bottom; within one the order of the suite."""
_OF_A_TASK = (
    "primary",
    "kernels",
    "judge",
    "is_partial",
    "version",
    "flags",
    "repeats",
    "n_questions",
    "n_missing",
    "incomplete_rate",
    "truncated_rate",
    "mean_tokens",
    "p95_tokens",
)
"""What a table keeps of a task beside its figures."""


def build_table(run: Path) -> dict[str, Any]:
    """The table of a run folder as data; StoreError if a file of it is missing or damaged."""
    try:
        return _build_table(run)
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{run}: not a run of this version, a record lacks {error}; give a folder such as results/<suite>/<run id>"
        ) from error


def _build_table(run: Path) -> dict[str, Any]:
    evidence = open_run_evidence(run)
    about, tasks, diagnostics = evidence.about, read_lines(run / "tasks.jsonl"), read_lines(run / "diagnostics.jsonl")
    sequences = [row for rows in evidence.sequences.values() for row in rows]
    measured = {row["variant"]: {k: row[k] for k in row if k not in ("schema", "variant")} for row in diagnostics}
    rows = [
        {
            "variant": variant["name"],
            "group": variant.get("group", variant["name"]),
            "seed": variant.get("seed"),
            "training_seed": (variant.get("training") or {}).get("seed"),
            "method": variant["method"],
            "sampling_seed": variant.get("sampling_seed"),
            "tasks": _tasks_of(variant, tasks),
            "selection": variant.get("selection"),
            "diagnostics": measured.get(variant["name"]),
            "checkpoint_bytes": variant.get("checkpoint_bytes"),
            "n_weights": variant.get("n_weights"),
            "bits_per_weight": variant.get("bits_per_weight"),
            "tokens_per_second": tokens_per_second(about.get("stages", ()), variant["name"]),
            "budget": variant.get("budget"),
            "budget_asked": {key: (variant.get("training") or {}).get(key) for key in ("tokens", "batch_size")},
            "codes_changed": variant.get("codes_changed"),
        }
        for variant in sorted(about["variants"], key=_place)
    ]
    groups = seed_groups(rows, sequences, lambda variant, task: _sample_rows(evidence, variant, task))
    variants, sequences = merge_seeds(without_nulls(about["variants"]), sequences, groups)
    table = {
        "schema": SCHEMA,
        "suite": about["suite"],
        "run": about["run"],
        "status": about["status"],
        "rehearsal": bool(about.get("rehearsal")),
        "model": about["model"],
        "rows": rows,
        "seed_groups": groups,
        "native_fp4": native_fp4(rows),
        "engine": _engine(about),
        "scored_alike": scored_alike(evidence, rows),
        "differences": differences_to_baseline(evidence, groups),
        "without_scores": without_scores(evidence),
        "published": published_figures(about, rows),
        "sampling_seeds": sorted({task["seed"] for task in (about.get("resolved") or {}).get("tasks", ())}),
        "paired_kl": paired_kl(sequences, variants),
        "noise_floors": noise_floors(run, about["variants"]),
    }
    return table | {"scale_rules": scale_rules(sequences, variants, mean_kl(table))}


def _sample_rows(evidence: RunEvidence, variant: str, task: str) -> list[dict[str, Any]] | None:
    """Samples with their scores; where none are kept, of the metric that stands in the table alone; None where there are no scores either."""
    samples = read_samples(samples_path(evidence.folder, variant, task))
    if samples is not None or not scores_path(evidence.folder, variant, task).is_file():
        return samples
    answers = evidence.answers(variant, task)
    return None if answers is None else answers.sample_rows()


def in_order(table: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
    """Rows of variants and, after the last seed of each, of groups of seeds (True)."""
    last = {group["variants"][-1]: group for group in table["seed_groups"]}
    found: list[tuple[dict[str, Any], bool]] = []
    for row in table["rows"]:
        found.append((row, False))
        if row["variant"] in last:
            found.append((last[row["variant"]], True))
    return found


def _tasks_of(variant: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    judges = selection_tasks(variant)
    found: dict[str, Any] = {}
    for row in rows:
        if row["variant"] != variant["name"]:
            continue
        shared = {key: row.get(key) for key in _OF_A_TASK} | ({"pictures": row["pictures"]} if "pictures" in row else {})
        task = found.setdefault(row["task"], {**shared, "chose_checkpoint": row["task"] in judges, "metrics": {}})
        figures = {key: row[key] for key in ("value", "stderr", "n_scored", "n_total")}
        figures |= {"unit": row.get("unit", "share"), "higher_is_better": row.get("higher_is_better")}
        task["metrics"][row["metric"]] = figures
    return found


def _engine(about: dict[str, Any]) -> dict[str, Any] | None:
    """What answered by the word of run.json: kind, args, and the versions of the packages that computed; None where it does not say."""
    engine = (about.get("resolved") or {}).get("engine")
    if engine is None:
        return None
    has_own_server = (engine.get("launch") or {}).get("command") or any(each.get("endpoint") for each in about["variants"])
    names = ("torch", "transformers") if engine["kind"] == "hf" else () if has_own_server else VLLM_PACKAGES
    installed = (about.get("provenance") or {}).get("packages") or {}
    versions = {name: installed[name] for name in names if installed.get(name)}
    return {"kind": engine["kind"], "args": engine.get("args") or {}, "versions": versions}


def _place(variant: dict[str, Any]) -> int:
    method = variant["method"]
    return READING_ORDER.index(method) if method in READING_ORDER else len(READING_ORDER)
