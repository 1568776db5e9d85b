"""The suite: its TOML schema, its validation and its errors. The only TOML parser of the project.

TOML is data here: closed keys, closed vocabularies, no includes, no expressions. All mistakes of a file are reported at
once, each with the file, the key, what was found, what is allowed and the nearest legal spelling. What belongs to the
format but is not built yet is refused with "not available in this version".
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import SuiteError
from harness.schema import (
    NOT_AVAILABLE_KEYS,
    NOT_AVAILABLE_VALUES,
    Data,
    Diagnostics,
    Engine,
    File,
    Model,
    Quantization,
    Section,
    Task,
    Training,
)

TASKS_FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class ResolvedVariant:
    """A variant with its overrides applied. `training` is None unless it is trained."""

    name: str
    method: str
    quantization: Quantization | None
    training: Training | None
    data: str | None
    path: str | None

    @property
    def is_trained(self) -> bool:
        return self.method in ("qat", "qad")


@dataclass(frozen=True)
class Suite:
    """A validated suite. `variants` are in the order in which they are made: BF16, made elsewhere, PTQ, trained."""

    path: Path
    name: str
    model: Model
    data: dict[str, Data]
    variants: tuple[ResolvedVariant, ...]
    tasks: tuple[Task, ...]
    engine: Engine
    diagnostics: Diagnostics | None


_POSITIVE = (lambda value: type(value) is int and value > 0, "a positive integer")
_BOOLEAN = (lambda value: type(value) is bool, "true or false")
_SHARE = (lambda value: type(value) is float and 0 < value <= 1, "a number above 0, at most 1, such as 0.9")
_GIB = (lambda value: type(value) in (int, float) and value > 0, "a positive number, in GiB")
_CACHE = (lambda value: value in ("auto", "bfloat16", "fp8"), '"auto" (what the checkpoint says), "bfloat16" or "fp8"')
ENGINE_ARGS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "hf": {"batch_size": _POSITIVE},
    "vllm": {
        "max_model_len": _POSITIVE,
        "max_num_seqs": _POSITIVE,
        "tensor_parallel_size": _POSITIVE,
        "gpu_memory_utilization": _SHARE,
        "kv_cache_memory_gib": _GIB,
        "kv_cache_dtype": _CACHE,
        "enforce_eager": _BOOLEAN,
    },
}
"""The arguments of each engine: what is allowed, as a test and in words."""
_METHOD_ORDER = ("bf16", "checkpoint", "ptq", "qad", "qat")


def load_suite(path: Path) -> Suite:
    """Parse and validate the suite at `path`; SuiteError with one line a mistake."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = (
            f"; did you mean {path.parent / near[0]}?"
            if near
            else "; give the path of a TOML file, such as suites/quickstart.toml"
        )
        raise SuiteError(f"{path}: there is no such suite{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read: {error.strerror}; a suite is a TOML file") from None
    return _Validation(path, raw).suite()


def known_tasks() -> list[str]:
    """Names of the tasks that come with the harness."""
    return sorted(file.stem for file in TASKS_FOLDER.glob("*.yaml"))


class _Validation:
    """Collects every mistake of one file."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.mistakes: list[str] = []

    def suite(self) -> Suite:
        file = self._parse(File, self.raw, "")
        if file is None:
            self._check_names_raw()
            raise SuiteError("\n".join(self.mistakes))
        variants = self._variants(file)
        self._check_tasks(file)
        self._check_data_names(file, variants)
        self._check_engine(file, variants)
        if self.mistakes:
            raise SuiteError("\n".join(self.mistakes))
        return Suite(
            path=self.path,
            name=file.name,
            model=file.model,
            data=file.data,
            variants=tuple(sorted(variants, key=lambda v: _METHOD_ORDER.index(v.method))),
            tasks=file.task,
            engine=file.engine,
            diagnostics=file.diagnostics,
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
                self._add(
                    f"{where}.quantization.block_scales", 'has no effect with method = "ptq": it is about training; remove it'
                )
            if variant.method == "checkpoint" and variant.path is None:
                self._add(f"{where}.path", 'missing; method = "checkpoint" needs the folder of the checkpoint')
            for key, allowed in (
                ("path", variant.method == "checkpoint"),
                ("data", trained),
                ("training", trained),
                ("quantization", quantized),
            ):
                if getattr(variant, key) and not allowed:
                    self._add(f"{where}.{key}", f'has no effect with method = "{variant.method}"; remove it')
            data = variant.data or (next(iter(file.data)) if len(file.data) == 1 else None)
            if trained and data is None:
                self._add(f"{where}.data", f"missing; say which of the data sets trains it: {_listed(file.data)}")
            seeds = (training.seeds if training else None) or (None,)
            for seed in seeds:
                name = variant.name if seed is None else f"{variant.name}-seed{seed}"
                own = (
                    training if training is None or seed is None else training.model_copy(update={"seed": seed, "seeds": None})
                )
                resolved.append(
                    ResolvedVariant(name, variant.method, quantization, own, data if trained else None, variant.path)
                )
        for name in _repeated([variant.name for variant in resolved]):
            self._add("variant", f'the name "{name}" is repeated; names of variants must differ')
        if not any(variant.method == "bf16" for variant in resolved):
            self._add("variant", 'no variant has method = "bf16"; the others are measured against it')
        return resolved

    def _check_scales(self, quantization: Quantization, where: str) -> None:
        """Scale settings that contradict each other, or of which one has no effect beside the others."""
        rule, where = quantization.scale_rule, f"{where}: quantization"
        if rule != "amax" and quantization.block_scales == "recomputed":
            self._add(
                f"{where}.block_scales",
                f'found "recomputed" with scale_rule = "{rule}": to recompute block scales is the amax rule, and the first step would '
                'undo what the rule chose; allowed: "frozen", or scale_rule = "amax"',
            )
        if rule not in ("mse", "gptq") and quantization.scale_weighting != "none":
            self._add(
                f"{where}.scale_weighting",
                f'has no effect with scale_rule = "{rule}", only "mse" and "gptq" weigh errors; remove it',
            )
        weighs = quantization.scale_weighting != "none"
        if quantization.calibration.skip_first_token and not quantization.activations and not weighs:
            self._add(
                f"{where}.calibration.skip_first_token", "has no effect: nothing of calibration is used in W4A16; remove it"
            )

    def _section(self, file: File, key: str, schema: type[Any], override: dict[str, Any], where: str) -> Any:
        if getattr(file, key) is None:
            self._add(key, f"missing; {where} needs it")
            return None
        if not override:
            return getattr(file, key)
        merged = {**self.raw[key], **override}
        for inner in ("calibration",):
            if isinstance(override.get(inner), dict) and isinstance(self.raw[key].get(inner), dict):
                merged[inner] = {**self.raw[key][inner], **override[inner]}
        return self._parse(schema, merged, f"{where}.{key}")

    def _check_tasks(self, file: File) -> None:
        known = known_tasks()
        for index, task in enumerate(file.task):
            if task.name not in known:
                self._add(
                    f"task[{index}].name",
                    f'unknown task "{task.name}"; lm-eval\'s own tasks are not available in this version',
                    near=(task.name, known),
                )
        for name in _repeated([task.name for task in file.task]):
            self._add("task", f'the name "{name}" is repeated; a task is asked once')
        if not file.task and file.diagnostics is None:
            self._add("task", "neither a task nor diagnostics: there is nothing to measure; add one")

    def _check_data_names(self, file: File, variants: list[ResolvedVariant]) -> None:
        used = [("diagnostics.data", file.diagnostics.data)] if file.diagnostics else []
        for variant in variants:
            if variant.data:
                used.append((f'variant "{variant.name}": data', variant.data))
            if variant.quantization:
                used.append((f'variant "{variant.name}": quantization.calibration.data', variant.quantization.calibration.data))
        for key, name in used:
            if name not in file.data:
                self._add(key, f'unknown data set "{name}"', near=(name, file.data))
        for name in sorted(set(file.data) - {name for _, name in used}):
            self._add(f"data.{name}", "nothing uses it; remove it")
        if len({section.seq_len for section in file.data.values()}) > 1:
            self._add("data", "builtin sections differ in seq_len, so their splits would overlap; give all of them one seq_len")
        methods = {variant.method for variant in file.variant}
        if file.quantization and not methods & {"ptq", "qat", "qad"}:
            self._add("quantization", "has no effect: no variant is quantized here; remove it")
        if "block_scales" in self.raw.get("quantization", {}) and not methods & {"qat", "qad"}:
            self._add("quantization.block_scales", "has no effect: no variant is trained; remove it")
        if file.training and not methods & {"qat", "qad"}:
            self._add("training", "has no effect: no variant is trained; remove it")

    def _check_engine(self, file: File, variants: list[ResolvedVariant]) -> None:
        engine, known = file.engine, ENGINE_ARGS[file.engine.kind]
        for key, value in engine.args.items():
            if key not in known:
                self._add(f"engine.args.{key}", "unknown key", near=(key, known))
            elif not known[key][0](value):
                self._add(f"engine.args.{key}", f"found {value!r}; allowed: {known[key][1]}")
        allowed = "native, w4a4_emulation, w4a16 (harness doctor says which of them this machine can run)"
        quantized = [variant for variant in variants if variant.quantization is not None]
        if engine.kind != "vllm":
            if engine.kernels is not None:
                self._add("engine.kernels", f'has no effect with kind = "{engine.kind}"; remove it')
            return
        if engine.kernels is None and quantized:
            self._add("engine.kernels", f'missing; kind = "vllm" needs it where a variant is quantized. Allowed: {allowed}')
        if engine.kernels is not None and all(variant.method == "bf16" for variant in variants):
            self._add("engine.kernels", "has no effect: no variant is quantized; remove it")
        for variant in quantized:
            if engine.kernels == "w4a4_emulation" and variant.quantization and not variant.quantization.activations:
                self._add("engine.kernels", f'"w4a4_emulation", but variant "{variant.name}" is W4A16 (activations = false)')
        if engine.kernels == "w4a4_emulation" and engine.args.get("enforce_eager") is False:
            self._add("engine.args.enforce_eager", "found False; the emulated kernels are not compiled; remove it")

    def _check_names_raw(self) -> None:
        """Name checks that can be made although the file does not parse, so that one run shows all mistakes."""
        for key in ("variant", "task"):
            tables = self.raw.get(key)
            names = [t.get("name") for t in tables if isinstance(t, dict)] if isinstance(tables, list) else []
            for name in _repeated([n for n in names if isinstance(n, str)]):
                self._add(key, f'the name "{name}" is repeated')
            if key == "task":
                for index, task in enumerate(names):
                    if isinstance(task, str) and task not in known_tasks():
                        self._add(f"task[{index}].name", f'unknown task "{task}"', near=(task, known_tasks()))

    def _parse(self, schema: type[Any], raw: Any, where: str) -> Any:
        try:
            return schema.model_validate(_tuples(raw))
        except ValidationError as error:
            for problem in error.errors():
                if problem["type"] != "too_short" or not problem["input"]:  # else: an item of the list is wrong, and reported
                    self._explain(schema, where, problem)
            return None

    def _explain(self, schema: type[Any], where: str, problem: Any) -> None:
        key = _dotted(where, problem["loc"])
        plain = re.sub(r"\[\d+\]", "", key)
        plain = re.sub(r"^(variant\.)(quantization|training)\.", r"\2.", plain)
        plain = re.sub(r"^data\.[^.]+\.", "data.", plain)
        found, kind = problem["input"], problem["type"]
        later = NOT_AVAILABLE_VALUES.get(plain, {}).get(found) if isinstance(found, str) else None
        if kind == "extra_forbidden":
            later = NOT_AVAILABLE_KEYS.get(plain)
            known = _known_keys(schema, problem["loc"][:-1])
            if later:
                self._add(key, f"{later}: not available in this version; remove it")
            else:
                self._add(key, "unknown key", near=(str(problem["loc"][-1]), known))
        elif later:
            self._add(key, f'"{found}" ({later}): not available in this version; allowed: {problem["ctx"]["expected"]}')
        elif kind == "missing":
            self._add(key, "missing; it is required and has no default")
        elif kind == "literal_error":
            allowed = re.findall(r"'([^']*)'", problem["ctx"]["expected"]) or [problem["ctx"]["expected"]]
            self._add(key, f"found {found!r}", near=(str(found), allowed), what="Allowed")
        else:
            hint = " (the commit, 40 hex digits: a branch or tag can move)" if plain == "model.revision" else ""
            self._add(key, f"found {found!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}{hint}")

    def _add(self, key: str, message: str, near: tuple[str, Any] | None = None, what: str = "Known") -> None:
        if near is not None:
            name, known = near
            closest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
            message += f"; did you mean {closest[0]}?" if closest else "."
            message += f" {what}: {_listed(known)}"
        self.mistakes.append(f"{self.path}: {key}: {message}")


def _tuples(value: Any) -> Any:
    """TOML arrays as tuples, which is what the frozen schema holds."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _dotted(where: str, loc: tuple[Any, ...]) -> str:
    key = where
    for part in loc:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    return key or "the file"


def _known_keys(schema: type[Any], loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        field = schema.model_fields.get(part)
        if field is None:
            continue
        schema = _section_type(field.annotation) or schema
    return [field.alias or name for name, field in schema.model_fields.items()]


def _section_type(annotation: Any) -> type[Any] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_type(argument)
        if found:
            return found
    return None


def _repeated(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
