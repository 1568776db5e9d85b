"""What the stages of an evaluation do: a task is made ready, a checkpoint answers it, the answers are scored.

prepare   questions and prompts as token ids; no model is loaded
evaluate  the engine answers what the journal lacks
score     lm-eval's filters and metrics over the recorded answers; no model either
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import evaluate, prompts
from harness.aggregates import aggregate
from harness.answering import answer_requests, require_few_images, require_fit, seed_of
from harness.controls import GREY_FLAG
from harness.engines import RENDERING_UNVERIFIED, Answer, Engine, Failure, Likelihood, Outcome, Request, identity
from harness.errors import TaskError
from harness.images import FOLDER
from harness.journal import Journal
from harness.judge import METRIC, value_of
from harness.judging import judged
from harness.models import folder_fingerprint
from harness.numerics import versions
from harness.prepared import Ask, Prepared, Question, read_prepared, read_questions, write_prepared
from harness.provenance import PACKAGES, device_kind, package_versions, what_opens_images
from harness.records import SCHEMA, read_json, read_samples, write_samples
from harness.store import write_json
from harness.task_files import fingerprint
from harness.task_settings import ResolvedTask

if TYPE_CHECKING:
    from harness.plan import Stage
    from harness.stages import Workbench


_OF_THE_ENGINE = ("engine", "version", "numerics", "numerics_vllm", "device", "packages", "engine_packages", "vllm", "server")
"""What of an engine's protocol stands in a row: what it is, not how it was set up and where it is reached."""


@dataclass(frozen=True)
class Answered:
    """rows: one a (question, repeat) with what was answered. about: the engine, and how many responses are missing.

    about["generated"]: tokens and seconds of the engine where all was asked in one go; None where the journal had a part, or one is missing.
    """

    rows: list[dict[str, Any]]
    about: dict[str, Any]


def prepare(bench: Workbench, stage: Stage, folder: Path) -> dict[str, Any]:
    """Do a "prepare" stage."""
    assert stage.task is not None
    model = bench.folder_of(stage.inputs["model"])
    sees = bench.plan.suite.model.kind == "image-text"
    with bench.reporter.track(stage.label) as advance:
        prepared = prompts.prepare(
            stage.task,
            bench.processor(model) if sees else bench.tokenizer(model),
            model,
            images=folder / FOLDER,
            on_progress=lambda done, total: advance(done, total, ""),
        )
        write_prepared(folder, prepared)
    for note in prepared.about["notes"]:
        bench.reporter.say(f"  {stage.label}: {note}")
    for each in prepared.about["excluded"]:
        bench.reporter.say(f"  {stage.label}: question {each['doc']} is left out: {each['reason']}")
    return {key: prepared.about[key] for key in ("version", "n_questions", "n_requests", "excluded", "notes")}


def answer(bench: Workbench, stage: Stage, folder: Path) -> dict[str, Any]:
    """Do an "evaluate" stage."""
    checkpoint = stage.inputs["checkpoint"]
    task = bench.folder_of(stage.inputs["task"])
    prepared = read_prepared(task)
    with bench.reporter.track(stage.label) as advance:
        engine = bench.engine(stage)
        found = answer_task(
            prepared,
            engine,
            weights=folder_fingerprint(bench.folder_of(checkpoint), bench.store),
            journals=bench.journals,
            repeats=stage.sections["repeats"],
            sampling_seed=stage.sections["seed"],
            batch_plan=stage.sections.get("batch_plan"),
            images=task / FOLDER,
            on_progress=lambda done, total: advance(done, total, ""),
        )
    if found.about["n_missing"]:
        bench.reporter.say(f"  {stage.label}: {missing_line(found.about)}")
    write_samples(folder / "responses.jsonl.zst", found.rows)
    write_json(folder / "answers.json", {"schema": SCHEMA, **found.about})
    return {key: found.about[key] for key in ("seconds_answering", "generated", "backend", "flags", "n_missing")}


def check(bench: Workbench, stage: Stage) -> None:
    """Raise now what would end an "evaluate" stage after hours: a question that no context holds, one with more images than are taken, repeats that draw nothing."""
    task = bench.folder_of(stage.inputs["task"])
    about = read_json(task / "task.json")
    _require_askable(about, stage.sections["repeats"], bench.context_length(stage))
    if bench.max_images is not None:
        require_few_images(about["name"], read_prepared(task).asks, bench.max_images)


def _require_askable(about: dict[str, Any], repeats: int, context_length: int | None) -> None:
    if repeats > 1 and about["is_greedy"]:
        raise TaskError(
            f"task {about['name']}: repeats = {repeats} has no effect, its answers draw nothing (temperature 0); remove repeats or "
            "set a temperature in [sampling]"
        )
    longest = about["longest"]
    if context_length is not None:
        name = f"{about['name']}, question {longest['doc']}"
        require_fit(name, longest["prompt_tokens"], longest["answer_tokens"], context_length)


def score(bench: Workbench, stage: Stage, folder: Path) -> dict[str, Any]:
    """Do a "score" stage."""
    assert stage.task is not None
    answers, prepared = (bench.folder_of(stage.inputs[role]) for role in ("answers", "task"))
    given, engine = read_samples(answers / "responses.jsonl.zst") or [], read_json(answers / "answers.json")
    if "verdicts" in stage.inputs:
        given, engine = judged(given, engine, bench.folder_of(stage.inputs["verdicts"]))
    with bench.reporter.track(stage.label):
        rows, result = score_task(stage.task, read_json(prepared / "task.json"), read_questions(prepared), given, engine)
    write_samples(folder / "samples.jsonl.zst", rows)
    write_json(folder / "result.json", {"schema": SCHEMA, **result})
    return {"scorer": result["scorer"]}


def missing_line(about: dict[str, Any]) -> str:
    """How many responses are missing and why, and what to do."""
    reasons = "; ".join(about["missing_reasons"])
    return f"{about['n_missing']:,} responses are missing ({reasons}); the same command asks for them again"


def scorer_of(task: ResolvedTask, version: Any) -> str:
    """What scores a task: its name, version and files; of lm-eval's own the package's version."""
    digest = fingerprint(task.own_name, task.path)
    source = digest[:12] if digest is not None else f"lm-eval {package_versions(('lm-eval',))['lm-eval']}"
    return f"{task.own_name}@{version}:{source}"


def answer_task(
    prepared: Prepared,
    engine: Engine,
    *,
    weights: str,
    journals: Path,
    repeats: int,
    sampling_seed: int,
    on_progress: Callable[[int, int], None],
    batch_plan: int | None = None,
    images: Path = Path(FOLDER),
) -> Answered:
    """Ask what the journal lacks and gather all answers.

    Args:
        weights: fingerprint of what the engine serves; answers are never shared between weights.
        journals: folder in which answers are kept and found again.
        on_progress: called with (requests settled, requests in all).
        batch_plan: seed of another plan of the batches; such answers have a journal of their own, also those that are sampled.
        images: the folder of the images that the task shows.
    Raises:
        EngineError: a prompt that does not fit the context.  StoreError: the journal cannot be read or written.
        TaskError: several repeats of answers that draw nothing.
    """
    about = prepared.about
    _require_askable(about, repeats, engine.context_length)
    subtasks = {question.doc: question.subtask for question in prepared.questions}
    asked: list[tuple[Ask, int]] = []
    for repeat in range(repeats):
        for ask in prepared.asks:
            draws = about["draws"][subtasks[ask.doc]] if ask.sampling is not None else 1
            asked += [(ask, repeat * draws + draw) for draw in range(draws)]
    requests = [_request(ask, repeat, sampling_seed, images) for ask, repeat in asked]
    protocol = {
        "weights": weights,
        "task": about["name"],
        "version": about["version"],
        "kernels": engine.kernels,
        "numerics": versions()["evaluate"],
        "packages": package_versions(PACKAGES["evaluate"]),
        "device": device_kind(),
        **what_opens_images(any(request.images for request in requests)),
        **engine.protocol,
        **({} if batch_plan is None else {"batch_plan": batch_plan}),
    }
    began = time.monotonic()
    with Journal(journals, protocol) as journal:
        outcomes = _in_repeats(engine, journal, requests, on_progress, batch_plan)
    seconds = time.monotonic() - began
    is_of_one_go = journal.n_written == len({identity(request) for request in requests})
    rows = _answer_rows(prepared, repeats, [(ask, r, o) for (ask, r), o in zip(asked, outcomes, strict=True)], requests)
    if batch_plan is not None:
        rows = [row if row["seeds"] else {**row, "batch_plan": batch_plan} for row in rows]
    missing = [row["missing"] for row in rows if row["missing"] is not None]
    return Answered(
        rows,
        {
            "kernels": engine.kernels,
            "flags": [flag for flag in engine.flags if flag != RENDERING_UNVERIFIED or any(r.images for r in requests)],
            "protocol": protocol,
            "journal": f"{journal.path.parent.parent.name}/{journal.path.parent.name}/{journal.path.name}",
            "repeats": repeats,
            "sampling_seed": sampling_seed,
            "n_missing": len(missing),
            "missing_reasons": sorted(set(missing))[:5],
            "seconds_answering": seconds,
            "generated": {"n_tokens": journal.n_tokens_written, "seconds": seconds} if is_of_one_go else None,
            "backend": engine.backend,
        },
    )


def score_task(
    asking: ResolvedTask,
    about: dict[str, Any],
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    engine: dict[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sample rows and the task's result from its recorded answers; `engine` is what `answer_task` said about it."""
    scored = evaluate.score(asking, about, list(questions), list(answers))
    primary = about["primary"]
    if engine.get("judge") is not None:
        primary = METRIC
        verdicts = {(row["doc"], row["repeat"]): value_of(row["judged"]) for row in answers}
        for row in scored.rows:
            row["metrics"][METRIC] = verdicts[row["doc"], row["repeat"]]
    scorer = scorer_of(asking, about["version"])
    by_row = {(row["doc"], row["repeat"]): row for row in scored.rows}
    by_doc = {question.doc: question for question in questions}
    rows = [_sample(asking.name, scorer, by_doc[row["doc"]], row, by_row[row["doc"], row["repeat"]]) for row in answers]
    better = scored.higher_is_better | {METRIC: True}

    def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return aggregate(
            rows, primary=primary, aggregations=scored.aggregations, repeats=engine["repeats"], higher_is_better=better
        )

    found = figures(rows)
    subtasks = list(dict.fromkeys(row["subtask"] for row in rows))
    if len(subtasks) > 1:
        found["subtasks"] = {name: figures([row for row in rows if row["subtask"] == name])["metrics"] for name in subtasks}
    excluded = [{"doc": q.doc, "question": q.question, "reason": q.excluded} for q in questions if q.excluded is not None]
    return rows, found | {
        "kernels": engine["kernels"],
        "flags": list(dict.fromkeys([*engine["flags"], *([GREY_FLAG] if about.get("pictures") == "grey" else [])])),
        "engine": engine_record(engine),
        "sampling_seed": engine.get("sampling_seed"),
        "judge": engine.get("judge"),
        "is_partial": about["is_partial"],
        "version": about["version"],
        "publishable": about["publishable"],
        "notes": about["notes"],
        "excluded": excluded,
        "scorer": scorer,
    }


def engine_record(about: dict[str, Any]) -> dict[str, Any] | None:
    """Which engine answered, of which version and on what, from what `answer_task` said; None where a run does not say."""
    protocol = about.get("protocol")
    return about.get("engine") if protocol is None else {key: protocol[key] for key in _OF_THE_ENGINE if key in protocol}


def _request(ask: Ask, repeat: int, sampling_seed: int, images: Path) -> Request:
    request = ask.request(repeat, images=images)
    if ask.sampling is None or ask.sampling.temperature == 0:
        return request
    return ask.request(repeat, seed_of(sampling_seed, request.hash, repeat), images=images)


def _in_repeats(
    engine: Engine,
    journal: Journal,
    requests: list[Request],
    on_progress: Callable[[int, int], None],
    batch_plan: int | None,
) -> list[Outcome]:
    """All outcomes; batches that answers depend on are planned a repeat at a time, so that more repeats leave them as they are."""
    if not engine.answers_depend_on_batch:
        return answer_requests(engine, journal, requests, on_progress, batch_plan=batch_plan)
    found: dict[int, Outcome] = {}
    for repeat in sorted({request.repeat for request in requests}):
        mine = [index for index, request in enumerate(requests) if request.repeat == repeat]
        settled = len(found)

        def progress(done: int, total: int, settled: int = settled) -> None:
            on_progress(settled + done, len(requests))

        outcomes = answer_requests(engine, journal, [requests[i] for i in mine], progress, batch_plan=batch_plan)
        found |= zip(mine, outcomes, strict=True)
    return [found[index] for index in range(len(requests))]


def _answer_rows(
    prepared: Prepared, repeats: int, outcomes: list[tuple[Ask, int, Outcome]], requests: list[Request]
) -> list[dict[str, Any]]:
    """One row a (question, repeat), with everything that was answered to its requests."""
    draws = {question.doc: prepared.about["draws"][question.subtask] for question in prepared.questions}
    grouped: dict[tuple[int, int], list[tuple[Ask, Request, Outcome]]] = {}
    for (ask, number, outcome), request in zip(outcomes, requests, strict=True):
        repeat = number // draws[ask.doc] if ask.sampling is not None else number
        grouped.setdefault((ask.doc, repeat), []).append((ask, request, outcome))
    return [_answer_row(doc, repeat, members) for (doc, repeat), members in sorted(grouped.items())]


def _answer_row(doc: int, repeat: int, members: list[tuple[Ask, Request, Outcome]]) -> dict[str, Any]:
    outcomes = [outcome for _, _, outcome in members]
    reasons = [outcome.reason for outcome in outcomes if isinstance(outcome, Failure)]
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    windows: dict[int, list[Likelihood]] = {}
    for ask, _, outcome in members:
        if isinstance(outcome, Likelihood):
            windows.setdefault(ask.index, []).append(outcome)
    pairs = [[sum(part.logprob for part in parts), all(part.is_greedy for part in parts)] for parts in windows.values()]
    return {
        "doc": doc,
        "repeat": repeat,
        "requests": [request.hash for _, request, _ in members],
        **({"images": list(members[0][0].images)} if members[0][0].images else {}),
        "seed": members[0][1].seed,
        "seeds": [request.seed for _, request, _ in members if request.seed is not None],
        "stops": list(members[0][0].stops),
        "response": None if reasons else [answer.text for answer in answers] or pairs,
        "token_ids": [list(answer.token_ids) for answer in answers] if answers and not reasons else None,
        "finish_reason": [answer.finish_reason for answer in answers] if answers and not reasons else None,
        "n_tokens": sum(len(answer.token_ids) for answer in answers) if answers and not reasons else None,
        "missing": reasons[0] if reasons else None,
        "seconds": sum(outcome.seconds for outcome in outcomes if not isinstance(outcome, Failure)),
    }


def _sample(task: str, scorer: str, question: Question, answer: dict[str, Any], scored: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: value for key, value in answer.items() if key != "token_ids"},
        **{key: scored[key] for key in ("subtask", "answer", "metrics", "is_incomplete", "is_truncated")},
        "schema": SCHEMA,
        "task": task,
        "question": question.question,
        "cluster": question.cluster,
        "target": question.target,
        "scorer": scorer,
    }
