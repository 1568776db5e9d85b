"""A suite becomes a list of stages, each with a key: a hash of everything that can change its result and nothing else.

No torch here, and no weights are read: `plan` answers in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import ModelError, SuiteError
from harness.judge_prompt import prompt_hash
from harness.models import Source, checkpoint_source, is_hub_id, require_kind, resolve_model
from harness.numerics import versions
from harness.provenance import PACKAGES, VLLM_PACKAGES, device_kind, package_versions, vllm_device_kind, what_opens_images
from harness.schema import Model, Quantization, Teacher
from harness.schema_data import Mix
from harness.schema_server import Endpoint, engine_identity, kinds_of
from harness.sources import TextSource, find_source, identity
from harness.store import Store
from harness.suite import ResolvedVariant, Suite
from harness.task_files import dataset_digests, fingerprint, gives_answers, metadata_of
from harness.task_settings import ResolvedTask, plain_task

_ABOUT_RECIPE = ("activations", "exclude", "exclude_layers", "fp8", "kv_cache")
"""Keys of [quantization] that calibration depends on; the rest acts later."""
_NOT_IN_TRAINING_KEY = {"checkpoint_every", "select_tasks"}
"""Keys of [training] that do not change what training makes."""
_OF_ONE_VARIANT = ("evaluate", "judge", "score", "diagnostics")
"""Kinds of stage whose results are rows of a table."""
_JUDGE = "judge"
"""Label of the judge's model, where it is no other model of the plan."""


@dataclass(frozen=True)
class Stage:
    """One unit of work. `sections` are what its result depends on beside its inputs; `label` is for people only.

    variant: whose rows it makes or whose settings it reads; a stage that several variants share names the first of them.
    source: the files behind a stage of kind "model". text: the section and files behind a stage of kind "data".
    """

    kind: str
    label: str
    sections: dict[str, Any]
    inputs: dict[str, Stage] = field(default_factory=dict)
    variant: ResolvedVariant | None = None
    task: ResolvedTask | None = None
    source: Source | None = None
    text: TextSource | None = None

    @property
    def is_external(self) -> bool:
        """Whether its files lie outside the store and stay there: a model that needs no conversion."""
        return self.source is not None and self.source.gguf is None

    @property
    def quantization(self) -> Quantization:
        """The settings of its variant, of a stage that quantizes."""
        assert self.variant is not None and self.variant.quantization is not None
        return self.variant.quantization

    @property
    def numerics(self) -> dict[str, int]:
        """The numerics versions that decide its result, by kind."""
        return {kind: versions()[kind] for kind in (self.kind, *kinds_of(self.sections.get("engine", {})))}

    @cached_property
    def key(self) -> str:
        """sha256 of kind, numerics version, packages, device kind, sections and the keys of the inputs."""
        parts: dict[str, Any] = {
            "kind": self.kind,
            "numerics": versions()[self.kind],
            "packages": package_versions(PACKAGES[self.kind]),
            "device": device_kind(),
            "sections": self.sections,
            "inputs": {role: stage.key for role, stage in self.inputs.items()},
        }
        parts |= what_opens_images(
            self.sections.get("kind") == "image-text"
        )  # of the model, which every other stage comes from
        kinds = kinds_of(self.sections.get("engine", {}))
        if "server" in kinds:
            parts["server"] = versions()["server"]
        if "vllm" in kinds:
            parts["device"] = vllm_device_kind()
            parts["vllm"] = {"numerics": versions()["vllm"], "packages": package_versions(VLLM_PACKAGES)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they are made, and where the weights come from. judge: a model that does nothing but judge."""

    suite: Suite
    source: Source
    variants: tuple[ResolvedVariant, ...]
    stages: tuple[Stage, ...]
    checkpoint_of: dict[str, Stage]
    judge: Stage | None

    @property
    def endpoints(self) -> list[Endpoint]:
        """The servers that are there already: those of variants, and the judge's."""
        judge = self.suite.judge
        given = [*(variant.endpoint for variant in self.variants), judge.endpoint if judge is not None else None]
        return [endpoint for endpoint in given if endpoint is not None]

    @property
    def digest(self) -> str:
        """Identity of everything that the plan produces, and of the names it produces it under."""
        rows = [[s.variant.name if s.variant else None, s.key] for s in self.stages]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def make_plan(suite: Suite, store: Store, *, only: tuple[str, ...] = (), missing: list[str] | None = None) -> Plan:
    """Stages for the variants of `suite`, or for those named in `only`.

    missing: where given, models and rows that are nowhere do not end the plan: what is said of them is added to it. Such a plan is to look at.
    Raises:
        SuiteError: a name in `only` that is not there.  ModelError, DataError: a model or rows that are nowhere.
    """
    names = [variant.name for variant in suite.variants]
    for name in only:
        if name not in names:
            raise SuiteError(f"{suite.path}: --only {name}: no such variant. Known: {', '.join(names)}")
    variants = tuple(variant for variant in suite.variants if not only or variant.name in only)
    source = _or_missing(lambda: resolve_model(suite.model, store), suite.model.path, missing)
    checkpoints = {v.name: _checkpoint_source(v, v.path, suite, store, missing) for v in variants if v.path is not None}
    teachers = {v.name: _teacher_source(v.name, v.teacher, store, missing) for v in variants if v.teacher is not None}
    _require_one_kind(suite, source, checkpoints, teachers)
    builder = _Builder(suite, source, checkpoints, teachers, store)
    builder.missing = missing
    builder.add_tasks()
    for name in suite.data_with_stages(variants):
        builder.add_data(name)
    checkpoint_of = {variant.name: builder.add(variant) for variant in variants}
    _require_told_apart(suite, variants, checkpoint_of)
    builder.add_verdicts()
    judge = builder.judge if builder.judge is not None and builder.judge.label == _JUDGE else None
    return Plan(suite, source, variants, tuple(builder.stages.values()), checkpoint_of, judge)


def _require_one_kind(suite: Suite, source: Source, checkpoints: dict[str, Source], teachers: dict[str, Source]) -> None:
    """ModelError for a model on this machine that is not of the suite's kind; one of the hub is looked at once it is here."""
    named = [("model.path", source)]
    named += [(f'variant "{name}": path', found) for name, found in checkpoints.items()]
    named += [(f'variant "{name}": teacher.path', found) for name, found in teachers.items()]
    for key, found in named:
        if found.folder is not None and found.gguf is None:
            require_kind(key, found.folder, suite.model.kind)


def _require_told_apart(suite: Suite, variants: tuple[ResolvedVariant, ...], checkpoint_of: dict[str, Stage]) -> None:
    """SuiteError for two endpoints that nothing but their address tells apart: the answers of one would stand for both."""
    first: dict[tuple[str, str, int | None], str] = {}
    for variant in variants:
        if variant.endpoint is None:
            continue
        identity = checkpoint_of[variant.name].key, variant.endpoint.model, variant.sampling_seed
        name = first.setdefault(identity, variant.name)
        if name != variant.name:
            raise SuiteError(
                f'{suite.path}: variants "{name}" and "{variant.name}": the same checkpoint under the same model name '
                f'"{variant.endpoint.model}" at two addresses, so the second would never be asked; serve one under another name, or '
                "remove a variant"
            )


class _Builder:
    """Collects stages; equal stages of two variants become one."""

    def __init__(
        self, suite: Suite, source: Source, checkpoints: dict[str, Source], teachers: dict[str, Source], store: Store
    ) -> None:
        self.suite, self.source, self.checkpoints, self.teachers = suite, source, checkpoints, teachers
        self.store = store
        self.missing: list[str] | None = None
        self.sources: dict[str, TextSource] = {}
        self.stages: dict[tuple[str, str | None], Stage] = {}
        kind = {} if suite.model.kind == "text" else {"kind": suite.model.kind}
        self.model = self._add(Stage("model", "model", {"fingerprint": source.fingerprint, **kind}, source=source))
        self.judge: Stage | None = None
        self._to_judge: list[Stage] = []

    def add(self, variant: ResolvedVariant) -> Stage:
        """Add what makes and measures a variant; returns the stage that makes its checkpoint."""
        checkpoint = self._checkpoint(variant)
        self._measure(variant, checkpoint)
        return checkpoint

    def add_tasks(self) -> None:
        """Add the stages that make tasks ready: before all that takes long, for a mistake in them shows there."""
        for task in self.suite.tasks:
            self._prepared(task)
        if self.suite.judge is not None:
            source = _named_source("judge", self.suite.judge.path, self.suite.judge.revision, self.store, self.missing)
            self.judge = self._add(Stage("model", _JUDGE, {"fingerprint": source.fingerprint}, source=source))

    def add_verdicts(self) -> None:
        """Add the stages that judge answers, and their scores: after all answers, so that the judge is loaded once."""
        for answers in self._to_judge:
            assert self.suite.judge is not None and self.judge is not None
            judge = self.suite.judge
            sections = judge.model_dump(exclude={"path", "revision", "endpoint"}, exclude_none=True) | {"prompt": prompt_hash()}
            sections["engine"] = engine_identity(judge.engine, judge.endpoint, is_quantized=True)
            inputs = {"answers": answers, "task": answers.inputs["task"], "judge": self.judge}
            label = f"{answers.label}: judge"
            verdicts = self._add(Stage("judge", label, sections, inputs, variant=answers.variant, task=answers.task))
            self._score(answers, {"verdicts": verdicts})

    def _score(self, answers: Stage, inputs: dict[str, Stage]) -> None:
        task = answers.task
        assert task is not None
        sections = {"asked": task.asked, **_files(task)}
        inputs = {"answers": answers, "task": answers.inputs["task"], **inputs}
        self._add(Stage("score", f"{answers.label}: score", sections, inputs, variant=answers.variant, task=task))

    def _checkpoint(self, variant: ResolvedVariant) -> Stage:
        if variant.method == "bf16":
            return self.model
        if variant.method == "checkpoint":
            source = self.checkpoints[variant.name]
            sections = {"fingerprint": source.fingerprint}
            return self._add(Stage("model", f"{variant.name}: checkpoint", sections, variant=variant, source=source))
        assert variant.quantization is not None
        start = self._quantized(variant, variant.quantization)
        if not variant.is_trained:
            return start
        return self._trained(variant, variant.quantization, start)

    def _trained(self, variant: ResolvedVariant, quantization: Quantization, start: Stage) -> Stage:
        assert variant.training is not None and variant.data is not None
        training = variant.training
        sections: dict[str, Any] = {
            "training": training.model_dump(exclude=_NOT_IN_TRAINING_KEY),
            "quantization": _without_calibration(quantization),
            "objective": variant.objective,
        }
        inputs = {
            "model": self.model,
            "calibration": start.inputs["calibration"],
            "start": start,
            "data": self.add_data(variant.data),
        }
        if variant.name in self.teachers:
            source = self.teachers[variant.name]
            label = f"{variant.name}: teacher"
            inputs["teacher"] = self._add(
                Stage("model", label, {"fingerprint": source.fingerprint}, variant=variant, source=source)
            )
        trained = self._add(Stage("train", f"{variant.name}: train", sections, inputs, variant=variant))
        if training.select != "best_of_k":
            return trained
        judged = {
            "tasks": training.select_tasks,
            "engine": engine_identity(self.suite.engine, variant.endpoint, is_quantized=True),
            "layout": quantization.layout,
        }
        inputs = inputs | {"trained": trained}  # another dictionary than that of the stage above
        for name in training.select_tasks:
            model = self.suite.model
            asked = plain_task(name, model.thinking, model.system_prompt, is_rehearsal=self.suite.is_rehearsal)
            inputs[f"task {name}"] = self._prepared(asked)
        return self._add(Stage("select", f"{variant.name}: select", judged, inputs, variant=variant))

    def _quantized(self, variant: ResolvedVariant, quantization: Quantization) -> Stage:
        calibration = quantization.calibration
        text = self.add_data(calibration.data)
        recipe = quantization.model_dump(include=set(_ABOUT_RECIPE), exclude_none=True)
        record = self._add(
            Stage(
                "calibrate",
                "calibrate",
                {
                    "recipe": recipe,
                    "samples": calibration.samples,
                    "skip_first_token": calibration.skip_first_token,
                    "second_moments": quantization.scale_weighting == "second_moment",
                },
                {"model": self.model, "data": text},
                variant=variant,
            )
        )
        settings = _without_calibration(quantization)
        del settings["block_scales"]  # about training
        limits = calibration.model_dump(include={"max_saturated", "max_overshoot"})
        sections = {"quantization": settings, **limits}
        inputs = {"model": self.model, "calibration": record, "data": text}
        return self._add(Stage("quantize", "quantize", sections, inputs, variant=variant))

    def add_data(self, name: str) -> Stage:
        """The stage of a data section; those of a mix's parts come before it."""
        if name not in self.sources:
            self.sources[name] = find_source(name, self.suite.data, self.store, missing=self.missing)
        text = self.sources[name]
        inputs = {"model": self.model}
        if isinstance(text.section, Mix):
            inputs |= {f"part{i}": self.add_data(part.data) for i, part in enumerate(text.section.parts)}
        return self._add(Stage("data", f"data {name}", identity(text), inputs, text=text))

    def _measure(self, variant: ResolvedVariant, checkpoint: Stage) -> None:
        for task in self.suite.tasks:
            answers = self._answered(variant, checkpoint, task)
            if self.judge is not None and task.path is None and metadata_of(task.own_name).get("judge"):
                self._to_judge.append(answers)
            else:
                self._score(answers, {})
        given = self.suite.diagnostics
        if given is None:
            return
        inputs = {"checkpoint": checkpoint, "model": self.model}
        sections: dict[str, Any] = {"samples": given.samples}
        if given.data is not None:
            inputs["data"] = self.add_data(given.data)
        else:
            inputs |= self._real_answers()
            sections["on"] = given.on
        self._add(Stage("diagnostics", f"{variant.name}: diagnostics", sections, inputs, variant=variant))

    def _answered(self, variant: ResolvedVariant, checkpoint: Stage, task: ResolvedTask) -> Stage:
        engine = engine_identity(self.suite.engine, variant.endpoint, is_quantized=variant.method != "bf16")
        sections: dict[str, Any] = {"engine": engine, "repeats": task.repeats, "seed": task.seed}
        if variant.sampling_seed is not None:
            sections |= {"seed": variant.sampling_seed, "batch_plan": variant.sampling_seed}
        inputs = {"checkpoint": checkpoint, "task": self._prepared(task)}
        return self._add(Stage("evaluate", f"{variant.name}: {task.name}", sections, inputs, variant=variant, task=task))

    def _real_answers(self) -> dict[str, Stage]:
        """What the BF16 model answered to the tasks whose answers are generated, but for controls, whichever variants were chosen."""
        found = {}
        for task in self.suite.tasks:
            if task.pictures == "shown" and gives_answers(task.own_name, task.path) is not False:
                found[f"task {task.name}"] = self._prepared(task)
                found[f"answers {task.name}"] = self._answered(self.suite.baseline, self.model, task)
        return found

    def _prepared(self, task: ResolvedTask) -> Stage:
        sections: dict[str, Any] = {"asked": task.asked, **_files(task)}
        if task.path is None and (dataset := metadata_of(task.own_name).get("dataset")) is not None:
            sections["dataset"] = {"name": dataset, "files": dataset_digests(dataset, self.store)}
        return self._add(Stage("prepare", f"task {task.name}", sections, {"model": self.model}, task=task))

    def _add(self, stage: Stage) -> Stage:
        """Keep the stage, or return the equal one that is there; rows of a table belong to one variant each."""
        owner = stage.variant.name if stage.variant is not None and stage.kind in _OF_ONE_VARIANT else None
        return self.stages.setdefault((stage.key, owner), stage)


def _without_calibration(quantization: Quantization) -> dict[str, Any]:
    """[quantization] with the one key of its calibration that acts after calibration."""
    return {
        **quantization.model_dump(exclude={"calibration"}, exclude_none=True),
        "headroom": quantization.calibration.headroom,
    }


def _checkpoint_source(variant: ResolvedVariant, path: str, suite: Suite, store: Store, missing: list[str] | None) -> Source:
    """The checkpoint made elsewhere that a variant is. Code of its own is run where the model's is."""
    model = Model(path=path, revision=variant.revision, trust_remote_code=suite.model.trust_remote_code)
    return _or_missing(lambda: checkpoint_source(variant.name, model, store), path, missing)


def _teacher_source(name: str, teacher: Teacher, store: Store, missing: list[str] | None) -> Source:
    where = f'variant "{name}": teacher'
    if teacher.path.startswith("package:"):
        raise SuiteError(f"{where}.path: {teacher.path}: a GGUF file cannot teach; give a checkpoint folder or a hub id")
    return _named_source(where, teacher.path, teacher.revision, store, missing)


def _named_source(section: str, path: str, revision: str | None, store: Store, missing: list[str] | None) -> Source:
    """A model that another section than [model] names."""

    def find() -> Source:
        try:
            return resolve_model(Model(path=path, revision=revision), store)
        except ModelError as error:
            raise ModelError(str(error).replace("model.", f"{section}.", 1)) from None

    return _or_missing(find, path, missing)


def _or_missing(find: Callable[[], Source], path: str, missing: list[str] | None) -> Source:
    """What `find` finds; where it is nowhere and that is only to be said, a source of nothing."""
    try:
        return find()
    except ModelError as error:
        if missing is None or not (is_hub_id(path) or (Path(path).expanduser() / "config.json").is_file()):
            raise
        missing.append(str(error))
        return Source(None, None, f"missing:{path}", "not found", wanted=Model(path=path))


def _files(task: ResolvedTask) -> dict[str, Any]:
    return {"files": fingerprint(task.own_name, task.path)}
