"""What a "judge" stage does: the model of [judge] says which recorded answers are right. The engine and the files; rules: `judge.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.judge import judge_answers, with_verdicts
from harness.models import folder_fingerprint
from harness.prepared import read_questions
from harness.records import SCHEMA, read_json, read_samples, write_samples
from harness.store import write_json

if TYPE_CHECKING:
    from harness.plan import Stage
    from harness.stages import Workbench


def judge(bench: Workbench, stage: Stage, folder: Path) -> dict[str, Any]:
    """Do a "judge" stage."""
    section = bench.plan.suite.judge
    assert section is not None and stage.task is not None
    model = stage.inputs["judge"]
    answers, prepared = (bench.folder_of(stage.inputs[role]) for role in ("answers", "task"))
    with bench.reporter.track(stage.label) as advance:
        found = judge_answers(
            stage.task.name,
            read_questions(prepared),
            read_samples(answers / "responses.jsonl.zst") or [],
            bench.judge_engine(model),
            weights=folder_fingerprint(bench.folder_of(model), bench.store),
            journals=bench.journals,
            max_tokens=section.max_tokens,
            thinking=section.thinking,
            model_thinking=stage.task.thinking,
            on_progress=lambda done, total: advance(done, total, ""),
        )
    about = {"path": section.path, "revision": section.revision, **found.about}
    if about["n_missing"]:
        reasons = "; ".join(about["missing_reasons"])
        bench.reporter.say(
            f"  {stage.label}: {about['n_missing']:,} verdicts are missing ({reasons}); the same command asks for them again"
        )
    write_samples(folder / "verdicts.jsonl.zst", found.rows)
    write_json(folder / "judge.json", {"schema": SCHEMA, **about})
    return {key: about[key] for key in ("seconds_answering", "prompt", "n_asked", "n_unparsable", "n_missing", "flags")}


def judged(answers: list[dict[str, Any]], engine: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of answers, and what is said of their engine, with the verdicts in `folder`."""
    about = read_json(folder / "judge.json")
    rows = with_verdicts(answers, read_samples(folder / "verdicts.jsonl.zst") or [])
    flags = [*engine["flags"], *(f"judge {flag}" for flag in about["flags"])]
    return rows, engine | {"flags": flags, "judge": {key: value for key, value in about.items() if key != "schema"}}
