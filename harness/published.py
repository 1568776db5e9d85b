"""Published figures beside ours: from the `[reference]` of the suite as the run records it, as data and as cells of tables. No torch.

Each is shown with where it stands in its source and how sure it is that it was printed so.
"""

from __future__ import annotations

from typing import Any

from harness.table_cells import MISSING, number, signed

DIAGNOSTICS = "diagnostics"
"""The task of a published figure that no task has: its metric is one of the divergences, in nats a token."""
COLUMNS = ("variant: task", "published", "table", "verified", "ours", "difference")
_NATS = {"kl": "KL", "ce": "CE"}


def published_figures(about: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The published figures of a run, in the order of the suite, each with what is ours.

    Values are in points, those of the diagnostics in nats a response token (`unit`). `variant` is the name of one of ours or a method;
    ours is the variant of that name, else the only one of that method. Without one that scored the whole task as a share, by the same
    metric, `ours`, `difference` (ours less theirs) and `is_outside_band` are None; nats have no band.

    Args:
        about: the content of run.json.
        rows: those of the table.
    """
    reference = (about.get("resolved") or {}).get("reference")
    if not reference:
        return []
    found = []
    for figure in reference["figure"]:
        unit = "nats" if figure["task"] == DIAGNOSTICS else "points"
        row = _row_of(figure["variant"], rows)
        ours = None if row is None else _in_nats(figure, row) if unit == "nats" else _in_points(figure, row)
        difference = None if ours is None else ours - figure["value"]
        found.append(
            {
                **{key: figure.get(key) for key in ("variant", "task", "metric", "value", "table", "verified")},
                "unit": unit,
                "source": reference["source"],
                "band": reference["band"],
                "our_variant": None if ours is None or row is None else row["variant"],
                "ours": ours,
                "difference": difference,
                "is_outside_band": None if difference is None or unit == "nats" else abs(difference) > reference["band"],
            }
        )
    return found


def published_cells(figures: list[dict[str, Any]], names: list[str]) -> list[tuple[str, ...]]:
    """A row a variant that was published: its label, and a cell for each of the tasks `names`; figures of other metrics are not in it."""
    found = []
    plain = [figure for figure in figures if figure["metric"] is None]
    for variant in dict.fromkeys(figure["variant"] for figure in plain if figure["task"] in names):
        of_variant = {figure["task"]: figure for figure in plain if figure["variant"] == variant}
        found.append((label_of(variant), *(_cell(of_variant.get(name)) for name in names)))
    return found


def published_rows(figures: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Every published figure as a row of COLUMNS: what it is of, the value, where it stands, how sure it is, ours and ours less theirs."""
    return [
        (
            f"{figure['variant']}: {cell_of(figure)}",
            _in_unit(figure, figure["value"]),
            figure["table"] or MISSING,
            figure["verified"] or MISSING,
            MISSING if figure["ours"] is None else _in_unit(figure, figure["ours"]),
            MISSING if figure["difference"] is None else signed(figure["difference"], 3 if figure["unit"] == "nats" else 1),
        )
        for figure in figures
    ]


def published_notes(figures: list[dict[str, Any]]) -> list[str]:
    """Where published figures are from, and which of ours are far from them."""
    if not figures:
        return []
    nats = "; KL and CE in nats a token" if any(figure["unit"] == "nats" for figure in figures) else ""
    notes = [
        f"Published: {figures[0]['source'].rstrip('.')}, percent as published{nats}; difference (in brackets beside scores) is ours less "
        "theirs, in points. Verified: first-hand (read in the source), cross-checked (several accounts of it agree) or single translation."
    ]
    far = [f"{each['our_variant']} {cell_of(each)} {signed(each['difference'])}" for each in figures if each["is_outside_band"]]
    if far:
        notes.append(
            f"Suspect: {', '.join(far)} points from the published figure, the suite allows {figures[0]['band']:g}; "
            "look at prompts, sampling and thinking before anything is concluded."
        )
    return notes


def label_of(variant: str) -> str:
    """What tables call the row of a published variant."""
    return f"published {variant}"


def cell_of(figure: dict[str, Any]) -> str:
    """What a published figure is of: its task, with the metric where one is named; KL or CE."""
    metric = figure.get("metric")
    if figure["task"] == DIAGNOSTICS:
        return _NATS.get(str(metric), f"{DIAGNOSTICS} {metric}")
    return figure["task"] + (f" {metric}" if metric else "")


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return MISSING
    return f"{figure['value']:.1f}" + ("" if figure["difference"] is None else f" ({signed(figure['difference'])})")


def _in_unit(figure: dict[str, Any], value: float) -> str:
    return number(value, 3 if figure["unit"] == "nats" else 1)


def _row_of(variant: str, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the variant of that name, else of the only one of that method."""
    named = [row for row in rows if row["variant"] == variant]
    of_method = [row for row in rows if row["method"] == variant and row.get("sampling_seed") is None]
    chosen = named or (of_method if len(of_method) == 1 else [])
    return chosen[0] if chosen else None


def _in_points(figure: dict[str, Any], row: dict[str, Any]) -> float | None:
    task = row["tasks"].get(figure["task"])
    if task is None:
        return None
    metric = task["metrics"].get(figure.get("metric") or task["primary"])
    if metric is None or metric["value"] is None or metric["unit"] != "share" or task["is_partial"]:
        return None
    return 100 * float(metric["value"])


def _in_nats(figure: dict[str, Any], row: dict[str, Any]) -> float | None:
    value = ((row["diagnostics"] or {}).get("response") or {}).get(figure.get("metric"))
    return None if value is None else float(value)
