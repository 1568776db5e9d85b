"""The table of a run as CSV: plain numbers in full precision, empty where there is no figure. No torch."""

from __future__ import annotations

import csv
import io
from typing import Any

from harness.controls import is_control
from harness.published import DIAGNOSTICS, label_of
from harness.table_build import in_order

_RATIOS = ("recovery", "gap_recovered")
_AGAINST = ("delta", "delta_low", "delta_high", *(f"{ratio}{edge}" for ratio in _RATIOS for edge in ("", "_low", "_high")))
_REHEARSAL = "rehearsal"
_PUBLISHED = ("published_difference", "published_table", "published_verified")


def as_csv(table: dict[str, Any]) -> str:
    """One line a variant, a group of seeds and a published variant, whose scores are shares like ours; columns are only ever added.

    A control with grey pictures has a column that says so, and so have all lines of a rehearsal. Published figures of tasks or metrics that have no column here have their own,
    after all others.
    """
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["tasks"]))
    parts = ("value", "stderr", "n_scored", "n_total", "incomplete_rate", "chose_checkpoint", "sd_over_seeds")
    diagnostic_columns = ("kl", "kl_stderr", "kl_p50", "kl_p99", "ce", "ppl", "top1", "n_tokens", "n_sequences")
    spreads = ("kl_sd_over_seeds", "ce_sd_over_seeds", "ppl_sd_over_seeds", "top1_sd_over_seeds")
    columns = ["variant", "method", *(f"{name}.{part}" for name in names for part in parts), *diagnostic_columns]
    columns += ["checkpoint_bytes", "bits_per_weight", "tokens_trained", "group", "seed", "n_seeds", *spreads]
    columns += ["tokens_per_second", *(f"{name}.{part}" for name in names for part in (*_AGAINST, *_PUBLISHED)), "source"]
    tasks = [(name, task) for row in table["rows"] for name, task in row["tasks"].items()]
    columns += dict.fromkeys(_control(name) for name, task in tasks if is_control(task))
    published = _published(table["published"])
    columns += dict.fromkeys(key for line in published for key in line if key not in columns)
    columns += [_REHEARSAL] if table.get("rehearsal") else []
    mark = {_REHEARSAL: "true"} if table.get("rehearsal") else {}
    against = _against(table["differences"])
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row, is_group in in_order(table):
        cells = _csv_group(row) if is_group else _csv_row(row, diagnostic_columns)
        cells |= against.get(cells["variant"], {})
        writer.writerow({key: "" if value is None else value for key, value in (cells | mark).items()})
    for cells in published:
        writer.writerow({key: "" if value is None else value for key, value in (cells | mark).items()})
    return buffer.getvalue()


def _csv_row(row: dict[str, Any], diagnostic_columns: tuple[str, ...]) -> dict[str, Any]:
    cells = {key: row[key] for key in ("variant", "method", "checkpoint_bytes", "bits_per_weight", "seed", "tokens_per_second")}
    cells["group"] = row["group"] if row["group"] != row["variant"] else None
    cells["tokens_trained"] = (row["budget"] or {}).get("tokens")
    for name, task in row["tasks"].items():
        metric = task["metrics"][task["primary"]]
        cells |= {f"{name}.{part}": metric[part] for part in ("value", "stderr", "n_scored", "n_total")}
        cells |= {f"{name}.incomplete_rate": task["incomplete_rate"], f"{name}.chose_checkpoint": _claim(task)}
        cells |= {_control(name): "true"} if is_control(task) else {}
    response = row["diagnostics"]["response"] if row["diagnostics"] else {}
    return cells | {column: response.get(column) for column in diagnostic_columns}


def _csv_group(group: dict[str, Any]) -> dict[str, Any]:
    cells = {key: group[key] for key in ("method", "group", "checkpoint_bytes", "bits_per_weight", "tokens_trained")}
    cells |= {"variant": group["label"], "n_seeds": len(group["variants"])}
    for name, task in group["tasks"].items():
        metric = task["metrics"][task["primary"]]
        cells |= {f"{name}.value": metric["mean"], f"{name}.stderr": metric["stderr_over_questions"]}
        cells |= {f"{name}.sd_over_seeds": metric["sd_over_seeds"], f"{name}.chose_checkpoint": _claim(task)}
        cells |= {_control(name): "true"} if is_control(task) else {}
    for figure, found in (group["diagnostics"]["response"] if group["diagnostics"] else {}).items():
        cells |= {figure: found["mean"], f"{figure}_sd_over_seeds": found["sd_over_seeds"]}
        if figure == "kl":
            cells["kl_stderr"] = found["stderr_over_sequences"]
    return cells


def _against(differences: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By variant or label of a group, the cells of what it is against BF16: shares."""
    found: dict[str, dict[str, Any]] = {}
    for row in differences:
        if row["refused"]:
            continue
        cells = {"delta": row["delta"], "delta_low": row["low"], "delta_high": row["high"]}
        for name in _RATIOS:
            ratio = row[name] or {}
            cells |= {name: ratio.get("value"), f"{name}_low": ratio.get("low"), f"{name}_high": ratio.get("high")}
        found.setdefault(row["candidate"], {}).update({f"{row['task']}.{key}": value for key, value in cells.items()})
    return found


def _published(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a published variant: scores, and ours less theirs, as shares; KL and CE in nats."""
    lines: dict[str, dict[str, Any]] = {}
    for figure in figures:
        label, metric = label_of(figure["variant"]), figure["metric"]
        in_nats = figure["task"] == DIAGNOSTICS
        name = metric if in_nats else figure["task"] + (f".{metric}" if metric else "")
        value, difference = (x if x is None or in_nats else x / 100 for x in (figure["value"], figure["difference"]))
        line = lines.setdefault(label, {"variant": label, "method": "published", "source": figure["source"]})
        line |= {name if in_nats else f"{name}.value": value, f"{name}.published_difference": difference}
        line |= {f"{name}.published_table": figure["table"], f"{name}.published_verified": figure["verified"]}
    return list(lines.values())


def _control(name: str) -> str:
    return f"{name}.control"


def _claim(task: dict[str, Any]) -> str | None:
    return "true" if task["chose_checkpoint"] else None
