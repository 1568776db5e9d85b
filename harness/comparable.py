"""What makes two score sets not comparable, in full sentences with both values. Nothing here compares scores.

A difference of scores is one of quantization only where everything else is alike. What has to be, is read from the records alone, and what
they do not say is not assumed. Fine are: other draws (another `sampling_seed`, where answers are drawn at all), kernels of a
quantized variant against BF16, and whatever the variants themselves are about: their quantization and training.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from harness.controls import is_control
from harness.evidence import Answers, Question, RunEvidence, pair

_JUDGE = ("path", "revision", "weights", "prompt", "engine", "kernels")
_ENGINE = {
    "engine": "kind of engine",
    "version": "version of the engine",
    "numerics": "numerics version",
    "numerics_vllm": "numerics version with vLLM",
    "device": "device",
    "packages": "packages of the engine",
    "engine_packages": "packages of vLLM",
    "vllm": "vLLM",
    "server": "server",
}
_LAYERS = {"linear": "linear layers", "linear_fp8": "FP8 layers", "experts": "experts"}
_SHOWN = 60
"""Characters of a recorded value that a sentence quotes."""


def differences(
    run: RunEvidence,
    baseline: Answers,
    candidate: Answers,
    *,
    baseline_run: RunEvidence | None = None,
    min_coverage: float = 1.0,
    may_differ: Collection[Literal["model", "activations"]] = (),
) -> list[str]:
    """Why the two must not be compared; none where they may.

    Args:
        run: of the candidate. baseline_run: of the baseline, where that is another run: then what both were asked is compared as well.
        min_coverage: the share of the asked answers, in (0, 1], that both have to have scored.
        may_differ: what the comparison itself is about: the weights that two runs are of; whether activations are quantized, and with it the
            kernel of linear layers and experts.
    """
    if baseline.is_imported != candidate.is_imported:
        own, foreign = (candidate, baseline) if baseline.is_imported else (baseline, candidate)
        return [
            f"Scored elsewhere: {foreign.variant} was scored by {foreign.row.get('scorer') or 'another tool'} and imported, {own.variant} by "
            "this harness; prompts, sampling and scorers of the two cannot be held against each other."
        ]
    first = run if baseline_run is None else baseline_run
    found = [
        *_controls(baseline, candidate),
        *_unrecorded(baseline, candidate),
        *_scoring(baseline, candidate),
        *_judges(baseline, candidate),
        *_sampling(baseline, candidate),
        *_engines(baseline, candidate),
        *_kernels(first, baseline, run, candidate, may_differ),
    ]
    if baseline_run is not None:
        found += [] if "model" in may_differ else _models(baseline_run, run)
        found += _protocols(baseline_run, run, candidate.task)
    questions = _questions(baseline, candidate)
    return found + (questions or _coverage(baseline, candidate, min_coverage))


def _controls(baseline: Answers, candidate: Answers) -> list[str]:
    if not (is_control(baseline.row) or is_control(candidate.row)):
        return []
    return [
        f"Control: {candidate.task} shows grey pictures, so its figures are no scores and a difference of them is no damage."
    ]


def _unrecorded(baseline: Answers, candidate: Answers) -> list[str]:
    """What neither side says is not taken to be the same; of scores of other tools less is known, and they have a mark."""
    if baseline.is_imported:
        return []
    found = []
    for key, what in (
        ("engine", "Engine: which one answered"),
        ("scorer", "Scorer: what scored"),
        ("version", "Version of the task: it"),
    ):
        if not any(_recorded(side, key) for side in (baseline, candidate)):
            found.append(f"{what} is recorded neither for {baseline.variant} nor for {candidate.variant}; score the run again.")
    silent = [side.variant for side in (baseline, candidate) if "judge" not in side.row]
    if silent:
        found.append(f"Judge: whether one judged is not recorded for {' and '.join(silent)}; score the run again.")
    return found


def _recorded(answers: Answers, key: str) -> bool:
    value = answers.row.get(key)
    return value.get("engine") not in (None, "") if isinstance(value, dict) else value not in (None, "")


def _scoring(baseline: Answers, candidate: Answers) -> list[str]:
    said = {
        "metric": ("Metric", baseline.metric, candidate.metric),
        "unit": ("Unit", baseline.unit, candidate.unit),
        "scorer": ("Scorer", baseline.row.get("scorer"), candidate.row.get("scorer")),
        "version": ("Version of the task", baseline.row.get("version"), candidate.row.get("version")),
        "repeats": ("Repeats of a question", baseline.repeats, candidate.repeats),
    }
    found = [_differ(what, baseline, ours, candidate, theirs) for what, ours, theirs in said.values() if ours != theirs]
    partial = [side for side in (baseline, candidate) if side.row["is_partial"]]
    if len(partial) == 1:
        whole = candidate if partial[0] is baseline else baseline
        found.append(
            f"Limit: {partial[0].variant} was asked the first questions of the task only, {whole.variant} all of them."
        )
    for side in (baseline, candidate):
        if side.unit == "share" and side.out_of_range is not None:
            wrong = next(score for score in side.out_of_range.scores if score is not None and not 0 <= score <= 1)
            found.append(
                f"Unit: {side.metric} of {side.variant} is recorded as a share and has a score of {wrong:g} (question "
                f"{side.out_of_range.doc}); score the run again."
            )
    return found


def _judges(baseline: Answers, candidate: Answers) -> list[str]:
    ours, theirs = baseline.row.get("judge"), candidate.row.get("judge")
    if (ours is None) != (theirs is None):
        judged, other = (candidate, baseline) if ours is None else (baseline, candidate)
        return [f"Judge: {judged.variant} was judged by {_short(judged.row['judge'].get('path'))}, {other.variant} by none."]
    if ours is None or theirs is None:
        return []
    keys = [key for key in _JUDGE if ours.get(key) != theirs.get(key)]
    return [_differ(f"Judge's {key}", baseline, ours.get(key), candidate, theirs.get(key)) for key in keys]


def _sampling(baseline: Answers, candidate: Answers) -> list[str]:
    """Draws may differ; drawing and not drawing may not."""
    drawn = [_is_drawn(side) for side in (baseline, candidate)]
    if drawn[0] == drawn[1] or baseline.is_imported:
        return []
    hot, greedy = (baseline, candidate) if drawn[0] else (candidate, baseline)
    return [f"Sampling: the answers of {hot.variant} were drawn with seeds, those of {greedy.variant} draw nothing (greedy)."]


def _is_drawn(answers: Answers) -> bool:
    return any(seed is not None for question in answers.questions.values() for seed in question.seeds)


def _engines(baseline: Answers, candidate: Answers) -> list[str]:
    ours, theirs = baseline.row.get("engine"), candidate.row.get("engine")
    if not ours and not theirs:
        return []
    if not ours or not theirs:
        silent, other = (candidate, baseline) if ours else (baseline, candidate)
        said = _short((other.row["engine"] or {}).get("engine"))
        return [f"Engine: which one answered for {silent.variant} is not recorded, for {other.variant} it was {said}."]
    keys = [key for key in _ENGINE if ours.get(key) != theirs.get(key)]
    found = []
    for key in keys:
        mine, yours = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(yours, dict):
            parts = [part for part in sorted({*mine, *yours}) if mine.get(part) != yours.get(part)]
            mine, yours = ({part: side.get(part) for part in parts} for side in (mine, yours))
        found.append(_differ(f"{_ENGINE[key][0].upper()}{_ENGINE[key][1:]}", baseline, mine, candidate, yours))
    return found


def _kernels(
    first: RunEvidence, baseline: Answers, run: RunEvidence, candidate: Answers, may_differ: Collection[str]
) -> list[str]:
    records = [first.variants.get(baseline.variant, {}), run.variants.get(candidate.variant, {})]
    if sum(record.get("method") == "bf16" for record in records) == 1:  # what quantization costs is what is asked
        return []
    ours, theirs = (side.row.get("kernels") or {} for side in (baseline, candidate))
    found = []
    for part in dict.fromkeys([*ours, *theirs]):
        asked = [(record.get("quantization") or {}).get("kv_cache") for record in records]
        if ours.get(part) == theirs.get(part) or (part == "kv_cache" and asked[0] != asked[1]):
            continue
        if part != "kv_cache" and "activations" in may_differ and differ_in_activations(*records):
            continue
        what = "cache of keys and values" if part == "kv_cache" else _LAYERS.get(part, part)
        found.append(
            f"Kernels: the {what} of {baseline.variant}: {_short(ours.get(part))}; of {candidate.variant}: {_short(theirs.get(part))}. "
            "Unless one of the two is BF16, the kernel has to be the same."
        )
    return found


def differ_in_activations(*records: dict[str, Any]) -> bool:
    """Whether one of these quantized variants was asked for in W4A4 and another in W4A16."""
    return len({(record.get("quantization") or {}).get("activations") for record in records}) > 1


def _models(first: RunEvidence, run: RunEvidence) -> list[str]:
    ours, theirs = (str((each.about.get("model") or {}).get("fingerprint")) for each in (first, run))
    if ours == theirs:
        return []
    return [f"Model: the run {_name(first)} is of the weights {ours[:24]}, the run {_name(run)} of {theirs[:24]}."]


def _protocols(first: RunEvidence, run: RunEvidence, task: str) -> list[str]:
    """What two runs asked for: the engine and the settings of the task."""
    found = []
    sections = {
        "engine": [(each.about.get("resolved") or {}).get("engine") or {} for each in (first, run)],
        "judge": [(each.about.get("resolved") or {}).get("judge") or {} for each in (first, run)],
        f"task {task}": [_asked(each, task) for each in (first, run)],
    }
    for what, (mine, yours) in sections.items():
        for key in sorted({*mine, *yours} - {"seed", "repeats", "path"}):
            if mine.get(key) != yours.get(key):
                found.append(
                    f"Settings of the {what}: {key} is {_short(mine.get(key))} in the run {_name(first)} and {_short(yours.get(key))} in the run "
                    f"{_name(run)}."
                )
    return found


def _asked(run: RunEvidence, task: str) -> dict[str, Any]:
    tasks = (run.about.get("resolved") or {}).get("tasks") or ()
    return next((each for each in tasks if each["name"] == task), {})


def _name(run: RunEvidence) -> str:
    return str(run.about.get("run", run.folder.name))


def _questions(baseline: Answers, candidate: Answers) -> list[str]:
    """Other questions, and the same ones asked otherwise."""
    ours, theirs = (_sources(side) for side in (baseline, candidate))
    found = []
    for side, other, mine, yours in ((baseline, candidate, ours, theirs), (candidate, baseline, theirs, ours)):
        alone = [question for key, question in mine.items() if key not in yours]
        if alone:
            found.append(
                f"Questions: {len(alone):,} of {len(mine):,} that {side.variant} was asked {other.variant} was not ({_named(alone)})."
            )
    for side in (baseline, candidate):
        unknown = [] if side.is_imported else side.without_requests
        if unknown:
            found.append(
                f"Prompts: what was asked is not recorded for {len(unknown):,} of {len(side.questions):,} questions of {side.variant} "
                f"({_named(unknown)}); score the run again."
            )
    apart = [ours[key] for key in ours if key in theirs and ours[key].cluster != theirs[key].cluster]
    if apart:
        found.append(
            f"Clusters: {len(apart):,} of {len(ours):,} questions err together with other ones for {baseline.variant} than for "
            f"{candidate.variant} ({_named(apart)}); score the run again."
        )
    otherwise = [ours[key] for key in ours if key in theirs and ours[key].requests != theirs[key].requests]
    is_known = not (baseline.without_requests or candidate.without_requests)
    if otherwise and is_known and baseline.repeats == candidate.repeats:
        found.append(
            f"Prompts: {len(otherwise):,} of {len(ours):,} questions were asked of {baseline.variant} and {candidate.variant} in other tokens "
            f"({_named(otherwise)})."
        )
    return found


def _sources(answers: Answers) -> dict[tuple[str, int], Question]:
    """By source, and which of the questions with that source."""
    found: dict[tuple[str, int], Question] = {}
    times: dict[str, int] = {}
    for question in answers.questions.values():
        times[question.question] = times.get(question.question, 0) + 1
        found[question.question, times[question.question]] = question
    return found


def _coverage(baseline: Answers, candidate: Answers, min_coverage: float) -> list[str]:
    if baseline.unit == "share":
        coverage = pair(baseline, candidate).coverage
    else:  # samples may have no scores of their own
        rows = [side.row for side in (baseline, candidate)]
        coverage = min(row["n_scored"] / row["n_total"] if row["n_total"] else 0.0 for row in rows)
    if coverage >= min_coverage:
        return []
    lacking = [f"{side.variant} lacks {_missing(side)}" for side in (baseline, candidate)]
    return [
        f"Coverage: {100 * coverage:.1f} % of the asked answers are scored by both, {100 * min_coverage:g} % are required; "
        f"{' and '.join(lacking)}."
    ]


def _missing(answers: Answers) -> str:
    reasons: dict[str, int] = {}
    for question in answers.questions.values():
        for score, reason in zip(question.scores, question.missing, strict=True):
            if score is None:
                reasons[reason or "no score of its own"] = reasons.get(reason or "no score of its own", 0) + 1
    total = sum(len(question.scores) for question in answers.questions.values())
    why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    return f"{sum(reasons.values()):,} of {total:,}" + (f" ({why})" if why else "")


def _named(questions: Sequence[Question]) -> str:
    more = f" and {len(questions) - 3:,} more" if len(questions) > 3 else ""
    return f"question{'s' if len(questions) > 1 else ''} {', '.join(str(question.doc) for question in questions[:3])}{more}"


def _differ(what: str, baseline: Answers, ours: Any, candidate: Answers, theirs: Any) -> str:
    first, second = _distinct(ours, theirs)
    return f"{what}: {first} for {baseline.variant}, {second} for {candidate.variant}."


def _distinct(ours: Any, theirs: Any) -> tuple[str, str]:
    """Both as text, not cut to the same."""
    first, second = _short(ours), _short(theirs)
    return (first, second) if first != second else (repr(ours), repr(theirs))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {part}" for key, part in sorted(value.items()))
    text = "none" if value in (None, "") else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
