"""What a "train" and a "select" stage do: batches by budget, the run itself with resume, the checkpoint that is kept.

Under torchrun rank 0 leads: it makes every other stage, and the other ranks take part in training alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from harness import evaluation
from harness.batches import TrainingSteps, validation_batches
from harness.errors import DataError, HarnessError
from harness.images import FOLDER
from harness.models import folder_fingerprint
from harness.plan import Stage
from harness.prepared import read_prepared
from harness.recipes import recipe_of
from harness.records import SCHEMA
from harness.schema import Quantization, Training
from harness.store import write_text
from harness.torchrun import together
from qad import distill, ranks
from qad.batch import Batch
from qad.candidates import Candidate, Candidates
from qad.checkpoint import write_checkpoint
from qad.losses import Objective
from qad.masters import names_of, restore
from qad.modules import encoding_digest
from qad.optimization import LrGroup, Optimization
from qad.packed import read_encodings
from qad.packing import allow_packing, require_packable
from qad.recipe import match
from qad.resume import Checkpoints

if TYPE_CHECKING:
    from harness.sight import TrainingView
    from harness.stages import Workbench


def train(bench: Workbench, stage: Stage, folder: Path) -> dict[str, Any]:
    """Do a "train" stage into `folder`; returns its record."""
    settings = _settings(stage)
    steps = training_steps(bench, stage)
    ranks.from_first(stage.key)
    if steps.epochs_read > 1:
        bench.reporter.say(f"  {stage.label}: the budget reads the training data {steps.epochs_read} times")
    with together(), bench.reporter.training(f"{stage.label} ({steps.n_tokens:,} tokens)", len(steps)) as view:
        outcome = _distil(bench, stage, steps, _Watcher(view))
    done = outcome.training
    bench.make_room()
    student, targets = bench.fresh_student(stage, start_of(bench, stage))
    restore(student["modules"], student["model"], outcome.chosen)
    record = {
        "start_digest": outcome.start_digest,
        "budget": steps.budget | {"lr": settings.lr},
        "trainable": {"parameters": sum(done.trainable.values()), "names": list(done.trainable)},
        "codes_changed": done.codes_changed,
        "block_scales_changed": done.block_scales_changed,
        "first_loss": done.steps[0].loss,
        "last_loss": done.steps[-1].loss,
        "saturated_weight_blocks": done.steps[-1].saturated_weight_blocks,
        "resumed_at": done.resumed_at,
        "ranks": ranks.world_size(),
        "selection": {"select": settings.select, "step": outcome.step, "steps": len(done.steps), "tasks": []},
        "quantized": list(targets.members),
        "excluded": list(targets.excluded),
    }
    record |= bench.export(stage, folder, student, targets, trained=done.trainable)
    if settings.select == "best_of_k" and outcome.candidates is not None:
        shutil.copytree(outcome.candidates.folder, folder / "candidates")
        record["candidates"] = outcome.candidates.state()
    rows = [*map(dataclasses.asdict, done.steps), *map(dataclasses.asdict, done.validations)]
    write_text(folder / "training.jsonl", "".join(json.dumps({"schema": SCHEMA, **row}) + "\n" for row in rows))
    return record


def take_part(bench: Workbench) -> None:
    """What the ranks other than 0 do: train with it, whenever it does, until it is done. HarnessError if it ends early."""
    while (key := _next_key()) is not None:
        stage = next(stage for stage in bench.plan.stages if stage.key == key)
        _distil(bench, stage, training_steps(bench, stage), _Watcher(None))


def _next_key() -> str | None:
    try:
        found: str | None = ranks.from_first(None)
    except RuntimeError as error:  # what torch makes of a closed connection
        raise HarnessError(f"rank {ranks.rank()} was left waiting: the first rank ended early and says why") from error
    return found


def select(bench: Workbench, stage: Stage, folder: Path) -> dict[str, Any]:
    """Do a "select" stage: judge each candidate on the suite's selection tasks, export the one with the best mean score."""
    trained = stage.inputs["trained"]
    found = bench.store.find(trained.key)
    assert found is not None
    kept = [Candidate(**each) for each in found.record["result"]["candidates"]]
    candidates = Candidates(found.folder / "candidates", len(kept), kept)
    judged = [
        dataclasses.asdict(candidate) | {"scores": _judge(bench, stage, trained, candidates.read(candidate), candidate)}
        for candidate in candidates.kept
    ]
    best = max(judged, key=lambda row: (sum(row["scores"].values()) / len(row["scores"]), -row["loss"]))
    bench.make_room()
    student, targets = bench.fresh_student(trained, start_of(bench, trained))
    restore(student["modules"], student["model"], candidates.read(Candidate(best["loss"], best["step"])))
    selection = {**found.record["result"]["selection"], "step": best["step"], "tasks": list(stage.sections["tasks"])}
    record = found.record["result"] | {"selection": selection | {"judged": judged}}
    return record | bench.export(trained, folder, student, targets, trained=record["trainable"]["names"])


def check(bench: Workbench, stage: Stage) -> None:
    """Raise now what would end a "train" stage after hours: too little data, another vocabulary, layers that cannot be packed."""
    steps = training_steps(bench, stage)
    steps.require_loss_tokens()
    settings, quantization = _settings(stage), stage.quantization
    if len(steps[0]) < ranks.world_size():
        raise DataError(
            f"{stage.label}: a step has {len(steps[0])} batches for {ranks.world_size()} ranks, of which each computes whole ones; set "
            f"training.micro_batch_size to {max(1, settings.batch_size // ranks.world_size())} or less, raise batch_size, or use fewer ranks"
        )
    if settings.warmup_steps >= len(steps):
        bench.reporter.say(
            f"  {stage.label}: the warm-up of {settings.warmup_steps} steps is not over after {len(steps)}: lr {settings.lr:g} is not reached"
        )
    model = bench.load(stage.inputs["model"]).model
    names = names_of(
        model,
        match(model, recipe_of(quantization, model)),
        train=settings.train,
        learned_scales=quantization.block_scales == "learned",
    )
    optimization = _run_settings(settings, quantization).optimization
    optimization.require_shareable()
    optimization.require_matches(names)
    if settings.validate_every is not None:
        bench.sequences(stage.inputs["data"], "validation", settings.validation_samples)
    if settings.packing:
        require_packable(model)


def partial_folder(bench: Workbench, stage: Stage) -> Path:
    """Where the checkpoints of an unfinished "train" stage lie."""
    return bench.store.unfinished / stage.key


def training_steps(bench: Workbench, stage: Stage) -> TrainingSteps:
    """The optimizer steps of a "train" stage; DataError where the data is too short for the budget."""
    data = stage.inputs["data"]
    try:
        sequences, seq_len = bench.sequences(data, "train", None), data.sections["data"]["seq_len"]
        return TrainingSteps(sequences, _settings(stage), seq_len=seq_len, processor=bench.reader)
    except DataError as error:
        raise DataError(f"{stage.label}, {data.label}: {error}") from None


def start_of(bench: Workbench, stage: Stage) -> dict[str, Any]:
    """What a student of a "train" stage starts from beside the recipe: the codes that PTQ chose, unless amax gives them again."""
    if stage.quantization.scale_rule == "amax":
        return {}
    return {"start": read_encodings(bench.folder_of(stage.inputs["start"]))}


@dataclasses.dataclass(frozen=True)
class _Outcome:
    start_digest: str
    training: distill.Training
    chosen: dict[str, Tensor]
    step: int
    candidates: Candidates | None


class _Watcher:
    """Shows a run, on rank 0 alone, and asks for a stop after SIGTERM."""

    def __init__(self, view: TrainingView | None) -> None:
        self._view = view
        self._stop = False

    def started(self, steps_done: int) -> None:
        if self._view is not None and steps_done:
            self._view.note(f"goes on after step {steps_done}, from the checkpoint that was kept")

    def step(self, step: distill.Step) -> None:
        if self._view is not None:
            self._view.step(dataclasses.asdict(step))

    def validation(self, validation: distill.Validation) -> None:
        if self._view is not None:
            self._view.validation(dataclasses.asdict(validation))

    def should_stop(self) -> bool:
        return self._stop

    @contextmanager
    def listening(self) -> Iterator[None]:
        def stop(*arguments: Any) -> None:
            self._stop = True

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _distil(bench: Workbench, stage: Stage, steps: TrainingSteps, watcher: _Watcher) -> _Outcome:
    """Train the student of `stage`; every rank calls this, and gets the values that are kept."""
    settings, quantization = _settings(stage), stage.quantization
    student, _ = bench.fresh_student(stage, start_of(bench, stage))
    digest = encoding_digest(student["modules"])
    bench.require_start(stage, digest)
    objective = Objective(**stage.sections["objective"])
    held_out: Sequence[Batch] = []
    teacher = None
    if settings.validate_every is not None:
        held_out = validation_batches(
            bench.sequences(stage.inputs["data"], "validation", settings.validation_samples), settings.loss_on, bench.reader
        )
    bench.keep_teacher_alone(stage)
    if objective.needs_teacher or held_out:
        teacher = bench.teacher(stage)
    else:
        bench.make_room()
    if settings.packing:
        for model in (student["model"], teacher):
            if model is not None:
                allow_packing(model)
    home = partial_folder(bench, stage)
    identity = hashlib.sha256(json.dumps([stage.key, digest]).encode()).hexdigest()
    keep = {"last": 0, "best_val": 1, "best_of_k": settings.candidates}[settings.select]
    candidates = Candidates(home / "candidates", keep) if keep else None
    with watcher.listening():
        training, masters = distill.train(
            student["model"],
            teacher,
            steps,
            _run_settings(settings, quantization),
            objective=objective,
            held_out=held_out,
            checkpoints=Checkpoints(home, identity, settings.checkpoint_every),
            candidates=candidates,
            watcher=watcher,
        )
    if candidates is None:
        return _Outcome(digest, training, masters.snapshot(), len(training.steps), None)
    ranks.barrier()
    best = candidates.kept[0]
    return _Outcome(digest, training, candidates.read(best), best.step, candidates)


def _run_settings(settings: Training, quantization: Quantization) -> distill.Settings:
    assert settings.lr is not None
    optimization = Optimization(
        lr=settings.lr,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        optimizer=settings.optimizer,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        lr_groups=tuple(LrGroup(group.match, group.lr) for group in settings.lr_groups),
    )
    return distill.Settings(
        optimization=optimization,
        train=settings.train,
        learned_scales=quantization.block_scales == "learned",
        activation_checkpointing=settings.activation_checkpointing,
        compile=settings.compile,
        max_saturated=settings.max_saturated,
        validate_every=settings.validate_every,
        seed=settings.seed,
    )


def _judge(
    bench: Workbench, stage: Stage, trained: Stage, snapshot: dict[str, Tensor], candidate: Candidate
) -> dict[str, float]:
    """Scores of one candidate on the selection tasks, by its exported checkpoint."""
    student, targets = bench.fresh_student(trained, start_of(bench, trained))
    restore(student["modules"], student["model"], snapshot)
    with tempfile.TemporaryDirectory(dir=bench.store.root, prefix=".candidate-") as temporary:
        folder = Path(temporary) / "checkpoint"
        write_checkpoint(
            folder,
            student["model"],
            targets=targets,
            companions=bench.folder_of(stage.inputs["model"]),
            record={"candidate": candidate.step},
            layout=stage.sections["layout"],
        )
        scores = {}
        for name in stage.sections["tasks"]:
            with bench.reporter.track(f"{stage.label}: step {candidate.step}, {name}") as advance:

                def progress(done: int, total: int, advance: Any = advance) -> None:
                    advance(done, total, "")

                scores[name] = _score_on(bench, stage, name, f"{stage.key}-{candidate.step}", folder, progress)
        bench.close()
        return scores


def _score_on(
    bench: Workbench, stage: Stage, name: str, key: str, folder: Path, on_progress: Callable[[int, int], None]
) -> float:
    """The score of the checkpoint in `folder` on one of the selection tasks."""
    given = stage.inputs[f"task {name}"]
    assert given.task is not None
    task = bench.folder_of(given)
    prepared = read_prepared(task)
    found = evaluation.answer_task(
        prepared,
        bench.engine_of(key, folder),
        weights=folder_fingerprint(folder, bench.store),
        journals=bench.journals,
        repeats=1,
        sampling_seed=given.task.seed,
        on_progress=on_progress,
        images=task / FOLDER,
    )
    if found.about["n_missing"]:
        raise HarnessError(f"{stage.label}: {evaluation.missing_line(found.about)}")
    _, result = evaluation.score_task(given.task, prepared.about, prepared.questions, found.rows, found.about)
    return float(result["metrics"][result["primary"]]["value"])


def _settings(stage: Stage) -> Training:
    assert stage.variant is not None and stage.variant.training is not None
    return stage.variant.training
