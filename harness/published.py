"""Published figures beside ours: rows of the table, from the `[reference]` of the suite as the run records it. No torch."""

from __future__ import annotations

from typing import Any

from harness.table_cells import MISSING, signed


def published_figures(about: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The published figures of a run, in the order of the suite, each with what is ours.

    Values are in points. `variant` is the name of one of ours or a method; ours is the variant of that name, else the only one of that
    method. Without one that scored the whole task as a share, `ours`, `difference` (ours less theirs) and `is_outside_band` are None.

    Args:
        about: the content of run.json.
        rows: those of the table.
    """
    reference = (about.get("resolved") or {}).get("reference")
    if not reference:
        return []
    found = []
    for figure in reference["figure"]:
        ours = _ours(figure, rows)
        difference = None if ours is None else ours["points"] - figure["value"]
        found.append(
            {
                **{key: figure[key] for key in ("variant", "task", "value", "table", "verified")},
                "source": reference["source"],
                "band": reference["band"],
                "our_variant": None if ours is None else ours["variant"],
                "ours": None if ours is None else ours["points"],
                "difference": difference,
                "is_outside_band": None if difference is None else abs(difference) > reference["band"],
            }
        )
    return found


def published_cells(figures: list[dict[str, Any]], names: list[str]) -> list[tuple[str, ...]]:
    """A row a variant that was published: its label, and a cell for each of the tasks `names`."""
    found = []
    for variant in dict.fromkeys(figure["variant"] for figure in figures):
        of_variant = {figure["task"]: figure for figure in figures if figure["variant"] == variant}
        found.append((label_of(variant), *(_cell(of_variant.get(name)) for name in names)))
    return found


def published_notes(figures: list[dict[str, Any]]) -> list[str]:
    """Where published figures are from and how sure they are, and which of ours are far from them."""
    if not figures:
        return []
    listed = "; ".join(
        f"{figure['variant']} {figure['task']} {figure['value']:.1f} ({figure['table'] or 'no table named'}, {figure['verified']})"
        for figure in figures
    )
    notes = [
        f"Published rows, percent as published (in brackets: ours less theirs, in points): {figures[0]['source'].rstrip('.')}: {listed}."
    ]
    far = [f"{each['our_variant']} {each['task']} {signed(each['difference'])}" for each in figures if each["is_outside_band"]]
    if far:
        notes.append(
            f"Suspect: {', '.join(far)} points from the published figure, the suite allows {figures[0]['band']:g}; "
            "look at prompts, sampling and thinking before anything is concluded."
        )
    return notes


def label_of(variant: str) -> str:
    """What tables call the row of a published variant."""
    return f"published {variant}"


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return MISSING
    return f"{figure['value']:.1f}" + ("" if figure["difference"] is None else f" ({signed(figure['difference'])})")


def _ours(figure: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    named = [row for row in rows if row["variant"] == figure["variant"]]
    of_method = [row for row in rows if row["method"] == figure["variant"] and row.get("sampling_seed") is None]
    chosen = named or (of_method if len(of_method) == 1 else [])
    task = chosen[0]["tasks"].get(figure["task"]) if chosen else None
    if task is None:
        return None
    metric = task["metrics"][task["primary"]]
    if metric["value"] is None or metric["unit"] != "share" or task["is_partial"]:
        return None
    return {"variant": chosen[0]["variant"], "points": 100 * metric["value"]}
