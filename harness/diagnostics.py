"""What a "diagnostics" stage does: KL, CE and top-1 agreement of a variant against the BF16 model.

On text: the first sequences of the held-out split of a data section. On answers: what the BF16 model answered to the tasks
of the suite, each answer behind its prompt, over the tokens of the answer alone; by task, and by the position in the answer.

Both models run batch by batch. The teacher's last hidden states are kept for the next variant where they are few, and are
otherwise computed again beside those of each variant, so that memory does not grow with the text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from harness.answers import RecordedAnswer, recorded_answers
from harness.batches import batches_by_length, batches_of
from harness.errors import DataError
from harness.images import FOLDER
from harness.plan import Stage
from harness.prepared import read_prepared
from harness.records import SCHEMA, read_json, read_samples
from harness.store import write_json, write_text
from qad import divergence
from qad.backbone import head_of
from qad.batch import Batch
from qad.calibrate import counting_blocks
from qad.divergence import SequenceDivergence

if TYPE_CHECKING:
    from harness.stages import Workbench
    from qad.checkpoint import Loaded

TEACHER_MEMORY_BYTES = 1 << 30
"""Final hidden states of the teacher are kept for the next variant up to this size."""
POSITIONS = (0, 16, 64, 256, 1024, 4096)
"""Where the parts of an answer begin, in tokens; each ends before the next, the last one is open."""


def diagnose(bench: Workbench, stage: Stage, folder: Path) -> dict[str, Any]:
    """Do a "diagnostics" stage into `folder`; returns its record."""
    return _on_answers(bench, stage, folder) if stage.sections.get("on") == "answers" else _on_text(bench, stage, folder)


def _on_text(bench: Workbench, stage: Stage, folder: Path) -> dict[str, Any]:
    sequences = bench.sequences(stage.inputs["data"], "diagnostics", stage.sections["samples"])
    batches = batches_of(sequences, bench.reader)
    (response, everything), about = _compared(bench, stage, batches, divergence.measure)
    clusters = clusters_of([[image.digest for image in sequence.images] for sequence in sequences])
    result = {
        "schema": SCHEMA,
        "response": dataclasses.asdict(divergence.summarize(response, clusters)),
        "all": dataclasses.asdict(divergence.summarize(everything, clusters)),
        **({} if clusters is None else {"n_clusters": len(set(clusters))}),
        **about,
    }
    together = [{}] * len(response) if clusters is None else [{"cluster": cluster} for cluster in clusters]
    rows = [{"sequence": i, **together[i], **_sums(found)} for i, found in enumerate(response)]
    _write(folder, result, rows)
    return {"n_sequences": len(response)}


def clusters_of(images: Sequence[Sequence[str]]) -> list[str] | None:
    """Of each sequence, given the digests of its images, the name of those that it shares an image with, directly or through others.

    None where no sequence has an image: then each is an observation of its own, as one without images is beside others that have some.
    """
    if not any(images):
        return None
    first: dict[str, str] = {}

    def root(digest: str) -> str:
        while first[digest] != digest:
            first[digest] = first[first[digest]]
            digest = first[digest]
        return digest

    for shown in images:
        for digest in shown:
            first.setdefault(digest, digest)
            first[root(digest)] = root(shown[0])
    return [root(shown[0]) if shown else f"sequence {i}" for i, shown in enumerate(images)]


def _on_answers(bench: Workbench, stage: Stage, folder: Path) -> dict[str, Any]:
    answers, tasks = answers_of(bench, stage)
    if not answers:
        raise DataError(
            f"{stage.label}: none of the tasks {', '.join(tasks)} has an answer of the BF16 model with a token in it; "
            'diagnostics on = "answers" needs a task whose answers are generated'
        )
    _require_known_tokens(answers, len(head_of(bench.load(stage.inputs["model"]).model)))
    order, batches = batches_by_length([answer.sequence for answer in answers], bench.reader)
    measured, about = _compared(bench, stage, batches, divergence.measure_responses)
    by_place = dict(zip(order, measured, strict=True))
    found = [by_place[place] for place in range(len(answers))]
    result = {
        "schema": SCHEMA,
        "on": "answers",
        "response": _summary(answers, found),
        "all": None,
        "tasks": {
            task: {
                **_summary(*_of_task(task, answers, found)),
                **said,
                "positions": _positions(*_of_task(task, answers, found)),
            }
            for task, said in tasks.items()
            if said["n_answers"]
        },
        "positions": _positions(answers, found),
        **about,
    }
    rows = [
        {
            "sequence": i,
            **answer.about,
            **_sums(each),
            "positions": [{"from": start, **_sums(part)} for start, _, part in _parts(each)],
        }
        for i, (answer, each) in enumerate(zip(answers, found, strict=True))
    ]
    _write(folder, result, rows)
    return {"n_sequences": len(rows), "tasks": tasks}


def answers_of(bench: Workbench, stage: Stage) -> tuple[list[RecordedAnswer], dict[str, dict[str, Any]]]:
    """The answers that a stage measures on, task by task, and by task what is to be known of them."""
    answers: list[RecordedAnswer] = []
    image_token = None if bench.reader is None else bench.reader.image_token_id
    tasks: dict[str, dict[str, Any]] = {}
    for role, given in stage.inputs.items():
        kind, _, task = role.partition(" ")
        if kind != "answers":
            continue
        folder, asked = bench.folder_of(given), bench.folder_of(stage.inputs[f"task {task}"])
        rows = read_samples(folder / "responses.jsonl.zst") or []
        prepared, samples = read_prepared(asked), stage.sections["samples"]
        found, counts = recorded_answers(task, prepared, rows, samples, asked / FOLDER, image_token=image_token)
        answers += found
        engine = read_json(folder / "answers.json")
        was_text = engine["protocol"].get("token_ids") == "retokenized"  # a server gave no token ids
        tasks[task] = {**counts, "flags": [*engine["flags"], *(["retokenized"] if was_text else [])]}
    return answers, tasks


def _require_known_tokens(answers: list[RecordedAnswer], n_vocabulary: int) -> None:
    """DataError for a token that the model does not have: another tokenizer answered."""
    for answer in answers:
        if max(answer.response) >= n_vocabulary:
            raise DataError(
                f"task {answer.task}, question {answer.doc}: its answer has the token {max(answer.response)}, the model knows "
                f"{n_vocabulary}: what answered has another tokenizer; look at what the engine serves"
            )


def _compared(
    bench: Workbench, stage: Stage, batches: Sequence[Batch], measure: Callable[..., Any]
) -> tuple[Any, dict[str, Any]]:
    """What `measure` finds of the variant against the teacher on `batches`; its kernels and what its activations did."""
    given = stage.inputs["model"]
    teacher, candidate = bench.load(given), bench.load(stage.inputs["checkpoint"])
    total = len(batches) * (1 if given.key in bench.teacher_hidden else 2)
    with bench.reporter.track(stage.label) as advance:
        ticks = count(1)

        def tick() -> None:
            advance(next(ticks), total, "")

        states = _teacher_states(bench, given.key, teacher, batches, tick)
        is_same = candidate is teacher and isinstance(states, list)
        hidden = states if is_same else divergence.final_hidden(candidate.model, batches)
        heads = [head_of(loaded.model) for loaded in (candidate, teacher)]
        with counting_blocks(candidate.model) as counts:
            found = measure(hidden, heads[0], states, heads[1], batches, on_batch=tick)
    return found, {
        "kernels": candidate.kernels,
        "saturated_share": counts.saturated / counts.total if counts.total else None,
        "overshoot": counts.overshoot if counts.total else None,
        "subnormal_share": counts.subnormal / counts.total if counts.total else None,
    }


def _teacher_states(
    bench: Workbench, key: str, teacher: Loaded, batches: Sequence[Batch], tick: Callable[[], None]
) -> Iterable[Tensor]:
    """Hidden states of the teacher: those that are kept, or made as they are asked for and kept if they are few."""
    known = bench.teacher_hidden.get(key)
    if known is not None:
        return known

    def made() -> Iterator[Tensor]:
        for hidden in divergence.final_hidden(teacher.model, batches):
            yield hidden
            tick()

    head = head_of(teacher.model)
    n_bytes = sum(batch.input_ids.numel() for batch in batches) * head.shape[1] * head.element_size()
    if n_bytes > TEACHER_MEMORY_BYTES:
        return made()
    bench.teacher_hidden = {key: list(made())}
    return bench.teacher_hidden[key]


def _summary(answers: list[RecordedAnswer], found: list[SequenceDivergence]) -> dict[str, Any]:
    clusters = [(answer.task, answer.cluster) for answer in answers]
    return dataclasses.asdict(divergence.summarize(found, clusters)) | {"n_questions": len(set(clusters))}


def _of_task(
    task: str, answers: list[RecordedAnswer], found: list[SequenceDivergence]
) -> tuple[list[RecordedAnswer], list[SequenceDivergence]]:
    chosen = [i for i, answer in enumerate(answers) if answer.task == task]
    return [answers[i] for i in chosen], [found[i] for i in chosen]


def _positions(answers: list[RecordedAnswer], found: list[SequenceDivergence]) -> list[dict[str, Any]]:
    """A summary of each part of the answers that has tokens; `to` is the first position after it, None of the last part."""
    parts: dict[tuple[int, int | None], list[tuple[RecordedAnswer, SequenceDivergence]]] = {}
    for answer, each in zip(answers, found, strict=True):
        for start, end, part in _parts(each):
            parts.setdefault((start, end), []).append((answer, part))
    return [
        {"from": start, "to": end, **_summary([a for a, _ in parts[start, end]], [part for _, part in parts[start, end]])}
        for start, end in sorted(parts, key=lambda bounds: bounds[0])
    ]


def _parts(found: SequenceDivergence) -> Iterator[tuple[int, int | None, SequenceDivergence]]:
    """Where the parts of an answer begin and end, and their tokens; parts that it does not reach are left out."""
    for start, end in zip(POSITIONS, (*POSITIONS[1:], None), strict=True):
        if start < found.n_tokens:
            yield start, end, found.at(slice(start, end))


def _sums(found: SequenceDivergence) -> dict[str, Any]:
    return {"kl_sum": found.kl_sum, "n_tokens": found.n_tokens, "ce_sum": found.ce_sum, "top1_sum": found.top1_sum}


def _write(folder: Path, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    write_json(folder / "result.json", result)
    lines = (json.dumps({"schema": SCHEMA, **row}) + "\n" for row in rows)
    write_text(folder / "sequences.jsonl", "".join(lines))
