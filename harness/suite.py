"""The suite: its TOML schema, its validation and its errors.

TOML is data here: closed keys, closed vocabularies, no includes, no expressions. All mistakes of a file are reported at
once, each with the file, the key, what was found, what is allowed and the nearest legal spelling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.data_checks import data_mistakes, data_uses, diagnostics_mistakes, with_stages
from harness.errors import SuiteError
from harness.gate_mistakes import gate_mistakes
from harness.kind_checks import IMAGE_ARGS, kind_mistakes
from harness.mistakes import Mistakes, listed
from harness.null_variants import null_mistakes
from harness.reference_checks import reference_mistakes
from harness.schema import (
    Diagnostics,
    Engine,
    File,
    Judge,
    Model,
    Quantization,
    Teacher,
    Training,
    Variant,
)
from harness.schema_data import Data, Generated
from harness.schema_gate import Gate, Reference
from harness.schema_server import CLIENT_ARGS, Endpoint, judge_mistakes, server_mistakes
from harness.task_files import known_tasks, metadata_of
from harness.task_settings import ResolvedTask, looks_mistyped, resolve_tasks, same_files
from harness.toml_file import read_toml
from harness.training_rules import RECOMMENDED_LOSS, RECOMMENDED_LR, contradictions, objective_of


@dataclass(frozen=True)
class ResolvedVariant:
    """A variant with its overrides applied. `training` and `objective` are None unless it is trained.

    group: the name it was declared under, which several seeds share. defaults: settings that a source recommended, with it.
    """

    name: str
    method: str
    quantization: Quantization | None
    training: Training | None
    data: str | None
    path: str | None
    group: str
    seed: int | None = None
    objective: dict[str, str | float] | None = None
    teacher: Teacher | None = None
    defaults: tuple[str, ...] = ()
    endpoint: Endpoint | None = None
    sampling_seed: int | None = None
    revision: str | None = None

    @property
    def is_trained(self) -> bool:
        return self.method in ("qat", "qad")


@dataclass(frozen=True)
class Suite:
    """A validated suite. `variants` are in the order in which they are made: BF16 and its nulls, made elsewhere, PTQ, trained."""

    path: Path
    name: str
    model: Model
    data: dict[str, Data]
    variants: tuple[ResolvedVariant, ...]
    tasks: tuple[ResolvedTask, ...]
    engine: Engine
    judge: Judge | None
    diagnostics: Diagnostics | None
    gate: Gate | None
    reference: Reference | None
    is_rehearsal: bool = False  # scaled down to be tried out: its figures say nothing

    @property
    def baseline(self) -> ResolvedVariant:
        """The BF16 variant that everything is measured against."""
        return next(variant for variant in self.variants if variant.method == "bf16" and variant.sampling_seed is None)

    def data_with_stages(self, variants: tuple[ResolvedVariant, ...]) -> list[str]:
        """Data sections that become token batches for some of its variants: not those that only give prompts to another."""
        return with_stages(self.data, data_uses(variants, self.diagnostics))


_POSITIVE = (lambda value: type(value) is int and value > 0, "a positive integer")
_BOOLEAN = (lambda value: type(value) is bool, "true or false")
_SHARE = (lambda value: type(value) is float and 0 < value <= 1, "a number above 0, at most 1, such as 0.9")
_GIB = (lambda value: type(value) in (int, float) and value > 0, "a positive number, in GiB")
_CACHE = (lambda value: value in ("auto", "bfloat16", "fp8"), '"auto" (what the checkpoint says), "bfloat16" or "fp8"')
_STATE = (lambda value: value in ("float32", "float16", "bfloat16"), '"float32", "float16" or "bfloat16"')
ENGINE_ARGS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "hf": {"batch_size": _POSITIVE},
    "vllm": {
        "max_model_len": _POSITIVE,
        "max_num_seqs": _POSITIVE,
        "max_num_batched_tokens": _POSITIVE,
        "tensor_parallel_size": _POSITIVE,
        "data_parallel_size": _POSITIVE,
        "gpu_memory_utilization": _SHARE,
        "kv_cache_memory_gib": _GIB,
        "kv_cache_dtype": _CACHE,
        "mamba_cache_dtype": _STATE,
        "mamba_ssm_cache_dtype": _STATE,
        "enable_prefix_caching": _BOOLEAN,
        "enforce_eager": _BOOLEAN,
        **IMAGE_ARGS,
    },
}
ENGINE_ARGS["server"] = ENGINE_ARGS["vllm"] | CLIENT_ARGS
"""The arguments of each engine: what is allowed, as a test and in words."""
_METHOD_ORDER = ("bf16", "checkpoint", "ptq", "qad", "qat")


def load_suite(path: Path) -> Suite:
    """Parse and validate the suite at `path`; SuiteError with one line a mistake, or that says which other file it is."""
    raw = read_toml(path, what="suite", example="suites/quickstart.toml")
    if "model" not in raw and "group" in raw:
        raise SuiteError(f"{path}: is a list of suites, which harness nightly takes; give one of its suites")
    if not {"model", "variant"} & set(raw) and {"kernels", "task"} <= set(raw):
        raise SuiteError(f"{path}: is a release policy, which --policy of harness plan and harness gate takes; give a suite")
    return parse_suite(path, raw)


def parse_suite(path: Path, raw: dict[str, Any]) -> Suite:
    """Validate what was read from the suite at `path`; SuiteError with one line a mistake."""
    return _Validation(path, raw).suite()


class _Validation:
    """Collects every mistake of one file."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.mistakes = Mistakes(path)

    def suite(self) -> Suite:
        file = self.mistakes.parse(File, self.raw, "")
        if file is None:
            self._check_names_raw()
            raise SuiteError("\n".join(self.mistakes.found))
        variants = self._variants(file)
        tasks = resolve_tasks(file, self.path, self.mistakes)
        for message in same_files([variant.name for variant in variants], tasks):
            self.mistakes.add("task", message)
        for key, message in null_mistakes(variants, tasks):
            self.mistakes.add(key, message)
        self._check_data_names(file, variants)
        self._check_engine(file, variants)
        for key, message in diagnostics_mistakes(file):
            self.mistakes.add(key, message)
        for key, message in kind_mistakes(file):
            self.mistakes.add(key, message)
        self._check_judge(file)
        self._check_gate(file, variants, tasks)
        if self.mistakes.found:
            raise SuiteError("\n".join(self.mistakes.found))
        return Suite(
            path=self.path,
            name=file.name,
            model=file.model,
            data=file.data,
            variants=tuple(sorted(variants, key=lambda v: (_METHOD_ORDER.index(v.method), v.sampling_seed is not None))),
            tasks=tasks,
            engine=file.engine,
            judge=file.judge,
            diagnostics=file.diagnostics,
            gate=file.gate,
            reference=file.reference,
        )

    def _variants(self, file: File) -> list[ResolvedVariant]:
        resolved: list[ResolvedVariant] = []
        for index, variant in enumerate(file.variant):
            where = f"variant[{index}]"
            trained = variant.method in ("qat", "qad")
            quantized = trained or variant.method == "ptq"
            quantization = self._section(file, "quantization", Quantization, variant.quantization, where) if quantized else None
            training = self._section(file, "training", Training, variant.training, where) if trained else None
            if quantization is not None:
                self._check_scales(quantization, where)
            if "block_scales" in variant.quantization and variant.method == "ptq":
                self.mistakes.add(
                    f"{where}.quantization.block_scales", 'has no effect with method = "ptq": it is about training; remove it'
                )
            if variant.method == "checkpoint" and variant.path is None:
                self.mistakes.add(
                    f"{where}.path",
                    'missing; method = "checkpoint" needs the folder of the checkpoint, or its hub id with a revision',
                )
            for key, allowed in (
                ("path", variant.method == "checkpoint"),
                ("revision", variant.method == "checkpoint"),
                ("data", trained),
                ("training", trained),
                ("seeds", trained),
                ("teacher", trained),
                ("loss", trained),
                ("temperature", trained),
                ("ce_weight", trained),
                ("quantization", quantized),
            ):
                if getattr(variant, key) and not allowed:
                    self.mistakes.add(f"{where}.{key}", f'has no effect with method = "{variant.method}"; remove it')
            data = variant.data or (next(iter(file.data)) if len(file.data) == 1 else None)
            if trained and data is None:
                self.mistakes.add(f"{where}.data", f"missing; say which of the data sets trains it: {listed(file.data)}")
            objective: dict[str, str | float] | None = None
            defaults: list[str] = []
            if training is not None:
                training, objective, defaults = self._trained(file, variant, training, quantization, where)
            for seed in variant.seeds or (None,):
                name = variant.name if seed is None else f"{variant.name}-seed{seed}"
                own = training if training is None or seed is None else training.model_copy(update={"seed": seed})
                resolved.append(
                    ResolvedVariant(
                        name,
                        variant.method,
                        quantization,
                        own,
                        data if trained else None,
                        variant.path,
                        variant.name,
                        seed,
                        objective,
                        variant.teacher,
                        tuple(defaults),
                        variant.endpoint,
                        variant.sampling_seed,
                        variant.revision,
                    )
                )
        for name in _repeated([variant.name for variant in resolved]):
            self.mistakes.add("variant", f'the name "{name}" is repeated; names of variants must differ')
        return resolved

    def _trained(
        self, file: File, variant: Variant, training: Training, quantization: Quantization | None, where: str
    ) -> tuple[Training, dict[str, str | float], list[str]]:
        """Training with its rate, the objective, and what was set by recommendation."""
        objective, mistakes = objective_of(variant)
        shared = "training" if not variant.training else f"{where}.training"
        for key, message in mistakes:
            self.mistakes.add(f"{where}.{key}", message)
        for key, message in contradictions(variant, training, quantization):
            self.mistakes.add(f"{shared}.{key}", message)
        for task in training.select_tasks:
            if looks_mistyped(task):
                self.mistakes.add(f"{shared}.select_tasks", f'unknown task "{task}"', near=(task, known_tasks()))
        kind, defaults = file.model.post_training, []
        has_default = kind in RECOMMENDED_LR and training.optimizer == "adamw" and training.train != "scales"
        if training.lr is None and has_default:
            lr, source = RECOMMENDED_LR[kind]
            training = training.model_copy(update={"lr": lr})
            shared_with = "" if variant.method == "qad" else "; stated for QAD, whose budget QAT shares"
            defaults.append(f"lr {lr:g} ({source}{shared_with})")
        elif training.lr is None:
            self.mistakes.add(
                f"{shared}.lr",
                f'missing; a source recommends one for model.post_training = "sft" or "rl" (here "{kind}"), with AdamW and not for '
                "scales alone",
            )
        if variant.method == "qad" and variant.loss is None and variant.teacher is None:
            defaults.append(RECOMMENDED_LOSS)
        return training, objective, defaults

    def _check_scales(self, quantization: Quantization, where: str) -> None:
        """Scale settings that contradict each other, or of which one has no effect beside the others."""
        rule, where = quantization.scale_rule, f"{where}: quantization"
        if rule != "amax" and quantization.block_scales == "recomputed":
            self.mistakes.add(
                f"{where}.block_scales",
                f'found "recomputed" with scale_rule = "{rule}": to recompute block scales is the amax rule, and the first step would '
                'undo what the rule chose; allowed: "frozen", or scale_rule = "amax"',
            )
        if rule not in ("mse", "gptq") and quantization.scale_weighting != "none":
            self.mistakes.add(
                f"{where}.scale_weighting",
                f'has no effect with scale_rule = "{rule}", only "mse" and "gptq" weigh errors; remove it',
            )
        weighs = quantization.scale_weighting != "none"
        if quantization.calibration.skip_first_token and not quantization.activations and not weighs:
            self.mistakes.add(
                f"{where}.calibration.skip_first_token", "has no effect: nothing of calibration is used in W4A16; remove it"
            )

    def _section(self, file: File, key: str, schema: type[Any], override: dict[str, Any], where: str) -> Any:
        if getattr(file, key) is None:
            self.mistakes.add(key, f"missing; {where} needs it")
            return None
        if not override:
            return getattr(file, key)
        merged = {**self.raw[key], **override}
        for inner in ("calibration",):
            if isinstance(override.get(inner), dict) and isinstance(self.raw[key].get(inner), dict):
                merged[inner] = {**self.raw[key][inner], **override[inner]}
        return self.mistakes.parse(schema, merged, f"{where}.{key}")

    def _check_data_names(self, file: File, variants: list[ResolvedVariant]) -> None:
        for key, message, near in data_mistakes(file.data, data_uses(variants, file.diagnostics)):
            self.mistakes.add(key, message, near=near)
        methods = {variant.method for variant in file.variant}
        if file.quantization and not methods & {"ptq", "qat", "qad"}:
            self.mistakes.add("quantization", "has no effect: no variant is quantized here; remove it")
        if "block_scales" in self.raw.get("quantization", {}) and not methods & {"qat", "qad"}:
            self.mistakes.add("quantization.block_scales", "has no effect: no variant is trained; remove it")
        if file.training and not methods & {"qat", "qad"}:
            self.mistakes.add("training", "has no effect: no variant is trained; remove it")

    def _check_engine(self, file: File, variants: list[ResolvedVariant]) -> None:
        engine = file.engine
        self._check_engine_args("engine.args", engine.kind, engine.args)
        for key, message in server_mistakes(file):
            self.mistakes.add(key, message)
        for name, section in file.data.items():
            if isinstance(section, Generated):
                self._check_engine_args(f"data.{name}.engine_args", section.engine, section.engine_args)
        allowed = "native, w4a4_emulation, w4a16 (harness doctor says which of them this machine can run)"
        quantized = [variant for variant in variants if variant.quantization is not None]
        has_endpoints = any(variant.endpoint is not None for variant in variants)
        if engine.kind == "hf":
            if engine.kernels is not None:
                self.mistakes.add("engine.kernels", f'has no effect with kind = "{engine.kind}"; remove it')
            return
        if engine.kernels is None and quantized and not has_endpoints:
            self.mistakes.add(
                "engine.kernels", f'missing; kind = "{engine.kind}" needs it where a variant is quantized. Allowed: {allowed}'
            )
        if engine.kernels is not None and all(variant.method == "bf16" for variant in variants):
            self.mistakes.add("engine.kernels", "has no effect: no variant is quantized; remove it")
        for variant in quantized:
            if engine.kernels == "w4a4_emulation" and variant.quantization and not variant.quantization.activations:
                self.mistakes.add(
                    "engine.kernels", f'"w4a4_emulation", but variant "{variant.name}" is W4A16 (activations = false)'
                )
        if engine.kernels == "w4a4_emulation" and engine.args.get("enforce_eager") is False:
            self.mistakes.add("engine.args.enforce_eager", "found False; the emulated kernels are not compiled; remove it")

    def _check_judge(self, file: File) -> None:
        if file.judge is None:
            return
        if not any(task.path is None and metadata_of(task.name).get("judge") for task in file.task):
            judged = [name for name in known_tasks() if metadata_of(name).get("judge")]
            self.mistakes.add("judge", f"has no effect: no task is judged; remove it, or add one of: {listed(judged)}")
        engine = file.judge.engine
        self._check_engine_args("judge.engine.args", engine.kind, engine.args)
        for key, message in judge_mistakes(file.judge):
            self.mistakes.add(f"judge.{key}", message)
        if engine.kind == "hf" and engine.kernels is not None:
            self.mistakes.add("judge.engine.kernels", f'has no effect with kind = "{engine.kind}"; remove it')

    def _check_gate(self, file: File, variants: list[ResolvedVariant], tasks: tuple[ResolvedTask, ...]) -> None:
        """[gate] and [reference] name variants and tasks that are there."""
        for key, message, near in gate_mistakes(file.gate, file.engine, variants, tasks):
            self.mistakes.add(key, message, near=near)
        for key, message, near in reference_mistakes(file.reference, variants, tasks, is_judged=file.judge is not None):
            self.mistakes.add(key, message, near=near)

    def _check_engine_args(self, where: str, kind: str, args: dict[str, Any]) -> None:
        known = ENGINE_ARGS[kind]
        for key, value in args.items():
            if key not in known:
                self.mistakes.add(f"{where}.{key}", "unknown key", near=(key, known))
            elif not known[key][0](value):
                self.mistakes.add(f"{where}.{key}", f"found {value!r}; allowed: {known[key][1]}")

    def _check_names_raw(self) -> None:
        """Name checks that can be made although the file does not parse, so that one run shows all mistakes."""
        for key in ("variant", "task"):
            tables = self.raw.get(key)
            tables = [table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []
            names = [table.get("name") for table in tables]
            shown = [n for n, table in zip(names, tables, strict=True) if table.get("pictures") != "grey"]
            for name in _repeated([n for n in shown if isinstance(n, str)]):
                self.mistakes.add(key, f'the name "{name}" is repeated')
            if key == "task":
                for index, task in enumerate(names):
                    if isinstance(task, str) and looks_mistyped(task):
                        self.mistakes.add(f"task[{index}].name", f'unknown task "{task}"', near=(task, known_tasks()))


def _repeated(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
